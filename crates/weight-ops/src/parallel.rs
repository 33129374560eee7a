//! When work is worth more than one thread, and in what portions.
//!
//! Portions never decide about results: each writes what no other reads.

use rayon::prelude::*;

/// Elements below which the calling thread does the work alone: 15 to 30 us of it, where waking threads that sleep costs 13.
/// Measured on two cores of an EPYC of Zen 5; more cores gain more.
pub(crate) const PARALLEL_ELEMENTS_MIN: usize = 256 << 10;

/// Elements of one portion, 7 us of work: small enough to be shared out evenly, large enough for the cost of sharing out
/// not to show.
pub(crate) const PORTION_ELEMENTS: usize = 64 << 10;

/// Calls `work` for each item, on the threads of the caller's rayon pool if all of them have enough `elements`.
pub(crate) fn for_each<I: Send>(items: Vec<I>, elements: usize, work: impl Fn(I) + Send + Sync) {
    if elements < PARALLEL_ELEMENTS_MIN || items.len() < 2 {
        items.into_iter().for_each(work);
    } else {
        let items_min = PORTION_ELEMENTS.div_ceil((elements / items.len()).max(1));
        items.into_par_iter().with_min_len(items_min).for_each(work);
    }
}
