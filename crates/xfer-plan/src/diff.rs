//! Differences of two plans: what a change of layouts, options or ranks does to what is sent.
//!
//! Plans number groups, parameters and tables each in their own way, so transfers are compared by what the numbers mean.
//! Which lane of a route a transfer takes is left out: lanes are evened out, and one transfer more shifts all after it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use crate::bound::LowerBound;
use crate::cost::Prediction;
use crate::error::shorten;
use crate::ids::{ReceiverRank, RegionIndex, TrainerRank};
use crate::plan::{Bytes, Fill, Plan, Transfer};
use crate::route::{Group, Route};
use crate::transform::{BlockQuant, Transform};

impl Plan {
    /// Whether the digest that the plan states is its own. One that was damaged, or changed by hand, says no.
    pub fn is_intact(&self) -> bool {
        self.compute_digest().is_ok_and(|found| found == self.digest)
    }
}

/// How plan `b` differs from plan `a`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlanDiff {
    /// Whether the plans are equal in everything; then nothing else is said.
    pub equal: bool,
    /// Digests, in hexadecimal.
    pub digest: Change<String>,
    /// Digests of the manifests: whether both were made from the same.
    pub manifest_digest: Change<String>,
    /// Numbers of trainers.
    pub trainers: Change<u64>,
    /// Numbers of receivers.
    pub receivers: Change<u64>,
    /// Bytes that trainers write.
    pub trainer_bytes: Change<u64>,
    /// WRITEs in which they do.
    pub trainer_writes: Change<u64>,
    /// Lower bounds.
    pub bound: Change<LowerBound>,
    /// Predicted times.
    pub predicted: Change<Prediction>,
    /// Transfers of both plans.
    pub common_transfers: u64,
    /// Transfers of one plan only: their number, and what trainers write for them.
    pub transfers: Change<Amount>,
    /// Of these, so many are in the other plan too, but go to other receivers or by another route.
    pub redirected_transfers: u64,
    /// Groups of receivers of one plan only, or of another route.
    pub groups: Change<u64>,
    /// Groups by route.
    pub routes: BTreeMap<Route, Change<u64>>,
    /// Parameters that are in one plan only, or sent differently, in the order of their priorities and names.
    pub params: Vec<ParamDiff>,
    /// Trainers that send something else.
    pub by_trainer: Vec<TrainerDiff>,
    /// Receivers that get another number of bytes.
    pub by_receiver: Vec<ReceiverDiff>,
}

/// The same of both plans.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)] // the names say it
pub struct Change<T> {
    pub a: T,
    pub b: T,
}

/// Transfers, and what trainers write for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Amount {
    /// How many.
    pub transfers: u64,
    /// Bytes, every copy that a trainer writes counted.
    pub bytes: u64,
}

/// A parameter that is in one plan only, or that is sent differently.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ParamDiff {
    /// Its name.
    pub name: String,
    /// When it is sent.
    pub priority: u32,
    /// Whether each plan has it, with this priority.
    pub present: Change<bool>,
    /// Its transfers in one plan only.
    pub transfers: Change<Amount>,
}

/// A trainer that sends something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TrainerDiff {
    /// Which.
    pub trainer: TrainerRank,
    /// All that it writes, in bytes.
    pub bytes: Change<u64>,
    /// Its transfers in one plan only.
    pub transfers: Change<Amount>,
}

/// A receiver that gets another number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ReceiverDiff {
    /// Which.
    pub receiver: ReceiverRank,
    /// What arrives, in bytes.
    pub bytes: Change<u64>,
}

