//! Observers over real sockets: they see a job, are bounded, and do not disturb it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rendezvous::controller::Report;
use rendezvous::status::PhaseStatus;
use rendezvous::{
    Client, ClientConfig, Observer, Refusal, RendezvousError, Secret, Server, ServerConfig, ServerHandle,
    ToController, ToMember, Transport, World,
};

const WORLD: World = World { trainers: 1, inference: 1 };
const DEADLINE: Duration = Duration::from_secs(20);

/// What the server lets watch at a time.
const OBSERVERS_MAX: usize = 8;

type Reports = Arc<Mutex<Vec<Report>>>;

async fn serve(secret: &str) -> (ServerHandle, Reports) {
    let config = ServerConfig { secret: Secret::new(secret), ..ServerConfig::loopback(WORLD).unwrap() };
    let reports = Reports::default();
    let seen = reports.clone();
    let server = Server::bind(config).await.unwrap();
    (server.spawn(move |report| seen.lock().unwrap().push(report)), reports)
}

fn client(server: &ServerHandle, secret: &str) -> ClientConfig {
    let controller = server.local_addr().to_string();
    ClientConfig {
        controller,
        job: rendezvous::JOB_DEFAULT.into(),
        secret: Secret::new(secret),
        transport: Transport::tcp(),
        deadline: DEADLINE,
    }
}

async fn observer(server: &ServerHandle, secret: &str) -> Result<Observer, RendezvousError> {
    Observer::connect(client(server, secret)).await
}

/// Why connections were refused: all reports so far, once there is one. Who is refused hears of it first.
async fn refusals(reports: &Reports) -> Vec<Refusal> {
    let began = std::time::Instant::now();
    while reports.lock().unwrap().is_empty() {
        assert!(began.elapsed() < DEADLINE, "nothing was refused");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let refusal = |report: &Report| match report {
        Report::Refused { refusal, .. } => *refusal,
        other => panic!("{other:?}"),
    };
    reports.lock().unwrap().iter().map(refusal).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_observer_needs_the_secret_and_counts_as_nobody() {
    let (server, reports) = serve("a secret").await;
    let error = observer(&server, "another").await.map(drop).unwrap_err();
    assert!(matches!(error, RendezvousError::Secret { .. }), "{error}");
    let mut observer = observer(&server, "a secret").await.unwrap();
    for _ in 0..3 {
        let status = observer.status().await.unwrap().unwrap();
        assert_eq!((status.phase, status.waiting.len()), (PhaseStatus::Joining, 2));
        assert!(status.ranks.is_empty());
    }
    // Only the wrong secret is worth a report, with its class.
    assert_eq!(refusals(&reports).await, [Refusal::Secret]);
}

#[tokio::test(flavor = "multi_thread")]
async fn observers_are_bounded_and_make_room_when_they_go() {
    let (server, reports) = serve("").await;
    let mut watching = Vec::new();
    for _ in 0..OBSERVERS_MAX {
        let mut observer = observer(&server, "").await.unwrap();
        observer.status().await.unwrap().unwrap();
        watching.push(observer);
    }
    let mut one_more = observer(&server, "").await.unwrap();
    let error = one_more.status().await.unwrap_err();
    assert!(
        matches!(&error, RendezvousError::Refused { reason } if reason.contains("8 observers")),
        "{error}"
    );
    assert_eq!(refusals(&reports).await, [Refusal::Bound]);
    watching.pop();
    // The server notices when it is told, which takes a moment.
    let began = std::time::Instant::now();
    loop {
        let mut observer = observer(&server, "").await.unwrap();
        match observer.status().await {
            Ok(status) => break assert!(status.is_some()),
            Err(error) => assert!(began.elapsed() < DEADLINE, "{error}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_observer_that_says_more_is_hung_up_on() {
    let (server, _) = serve("").await;
    let mut observer = Client::connect(client(&server, "")).await.unwrap();
    observer.send(ToController::Status).unwrap();
    assert!(matches!(observer.receive("a status").await, Ok(ToMember::StatusReport(_))));
    observer.send(ToController::Begin { version: 1 }).unwrap();
    let error = observer.receive("anything").await.unwrap_err();
    assert!(matches!(error, RendezvousError::Lost { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_is_gone_is_an_error_and_no_end() {
    let (server, _) = serve("").await;
    let mut observer = observer(&server, "").await.unwrap();
    observer.status().await.unwrap().unwrap();
    drop(server);
    let error = observer.status().await.unwrap_err();
    assert!(matches!(error, RendezvousError::Lost { .. }), "{error}");
}
