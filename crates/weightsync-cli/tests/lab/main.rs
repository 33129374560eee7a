//! Ranks in the two hosts of a lab: which way the bytes go, what becomes of a push when links and ranks fail, and
//! launchers between a demo and its ranks.
//!
//! Nothing is timed: a fault falls somewhere into a push, and what must hold, holds wherever it falls.

#[path = "../common/mod.rs"]
mod common;
mod launch;
mod links;
mod stops;

use std::process::Command;

use common::job::{Job, Output, Process, has_libfabric};
use rustix::process::Pid;
use serde_json::Value;
use tempfile::TempDir;
use weightsync_cli::synthetic::{Shape, ensure};
use weightsync_lab::{Lab, LabOptions, Side};

/// Whether labs can be built here; says so if not, and fails where `WEIGHTSYNC_REQUIRE` asks for it.
fn has_lab() -> bool {
    let Err(why) = weightsync_lab::check() else { return true };
    let required = std::env::var("WEIGHTSYNC_REQUIRE").unwrap_or_default();
    assert!(!required.contains("lab"), "a lab is required here: {why}");
    println!("skipped: needs root and iproute2: {why}");
    false
}

/// A model of 20 MB: over 25 MB/s of links a version takes most of a second, long enough for a fault to fall into one.
fn medium() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let (layers, hidden, vocab, inner) = (2, 512, 2000, 2048);
    let shape = Shape { name: "medium".into(), layers, hidden, vocab, inner, head_dim: 64, ..Shape::tiny() };
    ensure(folder.path(), &shape, 1, &mut |_, _| {}).unwrap();
    folder
}

/// A job between the two sides of a lab: trainers on A, where a demo runs itself, and inference ranks on B.
struct Bed {
    job: Job,
    lab: Lab,
    checkpoint: TempDir,
}

impl Bed {
    /// A lab by a name of this test's own; `None`, with a word, where there can be none.
    fn up(name: &str, checkpoint: fn() -> TempDir, options: LabOptions) -> Option<Bed> {
        if !has_lab() || !has_libfabric() {
            return None;
        }
        let lab = Lab::up(&format!("cli-{}-{name}", std::process::id()), &options).unwrap();
        Some(Bed { job: Job::new(), lab, checkpoint: checkpoint() })
    }

    /// The program on a side, with these arguments, separated by spaces, and the checkpoint.
    fn command(&self, side: Side, arguments: &str) -> Command {
        let plain = self.job.command(arguments.split_whitespace());
        let mut command = self.lab.command(side, plain.get_program());
        command.args(plain.get_args());
        for (variable, value) in plain.get_envs() {
            match value {
                Some(value) => command.env(variable, value),
                None => command.env_remove(variable),
            };
        }
        command
    }

    /// Starts a demo with all links dealt to the ranks of each side.
    fn demo(&self, ranks: (u32, u32), deadline_seconds: u32, more: &str) -> Process {
        let ((trainers, inference), nics) = (ranks, self.nics());
        let arguments = format!(
            "demo --fabric tcp --deadline {deadline_seconds} --listen {}:0 --nic {nics} --trainers {trainers} --inference \
             {inference} {more}",
            Lab::control_address(Side::A),
        );
        let mut demo = self.command(Side::A, &arguments);
        demo.arg("--checkpoint").arg(self.checkpoint.path());
        demo.args(["--launch-inference", &self.lab.prefix(Side::B).join(" ")]);
        self.job.spawn(&mut demo)
    }

    /// The NICs of all links.
    fn nics(&self) -> String {
        (0..self.lab.options().links).map(Lab::device).collect::<Vec<_>>().join(",")
    }
}

/// A running rank of a job by its command, push or serve.
fn rank_of(job: &Job, command: &str) -> Pid {
    let runs = |pid: &Pid| {
        let line = std::fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        line.split(|byte| *byte == 0).nth(1) == Some(command.as_bytes())
    };
    job.alive().into_iter().find(runs).unwrap()
}

/// What a demo with `--json` says at its end.
struct Summary(Value);

impl Summary {
    /// Of a demo that succeeded: every version was verified on every rank, and nothing was lost or written twice.
    fn of(output: Output, steps: u64) -> Summary {
        let output = output.succeeds();
        let summary: Value = serde_json::from_str(&output.stdout).unwrap();
        let number = |value: &Value| value.as_u64().unwrap();
        assert_eq!(summary["verified"], true);
        let (bytes, writes) = (number(&summary["plan"]["bytes"]), number(&summary["plan"]["writes"]));
        let versions = summary["versions"].as_array().unwrap();
        assert_eq!(versions.len() as u64, steps);
        for version in versions {
            let found = ["bytes", "writes", "verified_bytes"].map(|field| number(&version[field]));
            assert_eq!(found, [bytes, writes, bytes], "{version}");
        }
        let summary = Summary(summary);
        let rails = summary.rails();
        assert_eq!(rails.iter().map(|(_, bytes, _)| bytes).sum::<u64>(), steps * bytes, "{rails:?}");
        assert_eq!(rails.iter().map(|(.., writes)| writes).sum::<u64>(), steps * writes, "{rails:?}");
        summary
    }

    /// Name, bytes and WRITEs of every rail of every trainer.
    fn rails(&self) -> Vec<(String, u64, u64)> {
        let ranks = self.0["ranks"].as_array().unwrap().iter();
        let rails = ranks.filter_map(|rank| rank["rails"].as_array()).flatten();
        let number = |value: &Value| value.as_u64().unwrap();
        rails
            .map(|rail| {
                (rail["name"].as_str().unwrap().into(), number(&rail["bytes"]), number(&rail["writes"]))
            })
            .collect()
    }

    /// What was given up, whole rails and ways to one rank, in words: whose, which rail, since when, why.
    fn given_up(&self) -> Vec<GivenUp> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let losses = self.0["given_up"].as_array().unwrap().iter();
        losses
            .map(|loss| GivenUp {
                rank: text(&loss["rank"]),
                rail: text(&loss["rail"]),
                to: text(&loss["to"]),
                version: loss["version"].as_u64().unwrap(),
                reason: text(&loss["reason"]),
            })
            .collect()
    }
}

/// A rail that a summary says was given up, or with `to` only its way there.
#[derive(Debug)]
struct GivenUp {
    rank: String,
    rail: String,
    to: String,
    version: u64,
    reason: String,
}
