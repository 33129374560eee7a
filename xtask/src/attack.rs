//! `cargo xtask attack`: builds the command and its attacker, and runs the one on the other.

use std::process::Command;

use crate::{Failure, step, workspace};

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let mut build = workspace::cargo();
    build.args(["build", "--release", "--package", "weightsync-cli", "--bin", "weightsync"]);
    build.args(["--package", "weightsync-bench", "--bin", "attack"]);
    step::shown("build weightsync and its attacker", &mut build)?;
    let folder = workspace::target()?.join("release");
    let mut attack = Command::new(folder.join("attack"));
    attack.arg("--weightsync").arg(folder.join("weightsync")).args(arguments);
    Err(step::in_our_place(&mut attack))
}
