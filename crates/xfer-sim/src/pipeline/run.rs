//! The pipeline in virtual time: every rank's copies, gathers, kernels and submissions, and the WRITEs in the network.
//!
//! Copy engines, kernels and NVLink have one user at a time here, so they are durations; NICs have many, so they are the
//! [`Network`]'s. It must never decide anything by chance but what the network's seed does.

mod gather;

use std::collections::VecDeque;

use super::clock::{STAGES, Stage, StageClock};
use super::config::{PipelineConfig, Task};
use super::error::PipelineError;
use super::mesh::Members;
use super::{PipelineReport, PipelineStage};
use crate::cluster::{Cluster, NicId};
use crate::network::{Done, Network, Outcome, Way};
use crate::queue::EventQueue;
use crate::time::Time;

/// What happens apart from the network.
enum Event {
    /// A rank's next copy is there.
    Copied(usize),
    /// A mesh's collectives have begun to move bytes.
    Moves(usize),
    /// What a mesh gathers over NVLink is there.
    Nvlink(usize),
    /// A rank's parameter is in one piece.
    Fused(usize),
    /// A rank's parameter is as it will be sent.
    Quantised(usize),
    /// A rank's thread has submitted a WRITE.
    Submitted(usize),
    /// A rank has learned that a WRITE of this task is complete.
    Written(usize, usize),
    /// All ranks know that all have made their last gather of the group.
    Passed,
}

/// The tag of a gather's transfers has this bit, and the number of its mesh.
const GATHER: u64 = 1 << 63;

#[derive(Default)]
struct Rank<'a> {
    /// Its mesh in this group, and its place there.
    mesh: Option<(usize, usize)>,
    /// Rounds of this group of which a copy has begun, and of which it is over.
    copies: [usize; 2],
    /// Gathering, fusing or quantising.
    gpu_busy: bool,
    /// What it is fusing or quantising, and how many it has been through.
    task: Option<&'a Task>,
    tasks_over: usize,
    /// WRITEs that are not complete, of each task since the beginning.
    writes_left: Vec<u32>,
    /// Tasks that are not over.
    held: u32,
    /// WRITEs to be submitted: of which task, to whom, how many bytes.
    submits: VecDeque<(usize, u32, u64)>,
    /// WRITEs submitted and not complete.
    under_way: u32,
    clock: StageClock,
}

/// What a mesh of this group is doing.
struct Progress {
    members: Members,
    round: usize,
    /// Transfers of a gather that are not over; `None` between gathers.
    gathering: Option<usize>,
}

/// See the module.
pub(super) struct Run<'a> {
    config: &'a PipelineConfig,
    cluster: Cluster,
    network: Network,
    events: EventQueue<Event>,
    now: Time,
    ranks: Vec<Rank<'a>>,
    /// Which group is under way.
    group: usize,
    meshes: Vec<Progress>,
    /// Meshes of this group that have a gather before them.
    unfinished: usize,
    copied_bytes: u64,
    gathered_bytes: u64,
    written_bytes: u64,
    writes: u64,
}

impl<'a> Run<'a> {
    pub(super) fn new(config: &'a PipelineConfig) -> Result<Run<'a>, PipelineError> {
        config.check()?;
        let cluster = config.striped_cluster()?;
        let mut ranks = Vec::new();
        ranks.resize_with(cluster.trainers as usize, Rank::default);
        let network = Network::new(&cluster, config.tolerance, config.seed)?;
        let (events, now) = (EventQueue::new(), Time::ZERO);
        let (meshes, copied_bytes, gathered_bytes, written_bytes) = (Vec::new(), 0, 0, 0);
        let mut run = Run {
            config,
            cluster,
            network,
            events,
            now,
            ranks,
            group: 0,
            meshes,
            unfinished: 0,
            copied_bytes,
            gathered_bytes,
            written_bytes,
            writes: 0,
        };
        run.begin_group();
        Ok(run)
    }

    /// Runs to the end.
    pub(super) fn finish(mut self) -> Result<PipelineReport, PipelineError> {
        let mut done = Vec::new();
        while let Some(next) = self.events.next_time().into_iter().chain(self.network.next_time()).min() {
            self.now = next;
            self.network.advance(next, &mut done);
            done.drain(..).for_each(|done| self.transferred(done));
            while self.events.next_time() == Some(next) {
                if let Some((_, event)) = self.events.pop() {
                    self.handle(event)?;
                }
            }
        }
        Ok(self.report())
    }

    fn handle(&mut self, event: Event) -> Result<(), PipelineError> {
        match event {
            Event::Copied(rank) => self.copied(rank),
            Event::Moves(mesh) => self.move_between_hosts(mesh)?,
            Event::Nvlink(mesh) => self.part_gathered(mesh),
            Event::Fused(rank) => self.quantise(rank),
            Event::Quantised(rank) => self.quantised(rank),
            Event::Submitted(rank) => self.submitted(rank)?,
            Event::Written(rank, task) => self.written(rank, task),
            Event::Passed => {
                self.group += 1;
                self.begin_group();
            }
        }
        Ok(())
    }
}

/// Kernels, submissions and WRITEs.
impl<'a> Run<'a> {
    fn fuse(&mut self, index: usize, task: &'a Task) {
        let rank = &mut self.ranks[index];
        rank.task = Some(task);
        rank.clock.set(self.now, Stage::Fuse, true);
        self.events.push(self.kernel(task.fuse_bytes), Event::Fused(index));
    }

