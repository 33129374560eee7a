//! Against a real etcd: who is in charge, what it may change, and what is made of answers and values that are wrong.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use xfer_plan::{Rank, TrainerRank};

use super::store::{COMMITTED, CONTROLLER, Change, Compare, ENDED, Entry, Store};
use super::*;
use crate::protocol::{Commit, PushId};
use crate::record;

#[path = "../../tests/etcd/daemon.rs"]
mod daemon;

use daemon::Daemon;

const JOB: &str = "job";

/// A third of it is a lease: some seconds, because a busy machine may keep its keeper waiting.
const DEADLINE: Duration = Duration::from_secs(12);

/// Longer than a lease that is not kept lasts.
const PAST_THE_LEASE: Duration = Duration::from_secs(8);

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn nothing(_: &str) -> Option<String> {
    None
}

fn store(url: &str) -> Store {
    Store::new(url, JOB, DEADLINE, &nothing).unwrap()
}

fn commit(version: u64) -> Commit {
    Commit { version, push: PushId([version as u8; 16]) }
}

/// A controller in charge, and what it is told.
struct Chief {
    office: Arc<Office>,
    last: Option<Commit>,
    deposed: oneshot::Receiver<String>,
}

type Holders = Arc<Mutex<Vec<String>>>;

/// Campaigns, and says behind whom it stood by.
async fn campaign(url: &str, address: &str, holders: Holders) -> Result<Campaign, RendezvousError> {
    let candidate = Candidate::of(store(url), JOB, address.to_owned());
    let campaign = candidate.campaign(move |holder| holders.lock().unwrap().push(holder));
    tokio::time::timeout(PATIENCE, campaign).await.expect("the campaign has no end")
}

async fn elected(url: &str, address: &str) -> Chief {
    chief(campaign(url, address, Holders::default()).await)
}

fn chief(campaign: Result<Campaign, RendezvousError>) -> Chief {
    match campaign {
        Ok(Campaign::InCharge { office, last, deposed }) => Chief { office, last, deposed },
        Ok(Campaign::Over(reason)) => panic!("the job is over: {reason:?}"),
        Err(error) => panic!("{error}"),
    }
}

fn refusal(campaign: Result<Campaign, RendezvousError>) -> String {
    match campaign {
        Ok(_) => panic!("it is in charge, or the job is over"),
        Err(error) => error.to_string(),
    }
}

