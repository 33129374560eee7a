//! Sessions whose weights are on GPUs, in every mode and past losses; skipped where there is none.

use std::time::Duration;

use tokio::sync::watch;
use weightsync::{
    CommitMode, Controller, DType, Device, Error, Fabric, Inference, InferenceSession, OnLoss, ParamId,
    ParamMap, Rank, Report, Served, ServerConfig, ServerHandle, SessionConfig, TensorBox, TensorId,
    TensorSpec, Trainer, TrainerSession, Verify, World,
};
use xfer_plan::ReceiverRank;

const WORLD: World = World { trainers: 2, inference: 2 };
const DEADLINE: Duration = Duration::from_secs(3);

/// Of `w`, of which each trainer has one half of the rows, and each inference rank one half of the columns.
const ROWS: u64 = 600;
const COLUMNS: u64 = 1000;

const HALF: usize = (ROWS * COLUMNS / 2) as usize;

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

/// What stands at an element of `w` in a version.
fn byte(version: u64, row: u64, column: u64) -> u8 {
    (version * 131 + row * 7 + column * 3 + (row ^ column) / 5) as u8
}

struct Job {
    server: ServerHandle,
    /// How often the second inference rank has joined.
    joined: watch::Receiver<u32>,
    gpus: u32,
    fabric: Fabric,
    /// The trainers' weights are in host memory.
    offloaded: bool,
}

impl Job {
    async fn start(gpus: u32, fabric: Fabric, on_loss: OnLoss) -> Self {
        let mut config = ServerConfig::loopback(WORLD).unwrap();
        config.controller.deadline = DEADLINE;
        config.controller.on_loss = on_loss;
        config.controller.verify = Verify::Full;
        let (count, joined) = watch::channel(0);
        let server = Controller::bind(config).await.unwrap().spawn(move |report| {
            if report == Report::Joined(Rank::Receiver(ReceiverRank(1))) {
                count.send_modify(|count| *count += 1);
            }
        });
        Self { server, joined, gpus, fabric, offloaded: false }
    }

    /// The trainers' GPUs first, then the inference ranks'; all the same where there is one.
    fn session(&self, rank: u32, number: u32) -> SessionConfig {
        let mut config = SessionConfig::new(self.server.local_addr().to_string(), WORLD, rank);
        (config.deadline, config.device) = (DEADLINE, Device::Cuda(number % self.gpus));
        config.fabric = self.fabric;
        config
    }

    async fn trainer(&self, rank: u32) -> Pushing {
        let config = self.session(rank, rank);
        let mut trainer =
            if self.offloaded { Trainer::offloaded(config).unwrap() } else { Trainer::new(config) };
        let bounds = TensorBox::new(&[u64::from(rank) * ROWS / 2, 0], &[ROWS / 2, COLUMNS]).unwrap();
        let spec = TensorSpec { name: "w".into(), dtype: DType::U8, shape: vec![ROWS, COLUMNS], bounds };
        let id = trainer.allocate(vec![spec]).unwrap()[0];
        let is_host = trainer.tensor_mut(id).is_some();
        assert_eq!(is_host, self.offloaded, "no host code can follow the address of what is on a GPU");
        Pushing { session: trainer.connect().await.unwrap(), id, rank: rank.into() }
    }

    async fn inference(&self, rank: u32, mode: CommitMode) -> Serving {
        let mut inference = Inference::new(self.session(rank, 2 + rank));
        inference.commit_mode(mode);
        let map = ParamMap::tensor("w").shard(&[ROWS, COLUMNS], 1, 2, rank.into()).unwrap();
        let id = inference.register("w", DType::U8, &[ROWS, COLUMNS / 2], map).unwrap();
        Serving { session: inference.connect().await.unwrap(), id, rank: rank.into() }
    }
}

struct Pushing {
    session: TrainerSession,
    id: TensorId,
    rank: u64,
}

impl Pushing {
    /// Pushes again until it is committed.
    async fn push(&mut self, version: u64) {
        let at = |at: u64| byte(version, self.rank * ROWS / 2 + at / COLUMNS, at % COLUMNS);
        let bytes: Vec<u8> = (0..HALF as u64).map(at).collect();
        self.session.write(self.id, &bytes).unwrap();
        while let Err(error) = self.session.push(version).await {
            // It was lost between the commit and the word of it.
            if self.session.committed() >= version {
                return;
            }
            assert!(error.may_be_tried_again(), "{error}");
        }
    }
}

struct Serving {
    session: InferenceSession,
    id: ParamId,
    rank: u64,
}

