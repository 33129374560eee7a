//! The published run: Kimi-K2, BF16 to block FP8, 256 trainers to 128 receivers on p5 hosts.
//!
//! What is published: the model and the number of GPUs; FSDP 16, PP 2, EP 8 on the one side, 4 replicas of EP 32 on the other;
//! weights offloaded to host memory; two mesh groups, dense parameters first, whose shards lie within a host, then experts, whose
//! shards are spread over hosts; 23 us for each of 1144 submissions of a rank. The rest is assumed, and says so. Nothing here may be
//! chosen for the time that comes out.

use super::config::{Mesh, MeshGroup, PipelineConfig, Round, Task};
use crate::cluster::Preset;

const TRAINERS: u32 = 256;
const STAGES: u32 = 2;
/// Ranks of one pipeline stage.
const STAGE_TRAINERS: u32 = TRAINERS / STAGES;
const HOST_GPUS: u32 = 8;
/// Ranks among which each expert is sharded (published: FSDP 16), and meshes of a stage (EP 8).
const FSDP: u32 = 16;
const TRAIN_EP: u32 = 8;
const REPLICAS: u32 = 4;
const INFER_EP: u32 = 32;
const RECEIVERS: u32 = REPLICAS * INFER_EP;

/// The public `config.json` of Kimi-K2.
const LAYERS: u32 = 61;
const HIDDEN: u64 = 7168;
const VOCABULARY: u64 = 163_840;
const HEADS: u64 = 64;
const Q_LORA: u64 = 1536;
const KV_LORA: u64 = 512;
const NOPE: u64 = 128;
const ROPE: u64 = 64;
const VALUE: u64 = 128;
const DENSE_LAYERS: u32 = 1;
const DENSE_INNER: u64 = 18_432;
const EXPERTS: u32 = 384;
const EXPERT_INNER: u64 = 2048;

/// Assumed: the bound on temporary memory is published, its value is not.
const TASKS_IN_FLIGHT: u32 = 8;

/// A parameter as receivers hold it: tensors of so many columns, one above the other.
struct Parameter<'a> {
    rows: &'a [u64],
    columns: u64,
    /// To FP8, with a scale of four bytes for each block of 128 x 128; otherwise it stays BF16.
    quantised: bool,
}

impl Parameter<'_> {
    fn elements(&self) -> u64 {
        self.rows.iter().sum::<u64>() * self.columns
    }

    fn source_bytes(&self) -> u64 {
        2 * self.elements()
    }

    fn collectives(&self) -> u32 {
        self.rows.len() as u32
    }

    fn task(&self, receivers: Vec<u32>) -> Task {
        let source = self.source_bytes();
        // Joined tensors are read and written once.
        let fuse_bytes = if self.rows.len() > 1 { 2 * source } else { 0 };
        if !self.quantised {
            return Task { fuse_bytes, quantise_bytes: 0, write_bytes: source, receivers };
        }
        let blocks: u64 = self.rows.iter().map(|rows| rows.div_ceil(128) * self.columns.div_ceil(128)).sum();
        let write_bytes = self.elements() + 4 * blocks;
        // Assumed: one kernel that reads once and writes once.
        Task { fuse_bytes, quantise_bytes: source + write_bytes, write_bytes, receivers }
    }
}

impl PipelineConfig {
    /// The published run, where the 16 shards of an expert lie on 2 hosts: as near as shards that are spread over hosts can be.
    pub fn published() -> PipelineConfig {
        PipelineConfig::published_on(2)
    }

    /// The same where the 16 shards of an expert lie on so many hosts: 2, 4, 8 or 16, and anything else is taken as the next of
    /// these. Which it was is not published.
    pub fn published_on(hosts: u32) -> PipelineConfig {
        let hosts = hosts.clamp(2, FSDP).next_power_of_two();
        PipelineConfig {
            cluster: Preset::P5.cluster(TRAINERS, RECEIVERS),
            groups: vec![dense_group(), expert_group(hosts)],
            tasks_in_flight: TASKS_IN_FLIGHT,
            // Published.
            submit_nanoseconds: 23_000,
            // Rates may be off by 2 % for a moment; a run takes seconds instead of minutes.
            tolerance: 0.02,
            seed: 1,
        }
    }
}

/// The layers of a stage. Assumed: as even as 61 can be cut, the first one longer.
fn layers(stage: u32) -> core::ops::Range<u32> {
    let start = |stage: u32| (stage * LAYERS).div_ceil(STAGES);
    start(stage)..start(stage + 1)
}

