//! The borders between crates, checked: who may depend on what, where `unsafe` may stand, what does no I/O.
//!
//! These are the design's invariants as far as text and `cargo tree` can tell. A rule that finds nothing to look at
//! fails, so that a renamed file does not switch its check off.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::rust_source::{code_only, lines_with_word, std_modules};
use crate::{Failure, workspace};

/// What needs hardware or its library.
const HARDWARE: [&str; 2] = ["libfabric-sys", "cudarc"];

/// Crates that must be free of hardware. Features are off: what a feature brings is asked for.
const HARDWARE_FREE: [&str; 5] = ["xfer-plan", "topology", "xfer-exec", "xfer-sim", "weight-ops"];

/// Sources that compute and nothing else: time, seeds and events are their arguments.
const PURE: [&str; 5] = [
    "crates/xfer-plan/src/",
    "crates/xfer-sim/src/",
    "crates/weight-ops/src/",
    "crates/xfer-exec/src/engine",
    "crates/xfer-exec/src/program",
];

/// The modules of `std` that the world comes in by.
const IMPURE_MODULES: [&str; 8] = ["net", "fs", "time", "thread", "io", "env", "process", "os"];

/// Sources that may hold `unsafe`: the borders to C, instructions that not every CPU has, and memory that other processes
/// share.
const UNSAFE_ALLOWED: [&str; 8] = [
    "crates/libfabric-sys/",
    "crates/efa-core/",
    "crates/gpu-mem/",
    "crates/weight-ops/src/cuda/memory.rs",
    "crates/weight-ops/src/cuda/operation.rs",
    "crates/weight-ops/src/isa.rs",
    "crates/xfer-exec/src/local",
    "benches/plain_loop.rs",
];

/// Hosts of package registries, in pieces: packages come from where a machine is configured to take them.
const REGISTRIES: [&[&str]; 10] = [
    &["pypi", "org"],
    &["pythonhosted", "org"],
    &["crates", "io"],
    &["deb", "debian", "org"],
    &["security", "debian", "org"],
    &["snapshot", "debian", "org"],
    &["archive", "ubuntu", "com"],
    &["ports", "ubuntu", "com"],
    &["npmjs", "org"],
    &["proxy", "golang", "org"],
];

/// Written by cargo, which names its registry in it.
const LOCK_FILE: &str = "Cargo.lock";

/// One file of the project.
struct Source {
    /// Relative to the root, with `/`.
    path: String,
    text: String,
}

