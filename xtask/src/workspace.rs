//! Where things are: the repository, its target folder, its cargo.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Failure;

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    // Cargo sets the variable when it runs us; the compiled-in value serves a binary that is started by hand.
    let manifest_dir = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&manifest_dir).parent().map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// The target folder, wherever cargo's configuration puts it: this program lies in its `debug`.
pub(crate) fn target() -> Result<PathBuf, Failure> {
    let program =
        env::current_exe().map_err(|error| format!("cannot tell where xtask itself lies: {error}"))?;
    match program.ancestors().nth(2) {
        Some(target) => Ok(target.to_owned()),
        None => {
            Err(format!("{} does not lie in a target folder; start it with `cargo xtask`", program.display()))
        }
    }
}

/// The cargo that runs us, in the root.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Whether a program of this name is on `PATH`.
pub(crate) fn has_program(name: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|dir| dir.join(name).is_file()))
}