impl Serving {
    async fn serves(&mut self, version: u64) {
        loop {
            match self.session.wait_version(version, Some(10 * DEADLINE)).await {
                Ok(_) => break,
                Err(Error::Aborted { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        self.is_at(version);
    }

    fn is_at(&self, version: u64) {
        assert_eq!(self.session.served(), Served::Version(version));
        let mut bytes = vec![0; HALF];
        self.session.read(self.id, 0, &mut bytes).unwrap();
        let columns = COLUMNS / 2;
        let at = |at: u64| byte(version, at / columns, self.rank * columns + at % columns);
        assert!(bytes.iter().copied().eq((0..HALF as u64).map(at)), "version {version}");
        let mut few = [0; 3];
        self.session.read(self.id, 700, &mut few).unwrap();
        assert_eq!(few, bytes[700..703]);
        let outside = self.session.read(self.id, HALF as u64 - 2, &mut few);
        assert!(matches!(outside, Err(Error::Range { .. })), "{outside:?}");
    }
}

async fn versions_go_to_gpus(fabric: Fabric, offloaded: bool) {
    let Some(gpus) = gpus() else { return };
    for (mode, _) in CommitMode::ALL {
        let job = Job { offloaded, ..Job::start(gpus, fabric, OnLoss::Fail).await };
        let (mut a, mut b, mut first, mut second) = tokio::join!(
            job.trainer(0),
            job.trainer(1),
            job.inference(0, mode),
            job.inference(1, CommitMode::InPlace)
        );
        let address = first.session.arena_ptr();
        let mut addresses = vec![];
        for version in 1..=4 {
            tokio::join!(a.push(version), b.push(version), first.serves(version), second.serves(version));
            addresses.push(first.session.arena_ptr());
        }
        let stays = addresses.iter().all(|found| *found == address);
        assert_eq!(stays, mode != CommitMode::Staged, "{mode}: {address:?}, {addresses:?}");
        tokio::join!(a.session.leave(), b.session.leave());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_go_straight() {
    versions_go_to_gpus(Fabric::Auto, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_of_offloaded_weights_go_by_the_gpu() {
    versions_go_to_gpus(Fabric::Auto, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_go_through_the_host() {
    if let Err(error) = efa_core::Library::open() {
        assert!(std::env::var_os("LIBFABRIC_SO").is_none(), "{error}");
        return println!("skipped: {error}");
    }
    versions_go_to_gpus(Fabric::Tcp, false).await;
}

/// An inference rank is lost and comes back; then a trainer is, at any moment of a push. What it may still have under way
/// is never seen: the memory is another, at the same address.
async fn ranks_are_lost_and_come_back(fabric: Fabric, offloaded: bool) {
    let Some(gpus) = gpus() else { return };
    let job = Job { offloaded, ..Job::start(gpus, fabric, OnLoss::Continue).await };
    let (mut a, mut b, mut first, second) = tokio::join!(
        job.trainer(0),
        job.trainer(1),
        job.inference(0, CommitMode::InPlace),
        job.inference(1, CommitMode::InPlace)
    );
    let address = first.session.arena_ptr();
    drop(second);
    tokio::join!(a.push(1), b.push(1), first.serves(1));
    let back = async {
        let mut second = job.inference(1, CommitMode::Staged).await;
        second.serves(2).await;
        second
    };
    let push_then = async {
        job.joined.clone().wait_for(|joined| *joined == 2).await.unwrap();
        tokio::join!(a.push(2), b.push(2));
    };
    let ((), (), mut second) = tokio::join!(push_then, first.serves(2), back);
    const VERSIONS: u64 = 12;
    let steady = async {
        for version in 3..=VERSIONS {
            a.push(version).await;
        }
    };
    let lost = async {
        for version in 3..VERSIONS {
            let moment = Duration::from_micros(300 * version);
            if tokio::time::timeout(moment, b.push(version)).await.is_err() {
                drop(b);
                b = job.trainer(1).await;
            }
            b.push(version).await;
        }
        b.push(VERSIONS).await;
    };
    tokio::join!(steady, lost, first.serves(VERSIONS), second.serves(VERSIONS));
    assert_eq!(first.session.arena_ptr(), address);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_come_back_straight() {
    ranks_are_lost_and_come_back(Fabric::Auto, false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_with_offloaded_weights_come_back() {
    ranks_are_lost_and_come_back(Fabric::Auto, true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_come_back_through_the_host() {
    if efa_core::Library::open().is_ok() {
        ranks_are_lost_and_come_back(Fabric::Tcp, false).await;
    }
}

/// Rows with so much between them that they are not brought to the host with it, to be hashed there: copied and cast.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_lie_far_apart_are_compared_too() {
    const SHAPE: [u64; 2] = [32, 512 << 10];
    const WANTED: [u64; 2] = [32, 48 << 10];
    let Some(gpus) = gpus() else { return };
    let mut config = ServerConfig::loopback(WORLD).unwrap();
    config.controller.deadline = 5 * DEADLINE;
    config.controller.verify = Verify::Full;
    config.controller.options.chunk_bytes_max = 64 << 20;
    let server = Controller::bind(config).await.unwrap().spawn(|_| {});
    let session = |rank: u32, number: u32| {
        let mut config = SessionConfig::new(server.local_addr().to_string(), WORLD, rank);
        (config.deadline, config.device) = (5 * DEADLINE, Device::Cuda(number % gpus));
        config
    };
    let element = |row: u64, column: u64| (row * 1000 + column % 997) as f32;
    let trains = async |rank: u32| {
        let mut trainer = Trainer::new(session(rank, rank));
        let half = SHAPE[0] / 2;
        let bounds = TensorBox::new(&[u64::from(rank) * half, 0], &[half, SHAPE[1]]).unwrap();
        let spec = TensorSpec { name: "w".into(), dtype: DType::F32, shape: SHAPE.to_vec(), bounds };
        let id = trainer.allocate(vec![spec]).unwrap()[0];
        let mut session = trainer.connect().await.unwrap();
        let at = |at: u64| element(u64::from(rank) * half + at / SHAPE[1], at % SHAPE[1]);
        let bytes: Vec<u8> = (0..half * SHAPE[1]).flat_map(|number| at(number).to_le_bytes()).collect();
        session.write(id, &bytes).unwrap();
        for version in 1..=2 {
            session.push(version).await.unwrap();
        }
    };
    let serves = async |rank: u32| {
        let mut inference = Inference::new(session(rank, 2 + rank));
        let first = u64::from(rank) * 100_000;
        let slice = || ParamMap::tensor("w").slice(TensorBox::new(&[0, first], &WANTED).unwrap());
        inference.register("half", DType::BF16, &WANTED, slice().cast(DType::BF16)).unwrap();
        let id = inference.register("whole", DType::F32, &WANTED, slice()).unwrap();
        let mut session = inference.connect().await.unwrap();
        session.wait_version(2, None).await.unwrap();
        let mut bytes = vec![0; (WANTED[0] * WANTED[1] * 4) as usize];
        session.read(id, 0, &mut bytes).unwrap();
        let at = |at: u64| element(at / WANTED[1], first + at % WANTED[1]);
        let expected = (0..WANTED[0] * WANTED[1]).flat_map(|number| at(number).to_le_bytes());
        assert!(bytes.iter().copied().eq(expected));
    };
    tokio::join!(trains(0), trains(1), serves(0), serves(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn host_memory_and_gpus_have_nothing_in_common() {
    let Some(gpus) = gpus() else { return };
    let job = Job::start(gpus, Fabric::Auto, OnLoss::Fail).await;
    let mut trainer = Trainer::new(job.session(0, 0));
    let error = trainer.add_memory(weightsync::LeaseMut::zeroed(100).unwrap()).unwrap_err().to_string();
    assert!(error.contains("trainer 0") && error.contains("cuda:0"), "{error}");
    let on_host = |rank: u32| {
        let mut config = job.session(rank, 0);
        config.device = Device::Cpu;
        let mut trainer = Trainer::new(config);
        let bounds = TensorBox::new(&[u64::from(rank) * ROWS / 2, 0], &[ROWS / 2, COLUMNS]).unwrap();
        let spec = TensorSpec { name: "w".into(), dtype: DType::U8, shape: vec![ROWS, COLUMNS], bounds };
        trainer.allocate(vec![spec]).unwrap();
        trainer.connect()
    };
    let on_gpu = |rank: u32| {
        let mut inference = Inference::new(job.session(rank, 0));
        inference.register("w", DType::U8, &[ROWS, COLUMNS], ParamMap::tensor("w")).unwrap();
        inference.connect()
    };
    let (one, _, _, _) = tokio::join!(on_host(0), on_host(1), on_gpu(0), on_gpu(1));
    let error = one.err().unwrap().to_string();
    // Its own, or the other trainer's.
    assert!(error.contains("no common fabric") && error.contains("GPU memory"), "{error}");
}

#[test]
fn offloaded_weights_are_page_locked_and_have_a_gpu_to_go_by() {
    let session = |device, fabric| {
        let mut config = SessionConfig::new("nowhere:1", WORLD, 1);
        (config.device, config.fabric) = (device, fabric);
        config
    };
    for (device, fabric, reason) in
        [(Device::Cpu, Fabric::Auto, "the GPU"), (Device::Cuda(0), Fabric::Tcp, "device cpu")]
    {
        let refused = Trainer::offloaded(session(device, fabric)).err().unwrap().to_string();
        assert!(
            refused.starts_with("trainer 1 with offloaded weights") && refused.contains(reason),
            "{refused}"
        );
    }
    let Some(_) = gpus() else { return };
    let mut trainer = Trainer::offloaded(session(Device::Cuda(0), Fabric::Auto)).unwrap();
    let refused = trainer.add_memory(weightsync::LeaseMut::zeroed(100).unwrap()).unwrap_err().to_string();
    assert!(refused.contains("not page-locked"), "{refused}");
}
