//! Building libfabric from source, with the providers that one machine can use, into the target folder.
//!
//! A build that was cut short is never taken for a whole one: the stamp is written last, and holds the recipe.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::step::Log;
use crate::{Failure, apt, workspace};

/// The providers that need no hardware and no other library. `ofi_rxm` is there for the tests that compare with 1.17.
const CONFIGURE: [&str; 5] =
    ["--disable-static", "--enable-only", "--enable-tcp", "--enable-shm", "--enable-rxm"];

/// Programs that the build runs, and the packages that have them.
const TOOLS: [(&str, &str); 6] = [
    ("autoreconf", "autoconf"),
    ("automake", "automake"),
    ("libtoolize", "libtool"),
    ("make", "make"),
    ("cc", "gcc"),
    ("xz", "xz-utils"),
];

/// Where our own libfabric is installed.
pub(crate) fn prefix() -> Result<PathBuf, Failure> {
    Ok(workspace::target()?.join("libfabric"))
}

/// The library below a prefix.
pub(crate) fn library(prefix: &Path) -> PathBuf {
    prefix.join("lib/libfabric.so.1")
}

/// Whether a build by this recipe ran to its end.
pub(crate) fn is_complete(prefix: &Path) -> bool {
    fs::read_to_string(stamp(prefix)).is_ok_and(|recipe| recipe == CONFIGURE.join(" "))
}

fn stamp(prefix: &Path) -> PathBuf {
    prefix.join("complete")
}

/// Builds and installs, doing only what is not done yet. Two at once wait for each other.
pub(crate) fn build(prefix: &Path) -> Result<(), Failure> {
    let work = prefix.with_file_name("libfabric-build");
    let failed = |path: &Path, error| format!("cannot use {}: {error}", path.display());
    fs::create_dir_all(&work).map_err(|error| failed(&work, error))?;
    let log_path = work.join("log");
    println!("  (output in {})", log_path.display());
    let log = Log::create(log_path)?;
    // Whoever held the log before may have built it.
    if is_complete(prefix) {
        return Ok(());
    }

    let missing: Vec<&str> = TOOLS
        .iter()
        .filter(|(program, _)| !workspace::has_program(program))
        .map(|(_, package)| *package)
        .collect();
    if !missing.is_empty() {
        apt::install(&missing, &log)?;
    }
    let download = work.join("download");
    if !download.is_dir() {
        apt::fetch_tarball("libfabric", &work.join("apt"), &download, &log)?;
    }
    let tarball = tarball_in(&download)?;

    // Sources and prefix start anew: what a build that was cut short has left cannot be told from what is good.
    let source = work.join("source");
    for dir in [&source, prefix] {
        fs::remove_dir_all(dir).or_else(apt::ignore_missing).map_err(|error| failed(dir, error))?;
    }
    fs::create_dir_all(&source).map_err(|error| failed(&source, error))?;
    let mut unpack = Command::new("tar");
    unpack
        .arg("--extract")
        .arg("--file")
        .arg(&tarball)
        .arg("--strip-components=1")
        .arg("--directory")
        .arg(&source);
    log.step("unpack", &mut unpack)?;
    log.step("autogen", Command::new("./autogen.sh").current_dir(&source))?;
    let mut configure = Command::new("./configure");
    configure.arg(format!("--prefix={}", prefix.display())).args(CONFIGURE);
    log.step("configure", configure.current_dir(&source))?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    log.step("make", Command::new("make").arg(format!("-j{jobs}")).current_dir(&source))?;
    log.step("install", Command::new("make").arg("install").current_dir(&source))?;
    fs::write(stamp(prefix), CONFIGURE.join(" ")).map_err(|error| failed(prefix, error))?;
    // Objects that nobody needs again; if they stay, they only take room.
    fs::remove_dir_all(&source).ok();
    Ok(())
}

fn tarball_in(download: &Path) -> Result<PathBuf, Failure> {
    let entries =
        fs::read_dir(download).map_err(|error| format!("cannot list {}: {error}", download.display()))?;
    let is_tarball =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().contains(".orig.tar."));
    let mut tarballs = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_tarball);
    tarballs.next().ok_or_else(|| {
        format!("no source tarball in {}; remove that folder and try again", download.display())
    })
}
