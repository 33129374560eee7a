//! Running `ip` and `tc`: the only place that starts a program. A failure carries the command and what it said.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Output, Stdio};

use crate::owner::{Owner, TAKE_MAX};
use crate::{LabError, Side, namespace, removal};

/// Whether a lab can be built here: root, iproute2, and the right to make a namespace.
///
/// # Errors
///
/// What is missing, and what to do.
pub fn check() -> Result<(), LabError> {
    check_programs()?;
    // Root in a container may still be refused, which only the attempt tells.
    let name = format!("probe-{}", std::process::id());
    let owner = Owner::take(&name, TAKE_MAX)?;
    owner.sign()?;
    let namespace = namespace(&name, Side::A);
    let probed = run("ip", &["netns", "add", &namespace])
        .and_then(|_| run("ip", &["-n", &namespace, "link", "set", "lo", "up"]));
    removal::remove(&name, owner)?;
    probed.map(drop)
}

pub(crate) fn check_programs() -> Result<(), LabError> {
    if !fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0) {
        return Err(LabError::NotRoot);
    }
    run("ip", &["-V"])?;
    run("tc", &["-V"]).map(drop)
}

/// Runs a program to its end; its output.
pub(crate) fn run(program: &'static str, arguments: &[&str]) -> Result<String, LabError> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let told = || format!("{program} {}", arguments.join(" "));
    let output = output.map_err(|error| not_started(program, error))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(failure(told(), &output))
    }
}

/// Runs many lines of `ip` or `tc` in one process, inside a namespace or where we are. It stops at the first that fails.
pub(crate) fn batch(
    program: &'static str,
    namespace: Option<&str>,
    lines: &[String],
) -> Result<(), LabError> {
    let mut command = Command::new(program);
    command.args(namespace.into_iter().flat_map(|namespace| ["-n", namespace])).args(["-batch", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| not_started(program, error))?;
    let text: String = lines.iter().flat_map(|line| [line, "\n"]).collect();
    // It may stop reading, and then says why.
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(text.as_bytes()));
    let output = child.wait_with_output().map_err(|error| not_started(program, error))?;
    if output.status.success() {
        return written
            .map_err(|source| LabError::Io { what: format!("cannot write to `{program}`"), source });
    }
    let place = namespace.map(|namespace| format!("-n {namespace} ")).unwrap_or_default();
    let line = failed_line(&String::from_utf8_lossy(&output.stderr), lines);
    Err(failure(format!("{program} {place}{line}"), &output))
}

/// The line of a batch that `Command failed -:NUMBER` speaks of.
fn failed_line<'a>(stderr: &str, lines: &'a [String]) -> &'a str {
    let number =
        stderr.lines().find_map(|line| line.strip_prefix("Command failed -:")?.parse::<usize>().ok());
    number.and_then(|number| lines.get(number.checked_sub(1)?)).map_or("-batch -", String::as_str)
}

fn failure(command: String, output: &Output) -> LabError {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stderr = if stderr.trim().is_empty() { output.status.to_string() } else { stderr.into_owned() };
    LabError::Command { command, stderr }
}

fn not_started(program: &'static str, source: io::Error) -> LabError {
    if source.kind() == io::ErrorKind::NotFound {
        LabError::Missing { program }
    } else {
        LabError::Io { what: format!("cannot run `{program}`"), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_failed_line_is_found() {
        let lines = ["one".to_owned(), "two".to_owned()];
        assert_eq!(failed_line("Cannot find device\nCommand failed -:2\n", &lines), "two");
        for unknown in ["", "Command failed -:0", "Command failed -:3", "Command failed x"] {
            assert_eq!(failed_line(unknown, &lines), "-batch -");
        }
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run("no-such-program-here", &[]).unwrap_err();
        assert!(error.to_string().contains("no-such-program-here"), "{error}");
    }
}
