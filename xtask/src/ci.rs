//! `cargo xtask ci`: the checks that every change must pass, cheap ones first. `.ci/run` calls this and nothing else.

use std::process::Command;
use std::time::Instant;

use crate::libfabric::{self, Profile, Provider};
use crate::step::Log;
use crate::test::{self, Settings};
use crate::{Failure, apt, firewalls, step, torture, workspace};

/// The variable by which tests learn what they may not skip for want of.
const REQUIRE: &str = "WEIGHTSYNC_REQUIRE";

pub(crate) fn run(_: &[String]) -> Result<(), Failure> {
    let start = Instant::now();
    step::shown("formatting", workspace::cargo().args(["fmt", "--all", "--check"]))?;
    firewalls::run(&[]).map_err(|why| format!("step `firewalls` failed: {why}"))?;
    step::shown("clippy", &mut clippy(&["--workspace", "--all-features"]))?;
    // What people take alone must stand without the features that the command brings: the whole workspace never builds them so.
    for bare in [
        &["--package", "xfer-exec", "--no-default-features"][..],
        &["--package", "rendezvous", "--no-default-features"],
        &["--package", "rendezvous"],
        &["--package", "rendezvous", "--features", "etcd"],
        &["--package", "weightsync"],
    ] {
        step::shown(&format!("clippy {}", bare.join(" ")), &mut clippy(bare))?;
    }
    let mut doc = workspace::cargo();
    doc.args(["doc", "--workspace", "--no-deps", "--all-features", "--locked"])
        .env("RUSTDOCFLAGS", "-D warnings");
    step::shown("documentation", &mut doc)?;

    let library =
        libfabric::find_or_build(Profile::Dev).map_err(|why| format!("step `libfabric` failed: {why}"))?;
    if library.provider != Provider::Tcp {
        return Err("step `libfabric` failed: the tests need 1.18 or newer, with native tcp".to_owned());
    }
    let has_lab = has_lab()?;
    torture::in_ci(&library.path)?;
    let mut settings = Settings::default();
    settings.set(libfabric::VARIABLE, library.path);
    let mut required = vec!["libfabric"];
    required.extend(has_lab.then_some("lab"));
    required.extend(has_etcd()?.then_some("etcd"));
    settings.set(REQUIRE, required.join(" "));
    settings.set_real_checkpoint()?;
    if test::has_nextest() {
        settings.documentation_tests()?;
    }
    println!("==> all but the tests: {:.1} s", start.elapsed().as_secs_f64());
    settings.all_tests(&[])
}

/// Whether the lab's tests can run here, with iproute2 installed first if it is missing. A container without the right to
/// make a network namespace is good enough for everything else.
fn has_lab() -> Result<bool, Failure> {
    if !(workspace::has_program("ip") && workspace::has_program("tc")) {
        println!("==> iproute2");
        let log = Log::create(workspace::target()?.join("iproute2.log"))?;
        if let Err(why) = apt::install(&["iproute2"], &log) {
            println!("{why}");
        }
    }
    match weightsync_lab::check() {
        Ok(()) => Ok(true),
        Err(why) => {
            println!("no lab, so the tests in one will be skipped: {why}");
            Ok(false)
        }
    }
}

/// Whether there is an etcd for the tests to start, installed first if it is missing.
fn has_etcd() -> Result<bool, Failure> {
    if !workspace::has_program("etcd") {
        println!("==> etcd");
        let log = Log::create(workspace::target()?.join("etcd.log"))?;
        if let Err(why) = apt::install(&["etcd-server"], &log) {
            println!("no etcd, so the tests with one will be skipped: {why}");
        }
    }
    Ok(workspace::has_program("etcd"))
}

fn clippy(what: &[&str]) -> Command {
    let mut cargo = workspace::cargo();
    // `--locked`: a lock file that does not fit the manifests is a mistake of the change, not of a later one.
    cargo.arg("clippy").args(what).args(["--all-targets", "--locked", "--", "-D", "warnings"]);
    cargo
}
