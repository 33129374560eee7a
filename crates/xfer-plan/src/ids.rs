//! Numbers that must not be mixed up: ranks of the two sides, regions, names.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident $label:literal,)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u32);

        impl $name {
            /// The number as an index into a slice.
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($label, " {}"), self.0)
            }
        }
    )*};
}

ids! {
    /// A rank that owns source tensors and writes them: its place in [`Manifest::trainers`](crate::Manifest).
    TrainerRank "trainer",
    /// A rank whose memory is written: its place in [`Manifest::receivers`](crate::Manifest).
    ReceiverRank "inference",
    /// A registered region of one rank: its place in that rank's list of regions.
    RegionIndex "region",
    /// Receivers that want the same bytes at the same place: their place in [`Plan::groups`](crate::Plan).
    GroupIndex "group",
    /// A destination parameter's name: its place in [`Plan::names`](crate::Plan).
    ParamId "parameter",
}

/// A rank of either side, where both can be meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // the names say it
pub enum Rank {
    Trainer(TrainerRank),
    Receiver(ReceiverRank),
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rank::Trainer(rank) => rank.fmt(f),
            Rank::Receiver(rank) => rank.fmt(f),
        }
    }
}
