//! The control plane over real sockets.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use rendezvous::controller::Report;
use rendezvous::{
    Client, ClientConfig, Holds, Join, MemberManifest, PROTOCOL_VERSION, Refusal, RendezvousError, Secret,
    Server, ServerConfig, ServerHandle, SessionId, ToController, ToMember, Transport, World,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use xfer_plan::{
    DType, DestinationParam, ParamMap, RailDecl, Rank, ReceiverManifest, ReceiverRank, RegionIndex,
    SourcePiece, TensorBox, TrainerManifest, TrainerRank,
};

const WORLD: World = World { trainers: 2, inference: 1 };
const DEADLINE: Duration = Duration::from_secs(20);

type Reports = Arc<Mutex<Vec<Report>>>;

async fn serve(
    listen: &str,
    secret: Secret,
    deadline: Duration,
) -> Result<(ServerHandle, Reports), RendezvousError> {
    let mut config = ServerConfig { listen: listen.into(), secret, ..ServerConfig::loopback(WORLD)? };
    config.controller.deadline = deadline;
    let reports = Reports::default();
    let seen = reports.clone();
    let server = Server::bind(config).await?;
    Ok((server.spawn(move |report| seen.lock().unwrap().push(report)), reports))
}

fn join(member: Rank) -> ToController {
    let (host, region) = ("host".to_owned(), RegionIndex(0));
    let rails = vec![RailDecl { bytes_per_second: 1000 }];
    let manifest = match member {
        Rank::Trainer(rank) => {
            let bounds = TensorBox::new(&[u64::from(rank.0), 0], &[1, 8]).unwrap();
            let (tensor, dtype, shape) = ("w".to_owned(), DType::U8, vec![2, 8]);
            let pieces = vec![SourcePiece { tensor, dtype, shape, bounds, region, offset: 0 }];
            MemberManifest::Trainer(TrainerManifest { host, regions: vec![8], rails, pieces })
        }
        Rank::Receiver(_) => {
            let (name, dtype, shape, map) = ("w".to_owned(), DType::U8, vec![2, 8], ParamMap::tensor("w"));
            let params = vec![DestinationParam {
                name,
                dtype,
                shape,
                region,
                offset: 0,
                map: map.into(),
                priority: 0,
            }];
            MemberManifest::Inference(ReceiverManifest { host, regions: vec![16], rails, params })
        }
    };
    ToController::Join(Box::new(Join {
        job: rendezvous::JOB_DEFAULT.into(),
        member,
        world: WORLD,
        deadline: DEADLINE,
        manifest,
        endpoint: member.to_string().into_bytes(),
        holds: Holds::Nothing,
        stages: false,
        session: SessionId::default(),
    }))
}

async fn connect(server: &ServerHandle, secret: Secret) -> Result<Client, RendezvousError> {
    let controller = server.local_addr().to_string();
    Client::connect(ClientConfig {
        controller,
        job: rendezvous::JOB_DEFAULT.into(),
        secret,
        transport: Transport::tcp(),
        deadline: DEADLINE,
    })
    .await
}

/// A member that is ready, with the digest of its plan.
async fn started(server: &ServerHandle, member: Rank) -> Client {
    let mut client = connect(server, Secret::none()).await.unwrap();
    client.send(join(member)).unwrap();
    let ToMember::Planned(planned) = client.receive("plan").await.unwrap() else { panic!("no plan") };
    let peers: Vec<Rank> = planned.peers.iter().map(|peer| peer.member).collect();
    for peer in &planned.peers {
        assert_eq!(peer.endpoint, peer.member.to_string().into_bytes());
    }
    match member {
        Rank::Trainer(_) => assert_eq!(peers, [Rank::Receiver(ReceiverRank(0))]),
        Rank::Receiver(_) => {
            assert_eq!(peers, [Rank::Trainer(TrainerRank(0)), Rank::Trainer(TrainerRank(1))])
        }
    }
    client.send(ToController::Ready { digest: planned.digest }).unwrap();
    assert_eq!(client.receive("start").await.unwrap(), ToMember::Start);
    client
}

async fn trainer(server: &ServerHandle, rank: u32) {
    let mut client = started(server, Rank::Trainer(TrainerRank(rank))).await;
    for version in 1..=3 {
        client.send(ToController::Begin { version }).unwrap();
        let ToMember::Write { push, .. } = client.receive("write").await.unwrap() else { panic!("no write") };
        client
            .send(ToController::Written { push, bytes: 8, writes: 1, fences: Vec::new(), sums: Vec::new() })
            .unwrap();
        let done = ToMember::Done { push, version, unconfirmed: vec![] };
        assert_eq!(client.receive("done").await.unwrap(), done);
    }
    client.leave(None).await;
}

async fn inference(server: &ServerHandle) -> u64 {
    let mut client = started(server, Rank::Receiver(ReceiverRank(0))).await;
    let mut committed = 0;
    loop {
        match client.receive("version").await.unwrap() {
            ToMember::Prepare { push, .. } => client.send(ToController::Prepared { push }).unwrap(),
            ToMember::Commit { push, version } => {
                committed = version;
                client.send(ToController::Committed { push }).unwrap();
            }
            ToMember::Finished => break committed,
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_versions_and_a_goodbye() {
    let (server, reports) = serve("127.0.0.1:0", Secret::none(), DEADLINE).await.unwrap();
    let ((), (), committed) = tokio::join!(trainer(&server, 0), trainer(&server, 1), inference(&server));
    assert_eq!(committed, 3);
    assert_eq!(server.ended().await, None);
    let reports = reports.lock().unwrap();
    let versions: Vec<u64> = reports
        .iter()
        .filter_map(|report| match report {
            Report::Committed { version, .. } => Some(*version),
            _ => None,
        })
        .collect();
    assert_eq!(versions, [1, 2, 3]);
    assert_eq!(reports.last(), Some(&Report::Ended { reason: None }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_vanishes_ends_the_job_for_all_by_name() {
    let (server, _) = serve("127.0.0.1:0", Secret::none(), DEADLINE).await.unwrap();
    let (mut a, mut b, c) = tokio::join!(
        started(&server, Rank::Trainer(TrainerRank(0))),
        started(&server, Rank::Trainer(TrainerRank(1))),
        started(&server, Rank::Receiver(ReceiverRank(0)))
    );
    drop(c);
    for client in [&mut a, &mut b] {
        let error = client.receive("anything").await.unwrap_err();
        assert!(
            matches!(&error, RendezvousError::Refused { reason } if reason.contains("inference 0 was lost")),
            "{error}"
        );
    }
    assert!(server.ended().await.unwrap().contains("inference 0 was lost"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_vanishes_is_named() {
    let (server, _) = serve("127.0.0.1:0", Secret::none(), DEADLINE).await.unwrap();
    let (mut a, _b, _c) = tokio::join!(
        started(&server, Rank::Trainer(TrainerRank(0))),
        started(&server, Rank::Trainer(TrainerRank(1))),
        started(&server, Rank::Receiver(ReceiverRank(0)))
    );
    drop(server);
    let error = a.receive("the commit").await.unwrap_err();
    assert!(matches!(error, RendezvousError::Lost { stage: "the commit", .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_secret_is_refused_on_both_sides() {
    let (server, reports) = serve("127.0.0.1:0", Secret::new("right"), DEADLINE).await.unwrap();
    for wrong in [Secret::new("wrong"), Secret::none()] {
        let error = connect(&server, wrong).await.map(drop).unwrap_err();
        assert!(matches!(error, RendezvousError::Secret { .. }), "{error}");
    }
    connect(&server, Secret::new("right")).await.unwrap();
    // The member hears of its refusal before the server reports it.
    let began = std::time::Instant::now();
    while reports.lock().unwrap().len() < 2 {
        assert!(began.elapsed() < DEADLINE);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let refused = |report: &Report| matches!(report, Report::Refused { refusal: Refusal::Secret, .. });
    let reports = reports.lock().unwrap();
    assert!(reports.len() == 2 && reports.iter().all(refused), "{reports:?}");
}

#[tokio::test]
async fn an_open_door_needs_a_secret() {
    let error = serve("0.0.0.0:0", Secret::none(), DEADLINE).await.map(drop).unwrap_err();
    assert!(matches!(error, RendezvousError::NeedsSecret { .. }), "{error}");
    serve("0.0.0.0:0", Secret::new("s"), DEADLINE).await.unwrap();
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let error = serve(&address, Secret::none(), DEADLINE).await.map(drop).unwrap_err().to_string();
    assert!(error.contains(&address) && error.contains("choose another port"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rubbish_and_silence_do_not_disturb_a_job() {
    let (server, _) = serve("127.0.0.1:0", Secret::none(), DEADLINE).await.unwrap();
    let mut strangers = Vec::new();
    for kind in 0..60_u8 {
        let mut stream = TcpStream::connect(server.local_addr()).await.unwrap();
        let mut hello = b"wghtsync".to_vec();
        hello.extend(PROTOCOL_VERSION.to_le_bytes());
        match kind % 4 {
            // Says nothing.
            0 => {}
            1 => stream.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap(),
            // A frame that claims 4 GiB.
            2 => {
                stream.write_all(&hello).await.unwrap();
                stream.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
            }
            // A frame of the right length with rubbish in it.
            _ => {
                stream.write_all(&hello).await.unwrap();
                stream.write_all(&64_u32.to_le_bytes()).await.unwrap();
                stream.write_all(&[0xff; 64]).await.unwrap();
            }
        }
        strangers.push(stream);
    }
    let ((), (), committed) = tokio::join!(trainer(&server, 0), trainer(&server, 1), inference(&server));
    assert_eq!(committed, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_protocol_version_is_named_on_both_sides() {
    let (server, _) = serve("127.0.0.1:0", Secret::none(), DEADLINE).await.unwrap();
    let mut stream = TcpStream::connect(server.local_addr()).await.unwrap();
    let mut hello = b"wghtsync".to_vec();
    hello.extend(99_u32.to_le_bytes());
    stream.write_all(&hello).await.unwrap();
    // The controller says its own version, so that the other side can name it, and closes.
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer.get(8..12), Some(&PROTOCOL_VERSION.to_le_bytes()[..]));

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let controller = listener.local_addr().unwrap().to_string();
    let answer = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(&hello).await.unwrap();
        let _ = stream.read_to_end(&mut Vec::new()).await;
    });
    let config = ClientConfig {
        controller,
        job: rendezvous::JOB_DEFAULT.into(),
        secret: Secret::none(),
        transport: Transport::tcp(),
        deadline: DEADLINE,
    };
    let error = Client::connect(config).await.map(drop).unwrap_err();
    assert!(matches!(error, RendezvousError::ProtocolVersion { theirs: 99, .. }), "{error}");
    answer.await.unwrap();
}

/// As one does that dies, and another takes its place.
#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_hangs_up_before_a_word_is_tried_again() {
    let (server, _) = serve("127.0.0.1:0", Secret::none(), DEADLINE).await.unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let controller = listener.local_addr().unwrap().to_string();
    let address = server.local_addr();
    let front = tokio::spawn(async move {
        drop(listener.accept().await.unwrap());
        let (mut member, _) = listener.accept().await.unwrap();
        let mut server = TcpStream::connect(address).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut member, &mut server).await;
    });
    let config = ClientConfig {
        controller,
        job: rendezvous::JOB_DEFAULT.into(),
        secret: Secret::none(),
        transport: Transport::tcp(),
        deadline: DEADLINE,
    };
    drop(Client::connect(config).await.unwrap());
    front.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_controller_that_is_not_there_is_an_error_at_the_deadline() {
    for is_stopped in [false, true] {
        // Whose kernel still takes connections, or does not.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let controller = listener.local_addr().unwrap().to_string();
        let _stopped = is_stopped.then_some(listener);
        let deadline = Duration::from_millis(200);
        let config = ClientConfig {
            controller,
            job: rendezvous::JOB_DEFAULT.into(),
            secret: Secret::none(),
            transport: Transport::tcp(),
            deadline,
        };
        let error = Client::connect(config).await.map(drop).unwrap_err();
        assert!(matches!(error, RendezvousError::Unreachable { .. }), "{error}");
        assert_eq!(error.to_string().contains("is it stopped?"), is_stopped, "{error}");
    }
}