/// A campaign that stands by behind `holder` already.
async fn standby(
    url: &str,
    address: &'static str,
    holder: &str,
) -> tokio::task::JoinHandle<Result<Campaign, RendezvousError>> {
    let holders = Holders::default();
    let (url, seen) = (url.to_owned(), holders.clone());
    let task = tokio::spawn(async move { campaign(&url, address, seen).await });
    while holders.lock().unwrap().is_empty() {
        assert!(!task.is_finished(), "it did not stand by");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(*holders.lock().unwrap(), [holder]);
    task
}

async fn put(store: &Store, key: &str, value: &[u8]) {
    let done = store
        .gateway
        .patiently(|| async { store.change(&[], &[Change::Put { key, value, lease: 0 }]).await });
    done.await.unwrap().unwrap();
}

async fn delete(store: &Store, key: &str) {
    store.change(&[], &[Change::Delete(key)]).await.unwrap().unwrap();
}

async fn value(store: &Store, key: &str) -> Option<Entry> {
    let [entry] = store.gateway.patiently(|| store.look([key])).await.unwrap();
    entry
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_over_knows_the_last_commit_and_who_lost_commits_nothing() {
    let Some(etcd) = Daemon::start() else { return };
    let (url, keys) = (etcd.url(), store(&etcd.url()));
    let a = elected(&url, "a:1").await;
    assert_eq!(a.last, None);
    let b = standby(&url, "b:1", "a:1").await;
    for version in 1..=3 {
        a.office.store(commit(version)).await.unwrap();
    }
    // By hand, as an operator may.
    delete(&keys, CONTROLLER).await;
    let b = chief(b.await.unwrap());
    assert_eq!(b.last, Some(commit(3)));
    let error = a.office.store(commit(4)).await.unwrap_err();
    assert!(error.contains("the controller at b:1 has taken over"), "{error}");
    let told = a.deposed.await.unwrap();
    assert!(told.contains("has lost its lease"), "{told}");

    // Neither does it end the job, nor say who is in it.
    a.office.finish(None).await;
    assert_eq!(value(&keys, ENDED).await, None);
    b.office.store(commit(5)).await.unwrap();
    let record = value(&keys, COMMITTED).await.unwrap().value;
    assert_eq!(String::from_utf8(record).unwrap(), record::text(JOB, commit(5)));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_come_at_once_one_is_in_charge() {
    const CANDIDATES: usize = 12;
    let Some(etcd) = Daemon::start() else { return };
    let url = etcd.url();
    put(&store(&url), ENDED, b"it is up").await;
    let holders = Holders::default();
    let mut campaigns = tokio::task::JoinSet::new();
    for number in 1..=CANDIDATES {
        let (url, holders) = (url.clone(), holders.clone());
        campaigns.spawn(async move { campaign(&url, &format!("a:{number}"), holders).await });
    }
    let Chief { office, .. } = chief(campaigns.join_next().await.unwrap().unwrap());
    let stand_by = async {
        while holders.lock().unwrap().len() < CANDIDATES - 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = stand_by => {}
        _ = campaigns.join_next() => panic!("two are in charge"),
    }
    let first = holders.lock().unwrap().first().cloned();
    assert!(holders.lock().unwrap().iter().all(|holder| Some(holder) == first.as_ref()));
    office.store(commit(1)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_is_kept_by_nobody_ends() {
    let Some(etcd) = Daemon::start() else { return };
    let url = etcd.url();
    let a = elected(&url, "a:1").await;
    a.office.store(commit(7)).await.unwrap();
    let b = standby(&url, "b:1", "a:1").await;
    tokio::time::sleep(PAST_THE_LEASE).await;
    a.office.store(commit(8)).await.expect("a lease that is kept has ended");
    assert!(!b.is_finished());
    drop(a);
    assert_eq!(chief(b.await.unwrap()).last, Some(commit(8)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_has_ended_is_taken_over_by_nobody() {
    let Some(etcd) = Daemon::start() else { return };
    let (url, keys) = (etcd.url(), store(&etcd.url()));
    for reason in [None, Some("trainer 0 was lost")] {
        let a = elected(&url, "a:1").await;
        let b = standby(&url, "b:1", "a:1").await;
        a.office.finish(reason).await;
        let Ok(Campaign::Over(told)) = b.await.unwrap() else { panic!("it is in charge") };
        assert_eq!(told.as_deref(), reason);
        assert_eq!(value(&keys, CONTROLLER).await, None);
    }
    // Who comes later begins anew.
    elected(&url, "c:1").await;
    assert_eq!(value(&keys, ENDED).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_is_away_is_waited_for() {
    let Some(mut etcd) = Daemon::start() else { return };
    let url = etcd.url();
    let a = elected(&url, "a:1").await;
    a.office.store(commit(1)).await.unwrap();
    let before = value(&store(&url), CONTROLLER).await.unwrap();

    etcd.stop();
    let storing = tokio::spawn({
        let office = a.office.clone();
        async move { office.store(commit(2)).await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!storing.is_finished());
    etcd.resume();
    storing.await.unwrap().unwrap();
    // A lease begins anew with the etcd that keeps it, and this one is kept from then on.
    tokio::time::sleep(PAST_THE_LEASE).await;
    let after = value(&store(&url), CONTROLLER).await.unwrap();
    assert_eq!((after.created, after.lease), (before.created, before.lease));
    a.office.store(commit(3)).await.unwrap();
    let Chief { mut deposed, .. } = a;
    assert!(deposed.try_recv().is_err(), "an etcd that was away has deposed it");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_stays_away_is_waited_for_until_the_deadline() {
    let Some(mut etcd) = Daemon::start() else { return };
    let (url, deadline) = (etcd.url(), Duration::from_secs(2));
    let candidate = || {
        let store = Store::new(&url, JOB, deadline, &nothing).unwrap();
        Candidate::of(store, JOB, "a:1".to_owned()).campaign(|_| {})
    };
    put(&store(&url), ENDED, b"it is up").await;
    let mut a = chief(candidate().await);
    etcd.stop();
    let error = a.office.store(commit(4)).await.unwrap_err();
    assert!(error.contains(&url) && error.contains("no answer within 2s"), "{error}");
    let error = refusal(candidate().await);
    assert!(error.contains("is etcd there"), "{error}");
    let finder = Finder::new(&url, JOB, deadline).unwrap();
    assert!(matches!(finder.find().await, Err(RendezvousError::Unreachable { .. })));
    assert!(a.deposed.try_recv().is_err(), "an etcd that is away has deposed it");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_whose_answer_was_lost_is_known_and_one_that_is_late_does_nothing() {
    let Some(etcd) = Daemon::start() else { return };
    let (url, keys) = (etcd.url(), store(&etcd.url()));
    let a = elected(&url, "a:1").await;
    a.office.store(commit(1)).await.unwrap();
    let created = value(&keys, CONTROLLER).await.unwrap().created;
    let known = value(&keys, COMMITTED).await.unwrap().modified;
    let attempt = async |version| {
        let text = record::text(JOB, commit(version));
        let compare = [Compare::Created(CONTROLLER, created), Compare::Modified(COMMITTED, known)];
        keys.change(&compare, &[Change::Put { key: COMMITTED, value: text.as_bytes(), lease: 0 }])
            .await
            .unwrap()
    };
    // The first attempt arrives, its answer does not.
    assert!(attempt(2).await.is_some());
    a.office.store(commit(2)).await.unwrap();
    a.office.store(commit(3)).await.unwrap();
    // Another one of version 2 arrives now.
    assert_eq!(attempt(2).await, None);
    put(&keys, COMMITTED, b"something").await;
    let error = a.office.store(commit(4)).await.unwrap_err();
    assert!(error.contains("/jobs/job/committed was changed by something else"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn members_are_told_of_for_as_long_as_the_controller_is_in_charge() {
    const RANKS: u32 = 250;
    let Some(etcd) = Daemon::start() else { return };
    let (url, keys) = (etcd.url(), store(&etcd.url()));
    let a = elected(&url, "a:1").await;
    let entry = |rank: u32| format!("10.0.0.1:{} digest", rank + 1);
    for rank in 0..RANKS {
        a.office.member(Rank::Trainer(TrainerRank(rank)), Some(entry(rank)));
    }
    let found = async |rank: u32| value(&keys, &format!("members/trainer-{rank}")).await;
    let eventually = async |rank: u32, wanted: Option<String>| {
        let began = std::time::Instant::now();
        while found(rank).await.map(|entry| String::from_utf8(entry.value).unwrap()) != wanted {
            assert!(began.elapsed() < PATIENCE, "trainer {rank}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    for rank in 0..RANKS {
        eventually(rank, Some(entry(rank))).await;
    }
    a.office.member(Rank::Trainer(TrainerRank(7)), None);
    eventually(7, None).await;
    a.office.finish(None).await;
    eventually(8, None).await;
}

fn finder(url: &str) -> Finder {
    Finder::new(url, JOB, DEADLINE).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_controller_has_written_is_named_and_not_followed() {
    let Some(etcd) = Daemon::start() else { return };
    let (url, keys) = (etcd.url(), store(&etcd.url()));
    for wrong in [&b"nonsense"[..], b"", b"0.0.0.0:1", b"a:1\n", b"\xff\xfe", &[b'a'; 4096]] {
        put(&keys, CONTROLLER, wrong).await;
        let error = finder(&url).find().await.unwrap_err().to_string();
        assert!(error.contains("/jobs/job/controller holds no HOST:PORT"), "{error}");
        let error = refusal(campaign(&url, "b:1", Holders::default()).await);
        assert!(error.contains("/jobs/job/controller"), "{error}");
    }
    delete(&keys, CONTROLLER).await;
    assert!(matches!(finder(&url).find().await, Err(RendezvousError::Unreachable { .. })));

    let whole = record::text(JOB, commit(3));
    let damaged = whole.replace("version 3", "version 4");
    for wrong in [damaged.as_bytes(), b"", b"\xff", &[b'a'; 60_000]] {
        put(&keys, COMMITTED, wrong).await;
        let error = refusal(campaign(&url, "b:1", Holders::default()).await);
        assert!(error.contains("/jobs/job/committed") || error.contains("an answer of more than"), "{error}");
        assert_eq!(value(&keys, CONTROLLER).await, None, "it took charge");
    }
    put(&keys, COMMITTED, record::text("another", commit(3)).as_bytes()).await;
    let error = refusal(campaign(&url, "b:1", Holders::default()).await);
    assert!(error.contains("of the job 'another', not of 'job'"), "{error}");
    put(&keys, COMMITTED, whole.as_bytes()).await;
    assert_eq!(elected(&url, "b:1").await.last, Some(commit(3)));
}

#[tokio::test(flavor = "multi_thread")]
async fn user_and_password_come_from_the_environment() {
    let Some(mut etcd) = Daemon::start() else { return };
    let url = etcd.url();
    let open = store(&url);
    for (path, body) in [
        ("/v3/auth/user/add", json!({ "name": "root", "password": "right" })),
        ("/v3/auth/role/add", json!({ "name": "root" })),
        ("/v3/auth/user/grant", json!({ "user": "root", "role": "root" })),
        ("/v3/auth/enable", json!({})),
    ] {
        open.gateway.patiently(|| open.gateway.call(path, &body)).await.unwrap();
    }
    let with = |password: &'static str| {
        let variable = move |name: &str| match name {
            USER_VARIABLE => Some("root".to_owned()),
            PASSWORD_VARIABLE => Some(password.to_owned()),
            _ => None,
        };
        Store::new(&url, JOB, DEADLINE, &variable).unwrap()
    };
    for closed in [open, with("wrong")] {
        let failure = closed.look([CONTROLLER]).await.unwrap_err();
        assert!(matches!(failure, Failure::Refused(_)), "{failure:?}");
    }
    let right = with("right");
    put(&right, COMMITTED, b"x").await;
    // It forgets its tokens when it is started again.
    etcd.stop();
    etcd.resume();
    put(&right, COMMITTED, b"y").await;
    assert_eq!(value(&right, COMMITTED).await.unwrap().value, b"y");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_server_is_asked_where_one_is_away() {
    let Some(etcd) = Daemon::start() else { return };
    // Port 1 has no server.
    let url = format!("etcd://127.0.0.1:1,{}/jobs", etcd.endpoint());
    put(&store(&url), COMMITTED, b"x").await;
    assert_eq!(value(&store(&etcd.url()), COMMITTED).await.unwrap().value, b"x");
}

/// Something that is no etcd, or a hostile one.
async fn impostor(answer: Vec<u8>) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("etcd://{}/jobs", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let _ = stream.read(&mut [0; 4096]).await;
            let _ = stream.write_all(&answer).await;
        }
    });
    url
}

#[tokio::test]
async fn an_answer_that_is_none_harms_nobody() {
    let ok =
        |body: &str| format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes();
    let entry = r#"{"create_revision":"1","mod_revision":"1","value":"!"}"#;
    let one = format!(r#"{{"header":{{}},"responses":[{{"response_range":{{"kvs":[{entry}]}}}}]}}"#);
    for (answer, reason) in [
        (ok(&"[".repeat(50_000)), "does not answer"),
        (ok(&" ".repeat(1 << 20)), "an answer of more than"),
        (ok("{}"), "that etcd does not give"),
        (ok(r#"{"header":{}}"#), "for each key is missing"),
        (ok(r#"{"header":{"revision":7}}"#), "that etcd does not give"),
        (ok(r#"{"header":{"revision":"99999999999999999999"}}"#), "that etcd does not give"),
        (ok(&one), "that etcd does not give"),
        (b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n".to_vec(), "302"),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_vec(), "JSON gateway"),
    ] {
        let failure = store(&impostor(answer).await).look([CONTROLLER]).await.unwrap_err();
        assert!(matches!(&failure, Failure::Refused(told) if told.contains(reason)), "{failure:?}");
    }
    for answer in [&b""[..], b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{"] {
        let failure = store(&impostor(answer.to_vec()).await).look([CONTROLLER]).await.unwrap_err();
        assert!(matches!(failure, Failure::Away(_)), "{failure:?}");
    }
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread")]
async fn etcd_is_believed_by_its_certificate() {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: String| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let authority = |name: &str| {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        (write(name, issuer.pem()), issuer)
    };
    let (ca, issuer) = authority("ca.pem");
    let (other, _) = authority("other.pem");
    let key = KeyPair::generate().unwrap();
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    let (certificate, key) = (write("etcd.pem", certificate.pem()), write("etcd.key", key.serialize_pem()));
    let Some(etcd) = Daemon::start_with(Some([ca.clone(), certificate.clone(), key.clone()])) else { return };

    let with = |set: Vec<(&'static str, String)>| {
        let variable =
            move |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone());
        Store::new(&etcd.url(), JOB, Duration::from_secs(6), &variable)
    };
    let own = vec![
        ("WEIGHTSYNC_ETCD_CA", ca.clone()),
        ("WEIGHTSYNC_ETCD_CERT", certificate.clone()),
        ("WEIGHTSYNC_ETCD_KEY", key),
    ];
    put(&with(own).unwrap(), COMMITTED, b"x").await;

    // It asks for a certificate of ours, and we do not take any of its.
    for (authority, reason) in [(ca.clone(), "received fatal alert"), (other, "invalid peer certificate")] {
        let store = with(vec![("WEIGHTSYNC_ETCD_CA", authority)]).unwrap();
        let failure = store.look([COMMITTED]).await.unwrap_err().to_string();
        assert!(failure.contains(reason), "{failure}");
    }
    let plain = etcd.url().replace("etcds:", "etcd:");
    assert!(store(&plain).look([COMMITTED]).await.is_err());
    for (set, named) in [
        (vec![], "WEIGHTSYNC_ETCD_CA"),
        (vec![("WEIGHTSYNC_ETCD_CA", "/nonexistent".to_owned())], "/nonexistent"),
        (vec![("WEIGHTSYNC_ETCD_CA", ca), ("WEIGHTSYNC_ETCD_CERT", certificate)], "WEIGHTSYNC_ETCD_KEY"),
    ] {
        let error = with(set).unwrap_err();
        assert!(error.contains(named), "{error}");
    }
}
