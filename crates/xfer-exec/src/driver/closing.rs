//! Rails that are being closed, each on a thread of its own: closing an endpoint of EFA, or a stream of a GPU, waits for what is
//! in flight, and the other rails must not wait with it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError, bounded};

use crate::program::WriteId;
use crate::rail::{Rail, RailIndex};

/// What a rail had in flight when it was closed, and whether it closed.
pub type Closed = (Vec<WriteId>, Result<(), String>);

/// A rail that is being closed.
struct Closing {
    number: RailIndex,
    since: Instant,
    result: Receiver<Closed>,
}

/// See the module.
pub(crate) struct Closings {
    closing: VecDeque<Closing>,
    /// How long a rail may take to close.
    close_max: Duration,
}

impl Closings {
    pub(crate) fn new(close_max: Duration) -> Self {
        Self { closing: VecDeque::new(), close_max }
    }

    /// Begins to close a rail.
    pub(crate) fn begin<R: Rail + Send + ?Sized + 'static>(&mut self, number: RailIndex, rail: Box<R>) {
        tracing::warn!(rail = rail.name(), "closing after a failure");
        let (closed, result) = bounded(1);
        self.closing.push_back(Closing { number, since: Instant::now(), result });
        let failed = closed.clone();
        let close = move || {
            let mut unfinished = Vec::new();
            let result = rail.close(&mut unfinished).map_err(|error| error.to_string());
            let _ = closed.send((unfinished, result));
        };
        if let Err(error) = std::thread::Builder::new().name("close rail".into()).spawn(close) {
            // The rail went with the closure, so it has been dropped and with it closed; what it held is not known.
            let _ = failed.send((Vec::new(), Err(format!("no thread to close it: {error}"))));
        }
    }

    /// A rail that has closed meanwhile, or has not in time.
    pub(crate) fn over(&mut self) -> Option<(RailIndex, Closed)> {
        for at in 0..self.closing.len() {
            let Closing { number, since, result } = self.closing.get(at)?;
            let number = *number;
            let closed = match result.try_recv() {
                Ok(closed) => closed,
                Err(TryRecvError::Empty) if since.elapsed() < self.close_max => continue,
                // Its thread keeps what it holds for as long as that takes.
                Err(_) => (Vec::new(), Err(format!("it did not close within {:?}", self.close_max))),
            };
            self.closing.remove(at);
            return Some((number, closed));
        }
        None
    }
}