    fn quantise(&mut self, index: usize) {
        let rank = &mut self.ranks[index];
        rank.clock.set(self.now, Stage::Fuse, false);
        rank.clock.set(self.now, Stage::Quantise, true);
        let bytes = rank.task.map_or(0, |task| task.quantise_bytes);
        self.events.push(self.kernel(bytes), Event::Quantised(index));
    }

    /// The GPU is free for the next gather, and the thread submits.
    fn quantised(&mut self, index: usize) {
        let rank = &mut self.ranks[index];
        rank.clock.set(self.now, Stage::Quantise, false);
        rank.gpu_busy = false;
        let number = rank.tasks_over;
        rank.tasks_over += 1;
        let Some(Task { write_bytes, receivers, .. }) = rank.task.take() else { return };
        let is_idle = rank.submits.is_empty();
        rank.writes_left[number] = receivers.len() as u32;
        rank.submits.extend(receivers.iter().map(|receiver| (number, *receiver, *write_bytes)));
        if receivers.is_empty() {
            self.task_over(index);
        } else if is_idle {
            self.submit(index);
        }
        self.gather(index);
    }

    fn submit(&mut self, index: usize) {
        self.ranks[index].clock.set(self.now, Stage::Submit, true);
        let over = self.now.plus_nanos(self.config.submit_nanoseconds);
        self.events.push(over, Event::Submitted(index));
    }

    fn submitted(&mut self, index: usize) -> Result<(), PipelineError> {
        let rank = &mut self.ranks[index];
        rank.clock.set(self.now, Stage::Submit, false);
        let Some((number, receiver, bytes)) = rank.submits.pop_front() else { return Ok(()) };
        rank.under_way += 1;
        rank.clock.set(self.now, Stage::Transfer, true);
        let more = !rank.submits.is_empty();
        // Checked: every receiver that is named has a GPU, and each GPU has one NIC of the same number.
        if let Some(gpu) = self.cluster.receiver_gpu(receiver) {
            let way = Way::Nic { from: NicId(index as u32), to: NicId(gpu.0) };
            self.network.start(self.now, way, bytes, tag(index, number))?;
            self.written_bytes = self.written_bytes.saturating_add(bytes);
            self.writes += 1;
        }
        if more {
            self.submit(index);
        }
        Ok(())
    }

    /// The network has delivered something.
    fn transferred(&mut self, done: Done) {
        if done.tag & GATHER != 0 {
            return self.part_gathered((done.tag & !GATHER) as usize);
        }
        let (rank, task) = ((done.tag >> 32) as usize, (done.tag & u64::from(u32::MAX)) as usize);
        // No NIC fails here.
        if let Outcome::Delivered { completed } = done.outcome {
            self.events.push(completed, Event::Written(rank, task));
        }
    }

    fn written(&mut self, index: usize, number: usize) {
        let rank = &mut self.ranks[index];
        rank.under_way -= 1;
        rank.clock.set(self.now, Stage::Transfer, rank.under_way > 0);
        rank.writes_left[number] -= 1;
        if rank.writes_left[number] == 0 {
            self.task_over(index);
        }
    }

    fn task_over(&mut self, index: usize) {
        self.ranks[index].held -= 1;
        self.copy(index);
    }

    /// When a kernel that is launched now is over; at once, if it has nothing to do.
    fn kernel(&self, bytes: u64) -> Time {
        let gpu = &self.cluster.host.gpu;
        let launch = if bytes == 0 { 0 } else { gpu.launch_nanoseconds };
        self.after(launch, bytes, gpu.hbm_bytes_per_second)
    }

    /// When so many bytes have moved that begin to after so many nanoseconds.
    fn after(&self, nanoseconds: u64, bytes: u64, bytes_per_second: u64) -> Time {
        let moving = (u128::from(bytes) * 1_000_000_000).div_ceil(u128::from(bytes_per_second.max(1)));
        self.now.plus_nanos(nanoseconds).plus_nanos(u64::try_from(moving).unwrap_or(u64::MAX))
    }

    fn report(mut self) -> PipelineReport {
        let mut totals = [[0u128; 2]; STAGES];
        for rank in &mut self.ranks {
            rank.clock.pass(self.now);
            let passed = rank.clock.exposed.iter().zip(&rank.clock.busy);
            for ([exposed, busy], (own_exposed, own_busy)) in totals.iter_mut().zip(passed) {
                *exposed += u128::from(*own_exposed);
                *busy += u128::from(*own_busy);
            }
        }
        let mean = |nanoseconds: u128| nanoseconds as f64 / 1e9 / self.ranks.len().max(1) as f64;
        let stage = |(name, [exposed, busy]): (_, [u128; 2])| PipelineStage {
            name,
            exposed_seconds: mean(exposed),
            busy_seconds: mean(busy),
        };
        PipelineReport {
            seconds: self.now.nanos() as f64 / 1e9,
            stages: PipelineReport::STAGES.into_iter().zip(totals).map(stage).collect(),
            copied_bytes: self.copied_bytes,
            gathered_bytes: self.gathered_bytes,
            written_bytes: self.written_bytes,
            writes: self.writes,
        }
    }
}

/// Names a rank's task in the network.
fn tag(rank: usize, task: usize) -> u64 {
    (rank as u64) << 32 | task as u64
}
