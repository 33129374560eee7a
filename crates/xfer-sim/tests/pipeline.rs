//! The pipeline against arithmetic by hand, bounds that anyone can compute, the planner's model, and its own documentation.

use proptest::collection::vec;
use proptest::prelude::*;
use xfer_plan::BlockQuant;
use xfer_plan::model::{InferLayout, Machine, ModelSpec};
use xfer_sim::{
    Cluster, Control, Gpu, Host, Mesh, MeshGroup, Nic, PipelineConfig, PipelineError, PipelineReport, Preset,
    Round, Semantics, Task, simulate_pipeline,
};

const GPUS: u32 = 2;

/// Round numbers: copies 1 GB/s, NVLink and two NICs together 2 GB/s, memory 4 GB/s, and 1 ms for whatever else takes time.
fn cluster(trainers: u32, receivers: u32, gpus: u32) -> Cluster {
    let hosts = trainers.div_ceil(gpus) + receivers.div_ceil(gpus);
    let gpu = Gpu {
        nvlink_bytes_per_second: 2_000_000_000,
        copy_engine_bytes_per_second: 1_000_000_000,
        hbm_bytes_per_second: 4_000_000_000,
        launch_nanoseconds: 1_000_000,
    };
    let nic = Nic {
        semantics: Semantics::Srd,
        bytes_per_second: 1_000_000_000,
        post_nanoseconds: 0,
        message_nanoseconds: 0,
        queue_depth: 1,
        packet_payload_bytes: 1 << 20,
        packet_header_bytes: 0,
        latency_nanoseconds: 1_000_000,
        jitter_nanoseconds: 0,
        completion_nanoseconds: 500_000,
    };
    let control = Control { latency_nanoseconds: 1_000_000, bytes_per_second: 1_000_000_000 };
    let host = Host { gpus, nics: 2 * gpus, gpu_nics: None, gpu };
    Cluster { hosts, trainers, receivers, host, nic, racks: None, control }
}

fn config(cluster: Cluster, groups: Vec<MeshGroup>, tasks_in_flight: u32) -> PipelineConfig {
    PipelineConfig { cluster, groups, tasks_in_flight, submit_nanoseconds: 500_000, tolerance: 0.0, seed: 1 }
}

fn stages_in_microseconds(report: &PipelineReport) -> Vec<[i64; 2]> {
    let micros = |seconds: f64| (seconds * 1e6).round() as i64;
    let stages = report.stages.iter();
    stages.map(|stage| [micros(stage.exposed_seconds), micros(stage.busy_seconds)]).collect()
}

/// Two trainers on two hosts share two tensors of 4 MB, and both send 2 MB to the only receiver.
fn tiny(rounds: usize, tasks_in_flight: u32) -> PipelineReport {
    let task =
        Task { fuse_bytes: 4_000_000, quantise_bytes: 8_000_000, write_bytes: 2_000_000, receivers: vec![0] };
    let round = Round { collectives: 2, bytes: 4_000_000, tasks: vec![task.clone(), task] };
    let mesh = Mesh { trainers: vec![0, 1], rounds: vec![round; rounds] };
    let groups = vec![MeshGroup { meshes: vec![mesh] }];
    simulate_pipeline(&config(cluster(2, 1, 1), groups, tasks_in_flight)).unwrap()
}

/// In milliseconds: copied at 3 (launch 1, 2 MB), gathered at 8 (launches 2, first latency 1, 2 MB 1, last latency 1), fused at 10
/// (launch 1, 4 MB), quantised at 13 (launch 1, 8 MB), submitted at 13.5, written at 17 (4 MB into the receiver 2, latency 1,
/// completion 0.5). The barrier is over at 9.
#[test]
fn one_round_by_hand() {
    let report = tiny(1, 1);
    assert_eq!(report.seconds, 0.017);
    let one = |stage| [stage, stage];
    let waits = [0, 9000]; // From the gather at 8 on, for the barrier and then for the end.
    let stages = [one(5000), one(3000), one(2000), one(3000), one(500), one(3500), waits];
    assert_eq!(stages_in_microseconds(&report), stages);
    assert_eq!(report.stages.iter().map(|stage| stage.name).collect::<Vec<_>>(), PipelineReport::STAGES);
    assert_eq!((report.copied_bytes, report.gathered_bytes), (4_000_000, 4_000_000));
    assert_eq!((report.written_bytes, report.writes), (4_000_000, 2));
}

