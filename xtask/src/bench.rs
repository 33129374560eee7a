//! `cargo xtask bench`: builds a benchmark and its reference, and runs them beside each other.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use crate::libfabric::{self, Profile};
use crate::{Failure, step, workspace};

/// What can be measured.
const BENCHMARKS: [&str; 1] = ["loopback"];

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let Some((name, options)) =
        arguments.split_first().filter(|(name, _)| BENCHMARKS.contains(&name.as_str()))
    else {
        return Err(format!("say what to measure: {}", BENCHMARKS.join(", ")));
    };
    let library = match libfabric::find_or_build(Profile::Release) {
        Ok(library) => Some(library.path),
        Err(why) if libfabric::is_named() => return Err(why),
        Err(why) => {
            eprintln!("{why}\nno libfabric: only shared memory is measured");
            None
        }
    };
    let mut build = workspace::cargo();
    build.args(["build", "--release", "--package", "weightsync-bench"]);
    step::shown("build the benchmarks", &mut build)?;
    let mut build = workspace::cargo();
    build.args(["build", "--release", "--package", "libfabric-sys", "--example", "plain_loop"]);
    step::shown("build the plain libfabric loop", &mut build)?;

    let release = workspace::target()?.join("release");
    let program = release.join("weightsync-bench");
    let mut bench = Command::new(&program);
    bench.arg(name);
    if let Some(path) = library {
        bench.env(libfabric::VARIABLE, path).arg("--plain-loop").arg(release.join("examples/plain_loop"));
    }
    bench.args(options);
    Err(format!("cannot start {}: {}", program.display(), bench.exec()))
}
