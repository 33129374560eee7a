//! Sessions that cast and quantise on the way: trainers that cut blocks between them, inference ranks that hold parts, and what
//! the plain oracle makes of the whole tensors, bit for bit.

use std::time::Duration;

use half::bf16;
use rendezvous::member::{TrainerMember, TrainerStep};
use rendezvous::{Client, ClientConfig, Holds, Join, MemberManifest, SessionId, ToController};
use weight_ops::{BlockGrid, oracle};
use weightsync::{
    BlockQuant, Controller, DType, Device, DeviceMesh, Error, Fabric, Inference, InferenceSession, OnLoss,
    ParamId, ParamMap, Placement, Relay, RelayReport, Served, ServerConfig, ServerHandle, SessionConfig,
    TensorBox, TensorId, TensorPart, TensorSpec, Trainer, TrainerSession, Transport, Verify, VerifyReport,
    VersionReport, World, shard_box,
};
use xfer_plan::{RailDecl, SourcePiece, TrainerManifest, TrainerRank};

const WORLD: World = World { trainers: 3, inference: 2 };
const DEADLINE: Duration = Duration::from_secs(20);

/// Thirds of their rows end within blocks of 128 x 128; what the inference ranks take does not. The norm, which they all take whole, has
/// the same place in all of them, so that it can be passed on.
const TENSORS: [(&str, [u64; 2]); 3] = [("norm", [1, 100]), ("up", [300, 520]), ("down", [260, 400])];

/// An element of a version: magnitudes of many sizes, so that a scale of another block, or of half of one, shows.
fn element(tensor: usize, version: u64, at: u64) -> bf16 {
    let mixed = (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ version << 8 ^ tensor as u64) >> 40;
    let scale = 2_f32.powi((at / 1000 % 20) as i32 - 10);
    bf16::from_f32((mixed as f32 / 8_388_608.0 - 1.0) * scale)
}

struct Job {
    server: ServerHandle,
    fabric: Fabric,
    verify: Verify,
    /// 0: weights are in host memory.
    gpus: u32,
    /// The trainers' are there nevertheless, and go by the GPUs.
    offloaded: bool,
}

impl Job {
    async fn start(fabric: Fabric, verify: Verify, on_loss: OnLoss) -> Self {
        Self::relaying(Relay::Never, fabric, verify, on_loss).await
    }

    async fn relaying(relay: Relay, fabric: Fabric, verify: Verify, on_loss: OnLoss) -> Self {
        let mut config = ServerConfig::loopback(WORLD).unwrap();
        config.controller.deadline = DEADLINE;
        (config.controller.verify, config.controller.on_loss) = (verify, on_loss);
        // Rows of blocks are cut between operations too.
        config.controller.options.gather_chunk_bytes_max = 24 << 10;
        config.controller.options.relay = relay;
        Self {
            server: Controller::bind(config).await.unwrap().spawn(|_| {}),
            fabric,
            verify,
            gpus: 0,
            offloaded: false,
        }
    }

    fn session(&self, rank: u32) -> SessionConfig {
        let mut config = SessionConfig::new(self.server.local_addr().to_string(), WORLD, rank);
        (config.fabric, config.deadline, config.watermark_bytes) = (self.fabric, DEADLINE, 1 << 20);
        config
    }

    /// GPUs are dealt to the ranks, trainers first.
    fn device(&self, number: u32) -> Device {
        number.checked_rem(self.gpus).map_or(Device::Cpu, Device::Cuda)
    }

    fn trainer(&self, rank: u32) -> Trainer {
        let mut config = self.session(rank);
        config.device = self.device(rank);
        if self.offloaded { Trainer::offloaded(config).unwrap() } else { Trainer::new(config) }
    }

    /// Half of `up` by rows and of `down` by columns, where blocks end, and all of `norm` in f32.
    fn inference(&self, rank: u32) -> (Inference, Vec<Wanted>) {
        let mut config = self.session(rank);
        config.device = self.device(WORLD.trainers + rank);
        let mut inference = Inference::new(config);
        let mut wanted = Vec::new();
        for (tensor, (name, shape)) in TENSORS.into_iter().enumerate() {
            let half = |dim: usize, border: u64| match rank {
                0 => TensorBox::whole(&shape).unwrap().with_dim(dim, 0, border).unwrap(),
                _ => TensorBox::whole(&shape).unwrap().with_dim(dim, border, shape[dim] - border).unwrap(),
            };
            let bounds = match name {
                "up" => half(0, 128),
                "down" => half(1, 256),
                _ => {
                    let map = ParamMap::tensor(name).cast(DType::F32);
                    let ids = vec![inference.register(name, DType::F32, &shape, map).unwrap()];
                    wanted.push(Wanted { tensor, ids, bounds: TensorBox::whole(&shape).unwrap() });
                    continue;
                }
            };
            let part = TensorPart { tensor: name.into(), shape: shape.to_vec(), bounds: bounds.clone() };
            let ids = inference.register_quantized(name, &[part], BlockQuant::default()).unwrap();
            wanted.push(Wanted { tensor, ids: ids.to_vec(), bounds });
        }
        (inference, wanted)
    }
}

