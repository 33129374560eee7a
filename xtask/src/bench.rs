//! `cargo xtask bench`: builds a benchmark and its reference, and runs them beside each other.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::libfabric::{self, Profile};
use crate::{Failure, step, workspace};

/// What can be measured.
const BENCHMARKS: [&str; 3] = ["loopback", "plan", "weight-ops"];

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let Some((name, options)) =
        arguments.split_first().filter(|(name, _)| BENCHMARKS.contains(&name.as_str()))
    else {
        return Err(format!("say what to measure: {}", BENCHMARKS.join(", ")));
    };
    let mut build = workspace::cargo();
    build.args(["build", "--release", "--package", "weightsync-bench"]);
    step::shown("build the benchmarks", &mut build)?;
    let program = workspace::target()?.join("release/weightsync-bench");
    let mut bench = Command::new(&program);
    bench.arg(name);
    if name == "loopback" {
        add_plain_loop(&mut bench)?;
    }
    bench.args(options);
    Err(format!("cannot start {}: {}", program.display(), bench.exec()))
}

/// Builds what `loopback` is measured beside, where there is a libfabric.
fn add_plain_loop(bench: &mut Command) -> Result<(), Failure> {
    let library = match libfabric::find_or_build(Profile::Release) {
        Ok(library) => library.path,
        Err(why) if libfabric::is_named() => return Err(why),
        Err(why) => {
            eprintln!("{why}\nno libfabric: only shared memory is measured");
            return Ok(());
        }
    };
    let mut build = workspace::cargo();
    build.args(["build", "--release", "--package", "libfabric-sys", "--example", "plain_loop"]);
    step::shown("build the plain libfabric loop", &mut build)?;
    let plain_loop = workspace::target()?.join("release/examples/plain_loop");
    bench.env(libfabric::VARIABLE, library).arg("--plain-loop").arg(plain_loop);
    Ok(())
}
