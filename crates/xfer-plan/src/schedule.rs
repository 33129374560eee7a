//! The schedule: who sends what to whom.
//!
//! Everything is decided in the order of the manifest, with ties going to the lower rank. Nothing depends on
//! an address or on chance: two machines with the same manifest make the same plan, and planning again after a change
//! makes the plan that planning from scratch makes.

use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::sync::Arc;

use crate::bound::LowerBound;
use crate::cost::{Prediction, time};
use crate::digest::Digest;
use crate::error::PlanError;
use crate::ids::{GroupIndex, ParamId, ReceiverRank, RegionIndex};
use crate::limits::{OPS_MAX, TRANSFERS_MAX};
use crate::manifest::{
    DestinationParam, Manifest, PlanOptions, ReceiverManifest, Relay, TrainerManifest, bandwidth,
};
use crate::plan::{Fill, Plan, PlannedParam, ReceiverPart, TrainerPart, Transfer};
use crate::quant::{Blocks, ScaleTable};
use crate::route::{Group, Route};
use crate::sender::Senders;
use crate::source_index::{SourceIndex, TensorId};
use crate::template::{Declared, Template};
use crate::transform::BlockQuant;
use crate::validate;

/// Plans a transfer.
///
/// # Errors
/// When the manifest is invalid, when the two sides do not fit together, or when a [limit](crate::limits) is
/// exceeded.
pub fn plan(manifest: &Manifest) -> Result<Plan, PlanError> {
    Planner::new(&manifest.trainers, manifest.options)?.plan(&manifest.receivers)
}

/// Plans for the same trainers again and again: when receivers join or leave, or want something else, only what has
/// changed is planned, and the plan is the one that [`plan`] makes from scratch.
pub struct Planner<'m> {
    trainers: &'m [TrainerManifest],
    options: PlanOptions,
    index: SourceIndex<'m>,
    digest: Digest,
    known: Known<'m>,
}

/// A hasher without a random key: nothing is ever listed in the order of a hash, but not even the time that planning takes
/// should depend on chance.
type ByContent<K, V> = HashMap<K, V, BuildHasherDefault<DefaultHasher>>;

/// What has been found out so far. None of it depends on which receivers there are.
#[derive(Default)]
struct Known<'m> {
    templates: ByContent<DestinationParam, usize>,
    list: Vec<(Template<'m>, Digest)>,
    table_ids: BTreeMap<(TensorId, BlockQuant), usize>,
    tables: Vec<ScaleTable>,
    /// Ranges that were found and will be asked for, by table.
    ranges: BTreeMap<usize, Blocks>,
}

/// Every declared parameter once, in the order of the manifest, with all who declare it alike.
pub(crate) fn declarations(receivers: &[ReceiverManifest]) -> Vec<(Declared<'_>, Vec<ReceiverRank>)> {
    let mut places: ByContent<&DestinationParam, usize> = HashMap::default();
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
    template: usize,
    members: Vec<ReceiverRank>,
}

