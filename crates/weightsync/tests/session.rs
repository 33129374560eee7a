//! Sessions over shared memory, all ranks in this process: what a version means, and what is left after a failure.

use std::sync::atomic::Ordering;
use std::time::Duration;

use weightsync::{
    Controller, DType, Error, Fabric, Inference, InferenceSession, ParamId, ParamMap, Served, ServerConfig,
    ServerHandle, SessionConfig, TensorBox, TensorId, TensorSpec, Trainer, TrainerSession, World,
};

const DEADLINE: Duration = Duration::from_secs(20);

struct Job {
    server: ServerHandle,
    deadline: Duration,
}

async fn controller(world: World, deadline: Duration) -> Job {
    let mut config = ServerConfig::loopback(world).unwrap();
    config.controller.deadline = deadline;
    Job { server: Controller::bind(config).await.unwrap().spawn(|_| {}), deadline }
}

fn config(job: &Job, world: World, rank: u32) -> SessionConfig {
    let mut config = SessionConfig::new(job.server.local_addr().to_string(), world, rank);
    config.fabric = Fabric::Local;
    config.deadline = job.deadline;
    config
}

/// Trainer `rank` of `trainers` owns one row of `w`.
async fn trainer(job: &Job, world: World, rank: u32, columns: u64) -> (TrainerSession, TensorId) {
    let mut trainer = Trainer::new(config(job, world, rank));
    let spec = TensorSpec {
        name: "w".into(),
        dtype: DType::U8,
        shape: vec![u64::from(world.trainers), columns],
        bounds: TensorBox::new(&[u64::from(rank), 0], &[1, columns]).unwrap(),
    };
    let id = trainer.allocate(vec![spec]).unwrap()[0];
    (trainer.connect().await.unwrap(), id)
}

/// The one inference rank holds `w` whole.
async fn inference(job: &Job, world: World, columns: u64) -> (InferenceSession, ParamId) {
    let mut inference = Inference::new(config(job, world, 0));
    let shape = [u64::from(world.trainers), columns];
    let id = inference.register("w", DType::U8, &shape, ParamMap::tensor("w")).unwrap();
    (inference.connect().await.unwrap(), id)
}

fn row(session: &InferenceSession, id: ParamId, row: u64, columns: usize) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; columns];
    session.read(id, row * columns as u64, &mut bytes).map(|()| bytes)
}

