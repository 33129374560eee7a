//! A demo's ranks behind launchers: in another network namespace, and behind one that does not step aside.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::process::{Signal, kill_process};
use weightsync_lab::LabOptions;

use crate::common::job::{DEADLINE_SECONDS, Job};
use crate::common::tiny;
use crate::{Bed, rank_of};

#[test]
fn ranks_in_another_namespace_die_with_the_demo() {
    let options = LabOptions { links: 1, rate_bits: 1_000_000_000, ..LabOptions::default() };
    let Some(bed) = Bed::up("orphans", tiny, options) else { return };
    let mut demo = bed.demo((1, 2), 4, "--steps 1000000");
    demo.wait_for("version 2");
    demo.kill().was_killed();
    // Not by the lab's end: it still stands.
    bed.job.end();
}

/// A launcher that starts the rank as a child of its own, as `sudo` or `ssh` does: what is killed is the launcher.
fn staying_launcher(folder: &Path) -> String {
    let script = folder.join("launcher");
    fs::write(&script, "#!/bin/sh\n\"$@\"\nexit $?\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    script.display().to_string()
}

#[test]
fn a_launcher_may_stay_between() {
    let (job, checkpoint) = (Job::new(), tiny());
    let (launcher, path) = (staying_launcher(checkpoint.path()), checkpoint.path().display());
    let launched = |words: &str, more: &str| {
        let mut command =
            job.command(format!("demo --fabric local --checkpoint {path} {more}").split_whitespace());
        command.args(["--launch-trainers", words, "--launch-inference", words]);
        job.spawn(&mut command)
    };
    let ended = launched(&format!("  env  LAUNCHED=1 {launcher} "), "--trainers 2 --inference 1 --steps 2");
    assert!(ended.finish().succeeds().stdout.contains("verified: 2 versions"));

    let mut killed = launched(&launcher, "--trainers 1 --inference 1 --steps 1000000");
    killed.wait_for("version 2");
    killed.kill().was_killed();

    // A rank that is lost behind its launcher is noticed and named all the same.
    let more = format!("--trainers 1 --inference 1 --steps 1000000 --deadline {DEADLINE_SECONDS}");
    let mut lost = launched(&launcher, &more);
    lost.wait_for("version 2");
    kill_process(rank_of(&job, "serve"), Signal::KILL).unwrap();
    lost.finish().fails(1, &["inference 0"]);
    job.end();
}

#[test]
fn a_launcher_that_does_not_start_is_named() {
    let (job, checkpoint) = (Job::new(), tiny());
    let path = checkpoint.path().display();
    let demo = format!("demo --fabric local --deadline 1 --checkpoint {path} --trainers 1 --inference 1");
    job.run(&format!("{demo} --launch-inference no-such-launcher")).fails(1, &["`no-such-launcher`"]);
    job.run(&format!("{demo} --launch-trainers false")).fails(1, &["trainer 0"]);
    job.run(&format!("{demo} --listen 0.0.0.0:0")).fails(1, &["--listen 0.0.0.0:0", "name an address"]);
    job.end();
}
