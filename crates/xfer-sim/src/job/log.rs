//! The last events, for whoever has to find out what happened; all of them, for whoever asks.

use core::fmt::Write as _;
use std::collections::VecDeque;

use crate::time::Time;

/// Events that are remembered.
const LAST: usize = 24;

/// Called with every event.
pub type Trace<'t> = dyn FnMut(Time, &str) + 't;

/// See the module.
pub(super) struct Log<'t> {
    last: VecDeque<(Time, String)>,
    trace: Option<&'t mut Trace<'t>>,
    /// Whether events are described at all: it costs more than the events.
    pub(super) on: bool,
    pub(super) events: u64,
}

impl<'t> Log<'t> {
    pub(super) fn new(trace: Option<&'t mut Trace<'t>>, on: bool) -> Log<'t> {
        Log { last: VecDeque::with_capacity(LAST), on: on || trace.is_some(), trace, events: 0 }
    }

    /// Notes what happens.
    pub(super) fn say(&mut self, now: Time, what: impl FnOnce() -> String) {
        if !self.on {
            return;
        }
        let what = what();
        if let Some(trace) = &mut self.trace {
            trace(now, &what);
        }
        if self.last.len() == LAST {
            self.last.pop_front();
        }
        self.last.push_back((now, what));
    }

    /// The last events, a line each; nothing where none was described.
    pub(super) fn last(&self) -> String {
        let head = if self.last.is_empty() { "" } else { "; the last events were:\n" };
        self.last.iter().fold(head.to_owned(), |mut text, (at, what)| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "  {at}  {what}");
            text
        })
    }
}
