//! The receiver's side: a thread that lets the providers make progress, without which writes to this rank stall.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use efa_core::{Armed, Completion, Waker, wait_any};

use crate::arrivals::NicArrivals;
use crate::driver::pin;

/// How long the thread sleeps when nothing arrives: short enough to end promptly even where a provider has no
/// wait object to wake.
const IDLE_MAX: Duration = Duration::from_millis(250);

/// How long the thread polls after it was woken, before it sleeps again: long enough for the next segment of a
/// stream to arrive, short enough to leave the core to others soon.
const SPIN_MAX: Duration = Duration::from_micros(100);

/// How long it may take to read what has arrived.
const SETTLE_MAX: Duration = Duration::from_secs(1);

/// What the thread is asked to do, and where it answers.
enum Request {
    /// Close the rail of this number.
    Close(usize, Sender<Result<(), String>>),
    /// Read all that has arrived so far, and answer whether it has.
    Settle(Sender<bool>),
}

const GONE: &str = "the thread of the rails has ended";

/// A handle on the thread, which owns the rails. Their regions stay exposed until it is dropped.
///
/// The thread sleeps on the rails' wait objects while nothing arrives, unless it is told to poll.
pub struct OfiTarget {
    stop: Arc<AtomicBool>,
    busy: Arc<AtomicBool>,
    waker: Waker,
    requests: Sender<Request>,
    arrivals: NicArrivals,
    thread: Option<JoinHandle<()>>,
}

impl OfiTarget {
    /// Starts the thread, on these CPUs if there are any.
    pub fn start(rails: Vec<efa_core::Rail>, cpus: Vec<usize>) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let busy = Arc::new(AtomicBool::new(false));
        let waker = Waker::new()?;
        let (requests, asked) = unbounded();
        let arrivals = NicArrivals::default();
        let mut rails = Rails {
            rails: rails.into_iter().map(Place::Open).collect(),
            stop: stop.clone(),
            busy: busy.clone(),
            waker: waker.clone(),
            asked,
            arrivals: arrivals.clone(),
            completions: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("target".into()).spawn(move || {
            pin("target", &cpus);
            rails.serve();
        })?;
        Ok(Self { stop, busy, waker, requests, arrivals, thread: Some(thread) })
    }

    /// Where the tags of WRITEs come out that have arrived over these rails.
    pub fn arrivals(&self) -> NicArrivals {
        self.arrivals.clone()
    }

    /// Polls without ever sleeping, while a version is in flight and there is a core for it: over loopback TCP on two free
    /// cores a receiver that sleeps between segments takes in little more than half of one that does not.
    pub fn busy_poll(&self, on: bool) {
        self.busy.store(on, Ordering::Relaxed);
        self.waker.wake();
    }

    /// Closes one of the rails, by its number: once this returns, nobody can write over it any more. Blocks for as long as
    /// the thread takes to hear of it. A rail that is closed already is no error; one that did not close is, ever after.
    ///
    /// # Errors
    ///
    /// When the rail does not close, or the thread is gone: peers may still write over it.
    pub fn close_rail(&self, rail: usize) -> Result<(), String> {
        self.ask(|reply| Request::Close(rail, reply))?
    }

    /// Returns once all has been read that had arrived before, so that its tags are among the [`OfiTarget::arrivals`]: a WRITE
    /// that its sender has been told of is not heard of later. Blocks as [`OfiTarget::close_rail`] does.
    ///
    /// # Errors
    ///
    /// When the thread is gone, or peers go on writing, which nobody may just now.
    pub fn settle(&self) -> Result<(), String> {
        match self.ask(Request::Settle)? {
            true => Ok(()),
            false => Err(format!("peers write to this rank and do not end within {SETTLE_MAX:?}")),
        }
    }

    fn ask<T>(&self, request: impl FnOnce(Sender<T>) -> Request) -> Result<T, String> {
        let (reply, answer) = bounded(1);
        self.requests.send(request(reply)).map_err(|_| GONE.to_owned())?;
        self.waker.wake();
        answer.recv().map_err(|_| GONE.to_owned())
    }
}

