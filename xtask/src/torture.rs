//! `cargo xtask torture`: builds the command and its tormentor, and runs the one on the other.

use std::process::Command;

use crate::libfabric::{self, Profile};
use crate::{Failure, step, workspace};

/// As long as CI has for it, and always the same faults.
const IN_CI: [&str; 4] = ["--minutes", "1", "--seed", "1"];

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let mut torture = command(arguments)?;
    match libfabric::find_or_build(Profile::Dev) {
        Ok(library) => drop(torture.env(libfabric::VARIABLE, library.path)),
        Err(why) if libfabric::is_named() => return Err(why),
        Err(why) => {
            eprintln!("{why}\nno libfabric: only jobs over shared memory are tortured");
            torture.args(["--fabric", "local"]);
        }
    }
    Err(step::in_our_place(&mut torture))
}

/// A minute of it, over this libfabric.
pub(crate) fn in_ci(library: &std::path::Path) -> Result<(), Failure> {
    let mut torture = command(&IN_CI.map(str::to_owned))?;
    step::shown("torture", torture.env(libfabric::VARIABLE, library))
}

/// Built as the tests are, which need the same: pace counts for nothing here.
fn command(arguments: &[String]) -> Result<Command, Failure> {
    let mut build = workspace::cargo();
    build.args([
        "build",
        "--workspace",
        "--all-features",
        "--bin",
        "weightsync",
        "--bin",
        "weightsync-bench",
    ]);
    step::shown("build weightsync and its tormentor", &mut build)?;
    let folder = workspace::target()?.join("debug");
    let mut torture = Command::new(folder.join("weightsync-bench"));
    torture.arg("torture").arg("--weightsync").arg(folder.join("weightsync")).args(arguments);
    Ok(torture)
}
