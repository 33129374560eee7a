//! What an operator sees of a real job: metrics over HTTP, and logs that name one attempt alike on every rank.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tracing_subscriber::fmt::MakeWriter;
use weightsync::metrics::Metrics;
use weightsync::{
    Controller, DType, Error, Fabric, Inference, InferenceSession, ParamMap, ServerConfig, SessionConfig,
    TensorBox, TensorSpec, Trainer, TrainerSession, World,
};

const WORLD: World = World { trainers: 2, inference: 1 };
const COLUMNS: u64 = 100;
const DEADLINE: Duration = Duration::from_secs(3);

async fn trainer(mut config: SessionConfig, rank: u32) -> TrainerSession {
    config.rank = rank;
    let mut trainer = Trainer::new(config);
    let bounds = TensorBox::new(&[u64::from(rank), 0], &[1, COLUMNS]).unwrap();
    let (dtype, shape) = (DType::U8, vec![2, COLUMNS]);
    trainer.allocate(vec![TensorSpec { name: "w".into(), dtype, shape, bounds }]).unwrap();
    trainer.connect().await.unwrap()
}

async fn inference(config: SessionConfig) -> InferenceSession {
    let mut inference = Inference::new(config);
    inference.register("w", DType::U8, &[2, COLUMNS], ParamMap::tensor("w")).unwrap();
    inference.connect().await.unwrap()
}

/// Version 1, an attempt at version 2 that one trainer does not begin, and version 2.
async fn play(metrics: &Metrics) {
    let mut server = ServerConfig::loopback(WORLD).unwrap();
    server.controller.deadline = DEADLINE;
    let mut counted = metrics.controller(WORLD);
    let server = Controller::bind(server).await.unwrap().spawn(move |report| counted.observe(&report));
    let mut config = SessionConfig::new(server.local_addr().to_string(), WORLD, 0);
    (config.fabric, config.deadline, config.metrics) = (Fabric::Local, DEADLINE, metrics.clone());
    let (mut a, mut b, mut serving) =
        tokio::join!(trainer(config.clone(), 0), trainer(config.clone(), 1), inference(config.clone()));
    let (first, second, served) = tokio::join!(a.push(1), b.push(1), serving.wait_version(1, None));
    assert!(first.is_ok() && second.is_ok() && served.is_ok());
    assert!(matches!(a.push(2).await, Err(Error::Aborted { .. })));
    let (first, second, served) = tokio::join!(a.push(2), b.push(2), serving.wait_version(2, None));
    assert!(first.is_ok() && second.is_ok() && served.is_ok());
    let ((), (), _) = tokio::join!(a.leave(), b.leave(), serving.wait_version(3, None));
    assert_eq!(server.ended().await, None);
}

fn scrape(address: SocketAddr) -> BTreeMap<String, f64> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: test\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    let series = body.lines().filter(|line| !line.starts_with('#')).map(|line| {
        let (name, value) = line.rsplit_once(' ').unwrap();
        (name.to_owned(), value.parse().unwrap())
    });
    series.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_counted_and_scraped() {
    let metrics = Metrics::new();
    let endpoint = metrics.serve("127.0.0.1:0").await.unwrap();
    play(&metrics).await;
    let address = endpoint.local_addr();
    let series = tokio::task::spawn_blocking(move || scrape(address)).await.unwrap();
    for (name, value) in [
        (r#"weightsync_pushes_total{side="trainer",rank="0",result="committed"}"#, 2.0),
        (r#"weightsync_pushes_total{side="trainer",rank="0",result="aborted"}"#, 1.0),
        (r#"weightsync_pushes_total{side="trainer",rank="1",result="aborted"}"#, 0.0),
        (r#"weightsync_pushes_total{side="inference",rank="0",result="committed"}"#, 2.0),
        (r#"weightsync_retries_total{side="trainer",rank="0"}"#, 1.0),
        (r#"weightsync_version{side="trainer",rank="1"}"#, 2.0),
        (r#"weightsync_version{side="inference",rank="0"}"#, 2.0),
        (r#"weightsync_torn{side="inference",rank="0"}"#, 0.0),
        (r#"weightsync_transferred_bytes_total{side="inference",rank="0"}"#, 400.0),
        (r#"weightsync_stage_seconds_count{side="trainer",rank="1",stage="write"}"#, 2.0),
        (r#"weightsync_controller_version"#, 2.0),
        (r#"weightsync_controller_commits_total"#, 2.0),
        (r#"weightsync_controller_planned_bytes"#, 200.0),
        (r#"weightsync_controller_aborts_total{reason="deadline"}"#, 1.0),
        (r#"weightsync_controller_losses_total{side="inference"}"#, 0.0),
        (r#"weightsync_controller_members{side="trainer"}"#, 0.0),
        (r#"weightsync_controller_push_seconds_count"#, 2.0),
    ] {
        assert_eq!(series.get(name), Some(&value), "{name}");
    }
    let rails = |metric: &str| {
        let prefix = format!("{metric}{{side=\"trainer\"");
        series.iter().filter(|(name, _)| name.starts_with(&prefix)).map(|(_, value)| *value).sum::<f64>()
    };
    assert_eq!((rails("weightsync_rail_up"), rails("weightsync_rail_bytes_total")), (2.0, 400.0));
}

/// What is logged, line by line.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Lines;

    fn make_writer(&'a self) -> Lines {
        self.clone()
    }
}

/// On a runtime of this thread alone, so that all of its logs and no other test's come here.
#[tokio::test]
async fn an_attempt_has_one_name_in_the_logs_of_all_ranks() {
    let lines = Lines::default();
    let logs = tracing_subscriber::fmt().json().flatten_event(true).with_writer(lines.clone());
    let _guard = tracing::subscriber::set_default(logs.with_max_level(tracing::Level::DEBUG).finish());
    play(&Metrics::new()).await;
    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |version: u64, message: &str| -> BTreeMap<String, BTreeSet<String>> {
        let mut pushes = BTreeMap::<String, BTreeSet<String>>::new();
        for line in lines.iter().filter(|line| line["message"] == message && line["version"] == version) {
            let rank = line["rank"].as_str().unwrap_or("controller").to_owned();
            pushes.entry(rank).or_default().insert(line["push"].as_str().unwrap().to_owned());
        }
        pushes
    };
    let mut seen = BTreeSet::new();
    for version in [1, 2] {
        let committed = of(version, "committed");
        let ranks: Vec<&String> = committed.keys().collect();
        assert_eq!(ranks, ["controller", "inference 0", "trainer 0", "trainer 1"], "{text}");
        let pushes: BTreeSet<&String> = committed.values().flatten().collect();
        assert_eq!(pushes.len(), 1, "{committed:?}");
        assert!(seen.insert(pushes.into_iter().next().unwrap().clone()));
    }
    // The attempt that failed has another name, and says in which stage. Its trainer has not heard the name.
    let aborted = of(2, "push aborted");
    assert!(aborted["controller"].is_disjoint(&seen), "{aborted:?}");
    let failed: Vec<&Value> = lines.iter().filter(|line| line["message"] == "push failed").collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    let line = failed[0];
    assert_eq!(
        (&line["rank"], &line["stage"], &line["level"]),
        (&"trainer 0".into(), &"wait for trainers".into(), &"WARN".into())
    );
    assert!(line["error"].as_str().unwrap().contains("trainer 1"), "{line}");
}
