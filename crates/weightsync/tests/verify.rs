//! Jobs that verify in band, over shared memory, all ranks in this process: what is reported, and what a byte does that
//! became another after it had landed, be it as it was sent or quantised on its way.

use std::collections::BTreeMap;
use std::fs::File;
use std::future::{Future, poll_fn};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use half::bf16;
use proptest::prelude::*;
use rendezvous::member::{TrainerMember, TrainerStep};
use rendezvous::{Client, ClientConfig, Holds, Join, MemberManifest, SessionId, ToController};
use tokio::sync::{Mutex, MutexGuard};
use weight_ops::{BlockGrid, oracle};
use weightsync::{
    BlockQuant, Controller, DType, Fabric, Inference, InferenceSession, ParamId, ParamMap, PlanOptions, Rank,
    ScaleFormat, Served, ServerConfig, ServerHandle, SessionConfig, TensorBox, TensorPart, TensorSpec,
    Trainer, TrainerSession, Transport, Verify, VerifyReport, World,
};
use xfer_plan::{DestinationParam, RailDecl, TrainerManifest, TrainerRank};

/// One job at a time: a job's arena is the shared memory that was not there before.
static ALONE: Mutex<()> = Mutex::const_new(());

/// What an element of a trainer's row is.
fn element(trainer: u32, column: u64) -> bf16 {
    let mixed = (column + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ u64::from(trainer)) >> 40;
    bf16::from_f32(mixed as f32 / 8_388_608.0 - 1.0)
}

/// Blocks that as many trainers have a row of, as there are.
fn blocks(scales: ScaleFormat) -> BlockQuant {
    BlockQuant { block: [8, 100], scales }
}

/// A trainer that has nothing to write, and says that it has written when it is told to.
struct Gate {
    client: Client,
    member: TrainerMember,
}

impl Gate {
    /// Joins, and returns when every rank is ready.
    async fn join(config: SessionConfig) -> Gate {
        let SessionConfig { controller, job, world, rank, secret, deadline, .. } = config;
        let member = Rank::Trainer(TrainerRank(rank));
        let client = ClientConfig {
            controller,
            job: weightsync::JOB_DEFAULT.into(),
            secret,
            transport: Transport::tcp(),
            deadline,
        };
        let client = Client::connect(client).await.unwrap();
        let rails = vec![RailDecl { bytes_per_second: 1000 }];
        let manifest =
            TrainerManifest { host: "gate".into(), regions: Vec::new(), rails, pieces: Vec::new() };
        let manifest = MemberManifest::Trainer(manifest);
        let (member, said) = TrainerMember::join(Join {
            job,
            member,
            world,
            deadline,
            manifest,
            endpoint: Vec::new(),
            holds: Holds::Nothing,
            stages: false,
            session: SessionId::default(),
        });
        let mut gate = Gate { client, member };
        gate.client.send(said).unwrap();
        assert!(matches!(gate.step().await, TrainerStep::Connect(_)));
        let ready = gate.member.ready();
        gate.say(ready);
        assert!(matches!(gate.step().await, TrainerStep::Started));
        gate
    }

    fn say(&self, message: Option<ToController>) {
        self.client.send(message.unwrap()).unwrap();
    }

    async fn step(&mut self) -> TrainerStep {
        loop {
            if let Some(step) = self.member.handle(self.client.receive("the test").await.unwrap()).unwrap() {
                return step;
            }
        }
    }

    /// Until all are to write.
    async fn begin(&mut self) {
        let begin = self.member.begin(1);
        self.say(begin);
        assert!(matches!(self.step().await, TrainerStep::Write { .. }));
    }

    /// It has written, and hears what becomes of that.
    async fn open(&mut self) {
        let written = self.member.written(Ok((0, 0)), Vec::new(), Vec::new());
        self.say(written);
        assert!(matches!(self.step().await, TrainerStep::Committed { .. } | TrainerStep::Aborted { .. }));
    }
}