/// `cargo xtask firewalls`: every breach is told, and any is a failure.
pub(crate) fn run(_: &[String]) -> Result<(), Failure> {
    println!("==> firewalls");
    let start = Instant::now();
    let sources = sources()?;
    let mut breaches = Vec::new();
    for package in HARDWARE_FREE {
        breaches.extend(hardware_in_tree(package, &dependencies(package)?));
    }
    breaches.extend(impure(&sources));
    breaches.extend(misplaced_unsafe(&sources));
    breaches.extend(crates_without_readme(&sources));
    breaches.extend(registry_names(&sources));
    if !breaches.is_empty() {
        return Err(format!("{} breaches\n  {}", breaches.len(), breaches.join("\n  ")));
    }
    println!("==> firewalls: {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// The project's text files: what git tracks or would track.
fn sources() -> Result<Vec<Source>, Failure> {
    let root = workspace::root();
    let mut git = Command::new("git");
    // A checkout that another user made, as in many a container, is good enough to be listed.
    git.arg("-c").arg(format!("safe.directory={}", root.display()));
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(&root);
    let listed = output(&mut git)?;
    let mut paths: Vec<&str> = listed.split('\0').filter(|path| !path.is_empty()).collect();
    paths.sort_unstable();
    paths.dedup();
    // What is no text, or was deleted but is still tracked, holds no words.
    let read = |path: &str| {
        fs::read_to_string(root.join(path)).ok().map(|text| Source { path: path.to_owned(), text })
    };
    Ok(paths.into_iter().filter_map(read).collect())
}

/// Everything that a package is built from, without features.
fn dependencies(package: &str) -> Result<String, Failure> {
    let mut tree = workspace::cargo();
    tree.args([
        "tree",
        "--package",
        package,
        "--no-default-features",
        "--edges",
        "normal,build",
        "--prefix",
        "none",
    ]);
    output(&mut tree)
}

fn output(command: &mut Command) -> Result<String, Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{program} did not start: {error}"))?;
    if !output.status.success() {
        return Err(format!("{program} failed: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    String::from_utf8(output.stdout).map_err(|error| format!("{program} did not print text: {error}"))
}

fn hardware_in_tree(package: &str, tree: &str) -> Vec<String> {
    let names: Vec<&str> = tree.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let found = HARDWARE.iter().filter(|hardware| names.contains(hardware));
    found
        .map(|hardware| {
            format!("{package} depends on {hardware}; see `cargo tree -p {package} -i {hardware}`")
        })
        .collect()
}

fn impure(sources: &[Source]) -> Vec<String> {
    let mut breaches = Vec::new();
    for pure in PURE {
        let mut files =
            sources.iter().filter(|source| is_rust(source) && source.path.starts_with(pure)).peekable();
        if files.peek().is_none() {
            breaches.push(format!(
                "{pure} has no sources; if it was renamed, rename it in xtask/src/firewalls.rs too"
            ));
        }
        for file in files {
            let modules = std_modules(&code_only(&file.text)).into_iter();
            let impure = modules.filter(|(_, module)| IMPURE_MODULES.contains(&module.as_str()));
            breaches.extend(impure.map(|(line, module)| {
                format!(
                    "{}:{line}: std::{module} in a source that does no I/O and reads no clock (a Duration is core::time's)",
                    file.path
                )
            }));
        }
    }
    breaches
}

fn misplaced_unsafe(sources: &[Source]) -> Vec<String> {
    let allowed = |path: &str| UNSAFE_ALLOWED.iter().any(|allowed| path.starts_with(allowed));
    let mut breaches = Vec::new();
    for source in sources.iter().filter(|source| is_rust(source) && !allowed(&source.path)) {
        let lines = lines_with_word(&code_only(&source.text), "unsafe");
        breaches
            .extend(lines.iter().map(|line| format!("{}:{line}: `unsafe` is not allowed here", source.path)));
    }
    breaches
}

fn crates_without_readme(sources: &[Source]) -> Vec<String> {
    let has = |path: PathBuf| sources.iter().any(|source| Path::new(&source.path) == path);
    let manifests =
        sources.iter().map(|source| Path::new(&source.path)).filter(|path| path.ends_with("Cargo.toml"));
    manifests
        .filter_map(Path::parent)
        .filter(|folder| folder.starts_with("crates") && !has(folder.join("README.md")))
        .map(|folder| format!("{} has no README.md", folder.display()))
        .collect()
}

fn registry_names(sources: &[Source]) -> Vec<String> {
    let mut breaches = Vec::new();
    for source in sources.iter().filter(|source| source.path != LOCK_FILE) {
        for (number, line) in source.text.lines().enumerate() {
            let found =
                REGISTRIES.iter().map(|pieces| pieces.join(".")).find(|name| line.contains(name.as_str()));
            let breach = |name| format!("{}:{}: names the package registry {name}", source.path, number + 1);
            breaches.extend(found.map(breach));
        }
    }
    breaches
}

fn is_rust(source: &Source) -> bool {
    source.path.ends_with(".rs")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, text: &str) -> Source {
        Source { path: path.to_owned(), text: text.to_owned() }
    }

    /// One innocent file for each rule's place.
    fn pure_files() -> Vec<Source> {
        [
            "crates/xfer-plan/src/lib.rs",
            "crates/xfer-sim/src/lib.rs",
            "crates/weight-ops/src/lib.rs",
            "crates/xfer-exec/src/engine.rs",
            "crates/xfer-exec/src/program.rs",
        ]
        .map(|path| source(path, "//! std::fs, unsafe\nuse std::{collections::BTreeMap, fmt};"))
        .into()
    }

    #[test]
    fn hardware_is_found_by_its_whole_name() {
        let tree = "xfer-plan v0.1.0 (/x)\nserde v1.0.0\nlibfabric-sys-macros v1.0.0\n";
        assert!(hardware_in_tree("xfer-plan", tree).is_empty());
        let breaches =
            hardware_in_tree("xfer-plan", &format!("{tree}cudarc v0.19.0\nlibfabric-sys v0.1.0 (*)\n"));
        assert_eq!(breaches.len(), 2, "{breaches:?}");
    }

    #[test]
    fn io_in_the_engine_is_found() {
        let mut sources = pure_files();
        assert_eq!(impure(&sources), [""; 0]);
        sources.push(source("crates/xfer-exec/src/driver.rs", "use std::thread;"));
        assert_eq!(impure(&sources), [""; 0], "the driver is not the engine");
        sources.push(source("crates/xfer-exec/src/engine/clock.rs", "\nuse std::{fmt, time::Instant};"));
        let breaches = impure(&sources);
        assert_eq!(breaches.len(), 1);
        assert!(breaches[0].starts_with("crates/xfer-exec/src/engine/clock.rs:2: std::time"), "{breaches:?}");
    }

    #[test]
    fn a_rule_without_its_files_fails() {
        assert_eq!(impure(&pure_files()[1..]).len(), 1);
    }

    #[test]
    fn unsafe_is_found_outside_its_places() {
        let text = "fn f() { unsafe { g() } }";
        for path in UNSAFE_ALLOWED.map(|allowed| {
            if allowed.ends_with(".rs") { allowed.to_owned() } else { format!("{allowed}/a.rs") }
        }) {
            assert_eq!(misplaced_unsafe(&[source(&path, text)]), [""; 0]);
        }
        assert_eq!(misplaced_unsafe(&[source("README.md", text)]), [""; 0], "no Rust source");
        for path in [
            "crates/xfer-plan/src/lib.rs",
            "benches/src/main.rs",
            "xtask/src/main.rs",
            "crates/topology/tests/a.rs",
        ] {
            assert_eq!(misplaced_unsafe(&[source(path, text)]).len(), 1, "{path}");
        }
    }

    #[test]
    fn a_crate_without_readme_is_found() {
        let mut sources =
            vec![source("crates/a/Cargo.toml", ""), source("xtask/Cargo.toml", ""), source("README.md", "")];
        assert_eq!(crates_without_readme(&sources), ["crates/a has no README.md"]);
        sources.push(source("crates/a/README.md", "a"));
        assert_eq!(crates_without_readme(&sources), [""; 0]);
    }

    #[test]
    fn registries_are_found_and_this_source_is_not() {
        let own = source("xtask/src/firewalls.rs", include_str!("firewalls.rs"));
        assert_eq!(registry_names(&[own]), [""; 0]);
        for pieces in REGISTRIES {
            let line = format!("\nfetch https://files.{}/x", pieces.join("."));
            assert!(registry_names(&[source("docs/a.md", &line)])[0].starts_with("docs/a.md:2"), "{line}");
            assert_eq!(registry_names(&[source(LOCK_FILE, &line)]), [""; 0]);
        }
    }
}