/// Everything but routed experts. Each host of a stage has all of the stage's, its 8 GPUs a shard each (published: sharded within
/// the host). Assumed: so each trainer has one receiver to serve, and sends it all of its stage.
fn dense_group() -> MeshGroup {
    let mut meshes = Vec::new();
    for stage in 0..STAGES {
        let parameters = dense_parameters(stage);
        for host in 0..STAGE_TRAINERS / HOST_GPUS {
            let first = stage * STAGE_TRAINERS + host * HOST_GPUS;
            let trainers: Vec<u32> = (first..first + HOST_GPUS).collect();
            let round = |parameter: &Parameter<'_>| Round {
                collectives: parameter.collectives(),
                bytes: parameter.source_bytes(),
                tasks: trainers
                    .iter()
                    .map(|trainer| parameter.task(vec![trainer % STAGE_TRAINERS]))
                    .collect(),
            };
            meshes.push(Mesh { rounds: parameters.iter().map(round).collect(), trainers });
        }
    }
    MeshGroup { meshes }
}

/// Those of a stage, in the order of the model.
fn dense_parameters(stage: u32) -> Vec<Parameter<'static>> {
    let linear = |rows, columns| Parameter { rows, columns, quantised: true };
    let plain = |rows, columns| Parameter { rows, columns, quantised: false };
    let mut parameters = Vec::new();
    if stage == 0 {
        parameters.push(plain(&[VOCABULARY], HIDDEN));
    }
    for layer in layers(stage) {
        parameters.extend([
            plain(&[HIDDEN], 1),
            linear(&[Q_LORA, KV_LORA + ROPE], HIDDEN),
            plain(&[Q_LORA], 1),
            linear(&[HEADS * (NOPE + ROPE)], Q_LORA),
            plain(&[KV_LORA], 1),
            linear(&[HEADS * (NOPE + VALUE)], KV_LORA),
            linear(&[HIDDEN], HEADS * VALUE),
            plain(&[HIDDEN], 1),
        ]);
        if layer < DENSE_LAYERS {
            parameters.extend([linear(&[DENSE_INNER, DENSE_INNER], HIDDEN), linear(&[HIDDEN], DENSE_INNER)]);
        } else {
            parameters.extend([
                plain(&[EXPERTS as u64], HIDDEN),
                // Bias of the router, in single precision: two BF16 each.
                plain(&[EXPERTS as u64], 2),
                linear(&[EXPERT_INNER, EXPERT_INNER], HIDDEN),
                linear(&[HIDDEN], EXPERT_INNER),
            ]);
        }
    }
    if stage + 1 == STAGES {
        parameters.extend([plain(&[HIDDEN], 1), plain(&[VOCABULARY], HIDDEN)]);
    }
    parameters
}

/// Routed experts: each mesh has those of one expert-parallel rank of its stage, sharded over its 16 trainers.
fn expert_group(hosts: u32) -> MeshGroup {
    let on_each_host = FSDP / hosts;
    let meshes_of_host = HOST_GPUS / on_each_host;
    let mut meshes = Vec::new();
    for stage in 0..STAGES {
        for rank in 0..TRAIN_EP {
            let first = stage * STAGE_TRAINERS
                + rank / meshes_of_host * hosts * HOST_GPUS
                + rank % meshes_of_host * on_each_host;
            let on_host = |host: u32| (0..on_each_host).map(move |gpu| first + host * HOST_GPUS + gpu);
            let trainers: Vec<u32> = (0..hosts).flat_map(on_host).collect();
            let sparse = layers(stage).filter(|layer| *layer >= DENSE_LAYERS);
            meshes.push(Mesh { rounds: sparse.flat_map(|_| expert_rounds(rank)).collect(), trainers });
        }
    }
    MeshGroup { meshes }
}

/// One layer's experts of one expert-parallel rank. Parameters are dealt to the mesh's trainers, 16 experts at a time: gate and up,
/// which receivers hold as one, and then down. Assumed: the schedule lets no receiver be written to while others idle, so the
/// experts of a round are spread evenly over their receivers.
fn expert_rounds(rank: u32) -> Vec<Round> {
    const OWN: u32 = EXPERTS / TRAIN_EP;
    const PER_RECEIVER: u32 = EXPERTS / INFER_EP;
    const PLACES: u32 = OWN / PER_RECEIVER;
    let mut rounds = Vec::new();
    for first in (0..OWN).step_by(FSDP as usize) {
        let gate_up = Parameter { rows: &[EXPERT_INNER, EXPERT_INNER], columns: HIDDEN, quantised: true };
        let down = Parameter { rows: &[HIDDEN], columns: EXPERT_INNER, quantised: true };
        for parameter in [gate_up, down] {
            let place = |nth: u32| rank * PLACES + (first + nth) % PLACES;
            let receivers = |nth: u32| (0..REPLICAS).map(|replica| replica * INFER_EP + place(nth)).collect();
            rounds.push(Round {
                collectives: FSDP * parameter.collectives(),
                bytes: u64::from(FSDP) * parameter.source_bytes(),
                tasks: (0..FSDP).map(|nth| parameter.task(receivers(nth))).collect(),
            });
        }
    }
    rounds
}
