//! Which NICs serve which GPU: both meet at their nearest common place in the tree. Pure; knows paths and indices only.
//!
//! From the leaves up, at every place that has both below it: NICs that serve nobody yet go to the GPUs there, to those
//! with the fewest NICs first; if there are fewer such NICs than GPUs without one, those GPUs are spread over all NICs
//! there instead, over those with the fewest GPUs first. So
//!
//! - where there is a NIC, every GPU has one, and where there is a GPU, every NIC serves one;
//! - in each pair one is among the nearest of the other;
//! - GPUs that meet their first NICs at the same place have NICs that differ by at most one in number, and NICs that
//!   meet their first GPUs at the same place have GPUs that do;
//! - no NIC serves a GPU while another GPU that is as near to it has two NICs fewer, and the same for NICs.
//!
//! At one place both are taken in the order in which they are given, in runs: four NICs and two GPUs make 0, 1 and 2, 3.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::place::{Branch, Place};

enum End {
    Gpu(usize),
    Nic(usize),
}

/// For every GPU the indices of its NICs, ascending. The arguments are the ways down from the host.
pub(crate) fn meet(gpus: &[Vec<Place>], nics: &[Vec<Place>]) -> Vec<Vec<usize>> {
    let ends = gpus.iter().enumerate().map(|(gpu, path)| (path.clone(), End::Gpu(gpu)));
    let ends = ends.chain(nics.iter().enumerate().map(|(nic, path)| (path.clone(), End::Nic(nic))));
    let mut meeting = Meeting { nics_of: vec![Vec::new(); gpus.len()], gpus_at: vec![0; nics.len()] };
    meeting.below(&Branch::grow(ends));
    for nics in &mut meeting.nics_of {
        nics.sort_unstable();
    }
    meeting.nics_of
}

struct Meeting {
    nics_of: Vec<Vec<usize>>,
    /// How many GPUs each NIC serves.
    gpus_at: Vec<usize>,
}

impl Meeting {
    /// Pairs what meets at or below `branch`; gives all GPUs and NICs there.
    fn below(&mut self, branch: &Branch<End>) -> (Vec<usize>, Vec<usize>) {
        let (mut gpus, mut nics) = (Vec::new(), Vec::new());
        for end in &branch.devices {
            match *end {
                End::Gpu(gpu) => gpus.push(gpu),
                End::Nic(nic) => nics.push(nic),
            }
        }
        for branch in &branch.branches {
            let (more_gpus, more_nics) = self.below(branch);
            gpus.extend(more_gpus);
            nics.extend(more_nics);
        }
        gpus.sort_unstable();
        nics.sort_unstable();
        let bare: Vec<usize> = gpus.iter().copied().filter(|&gpu| self.nics_of[gpu].is_empty()).collect();
        let idle: Vec<usize> = nics.iter().copied().filter(|&nic| self.gpus_at[nic] == 0).collect();
        let pairs: Vec<(usize, usize)> = if idle.len() >= bare.len() {
            let dealt = deal(&idle, &gpus, |gpu| self.nics_of[gpu].len());
            dealt.into_iter().map(|(nic, gpu)| (gpu, nic)).collect()
        } else {
            deal(&bare, &nics, |nic| self.gpus_at[nic])
        };
        for (gpu, nic) in pairs {
            self.nics_of[gpu].push(nic);
            self.gpus_at[nic] += 1;
        }
        (gpus, nics)
    }
}

