//! Child processes that answer with lines of JSON.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;

use crate::usage;

/// A child that is killed when this is dropped.
pub(crate) struct Process {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Process {
    pub(crate) fn start(program: impl AsRef<OsStr>, args: &[&str]) -> anyhow::Result<Self> {
        Self::launch(Command::new(program), args)
    }

    /// Starts a command that may already have words of its own.
    pub(crate) fn launch(mut command: Command, args: &[&str]) -> anyhow::Result<Self> {
        let name = format!("{} {}", command.get_program().to_string_lossy(), args.join(" "));
        let mut child = command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("a child has no standard output")?;
        Ok(Self { name, child, stdin, lines: BufReader::new(stdout).lines() })
    }

    /// This program in another role.
    pub(crate) fn role(args: &[&str]) -> anyhow::Result<Self> {
        Self::start(std::env::current_exe()?, args)
    }

    /// Asks for one round of what `line` says, and waits for its answer.
    pub(crate) fn round<T: DeserializeOwned>(&mut self, line: &str) -> anyhow::Result<T> {
        self.ask(line)?;
        self.answer()
    }

    /// Says one line.
    pub(crate) fn ask(&mut self, line: &str) -> anyhow::Result<()> {
        match &mut self.stdin {
            Some(stdin) => Ok(writeln!(stdin, "{line}")?),
            None => bail!("{} has ended", self.name),
        }
    }

    /// The next answer.
    pub(crate) fn answer<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("{} answered '{line}'", self.name))
    }

    /// The next line of its standard output.
    pub(crate) fn line(&mut self) -> anyhow::Result<String> {
        match self.lines.next() {
            Some(line) => Ok(line?),
            None => bail!("{} ended without an answer: {}", self.name, self.child.wait()?),
        }
    }

    /// Seconds of CPU time that it has used so far; `None` where the kernel does not say.
    pub(crate) fn cpu_seconds(&self) -> Option<f64> {
        usage::cpu_seconds(self.child.id())
    }

    /// Closes its standard input and waits for its end.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        drop(self.stdin.take());
        let status = self.child.wait()?;
        if status.success() { Ok(()) } else { bail!("{} ended with {status}", self.name) }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already, or about to be.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
