//! Jobs that lose ranks, or their controller, and go on: what the sessions of those who are left do about it.

use std::future::{Future, poll_fn};
use std::path::PathBuf;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::watch;
use weightsync::{
    Controller, DType, Error, Fabric, Inference, InferenceSession, OnLoss, ParamId, ParamMap, Rank, Record,
    Report, Served, ServerConfig, ServerHandle, SessionConfig, TensorId, TensorSpec, Trainer, TrainerSession,
    World,
};
use xfer_plan::{ReceiverRank, TensorBox};

const WORLD: World = World { trainers: 2, inference: 2 };
const DEADLINE: Duration = Duration::from_secs(3);
const COLUMNS: u64 = 300_000;
const I1: Rank = Rank::Receiver(ReceiverRank(1));

/// Where a controller is, and how to start it again.
struct Job {
    server: Option<ServerHandle>,
    /// How often the second inference rank has joined.
    joined: watch::Receiver<u32>,
    config: ServerConfig,
    fabric: Fabric,
}

impl Job {
    async fn start(on_loss: OnLoss, fabric: Fabric, record: Option<PathBuf>) -> Self {
        let mut config = ServerConfig::loopback(WORLD).unwrap();
        config.controller.deadline = DEADLINE;
        config.controller.on_loss = on_loss;
        config.record = record.map_or(Record::Nowhere, Record::File);
        let server = Controller::bind(config.clone()).await.unwrap();
        config.listen = server.local_addr().to_string();
        let (count, joined) = watch::channel(0);
        let server = server.spawn(move |report| {
            if report == Report::Joined(I1) {
                count.send_modify(|count| *count += 1);
            }
        });
        Self { server: Some(server), joined, config, fabric }
    }

