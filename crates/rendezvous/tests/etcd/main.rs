//! Controllers and members that find each other through a real etcd, over real sockets.

mod daemon;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use daemon::Daemon;
use rendezvous::controller::Report;
use rendezvous::{
    Client, ClientConfig, Commit, Holds, Join, MemberManifest, Observer, OnLoss, Record, RendezvousError,
    Secret, Server, ServerConfig, ServerHandle, SessionId, ToController, ToMember, Transport, World,
};
use xfer_plan::{
    DType, DestinationParam, ParamMap, RailDecl, Rank, ReceiverManifest, ReceiverRank, RegionIndex,
    SourcePiece, TensorBox, TrainerManifest, TrainerRank,
};

const WORLD: World = World { trainers: 1, inference: 1 };
const DEADLINE: Duration = Duration::from_secs(12);
const TRAINER: Rank = Rank::Trainer(TrainerRank(0));
const INFERENCE: Rank = Rank::Receiver(ReceiverRank(0));

/// A controller, and what it has reported.
struct Running {
    server: ServerHandle,
    reports: Arc<Mutex<Vec<Report>>>,
}

fn config(etcd: &Daemon) -> ServerConfig {
    let record = Record::Etcd { url: etcd.url(), advertise: None };
    let mut config = ServerConfig { record, ..ServerConfig::loopback(WORLD).unwrap() };
    config.controller.deadline = DEADLINE;
    config.controller.on_loss = OnLoss::Wait;
    config
}

impl Running {
    async fn start(etcd: &Daemon) -> Self {
        let reports = Arc::new(Mutex::new(Vec::new()));
        let seen = reports.clone();
        let server = Server::bind(config(etcd)).await.unwrap();
        Self { server: server.spawn(move |report| seen.lock().unwrap().push(report)), reports }
    }

