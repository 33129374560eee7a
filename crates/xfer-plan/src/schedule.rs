//! The schedule: who sends what to whom.
//!
//! Everything is decided in the order of the manifest, with ties going to the lower rank. Nothing depends on
//! an address or on chance: two machines with the same manifest make the same plan, and planning again after a change
//! makes the plan that planning from scratch makes.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::bound::LowerBound;
use crate::cost::{Prediction, time};
use crate::digest::Digest;
use crate::error::PlanError;
use crate::ids::{GroupIndex, ParamId, ReceiverRank, RegionIndex};
use crate::limits::{OPS_MAX, TRANSFERS_MAX};
use crate::manifest::{DestinationParam, Manifest, ReceiverManifest, Relay, bandwidth};
use crate::plan::{Fill, Plan, PlannedParam, ReceiverPart, TrainerPart, Transfer};
use crate::quant::ScaleTable;
use crate::route::{Group, Route};
use crate::sender::Senders;
use crate::source_index::SourceIndex;
use crate::template::{Declared, Sources};
use crate::templates::{ByContent, Templates};
use crate::validate;

/// Plans a transfer.
///
/// # Errors
/// When the manifest is invalid, when the two sides do not fit together, or when a [limit](crate::limits) is
/// exceeded.
pub fn plan(manifest: &Manifest) -> Result<Plan, PlanError> {
    Planner::new().plan(manifest)
}

/// Plans again and again. While the trainers declare the same, only what no receiver has declared before is planned: receivers may
/// leave, come back, or want something else, and the plan is the one that [`plan`] makes from scratch. When a trainer declares
/// anything else, nothing of before is used.
///
/// It borrows nothing and keeps no manifest: the trainers are known again by their digest. What it keeps is the transfers of what
/// only one trainer has, which it shares with its plans, and an index of who holds what, at most about twice as much as its last
/// plan needed: what receivers declared that do not come back is forgotten. After a plan that fails it keeps nothing.
#[derive(Default)]
pub struct Planner {
    known: Option<Known>,
}

/// What has been found out about these trainers so far. None of it depends on which receivers there are.
struct Known {
    /// Of the trainers.
    digest: Digest,
    index: SourceIndex,
    templates: Templates,
}

/// Templates of more than so many times the size of what a plan needed are forgotten after it. With 2, half of the receivers can
/// be lost that share nothing with the others, and nothing is planned anew when they come back.
const KEPT_MAX: usize = 2;

/// Every declared parameter once, in the order of the manifest, with all who declare it alike.
pub(crate) fn declarations(receivers: &[ReceiverManifest]) -> Vec<(Declared<'_>, Vec<ReceiverRank>)> {
    let mut places: ByContent<&DestinationParam, usize> = ByContent::default();
    let mut found: Vec<(Declared<'_>, Vec<ReceiverRank>)> = Vec::new();
    for (receiver, declared) in (0..).map(ReceiverRank).zip(receivers) {
        for param in &declared.params {
            let place = *places.entry(param).or_insert(found.len());
            match found.get_mut(place) {
                Some((_, members)) => members.push(receiver),
                None => found.push((Declared { receiver, param }, vec![receiver])),
            }
        }
    }
    found
}

/// The digest of a manifest: over one of all trainers, the options, and one per receiver, which is over one per parameter,
/// so that planning again looks only at what is new.
pub(crate) fn manifest_digest(manifest: &Manifest) -> Result<Digest, PlanError> {
    let trainers = Digest::of(manifest.trainers.as_slice()).map_err(encode)?;
    let receiver = |receiver: &ReceiverManifest| {
        let params = receiver.params.iter().map(|param| Digest::of(param).map_err(encode));
        receiver_digest(receiver, params.collect::<Result<_, _>>()?)
    };
    let receivers = manifest.receivers.iter().map(receiver).collect::<Result<Vec<_>, _>>()?;
    Digest::of(&(trainers, manifest.options, receivers)).map_err(encode)
}

fn receiver_digest(receiver: &ReceiverManifest, params: Vec<Digest>) -> Result<Digest, PlanError> {
    let ReceiverManifest { host, regions, rails, params: _ } = receiver;
    Digest::of(&(host, regions, rails, params)).map_err(encode)
}

/// A parameter that at least one receiver declares, and all who declare it alike.
struct Declaration<'a> {
    first: Declared<'a>,
    name: ParamId,
    /// Of its template.
    place: usize,
    members: Vec<ReceiverRank>,
}

