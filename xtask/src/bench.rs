//! `cargo xtask bench`: builds a benchmark and its reference, and runs them beside each other.

use std::process::Command;

use crate::libfabric::{self, Profile};
use crate::{Failure, step, workspace};

/// What can be measured.
const BENCHMARKS: [&str; 8] =
    ["loopback", "plan", "weight-ops", "lab", "ladder", "simulator", "cluster", "compare"];

/// Tells the build which commit it is of; results carry it.
pub(crate) const COMMIT_VARIABLE: &str = "WEIGHTSYNC_COMMIT";

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let Some((name, options)) =
        arguments.split_first().filter(|(name, _)| BENCHMARKS.contains(&name.as_str()))
    else {
        return Err(format!("say what to measure: {}", BENCHMARKS.join(", ")));
    };
    let mut build = workspace::cargo();
    build.args(["build", "--release", "--package", "weightsync-bench"]);
    if let Some(commit) = commit() {
        build.env(COMMIT_VARIABLE, commit);
    }
    step::shown("build the benchmarks", &mut build)?;
    let mut bench = Command::new(workspace::target()?.join("release/weightsync-bench"));
    bench.arg(name);
    match name.as_str() {
        "loopback" | "lab" => add_plain_loop(&mut bench)?,
        "ladder" | "simulator" => drop(add_libfabric(&mut bench)?),
        // A cluster has its own libfabric, which knows its NICs.
        "cluster" if options.iter().any(|option| option.starts_with("--local")) => {
            add_libfabric(&mut bench)?;
        }
        _ => {}
    }
    bench.args(options);
    Err(step::in_our_place(&mut bench))
}

/// The commit that is checked out, marked where files differ from it; none without git.
pub(crate) fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").current_dir(workspace::root()).args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain"])?;
    Some(if changed.is_empty() { commit } else { format!("{commit}, with changes") })
}

/// Names a libfabric to the benchmark; whether there is one.
pub(crate) fn add_libfabric(bench: &mut Command) -> Result<bool, Failure> {
    match libfabric::find_or_build(Profile::Release) {
        Ok(library) => {
            bench.env(libfabric::VARIABLE, library.path);
            Ok(true)
        }
        Err(why) if libfabric::is_named() => Err(why),
        Err(why) => {
            eprintln!("{why}\nno libfabric: only shared memory is measured");
            Ok(false)
        }
    }
}

/// Builds what `loopback` is measured beside, where there is a libfabric.
fn add_plain_loop(bench: &mut Command) -> Result<(), Failure> {
    if !add_libfabric(bench)? {
        return Ok(());
    }
    let mut build = workspace::cargo();
    build.args(["build", "--release", "--package", "libfabric-sys", "--example", "plain_loop"]);
    step::shown("build the plain libfabric loop", &mut build)?;
    bench.arg("--plain-loop").arg(workspace::target()?.join("release/examples/plain_loop"));
    Ok(())
}
