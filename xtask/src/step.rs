//! Running another program as a named step whose time is told.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Instant;

use crate::Failure;

/// Lines of a log that a failure shows: enough for a compiler's or a configure script's last words.
const TAIL_LINES: usize = 30;

/// Runs a program whose output the person sees as it comes.
pub(crate) fn shown(name: &str, command: &mut Command) -> Result<(), Failure> {
    println!("==> {name}");
    let start = Instant::now();
    let outcome = succeeded(command, command_status);
    let seconds = start.elapsed().as_secs_f64();
    match outcome {
        Ok(()) => {
            println!("==> {name}: {seconds:.1} s");
            Ok(())
        }
        Err(why) => Err(format!("step `{name}` failed after {seconds:.1} s: {why}")),
    }
}

/// Runs a program in this process's place, so that its exit code and its signals are its own. Returns only what kept it from
/// starting.
pub(crate) fn in_our_place(command: &mut Command) -> Failure {
    let error = command.exec();
    format!("cannot start {}: {error}", command.get_program().display())
}

/// A file that takes the output of the steps of one longer job, and keeps a second run of that job waiting.
pub(crate) struct Log {
    path: PathBuf,
    /// Locked. The steps write to this same handle, so a step that outlives a killed xtask still holds the lock.
    file: File,
}

impl Log {
    /// Waits until nobody else has this log, then starts it anew.
    pub(crate) fn create(path: PathBuf) -> Result<Self, Failure> {
        let failed = |error| format!("cannot write {}: {error}", path.display());
        let file = File::options().create(true).append(true).open(&path).map_err(failed)?;
        if file.try_lock().is_err() {
            println!("  waiting for the one who writes {}", path.display());
            file.lock().map_err(failed)?;
        }
        file.set_len(0).map_err(failed)?;
        Ok(Self { path, file })
    }

    /// Runs a program as a line `name ... 12.3 s`, its output in the log. On failure the log's end is shown.
    pub(crate) fn step(&self, name: &str, command: &mut Command) -> Result<(), Failure> {
        print!("  {name} ... ");
        // Only so that the line is seen before the wait; nothing depends on it.
        io::stdout().flush().ok();
        let start = Instant::now();
        let outcome = succeeded(command, |command| self.status(command));
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                println!("{seconds:.1} s");
                Ok(())
            }
            Err(why) => {
                println!("failed after {seconds:.1} s");
                Err(format!("{name}: {why}\nthe end of {}:\n{}", self.path.display(), self.tail()))
            }
        }
    }

    fn status(&self, command: &mut Command) -> io::Result<ExitStatus> {
        writeln!(&self.file, "$ {command:?}")?;
        command.stdin(Stdio::null()).stdout(self.file.try_clone()?).stderr(self.file.try_clone()?).status()
    }

    fn tail(&self) -> String {
        // A log that cannot be read back has no tail to show; the failure itself is told either way.
        let text = fs::read(&self.path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let first = lines.len().saturating_sub(TAIL_LINES);
        lines[first..].iter().map(|line| format!("  | {line}\n")).collect()
    }
}

fn command_status(command: &mut Command) -> io::Result<ExitStatus> {
    command.status()
}

fn succeeded(
    command: &mut Command,
    run: impl FnOnce(&mut Command) -> io::Result<ExitStatus>,
) -> Result<(), String> {
    let program = command.get_program().to_string_lossy().into_owned();
    match run(command) {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{program} ended with {status}")),
        Err(error) => Err(format!("{program} did not start: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_step_shows_the_end_of_its_log() {
        let path = std::env::temp_dir().join(format!("xtask-step-{}", std::process::id()));
        let log = Log::create(path.clone()).unwrap();
        log.step("good", Command::new("sh").args(["-c", "seq 100; exit 0"])).unwrap();
        let failure =
            log.step("bad", Command::new("sh").args(["-c", "echo last words; exit 3"])).unwrap_err();
        fs::remove_file(path).unwrap();
        assert!(failure.starts_with("bad: sh ended with exit status: 3"), "{failure}");
        assert!(failure.ends_with("  | last words\n"), "{failure}");
        assert!(failure.contains("  | 100\n") && !failure.contains("  | 70\n"), "{failure}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let failure = shown("try", &mut Command::new("no-such-program-here")).unwrap_err();
        assert!(
            failure.contains("`try`") && failure.contains("no-such-program-here did not start"),
            "{failure}"
        );
    }
}
