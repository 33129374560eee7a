//! `cargo xtask test`: everything that can be tested on this machine.

use std::process::Command;

use crate::libfabric::{self, Profile};
use crate::{Failure, real_checkpoint, step, workspace};

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let mut settings = Settings::default();
    match libfabric::find_or_build(Profile::Dev) {
        Ok(library) => settings.set(libfabric::VARIABLE, library.path),
        Err(why) if libfabric::is_named() => return Err(why),
        Err(why) => println!("no libfabric, so the tests on one will be skipped: {why}"),
    }
    settings.set_real_checkpoint()?;
    if arguments.is_empty() && has_nextest() {
        settings.documentation_tests()?;
    }
    settings.all_tests(arguments)
}

/// What the tests are told through the environment.
#[derive(Default)]
pub(crate) struct Settings(Vec<(&'static str, std::ffi::OsString)>);

impl Settings {
    pub(crate) fn set(&mut self, variable: &'static str, value: impl Into<std::ffi::OsString>) {
        self.0.push((variable, value.into()));
    }

    /// Tells of a real checkpoint, if there is one.
    pub(crate) fn set_real_checkpoint(&mut self) -> Result<(), Failure> {
        if let Some(model) = real_checkpoint::find_or_fetch()? {
            self.set(real_checkpoint::VARIABLE, model);
        }
        Ok(())
    }

    /// The examples in the documentation, which nextest does not run.
    pub(crate) fn documentation_tests(&self) -> Result<(), Failure> {
        let mut cargo = workspace::cargo();
        cargo.args(["test", "--doc", "--workspace", "--all-features"]);
        step::shown("documentation tests", self.apply(&mut cargo))
    }

    /// All other tests, or those that `arguments` select. Nothing is printed after the runner's own summary.
    pub(crate) fn all_tests(&self, arguments: &[String]) -> Result<(), Failure> {
        let mut cargo = workspace::cargo();
        // The workspace has no root package, so without a selection this is every member.
        cargo.args(if has_nextest() { &["nextest", "run"][..] } else { &["test"][..] });
        // Tests of GPUs always compile; where there is none they say that they were skipped.
        cargo.arg("--all-features");
        println!("==> tests");
        // All failures of one run are worth more than the first a few seconds sooner.
        match self.apply(cargo.arg("--no-fail-fast").args(arguments)).status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("step `tests` failed: cargo ended with {status}")),
            Err(error) => Err(format!("step `tests` failed: cargo did not start: {error}")),
        }
    }

    fn apply<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.envs(self.0.iter().map(|(variable, value)| (variable, value)))
    }
}

/// Whether cargo-nextest is installed.
pub(crate) fn has_nextest() -> bool {
    let output = workspace::cargo().args(["nextest", "--version"]).output();
    output.is_ok_and(|output| output.status.success())
}