/// With one task in flight, rounds follow each other. With two, the second copy runs beside the first gather, and the second gather
/// (13 to 18, alone on the NICs from 16 on: the WRITEs have left at 15.5) beside the first WRITEs; the end is 9 ms later.
#[test]
fn two_rounds_by_hand() {
    assert_eq!(tiny(2, 1).seconds, 0.034);
    let report = tiny(2, 2);
    assert_eq!(report.seconds, 0.027);
    // Copies take 6 ms, 3 of them beside a gather; the first WRITEs 4 of 7 beside the second gather and its kernels.
    let stages = stages_in_microseconds(&report);
    assert_eq!(stages[..6], [[10_000; 2], [6000; 2], [4000; 2], [3000, 6000], [500, 1000], [3500, 7000]]);
}

/// A trainer that has nothing to do in the first group waits until the others have gathered.
#[test]
fn who_has_less_to_do_waits_at_the_barrier() {
    let alone = |trainer, bytes| {
        let tasks = vec![Task::default()];
        let mesh = Mesh { trainers: vec![trainer], rounds: vec![Round { collectives: 1, bytes, tasks }] };
        MeshGroup { meshes: vec![mesh] }
    };
    let groups = vec![alone(0, 9_000_000), alone(1, 4_000_000)];
    let report = simulate_pipeline(&config(cluster(2, 0, 1), groups, 1)).unwrap();
    // Copied at 10, barrier 1; copied at 16, barrier 1.
    assert_eq!(report.seconds, 0.017);
    let stages = stages_in_microseconds(&report);
    assert_eq!((stages[3], stages[6]), ([7500, 7500], [9500, 9500]));
}

fn task() -> impl Strategy<Value = Task> {
    let bytes = || prop_oneof![Just(0), 1..3_000_000_u64];
    let receivers = proptest::sample::subsequence(vec![0, 1, 2], 0..=3);
    (bytes(), bytes(), 0..3_000_000_u64, receivers).prop_map(
        |(fuse_bytes, quantise_bytes, write_bytes, receivers)| Task {
            fuse_bytes,
            quantise_bytes,
            write_bytes,
            receivers,
        },
    )
}

/// Eight trainers on four hosts, in meshes of one of these forms.
fn group() -> impl Strategy<Value = MeshGroup> {
    let forms: Vec<Vec<Vec<u32>>> = vec![
        vec![(0..8).collect()],
        vec![vec![0, 1], vec![2, 3], vec![6, 7]],
        vec![vec![0, 2, 4, 6], vec![1, 3, 5, 7]],
        vec![vec![2, 3, 4, 5], vec![0], vec![7]],
        vec![],
    ];
    let mesh = |trainers: Vec<u32>| {
        let round = (1..4_u32, 0..9_000_000_u64, vec(task(), trainers.len()));
        let round = round.prop_map(|(collectives, bytes, tasks)| Round { collectives, bytes, tasks });
        vec(round, 0..4).prop_map(move |rounds| Mesh { trainers: trainers.clone(), rounds })
    };
    let meshes = proptest::sample::select(forms);
    meshes
        .prop_flat_map(move |meshes| meshes.into_iter().map(mesh).collect::<Vec<_>>())
        .prop_map(|meshes| MeshGroup { meshes })
}

fn any_config() -> impl Strategy<Value = PipelineConfig> {
    (vec(group(), 0..3), 1..4_u32).prop_map(|(groups, held)| config(cluster(8, 3, GPUS), groups, held))
}

