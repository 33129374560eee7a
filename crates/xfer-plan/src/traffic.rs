//! Traffic of parallel training: what the ranks of a training job send each other in one epoch.
//!
//! A weight push shares the NICs with the training that it follows. This module says how much that is, from the
//! model's size and the parallel groups alone, so that a push can be seen in proportion. It must stay a pure function
//! of its arguments, and exact: figures pass 10^20 bytes, so they are `u128`; every input has a bound, and the bounds
//! together keep every sum below 2^128.
//!
//! With `b` bytes an element, `P` parameters, `L` layers, `H` hidden size, `T` tokens and `N` mini-batches in the
//! epoch, and `G` ranks:
//!
//! | scheme | backward, bytes | forward, bytes | syncs | passes |
//! |---|---|---|---|---|
//! | data parallel | `b N P G (G-1)` | 0 | `N` | 0 |
//! | FSDP | `b N P (G-1)` | `b N P (G-1)` | `L N` | `L N` |
//! | tensor parallel | `2 b N P L (G-1)` | `2 b L T H G (G-1)` | `2 L N` | `2 L T` |
//! | pipeline parallel | `b T H (G-1)` | `b T H (G-1)` | 0 | 0 |
//!
//! In three dimensions, with groups of `tp`, `pp` and `dp` ranks:
//!
//! - backward: `b N P dp (2 L (tp-1) / pp + (dp-1)) + b T H (pp-1)`, rounded down to a byte;
//! - forward: `b T H (2 L tp (tp-1) + (pp-1))`.
//!
//! These are the formulas in use for comparing schemes, where `b` is 2 and the factors 2 and 4 are bytes of BF16. They
//! are kept as they are. What they count, and where a real job differs:
//!
//! - **Data parallel** sends every gradient from every rank to every other. A ring all-reduce moves `2 b N P (G-1)`:
//!   less by a factor of `G / 2`. The same holds for the all-reduces of tensor parallel.
//! - **FSDP** counts one collective each way. Backward it is two where weights are dropped after the forward pass: they
//!   are gathered again, and the gradients are reduced and scattered.
//! - **Tensor parallel, backward**, lets every rank send its share of *all* parameters at each of the `2 L` syncs of a
//!   mini-batch. What such jobs reduce there is the gradient of a layer's activations, as large as what is reduced
//!   forward. Both figures are near each other only where `N P` is near `T H G`, as in the example below.
//! - **Tensor parallel, passes**, count a collective for each token. Training takes a mini-batch at a time: `2 L N`.
//! - **Three dimensions** reduce to the table where two of the groups have one rank. They grow with `tp` and `dp`; with
//!   `pp` they may shrink, because a stage's ranks share fewer parameters. FSDP has no place in them.
//!
//! Llama-3-70B on C4 (`P` 70e9, `L` 80, `H` 8192, `T` 156e9, 364.6e6 samples in mini-batches of 2048, `G` 8): data
//! parallel 1396 PB, FSDP 174.5 PB each way (in print as 175), pipeline parallel 17.9 PB each way, tensor parallel
//! 27.9 EB backward and 22.9 EB forward. On 8 x 8 x 16 ranks 61.8 EB backward and 22.9 EB forward, together 84.7 EB.

use serde::Serialize;
use thiserror::Error;

use crate::limits::RANKS_MAX;

/// Parameters of a model: 10^15, about a thousand times the largest published.
pub const PARAMETERS_MAX: u64 = 1 << 50;

/// Layers of a model. The deepest in use have a few hundred.
pub const LAYERS_MAX: u64 = 1 << 14;

/// Hidden size. The widest in use stay below 20 000.
pub const HIDDEN_MAX: u64 = 1 << 20;

/// Tokens of an epoch: 10^15. The largest training sets have some 10^13.
pub const TOKENS_MAX: u64 = 1 << 50;

/// Mini-batches of an epoch: 10^12. With a token each, no known training set has more.
pub const BATCHES_MAX: u64 = 1 << 40;

/// Bytes of an element: the widest type is F64.
pub const ELEMENT_BYTES_MAX: u64 = 8;

