//! Copies and gathers: what a rank does before it has anything to send.
//!
//! A gather must never begin before all its members have copied their shards and their GPUs are free: it is a collective.

use super::{Event, GATHER, Progress, Rank, Run};
use crate::cluster::{Cluster, NicId};
use crate::network::Way;
use crate::pipeline::clock::Stage;
use crate::pipeline::config::{Mesh, Round};
use crate::pipeline::error::PipelineError;
use crate::pipeline::mesh::Members;

impl<'a> Run<'a> {
    pub(super) fn begin_group(&mut self) {
        let config = self.config;
        let meshes = config.groups.get(self.group).map_or(&[][..], |group| &group.meshes);
        for rank in &mut self.ranks {
            (rank.mesh, rank.copies) = (None, [0, 0]);
            rank.clock.set(self.now, Stage::Wait, true);
        }
        self.meshes.clear();
        self.unfinished = meshes.iter().filter(|mesh| !mesh.rounds.is_empty()).count();
        for (index, Mesh { trainers, rounds }) in meshes.iter().enumerate() {
            // Checked: every mesh has members.
            let Some(members) = Members::of(trainers, self.cluster.host.gpus) else { continue };
            self.meshes.push(Progress { members, round: 0, gathering: None });
            for (place, &trainer) in trainers.iter().enumerate().filter(|_| !rounds.is_empty()) {
                let rank = &mut self.ranks[trainer as usize];
                rank.mesh = Some((index, place));
                rank.clock.set(self.now, Stage::Wait, false);
            }
        }
        (0..self.ranks.len()).for_each(|rank| self.copy(rank));
        self.pass_if_gathered();
    }

    /// All ranks have made their last gather: what Gloo's dissemination barrier takes, a message in each of log2 n rounds.
    fn pass_if_gathered(&mut self) {
        if self.unfinished == 0 && self.group < self.config.groups.len() {
            let rounds = self.cluster.trainers.max(1).next_power_of_two().ilog2();
            let nanoseconds = u64::from(rounds).saturating_mul(self.cluster.control.delay_nanoseconds(0));
            self.events.push(self.now.plus_nanos(nanoseconds), Event::Passed);
        }
    }

    fn mesh(&self, mesh: usize) -> &'a Mesh {
        let config = self.config;
        &config.groups[self.group].meshes[mesh]
    }

    /// Begins a rank's next copy, if the one before is over and the rank may hold another task.
    pub(super) fn copy(&mut self, index: usize) {
        let rank = &self.ranks[index];
        let Some((mesh, place)) = rank.mesh else { return };
        let [begun, over] = rank.copies;
        let Some(round) = self.mesh(mesh).rounds.get(begun) else { return };
        if begun > over || rank.held >= self.config.tasks_in_flight {
            return;
        }
        let bytes = self.meshes[mesh].members.shard(place, round.bytes);
        self.copied_bytes = self.copied_bytes.saturating_add(bytes);
        let gpu = &self.cluster.host.gpu;
        let over = self.after(gpu.launch_nanoseconds, bytes, gpu.copy_engine_bytes_per_second);
        self.events.push(over, Event::Copied(index));
        let rank = &mut self.ranks[index];
        rank.copies[0] += 1;
        rank.held += 1;
        rank.writes_left.push(0);
        rank.clock.set(self.now, Stage::Copy, true);
    }

    pub(super) fn copied(&mut self, index: usize) {
        let rank = &mut self.ranks[index];
        rank.copies[1] += 1;
        rank.clock.set(self.now, Stage::Copy, false);
        self.copy(index);
        self.gather(index);
    }

    /// Begins the next gather of a rank's mesh, if all members are ready; the rank waits for those that are not.
    pub(super) fn gather(&mut self, index: usize) {
        let Some((mesh, _)) = self.ranks[index].mesh else { return };
        let Mesh { trainers, rounds } = self.mesh(mesh);
        let progress = &mut self.meshes[mesh];
        let Some(round) = rounds.get(progress.round).filter(|_| progress.gathering.is_none()) else { return };
        let ready = |rank: &Rank<'_>| rank.copies[1] > progress.round && !rank.gpu_busy;
        if ready(&self.ranks[index]) {
            self.ranks[index].clock.set(self.now, Stage::Wait, true);
        }
        if !trainers.iter().all(|trainer| ready(&self.ranks[*trainer as usize])) {
            return;
        }
        progress.gathering = Some(0);
        for &trainer in trainers {
            let rank = &mut self.ranks[trainer as usize];
            rank.gpu_busy = true;
            rank.clock.set(self.now, Stage::Wait, false);
            rank.clock.set(self.now, Stage::Gather, true);
        }
        let begins = self.now.plus_nanos(collective_nanoseconds(&self.cluster, &progress.members, round));
        self.events.push(begins, Event::Moves(mesh));
    }

    /// Bytes begin to move, over NICs and over NVLink.
    pub(super) fn move_between_hosts(&mut self, mesh: usize) -> Result<(), PipelineError> {
        let Mesh { trainers, rounds } = self.mesh(mesh);
        let progress = &mut self.meshes[mesh];
        let mut parts = 1;
        let mut nvlink_bytes = 0;
        for receipt in progress.members.receipts(rounds[progress.round].bytes) {
            let nic = |place: usize| NicId(trainers[place]);
            self.gathered_bytes =
                self.gathered_bytes.saturating_add(receipt.nic_bytes + receipt.nvlink_bytes);
            nvlink_bytes = nvlink_bytes.max(receipt.nvlink_bytes);
            if receipt.nic_bytes > 0 {
                let way = Way::Nic { from: nic(receipt.from), to: nic(receipt.to) };
                self.network.start(self.now, way, receipt.nic_bytes, GATHER | mesh as u64)?;
                parts += 1;
            }
        }
        progress.gathering = Some(parts);
        let over = self.after(0, nvlink_bytes, self.cluster.host.gpu.nvlink_bytes_per_second);
        self.events.push(over, Event::Nvlink(mesh));
        Ok(())
    }

    /// A part of a gather is over; with the last one, its members have all that they send.
    pub(super) fn part_gathered(&mut self, mesh: usize) {
        let progress = &mut self.meshes[mesh];
        let left = progress.gathering.map_or(0, |parts| parts - 1);
        progress.gathering = Some(left);
        if left > 0 {
            return;
        }
        progress.gathering = None;
        progress.round += 1;
        let round = progress.round;
        let is_last = round == self.mesh(mesh).rounds.len();
        let Mesh { trainers, rounds } = self.mesh(mesh);
        for (&trainer, task) in trainers.iter().zip(&rounds[round - 1].tasks) {
            let rank = &mut self.ranks[trainer as usize];
            rank.clock.set(self.now, Stage::Gather, false);
            rank.clock.set(self.now, Stage::Wait, is_last);
            self.fuse(trainer as usize, task);
        }
        if is_last {
            self.unfinished -= 1;
            self.pass_if_gathered();
        }
    }
}

/// What collectives that follow each other cost besides bytes: each is launched, and takes a latency per step of the ring of
/// hosts. The network adds the last one.
fn collective_nanoseconds(cluster: &Cluster, members: &Members, round: &Round) -> u64 {
    if members.count() == 1 {
        return 0;
    }
    let collectives = u64::from(round.collectives);
    let steps = (collectives * (members.hosts() - 1)).saturating_sub(1);
    let launches = collectives.saturating_mul(cluster.host.gpu.launch_nanoseconds);
    launches.saturating_add(steps.saturating_mul(cluster.nic.latency_nanoseconds))
}