/// Pieces of all tensors, as FSDP shards them.
fn shards(rank: u32) -> Vec<TensorSpec> {
    let mesh = DeviceMesh::new(&[u64::from(WORLD.trainers)]).unwrap();
    let shard = |(name, shape): (&str, [u64; 2])| TensorSpec {
        name: name.into(),
        dtype: DType::BF16,
        shape: shape.to_vec(),
        bounds: shard_box(&shape, &mesh, &[Placement::Shard(0)], rank.into()).unwrap(),
    };
    TENSORS.into_iter().map(shard).collect()
}

struct Pushing {
    session: TrainerSession,
    shards: Vec<TensorSpec>,
    ids: Vec<TensorId>,
}

impl Pushing {
    async fn connect(job: &Job, rank: u32) -> Self {
        let mut trainer = job.trainer(rank);
        let shards = shards(rank);
        let ids = trainer.allocate(shards.clone()).unwrap();
        Self { session: trainer.connect().await.unwrap(), shards, ids }
    }

    async fn push(&mut self, version: u64) -> Result<weightsync::PushReport, Error> {
        for (tensor, (shard, id)) in self.shards.iter().zip(&self.ids).enumerate() {
            let ((row, _), columns) = (shard.bounds.extent(0).unwrap(), shard.shape[1]);
            let elements = row * columns..row * columns + shard.bounds.volume().unwrap();
            let bytes: Vec<u8> = elements.flat_map(|at| element(tensor, version, at).to_ne_bytes()).collect();
            self.session.write(*id, &bytes)?;
        }
        self.session.push(version).await
    }

    /// The controller may hear of a loss, or of who came back, when a push has begun.
    async fn push_at_last(&mut self, version: u64) {
        while let Err(error) = self.push(version).await {
            assert!(error.may_be_tried_again(), "{error}");
        }
    }
}

/// A parameter of an inference rank: all elements, or codes and scales.
struct Wanted {
    tensor: usize,
    ids: Vec<ParamId>,
    bounds: TensorBox,
}

struct Serving {
    session: InferenceSession,
    wanted: Vec<Wanted>,
}

impl Serving {
    async fn connect(job: &Job, rank: u32) -> Self {
        let (inference, wanted) = job.inference(rank);
        Self { session: inference.connect().await.unwrap(), wanted }
    }

    /// Waits for a version, past attempts that fail, and compares all of it.
    async fn serves(&mut self, version: u64) -> VersionReport {
        let report = loop {
            match self.session.wait_version(version, None).await {
                Ok(report) => break report,
                Err(error) => assert!(matches!(error, Error::Aborted { .. }), "{error}"),
            }
        };
        for Wanted { tensor, ids, bounds } in &self.wanted {
            let expected = expected(*tensor, version, bounds);
            assert_eq!(ids.len(), expected.len());
            for (id, expected) in ids.iter().zip(expected) {
                let mut found = vec![0; expected.len()];
                self.session.read(*id, 0, &mut found).unwrap();
                assert!(found == expected, "{} of version {version}: {id:?}", TENSORS[*tensor].0);
            }
        }
        report
    }
}

/// What the whole tensor comes to, and then the part.
fn expected(tensor: usize, version: u64, bounds: &TensorBox) -> Vec<Vec<u8>> {
    let (name, [rows, columns]) = TENSORS[tensor];
    let at = |row: usize, column: usize| element(tensor, version, row as u64 * columns + column as u64);
    if name == "norm" {
        return vec![(0..columns as usize).flat_map(|at_| at(0, at_).to_f32().to_ne_bytes()).collect()];
    }
    let grid = BlockGrid::new([rows as usize, columns as usize], [128, 128]).unwrap();
    let value = |row, column| at(row, column).to_f32();
    let (codes, scales) = oracle::quantize(&grid, weight_ops::ScaleFormat::F32, value);
    let [rows, columns] = [0, 1].map(|dim| bounds.extent(dim).unwrap()).map(|(first, len)| {
        let (first, end) = (first as usize, (first + len) as usize);
        (first..end, first / 128..end.div_ceil(128))
    });
    let [across, blocks_across] = [grid.shape()[1], grid.blocks()[1]];
    let part_of_codes = rows.0.flat_map(|row| &codes[row * across..][columns.0.clone()]).copied().collect();
    let part_of_scales = rows.1.flat_map(|row| &scales[row * blocks_across..][columns.1.clone()]);
    let part_of_scales = part_of_scales.flat_map(|scale| scale.to_ne_bytes()).collect();
    vec![part_of_codes, part_of_scales]
}