/// Numbers that mean the same in both plans.
#[derive(Default)]
struct Names<'p> {
    params: BTreeMap<(u32, &'p str), usize>,
    groups: BTreeMap<(Route, &'p [Vec<ReceiverRank>]), usize>,
    tables: BTreeMap<(&'p str, BlockQuant), usize>,
}

/// The numbers of one plan in those of both.
struct Numbers {
    params: Vec<usize>,
    groups: Vec<usize>,
    tables: Vec<usize>,
}

fn number<K: Ord>(known: &mut BTreeMap<K, usize>, key: K) -> usize {
    let next = known.len();
    *known.entry(key).or_insert(next)
}

impl<'p> Names<'p> {
    fn of(&mut self, plan: &'p Plan) -> Numbers {
        let params = plan.params.iter().map(|p| number(&mut self.params, (p.priority, p.name.as_str())));
        let groups = plan.groups.iter().map(|g| number(&mut self.groups, (g.route, g.hosts.as_slice())));
        let tables = plan.tables.iter().map(|t| number(&mut self.tables, (t.tensor.as_str(), t.quant)));
        Numbers { params: params.collect(), groups: groups.collect(), tables: tables.collect() }
    }
}

impl Numbers {
    /// The fills of a plan by parameter and group, in the numbers of both plans.
    fn fills<'p>(&self, plan: &'p Plan) -> BTreeMap<(usize, usize), Vec<&'p Fill>> {
        let of = |list: &[usize], index: usize| list.get(index).copied().unwrap_or(usize::MAX);
        let mut fills: BTreeMap<(usize, usize), Vec<&Fill>> = BTreeMap::new();
        for fill in &plan.fills {
            let key = (of(&self.params, fill.param.index()), of(&self.groups, fill.to.index()));
            fills.entry(key).or_default().push(fill);
        }
        fills
    }

    /// The transfers of some fills, sorted, with tables in the numbers of both plans.
    fn transfers(&self, fills: &[&Fill]) -> Vec<Transfer> {
        let mut transfers = Vec::new();
        for fill in fills {
            transfers.extend(fill.transfers.iter().map(|transfer| {
                let mut transfer = *transfer;
                if let Transform::Scales { .. } = transfer.transform {
                    let table = fill.tables.get(transfer.source.region.index());
                    let known = table.and_then(|&table| self.tables.get(table as usize));
                    transfer.source.region = RegionIndex(known.map_or(u32::MAX, |&known| known as u32));
                }
                transfer
            }));
        }
        transfers.sort_unstable();
        transfers
    }
}

