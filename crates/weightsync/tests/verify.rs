//! Jobs that verify in band, over shared memory, all ranks in this process: what is reported, and what a byte does that
//! became another after it had landed.

use std::collections::BTreeMap;
use std::fs::File;
use std::future::{Future, poll_fn};
use std::os::unix::fs::FileExt;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use proptest::prelude::*;
use rendezvous::member::{TrainerMember, TrainerStep};
use rendezvous::{Client, ClientConfig, Holds, Join, MemberManifest, SessionId, ToController};
use tokio::sync::{Mutex, MutexGuard};
use weightsync::{
    Controller, DType, Fabric, Inference, InferenceSession, ParamId, ParamMap, PlanOptions, Rank, Served,
    ServerConfig, ServerHandle, SessionConfig, TensorBox, TensorSpec, Trainer, TrainerSession, Transport,
    Verify, VerifyReport, World,
};
use xfer_plan::{RailDecl, TrainerManifest, TrainerRank};

/// One job at a time: a job's arena is the shared memory that was not there before.
static ALONE: Mutex<()> = Mutex::const_new(());

/// What every row begins with.
fn pattern() -> impl Iterator<Item = u8> {
    (0..=u8::MAX).cycle().map(|at| at.wrapping_mul(167) ^ 5)
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
        let client = ClientConfig { controller, secret, transport: Transport::tcp(), deadline };
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

/// Each of `trainers` has a row of `v`, and another of `w`; the inference rank takes both whole, `v` first.
struct Job {
    trainers: Vec<TrainerSession>,
    serving: InferenceSession,
    gate: Gate,
    v: ParamId,
    arena: File,
    columns: [u64; 2],
    _server: ServerHandle,
    _alone: MutexGuard<'static, ()>,
}

impl Job {
    async fn start(verify: Verify, trainers: u32, columns: [u64; 2], chunk_bytes: u64) -> Job {
        let _alone = ALONE.lock().await;
        let before = shared_memory();
        // The last of them is the gate.
        let world = World { trainers: trainers + 1, inference: 1 };
        let mut server = ServerConfig::loopback(world).unwrap();
        server.controller.verify = verify;
        server.controller.options = PlanOptions { chunk_bytes_max: chunk_bytes, ..PlanOptions::default() };
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
                dtype: DType::U8,
                shape: vec![u64::from(trainers), columns],
                bounds: TensorBox::new(&[u64::from(rank), 0], &[1, columns]).unwrap(),
            });
            for id in trainer.allocate(specs.collect()).unwrap() {
                let bytes = trainer.tensor_mut(id).unwrap();
                pattern().zip(bytes).for_each(|(from, to)| *to = from);
            }
            tokio::spawn(trainer.connect())
        };
        let mut inference = Inference::new(config(0));
        let ids: Vec<ParamId> = tensors()
            .map(|(name, columns)| {
                let shape = [u64::from(trainers), columns];
                inference.register(name, DType::U8, &shape, ParamMap::tensor(name)).unwrap()
            })
            .collect();
        let connecting: Vec<_> = (0..trainers).map(trainer).collect();
        let (serving, gate) = tokio::join!(inference.connect(), Gate::join(config(trainers)));
        let mut trainers = Vec::new();
        for trainer in connecting {
            trainers.push(trainer.await.unwrap().unwrap());
        }
        let arena = shared_memory().into_iter().find(|(inode, _)| !before.contains_key(inode)).unwrap().1;
        Job { trainers, serving: serving.unwrap(), gate, v: ids[0], arena, columns, _server: server, _alone }
    }

    fn bytes(&self) -> u64 {
        self.columns.iter().sum::<u64>() * self.trainers.len() as u64
    }

    /// Pushes version 1, and does `meanwhile` to the arena once all has been written and before it is compared. What the
    /// inference rank says, and a trainer.
    async fn push(&mut self, meanwhile: impl FnOnce(&File)) -> [Result<Option<VerifyReport>, String>; 2] {
        let Job { trainers, serving, gate, arena, columns, .. } = self;
        let written: Vec<_> = trainers.iter().map(TrainerSession::progress).collect();
        let pushed = trainers.iter_mut().map(|trainer| trainer.push(1));
        let gated = async {
            gate.begin().await;
            while written.iter().any(|written| written.load(Ordering::Relaxed) < columns.iter().sum()) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            meanwhile(arena);
            gate.open().await;
        };
        let (served, pushed, ()) = tokio::join!(serving.wait_version(1, None), join_all(pushed), gated);
        let served = served.map(|report| report.verified);
        let pushed = pushed.into_iter().map(|pushed| pushed.map(|report| report.verified)).next().unwrap();
        [served, pushed].map(|said| said.map_err(|error| error.to_string()))
    }

    /// Where byte `at` of both parameters together is in the arena, and whose it is.
    fn place(&self, at: u64) -> (u64, &str) {
        let [v, w] = self.serving.params() else { panic!("two parameters") };
        let bytes = v.bytes().unwrap();
        if at < bytes { (v.offset + at, &v.name) } else { (w.offset + at - bytes, &w.name) }
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
        at in any::<prop::sample::Index>(),
        by in 1..=255_u8,
    ) {
        block_on(async {
            let mut job = Job::start(Verify::Full, trainers, columns, chunk_bytes).await;
            let all = job.bytes();
            let (at, name) = job.place(at.index(all as usize) as u64);
            let name = name.to_owned();
            for error in job.push(|arena| flip(arena, at, by)).await {
                let error = error.unwrap_err();
                let says = |words: &str| error.contains(words);
                prop_assert!(says("version 1") && says("inference 0") && says(&format!("in {name} ")), "{}", error);
            }
            prop_assert_eq!(job.serving.served(), Served::Torn(1));
            let [served, pushed] = job.push(|_| {}).await.map(|verified| verified.unwrap().unwrap());
            prop_assert_eq!(job.serving.served(), Served::Version(1));
            prop_assert_eq!((served.params, served.bytes), (2, all));
            prop_assert_eq!((pushed.params, pushed.bytes), (2, all / u64::from(trainers)));
            let mut row = vec![0; columns[0] as usize];
            job.serving.read(job.v, 0, &mut row).unwrap();
            prop_assert!(row.into_iter().eq(pattern().take(columns[0] as usize)));
            Ok(())
        })?;
    }
}

#[test]
fn a_sample_says_what_it_is_and_off_finds_nothing() {
    block_on(async {
        let mut job = Job::start(Verify::Sampled(1.0), 2, [10, 10], 64).await;
        let (at, _) = job.place(39);
        assert!(
            job.push(|arena| flip(arena, at, 1)).await[0]
                .as_ref()
                .is_err_and(|error| error.contains("in w "))
        );
        drop(job);
        let mut job = Job::start(Verify::Sampled(1e-9), 2, [10, 10], 64).await;
        for verified in job.push(|arena| flip(arena, at, 1)).await {
            let verified = verified.unwrap().unwrap();
            assert_eq!((verified.params, verified.bytes), (0, 0));
        }
        drop(job);
        let mut job = Job::start(Verify::Off, 2, [10, 10], 64).await;
        for verified in job.push(|arena| flip(arena, at, 1)).await {
            assert!(verified.unwrap().is_none());
        }
    });
}
