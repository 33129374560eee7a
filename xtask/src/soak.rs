//! `cargo xtask soak`: builds the command and what watches it, and runs the one under the other.

use std::process::Command;

use crate::{Failure, bench, demo, step, workspace};

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let mut build = workspace::cargo();
    build.args(["build", "--release", "--package", "weightsync-cli", "--bin", "weightsync"]);
    build.args(["--package", "weightsync-bench", "--bin", "weightsync-bench"]);
    step::shown("build weightsync and its soak", &mut build)?;
    let folder = workspace::target()?.join("release");
    let mut soak = Command::new(folder.join("weightsync-bench"));
    soak.arg("soak").arg("--weightsync").arg(folder.join("weightsync")).args(arguments);
    if !bench::add_libfabric(&mut soak)? && !demo::given(arguments, "--fabric") {
        soak.args(["--fabric", "local"]);
    }
    Err(step::in_our_place(&mut soak))
}