impl Planner {
    /// One that knows nothing yet.
    pub fn new() -> Planner {
        Planner::default()
    }

    /// Plans a transfer.
    ///
    /// # Errors
    /// As [`plan`].
    pub fn plan(&mut self, manifest: &Manifest) -> Result<Plan, PlanError> {
        let mut known = Known::new(manifest, self.known.take())?;
        let (plan, needed) = known.plan(manifest)?;
        if known.templates.size > KEPT_MAX.saturating_mul(needed) {
            known.templates = Templates::default();
        }
        self.known = Some(known);
        Ok(plan)
    }
}

impl Known {
    /// What is known of before if the trainers are the same, else an index of what they hold.
    fn new(Manifest { trainers, options, .. }: &Manifest, before: Option<Known>) -> Result<Known, PlanError> {
        let of_trainers = || Digest::of(trainers.as_slice()).map_err(encode);
        if let Some(known) = before
            && known.digest == of_trainers()?
        {
            options.validate()?;
            return Ok(known);
        }
        validate::trainers(trainers, options)?;
        let index = SourceIndex::new(trainers)?;
        Ok(Known { digest: of_trainers()?, index, templates: Templates::default() })
    }

    /// The plan, and the size of the templates that it is made of.
    fn plan(&mut self, manifest: &Manifest) -> Result<(Plan, usize), PlanError> {
        let Manifest { trainers, receivers, options } = manifest;
        let Known { digest, index, templates } = self;
        let sources = Sources { index, trainers };
        validate::receivers(receivers)?;
        let mut params = Params::default();
        let mut declarations: Vec<Declaration<'_>> = Vec::new();
        let mut declaration_of: Vec<Option<usize>> = Vec::new(); // by template
        let mut digests = Vec::with_capacity(receivers.len());
        let (mut room, mut needed) = (TRANSFERS_MAX, 0);
        for (receiver, declared) in (0..).map(ReceiverRank).zip(receivers) {
            let mut of_params = Vec::with_capacity(declared.params.len());
            for param in &declared.params {
                let first = Declared { receiver, param };
                let place = templates.place(sources, first, room)?;
                let (template, param_digest) = templates.list.get(place).ok_or(LOST)?;
                of_params.push(*param_digest);
                declaration_of.resize(templates.list.len(), None);
                let Some(declaration) = declaration_of.get_mut(place) else { return Err(LOST) };
                match *declaration {
                    Some(declaration) => {
                        let known = declarations.get_mut(declaration).ok_or(LOST)?;
                        known.members.push(receiver);
                    }
                    None => {
                        // Of templates of before too, or a plan could be made that cannot be made from scratch.
                        room = room.checked_sub(template.room).ok_or(TOO_MANY)?;
                        needed += template.size();
                        *declaration = Some(declarations.len());
                        let name = params.intern(param);
                        declarations.push(Declaration { first, name, place, members: vec![receiver] });
                    }
                }
            }
            digests.push(receiver_digest(declared, of_params)?);
        }
        let manifest_digest = Digest::of(&(*digest, options, digests)).map_err(encode)?;

        let known = &*templates;
        let route = known.route(manifest, &declarations);
        let mut assembly = Assembly { params: params.list, ..Assembly::default() };
        let mut senders = Senders::new(trainers);
        // What only one trainer has is settled first; the replicas then fill up around it.
        let mut dealt = Vec::new();
        for declaration in &declarations {
            let (template, _) = known.list.get(declaration.place).ok_or(LOST)?;
            let to = assembly.group(&declaration.members, receivers, route);
            let tables = assembly.tables(&template.quantised, known)?;
            if !template.dealt.is_empty() {
                dealt.push((declaration, template, to, tables.clone()));
            }
            assembly.fill(declaration.name, to, tables, (template.unique.clone(), template.digest));
        }
        if !dealt.is_empty() {
            for fill in &assembly.fills {
                let copies = assembly.copies(fill.to);
                for transfer in fill.transfers.iter() {
                    senders.load(transfer.trainer, transfer.bytes().saturating_mul(copies));
                }
            }
        }
        for (declaration, template, to, tables) in dealt {
            let copies = assembly.copies(to);
            let sent = senders.deal(template, declaration.first, copies, options, &mut room)?;
            let digest = Digest::of(sent.as_slice()).map_err(encode)?;
            assembly.fill(declaration.name, to, tables, (sent.into(), digest));
        }
        Ok((assembly.finish(manifest, manifest_digest)?, needed))
    }
}