/// What the configuration says of one resource, summed up: `(name, seconds)` for each.
fn loads(config: &PipelineConfig) -> Vec<(String, f64)> {
    let Cluster { host, nic, trainers, receivers, .. } = &config.cluster;
    let gpu = host.gpu;
    let nic_rate = 2.0 * nic.bytes_per_second as f64;
    let mut copies = vec![0.0; *trainers as usize];
    let mut kernels = vec![0.0; *trainers as usize];
    let mut submits = vec![0.0; *trainers as usize];
    let mut out = vec![0.0; *trainers as usize];
    let mut into = vec![0.0; *receivers as usize];
    for Mesh { trainers, rounds } in config.groups.iter().flat_map(|group| &group.meshes) {
        for Round { bytes, tasks, .. } in rounds {
            for (&trainer, task) in trainers.iter().zip(tasks) {
                let trainer = trainer as usize;
                let shard = (bytes / trainers.len() as u64) as f64;
                copies[trainer] += shard / gpu.copy_engine_bytes_per_second as f64;
                kernels[trainer] +=
                    (task.fuse_bytes + task.quantise_bytes) as f64 / gpu.hbm_bytes_per_second as f64;
                submits[trainer] += task.receivers.len() as f64 * config.submit_nanoseconds as f64 / 1e9;
                for &receiver in &task.receivers {
                    let seconds = task.write_bytes as f64 / nic_rate;
                    out[trainer] += seconds;
                    into[receiver as usize] += seconds;
                }
            }
        }
    }
    let named = |name: &'static str, loads: Vec<f64>| {
        loads.into_iter().enumerate().map(move |(index, seconds)| (format!("{name} {index}"), seconds))
    };
    named("copies", copies)
        .chain(named("kernels", kernels))
        .chain(named("submits", submits))
        .chain(named("out", out))
        .chain(named("into", into))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Bytes, WRITEs and time: what the configuration has is what is reported, and no resource does more than it can.
    #[test]
    fn nothing_is_lost_or_faster_than_its_resource(config in any_config()) {
        let report = simulate_pipeline(&config).unwrap();
        let meshes = || config.groups.iter().flat_map(|group| &group.meshes);
        let rounds = || meshes().flat_map(|mesh| mesh.rounds.iter().map(move |round| (mesh.trainers.len() as u64, round)));
        let tasks = || rounds().flat_map(|(_, round)| &round.tasks);
        prop_assert_eq!(report.copied_bytes, rounds().map(|(_, round)| round.bytes).sum::<u64>());
        prop_assert_eq!(report.gathered_bytes, rounds().map(|(ranks, round)| (ranks - 1) * round.bytes).sum::<u64>());
        let written = |task: &Task| task.write_bytes * task.receivers.len() as u64;
        prop_assert_eq!(report.written_bytes, tasks().map(written).sum::<u64>());
        prop_assert_eq!(report.writes, tasks().map(|task| task.receivers.len() as u64).sum::<u64>());
        for (resource, seconds) in loads(&config) {
            prop_assert!(report.seconds >= seconds - 1e-9, "{} alone needs {}, not {}", resource, seconds, report.seconds);
        }
        let exposed: f64 = report.stages.iter().map(|stage| stage.exposed_seconds).sum();
        prop_assert!((exposed - report.seconds).abs() < 1e-9);
        for stage in &report.stages[..6] {
            prop_assert!(stage.exposed_seconds <= stage.busy_seconds + 1e-12, "{:?}", stage);
        }
        prop_assert_eq!(report, simulate_pipeline(&config).unwrap());
    }

    /// Sharing has anomalies: what comes earlier may stand in another's way. But 8 ways share a NIC here at most, so with 8 times the
    /// rate each gets what it could have had alone, and nothing can come later.
    #[test]
    fn faster_nics_are_never_slower(config in any_config(), factor in 8..64_u64) {
        let mut faster = config.clone();
        faster.cluster.nic.bytes_per_second *= factor;
        let (before, after) = (simulate_pipeline(&config).unwrap().seconds, simulate_pipeline(&faster).unwrap().seconds);
        prop_assert!(after <= before + 1e-8, "{} with {} times the rate, {} before", after, factor, before);
    }
}