impl Drop for OfiTarget {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.waker.wake();
        if let Some(thread) = self.thread.take() {
            // It ends within `IDLE_MAX`; its rails close the endpoints before the regions.
            let _ = thread.join();
        }
    }
}

/// A rail, or what became of it.
enum Place<R> {
    Open(R),
    Closed,
    /// It did not close: peers may still write over it.
    Leaked(String),
}

impl<R> Place<R> {
    fn open(&mut self) -> Option<&mut R> {
        if let Self::Open(rail) = self { Some(rail) } else { None }
    }

    fn close(&mut self, close: impl FnOnce(R) -> Result<(), String>) -> Result<(), String> {
        *self = match std::mem::replace(self, Self::Closed) {
            Self::Open(rail) => close(rail).map_or_else(Self::Leaked, |()| Self::Closed),
            closed => closed,
        };
        if let Self::Leaked(reason) = self { Err(reason.clone()) } else { Ok(()) }
    }
}

fn close_rail(rail: efa_core::Rail) -> Result<(), String> {
    rail.close().map(drop).map_err(|error| error.to_string())
}

/// What the thread has.
struct Rails {
    rails: Vec<Place<efa_core::Rail>>,
    stop: Arc<AtomicBool>,
    busy: Arc<AtomicBool>,
    waker: Waker,
    asked: Receiver<Request>,
    arrivals: NicArrivals,
    completions: Vec<Completion>,
}

impl Rails {
    fn serve(&mut self) {
        let mut spin_until = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            while let Ok(request) = self.asked.try_recv() {
                match request {
                    Request::Close(rail, reply) => drop(reply.send(self.close(rail))),
                    Request::Settle(reply) => {
                        // A poll reads so many at a time.
                        let until = Instant::now() + SETTLE_MAX;
                        let mut settled = false;
                        while !settled && Instant::now() < until {
                            settled = !self.poll();
                        }
                        let _ = reply.send(settled);
                    }
                }
            }
            if self.poll() || self.busy.load(Ordering::Relaxed) || Instant::now() < spin_until {
                continue;
            }
            let waker = self.waker.clone();
            let armed =
                self.rails.iter_mut().filter_map(Place::open).map(|rail| rail.arm().unwrap_or(Armed::Blind));
            match wait_any(armed, Some(&waker), IDLE_MAX) {
                Ok(true) => spin_until = Instant::now() + SPIN_MAX,
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, "wait"),
            }
        }
    }

    /// Polls every rail once; whether anything came.
    fn poll(&mut self) -> bool {
        let mut moved = false;
        for place in &mut self.rails {
            let Some(rail) = place.open() else { continue };
            match rail.poll(&mut self.completions) {
                Ok(count) => moved |= count > 0,
                Err(error) => {
                    // The senders see their writes fail and say so; this end can only tell why.
                    tracing::error!(rail = rail.name(), %error, "poll");
                    if let Err(error) = place.close(close_rail) {
                        tracing::error!(%error, "a rail did not close");
                    }
                    continue;
                }
            }
            for completion in self.completions.drain(..) {
                match completion {
                    Completion::Immediate { data } => self.arrivals.add(data),
                    other => tracing::debug!(rail = rail.name(), completion = ?other),
                }
            }
        }
        moved
    }

    fn close(&mut self, rail: usize) -> Result<(), String> {
        let place = self.rails.get_mut(rail).ok_or_else(|| format!("there is no rail {rail}"))?;
        place.close(close_rail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rail_that_did_not_close_never_counts_as_closed() {
        let mut places = [Place::Open(1), Place::Open(2)];
        assert_eq!(places[0].close(|_| Ok(())), Ok(()));
        assert_eq!(places[0].close(|_| Err("closed twice".into())), Ok(()));
        for _ in 0..2 {
            assert_eq!(places[1].close(|_| Err("busy".into())), Err("busy".into()));
            assert!(places[1].open().is_none());
        }
    }
}
