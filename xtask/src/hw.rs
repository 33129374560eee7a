//! `cargo xtask hw`: the tests and the benchmark on GPUs, here or on a host without Rust.
//!
//! What runs is the same in both cases: a folder with stripped binaries and a script. A missing GPU is a failure here, unlike
//! in `cargo xtask test`.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::bench::{self, COMMIT_VARIABLE};
use crate::{Failure, workspace};

/// Test binaries that need a GPU: package, which of its tests, and features.
const TESTS: [(&str, &str, &str); 6] = [
    ("gpu-mem", "*", ""),
    ("weight-ops", "cuda_*", "cuda"),
    ("xfer-exec", "cuda*", "cuda,ofi"),
    ("weightsync", "cuda", ""),
    ("weightsync", "relay", ""),
    ("weightsync", "transforms", ""),
];

/// Runs everything in the folder that it lies in.
const SCRIPT: &str = include_str!("hw/run.sh");

const SCRIPT_NAME: &str = "run.sh";

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    match arguments {
        [option, folder] if option == "--build" => {
            let folder = Path::new(folder);
            let bytes = build(folder)?;
            let mib = bytes.div_ceil(1 << 20);
            println!("{mib} MiB in {0}; on a host with GPUs: {0}/{SCRIPT_NAME} --help", folder.display());
            Ok(())
        }
        _ if arguments.iter().any(|argument| argument == "--build") => {
            Err("--build DIR stands alone; give the rest to DIR/run.sh".to_owned())
        }
        _ => {
            let folder = workspace::target()?.join("hw");
            build(&folder)?;
            // The script shows what it does; its last lines say what failed.
            match Command::new("bash").arg(folder.join(SCRIPT_NAME)).args(arguments).status() {
                Ok(status) if status.success() => Ok(()),
                Ok(status) => Err(format!("{SCRIPT_NAME} ended with {status}")),
                Err(error) => Err(format!("bash did not start: {error}")),
            }
        }
    }
}

/// Builds everything into a folder; how many bytes it has then.
fn build(folder: &Path) -> Result<u64, Failure> {
    let (tests, script) = (folder.join("tests"), folder.join(SCRIPT_NAME));
    // Tests of an older build must not run along.
    if tests.exists() {
        if !script.exists() {
            return Err(format!("{} is not of an earlier build: choose another folder", tests.display()));
        }
        fs::remove_dir_all(&tests).map_err(|error| format!("cannot remove {}: {error}", tests.display()))?;
    }
    fs::create_dir_all(&tests).map_err(|error| format!("cannot make {}: {error}", tests.display()))?;
    let mut bytes = 0;
    for (package, filter, features) in TESTS {
        let mut cargo = workspace::cargo();
        cargo.args(["test", "--no-run", "--package", package, "--test", filter, "--features", features]);
        for built in executables(&format!("build the tests of {package}"), &mut cargo)? {
            bytes += copy_stripped(&built, &tests.join(format!("{package}.{}", target_name(&built))))?;
        }
    }
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--package", "weightsync-bench", "--bin", "hw", "--features", "cuda"]);
    if let Some(commit) = bench::commit() {
        cargo.env(COMMIT_VARIABLE, commit);
    }
    for built in executables("build the benchmark", &mut cargo)? {
        bytes += copy_stripped(&built, &folder.join("hw"))?;
    }
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--package", "weightsync-cli", "--bin", "weightsync"]);
    for built in executables("build the command", &mut cargo)? {
        bytes += copy_stripped(&built, &folder.join("weightsync"))?;
    }
    write_script(&script)?;
    Ok(bytes + SCRIPT.len() as u64)
}

fn write_script(path: &Path) -> Result<(), Failure> {
    let failed = |error| format!("cannot write {}: {error}", path.display());
    fs::write(path, SCRIPT).map_err(failed)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).map_err(failed)
}

/// Builds for release; what cargo has made.
fn executables(name: &str, cargo: &mut Command) -> Result<Vec<PathBuf>, Failure> {
    println!("==> {name}");
    cargo.args(["--release", "--message-format=json-render-diagnostics"]).stderr(Stdio::inherit());
    let output = cargo.output().map_err(|error| format!("cargo did not start: {error}"))?;
    if !output.status.success() {
        return Err(format!("step `{name}` failed: cargo ended with {}", output.status));
    }
    let found = executables_of(&String::from_utf8_lossy(&output.stdout));
    if found.is_empty() {
        return Err(format!("step `{name}` failed: cargo tells of no executable"));
    }
    Ok(found)
}