const LOST: PlanError = PlanError::Defect { detail: "a declaration was lost" };

const TOO_MANY: PlanError = PlanError::TooManyTransfers { max: TRANSFERS_MAX };

impl Templates {
    /// The route of all groups: as asked, or the one that ends first.
    fn route(&self, manifest: &Manifest, declarations: &[Declaration<'_>]) -> Route {
        let choices = match manifest.options.relay {
            Relay::Never => return Route::Direct,
            Relay::PerHost => return Route::PerHost,
            Relay::Chain => return Route::Chain,
            Relay::Auto => [Route::Direct, Route::PerHost, Route::Chain],
        };
        let estimate = |route: &Route| {
            let members = declarations.iter().map(|declaration| {
                let bytes = self.list.get(declaration.place).map_or(0, |(template, _)| template.bytes);
                (bytes, declaration.members.as_slice())
            });
            estimate(*route, members, manifest)
        };
        choices.into_iter().min_by_key(estimate).unwrap_or(Route::Direct)
    }
}

pub(crate) fn encode(error: postcard::Error) -> PlanError {
    PlanError::Encode { detail: error.to_string() }
}

/// Nanoseconds that the busiest resource needs if all is dealt evenly: by NICs of trainers together, of each host's
/// receivers together, and by NVLink.
fn estimate<'a>(
    route: Route,
    declared: impl Iterator<Item = (u64, &'a [ReceiverRank])>,
    Manifest { trainers, receivers, options }: &Manifest,
) -> u64 {
    let hosts = hosts(receivers);
    let host_count = hosts.iter().map(|&host| host + 1).max().unwrap_or(0);
    let (mut egress, mut network, mut onward, mut local) =
        (0u64, vec![0u64; host_count], vec![0u64; host_count], vec![0u64; host_count]);
    let mut here = vec![0u64; host_count];
    for (bytes, members) in declared {
        here.fill(0);
        for member in members {
            here[hosts[member.index()]] += 1;
        }
        let wide = here.iter().filter(|&&count| count > 0).count() as u64;
        let copies = match route {
            Route::Direct => members.len() as u64,
            Route::PerHost => wide,
            Route::Chain => wide.min(1),
        };
        egress = egress.saturating_add(bytes.saturating_mul(copies));
        for (host, &count) in here.iter().enumerate().filter(|(_, count)| **count > 0) {
            let (over_nic, over_nvlink) = match route {
                Route::Direct => (count, 0),
                Route::PerHost | Route::Chain => (1, count - 1),
            };
            network[host] = network[host].saturating_add(bytes.saturating_mul(over_nic));
            local[host] = local[host].saturating_add(bytes.saturating_mul(over_nvlink));
            // Every host but the last of a chain passes on; which is the last changes with the lane.
            if route == Route::Chain {
                onward[host] = onward[host].saturating_add(bytes.saturating_mul(wide - 1) / wide);
            }
        }
    }
    let sum = |rates: &mut dyn Iterator<Item = u64>| rates.fold(0, u64::saturating_add);
    let mut slowest = time(egress, sum(&mut trainers.iter().map(|trainer| bandwidth(&trainer.rails))));
    for host in 0..host_count {
        let on_host = || receivers.iter().zip(&hosts).filter(move |(_, on)| **on == host);
        let nics = sum(&mut on_host().map(|(receiver, _)| bandwidth(&receiver.rails)));
        let nvlink = options.cost.nvlink_bytes_per_second.saturating_mul(on_host().count() as u64);
        slowest = slowest.max(time(network[host], nics)).max(time(onward[host], nics));
        slowest = slowest.max(time(local[host], nvlink));
    }
    slowest
}

/// The number of each receiver's host, in the order in which hosts appear.
fn hosts(receivers: &[ReceiverManifest]) -> Vec<usize> {
    let mut known: BTreeMap<&str, usize> = BTreeMap::new();
    receivers
        .iter()
        .map(|receiver| {
            let next = known.len();
            *known.entry(&receiver.host).or_insert(next)
        })
        .collect()
}

/// Parameter names with their priorities, each once, numbered in the order of the manifest.
#[derive(Default)]
struct Params<'m> {
    ids: BTreeMap<(&'m str, u32), ParamId>,
    list: Vec<PlannedParam>,
}

impl<'m> Params<'m> {
    fn intern(&mut self, param: &'m DestinationParam) -> ParamId {
        let priority = param.priority;
        *self.ids.entry((&param.name, priority)).or_insert_with(|| {
            self.list.push(PlannedParam { name: param.name.clone(), priority });
            ParamId(self.list.len() as u32 - 1) // no memory holds a manifest with 2^32 names
        })
    }
}

/// A plan in the making.
#[derive(Default)]
struct Assembly {
    params: Vec<PlannedParam>,
    groups: Vec<Group>,
    group_ids: BTreeMap<Vec<ReceiverRank>, GroupIndex>,
    tables: Vec<ScaleTable>,
    /// By the planner's number of a table.
    table_ids: Vec<Option<u32>>,
    fills: Vec<Fill>,
    /// Of each fill's transfers.
    digests: Vec<Digest>,
    /// By lane, where a group has several: bytes of the transfers that take it.
    lane_bytes: BTreeMap<GroupIndex, Vec<u64>>,
}

impl Assembly {
    fn group(
        &mut self,
        members: &[ReceiverRank],
        receivers: &[ReceiverManifest],
        route: Route,
    ) -> GroupIndex {
        if let Some(&known) = self.group_ids.get(members) {
            return known;
        }
        let id = GroupIndex(self.groups.len() as u32);
        self.groups.push(Group::new(members, receivers, route));
        self.group_ids.insert(members.to_vec(), id);
        id
    }

