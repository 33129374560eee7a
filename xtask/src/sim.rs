//! `cargo xtask sim`: runs small jobs in virtual time, from seeds, in which things go wrong.

use crate::{Failure, bench, step, workspace};

pub(crate) fn run(options: &[String]) -> Result<(), Failure> {
    let mut trials = workspace::cargo();
    trials.args(["run", "--quiet", "--release", "--package", "xfer-sim", "--example", "trials", "--"]);
    // A seed means the same trial only in the same commit.
    step::shown("simulated jobs", trials.args(options)).map_err(|why| match bench::commit() {
        Some(commit) => format!("{why}; this is commit {commit}"),
        None => why,
    })
}