/// All of them, at once.
async fn join_all<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut waiting: Vec<_> = futures.map(Box::pin).collect();
    let mut done: Vec<Option<T>> = waiting.iter().map(|_| None).collect();
    poll_fn(|context| {
        for (waiting, done) in waiting.iter_mut().zip(&mut done).filter(|(_, done)| done.is_none()) {
            if let Poll::Ready(value) = waiting.as_mut().poll(context) {
                *done = Some(value);
            }
        }
        if done.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    done.into_iter().flatten().collect()
}

/// Each of `trainers` has a row of `v`, and another of `w`; the inference rank takes both whole, `v` first, as they are or in FP8.
struct Job {
    trainers: Vec<TrainerSession>,
    serving: InferenceSession,
    gate: Gate,
    /// The first parameters, those of `v`: all elements, or codes and scales.
    v: Vec<ParamId>,
    arena: File,
    columns: [u64; 2],
    fp8: Option<ScaleFormat>,
    _server: ServerHandle,
    _alone: MutexGuard<'static, ()>,
}

impl Job {
    async fn start(
        verify: Verify,
        trainers: u32,
        columns: [u64; 2],
        chunk_bytes: u64,
        fp8: Option<ScaleFormat>,
    ) -> Job {
        let _alone = ALONE.lock().await;
        let before = shared_memory();
        // The last of them is the gate.
        let world = World { trainers: trainers + 1, inference: 1 };
        let mut server = ServerConfig::loopback(world).unwrap();
        server.controller.verify = verify;
        server.controller.options = PlanOptions {
            chunk_bytes_max: chunk_bytes,
            gather_chunk_bytes_max: chunk_bytes,
            ..PlanOptions::default()
        };
        let server = Controller::bind(server).await.unwrap().spawn(|_| {});
        let config = |rank| {
            let mut config = SessionConfig::new(server.local_addr().to_string(), world, rank);
            config.fabric = Fabric::Local;
            config
        };
        let tensors = || ["v", "w"].into_iter().zip(columns);
        let trainer = |rank| {
            let mut trainer = Trainer::new(config(rank));
            let specs = tensors().map(|(name, columns)| TensorSpec {
                name: name.into(),
                dtype: DType::BF16,
                shape: vec![u64::from(trainers), columns],
                bounds: TensorBox::new(&[u64::from(rank), 0], &[1, columns]).unwrap(),
            });
            for id in trainer.allocate(specs.collect()).unwrap() {
                let bytes = trainer.tensor_mut(id).unwrap();
                for (column, to) in (0..).zip(bytes.chunks_exact_mut(2)) {
                    to.copy_from_slice(&element(rank, column).to_ne_bytes());
                }
            }
            tokio::spawn(trainer.connect())
        };
        let mut inference = Inference::new(config(0));
        let mut register = |(name, columns): (&str, u64)| {
            let shape = [u64::from(trainers), columns];
            let Some(scales) = fp8 else {
                return vec![inference.register(name, DType::BF16, &shape, ParamMap::tensor(name)).unwrap()];
            };
            let bounds = TensorBox::whole(&shape).unwrap();
            let part = TensorPart { tensor: name.into(), shape: shape.to_vec(), bounds };
            inference.register_quantized(name, &[part], blocks(scales)).unwrap().to_vec()
        };
        let ids: Vec<Vec<ParamId>> = tensors().map(&mut register).collect();
        let connecting: Vec<_> = (0..trainers).map(trainer).collect();
        let (serving, gate) = tokio::join!(inference.connect(), Gate::join(config(trainers)));
        let mut trainers = Vec::new();
        for trainer in connecting {
            trainers.push(trainer.await.unwrap().unwrap());
        }
        let arena = shared_memory().into_iter().find(|(inode, _)| !before.contains_key(inode)).unwrap().1;
        let (serving, v) = (serving.unwrap(), ids[0].clone());
        Job { trainers, serving, gate, v, arena, columns, fp8, _server: server, _alone }
    }

    fn bytes(&self) -> u64 {
        self.serving.params().iter().map(|param| param.bytes().unwrap()).sum()
    }

    /// What `v` is to be: elements, or codes and then scales.
    fn expected(&self) -> Vec<u8> {
        let shape = [self.trainers.len(), self.columns[0] as usize];
        let at = |row: usize, column: usize| element(row as u32, column as u64);
        let Some(scales) = self.fp8 else {
            let rows = (0..shape[0]).flat_map(|row| (0..shape[1]).map(move |column| at(row, column)));
            return rows.flat_map(|element| element.to_ne_bytes()).collect();
        };
        let grid = BlockGrid::new(shape, blocks(scales).block).unwrap();
        let format = match scales {
            ScaleFormat::F32 => weight_ops::ScaleFormat::F32,
            ScaleFormat::Ue8m0 => weight_ops::ScaleFormat::Ue8m0,
        };
        let (mut all, table) = oracle::quantize(&grid, format, |row, column| at(row, column).to_f32());
        match scales {
            ScaleFormat::F32 => all.extend(table.into_iter().flat_map(f32::to_ne_bytes)),
            ScaleFormat::Ue8m0 => all.extend(table.into_iter().map(weight_ops::ue8m0_byte)),
        }
        all
    }

    /// What `v` is.
    fn found(&self) -> Vec<u8> {
        let bytes = |(id, param): (&ParamId, &DestinationParam)| {
            let mut bytes = vec![0; param.bytes().unwrap() as usize];
            self.serving.read(*id, 0, &mut bytes).unwrap();
            bytes
        };
        self.v.iter().zip(self.serving.params()).flat_map(bytes).collect()
    }

    /// Pushes version 1, and does `meanwhile` to the arena once all has been written and before it is compared. What the
    /// inference rank says, and all trainers.
    async fn push(&mut self, meanwhile: impl FnOnce(&File)) -> Vec<Result<Option<VerifyReport>, String>> {
        let bytes = self.bytes();
        let Job { trainers, serving, gate, arena, .. } = self;
        let written: Vec<_> = trainers.iter().map(TrainerSession::progress).collect();
        let pushed = trainers.iter_mut().map(|trainer| trainer.push(1));
        let gated = async {
            gate.begin().await;
            while written.iter().map(|written| written.load(Ordering::Relaxed)).sum::<u64>() < bytes {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            meanwhile(arena);
            gate.open().await;
        };
        let (served, pushed, ()) = tokio::join!(serving.wait_version(1, None), join_all(pushed), gated);
        let served = served.map(|report| report.verified);
        let pushed = pushed.into_iter().map(|pushed| pushed.map(|report| report.verified));
        std::iter::once(served).chain(pushed).map(|said| said.map_err(|error| error.to_string())).collect()
    }

    /// Where byte `at` of all parameters together is in the arena, and whose it is.
    fn place(&self, mut at: u64) -> (u64, &str) {
        for param in self.serving.params() {
            let bytes = param.bytes().unwrap();
            if at < bytes {
                return (param.offset + at, &param.name);
            }
            at -= bytes;
        }
        panic!("there are fewer bytes")
    }
}

/// Shared memory of this process, by inode.
fn shared_memory() -> BTreeMap<u64, File> {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let ours = entries.filter(|entry| {
        std::fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:weightsync"))
    });
    let open = |path| File::options().read(true).write(true).open(path).ok();
    let files = ours.filter_map(|entry| open(entry.path()));
    files.filter_map(|file| Some((file.metadata().ok()?.ino(), file))).collect()
}

fn flip(arena: &File, at: u64, by: u8) {
    let mut byte = [0];
    arena.read_exact_at(&mut byte, at).unwrap();
    arena.write_all_at(&[byte[0] ^ by], at).unwrap();
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_byte_that_became_another_is_always_found_and_the_next_push_is_whole(
        trainers in 1..4_u32,
        columns in prop::array::uniform2(1..3000_u64),
        chunk_bytes in (8..500_u64).prop_map(|words| words * 8),
        fp8 in prop_oneof![Just(None), Just(Some(ScaleFormat::F32)), Just(Some(ScaleFormat::Ue8m0))],
        at in any::<prop::sample::Index>(),
        by in 1..=255_u8,
    ) {
        block_on(async {
            let mut job = Job::start(Verify::Full, trainers, columns, chunk_bytes, fp8).await;
            let all = job.bytes();
            let (at, name) = job.place(at.index(all as usize) as u64);
            let name = name.to_owned();
            for error in job.push(|arena| flip(arena, at, by)).await {
                let error = error.unwrap_err();
                let says = |words: &str| error.contains(words);
                prop_assert!(says("version 1") && says("inference 0") && says(&format!("in {name} ")), "{}", error);
            }
            prop_assert_eq!(job.serving.served(), Served::Torn(1));
            let verified = job.push(|_| {}).await.into_iter().map(|verified| verified.unwrap().unwrap());
            let verified: Vec<VerifyReport> = verified.collect();
            let (served, pushed) = verified.split_first().unwrap();
            prop_assert_eq!(job.serving.served(), Served::Version(1));
            prop_assert_eq!((served.params, served.bytes), (job.serving.params().len() as u64, all));
            prop_assert_eq!(pushed.iter().map(|verified| verified.bytes).sum::<u64>(), all);
            prop_assert!(job.found() == job.expected());
            Ok(())
        })?;
    }
}

#[test]
fn a_sample_says_what_it_is_and_off_finds_nothing() {
    for fp8 in [None, Some(ScaleFormat::F32)] {
        block_on(async {
            let start = |verify| Job::start(verify, 2, [10, 10], 64, fp8);
            let mut job = start(Verify::Sampled(1.0)).await;
            let (at, name) = job.place(job.bytes() - 1);
            let says = format!("in {name} ");
            let said = job.push(|arena| flip(arena, at, 1)).await;
            assert!(said[0].as_ref().is_err_and(|error| error.contains(&says)), "{said:?}");
            drop(job);
            let mut job = start(Verify::Sampled(1e-9)).await;
            for verified in job.push(|arena| flip(arena, at, 1)).await {
                let verified = verified.unwrap().unwrap();
                assert_eq!((verified.params, verified.bytes), (0, 0));
            }
            drop(job);
            let mut job = start(Verify::Off).await;
            for verified in job.push(|arena| flip(arena, at, 1)).await {
                assert!(verified.unwrap().is_none());
            }
        });
    }
}