    /// WRITEs of the trainer per chunk that it sends to a group.
    fn copies(&self, group: GroupIndex) -> u64 {
        self.groups.get(group.index()).map_or(1, |group| group.copies() as u64)
    }

    /// The plan's numbers of tables; only those are in it that it needs.
    fn tables(&mut self, tables: &[RegionIndex], known: &Templates) -> Result<Vec<u32>, PlanError> {
        self.table_ids.resize(known.tables.len(), None);
        let number = |table: &RegionIndex| {
            let id = self.table_ids.get_mut(table.index()).ok_or(LOST)?;
            if let Some(id) = *id {
                return Ok(id);
            }
            self.tables.push(known.tables.get(table.index()).ok_or(LOST)?.clone());
            Ok(*id.insert(self.tables.len() as u32 - 1))
        };
        tables.iter().map(number).collect()
    }

    fn fill(
        &mut self,
        param: ParamId,
        to: GroupIndex,
        tables: Vec<u32>,
        (transfers, digest): (Arc<[Transfer]>, Digest),
    ) {
        if !transfers.is_empty() {
            let mut fill = Fill { param, to, tables, lane: 0, transfers };
            self.choose_lane(&mut fill);
            self.fills.push(fill);
            self.digests.push(digest);
        }
    }

    /// The lane that has least so far, so that all members of a group share the work of passing on, however unequal tensors are.
    fn choose_lane(&mut self, fill: &mut Fill) {
        let lanes = self.groups.get(fill.to.index()).map_or(1, Group::lanes);
        if lanes < 2 {
            return;
        }
        let loads = self.lane_bytes.entry(fill.to).or_insert_with(|| vec![0; lanes.into()]);
        fill.lane = (0..lanes).zip(&*loads).min_by_key(|(_, bytes)| **bytes).map_or(0, |(lane, _)| lane);
        for (index, transfer) in fill.transfers.iter().enumerate() {
            if let Some(bytes) = loads.get_mut(usize::from(fill.lane(index, lanes.into()))) {
                *bytes = bytes.saturating_add(transfer.bytes());
            }
        }
    }

