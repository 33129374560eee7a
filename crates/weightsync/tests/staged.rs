//! Versions that arrive beside the one that is served, and what the engine is told of them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use weightsync::{
    CommitMode, Controller, DType, Error, Fabric, Hooks, Inference, InferenceSession, OnLoss, ParamId,
    ParamMap, Served, ServerConfig, ServerHandle, SessionConfig, TensorId, TensorSpec, Trainer,
    TrainerSession, Verify, World,
};

const WORLD: World = World { trainers: 1, inference: 2 };
const DEADLINE: Duration = Duration::from_secs(3);
const BYTES: u64 = 200_000;

struct Job {
    server: ServerHandle,
    fabric: Fabric,
}

impl Job {
    async fn start(fabric: Fabric, on_loss: OnLoss) -> Self {
        let mut config = ServerConfig::loopback(WORLD).unwrap();
        config.controller.deadline = DEADLINE;
        config.controller.on_loss = on_loss;
        config.controller.verify = Verify::Full;
        Self { server: Controller::bind(config).await.unwrap().spawn(|_| {}), fabric }
    }

    fn session(&self, rank: u32) -> SessionConfig {
        let mut config = SessionConfig::new(self.server.local_addr().to_string(), WORLD, rank);
        (config.fabric, config.deadline) = (self.fabric, DEADLINE);
        config
    }

    async fn trainer(&self) -> (TrainerSession, TensorId) {
        let mut trainer = Trainer::new(self.session(0));
        let spec = TensorSpec::whole("w", DType::U8, &[BYTES]).unwrap();
        let id = trainer.allocate(vec![spec]).unwrap()[0];
        (trainer.connect().await.unwrap(), id)
    }

    async fn inference(&self, rank: u32, mode: CommitMode, hooks: Hooks) -> Serving {
        let mut inference = Inference::new(self.session(rank));
        let id = inference.register("w", DType::U8, &[BYTES], ParamMap::tensor("w")).unwrap();
        inference.commit_mode(mode).hooks(hooks);
        Serving { session: inference.connect().await.unwrap(), id, mode }
    }
}

struct Serving {
    session: InferenceSession,
    id: ParamId,
    mode: CommitMode,
}

