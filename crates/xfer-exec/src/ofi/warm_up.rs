//! One small WRITE to every peer before the first push: it makes the connections, and names a peer that cannot be reached.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use efa_core::{Completion, LeaseMut, PeerId, RejectReason, RemoteRegion, Write};
use xfer_plan::ReceiverRank;

/// Bytes of the write.
const WARM_UP_BYTES: u64 = 8;

/// Where a peer takes the write.
pub(super) type Scratch = (ReceiverRank, PeerId, RemoteRegion);

/// Writes to every peer's scratch region and waits for all; the reason of the first that fails.
pub(super) fn warm_up(
    rail: &mut efa_core::Rail,
    peers: &[Scratch],
    deadline: Duration,
) -> Result<(), String> {
    let buffer = LeaseMut::zeroed(WARM_UP_BYTES as usize).map_err(|error| error.to_string())?.freeze();
    let region = rail.register(buffer.memory()).map_err(|error| error.to_string())?;
    let began = Instant::now();
    let mut unposted: VecDeque<usize> = (0..peers.len()).collect();
    let mut waiting: Vec<bool> = vec![true; peers.len()];
    let mut completions = Vec::new();
    while let Some(owing) = waiting.iter().position(|waiting| *waiting) {
        while let Some(index) = unposted.pop_front() {
            let (rank, to, scratch) = peers[index];
            let remote =
                scratch.at(0, WARM_UP_BYTES).map_err(|error| format!("{rank}'s scratch region: {error}"))?;
            let write = Write {
                from: buffer.clone(),
                region,
                to,
                remote,
                immediate: None,
                delivery_complete: true,
                token: index as u64,
            };
            if let Err(rejected) = rail.write(write) {
                match rejected.reason {
                    RejectReason::Fatal(error) => return Err(format!("cannot write to {rank}: {error}")),
                    _ => {
                        unposted.push_front(index);
                        break;
                    }
                }
            }
        }
        let moved = rail.poll(&mut completions).map_err(|error| error.to_string())?;
        for completion in completions.drain(..) {
            if let Completion::Op { token, result, .. } = completion {
                let index = token as usize;
                if let Err(error) = result {
                    let rank =
                        peers.get(index).map_or_else(|| "a peer".into(), |(rank, ..)| rank.to_string());
                    return Err(format!("cannot write to {rank}: {error}"));
                }
                if let Some(waiting) = waiting.get_mut(index) {
                    *waiting = false;
                }
            }
        }
        if began.elapsed() > deadline {
            return Err(format!(
                "{} took no write within {deadline:.1?}; is its address reachable from here, are the ports open?",
                peers[owing].0
            ));
        }
        if moved == 0 {
            let _ = rail.wait(Duration::from_millis(1));
        }
    }
    rail.close_region(region).map(drop).map_err(|error| error.to_string())
}