async fn versions_arrive_as_the_whole_tensors_are_quantised(fabric: Fabric, gpus: u32, offloaded: bool) {
    for verify in [Verify::Off, Verify::Full, Verify::Sampled(0.5)] {
        as_quantised(Job { gpus, offloaded, ..Job::start(fabric, verify, OnLoss::Fail).await }, false).await;
    }
}

async fn as_quantised(job: Job, relays: bool) {
    let (mut a, mut b, mut c, mut first, mut second) = tokio::join!(
        Pushing::connect(&job, 0),
        Pushing::connect(&job, 1),
        Pushing::connect(&job, 2),
        Serving::connect(&job, 0),
        Serving::connect(&job, 1),
    );
    for version in [1, 2, 5] {
        let (one, two, three, there, and_there) = tokio::join!(
            a.push(version),
            b.push(version),
            c.push(version),
            first.serves(version),
            second.serves(version),
        );
        let reports = [one.unwrap(), two.unwrap(), three.unwrap()];
        assert!(reports.iter().all(|report| report.measure_seconds > 0.0 && report.bytes_gathered > 0));
        // A byte an element, 16 and 24 scales, and the norm twice in f32.
        let relayed: Vec<RelayReport> =
            [&there, &and_there].iter().filter_map(|report| report.passed_on.clone()).collect();
        let bytes = reports.iter().map(|report| report.bytes);
        let bytes: u64 = bytes.chain(relayed.iter().map(|report| report.bytes)).sum();
        assert_eq!(bytes, 300 * 520 + 260 * 400 + (3 * 5 + 3 * 4) * 4 + 2 * 100 * 4);
        assert_eq!(relayed.is_empty(), !relays);
        // Of what was sent as much was hashed as of what arrived.
        let hashed = |report: Option<VerifyReport>| report.map(|report| report.bytes);
        let sent = reports.into_iter().map(|report| report.verified);
        let sent: Option<u64> =
            sent.chain(relayed.into_iter().map(|report| report.verified)).map(hashed).sum();
        let arrived: Option<u64> = [there, and_there].into_iter().map(|report| hashed(report.verified)).sum();
        assert_eq!(sent, arrived);
        match job.verify {
            Verify::Off => assert_eq!(sent, None),
            Verify::Full => assert_eq!(sent, Some(bytes)),
            Verify::Sampled(_) => assert!(sent.is_some_and(|sent| sent <= bytes)),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_shared_memory() {
    versions_arrive_as_the_whole_tensors_are_quantised(Fabric::Local, 0, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_tcp() {
    versions_arrive_as_the_whole_tensors_are_quantised(Fabric::Tcp, 0, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_passed_on_is_verified_like_what_it_was_made_of() {
    for fabric in [Fabric::Local, Fabric::Tcp] {
        as_quantised(Job::relaying(Relay::PerHost, fabric, Verify::Full, OnLoss::Fail).await, true).await;
    }
}

/// How many GPUs there are; `None` where the test is to be skipped.
fn gpus() -> Option<u32> {
    match Device::cuda_count() {
        Ok(gpus @ 1..) => Some(gpus),
        other => {
            let asked = std::env::var_os("WEIGHTSYNC_HW").is_some_and(|value| value == "1");
            assert!(!asked, "WEIGHTSYNC_HW=1 asks for a GPU: {other:?}");
            println!("skipped: no CUDA device");
            None
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn between_gpus() {
    let Some(gpus) = gpus() else { return };
    versions_arrive_as_the_whole_tensors_are_quantised(Fabric::Local, gpus, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn offloaded_by_way_of_gpus() {
    let Some(gpus) = gpus() else { return };
    versions_arrive_as_the_whole_tensors_are_quantised(Fabric::Local, gpus, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn between_gpus_through_the_host() {
    let Some(gpus) = gpus() else { return };
    versions_arrive_as_the_whole_tensors_are_quantised(Fabric::Tcp, gpus, false).await;
}

/// A trainer that measures nothing, and says so.
async fn fails_to_measure(config: SessionConfig) -> Client {
    let SessionConfig { controller, job, world, rank, secret, deadline, .. } = config;
    let client = ClientConfig { controller, job: job.clone(), secret, transport: Transport::tcp(), deadline };
    let mut client = Client::connect(client).await.unwrap();
    let mut end = 0;
    let pieces = shards(rank).into_iter().map(|shard| {
        let (bytes, offset) = (shard.bytes().unwrap(), end);
        end += bytes;
        let TensorSpec { name: tensor, dtype, shape, bounds } = shard;
        SourcePiece { tensor, dtype, shape, bounds, region: xfer_plan::RegionIndex(0), offset }
    });
    let pieces = pieces.collect();
    let rails = vec![RailDecl { bytes_per_second: 1000 }];
    let manifest = TrainerManifest { host: "elsewhere".into(), regions: vec![end], rails, pieces };
    let (mut member, said) = TrainerMember::join(Join {
        job,
        member: xfer_plan::Rank::Trainer(TrainerRank(rank)),
        world,
        deadline,
        manifest: MemberManifest::Trainer(manifest),
        // A host of this name, without rails or shared memory.
        endpoint: b"\x09elsewhere\x00\x00\x00".to_vec(),
        holds: Holds::Nothing,
        stages: false,
        session: SessionId::default(),
    });
    let say = |client: &Client, said: Option<ToController>| client.send(said.unwrap()).unwrap();
    say(&client, Some(said));
    loop {
        let step = member.handle(client.receive("the test").await.unwrap()).unwrap();
        match step {
            Some(TrainerStep::Connect(_)) => say(&client, member.ready()),
            Some(TrainerStep::Started) => say(&client, member.begin(1)),
            Some(TrainerStep::Measure { .. }) => say(&client, member.measured(Err("its GPU is gone".into()))),
            Some(TrainerStep::Aborted { .. }) => return client,
            Some(other) => panic!("{other:?}"),
            None => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_fails_while_trainers_measure_tears_nothing_and_is_repeated() {
    let job = Job::start(Fabric::Local, Verify::Full, OnLoss::Wait).await;
    let broken = tokio::spawn(fails_to_measure(job.session(2)));
    let (mut a, mut b, mut first, mut second) = tokio::join!(
        Pushing::connect(&job, 0),
        Pushing::connect(&job, 1),
        Serving::connect(&job, 0),
        Serving::connect(&job, 1),
    );
    let (one, two) = tokio::join!(a.push(1), b.push(1));
    for error in [one.unwrap_err(), two.unwrap_err()] {
        let reason = error.to_string();
        assert!(reason.contains("trainer 2: its GPU is gone"), "{reason}");
        assert!(error.may_be_tried_again());
    }
    // They were not even told that a version was on its way.
    let soon = Some(Duration::from_millis(200));
    for serving in [&mut first, &mut second] {
        assert!(matches!(serving.session.wait_version(1, soon).await, Err(Error::NotYet { .. })));
        assert_eq!(serving.session.served(), Served::Version(0));
    }
    // Its process ends, and another takes its place: everybody joins again.
    broken.await.unwrap().leave(Some("its GPU is gone".into())).await;
    let whole = async { Pushing::connect(&job, 2).await.push_at_last(1).await };
    tokio::join!(a.push_at_last(1), b.push_at_last(1), whole, first.serves(1), second.serves(1));
}

#[test]
fn a_part_that_cuts_blocks_is_refused_by_name() {
    let mut inference = Inference::new(SessionConfig::new("nowhere:1", WORLD, 0));
    let part = |bounds| TensorPart { tensor: "up".into(), shape: vec![300, 520], bounds };
    let mut refused = |parts: &[TensorPart]| {
        let refused = inference.register_quantized("up_proj", parts, BlockQuant::default());
        let Err(error @ Error::Declaration { .. }) = refused else { panic!("{refused:?}") };
        error.to_string()
    };
    let half = part(TensorBox::new(&[0, 0], &[150, 520]).unwrap());
    let whole = part(TensorBox::whole(&[300, 520]).unwrap());
    let ragged = refused(&[half]);
    assert!(ragged.starts_with("up_proj: ") && ragged.contains("blocks"), "{ragged}");
    // What lies below another has to begin where its blocks do.
    assert!(refused(&[whole.clone(), whole]).contains("blocks"));
    assert!(refused(&[]).contains("at least one part"));
    let row = TensorPart { tensor: "n".into(), shape: vec![8], bounds: TensorBox::whole(&[8]).unwrap() };
    assert!(refused(&[row]).contains("blocks"));
}
