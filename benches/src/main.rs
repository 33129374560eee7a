//! Benchmarks of weightsync, each beside a reference in the same run on the same machine.
//!
//! `weightsync-bench loopback` is started by `cargo xtask bench loopback`, which builds the reference too. A figure
//! stands alone nowhere: rounds of ours and of the reference alternate, and what counts is the ratio of the medians. `soak`
//! and `torture` are no benchmarks: they share processes and tables, and say whether something grows, or is ever served that was
//! not committed.

#![forbid(unsafe_code)]

mod cluster;
mod compare;
mod job;
mod lab;
mod ladder;
mod loopback;
mod machine;
mod plan;
mod process;
mod progress;
mod roles;
mod series;
mod simulator;
mod soak;
mod svg;
mod table;
mod torture;
mod usage;
mod weight_ops;

use std::process::ExitCode;

use anyhow::bail;
use clap::Parser as _;

const USAGE: &str = "usage: weightsync-bench loopback|plan|weight-ops|lab|ladder|simulator|cluster|compare|soak|torture [--help]";

fn main() -> anyhow::Result<ExitCode> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["compare", ..] => return compare::run(&compare::Options::parse_from(&words)),
        ["soak", ..] => return soak::run(&soak::Options::parse_from(&words)),
        ["torture", ..] => return torture::run(&torture::Options::parse_from(&words)),
        ["cluster", ..] => cluster::run(&cluster::Options::parse_from(&words)),
        ["loopback", ..] => loopback::run(&loopback::Options::parse_from(&words)),
        ["lab", ..] => lab::run(&lab::Options::parse_from(&words)),
        ["simulator", ..] => simulator::run(&simulator::Options::parse_from(&words)),
        ["ladder", ..] => ladder::run(&ladder::Options::parse_from(&words)),
        ["plan", ..] => plan::run(&plan::Options::parse_from(&words)),
        ["weight-ops", ..] => weight_ops::run(&weight_ops::Options::parse_from(&words)),
        // The processes of a benchmark, started by it.
        [cluster::RANK_COMMAND, place @ ..] => cluster::rank(place),
        ["trainer", address, bytes, fabric] => roles::trainer(address, bytes.parse()?, fabric.parse()?),
        ["inference", address, bytes, fabric] => roles::inference(address, bytes.parse()?, fabric.parse()?),
        [torture::LEASH, parent, program, arguments @ ..] => torture::on_leash(parent, program, arguments),
        ["torture-trainer", part] => torture::trainer(part),
        ["torture-inference", part] => torture::inference(part),
        ["lab-controller", job] => lab::controller(job),
        ["lab-trainer", controller, rank, job] => lab::trainer(controller, rank.parse()?, job),
        ["lab-inference", controller, rank, job] => lab::inference(controller, rank.parse()?, job),
        ["ladder-target", gpus, links, bytes] => {
            ladder::target(gpus.parse()?, links.parse()?, bytes.parse()?)
        }
        ["ladder-sender", rung, links, bytes] => {
            ladder::sender(rung.parse()?, links.parse()?, bytes.parse()?)
        }
        ["memcpy", bytes] => roles::memcpy(bytes.parse()?),
        _ => bail!("{USAGE}"),
    }?;
    Ok(ExitCode::SUCCESS)
}
