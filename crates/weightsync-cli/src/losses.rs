//! The rails that a trainer has given up, each told once.
//!
//! Every report of a push repeats what was given up in earlier ones. Here it is kept in which version that was first
//! heard of. A loss is never taken back: a rail that was given up is not used again.

use std::fmt;

use serde::Serialize;
use weightsync::RailReport;

/// A rail that was given up, or its way to one inference rank.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Loss {
    /// The rail in words.
    pub(crate) rail: String,
    /// The inference rank to which it does not lead any more; none where it leads nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) to: Option<String>,
    /// The first version that was pushed without it, or in part.
    pub(crate) version: u64,
    /// Why.
    pub(crate) reason: String,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rail, to, version, reason } = self;
        match to {
            Some(to) => write!(f, "{rail} to {to}, in version {version}: {reason}"),
            None => write!(f, "{rail}, in version {version}: {reason}"),
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Losses(Vec<Loss>);

impl Losses {
    /// Adds what the report of a version says; the losses that it is the first to tell.
    pub(crate) fn add(&mut self, version: u64, rails: &[RailReport]) -> &[Loss] {
        let known = self.0.len();
        for RailReport { name: rail, closed, lost, .. } in rails {
            let ways = lost.iter().map(|(to, reason)| (Some(to), reason));
            for (to, reason) in closed.iter().map(|reason| (None, reason)).chain(ways) {
                if !self.0.iter().any(|loss| loss.rail == *rail && loss.to.as_ref() == to) {
                    let (rail, to, reason) = (rail.clone(), to.cloned(), reason.clone());
                    self.0.push(Loss { rail, to, version, reason });
                }
            }
        }
        self.0.get(known..).unwrap_or_default()
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Loss> {
        self.0.iter()
    }

    /// How many rails lead nowhere any more.
    pub(crate) fn rails(&self) -> usize {
        self.0.iter().filter(|loss| loss.to.is_none()).count()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Three rails that lead to two inference ranks each.
    const RAILS: usize = 3;
    const RANKS: usize = 2;

    fn report(rail: usize, closed: bool, lost: [bool; RANKS]) -> RailReport {
        let lost =
            (0..RANKS).filter(|to| lost[*to]).map(|to| (format!("inference {to}"), format!("reset {to}")));
        RailReport {
            name: format!("rail {rail}"),
            bytes: 1,
            writes: 1,
            closed: closed.then(|| "stalled".into()),
            lost: lost.collect(),
        }
    }

    proptest! {
        /// Faults may come in any version, and every later report repeats them: each is told once, with its first version.
        #[test]
        fn every_loss_is_told_once_with_its_first_version(
            closed_at in prop::array::uniform3(1_u64..9),
            lost_at in prop::array::uniform3(prop::array::uniform2(1_u64..9)),
        ) {
            const VERSIONS: u64 = 6;
            let (mut losses, mut told) = (Losses::default(), BTreeMap::new());
            for version in 1..=VERSIONS {
                let rails: Vec<_> = (0..RAILS)
                    .map(|rail| report(rail, closed_at[rail] <= version, lost_at[rail].map(|at| at <= version)))
                    .collect();
                for loss in losses.add(version, &rails) {
                    prop_assert_eq!(loss.version, version);
                    prop_assert!(told.insert((loss.rail.clone(), loss.to.clone()), version).is_none());
                }
            }
            let mut expected = BTreeMap::new();
            for (rail, (closed_at, lost_at)) in closed_at.into_iter().zip(lost_at).enumerate() {
                expected.insert((format!("rail {rail}"), None), closed_at);
                for (to, at) in lost_at.into_iter().enumerate() {
                    expected.insert((format!("rail {rail}"), Some(format!("inference {to}"))), at);
                }
            }
            expected.retain(|_, at| *at <= VERSIONS);
            prop_assert_eq!(losses.rails(), expected.keys().filter(|(_, to)| to.is_none()).count());
            prop_assert_eq!(losses.iter().count(), expected.len());
            prop_assert_eq!(told, expected);
        }
    }

    #[test]
    fn a_loss_in_words() {
        let mut losses = Losses::default();
        let told = losses.add(3, &[report(5, true, [false, true])]);
        let told: Vec<String> = told.iter().map(Loss::to_string).collect();
        assert_eq!(told, ["rail 5, in version 3: stalled", "rail 5 to inference 1, in version 3: reset 1"]);
    }
}