/// What is simulated is the planner's Kimi-K2: every source tensor once in each place that has all of them, and to every receiver
/// the bytes of its parameters and scales.
#[test]
fn the_published_run_moves_the_whole_model() {
    let model = ModelSpec::preset("kimi-k2").unwrap();
    let volume = |shape: &[u64]| shape.iter().product::<u64>();
    let tensors = || model.tensors().iter().map(|tensor| volume(&tensor.shape) * tensor.dtype.bytes());
    let config = PipelineConfig::published();
    let [dense, experts] = &config.groups[..] else { panic!("two mesh groups") };
    let once = dense.meshes.iter().step_by(16).chain(&experts.meshes);
    let rounds: Vec<&Round> = once.flat_map(|mesh| &mesh.rounds).collect();
    assert_eq!(rounds.iter().map(|round| round.bytes).sum::<u64>(), tensors().sum::<u64>());
    assert_eq!(rounds.iter().map(|round| round.collectives as usize).sum::<usize>(), model.tensors().len());

    let layout = InferLayout { ep: 32, ..InferLayout::default() }.with_fp8(BlockQuant::default());
    let receivers = layout.receivers(&model, &Machine::default()).unwrap();
    let params = receivers[5].params.iter();
    let wanted: u64 = params.map(|param| volume(&param.shape) * param.dtype.bytes()).sum();
    let mut written = vec![0; 128];
    for round in config.groups.iter().flat_map(|group| &group.meshes).flat_map(|mesh| &mesh.rounds) {
        for task in &round.tasks {
            task.receivers.iter().for_each(|receiver| written[*receiver as usize] += task.write_bytes);
        }
    }
    assert_eq!(written, [wanted; 128]);
}

/// Wherever an expert's shards are, the same bytes are moved by meshes that fill whole hosts.
#[test]
fn shards_on_more_hosts_are_the_same_bytes_and_slower() {
    let reports = [2, 4, 8, 16].map(|hosts| simulate_pipeline(&PipelineConfig::published_on(hosts)).unwrap());
    for pair in reports.windows(2) {
        assert_eq!(pair[0].copied_bytes, pair[1].copied_bytes);
        assert_eq!(pair[0].gathered_bytes, pair[1].gathered_bytes);
        assert_eq!((pair[0].written_bytes, pair[0].writes), (pair[1].written_bytes, pair[1].writes));
        assert!(
            pair[0].seconds < pair[1].seconds
                && pair[0].stages[0].busy_seconds < pair[1].stages[0].busy_seconds
        );
    }
}

/// The rows of a table, without its head, as trimmed cells.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let text = include_str!("../../../docs/published-pipeline.md");
    let after = text.split_once(heading).unwrap().1;
    let rows = after.lines().skip_while(|line| !line.starts_with("|---")).skip(1);
    let rows = rows.take_while(|line| line.starts_with('|'));
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

fn millis(seconds: f64) -> String {
    format!("{:.0}", seconds * 1e3)
}

/// What the documentation says came out is what comes out.
#[test]
fn the_documented_figures_are_those_of_the_code() {
    let report = simulate_pipeline(&PipelineConfig::published()).unwrap();
    let mut rows = table("## Stage by stage").into_iter();
    let mut published = 0;
    for stage in PipelineReport::STAGES {
        let row = rows.next().unwrap();
        let stage = report.stages.iter().find(|other| other.name == stage && other.name == row[0]).unwrap();
        published += row[1].parse::<u32>().unwrap();
        assert_eq!(row[2..4], [millis(stage.exposed_seconds), millis(stage.busy_seconds)], "{}", stage.name);
    }
    let total = rows.next().unwrap();
    assert_eq!((total[1], total[2]), ("1233", millis(report.seconds).as_str()));
    assert_eq!(published, 1233);

    for row in table("## What is not known") {
        let (hosts, tasks_in_flight) = (row[0].parse().unwrap(), row[1].parse().unwrap());
        let config = PipelineConfig { tasks_in_flight, ..PipelineConfig::published_on(hosts) };
        let report = simulate_pipeline(&config).unwrap();
        assert_eq!(row[2..], [millis(report.seconds), millis(report.stages[0].busy_seconds)], "{row:?}");
    }
}

