//! Jobs whose inference ranks pass on to each other what they get: over shared memory and libfabric, and on GPUs where there
//! are any.

use std::time::Duration;

use tokio::sync::watch;
use weightsync::{
    CommitMode, Controller, DType, Device, Error, Fabric, Inference, InferenceSession, OnLoss, ParamId,
    ParamMap, PlanOptions, PushReport, Rank, Relay, RelayReport, Report, Served, ServerConfig, ServerHandle,
    SessionConfig, TensorBox, TensorId, TensorSpec, Trainer, TrainerSession, Verify, VersionReport, World,
};
use xfer_plan::ReceiverRank;

const WORLD: World = World { trainers: 2, inference: 3 };
const DEADLINE: Duration = Duration::from_secs(3);

/// Of `w`, of which each trainer has one row, and each inference rank all.
const COLUMNS: u64 = 500_000;
const BYTES: u64 = 2 * COLUMNS;

/// What stands at a place of `w` in a version.
fn byte(version: u64, at: u64) -> u8 {
    (version * 131 + at * 7 + at / 4093) as u8
}

struct Job {
    server: ServerHandle,
    /// How often the first inference rank has joined.
    joined: watch::Receiver<u32>,
    fabric: Fabric,
    mode: CommitMode,
    /// How many GPUs the ranks are on; 0 for host memory.
    gpus: u32,
}

impl Job {
    async fn start(relay: Relay, fabric: Fabric, mode: CommitMode, gpus: u32) -> Self {
        let mut config = ServerConfig::loopback(WORLD).unwrap();
        config.controller.deadline = DEADLINE;
        config.controller.on_loss = OnLoss::Continue;
        config.controller.verify = Verify::Full;
        config.controller.options = PlanOptions { relay, chunk_bytes_max: 40_000, ..PlanOptions::default() };
        let (count, joined) = watch::channel(0);
        let first = Rank::Receiver(ReceiverRank(0));
        let server = Controller::bind(config).await.unwrap().spawn(move |report| {
            if report == Report::Joined(first) {
                count.send_modify(|count| *count += 1);
            }
        });
        Self { server, joined, fabric, mode, gpus }
    }

    /// The trainers' GPUs first, then the inference ranks'.
    fn session(&self, rank: u32, number: u32) -> SessionConfig {
        let mut config = SessionConfig::new(self.server.local_addr().to_string(), WORLD, rank);
        (config.fabric, config.deadline) = (self.fabric, DEADLINE);
        config.device = number.checked_rem(self.gpus).map_or(Device::Cpu, Device::Cuda);
        config
    }

    async fn trainer(&self, rank: u32) -> Pushing {
        let mut trainer = Trainer::new(self.session(rank, rank));
        let bounds = TensorBox::new(&[rank.into(), 0], &[1, COLUMNS]).unwrap();
        let spec = TensorSpec { name: "w".into(), dtype: DType::U8, shape: vec![2, COLUMNS], bounds };
        let id = trainer.allocate(vec![spec]).unwrap()[0];
        Pushing { session: trainer.connect().await.unwrap(), id, first: u64::from(rank) * COLUMNS }
    }

    async fn inference(&self, rank: u32) -> Serving {
        let mut inference = Inference::new(self.session(rank, WORLD.trainers + rank));
        inference.commit_mode(self.mode);
        let id = inference.register("w", DType::U8, &[2, COLUMNS], ParamMap::tensor("w")).unwrap();
        Serving { session: inference.connect().await.unwrap(), id }
    }

    async fn all(&self) -> ([Pushing; 2], [Serving; 3]) {
        let (a, b, x, y, z) = tokio::join!(
            self.trainer(0),
            self.trainer(1),
            self.inference(0),
            self.inference(1),
            self.inference(2)
        );
        ([a, b], [x, y, z])
    }
}

struct Pushing {
    session: TrainerSession,
    id: TensorId,
    first: u64,
}

impl Pushing {
    /// Pushes again until it is committed. The report, where this rank has not missed the commit.
    async fn push(&mut self, version: u64) -> Option<PushReport> {
        let bytes: Vec<u8> = (self.first..self.first + COLUMNS).map(|at| byte(version, at)).collect();
        self.session.write(self.id, &bytes).unwrap();
        loop {
            match self.session.push(version).await {
                Ok(report) => return Some(report),
                // It was lost between the commit and the word of it.
                Err(_) if self.session.committed() >= version => return None,
                Err(error) => assert!(error.may_be_tried_again(), "{error}"),
            }
        }
    }
}

struct Serving {
    session: InferenceSession,
    id: ParamId,
}