/// One epoch of training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Training {
    /// Parameters of the model, 1 to [`PARAMETERS_MAX`].
    pub parameters: u64,
    /// Its layers, 1 to [`LAYERS_MAX`].
    pub layers: u64,
    /// Its hidden size, 1 to [`HIDDEN_MAX`].
    pub hidden: u64,
    /// Tokens of the epoch, 1 to [`TOKENS_MAX`].
    pub tokens: u64,
    /// Mini-batches of the epoch, each followed by one step of the optimiser, 1 to [`BATCHES_MAX`].
    pub batches: u64,
    /// Bytes of an element of weights, gradients and activations alike, 1 to [`ELEMENT_BYTES_MAX`].
    pub bytes_per_element: u64,
}

/// How the ranks of a job are grouped: the job has `tp * pp * dp` of them, at most
/// [`RANKS_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Ranks that share a layer.
    pub tp: u32,
    /// Stages of the pipeline.
    pub pp: u32,
    /// Replicas that share the batch.
    pub dp: u32,
}

/// One way to train on several ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheme {
    /// Every rank holds the model; gradients are reduced.
    DataParallel,
    /// Every rank holds a share of each layer and gathers the rest before it is used.
    Fsdp,
    /// Every rank holds a share of each layer and computes with it; activations are reduced.
    TensorParallel,
    /// Every rank holds some layers; activations go from one to the next.
    PipelineParallel,
}

/// What all ranks together send in an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic {
    /// In the backward passes, in bytes.
    pub backward_bytes: u128,
    /// In the forward passes, in bytes.
    pub forward_bytes: u128,
}

/// How often ranks wait for each other in an epoch: collectives, not sends from one rank to one other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Collectives {
    /// In the backward passes.
    pub syncs: u128,
    /// In the forward passes.
    pub passes: u128,
}

/// A model, a data set or a group that cannot be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages say it
pub enum TrafficError {
    #[error("{what} is {value}: give a number from 1 to {max}")]
    OutOfRange { what: &'static str, value: u64, max: u64 },
    #[error("groups of {tp} x {pp} x {dp} make more than {max} ranks: make one smaller")]
    TooManyRanks { tp: u32, pp: u32, dp: u32, max: usize },
}

impl Training {
    /// What `ranks` ranks send each other under `scheme`.
    ///
    /// # Errors
    /// When a number is 0 or out of bounds; it is named.
    pub fn traffic(&self, scheme: Scheme, ranks: u32) -> Result<Traffic, TrafficError> {
        let Exact { b, p, l, h, t, n } = self.exact()?;
        // At most 2^125, for data parallel at all bounds.
        let g = within("the number of ranks", ranks.into(), RANKS_MAX as u64)?;
        let others = g - 1;
        let (backward_bytes, forward_bytes) = match scheme {
            Scheme::DataParallel => (b * n * p * g * others, 0),
            Scheme::Fsdp => (b * n * p * others, b * n * p * others),
            Scheme::TensorParallel => (2 * b * n * p * l * others, 2 * b * l * t * h * g * others),
            Scheme::PipelineParallel => (b * t * h * others, b * t * h * others),
        };
        Ok(Traffic { backward_bytes, forward_bytes })
    }

    /// How often `ranks` ranks wait for each other under `scheme`; one alone never does.
    ///
    /// # Errors
    /// When a number is 0 or out of bounds; it is named.
    pub fn collectives(&self, scheme: Scheme, ranks: u32) -> Result<Collectives, TrafficError> {
        let Exact { l, t, n, .. } = self.exact()?;
        let (syncs, passes) = match scheme {
            _ if within("the number of ranks", ranks.into(), RANKS_MAX as u64)? == 1 => (0, 0),
            Scheme::DataParallel => (n, 0),
            Scheme::Fsdp => (l * n, l * n),
            Scheme::TensorParallel => (2 * l * n, 2 * l * t),
            Scheme::PipelineParallel => (0, 0),
        };
        Ok(Collectives { syncs, passes })
    }

    /// What the ranks of a job with three kinds of groups send each other.
    ///
    /// # Errors
    /// When a number is 0 or out of bounds, or the groups together are; it is named.
    pub fn traffic_3d(&self, groups: Groups) -> Result<Traffic, TrafficError> {
        let Exact { b, p, l, h, t, n } = self.exact()?;
        groups.ranks()?;
        let [tp, pp, dp] = [groups.tp, groups.pp, groups.dp].map(u128::from);
        // At most 2^126: the product of the groups is bounded, not only each.
        let gradients = b * n * p * dp;
        let within_layers = gradients * 2 * l * (tp - 1) / pp;
        let backward_bytes = within_layers + gradients * (dp - 1) + b * t * h * (pp - 1);
        let forward_bytes = b * t * h * (2 * l * tp * (tp - 1) + (pp - 1));
        Ok(Traffic { backward_bytes, forward_bytes })
    }