impl Serving {
    async fn serves(&mut self, version: u64) {
        loop {
            match self.session.wait_version(version, Some(10 * DEADLINE)).await {
                Ok(report) => {
                    assert_eq!(report.version, version);
                    assert!(report.pause_seconds <= report.seconds);
                    assert_eq!(report.pause_seconds == report.seconds, self.mode == CommitMode::InPlace);
                    break;
                }
                Err(Error::Aborted { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        self.is_at(version);
    }

    fn is_at(&self, version: u64) {
        assert_eq!(self.session.served(), Served::Version(version));
        let mut bytes = vec![0; BYTES as usize];
        self.session.read(self.id, 0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == version as u8), "version {version}");
    }
}

async fn push((session, id): &mut (TrainerSession, TensorId), version: u64) -> Result<(), Error> {
    session.tensor_mut(*id).unwrap().fill(version as u8);
    session.push(version).await.map(drop)
}

/// What hooks were told, in order.
type Told = Arc<Mutex<Vec<String>>>;

fn hooks(told: &Told) -> Hooks {
    let (stop, go, over) = (told.clone(), told.clone(), told.clone());
    Hooks {
        before_change: Some(Box::new(move |version| {
            stop.lock().unwrap().push(format!("stop for {version}"));
            Ok(())
        })),
        after_commit: Some(Box::new(move |version, _| {
            go.lock().unwrap().push(format!("serve {version}"));
            Ok(())
        })),
        after_abort: Some(Box::new(move |version, reason| {
            assert!(!reason.is_empty());
            over.lock().unwrap().push(format!("{version} failed"));
        })),
    }
}

async fn old_versions_stay_whole(mode: CommitMode, fabric: Fabric) {
    let job = Job::start(fabric, OnLoss::Wait).await;
    let told = Told::default();
    let (mut trainer, mut first, second) = tokio::join!(
        job.trainer(),
        job.inference(0, mode, hooks(&told)),
        job.inference(1, CommitMode::InPlace, Hooks::default())
    );
    let mut second = Some(second);
    let before = first.session.arena_ptr();
    let mut addresses = vec![before];
    for version in 1..=6 {
        if version % 3 == 0 {
            // The other rank dies, and the push fails before this one is prepared, or after.
            drop(second.take());
            let pushing = async { push(&mut trainer, version).await.unwrap_err() };
            let fails = async {
                let fails = first.session.wait_version(version, Some(DEADLINE)).await;
                assert!(matches!(fails, Err(Error::Aborted { .. } | Error::NotYet { .. })), "{fails:?}");
            };
            tokio::join!(pushing, fails);
            first.is_at(version - 1);
            let back = async {
                let mut second = job.inference(1, CommitMode::InPlace, Hooks::default()).await;
                second.serves(version).await;
                second
            };
            let again = async {
                while let Err(error) = push(&mut trainer, version).await {
                    assert!(error.may_be_tried_again(), "{error}");
                }
            };
            let (back, (), ()) = tokio::join!(back, again, first.serves(version));
            second = Some(back);
        } else {
            let other = second.as_mut().unwrap();
            let (pushed, (), ()) =
                tokio::join!(push(&mut trainer, version), first.serves(version), other.serves(version));
            pushed.unwrap();
        }
        addresses.push(first.session.arena_ptr());
    }
    match mode {
        CommitMode::Staged => assert!(addresses.windows(2).all(|pair| pair[0] != pair[1]), "{addresses:?}"),
        _ => assert!(addresses.iter().all(|address| *address == before), "{addresses:?}"),
    }
    // Served bytes change between the two words only, and a push that fails is no reason to stop.
    let told = told.lock().unwrap();
    let changes: Vec<&String> = told.iter().filter(|said| !said.ends_with("failed")).collect();
    let expected: Vec<String> =
        (1..=6).flat_map(|version| [format!("stop for {version}"), format!("serve {version}")]).collect();
    assert_eq!(changes, expected.iter().collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_arenas_change_places() {
    old_versions_stay_whole(CommitMode::Staged, Fabric::Local).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_arenas_change_places_over_libfabric() {
    old_versions_stay_whole(CommitMode::Staged, Fabric::Tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bytes_are_copied_over() {
    old_versions_stay_whole(CommitMode::StagedCopy, Fabric::Local).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_cannot_stop_aborts_a_push_in_place() {
    let job = Job::start(Fabric::Local, OnLoss::Fail).await;
    let mut refuses = true;
    let before_change = move |_| match std::mem::take(&mut refuses) {
        true => Err("requests are running".to_owned()),
        false => Ok(()),
    };
    let hooks = Hooks { before_change: Some(Box::new(before_change)), ..Hooks::default() };
    let (mut trainer, mut first, mut second) = tokio::join!(
        job.trainer(),
        job.inference(0, CommitMode::InPlace, hooks),
        job.inference(1, CommitMode::InPlace, Hooks::default())
    );
    let aborted = async {
        let error = first.session.wait_version(1, None).await.unwrap_err();
        assert!(error.to_string().contains("requests are running"), "{error}");
        first.session.wait_version(1, Some(DEADLINE)).await
    };
    let pushes = async {
        let error = push(&mut trainer, 1).await.unwrap_err();
        assert!(error.to_string().contains("inference 0") && error.may_be_tried_again(), "{error}");
        push(&mut trainer, 1).await.unwrap();
    };
    let (served, (), ()) = tokio::join!(aborted, pushes, second.serves(1));
    served.unwrap();
    first.is_at(1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_cannot_serve_a_commit_is_lost() {
    let job = Job::start(Fabric::Local, OnLoss::Continue).await;
    let after_commit = |version, _| if version == 2 { Err("out of memory".to_owned()) } else { Ok(()) };
    let hooks = Hooks { after_commit: Some(Box::new(after_commit)), ..Hooks::default() };
    let (mut trainer, mut first, mut second) = tokio::join!(
        job.trainer(),
        job.inference(0, CommitMode::Staged, hooks),
        job.inference(1, CommitMode::Staged, Hooks::default())
    );
    let (pushed, (), ()) = tokio::join!(push(&mut trainer, 1), first.serves(1), second.serves(1));
    pushed.unwrap();
    let (pushed, failed, ()) =
        tokio::join!(push(&mut trainer, 2), first.session.wait_version(2, None), second.serves(2));
    assert!(matches!(pushed, Err(Error::Unconfirmed { version: 2, .. })), "{pushed:?}");
    assert!(matches!(failed, Err(Error::Hook { version: 2, .. })), "{failed:?}");
    let (pushed, ()) = tokio::join!(push(&mut trainer, 3), second.serves(3));
    pushed.unwrap();
    assert!(matches!(first.session.wait_version(3, None).await, Err(Error::Broken)));
}

/// What is served is still the version before then, and must not pass for the one that is committed.
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_cannot_stop_for_a_commit_is_lost() {
    for mode in [CommitMode::Staged, CommitMode::StagedCopy] {
        let job = Job::start(Fabric::Local, OnLoss::Continue).await;
        let before_change =
            |version| if version == 2 { Err("requests are running".to_owned()) } else { Ok(()) };
        let hooks = Hooks { before_change: Some(Box::new(before_change)), ..Hooks::default() };
        let (mut trainer, mut first, mut second) = tokio::join!(
            job.trainer(),
            job.inference(0, mode, hooks),
            job.inference(1, mode, Hooks::default())
        );
        let (pushed, (), ()) = tokio::join!(push(&mut trainer, 1), first.serves(1), second.serves(1));
        pushed.unwrap();
        let (pushed, failed, ()) =
            tokio::join!(push(&mut trainer, 2), first.session.wait_version(2, None), second.serves(2));
        assert!(matches!(pushed, Err(Error::Unconfirmed { version: 2, .. })), "{pushed:?}");
        assert!(matches!(failed, Err(Error::Hook { version: 2, .. })), "{failed:?}");
        let again = first.session.wait_version(2, None).await;
        assert!(matches!(again, Err(Error::Broken)), "{again:?}");
        assert_eq!(first.session.served(), Served::Torn(2));
        assert!(first.session.read(first.id, 0, &mut [0]).is_err());
    }
}