impl Serving {
    /// Waits for a version past attempts that fail, and finds nothing else.
    async fn serves(&mut self, version: u64) -> VersionReport {
        let report = loop {
            match self.session.wait_version(version, Some(10 * DEADLINE)).await {
                Ok(report) => break report,
                Err(Error::Aborted { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!((report.version, self.session.served()), (version, Served::Version(version)));
        let mut bytes = vec![0; BYTES as usize];
        self.session.read(self.id, 0, &mut bytes).unwrap();
        assert!(bytes.iter().zip(0..).all(|(found, at)| *found == byte(version, at)), "bytes differ");
        report
    }
}

/// How many GPUs there are; `None` where the test is to be skipped.
fn gpus() -> Option<u32> {
    match Device::cuda_count() {
        Ok(count @ 1..) => Some(count),
        other => {
            let asked = std::env::var_os("WEIGHTSYNC_HW").is_some_and(|value| value == "1");
            assert!(!asked, "WEIGHTSYNC_HW=1 asks for a GPU: {other:?}");
            println!("skipped: no CUDA device");
            None
        }
    }
}

/// Trainers send one copy; the inference ranks send the others, each its share.
async fn passed_on_whole(relay: Relay, fabric: Fabric, mode: CommitMode, gpus: u32) {
    let job = Job::start(relay, fabric, mode, gpus).await;
    let ([mut a, mut b], [mut x, mut y, mut z]) = job.all().await;
    for version in 1..=4 {
        let (a, b, x, y, z) = tokio::join!(
            a.push(version),
            b.push(version),
            x.serves(version),
            y.serves(version),
            z.serves(version)
        );
        assert_eq!(a.into_iter().chain(b).map(|report| report.bytes).sum::<u64>(), BYTES);
        assert!([&x, &y, &z].iter().all(|report| report.verified.as_ref().unwrap().bytes == BYTES));
        // Each trainer's row goes by another of them.
        let relayed: Vec<RelayReport> = [x, y, z].into_iter().filter_map(|report| report.passed_on).collect();
        assert!(relayed.len() >= 2, "{relayed:?}");
        for relayed in &relayed {
            assert!(relayed.writes > 0 && relayed.rails.iter().all(|rail| rail.closed.is_none()));
            assert_eq!(relayed.bytes, relayed.rails.iter().map(|rail| rail.bytes).sum::<u64>());
            assert_eq!(relayed.verified.as_ref().unwrap().bytes, relayed.bytes);
        }
        assert_eq!(relayed.iter().map(|relayed| relayed.bytes).sum::<u64>(), 2 * BYTES);
    }
    tokio::join!(a.session.leave(), b.session.leave());
}

#[tokio::test(flavor = "multi_thread")]
async fn over_shared_memory_in_every_mode() {
    for relay in [Relay::PerHost, Relay::Chain] {
        for (mode, _) in CommitMode::ALL {
            passed_on_whole(relay, Fabric::Local, mode, 0).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn over_libfabric() {
    for mode in [CommitMode::InPlace, CommitMode::Staged] {
        passed_on_whole(Relay::PerHost, Fabric::Tcp, mode, 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn from_gpu_to_gpu_and_through_host_memory() {
    let Some(gpus) = gpus() else { return };
    for (mode, _) in CommitMode::ALL {
        passed_on_whole(Relay::PerHost, Fabric::Auto, mode, gpus).await;
        passed_on_whole(Relay::PerHost, Fabric::Tcp, mode, gpus).await;
    }
}

/// A rank through which others get their bytes is lost: these get them in another way, and so does it when it is back.
async fn lose_and_get_back(fabric: Fabric, gpus: u32) {
    let job = Job::start(Relay::PerHost, fabric, CommitMode::InPlace, gpus).await;
    let ([mut a, mut b], [x, mut y, mut z]) = job.all().await;
    drop(x);
    tokio::join!(a.push(1), b.push(1), y.serves(1), z.serves(1));
    let back = async {
        let mut x = job.inference(0).await;
        x.serves(2).await;
        x
    };
    let push_then = async {
        job.joined.clone().wait_for(|joined| *joined == 2).await.unwrap();
        tokio::join!(a.push(2), b.push(2));
    };
    let ((), _, _, mut x) = tokio::join!(push_then, y.serves(2), z.serves(2), back);
    let (_, _, x, _, _) = tokio::join!(a.push(3), b.push(3), x.serves(3), y.serves(3), z.serves(3));
    assert!(x.passed_on.is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_that_passes_on_is_lost_and_comes_back() {
    lose_and_get_back(Fabric::Local, 0).await;
    lose_and_get_back(Fabric::Tcp, 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_that_passes_on_is_lost_and_comes_back() {
    let Some(gpus) = gpus() else { return };
    lose_and_get_back(Fabric::Auto, gpus).await;
}

const VERSIONS: u64 = 12;

/// When a rank is lost in a push: while some of what was sent has been passed on and some has not.
fn moments() -> impl Iterator<Item = (u64, Duration)> {
    (1..VERSIONS).map(|version| (version, Duration::from_micros(400 * version)))
}

async fn push_all(trainer: &mut Pushing) {
    for version in 1..=VERSIONS {
        trainer.push(version).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_that_is_lost_in_the_middle_leaves_nothing_to_the_next_push() {
    for fabric in [Fabric::Local, Fabric::Tcp] {
        let job = Job::start(Relay::PerHost, fabric, CommitMode::InPlace, 0).await;
        let ([mut a, mut b], [mut x, mut y, mut z]) = job.all().await;
        let lost = async {
            for (version, moment) in moments() {
                if tokio::time::timeout(moment, b.push(version)).await.is_err() {
                    drop(b);
                    b = job.trainer(1).await;
                }
                b.push(version).await;
            }
            b.push(VERSIONS).await;
        };
        tokio::join!(push_all(&mut a), lost, x.serves(VERSIONS), y.serves(VERSIONS), z.serves(VERSIONS));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nor_does_a_rank_that_passes_on() {
    for (fabric, mode) in [(Fabric::Local, CommitMode::InPlace), (Fabric::Tcp, CommitMode::Staged)] {
        let job = Job::start(Relay::Chain, fabric, mode, 0).await;
        let ([mut a, mut b], [mut x, mut y, mut z]) = job.all().await;
        let lost = async {
            for (version, moment) in moments() {
                if tokio::time::timeout(moment, x.serves(version)).await.is_err() {
                    drop(x);
                    x = job.inference(0).await;
                }
            }
            x.serves(VERSIONS).await;
        };
        tokio::join!(push_all(&mut a), push_all(&mut b), lost, y.serves(VERSIONS), z.serves(VERSIONS));
    }
}