#[tokio::test(flavor = "multi_thread")]
async fn versions_arrive_whole_and_in_order() {
    let world = World { trainers: 2, inference: 1 };
    let job = controller(world, DEADLINE).await;
    let ((mut a, a_id), (mut b, b_id), (mut serving, id)) =
        tokio::join!(trainer(&job, world, 0, 100), trainer(&job, world, 1, 100), inference(&job, world, 100));
    assert_eq!(serving.served(), Served::Version(0));
    assert_eq!(row(&serving, id, 1, 100).unwrap(), [0; 100]);
    for version in [1, 2, 7] {
        a.tensor_mut(a_id).unwrap().fill(version);
        b.tensor_mut(b_id).unwrap().fill(version + 100);
        let version = u64::from(version);
        let (first, second, served) =
            tokio::join!(a.push(version), b.push(version), serving.wait_version(version, None));
        let (first, second, served) = (first.unwrap(), second.unwrap(), served.unwrap());
        assert_eq!((first.bytes, second.bytes, served.bytes), (100, 100, 200));
        assert_eq!(
            (first.version, served.version, serving.served()),
            (version, version, Served::Version(version))
        );
        assert_eq!(first.stages.len(), 3);
        assert_eq!(row(&serving, id, 0, 100).unwrap(), [version as u8; 100]);
        assert_eq!(row(&serving, id, 1, 100).unwrap(), [version as u8 + 100; 100]);
    }
    assert!(matches!(row(&serving, id, 2, 100), Err(Error::Range { .. })));
    let ((), (), ended) = tokio::join!(a.leave(), b.leave(), serving.wait_version(8, None));
    assert!(matches!(ended, Err(Error::Finished { committed: 7 })), "{ended:?}");
    assert_eq!(job.server.ended().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failed_push_the_bytes_are_torn_until_the_next_one() {
    let world = World { trainers: 2, inference: 1 };
    // The controller gives up on a trainer that does not begin.
    let job = controller(world, Duration::from_secs(2)).await;
    let ((mut a, a_id), (mut b, b_id), (mut serving, id)) =
        tokio::join!(trainer(&job, world, 0, 8), trainer(&job, world, 1, 8), inference(&job, world, 8));
    a.tensor_mut(a_id).unwrap().fill(1);
    b.tensor_mut(b_id).unwrap().fill(1);

    // Only one begins: nobody has written, nothing is torn.
    let error = a.push(1).await.unwrap_err();
    assert!(
        matches!(&error, Error::Aborted { version: 1, reason } if reason.contains("trainer 1")),
        "{error}"
    );
    assert_eq!(serving.served(), Served::Version(0));

    // The two do not agree on the version.
    let (first, second) = tokio::join!(a.push(1), b.push(2));
    assert!(first.is_err() && second.is_err());

    // The inference rank does not answer in time: the push fails, both may try again.
    let (first, second) = tokio::join!(a.push(1), b.push(1));
    for error in [first.unwrap_err(), second.unwrap_err()] {
        assert!(matches!(&error, Error::Aborted { reason, .. } if reason.contains("inference 0")), "{error}");
    }
    // It hears of the push, and then of its end.
    let aborted = serving.wait_version(1, None).await.unwrap_err();
    assert!(matches!(aborted, Error::Aborted { version: 1, .. }), "{aborted}");
    assert_eq!(serving.served(), Served::Torn(1));
    assert!(matches!(row(&serving, id, 0, 8), Err(Error::Torn { version: 1 })));

    let (first, second, served) = tokio::join!(a.push(1), b.push(1), serving.wait_version(1, None));
    assert!(first.is_ok() && second.is_ok(), "{first:?} {second:?}");
    assert_eq!(served.unwrap().version, 1);
    assert_eq!(row(&serving, id, 1, 8).unwrap(), [1; 8]);
    let error = a.push(1).await.unwrap_err();
    assert!(matches!(&error, Error::Aborted { reason, .. } if reason.contains("not newer")), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_given_up_half_way_gives_the_weights_back_and_ends_the_job() {
    let world = World { trainers: 1, inference: 1 };
    let job = controller(world, DEADLINE).await;
    // Enough that the first progress is seen long before the last byte.
    let columns = 512 << 20;
    let ((mut a, id), (mut serving, _)) =
        tokio::join!(trainer(&job, world, 0, columns), inference(&job, world, columns));
    let waiting =
        tokio::spawn(async move { serving.wait_version(1, None).await.map(|report| report.version) });
    let progress = a.progress();
    let some_written = async {
        while progress.load(Ordering::Relaxed) == 0 {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
    };
    tokio::select! {
        biased;
        () = some_written => {}
        pushed = a.push(1) => panic!("it ended before any progress was seen: {pushed:?}"),
    }
    // The push has been dropped. The others are told at once, and why.
    let error = waiting.await.unwrap().unwrap_err().to_string();
    assert!(error.contains("trainer 0") && error.contains("given up half way"), "{error}");
    let began = std::time::Instant::now();
    while let Err(error) = a.tensor_mut(id).map(drop) {
        assert!(matches!(error, Error::Busy), "{error}");
        assert!(began.elapsed() < DEADLINE, "the weights never came back");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(matches!(a.push(2).await, Err(Error::Broken)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_given_up_before_it_wrote_ends_the_job_too() {
    let world = World { trainers: 2, inference: 1 };
    let job = controller(world, DEADLINE).await;
    let ((mut a, id), (mut b, _), _serving) =
        tokio::join!(trainer(&job, world, 0, 8), trainer(&job, world, 1, 8), inference(&job, world, 8));
    // The other trainer does not begin.
    assert!(tokio::time::timeout(Duration::from_millis(50), a.push(1)).await.is_err());
    a.tensor_mut(id).unwrap();
    let error = b.push(1).await.unwrap_err().to_string();
    assert!(error.contains("trainer 0") && error.contains("given up half way"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rank_lost_between_versions_is_named() {
    let world = World { trainers: 1, inference: 1 };
    let job = controller(world, DEADLINE).await;
    let ((mut a, _), (serving, _)) = tokio::join!(trainer(&job, world, 0, 8), inference(&job, world, 8));
    drop(serving);
    assert!(job.server.ended().await.unwrap().contains("inference 0 was lost"));
    let error = a.push(1).await.unwrap_err().to_string();
    assert!(error.contains("inference 0 was lost"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_is_there_is_not_waited_for() {
    let world = World { trainers: 1, inference: 1 };
    let job = controller(world, DEADLINE).await;
    let ((mut a, _), (mut serving, _)) = tokio::join!(trainer(&job, world, 0, 8), inference(&job, world, 8));
    let (pushed, served) = tokio::join!(a.push(3), serving.wait_version(2, None));
    assert!(pushed.is_ok() && served.unwrap().version == 3);
    for version in [1, 3] {
        assert_eq!(serving.wait_version(version, None).await.unwrap().version, 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_must_agree() {
    let world = World { trainers: 1, inference: 1 };
    let job = controller(world, Duration::from_secs(3)).await;
    let mut other = config(&job, world, 0);
    other.deadline = DEADLINE;
    let error = Trainer::new(other).connect().await.map(drop).unwrap_err().to_string();
    assert!(error.contains("deadline of 20s") && error.contains("3s"), "{error}");
    let mut absurd = config(&job, world, 0);
    absurd.deadline = Duration::from_nanos(1);
    assert!(Trainer::new(absurd).connect().await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn waiting_for_a_version_can_end() {
    let world = World { trainers: 1, inference: 1 };
    let job = controller(world, DEADLINE).await;
    let ((mut a, _), (mut serving, _)) = tokio::join!(trainer(&job, world, 0, 8), inference(&job, world, 8));
    let error = serving.wait_version(1, Some(Duration::from_millis(20))).await.unwrap_err();
    assert!(matches!(error, Error::NotYet { wanted: 1, .. }), "{error}");
    let (pushed, served) = tokio::join!(a.push(1), serving.wait_version(1, Some(DEADLINE)));
    assert!(pushed.is_ok() && served.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_something() {
    let world = World { trainers: 1, inference: 1 };
    let job = controller(world, DEADLINE).await;
    let ((mut a, _), (mut serving, id)) = tokio::join!(trainer(&job, world, 0, 0), inference(&job, world, 0));
    let (pushed, served) = tokio::join!(a.push(1), serving.wait_version(1, None));
    assert_eq!((pushed.unwrap().bytes, served.unwrap().bytes), (0, 0));
    assert_eq!(row(&serving, id, 0, 0).unwrap(), [] as [u8; 0]);
}

#[test]
fn wrong_declarations_are_refused_by_name() {
    let config = SessionConfig::new("127.0.0.1:1", World { trainers: 1, inference: 1 }, 0);
    let spec = || TensorSpec::whole("model.w", DType::F32, &[4, 4]).unwrap();
    let mut trainer = Trainer::new(config.clone());
    let short = weightsync::LeaseMut::zeroed(63).unwrap();
    let error = trainer.register(spec(), short).unwrap_err().to_string();
    assert!(error.contains("model.w") && error.contains("64 bytes") && error.contains("63"), "{error}");
    let region = trainer.add_memory(weightsync::LeaseMut::zeroed(100).unwrap()).unwrap();
    trainer.register_at(spec(), region, 36).unwrap();
    let error = trainer.register_at(spec(), region, 37).unwrap_err().to_string();
    assert!(error.contains("model.w") && error.contains("do not fit"), "{error}");
    let huge = TensorSpec::whole("huge", DType::F32, &[u64::MAX, 2]).unwrap();
    assert!(trainer.allocate(vec![huge]).unwrap_err().to_string().contains("huge"));
    let mut inference = Inference::new(config);
    let error = inference.register("huge", DType::F32, &[u64::MAX, 2], ParamMap::tensor("w")).unwrap_err();
    assert!(error.to_string().contains("huge"), "{error}");
}