/// The executables that cargo's messages name, one message a line.
fn executables_of(messages: &str) -> Vec<PathBuf> {
    let executable = |line: &str| {
        let (_, path) = line.split_once(r#""executable":""#)?;
        path.split_once('"').map(|(path, _)| PathBuf::from(path))
    };
    messages.lines().filter_map(executable).collect()
}

/// A test's name without the digest that cargo appends.
fn target_name(executable: &Path) -> String {
    let name = executable.file_name().unwrap_or_default().to_string_lossy();
    name.rsplit_once('-').map_or(&*name, |(name, _)| name).to_owned()
}

/// Symbols are most of a binary, and it may have to travel; how many bytes are left.
fn copy_stripped(from: &Path, to: &Path) -> Result<u64, Failure> {
    match Command::new("strip").arg("-o").arg(to).arg(from).status() {
        Ok(status) if status.success() => {}
        Ok(status) => return Err(format!("strip {} ended with {status}", from.display())),
        Err(error) => return Err(format!("strip did not start: {error}; it comes with binutils")),
    }
    let copied = fs::metadata(to).map_err(|error| format!("cannot read {}: {error}", to.display()))?;
    Ok(copied.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_those_that_cargo_names() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"gpu_mem"},"executable":null,"fresh":true}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"no_cuda"},"executable":"/t/deps/no_cuda-8b3f","fresh":true}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        let found = executables_of(messages);
        assert_eq!(found, [PathBuf::from("/t/deps/no_cuda-8b3f")]);
        assert_eq!(target_name(&found[0]), "no_cuda");
        assert_eq!(target_name(Path::new("/t/release/hw")), "hw");
    }

    /// A folder as `build` makes it, with these programs in place of binaries.
    fn folder(name: &str, programs: &[(&str, &str)]) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("xtask-hw-{name}-{}", std::process::id()));
        fs::create_dir_all(folder.join("tests")).unwrap();
        write_script(&folder.join(SCRIPT_NAME)).unwrap();
        for (name, body) in programs {
            // Written by another process: one that this process had open while another test starts a child could not be run.
            let write = ["-c", r#"printf '#!/bin/sh\n%s\n' "$2" >"$1" && chmod +x "$1""#, "sh"];
            let written = Command::new("sh").args(write).arg(folder.join(name)).arg(body).status().unwrap();
            assert!(written.success());
        }
        folder
    }

    fn output(folder: &Path, arguments: &[&str]) -> (Option<i32>, String) {
        let output = Command::new("bash").arg(folder.join(SCRIPT_NAME)).args(arguments).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    }

    #[test]
    fn a_failed_test_is_shown_and_keeps_nothing_else_from_running() {
        let good =
            r#"echo noise; echo "skipped: one CUDA device"; echo "test result: ok. $WEIGHTSYNC_HW passed""#;
        let folder = folder(
            "failed",
            &[
                ("tests/gpu-mem.a", "echo last words; exit 101"),
                ("tests/weight-ops.b", good),
                ("weightsync", r#"echo "verified: $*""#),
                ("hw", "echo \"hw $*\""),
            ],
        );
        let (status, text) = output(&folder, &["--rounds", "3", "--json", "a b.json"]);
        fs::remove_dir_all(folder).unwrap();
        assert_eq!(status, Some(1), "{text}");
        for told in [
            "last words\n",
            "1 skipped: one CUDA device\n",
            "test result: ok. 1 passed\n",
            "==> demo\nverified: demo --device cuda\n",
            "==> demo, offloaded\nverified: demo --device cuda --offload --fp8\n",
            "hw --json a b.json --rounds 3\n",
            "failed: gpu-mem.a\n",
        ] {
            assert!(text.contains(told), "{told:?} is missing:\n{text}");
        }
        assert!(!text.contains("noise"), "{text}");
    }

    #[test]
    fn only_what_was_asked_for_runs_and_the_benchmark_can_fail() {
        let programs = [("tests/gpu-mem.a", "exit 0"), ("weightsync", "exit 0"), ("hw", "exit 1")];
        let folder = folder("parts", &programs);
        let (tests, bench) = (output(&folder, &["tests"]), output(&folder, &["bench"]));
        let (help, wrong) = (output(&folder, &["--help"]), output(&folder, &["all"]));
        fs::remove_dir_all(folder).unwrap();
        assert_eq!(
            tests,
            (Some(0), "==> gpu-mem.a\n==> demo\n==> demo, offloaded\n==> demo, passed on\n".to_owned())
        );
        assert_eq!(bench, (Some(1), "==> benchmark\nfailed: benchmark\n".to_owned()));
        assert!(help.0 == Some(0) && help.1.contains("--sanitize"), "{}", help.1);
        assert_eq!(wrong, (Some(2), String::new()));
    }

    #[test]
    fn only_kernels_go_under_each_sanitizer_and_what_it_finds_is_a_failure() {
        let finds_races = r#"echo "$*"; [ "$2" != racecheck ]"#;
        let programs = [
            ("tests/gpu-mem.a", ""),
            ("tests/weight-ops.b", ""),
            ("weightsync", ""),
            ("hw", ""),
            ("compute-sanitizer", finds_races),
        ];
        let folder = folder("sanitized", &programs);
        let path = std::env::join_paths(
            [folder.clone()].into_iter().chain(std::env::split_paths(&std::env::var_os("PATH").unwrap())),
        );
        let mut script = Command::new("bash");
        script.arg(folder.join(SCRIPT_NAME)).arg("--sanitize").env("PATH", path.unwrap());
        let output = script.output().unwrap();
        fs::remove_dir_all(folder).unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        for tool in ["memcheck", "racecheck", "synccheck", "initcheck"] {
            assert!(text.contains(&format!("==> weight-ops.b under {tool}\n")), "{text}");
        }
        assert!(!text.contains("gpu-mem.a under"), "{text}");
        assert!(text.ends_with("==> benchmark\nfailed: weight-ops.b under racecheck\n"), "{text}");
    }

    #[test]
    fn a_folder_of_somebody_else_is_left_alone() {
        let folder = folder("foreign", &[("tests/mine", "exit 0")]);
        fs::remove_file(folder.join(SCRIPT_NAME)).unwrap();
        let refused = build(&folder).unwrap_err();
        let is_left = folder.join("tests/mine").exists();
        fs::remove_dir_all(folder).unwrap();
        assert!(is_left && refused.contains("another folder"), "{refused}");
    }
}