/// Every item with its taker: the next item always goes up against the least load, of two equal ones the first's; which
/// item it is, is decided afterwards, so that each taker has a run of neighbours.
fn deal(items: &[usize], takers: &[usize], load: impl Fn(usize) -> usize) -> Vec<(usize, usize)> {
    let mut least: BinaryHeap<_> =
        takers.iter().enumerate().map(|(at, &taker)| Reverse((load(taker), at))).collect();
    let mut shares = vec![0; takers.len()];
    for _ in items {
        if let Some(Reverse((load, at))) = least.pop() {
            shares[at] += 1;
            least.push(Reverse((load + 1, at)));
        }
    }
    let takers = takers.iter().zip(shares).flat_map(|(&taker, share)| std::iter::repeat_n(taker, share));
    items.iter().copied().zip(takers).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::PciAddress;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn bridge(number: usize) -> Place {
        Place::Bridge(PciAddress { domain: 0, bus: number as u8, device: 0, function: 0 })
    }

    /// A random tree: place `i + 1` hangs from an earlier one. Gives the way down to each place, the host first.
    fn tree(parents: &[usize]) -> Vec<Vec<Place>> {
        let mut paths = vec![Vec::new()];
        for (index, parent) in parents.iter().enumerate() {
            let mut path: Vec<Place> = paths[parent % paths.len()].clone();
            path.push(bridge(index));
            paths.push(path);
        }
        paths
    }

    /// The oracle: length of the longest way down that both share, by trying every place of one against the other.
    fn nearness(a: &[Place], b: &[Place]) -> usize {
        (0..=a.len()).filter(|&depth| b.len() >= depth && a[..depth] == b[..depth]).max().unwrap()
    }

    fn machines() -> impl Strategy<Value = (Vec<Vec<Place>>, Vec<Vec<Place>>)> {
        let list = |max| prop::collection::vec(any::<usize>(), 0..max);
        (list(12), list(12), list(24)).prop_map(|(parents, gpus, nics)| {
            let paths = tree(&parents);
            let at = |places: Vec<usize>| {
                places.into_iter().map(|place| paths[place % paths.len()].clone()).collect()
            };
            (at(gpus), at(nics))
        })
    }

    proptest! {
        #[test]
        fn everything_is_paired_once_and_with_a_nearest((gpus, nics) in machines()) {
            let nics_of = meet(&gpus, &nics);
            prop_assert_eq!(nics_of.len(), gpus.len());
            prop_assert!(nics.is_empty() || nics_of.iter().all(|nics| !nics.is_empty()));
            let used: BTreeSet<usize> = nics_of.iter().flatten().copied().collect();
            prop_assert!(gpus.is_empty() || used.len() == nics.len());
            for (gpu, of_gpu) in gpus.iter().zip(&nics_of) {
                prop_assert!(of_gpu.is_sorted() && of_gpu.windows(2).all(|pair| pair[0] != pair[1]));
                for &nic in of_gpu {
                    let near = nearness(gpu, &nics[nic]);
                    let nearest_nic = nics.iter().map(|nic| nearness(gpu, nic)).max().unwrap();
                    let nearest_gpu = gpus.iter().map(|gpu| nearness(gpu, &nics[nic])).max().unwrap();
                    prop_assert!(near == nearest_nic || near == nearest_gpu);
                }
            }
        }

        #[test]
        fn equally_near_ones_have_equal_shares((gpus, nics) in machines()) {
            // Where each first meets one of the other kind, by trying all of them.
            let meets = |end: &Vec<Place>, others: &[Vec<Place>]| {
                others.iter().map(|other| nearness(end, other)).max().map(|depth| end[..depth].to_vec())
            };
            let nics_of = meet(&gpus, &nics);
            let gpus_at: Vec<usize> =
                (0..nics.len()).map(|nic| nics_of.iter().filter(|nics| nics.contains(&nic)).count()).collect();
            for (a, of_a) in gpus.iter().zip(&nics_of) {
                for (b, of_b) in gpus.iter().zip(&nics_of) {
                    if meets(a, &nics) == meets(b, &nics) {
                        prop_assert!(of_a.len().abs_diff(of_b.len()) <= 1, "{of_a:?} {of_b:?}");
                    }
                }
            }
            for (a, at_a) in nics.iter().zip(&gpus_at) {
                for (b, at_b) in nics.iter().zip(&gpus_at) {
                    if meets(a, &gpus) == meets(b, &gpus) {
                        prop_assert!(at_a.abs_diff(*at_b) <= 1, "{at_a} {at_b}");
                    }
                }
            }
        }

        /// No NIC serves a GPU while another that is as near to it has two fewer, and the other way round.
        #[test]
        fn no_move_makes_it_more_even((gpus, nics) in machines()) {
            let nics_of = meet(&gpus, &nics);
            let gpus_at = |nic: usize| nics_of.iter().filter(|nics| nics.contains(&nic)).count();
            for (gpu, of_gpu) in nics_of.iter().enumerate() {
                for &nic in of_gpu {
                    let near = nearness(&gpus[gpu], &nics[nic]);
                    for (other, of_other) in nics_of.iter().enumerate() {
                        let as_near = nearness(&gpus[other], &nics[nic]) >= near;
                        prop_assert!(!as_near || of_other.len() + 1 >= of_gpu.len(), "{of_other:?} {of_gpu:?}");
                    }
                    for (other, other_path) in nics.iter().enumerate() {
                        let as_near = nearness(&gpus[gpu], other_path) >= near;
                        prop_assert!(!as_near || gpus_at(other) + 1 >= gpus_at(nic));
                    }
                }
            }
        }

        /// Without a tree both are cut evenly, in order.
        #[test]
        fn by_order_alone(gpus in 1..12usize, nics in 1..40usize) {
            let nics_of = meet(&vec![Vec::new(); gpus], &vec![Vec::new(); nics]);
            let flat: Vec<usize> = nics_of.iter().flatten().copied().collect();
            prop_assert!(flat.is_sorted());
            prop_assert_eq!(flat.len(), gpus.max(nics));
        }
    }
}
