//! Bytes as frames from members to the controller, and what it makes of them: connections that have proved themselves take
//! turns, end and are replaced; commits are recorded or not; time passes. What is committed stays so.
//!
//! The first byte is the job's policy, the second a number of control bytes, one for each message.

#![no_main]

use std::time::Duration;

use rendezvous::controller::{Action, ConnectionId, Controller, Event};
use rendezvous::{Commit, OnLoss, PushId, ServerConfig, World};

/// Connections at a time, so that two ranks can be lost and come back.
const CONNECTIONS: u64 = 4;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let [policy, controls, rest @ ..] = bytes else { return };
    let (controls, frames) = rest.split_at_checked((*controls).into()).unwrap_or((rest, &[]));
    let mut config = ServerConfig::loopback(World { trainers: 1, inference: 1 }).unwrap().controller;
    config.seed = [0; 32];
    config.deadline = Duration::from_secs(1);
    config.on_loss = OnLoss::ALL[usize::from(policy % 3)].0;
    config.resume = (policy & 4 != 0).then_some(Commit { version: 1, push: PushId([1; 16]) });
    let mut controller = Controller::new(config).unwrap();
    let (mut actions, mut now) = (Vec::new(), Duration::ZERO);
    let mut controls = controls.iter().copied().chain(std::iter::repeat(0));
    for (number, message) in (0..).zip(rendezvous::fuzzing::to_controller(frames)) {
        let control = controls.next().unwrap_or(0);
        let connection = ConnectionId(number % CONNECTIONS);
        let next = match control & 3 {
            1 => Event::Disconnected(connection, "gone".into()),
            2 => Event::Recorded(Ok(())),
            3 => Event::Recorded(Err("no space".into())),
            _ => Event::Tick,
        };
        now += Duration::from_millis(100) * u32::from(control >> 2 & 15);
        for event in [Event::Received(connection, message), next, Event::Tick] {
            let committed = controller.committed();
            controller.handle(event, now, &mut actions);
            assert!(controller.committed() >= committed, "what was committed is not any more");
        }
        // As most drivers do: at once.
        if control & 128 != 0 && actions.iter().any(|action| matches!(action, Action::Record(_))) {
            controller.handle(Event::Recorded(Ok(())), now, &mut actions);
        }
        actions.clear();
    }
});