    /// The controller dies, and another takes its place.
    async fn restart(&mut self) {
        drop(self.server.take());
        // Its connections end when its tasks do.
        let until = tokio::time::Instant::now() + DEADLINE;
        let server = loop {
            match Controller::bind(self.config.clone()).await {
                Ok(server) => break server,
                Err(error) => assert!(tokio::time::Instant::now() < until, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        self.server = Some(server.spawn(|_| {}));
    }

    fn session(&self, rank: u32) -> SessionConfig {
        let mut config = SessionConfig::new(self.config.listen.clone(), WORLD, rank);
        (config.fabric, config.deadline) = (self.fabric, DEADLINE);
        config
    }

    /// A trainer that owns these rows of `w`, which has two.
    async fn trainer(&self, rank: u32, first: u64, rows: u64) -> Pushing {
        let mut trainer = Trainer::new(self.session(rank));
        let bounds = TensorBox::new(&[first, 0], &[rows, COLUMNS]).unwrap();
        let spec = TensorSpec { name: "w".into(), dtype: DType::U8, shape: vec![2, COLUMNS], bounds };
        let id = trainer.allocate(vec![spec]).unwrap()[0];
        Pushing { session: trainer.connect().await.unwrap(), id }
    }

    /// Holds `w` whole.
    async fn inference(&self, rank: u32) -> Serving {
        let mut inference = Inference::new(self.session(rank));
        let id = inference.register("w", DType::U8, &[2, COLUMNS], ParamMap::tensor("w")).unwrap();
        Serving { session: inference.connect().await.unwrap(), id }
    }

    /// Each trainer with a row of its own.
    async fn all(&self) -> (Pushing, Pushing, Serving, Serving) {
        tokio::join!(self.trainer(0, 0, 1), self.trainer(1, 1, 1), self.inference(0), self.inference(1))
    }
}

struct Pushing {
    session: TrainerSession,
    id: TensorId,
}

impl Pushing {
    async fn push(&mut self, version: u64) -> Result<(), Error> {
        self.session.tensor_mut(self.id)?.fill(version as u8);
        self.session.push(version).await.map(drop)
    }
}

struct Serving {
    session: InferenceSession,
    id: ParamId,
}

impl Serving {
    /// Waits for a version past attempts that fail, and finds nothing else in the arena.
    async fn serves(&mut self, version: u64) {
        let report = loop {
            match self.session.wait_version(version, Some(10 * DEADLINE)).await {
                Ok(report) => break report,
                Err(Error::Aborted { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        };
        assert_eq!((report.version, self.session.served()), (version, Served::Version(version)));
        assert_eq!(self.bytes(), [version as u8; 2 * COLUMNS as usize]);
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; 2 * COLUMNS as usize];
        self.session.read(self.id, 0, &mut bytes).unwrap();
        bytes
    }
}

/// Pushes again until it is committed.
async fn push(trainer: &mut Pushing, version: u64) {
    for _ in 0..20 {
        match trainer.push(version).await {
            Ok(()) => return,
            Err(error) => assert!(error.may_be_tried_again(), "{error}"),
        }
        // It was lost between the commit and the word of it.
        if trainer.session.committed() >= version {
            return;
        }
    }
    panic!("version {version} is never committed");
}

async fn lose_and_get_back(fabric: Fabric) {
    let job = Job::start(OnLoss::Continue, fabric, None).await;
    let (mut a, mut b, mut first, mut second) = job.all().await;
    tokio::join!(push(&mut a, 1), push(&mut b, 1), first.serves(1), second.serves(1));
    let address = first.session.arena_ptr();

    drop(second);
    tokio::join!(push(&mut a, 2), push(&mut b, 2), first.serves(2));

    // A new process of that rank: it has nothing yet, and gets in with the next push.
    let back = async {
        let mut second = job.inference(1).await;
        assert_eq!(second.session.served(), Served::Behind(2));
        let read = second.session.read(second.id, 0, &mut [0]);
        assert!(matches!(read, Err(Error::Behind { version: 2 })), "{read:?}");
        second.serves(3).await;
        second
    };
    let push_then = async {
        job.joined.clone().wait_for(|joined| *joined == 2).await.unwrap();
        tokio::join!(push(&mut a, 3), push(&mut b, 3));
    };
    let ((), (), mut second) = tokio::join!(push_then, first.serves(3), back);
    tokio::join!(push(&mut a, 4), push(&mut b, 4), first.serves(4), second.serves(4));
    assert_eq!(first.session.arena_ptr(), address);
    tokio::join!(a.session.leave(), b.session.leave());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_inference_rank_is_lost_and_comes_back() {
    lose_and_get_back(Fabric::Local).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_libfabric_too() {
    lose_and_get_back(Fabric::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_waits_says_for_whom() {
    let job = Job::start(OnLoss::Wait, Fabric::Local, None).await;
    let (mut a, mut b, mut first, second) = job.all().await;
    drop(second);
    let (one, other, _) =
        tokio::join!(a.push(1), b.push(1), first.session.wait_version(1, Some(DEADLINE / 2)));
    for error in [one.unwrap_err(), other.unwrap_err()] {
        assert!(error.to_string().contains(&I1.to_string()) && error.may_be_tried_again(), "{error}");
    }
    let back = async {
        let mut second = job.inference(1).await;
        second.serves(1).await;
        second
    };
    tokio::join!(push(&mut a, 1), push(&mut b, 1), first.serves(1), back);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_whose_rows_another_has_is_not_needed() {
    let job = Job::start(OnLoss::Continue, Fabric::Local, None).await;
    let (mut a, mut b, mut first, mut second) =
        tokio::join!(job.trainer(0, 0, 2), job.trainer(1, 0, 2), job.inference(0), job.inference(1));
    tokio::join!(push(&mut a, 1), push(&mut b, 1), first.serves(1), second.serves(1));
    drop(b);
    tokio::join!(push(&mut a, 2), first.serves(2), second.serves(2));
    assert_eq!((a.session.committed(), a.session.behind()), (2, &[][..]));

    // Nobody has its rows: it is waited for.
    let job = Job::start(OnLoss::Continue, Fabric::Local, None).await;
    let (mut a, b, mut first, mut second) = job.all().await;
    drop(b);
    let incomplete = async {
        loop {
            match a.push(1).await.unwrap_err() {
                Error::Incomplete { reason } => break reason,
                error => assert!(error.may_be_tried_again(), "{error}"),
            }
        }
    };
    let reason = tokio::select! {
        reason = incomplete => reason,
        () = first.serves(1) => panic!(),
        () = second.serves(1) => panic!(),
    };
    assert!(reason.contains("waited 3s for trainer 1 to join again"), "{reason}");
    let back = async {
        let mut b = job.trainer(1, 1, 1).await;
        push(&mut b, 1).await;
        b
    };
    tokio::join!(push(&mut a, 1), back, first.serves(1), second.serves(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_comes_back_and_knows_the_version() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = Job::start(OnLoss::Wait, Fabric::Local, Some(folder.path().join("commit"))).await;
    let (mut a, mut b, mut first, mut second) = job.all().await;
    tokio::join!(push(&mut a, 7), push(&mut b, 7), first.serves(7), second.serves(7));
    for version in [8, 9] {
        job.restart().await;
        // Those who serve go on serving, and nobody may go back.
        assert_eq!(first.session.served(), Served::Version(version - 1));
        if version == 8 {
            let (one, other, _, _) = tokio::join!(
                a.push(7),
                b.push(7),
                first.session.wait_version(8, Some(DEADLINE)),
                second.session.wait_version(8, Some(DEADLINE))
            );
            for error in [one.unwrap_err(), other.unwrap_err()] {
                assert!(error.to_string().contains("not newer than the committed version 7"), "{error}");
            }
        }
        tokio::join!(
            push(&mut a, version),
            push(&mut b, version),
            first.serves(version),
            second.serves(version)
        );
    }
}

/// A trainer is lost at any moment of a push and comes back: what the others have of the version is torn until the next, and
/// nothing that it may still have under way is seen in that.
/// A call that is dropped at once, time and again, gets there as well: what takes longer goes on meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn who_only_looks_joins_again_too() {
    let mut job = Job::start(OnLoss::Wait, Fabric::Local, None).await;
    let (mut a, mut b, mut first, mut second) = job.all().await;
    async fn look(serving: &mut Serving, version: u64) {
        loop {
            let looked = {
                let mut waiting = pin!(serving.session.wait_version(version, None));
                poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context))).await
            };
            match looked {
                Poll::Ready(Ok(_)) => return,
                Poll::Pending | Poll::Ready(Err(Error::Aborted { .. })) => {}
                Poll::Ready(Err(error)) => panic!("{error}"),
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    tokio::join!(push(&mut a, 1), push(&mut b, 1), look(&mut first, 1), second.serves(1));
    job.restart().await;
    tokio::join!(push(&mut a, 2), push(&mut b, 2), look(&mut first, 2), second.serves(2));
    first.serves(2).await;
    // A push that is given up leaves memory that other is put in the place of.
    let steady = async {
        for version in 3..=VERSIONS {
            push(&mut a, version).await;
        }
    };
    tokio::join!(steady, lost_often(&job, b, 3), look(&mut first, VERSIONS), second.serves(VERSIONS));
    first.serves(VERSIONS).await;
}

const VERSIONS: u64 = 10;

/// The second trainer, which is lost in the middle of most versions.
async fn lost_often(job: &Job, mut trainer: Pushing, first: u64) {
    for version in first..VERSIONS {
        let moment = Duration::from_micros(300 * version);
        if tokio::time::timeout(moment, trainer.push(version)).await.is_err() {
            drop(trainer);
            trainer = job.trainer(1, 1, 1).await;
        }
        push(&mut trainer, version).await;
    }
    push(&mut trainer, VERSIONS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_is_lost_in_the_middle() {
    for fabric in [Fabric::Local, Fabric::Tcp] {
        let job = Job::start(OnLoss::Wait, fabric, None).await;
        let (mut a, b, mut first, mut second) = job.all().await;
        let address = first.session.arena_ptr();
        let steady = async {
            for version in 1..=VERSIONS {
                push(&mut a, version).await;
            }
        };
        tokio::join!(steady, lost_often(&job, b, 1), first.serves(VERSIONS), second.serves(VERSIONS));
        assert_eq!(first.session.arena_ptr(), address);
    }
}