    /// Bytes of all weights once: what a push moves at least.
    pub fn weight_bytes(&self) -> u128 {
        u128::from(self.parameters) * u128::from(self.bytes_per_element)
    }

    /// A push of `push_bytes` after every mini-batch, as a fraction of `traffic`, which is that of an epoch. `None`
    /// where the job sends nothing.
    pub fn push_fraction(&self, push_bytes: u128, traffic: Traffic) -> Option<f64> {
        // A ratio for people: 53 bits are enough.
        let total = traffic.total_bytes();
        (total > 0).then(|| push_bytes as f64 * self.batches as f64 / total as f64)
    }

    /// The fields, each within its bounds, wide enough to be multiplied.
    fn exact(&self) -> Result<Exact, TrafficError> {
        Ok(Exact {
            b: within("bytes per element", self.bytes_per_element, ELEMENT_BYTES_MAX)?,
            p: within("the number of parameters", self.parameters, PARAMETERS_MAX)?,
            l: within("the number of layers", self.layers, LAYERS_MAX)?,
            h: within("the hidden size", self.hidden, HIDDEN_MAX)?,
            t: within("the number of tokens", self.tokens, TOKENS_MAX)?,
            n: within("the number of mini-batches", self.batches, BATCHES_MAX)?,
        })
    }
}

impl Groups {
    /// Ranks of the job.
    ///
    /// # Errors
    /// When a group is empty, or they make more than [`RANKS_MAX`] ranks.
    pub fn ranks(&self) -> Result<u32, TrafficError> {
        let Groups { tp, pp, dp } = *self;
        for (what, group) in
            [("the tensor-parallel group", tp), ("the pipeline", pp), ("the data-parallel group", dp)]
        {
            within(what, group.into(), RANKS_MAX as u64)?;
        }
        let ranks = tp.checked_mul(pp).and_then(|ranks| ranks.checked_mul(dp));
        ranks.filter(|&ranks| ranks as usize <= RANKS_MAX).ok_or(TrafficError::TooManyRanks {
            tp,
            pp,
            dp,
            max: RANKS_MAX,
        })
    }
}

impl Scheme {
    /// All schemes, in the order of the table.
    pub const ALL: [Scheme; 4] =
        [Scheme::DataParallel, Scheme::Fsdp, Scheme::TensorParallel, Scheme::PipelineParallel];

    /// The name in a table.
    pub const fn name(self) -> &'static str {
        match self {
            Scheme::DataParallel => "data parallel",
            Scheme::Fsdp => "FSDP",
            Scheme::TensorParallel => "tensor parallel",
            Scheme::PipelineParallel => "pipeline parallel",
        }
    }
}

impl Traffic {
    /// Both ways together, in bytes.
    pub fn total_bytes(&self) -> u128 {
        self.backward_bytes + self.forward_bytes
    }
}

/// The symbols of the formulas.
struct Exact {
    b: u128,
    p: u128,
    l: u128,
    h: u128,
    t: u128,
    n: u128,
}