    async fn reports(&self, wanted: &Report) {
        let began = Instant::now();
        while !self.reports.lock().unwrap().contains(wanted) {
            assert!(began.elapsed() < 5 * DEADLINE, "{wanted:?} not in {:?}", self.reports.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn address(&self) -> String {
        self.server.local_addr().to_string()
    }
}

fn client(etcd: &Daemon, job: &str, deadline: Duration) -> ClientConfig {
    let (secret, transport, job) = (Secret::none(), Transport::tcp(), job.to_owned());
    ClientConfig { controller: etcd.url(), job, secret, transport, deadline }
}

async fn connect(etcd: &Daemon) -> Client {
    Client::connect(client(etcd, rendezvous::JOB_DEFAULT, DEADLINE)).await.unwrap()
}

fn join(member: Rank, holds: Holds) -> ToController {
    let (host, region) = ("host".to_owned(), RegionIndex(0));
    let rails = vec![RailDecl { bytes_per_second: 1000 }];
    let (tensor, dtype, shape) = ("w".to_owned(), DType::U8, vec![8]);
    let manifest = match member {
        Rank::Trainer(_) => {
            let bounds = TensorBox::new(&[0], &[8]).unwrap();
            let pieces = vec![SourcePiece { tensor, dtype, shape, bounds, region, offset: 0 }];
            MemberManifest::Trainer(TrainerManifest { host, regions: vec![8], rails, pieces })
        }
        Rank::Receiver(_) => {
            let map = ParamMap::tensor("w").into();
            let param = DestinationParam { name: tensor, dtype, shape, region, offset: 0, map, priority: 0 };
            MemberManifest::Inference(ReceiverManifest { host, regions: vec![8], rails, params: vec![param] })
        }
    };
    let (job, world, deadline) = (rendezvous::JOB_DEFAULT.to_owned(), WORLD, DEADLINE);
    ToController::Join(Box::new(Join {
        job,
        member,
        world,
        deadline,
        manifest,
        endpoint: Vec::new(),
        stages: false,
        session: SessionId::default(),
        holds,
    }))
}

/// Both members, planned and started; and what the plan says was committed.
async fn started(etcd: &Daemon, holds: Holds) -> (Client, Client, Option<Commit>) {
    let (mut trainer, mut inference) = (connect(etcd).await, connect(etcd).await);
    trainer.send(join(TRAINER, Holds::Nothing)).unwrap();
    inference.send(join(INFERENCE, holds)).unwrap();
    let mut committed = None;
    for client in [&mut trainer, &mut inference] {
        let ToMember::Planned(planned) = client.receive("plan").await.unwrap() else { panic!("no plan") };
        client.send(ToController::Ready { digest: planned.digest }).unwrap();
        committed = planned.committed;
    }
    for client in [&mut trainer, &mut inference] {
        assert_eq!(client.receive("start").await.unwrap(), ToMember::Start);
    }
    (trainer, inference, committed)
}

/// Up to the moment at which the controller decides.
async fn written(trainer: &mut Client, inference: &mut Client, version: u64) {
    trainer.send(ToController::Begin { version }).unwrap();
    let ToMember::Prepare { push, .. } = inference.receive("prepare").await.unwrap() else {
        panic!("no prepare")
    };
    inference.send(ToController::Prepared { push }).unwrap();
    let ToMember::Write { push, .. } = trainer.receive("write").await.unwrap() else { panic!("no write") };
    let (fences, sums) = (Vec::new(), Vec::new());
    trainer.send(ToController::Written { push, bytes: 8, writes: 1, fences, sums }).unwrap();
}

async fn pushed(trainer: &mut Client, inference: &mut Client, version: u64) -> Commit {
    written(trainer, inference, version).await;
    let ToMember::Commit { push, .. } = inference.receive("commit").await.unwrap() else {
        panic!("no commit")
    };
    inference.send(ToController::Committed { push }).unwrap();
    let done = ToMember::Done { push, version, unconfirmed: vec![] };
    assert_eq!(trainer.receive("done").await.unwrap(), done);
    Commit { version, push }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_dies_is_followed_by_the_one_that_stood_by() {
    let Some(etcd) = Daemon::start() else { return };
    // Members may be there first.
    let early = tokio::spawn(Client::connect(client(&etcd, rendezvous::JOB_DEFAULT, DEADLINE)));
    let first = Running::start(&etcd).await;
    first.reports(&Report::InCharge { version: None }).await;
    drop(early.await.unwrap().unwrap());

    let second = Running::start(&etcd).await;
    second.reports(&Report::StandingBy { holder: first.address() }).await;
    let (mut trainer, mut inference, committed) = started(&etcd, Holds::Nothing).await;
    assert_eq!(committed, None);
    pushed(&mut trainer, &mut inference, 1).await;
    let last = pushed(&mut trainer, &mut inference, 2).await;

    // No goodbye: etcd finds out by the lease.
    drop(first);
    let error = inference.receive("anything").await.unwrap_err();
    assert!(matches!(error, RendezvousError::Lost { .. }), "{error}");
    let (mut trainer, mut inference, committed) = started(&etcd, Holds::Version(last)).await;
    assert_eq!(committed, Some(last));
    second.reports(&Report::InCharge { version: Some(2) }).await;
    let mut observer = Observer::connect(client(&etcd, rendezvous::JOB_DEFAULT, DEADLINE)).await.unwrap();
    assert!(observer.status().await.unwrap().is_some());
    pushed(&mut trainer, &mut inference, 3).await;

    // Who stands by when the job ends in good order has nothing to take over.
    let third = Running::start(&etcd).await;
    third.reports(&Report::StandingBy { holder: second.address() }).await;
    trainer.leave(None).await;
    assert_eq!(second.server.ended().await, None);
    assert_eq!(third.server.ended().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_cannot_be_recorded_is_told_to_nobody() {
    let Some(mut etcd) = Daemon::start() else { return };
    let controller = Running::start(&etcd).await;
    let (mut trainer, mut inference, _) = started(&etcd, Holds::Nothing).await;
    pushed(&mut trainer, &mut inference, 1).await;

    // Away for a moment: everybody waits.
    etcd.stop();
    written(&mut trainer, &mut inference, 2).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    etcd.resume();
    let ToMember::Commit { push, .. } = inference.receive("commit").await.unwrap() else {
        panic!("no commit")
    };
    inference.send(ToController::Committed { push }).unwrap();
    assert!(matches!(trainer.receive("done").await.unwrap(), ToMember::Done { version: 2, .. }));

    // Away for good: the controller goes, and neither member is told that it was refused.
    etcd.stop();
    written(&mut trainer, &mut inference, 3).await;
    for client in [&mut trainer, &mut inference] {
        let error = client.receive("what became of it").await.unwrap_err();
        assert!(matches!(error, RendezvousError::Lost { .. }), "{error}");
    }
    let reason = controller.server.ended().await.unwrap();
    assert!(reason.contains(&etcd.url()) && reason.contains("no answer within 12s"), "{reason}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_found_is_named() {
    let Some(etcd) = Daemon::start() else { return };
    let _controller = Running::start(&etcd).await;
    drop(connect(&etcd).await);
    let short = Duration::from_secs(2);
    let error = Client::connect(client(&etcd, "another", short)).await.map(drop).unwrap_err();
    assert!(matches!(error, RendezvousError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("/jobs/another/controller is not there"), "{error}");
    for (job, url, reason) in [
        ("a/b", etcd.url(), "without '/'"),
        ("job", format!("etcd://root:hunter2@{}/jobs", etcd.endpoint()), "WEIGHTSYNC_ETCD_PASSWORD"),
        ("job", format!("etcd://{}", etcd.endpoint()), "no prefix"),
    ] {
        let config = ClientConfig { controller: url.clone(), ..client(&etcd, job, short) };
        let error = Client::connect(config).await.map(drop).unwrap_err().to_string();
        assert!(error.contains(reason) && !error.contains("hunter2"), "{error}");
    }
}

#[tokio::test]
async fn a_controller_that_members_cannot_be_sent_to_does_not_start() {
    // etcd is not asked before.
    let url = || "etcd://127.0.0.1:1/jobs".to_owned();
    let bound = async |advertise: Option<&str>, listen: &str, url: String| {
        let record = Record::Etcd { url, advertise: advertise.map(str::to_owned) };
        let (listen, secret) = (listen.to_owned(), Secret::new("secret"));
        let bound = ServerConfig { record, listen, secret, ..ServerConfig::loopback(WORLD).unwrap() };
        Server::bind(bound).await.map(drop).map_err(|error| error.to_string())
    };
    let error = bound(None, "0.0.0.0:0", url()).await.unwrap_err();
    assert!(error.contains("0.0.0.0") && error.contains("advertise"), "{error}");
    let error = bound(Some("host"), "0.0.0.0:0", url()).await.unwrap_err();
    assert!(error.contains("'host'"), "{error}");
    let error = bound(None, "127.0.0.1:0", "http://127.0.0.1:1/jobs".into()).await.unwrap_err();
    assert!(error.contains("etcd://HOST:2379/PREFIX"), "{error}");
    let error = bound(None, "127.0.0.1:0", "etcd://root:hunter2@127.0.0.1:1/jobs".into()).await.unwrap_err();
    assert!(!error.contains("hunter2"), "{error}");
    bound(Some("host:0"), "0.0.0.0:0", url()).await.unwrap();
    bound(None, "127.0.0.1:0", url()).await.unwrap();
}