/// Compares two plans.
pub fn diff(a: &Plan, b: &Plan) -> PlanDiff {
    let sum = |of: fn(&Plan) -> u64| Change { a: of(a), b: of(b) };
    let mut diff = PlanDiff {
        equal: a == b,
        digest: Change { a: a.digest.to_string(), b: b.digest.to_string() },
        manifest_digest: Change { a: a.manifest_digest.to_string(), b: b.manifest_digest.to_string() },
        trainers: sum(|plan| plan.trainers.len() as u64),
        receivers: sum(|plan| plan.receivers.len() as u64),
        trainer_bytes: sum(|plan| plan.trainers.iter().map(|part| part.bytes).fold(0, u64::saturating_add)),
        trainer_writes: sum(|plan| plan.trainers.iter().map(|part| part.writes).fold(0, u64::saturating_add)),
        bound: Change { a: a.bound, b: b.bound },
        predicted: Change { a: a.predicted, b: b.predicted },
        common_transfers: 0,
        transfers: Change::default(),
        redirected_transfers: 0,
        groups: Change::default(),
        routes: BTreeMap::new(),
        params: Vec::new(),
        by_trainer: Vec::new(),
        by_receiver: Vec::new(),
    };
    for group in &a.groups {
        diff.routes.entry(group.route).or_default().a += 1;
    }
    for group in &b.groups {
        diff.routes.entry(group.route).or_default().b += 1;
    }
    if diff.equal {
        diff.common_transfers = a.fills.iter().map(|fill| fill.transfers.len() as u64).sum();
        return diff;
    }
    let mut names = Names::default();
    let of_a = names.of(a);
    let groups_of_a = names.groups.len();
    let of_b = names.of(b);
    diff.groups = Change {
        a: (names.groups.len() - distinct(&of_b.groups)) as u64,
        b: (names.groups.len() - groups_of_a) as u64,
    };
    let mut params: Vec<Change<Amount>> = vec![Change::default(); names.params.len()];
    let trainers = a.trainers.len().max(b.trainers.len());
    let mut by_trainer: Vec<Change<Amount>> = vec![Change::default(); trainers];
    let copies: Vec<u64> = copies(&names.groups);
    let (fills_a, fills_b) = (of_a.fills(a), of_b.fills(b));
    let keys: BTreeSet<&(usize, usize)> = fills_a.keys().chain(fills_b.keys()).collect();
    let keys: Vec<(usize, usize)> = keys.into_iter().copied().collect();
    for of_param in keys.chunk_by(|(a, _), (b, _)| a == b) {
        let (mut only_a, mut only_b) = (Vec::new(), Vec::new());
        for key in of_param {
            let of = |fills: &BTreeMap<_, Vec<_>>, numbers: &Numbers| {
                numbers.transfers(fills.get(key).map_or(&[][..], Vec::as_slice))
            };
            let (in_a, in_b) = (of(&fills_a, &of_a), of(&fills_b, &of_b));
            let &(param, group) = key;
            let copies = copies.get(group).copied().unwrap_or(0);
            diff.common_transfers += merge(&in_a, &in_b, &mut |transfer: &Transfer, in_a| {
                if in_a { &mut only_a } else { &mut only_b }.push(*transfer);
                let bytes = transfer.row_bytes.saturating_mul(transfer.rows.into()).saturating_mul(copies);
                let trainer = by_trainer.get_mut(transfer.trainer.index());
                for changed in
                    [Some(&mut diff.transfers), params.get_mut(param), trainer].into_iter().flatten()
                {
                    let side = if in_a { &mut changed.a } else { &mut changed.b };
                    side.transfers += 1;
                    side.bytes = side.bytes.saturating_add(bytes);
                }
            });
        }
        only_a.sort_unstable();
        only_b.sort_unstable();
        diff.redirected_transfers += merge(&only_a, &only_b, &mut |_, _| {});
    }
    for (trainer, transfers) in (0..).map(TrainerRank).zip(by_trainer) {
        if transfers != Change::default() {
            let bytes = |plan: &Plan| plan.trainers.get(trainer.index()).map_or(0, |part| part.bytes);
            diff.by_trainer.push(TrainerDiff {
                trainer,
                bytes: Change { a: bytes(a), b: bytes(b) },
                transfers,
            });
        }
    }
    let has = |numbers: &Numbers| {
        let mut has = vec![false; names.params.len()];
        numbers
            .params
            .iter()
            .for_each(|&param| has.iter_mut().skip(param).take(1).for_each(|has| *has = true));
        has
    };
    let (has_a, has_b) = (has(&of_a), has(&of_b));
    for (&(priority, name), &param) in &names.params {
        let is = |of: &[bool]| of.get(param).copied().unwrap_or(false);
        let present = Change { a: is(&has_a), b: is(&has_b) };
        let transfers = params.get(param).copied().unwrap_or_default();
        if present.a != present.b || transfers != Change::default() {
            diff.params.push(ParamDiff { name: name.to_owned(), priority, present, transfers });
        }
    }
    let receivers = a.receivers.len().max(b.receivers.len());
    for (receiver, index) in (0..).map(ReceiverRank).zip(0..receivers) {
        let bytes = |plan: &Plan| plan.receivers.get(index).map_or(0, |part| part.bytes);
        let bytes = Change { a: bytes(a), b: bytes(b) };
        if bytes.a != bytes.b {
            diff.by_receiver.push(ReceiverDiff { receiver, bytes });
        }
    }
    diff
}

fn distinct(numbers: &[usize]) -> usize {
    numbers.iter().collect::<BTreeSet<_>>().len()
}

/// What a trainer writes to each group.
fn copies(groups: &BTreeMap<(Route, &[Vec<ReceiverRank>]), usize>) -> Vec<u64> {
    let mut copies = vec![0; groups.len()];
    for (&(route, hosts), &number) in groups {
        if let Some(copies) = copies.get_mut(number) {
            *copies = Group { hosts: hosts.to_vec(), route }.copies() as u64;
        }
    }
    copies
}

/// Walks through two sorted lists; calls `only` with what is in one of them, and whether that is the first. Returns how
/// many are in both.
fn merge<T: Ord>(mut a: &[T], mut b: &[T], only: &mut dyn FnMut(&T, bool)) -> u64 {
    let mut common = 0;
    loop {
        match (a.split_first(), b.split_first()) {
            (None, None) => return common,
            (Some((first, rest)), None) => {
                only(first, true);
                a = rest;
            }
            (None, Some((second, rest))) => {
                only(second, false);
                b = rest;
            }
            (Some((first, rest_a)), Some((second, rest_b))) => match first.cmp(second) {
                Ordering::Equal => {
                    common += 1;
                    (a, b) = (rest_a, rest_b);
                }
                Ordering::Less => {
                    only(first, true);
                    a = rest_a;
                }
                Ordering::Greater => {
                    only(second, false);
                    b = rest_b;
                }
            },
        }
    }
}

/// Lines of each kind in the text.
const LISTED_MAX: usize = 12;

