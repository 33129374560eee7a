//! Bytes as frames from members to the controller, and what it makes of them: three connections that have proved
//! themselves take turns.

#![no_main]

use std::time::Duration;

use rendezvous::controller::{ConnectionId, Controller, Event};
use rendezvous::{ServerConfig, World};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let messages = rendezvous::fuzzing::to_controller(bytes);
    let mut config = ServerConfig::loopback(World { trainers: 1, inference: 1 }).unwrap().controller;
    config.seed = [0; 32];
    config.deadline = Duration::from_secs(1);
    let mut controller = Controller::new(config).unwrap();
    let mut actions = Vec::new();
    for (number, message) in (0..).zip(messages) {
        let now = Duration::from_millis(100 * number);
        controller.handle(Event::Received(ConnectionId(number % 3), message), now, &mut actions);
        controller.handle(Event::Tick, now, &mut actions);
        actions.clear();
    }
});
