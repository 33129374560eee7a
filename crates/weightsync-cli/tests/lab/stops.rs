//! A receiver that does not run for a while: nobody else is to blame for that, and no rail.

use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Signal, kill_process};
use weightsync_lab::LabOptions;

use crate::{Bed, Summary, medium, rank_of};

/// Longer than a rail may stall (a tenth of the deadline), shorter than a rank may be silent (half of it).
const DEADLINE_SECONDS: u32 = 12;
const STOPPED: Duration = Duration::from_millis(1600);

#[test]
fn a_receiver_that_is_stopped_and_goes_on_keeps_all_rails() {
    let options = LabOptions { links: 8, rate_bits: 25_000_000, ..LabOptions::default() };
    let Some(bed) = Bed::up("stopped", medium, options) else { return };
    let mut demo = bed.demo((1, 1), DEADLINE_SECONDS, "--steps 4 --chunk 64 --json");
    for version in 1..=2 {
        demo.wait_for(&format!("version {version}: every byte verified"));
        sleep(Duration::from_millis(300));
        let receiver = rank_of(&bed.job, "serve");
        kill_process(receiver, Signal::STOP).unwrap();
        sleep(STOPPED);
        kill_process(receiver, Signal::CONT).unwrap();
    }
    let summary = Summary::of(demo.finish(), 4);
    assert!(summary.given_up().is_empty(), "{:?}", summary.given_up());
    bed.job.end();
}
