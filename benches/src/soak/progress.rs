//! A line on standard error that says how far a run is: overwritten on a terminal, and a new one now and then elsewhere.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// Between two lines where they are not overwritten.
const LINE_EVERY: Duration = Duration::from_secs(20);

pub(crate) struct Progress {
    name: String,
    pushes: u64,
    began: Instant,
    terminal: bool,
    shown: Instant,
}

impl Progress {
    /// Of a run of so many pushes, which begins now.
    pub(crate) fn new(name: &str, pushes: u64) -> Self {
        let (terminal, began) = (std::io::stderr().is_terminal(), Instant::now());
        Self { name: name.to_owned(), pushes, began, terminal, shown: began }
    }

    /// Time since the run began.
    pub(crate) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// So many are done.
    pub(crate) fn show(&mut self, done: u64) {
        if !self.terminal && self.shown.elapsed() < LINE_EVERY {
            return;
        }
        self.shown = Instant::now();
        let seconds = self.elapsed().as_secs_f64();
        let left = self.pushes.saturating_sub(done) as f64 * seconds / done.max(1) as f64;
        let line =
            format!("{}: {done} of {} pushes in {seconds:.0} s, {left:.0} s left", self.name, self.pushes);
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
