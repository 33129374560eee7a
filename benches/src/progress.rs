//! A line on standard error that says how far a run is: overwritten on a terminal, and a new one now and then elsewhere.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// Between two lines where they are not overwritten.
const LINE_EVERY: Duration = Duration::from_secs(20);

pub(crate) struct Progress {
    began: Instant,
    terminal: bool,
    shown: Instant,
}

impl Progress {
    /// Of a run that begins now.
    pub(crate) fn new() -> Self {
        let (terminal, began) = (std::io::stderr().is_terminal(), Instant::now());
        Self { began, terminal, shown: began }
    }

    /// Time since the run began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// Shows what `line` makes of the time since the run began, if it is time for a line.
    pub(crate) fn show(&mut self, line: impl FnOnce(Duration) -> String) {
        if !self.terminal && self.shown.elapsed() < LINE_EVERY {
            return;
        }
        self.shown = Instant::now();
        let line = line(self.elapsed());
        // Nothing depends on it.
        let _ = if self.terminal {
            write!(std::io::stderr(), "\r{line}\x1b[K")
        } else {
            writeln!(std::io::stderr(), "{line}")
        };
    }

    /// Takes the line back.
    pub(crate) fn end(self) {
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}