impl<'m> Planner<'m> {
    /// Indexes what the trainers hold.
    ///
    /// # Errors
    /// When the trainers' manifests or the options are invalid.
    pub fn new(trainers: &'m [TrainerManifest], options: PlanOptions) -> Result<Planner<'m>, PlanError> {
        validate::trainers(trainers, &options)?;
        let digest = Digest::of(trainers).map_err(encode)?;
        Ok(Planner { trainers, options, index: SourceIndex::new(trainers)?, digest, known: Known::default() })
    }

    /// Plans a transfer to these receivers.
    ///
    /// # Errors
    /// As [`plan`].
    pub fn plan(&mut self, receivers: &[ReceiverManifest]) -> Result<Plan, PlanError> {
        validate::receivers(receivers)?;
        let mut params = Params::default();
        let mut declarations: Vec<Declaration<'_>> = Vec::new();
        let mut declaration_of: Vec<Option<usize>> = Vec::new(); // by template
        let mut digests = Vec::with_capacity(receivers.len());
        let mut room = TRANSFERS_MAX;
        for (receiver, declared) in (0..).map(ReceiverRank).zip(receivers) {
            let mut of_params = Vec::with_capacity(declared.params.len());
            for param in &declared.params {
                let first = Declared { receiver, param };
                let template = self.known.template(&self.index, first, &mut room)?;
                of_params.push(self.known.list.get(template).ok_or(LOST)?.1);
                declaration_of.resize(self.known.list.len(), None);
                let Some(declaration) = declaration_of.get_mut(template) else { return Err(LOST) };
                match *declaration {
                    Some(declaration) => {
                        let known = declarations.get_mut(declaration).ok_or(LOST)?;
                        known.members.push(receiver);
                    }
                    None => {
                        *declaration = Some(declarations.len());
                        let name = params.intern(param);
                        declarations.push(Declaration { first, name, template, members: vec![receiver] });
                    }
                }
            }
            digests.push(receiver_digest(declared, of_params)?);
        }
        let manifest_digest = Digest::of(&(self.digest, self.options, digests)).map_err(encode)?;

        let route = self.route(receivers, &declarations);
        let mut assembly = Assembly { params: params.list, ..Assembly::default() };
        let mut senders = Senders::new(self.trainers);
        // What only one trainer has is settled first; the replicas then fill up around it.
        let mut dealt = Vec::new();
        for declaration in &declarations {
            let (template, _) = self.known.list.get(declaration.template).ok_or(LOST)?;
            let to = assembly.group(&declaration.members, receivers, route);
            let tables = assembly.tables(&template.quantised, &self.known)?;
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
            let sent = senders.deal(template, declaration.first, copies, &self.options, &mut room)?;
            let digest = Digest::of(sent.as_slice()).map_err(encode)?;
            assembly.fill(declaration.name, to, tables, (sent.into(), digest));
        }
        assembly.finish(self.trainers, receivers, self.options, manifest_digest)
    }

    /// The route of all groups: as asked, or the one that ends first.
    fn route(&self, receivers: &[ReceiverManifest], declarations: &[Declaration<'_>]) -> Route {
        let choices = match self.options.relay {
            Relay::Never => return Route::Direct,
            Relay::PerHost => return Route::PerHost,
            Relay::Chain => return Route::Chain,
            Relay::Auto => [Route::Direct, Route::PerHost, Route::Chain],
        };
        let estimate = |route: &Route| {
            let members = declarations.iter().map(|declaration| {
                let bytes =
                    self.known.list.get(declaration.template).map_or(0, |(template, _)| template.bytes);
                (bytes, declaration.members.as_slice())
            });
            estimate(*route, members, self.trainers, receivers, &self.options)
        };
        choices.into_iter().min_by_key(estimate).unwrap_or(Route::Direct)
    }
}

const LOST: PlanError = PlanError::Defect { detail: "a declaration was lost" };

impl<'m> Known<'m> {
    /// The template of a declaration, made if it is new.
    fn template(
        &mut self,
        index: &SourceIndex<'m>,
        declared: Declared<'_>,
        room: &mut usize,
    ) -> Result<usize, PlanError> {
        if let Some(&known) = self.templates.get(declared.param) {
            return Ok(known);
        }
        validate::map(declared.receiver, declared.param)?;
        let wanted_by = (declared.receiver, declared.param.name.as_str());
        let Known { table_ids, tables, ranges, .. } = self;
        let mut blocks_of = |tensor, quant, scales: bool| {
            let known = table_ids.get(&(tensor, quant)).copied();
            let number = known.unwrap_or(tables.len());
            // A tensor's ranges are many, and wanted once as a rule: they are not kept after that, but found again.
            let blocks = match (known, scales) {
                (Some(_), false) => return Ok((RegionIndex(number as u32), None)),
                (Some(_), true) if let Some(kept) = ranges.remove(&number) => kept,
                _ => Blocks::new(index, tensor, quant, wanted_by)?,
            };
            if known.is_none() {
                table_ids.insert((tensor, quant), number);
                tables.push(blocks.table.clone());
            }
            let blocks = if scales { Some(blocks) } else { ranges.insert(number, blocks) };
            Ok((RegionIndex(number as u32), blocks.filter(|_| scales)))
        };
        let template = Template::new(index, declared, &mut blocks_of, room)?;
        let digest = Digest::of(declared.param).map_err(encode)?;
        self.templates.insert(declared.param.clone(), self.list.len());
        self.list.push((template, digest));
        Ok(self.list.len() - 1)
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
    trainers: &[TrainerManifest],
    receivers: &[ReceiverManifest],
    options: &PlanOptions,
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
    fn tables(&mut self, tables: &[RegionIndex], known: &Known<'_>) -> Result<Vec<u32>, PlanError> {
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
            self.fills.push(Fill { param, to, tables, transfers });
            self.digests.push(digest);
        }
    }

    fn finish(
        self,
        trainers: &[TrainerManifest],
        receivers: &[ReceiverManifest],
        options: PlanOptions,
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
        let totals = plan.totals(&options, receivers.len());
        if totals.loads.trainers.iter().any(|load| load.ops > OPS_MAX as u64) {
            return Err(PlanError::TooManyOps { max: OPS_MAX });
        }
        for (part, total) in plan.trainers.iter_mut().zip(&totals.loads.trainers) {
            (part.bytes, part.writes) = (total.nic_out_bytes, total.writes);
        }
        let sides = (trainers, receivers);
        plan.bound = LowerBound::new(sides, &totals.loads);
        plan.predicted = Prediction::new(sides, &options, &totals.loads);
        plan.receivers = totals.receivers;
        let mut digests = self.digests.into_iter();
        let lost = postcard::Error::SerializeBufferFull; // there is one for every fill
        plan.digest = plan.digest_with(|_| digests.next().ok_or(lost.clone())).map_err(encode)?;
        Ok(plan)
    }
}