/// In lines for a person. Only the first 12 parameters, trainers and receivers are listed.
impl fmt::Display for PlanDiff {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.equal {
            return writeln!(f, "the plans are equal: {}", self.digest.a);
        }
        writeln!(f, "plan a {}\nplan b {}", self.digest.a, self.digest.b)?;
        let same = if self.manifest_digest.a == self.manifest_digest.b {
            "the same manifest"
        } else {
            "different manifests"
        };
        writeln!(f, "made from {same}")?;
        let change = |f: &mut fmt::Formatter<'_>, what: &str, of: Change<u64>| match of.a == of.b {
            true => writeln!(f, "{what}: {} in both", of.a),
            false => writeln!(f, "{what}: {} -> {}", of.a, of.b),
        };
        change(f, "trainers", self.trainers)?;
        change(f, "inference ranks", self.receivers)?;
        writeln!(f, "trainers write: {} -> {}", Bytes(self.trainer_bytes.a), Bytes(self.trainer_bytes.b))?;
        change(f, "in WRITEs", self.trainer_writes)?;
        let milliseconds = |of: Change<f64>| format!("{:.3} ms -> {:.3} ms", of.a * 1e3, of.b * 1e3);
        let bound = Change { a: self.bound.a.seconds(), b: self.bound.b.seconds() };
        let predicted = Change { a: self.predicted.a.seconds(), b: self.predicted.b.seconds() };
        writeln!(f, "lower bound: {}", milliseconds(bound))?;
        writeln!(f, "predicted: {}", milliseconds(predicted))?;
        for (route, groups) in &self.routes {
            change(f, &format!("groups that get it {}", route_text(*route)), *groups)?;
        }
        let Change { a, b } = self.groups;
        writeln!(f, "groups only in a: {a}, only in b: {b}")?;
        let Change { a, b } = self.transfers;
        writeln!(
            f,
            "transfers in both: {}, only in a: {} ({}), only in b: {} ({})",
            self.common_transfers,
            a.transfers,
            Bytes(a.bytes),
            b.transfers,
            Bytes(b.bytes),
        )?;
        if self.redirected_transfers > 0 {
            let count = self.redirected_transfers;
            writeln!(f, "of those, in both but to other receivers or by another route: {count}")?;
        }
        list(f, "parameters that differ", &self.params, &|f, param| {
            write!(f, "{}", shorten(&param.name))?;
            match (param.present.a, param.present.b) {
                (true, false) => write!(f, " (only in a)")?,
                (false, true) => write!(f, " (only in b)")?,
                _ => {}
            }
            write_amounts(f, param.transfers)
        })?;
        list(f, "trainers that send something else", &self.by_trainer, &|f, of| {
            write!(f, "{}: {} -> {}", of.trainer, Bytes(of.bytes.a), Bytes(of.bytes.b))?;
            write_amounts(f, of.transfers)
        })?;
        list(f, "receivers that get another number of bytes", &self.by_receiver, &|f, of| {
            write!(f, "{}: {} -> {}", of.receiver, Bytes(of.bytes.a), Bytes(of.bytes.b))
        })
    }
}

/// A route in words, as in "groups that get it directly".
fn route_text(route: Route) -> &'static str {
    match route {
        Route::Direct => "directly",
        Route::PerHost => "once per host",
        Route::Chain => "from host to host",
    }
}

fn write_amounts(f: &mut fmt::Formatter<'_>, Change { a, b }: Change<Amount>) -> fmt::Result {
    write!(f, ", -{} transfers ({}), +{} ({})", a.transfers, Bytes(a.bytes), b.transfers, Bytes(b.bytes))
}

/// Writes the line of one entry, without its end.
type Line<'l, T> = dyn Fn(&mut fmt::Formatter<'_>, &T) -> fmt::Result + 'l;

fn list<T>(f: &mut fmt::Formatter<'_>, what: &str, of: &[T], line: &Line<'_, T>) -> fmt::Result {
    if of.is_empty() {
        return Ok(());
    }
    writeln!(f, "{what}: {}", of.len())?;
    for entry in of.iter().take(LISTED_MAX) {
        f.write_str("  ")?;
        line(f, entry)?;
        writeln!(f)?;
    }
    match of.len().saturating_sub(LISTED_MAX) {
        0 => Ok(()),
        more => writeln!(f, "  and {more} more"),
    }
}
