//! A timeline of all ranks in the Trace Event Format, which Perfetto and chrome://tracing open.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use weightsync::Span;

/// Collects spans; each rank is a process of the timeline.
#[derive(Default)]
pub(crate) struct Trace {
    events: Vec<Value>,
    /// Rows whose rank has been named.
    named: BTreeSet<usize>,
}

impl Trace {
    /// Adds the stages of one version of a rank. `row` orders the ranks.
    pub(crate) fn add(&mut self, row: usize, rank: &str, version: u64, stages: &[Span]) {
        if self.named.insert(row) {
            let name = json!({ "ph": "M", "name": "process_name", "pid": row, "args": { "name": rank } });
            let order =
                json!({ "ph": "M", "name": "process_sort_index", "pid": row, "args": { "sort_index": row } });
            self.events.extend([name, order]);
        }
        self.events.extend(stages.iter().map(|stage| {
            json!({
                "ph": "X",
                "cat": "push",
                "name": stage.name,
                "ts": stage.start_us,
                "dur": stage.duration_us,
                "pid": row,
                "tid": 0,
                "args": { "version": version },
            })
        }));
    }

    /// The file's text.
    pub(crate) fn render(&self) -> String {
        json!({ "displayTimeUnit": "ms", "traceEvents": self.events }).to_string()
    }
}
