//! Defects on purpose, one at a time, to see whether the invariants notice. Each stands where a rank, a rail or the controller
//! meets the simulation, so that the code that is tested has no switch of it.

use core::fmt;
use core::str::FromStr;

use super::wire::Carried;

/// What is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// WRITEs lose what is beyond a multiple of 16 bytes.
    LostTail,
    /// WRITEs land a byte too far.
    WrongPlace,
    /// Every seventh WRITE is posted twice.
    DuplicateWrite,
    /// Trainers say that they have written everything when they begin.
    EarlyCommit,
    /// A trainer's buffers are freed at the first WRITE that fails, while others are in flight.
    FreedAtFirstError,
    /// A WRITE that a rail refuses is forgotten.
    MissedRetry,
    /// A WRITE counts as delivered when it is posted.
    EarlyCompletion,
    /// Receivers say that they have closed a rail, and have not.
    NoFence,
    /// A gather goes to the slot beside.
    WrongSlot,
    /// The controller knows no deadlines.
    NoDeadlines,
    /// A receiver that passes bytes on counts each arrival twice.
    DoubleArrival,
}

impl Sabotage {
    /// Every one.
    pub const ALL: [Sabotage; 11] = [
        Sabotage::LostTail,
        Sabotage::WrongPlace,
        Sabotage::DuplicateWrite,
        Sabotage::EarlyCommit,
        Sabotage::FreedAtFirstError,
        Sabotage::MissedRetry,
        Sabotage::EarlyCompletion,
        Sabotage::NoFence,
        Sabotage::WrongSlot,
        Sabotage::NoDeadlines,
        Sabotage::DoubleArrival,
    ];

    /// Its name, as it is parsed.
    pub const fn name(self) -> &'static str {
        match self {
            Sabotage::LostTail => "lost-tail",
            Sabotage::WrongPlace => "wrong-place",
            Sabotage::DuplicateWrite => "duplicate-write",
            Sabotage::EarlyCommit => "early-commit",
            Sabotage::FreedAtFirstError => "freed-at-first-error",
            Sabotage::MissedRetry => "missed-retry",
            Sabotage::EarlyCompletion => "early-completion",
            Sabotage::NoFence => "no-fence",
            Sabotage::WrongSlot => "wrong-slot",
            Sabotage::NoDeadlines => "no-deadlines",
            Sabotage::DoubleArrival => "double-arrival",
        }
    }

    /// What becomes of a WRITE on its way.
    pub(super) fn damage(self, write: &mut Carried) {
        match self {
            Sabotage::LostTail if write.rows.bytes > 16 => write.rows.bytes -= write.rows.bytes % 16,
            Sabotage::WrongPlace if write.offset % 64 == 32 => write.offset += 1,
            _ => {}
        }
    }
}

/// A name that no defect has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no defect is called {0:?}")]
pub struct NoSuchSabotage(pub String);

impl FromStr for Sabotage {
    type Err = NoSuchSabotage;

    fn from_str(name: &str) -> Result<Sabotage, NoSuchSabotage> {
        let found = Sabotage::ALL.into_iter().find(|sabotage| sabotage.name() == name);
        found.ok_or_else(|| NoSuchSabotage(name.to_owned()))
    }
}

impl fmt::Display for Sabotage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
