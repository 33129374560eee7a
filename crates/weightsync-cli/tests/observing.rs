//! `weightsync status`, `--metrics` and the logs, beside real processes.

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;

use common::job::{Cluster, Job, Process};
use common::tiny;
use serde_json::Value;

/// More than can be pushed while a test lasts.
const STEPS: u32 = 10_000_000;

/// Lines of a terminal, and columns.
const WIDTH: usize = 80;

fn status(cluster: &Cluster, more: &str) -> String {
    cluster.job.run(&format!("status {} {more}", cluster.address)).succeeds().stdout
}

fn json(cluster: &Cluster) -> Value {
    serde_json::from_str(&status(cluster, "--json")).unwrap()
}

/// The page that a process serves: its log says where.
fn scrape(process: &mut Process) -> String {
    let line = process.wait_for("metrics");
    let line: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let mut stream = TcpStream::connect(line["address"].as_str().unwrap()).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    answer
}

#[test]
fn a_running_job_is_seen_from_outside() {
    let (cluster, controller) = Cluster::start("local", 1, 1);
    let checkpoint = tiny();
    let before = json(&cluster);
    assert_eq!((&before["phase"], &before["committed"]), (&"joining".into(), &0.into()));
    assert_eq!(before["waiting_for"], serde_json::json!(["trainer 0", "inference 0"]));

    let log = "--metrics 0 --log-format json";
    let start = |side: &str, more: &str| {
        let line = cluster.arguments(side, 0, checkpoint.path());
        let mut command = cluster.job.command(format!("{line} {log} {more}").split_whitespace());
        cluster.job.spawn(command.env("WEIGHTSYNC_LOG", "weightsync=info"))
    };
    let mut serve = start("serve", "");
    let mut push = start("push", &format!("--steps {STEPS} --pause 0"));
    push.wait_for(r#""pushed","version":3,"#);
    serve.wait_for(r#""served","version":3,"#);

    let facts = json(&cluster);
    assert!(facts["committed"].as_u64().unwrap() >= 3, "{facts}");
    let ranks = facts["ranks"].as_array().unwrap();
    assert_eq!((&ranks[0]["rank"], &ranks[1]["rank"]), (&"trainer 0".into(), &"inference 0".into()));
    assert!(ranks[0]["address"].as_str().unwrap().starts_with("127.0.0.1:"), "{facts}");
    assert_eq!(ranks[0]["rails"].as_array().unwrap().len(), 1, "{facts}");
    assert!(ranks[0]["rails"][0]["gb_per_second"].as_f64().unwrap() > 0.0, "{facts}");
    assert!(facts["attempts"][0]["aborted"].is_null(), "{facts}");
    // No terminal: once, and no control character.
    let text = status(&cluster, "");
    for word in [
        "job default at ",
        "1 of 1 trainers, 1 of 1 inference ranks",
        "trainer 0",
        "inference 0",
        "committed; ",
    ] {
        assert!(text.contains(word), "{word:?} is not in\n{text}");
    }
    assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text}");

    let page = scrape(&mut push);
    assert!(
        page.contains(r#"weightsync_pushes_total{side="trainer",rank="0",result="committed"} "#),
        "{page}"
    );
    let page = scrape(&mut serve);
    assert!(page.contains(r#"weightsync_torn{side="inference",rank="0"} "#), "{page}");
    serve.kill().was_killed();
    // In the middle of a push, or between its commit and the confirmation.
    let last = push.finish().fails(1, &["inference 0", "lost"]);
    // To the last word.
    for line in last.stderr.lines() {
        let line: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {last}"));
        assert!(line["level"].is_string() && line["message"].is_string(), "{line}");
    }
    controller.finish().fails(1, &["inference 0 was lost"]);
    cluster.job.end();
}

#[test]
fn a_controller_counts_strangers() {
    let job = Job::new();
    let line =
        "controller --listen 127.0.0.1:0 --trainers 1 --inference 1 --json --metrics 0 --log-format json";
    let mut command = job.command(line.split_whitespace());
    let secrets = [("WEIGHTSYNC_LOG", "info"), ("WEIGHTSYNC_SECRET", "right")];
    let mut controller = job.spawn(command.envs(secrets));
    let address = common::job::listening_at(&mut controller);
    let wrong = job.run(&format!("status {address} --once"));
    wrong.fails(1, &["does not know this job's secret"]);
    controller.wait_for(r#""refusal":"secret""#);
    let page = scrape(&mut controller);
    assert!(page.contains(r#"weightsync_controller_refused_connections_total{reason="secret"} 1"#), "{page}");
    controller.kill().was_killed();
    job.end();
}

#[test]
fn nobody_there_is_an_error_in_time() {
    let job = Job::new();
    job.run("status 127.0.0.1:1 --timeout 0.2").fails(1, &["cannot reach the controller at 127.0.0.1:1"]);
    job.end();
}