fn within(what: &'static str, value: u64, max: u64) -> Result<u128, TrafficError> {
    if (1..=max).contains(&value) {
        Ok(value.into())
    } else {
        Err(TrafficError::OutOfRange { what, value, max })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PB: u128 = 1_000_000_000_000_000;

    /// Llama-3-70B on C4.
    fn example() -> Training {
        Training {
            parameters: 70_000_000_000,
            layers: 80,
            hidden: 8192,
            tokens: 156_000_000_000,
            batches: 364_600_000_u64.div_ceil(2048),
            bytes_per_element: 2,
        }
    }

    fn petabytes(traffic: Traffic) -> (u128, u128) {
        ((traffic.backward_bytes + PB / 2) / PB, (traffic.forward_bytes + PB / 2) / PB)
    }

    #[test]
    fn the_worked_example() {
        let training = example();
        assert_eq!(training.batches, 178_028);
        let of = |scheme| petabytes(training.traffic(scheme, 8).unwrap());
        assert_eq!(of(Scheme::DataParallel), (1396, 0));
        assert_eq!(of(Scheme::Fsdp), (174, 174));
        assert_eq!(of(Scheme::TensorParallel), (27_915, 22_901));
        assert_eq!(of(Scheme::PipelineParallel), (18, 18));
        let pipeline = training.traffic(Scheme::PipelineParallel, 8).unwrap();
        assert_eq!(pipeline.backward_bytes / (PB / 10), 178); // 17.89
        let job = training.traffic_3d(Groups { tp: 8, pp: 8, dp: 16 }).unwrap();
        assert_eq!(petabytes(job), (61_829, 22_919));
        assert_eq!(training.weight_bytes(), 140_000_000_000);
        let fraction = training.push_fraction(training.weight_bytes(), job).unwrap();
        assert!((fraction - 0.000_294).abs() < 1e-6, "{fraction}");
    }

    #[test]
    fn how_often_ranks_wait() {
        let training = Training { layers: 3, tokens: 10, batches: 5, ..example() };
        let of = |scheme, ranks| {
            let Collectives { syncs, passes } = training.collectives(scheme, ranks).unwrap();
            (syncs, passes)
        };
        let expected = [(5, 0), (15, 15), (30, 60), (0, 0)];
        assert_eq!(Scheme::ALL.map(|scheme| of(scheme, 4)), expected);
        assert_eq!(Scheme::ALL.map(|scheme| of(scheme, 1)), [(0, 0); 4]);
    }

    #[test]
    fn a_longer_pipeline_can_mean_less_traffic() {
        let backward = |pp| example().traffic_3d(Groups { tp: 8, pp, dp: 16 }).unwrap().backward_bytes;
        assert!(backward(8) < backward(1) / 7);
    }

    #[test]
    fn what_is_out_of_bounds_is_named() {
        let good = example();
        let cases = [
            (Training { parameters: 0, ..good }, "parameters"),
            (Training { layers: LAYERS_MAX + 1, ..good }, "layers"),
            (Training { hidden: 0, ..good }, "hidden size"),
            (Training { tokens: u64::MAX, ..good }, "tokens"),
            (Training { batches: 0, ..good }, "mini-batches"),
            (Training { bytes_per_element: 9, ..good }, "bytes per element"),
        ];
        for (training, word) in cases {
            for error in [
                training.traffic(Scheme::Fsdp, 2).unwrap_err(),
                training.traffic_3d(Groups { tp: 1, pp: 1, dp: 1 }).unwrap_err(),
                training.collectives(Scheme::Fsdp, 2).unwrap_err(),
            ] {
                assert!(error.to_string().contains(word), "{error}");
            }
        }
        for ranks in [0, RANKS_MAX as u32 + 1] {
            let error = good.traffic(Scheme::DataParallel, ranks).unwrap_err();
            assert!(error.to_string().contains("ranks"), "{error}");
            assert_eq!(good.collectives(Scheme::DataParallel, ranks), Err(error));
        }
        for (tp, pp, dp, word) in [
            (0, 1, 1, "tensor-parallel"),
            (1, 0, 1, "pipeline"),
            (1, 1, 0, "data-parallel"),
            (1 << 8, 1 << 8, 2, "more than 65536 ranks"),
            (1 << 16, 1 << 16, 1 << 16, "more than 65536 ranks"),
        ] {
            let error = good.traffic_3d(Groups { tp, pp, dp }).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    /// Overflow would panic here: tests are built with checks.
    #[test]
    fn nothing_overflows_at_the_bounds() {
        let most = Training {
            parameters: PARAMETERS_MAX,
            layers: LAYERS_MAX,
            hidden: HIDDEN_MAX,
            tokens: TOKENS_MAX,
            batches: BATCHES_MAX,
            bytes_per_element: ELEMENT_BYTES_MAX,
        };
        let ranks = RANKS_MAX as u32;
        for scheme in Scheme::ALL {
            assert!(most.traffic(scheme, ranks).unwrap().total_bytes() > most.weight_bytes());
            most.collectives(scheme, ranks).unwrap();
        }
        for bit in 0..=16 {
            for rest in 0..=16 - bit {
                let (tp, pp, dp) = (1 << bit, 1 << rest, 1 << (16 - bit - rest));
                most.traffic_3d(Groups { tp, pp, dp }).unwrap().total_bytes();
            }
        }
    }

    /// Everything that is sent, counted one message at a time: who sends, to whom, when, and how much.
    fn counted(scheme: Scheme, training: &Training, ranks: u64) -> Traffic {
        let Training { parameters, layers, hidden, tokens, batches, bytes_per_element } = *training;
        let pairs: Vec<(u64, u64)> = (0..ranks)
            .flat_map(|from| (0..ranks).map(move |to| (from, to)))
            .filter(|(a, b)| a != b)
            .collect();
        let (mut backward, mut forward) = (0, 0);
        match scheme {
            Scheme::DataParallel => {
                for _batch in 0..batches {
                    pairs.iter().for_each(|_| backward += parameters);
                }
            }
            Scheme::Fsdp => {
                for _layer in (0..batches).flat_map(|_| 0..layers) {
                    let share = parameters / layers / ranks;
                    pairs.iter().for_each(|_| backward += share);
                    pairs.iter().for_each(|_| forward += share);
                }
            }
            Scheme::TensorParallel => {
                for _sync in (0..batches).flat_map(|_| 0..2 * layers) {
                    pairs.iter().for_each(|_| backward += parameters / ranks);
                }
                for _pass in (0..tokens).flat_map(|_| 0..2 * layers) {
                    pairs.iter().for_each(|_| forward += hidden);
                }
            }
            Scheme::PipelineParallel => {
                for (from, to) in (0..tokens).flat_map(|_| &pairs) {
                    backward += if from.wrapping_sub(1) == *to { hidden } else { 0 };
                    forward += if from + 1 == *to { hidden } else { 0 };
                }
            }
        }
        let bytes = |elements: u64| u128::from(elements * bytes_per_element);
        Traffic { backward_bytes: bytes(backward), forward_bytes: bytes(forward) }
    }

    fn trainings() -> impl Strategy<Value = Training> {
        let model = (1..=PARAMETERS_MAX, 1..=LAYERS_MAX, 1..=HIDDEN_MAX);
        let data = (1..=TOKENS_MAX, 1..=BATCHES_MAX, 1..=ELEMENT_BYTES_MAX);
        (model, data).prop_map(|((parameters, layers, hidden), (tokens, batches, bytes_per_element))| {
            Training { parameters, layers, hidden, tokens, batches, bytes_per_element }
        })
    }

    proptest! {
        #[test]
        fn formulas_count_every_message(
            (share, layers, ranks) in (1..50u64, 1..5u64, 1..6u64),
            (hidden, tokens, batches, bytes_per_element) in (1..50u64, 1..20u64, 1..10u64, 1..=8u64),
        ) {
            // Shares come out whole.
            let parameters = share * layers * ranks;
            let training = Training { parameters, layers, hidden, tokens, batches, bytes_per_element };
            for scheme in Scheme::ALL {
                prop_assert_eq!(
                    training.traffic(scheme, ranks as u32).unwrap(),
                    counted(scheme, &training, ranks),
                    "{:?}", scheme
                );
            }
        }

        #[test]
        fn one_group_alone_is_its_scheme(training in trainings(), ranks in 1..=RANKS_MAX as u32) {
            let (dp, tp, pp) = (Scheme::DataParallel, Scheme::TensorParallel, Scheme::PipelineParallel);
            for (scheme, groups) in [
                (dp, Groups { tp: 1, pp: 1, dp: ranks }),
                (tp, Groups { tp: ranks, pp: 1, dp: 1 }),
                (pp, Groups { tp: 1, pp: ranks, dp: 1 }),
            ] {
                prop_assert_eq!(training.traffic_3d(groups).unwrap(), training.traffic(scheme, ranks).unwrap());
            }
        }

        #[test]
        fn more_ranks_send_more(
            training in trainings(),
            (tp, pp, dp) in (1..32u32, 1..32u32, 1..32u32),
            more in 1..=8u32,
        ) {
            for scheme in Scheme::ALL {
                let [few, many] = [tp, tp + more].map(|ranks| training.traffic(scheme, ranks).unwrap());
                prop_assert!(few.backward_bytes < many.backward_bytes);
                prop_assert!(few.forward_bytes <= many.forward_bytes);
            }
            let job = |tp, pp, dp| training.traffic_3d(Groups { tp, pp, dp }).unwrap();
            let here = job(tp, pp, dp);
            for other in [job(tp + more, pp, dp), job(tp, pp, dp + more)] {
                prop_assert!(here.backward_bytes < other.backward_bytes);
                prop_assert!(here.forward_bytes <= other.forward_bytes);
            }
            prop_assert!(here.forward_bytes < job(tp, pp + more, dp).forward_bytes);
            // Backward, a longer pipeline costs more only where no layer is shared.
            prop_assert!(job(1, pp, dp).backward_bytes < job(1, pp + more, dp).backward_bytes);
        }
    }
}