#[test]
fn what_cannot_be_is_named() {
    let broken = |change: &dyn Fn(&mut PipelineConfig)| {
        let task = Task { receivers: vec![0], ..Task::default() };
        let round = Round { collectives: 1, bytes: 8, tasks: vec![task.clone(), task] };
        let mesh = Mesh { trainers: vec![0, 1], rounds: vec![round] };
        let mut config = config(cluster(4, 1, GPUS), vec![MeshGroup { meshes: vec![mesh] }], 1);
        assert!(simulate_pipeline(&config).is_ok());
        change(&mut config);
        simulate_pipeline(&config).unwrap_err()
    };
    let error = broken(&|config| config.tasks_in_flight = 0);
    assert_eq!(error, PipelineError::NothingInFlight);
    let error = broken(&|config| config.groups[0].meshes[0].trainers[1] = 4);
    assert_eq!(error, PipelineError::NoSuchTrainer { group: 0, trainer: 4, trainers: 4 });
    let error = broken(&|config| config.groups[0].meshes[0].trainers[1] = 0);
    assert_eq!(error, PipelineError::TrainerTwice { group: 0, trainer: 0 });
    let error = broken(&|config| config.groups[0].meshes[0].trainers.extend([2]));
    assert_eq!(error, PipelineError::UnevenMesh { group: 0, mesh: 0 });
    let error = broken(&|config| config.groups[0].meshes[0].trainers.clear());
    assert_eq!(error, PipelineError::UnevenMesh { group: 0, mesh: 0 });
    let error = broken(&|config| drop(config.groups[0].meshes[0].rounds[0].tasks.pop()));
    assert_eq!(error, PipelineError::WrongTasks { group: 0, mesh: 0, round: 0, tasks: 1, trainers: 2 });
    let error = broken(&|config| config.groups[0].meshes[0].rounds[0].tasks[0].receivers.push(1));
    assert_eq!(error, PipelineError::NoSuchReceiver { group: 0, mesh: 0, receiver: 1, receivers: 1 });
    let error = broken(&|config| config.cluster.host.nics = 3);
    assert_eq!(error, PipelineError::UnevenNics { nics: 3, gpus: 2 });
    let error = broken(&|config| config.cluster.host.gpu_nics = Some(vec![vec![0, 1], vec![0, 1]]));
    assert_eq!(error, PipelineError::UnevenNics { nics: 4, gpus: 2 });
    let error = broken(&|config| config.tolerance = 1.0);
    assert!(matches!(error, PipelineError::Network(_)));
    let error = broken(&|config| config.cluster.hosts = 0);
    assert!(matches!(error, PipelineError::Cluster(_)));
}

/// On the published run already twice the rate helps.
#[test]
fn the_published_run_gets_faster_with_its_cluster() {
    let seconds = |change: &dyn Fn(&mut Cluster)| {
        let mut config = PipelineConfig::published();
        change(&mut config.cluster);
        simulate_pipeline(&config).unwrap().seconds
    };
    let published = seconds(&|_| ());
    let slower = seconds(&|cluster| cluster.nic.bytes_per_second /= 2);
    let faster = seconds(&|cluster| cluster.nic.bytes_per_second *= 2);
    assert!(faster < published && published < slower);
    let gathers = seconds(&|cluster| cluster.host.gpu.nvlink_bytes_per_second /= 8);
    assert!(gathers > published);
    // The same rate with less latency.
    assert!(seconds(&|cluster| *cluster = Preset::P5en.cluster(256, 128)) < published);
}
