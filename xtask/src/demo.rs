//! `cargo xtask demo`: from a fresh clone to a checked push in one command.

use std::process::Command;

use crate::libfabric::{self, Profile};
use crate::{Failure, step, workspace};

/// What the demo is given where the person does not say otherwise.
const DEFAULTS: [(&str, &str); 3] = [("--trainers", "4"), ("--inference", "2"), ("--steps", "5")];

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let (library, fabric) = match libfabric::find_or_build(Profile::Release) {
        Ok(library) => (Some(library.path), "tcp"),
        // A person who names a library must not get shared memory for it.
        Err(why) if libfabric::is_named() => return Err(why),
        Err(why) => {
            println!("{why}\nno libfabric, so the demo runs over shared memory alone (--fabric local)");
            (None, "local")
        }
    };
    let mut build = workspace::cargo();
    build.args(["build", "--release", "--package", "weightsync-cli"]);
    step::shown("build weightsync", &mut build)?;

    let mut demo = Command::new(workspace::target()?.join("release/weightsync"));
    demo.arg("demo").envs(library.map(|path| (libfabric::VARIABLE, path)));
    let defaults = DEFAULTS.into_iter().chain([("--fabric", fabric)]);
    for (flag, value) in defaults.filter(|(flag, _)| !given(arguments, flag)) {
        demo.args([flag, value]);
    }
    demo.args(arguments);
    println!("==> {demo:?}");
    Err(step::in_our_place(&mut demo))
}

/// Whether this option is among them, in either form.
pub(crate) fn given(arguments: &[String], flag: &str) -> bool {
    arguments.iter().any(|argument| argument.split('=').next() == Some(flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flag_is_seen_in_both_forms() {
        let arguments = ["--steps=3".to_owned(), "--fabric".to_owned(), "local".to_owned()];
        assert!(given(&arguments, "--steps") && given(&arguments, "--fabric"));
        assert!(!given(&arguments, "--trainers") && !given(&arguments, "--step"));
    }
}
