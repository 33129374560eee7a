//! `weightsync demo` with its ranks behind launchers: in the two hosts of a lab, and behind one that does not step aside.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use common::job::{DEADLINE_SECONDS, Job, has_libfabric};
use common::tiny;
use rustix::process::Signal;
use serde_json::Value;
use weightsync_lab::{Lab, LabOptions, Side};

/// Whether labs can be built here; says so if not, and fails where `WEIGHTSYNC_REQUIRE` asks for it.
fn has_lab() -> bool {
    let Err(why) = weightsync_lab::check() else { return true };
    let required = std::env::var("WEIGHTSYNC_REQUIRE").unwrap_or_default();
    assert!(!required.contains("lab"), "a lab is required here: {why}");
    println!("skipped: needs root and iproute2: {why}");
    false
}

/// A lab by a name of this test's own.
fn lab_of(links: u16, name: &str) -> Lab {
    let options = LabOptions { links, rate_bits: 1_000_000_000, ..LabOptions::default() };
    Lab::up(&format!("cli-{}-{name}", std::process::id()), &options).unwrap()
}

/// A demo whose trainers are on side A, where it runs itself, and whose inference ranks are on side B, with all links dealt
/// to the ranks of each side.
fn demo(job: &Job, lab: &Lab, checkpoint: &Path, more: &str) -> Command {
    let nics: Vec<String> = (0..lab.options().links).map(Lab::device).collect();
    let listen = Lab::control_address(Side::A);
    let plain = job.command(
        format!(
            "demo --fabric tcp --deadline {DEADLINE_SECONDS} --listen {listen}:0 --nic {} {more} --json",
            nics.join(",")
        )
        .split_whitespace(),
    );
    let mut demo = lab.command(Side::A, plain.get_program());
    demo.args(plain.get_args()).arg("--checkpoint").arg(checkpoint);
    demo.args(["--launch-inference", &lab.prefix(Side::B).join(" ")]);
    for (variable, value) in plain.get_envs() {
        match value {
            Some(value) => demo.env(variable, value),
            None => demo.env_remove(variable),
        };
    }
    demo
}

/// Bytes that a side has sent by a NIC.
fn sent(lab: &Lab, side: Side, nic: &str) -> u64 {
    let mut read = lab.command(side, "cat");
    let output = read.arg(format!("/sys/class/net/{nic}/statistics/tx_bytes")).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// Runs a demo of two trainers and two inference ranks: every byte goes by the links, all of which are used.
fn weights_go_over(links: u16) {
    if !has_lab() || !has_libfabric() {
        return;
    }
    let (job, checkpoint, lab) = (Job::new(), tiny(), lab_of(links, "bytes"));
    let mut demo = demo(&job, &lab, checkpoint.path(), "--trainers 2 --inference 2 --steps 3");
    let output = job.spawn(&mut demo).finish().succeeds();
    let summary: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(summary["verified"], true);
    let pushed = 3 * summary["plan"]["bytes"].as_u64().unwrap();
    let by_link: Vec<u64> = (0..links).map(|link| sent(&lab, Side::A, &Lab::device(link))).collect();
    assert!(by_link.iter().sum::<u64>() > pushed, "{pushed} pushed, sent by link {by_link:?}");
    let least = pushed / u64::from(links) / 4;
    assert!(by_link.iter().all(|sent| *sent > least), "{pushed} pushed, sent by link {by_link:?}");
    let control = sent(&lab, Side::A, "control");
    assert!(control < pushed / 4, "{pushed} pushed, {control} on the control link");
    job.end();
}

#[test]
fn weights_go_over_one_shaped_link() {
    weights_go_over(1);
}

#[test]
fn weights_go_over_four_shaped_links() {
    weights_go_over(4);
}

#[test]
fn ranks_in_another_namespace_die_with_the_demo() {
    if !has_lab() || !has_libfabric() {
        return;
    }
    let (job, checkpoint, lab) = (Job::new(), tiny(), lab_of(1, "orphans"));
    let mut demo = demo(&job, &lab, checkpoint.path(), "--trainers 1 --inference 2 --steps 1000000");
    let mut running = job.spawn(&mut demo);
    running.wait_for("version 2");
    running.kill().was_killed();
    // Not by the lab's end: it still stands.
    job.end();
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
    let serving = |pid: &rustix::process::Pid| {
        let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(b"serve")
    };
    let rank = job.alive().into_iter().find(serving).unwrap();
    rustix::process::kill_process(rank, Signal::KILL).unwrap();
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
