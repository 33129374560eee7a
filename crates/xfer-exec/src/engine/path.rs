//! One rail's way to one receiver, and its credit: how many bytes may be in flight there.
//!
//! Credit follows the rate that is measured: what the path delivers in [`LATENCY`]. A slow path so gets less and holds less
//! back when the push nears its end, and no path is stalled by another one.

use core::time::Duration;

/// What may be in flight on a path is what it delivers in this time: far above the round trip of any fabric, so that credit
/// never limits a path, and short against a push.
const LATENCY: Duration = Duration::from_millis(50);

/// A rate is taken over at least this long.
const MEASURE: Duration = Duration::from_millis(20);

/// A pause after which the time before it says nothing about the rate.
const PAUSE: Duration = Duration::from_millis(1);

/// Credit before anything has been measured: what 400 Gb/s deliver in 20 us.
const START_BYTES: u64 = 1 << 20;

/// WRITEs that are always allowed: one is being received while the next one is on its way.
const WRITES_MIN: u32 = 2;

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct Path {
    /// Whether it may be used at all.
    pub(super) live: bool,
    /// Why the first WRITE that failed over it did.
    pub(super) lost: Option<String>,
    /// A WRITE over it ended in this push without being delivered: some of its bytes may still be on their way.
    pub(super) unfinished: bool,
    /// It waits for its turn in the rail's ring.
    pub(super) queued: bool,
    pub(super) in_flight: u32,
    pub(super) in_flight_bytes: u64,
    /// Of the last completion, or of the post that ended an idle time.
    pub(super) since: Duration,
    /// Of the last WRITE that was delivered in this push.
    pub(super) delivered_at: Duration,
    /// Bytes per second; 0 is unknown.
    pub(super) rate: f64,
    credit_bytes: u64,
    measured_from: Duration,
    measured_bytes: u64,
}

impl Path {
    pub(super) fn new(live: bool) -> Self {
        Self {
            live,
            lost: None,
            unfinished: false,
            queued: false,
            in_flight: 0,
            in_flight_bytes: 0,
            since: Duration::ZERO,
            delivered_at: Duration::ZERO,
            rate: 0.0,
            credit_bytes: START_BYTES,
            measured_from: Duration::ZERO,
            measured_bytes: 0,
        }
    }

    /// Begins a push, whose clock starts at 0. What was learnt of the rate stays.
    pub(super) fn start(&mut self, now: Duration) {
        (self.queued, self.unfinished) = (false, false);
        (self.in_flight, self.in_flight_bytes) = (0, 0);
        (self.since, self.delivered_at) = (now, now);
        (self.measured_from, self.measured_bytes) = (now, 0);
    }

    pub(super) fn has_credit(&self) -> bool {
        self.live && (self.in_flight < WRITES_MIN || self.in_flight_bytes < self.credit_bytes)
    }

    pub(super) fn posted(&mut self, bytes: u64, now: Duration) {
        if self.in_flight == 0 {
            if now.saturating_sub(self.since) > PAUSE {
                (self.measured_from, self.measured_bytes) = (now, 0);
            }
            self.since = now;
        }
        self.in_flight += 1;
        self.in_flight_bytes += bytes;
    }

    /// A WRITE is no longer in flight, whatever became of it.
    pub(super) fn ended(&mut self, bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.in_flight_bytes = self.in_flight_bytes.saturating_sub(bytes);
    }

    /// A WRITE has been delivered; whether this changed the rate.
    pub(super) fn delivered(&mut self, bytes: u64, now: Duration) -> bool {
        self.ended(bytes);
        (self.since, self.delivered_at) = (now, now);
        self.measured_bytes += bytes;
        let took = now.saturating_sub(self.measured_from);
        if took < MEASURE {
            return false;
        }
        let rate = self.measured_bytes as f64 / took.as_secs_f64();
        // The mean with what was known evens out how completions fall into the times that are measured.
        self.rate = if self.rate > 0.0 { (self.rate + rate) / 2.0 } else { rate };
        self.credit_bytes = (self.rate * LATENCY.as_secs_f64()) as u64;
        (self.measured_from, self.measured_bytes) = (now, 0);
        true
    }

    /// When `bytes` more would be delivered, in seconds from now; `None` while the rate is unknown.
    pub(super) fn seconds_until(&self, bytes: u64) -> Option<f64> {
        (self.rate > 0.0).then(|| (self.in_flight_bytes + bytes) as f64 / self.rate)
    }
}
