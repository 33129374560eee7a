//! NCCL's broadcast and send of as many bytes, where PyTorch brings it: what others push weights with.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::measure::{Figures, Reference, Rounds};
use crate::report::Report;

const SCRIPT: &str = include_str!("nccl.py");

/// Ends well when PyTorch has NCCL.
const PROBE: &str = "import sys, torch; sys.exit(not torch.distributed.is_nccl_available())";

/// The script needs some 20 s, most of it to load PyTorch.
const DEADLINE: Duration = Duration::from_secs(180);

/// The rank that tells the times: what was sent is there when it has been received.
const RECEIVER: &str = "1";

const POLL: Duration = Duration::from_millis(50);

pub(crate) fn measure(report: &mut Report, bytes: u64, peer_copy: Rounds) {
    let mut probe = Command::new("python3");
    probe.args(["-c", PROBE]).stdout(Stdio::null()).stderr(Stdio::null());
    if !probe.status().is_ok_and(|status| status.success()) {
        report.skip("NCCL", "python3 has no PyTorch with NCCL");
        return;
    }
    match rounds(bytes, report.rounds()) {
        Ok(found) => {
            for (name, seconds) in found {
                let reference = Reference { name: "cuMemcpyPeerAsync", rounds: peer_copy.clone() };
                let rounds = Rounds { bytes, seconds };
                report.add(
                    &format!("NCCL {name}"),
                    Ok(Figures { rounds, reference: Some(reference), target: None }),
                );
            }
        }
        // What keeps another library from working here is not ours to judge.
        Err(error) => report.skip("NCCL", &format!("{error:#}")),
    }
}

/// The seconds of each round, by name.
fn rounds(bytes: u64, rounds: usize) -> anyhow::Result<BTreeMap<String, Vec<f64>>> {
    let folder = std::env::temp_dir().join(format!("weightsync-hw-{}", std::process::id()));
    fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let found = run(&folder, bytes, rounds);
    fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    found
}

fn run(folder: &Path, bytes: u64, rounds: usize) -> anyhow::Result<BTreeMap<String, Vec<f64>>> {
    let (script, store, output) = (folder.join("nccl.py"), folder.join("store"), folder.join("output"));
    fs::write(&script, SCRIPT)?;
    let mut ranks = Vec::new();
    for rank in ["0", RECEIVER] {
        let mut python = Command::new("python3");
        python.arg(&script).arg(rank).arg(&store).args([bytes.to_string(), rounds.to_string()]);
        let output = if rank == RECEIVER { fs::File::create(&output)?.into() } else { Stdio::null() };
        let started = python.stdin(Stdio::null()).stdout(output).spawn();
        match started {
            Ok(child) => ranks.push(child),
            Err(error) => {
                end(&mut ranks);
                return Err(error).context("python3 did not start");
            }
        }
    }
    if let Err(error) = wait(&mut ranks) {
        end(&mut ranks);
        return Err(error);
    }
    let text = fs::read_to_string(&output)?;
    // NCCL may print lines of its own.
    let line = text.lines().rev().find(|line| line.starts_with('{'));
    serde_json::from_str(line.context("no figures")?).context("its figures are not JSON")
}

/// Until all have ended well, or one has not.
fn wait(ranks: &mut [Child]) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut left: Vec<usize> = (0..ranks.len()).collect();
    while !left.is_empty() {
        if began.elapsed() > DEADLINE {
            bail!("rank {left:?} has not ended after {} s", DEADLINE.as_secs());
        }
        let mut running = Vec::new();
        for &rank in &left {
            match ranks[rank].try_wait()? {
                Some(status) if status.success() => {}
                Some(status) => bail!("rank {rank} ended with {status}"),
                None => running.push(rank),
            }
        }
        left = running;
        std::thread::sleep(POLL);
    }
    Ok(())
}

fn end(ranks: &mut [Child]) {
    for rank in ranks {
        // One that has ended already needs no end.
        rank.kill().ok();
        rank.wait().ok();
    }
}
