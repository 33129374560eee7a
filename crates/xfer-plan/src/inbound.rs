//! What arrives at receivers, operation by operation: where a checksum of what was sent has to look.
//!
//! It is read off the operations themselves, so that both ends speak of the same bytes. It is never part of a plan: only a
//! receiver that verifies what it was sent needs it.

use serde::{Deserialize, Serialize};

use crate::ids::ParamId;
use crate::plan::{Op, Strided};
use crate::relay::Parts;

/// Rows that one operation, of whoever, writes into a receiver's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inbound {
    /// The destination parameter.
    pub param: ParamId,
    /// Length of a row in bytes; at least 1.
    pub row_bytes: u32,
    /// Number of rows; at least 1.
    pub rows: u32,
    /// Where they are written.
    pub destination: Strided,
}

impl Inbound {
    /// Length of all rows together, in bytes.
    pub fn bytes(&self) -> u64 {
        u64::from(self.row_bytes) * u64::from(self.rows)
    }
}

impl From<&Op> for Inbound {
    fn from(op: &Op) -> Inbound {
        let Op { param, row_bytes, rows, destination, .. } = *op;
        Inbound { param, row_bytes, rows, destination }
    }
}

impl Parts {
    /// By receiver, what arrives there from trainers and from receivers that pass on.
    pub fn inbound(&self) -> Vec<Vec<Inbound>> {
        let mut inbound = vec![Vec::new(); self.receivers.len()];
        let plans = self.trainers.iter().chain(self.receivers.iter().map(|relay| &relay.plan));
        for op in plans.flat_map(|plan| &plan.ops) {
            if let Some(arrives) = inbound.get_mut(op.to.index()) {
                arrives.push(Inbound::from(op));
            }
        }
        inbound
    }
}