    fn finish(
        self,
        Manifest { trainers, receivers, options }: &Manifest,
        manifest_digest: Digest,
    ) -> Result<Plan, PlanError> {
        let mut plan = Plan {
            params: self.params,
            groups: self.groups,
            tables: self.tables,
            fills: self.fills,
            trainers: vec![TrainerPart::default(); trainers.len()],
            receivers: vec![ReceiverPart::default(); receivers.len()],
            bound: LowerBound::default(),
            predicted: Prediction::default(),
            manifest_digest,
            digest: Digest(Default::default()),
        };
        let totals = plan.totals(options, receivers.len());
        if totals.loads.trainers.iter().any(|load| load.ops > OPS_MAX as u64) {
            return Err(PlanError::TooManyOps { max: OPS_MAX });
        }
        for (part, total) in plan.trainers.iter_mut().zip(&totals.loads.trainers) {
            (part.bytes, part.writes) = (total.nic_out_bytes, total.writes);
        }
        let sides = (trainers.as_slice(), receivers.as_slice());
        plan.bound = LowerBound::new(sides, &totals.loads);
        plan.predicted = Prediction::new(sides, options, &totals.loads);
        plan.receivers = totals.receivers;
        let mut digests = self.digests.into_iter();
        let lost = postcard::Error::SerializeBufferFull; // there is one for every fill
        plan.digest = plan.digest_with(|_| digests.next().ok_or(lost.clone())).map_err(encode)?;
        Ok(plan)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{DType, ParamMap, RailDecl, SourcePiece, TensorBox, TrainerManifest};

    /// One trainer, and receivers that each want its eight bytes at a place of their own.
    fn manifest(places: &[u64]) -> Manifest {
        let (host, regions, rails) = ("h".to_owned(), vec![1 << 20], vec![RailDecl { bytes_per_second: 1 }]);
        let (tensor, shape, region) = ("w".to_owned(), vec![8], RegionIndex(0));
        let (dtype, offset) = (DType::U8, 0);
        let bounds = TensorBox::whole(&shape).unwrap();
        let pieces = vec![SourcePiece { tensor, dtype, shape: shape.clone(), bounds, region, offset }];
        let map = Arc::new(ParamMap::tensor("w"));
        let receiver = |offset: &u64| {
            let (name, shape, map) = ("w".to_owned(), shape.clone(), map.clone());
            let param = DestinationParam { name, dtype, shape, region, offset: 8 * offset, map, priority: 0 };
            let (host, regions, rails) = (host.clone(), regions.clone(), rails.clone());
            ReceiverManifest { host, regions, rails, params: vec![param] }
        };
        let receivers = places.iter().map(receiver).collect();
        let trainers = vec![TrainerManifest { host, regions, rails, pieces }];
        Manifest { trainers, receivers, ..Manifest::default() }
    }

    fn known(planner: &Planner) -> usize {
        planner.known.as_ref().map_or(0, |known| known.templates.list.len())
    }

    #[test]
    fn who_is_lost_is_remembered_and_who_never_comes_back_is_forgotten() {
        let mut planner = Planner::new();
        planner.plan(&manifest(&[1, 2, 3, 4])).unwrap();
        planner.plan(&manifest(&[1, 2])).unwrap();
        assert_eq!(known(&planner), 4, "half of them may come back");
        for other in 5..100 {
            planner.plan(&manifest(&[1, 2, other])).unwrap();
            assert!(known(&planner) <= KEPT_MAX * 3, "{}", known(&planner));
        }
    }

    #[test]
    fn what_is_known_of_other_trainers_or_of_a_plan_that_failed_is_of_no_use() {
        let mut planner = Planner::new();
        let mut job = manifest(&[1, 2]);
        planner.plan(&job).unwrap();
        job.trainers[0].rails[0].bytes_per_second = 2;
        job.receivers.pop();
        planner.plan(&job).unwrap();
        assert_eq!(known(&planner), 1);
        job.trainers[0].pieces.clear();
        assert!(planner.plan(&job).is_err() && planner.known.is_none());
    }
}
