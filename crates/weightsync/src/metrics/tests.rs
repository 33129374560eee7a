use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use rendezvous::controller::{Cause, Report, Stage};
use rendezvous::{PushId, Refusal, World};
use xfer_plan::{Digest, Rank, ReceiverRank, TrainerRank};

use super::*;
use crate::error::Error;
use crate::report::Span;
use crate::watch::Watch;

const T0: Rank = Rank::Trainer(TrainerRank(0));
const I0: Rank = Rank::Receiver(ReceiverRank(0));

/// Everything has been counted at least once, with names that have to be escaped.
fn counted() -> Metrics {
    let metrics = Metrics::new();
    let stages = [Span { name: "wait for trainers".into(), start_us: 0, duration_us: 1500 }];
    for rank in [T0, I0] {
        let of = metrics.rank(rank);
        of.committed(7, 1000, 0.25, &stages);
        of.ended(Ended::Aborted);
        of.retries.inc();
        of.deadlines.inc();
        of.refused_writes.inc_by(3);
        of.rail(0, "tcp://[::1]:1 (\"a\\b\"\nc)", false, 1000, 10);
    }
    let mut controller = metrics.controller(World { trainers: 1, inference: 1 });
    let (version, push, reason) = (7, PushId([1; 16]), "r".to_owned());
    for report in [
        Report::Joined(T0),
        Report::Joined(I0),
        Report::Planned {
            digest: Digest([0; 32]),
            bytes: 1000,
            writes: 1,
            bound_seconds: 1.0,
            limited_by: None,
            without: vec![I0],
        },
        Report::Regrouping { reason: reason.clone() },
        Report::Committed { version, push, elapsed: Duration::from_millis(250) },
        Report::Aborted {
            version,
            push,
            stage: Stage::Writing,
            cause: Cause::Deadline,
            reason: reason.clone(),
        },
        Report::Lost { rank: T0, reason: reason.clone() },
        Report::Left(I0),
        Report::Refused { peer: "a".into(), refusal: Refusal::Secret, reason },
    ] {
        controller.observe(&report);
    }
    metrics
}

#[test]
fn a_process_tells_of_what_it_runs_alone() {
    let metrics = Metrics::new();
    assert_eq!(metrics.text(), "# EOF\n");
    let rank = metrics.rank(T0);
    assert!(!metrics.text().contains("controller"), "{}", metrics.text());
    drop(rank);
    let metrics = Metrics::new();
    metrics.controller(World { trainers: 1, inference: 1 });
    let series = metrics.text();
    assert!(
        series.lines().all(|line| line.contains("weightsync_controller_") || line == "# EOF"),
        "{series}"
    );
}

/// The labels of a series, unescaped.
fn labels(text: &str) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (name, value) = rest.split_once("=\"").unwrap();
        let (mut found, mut escaped, mut end) = (String::new(), false, None);
        for (at, character) in value.char_indices() {
            match (escaped, character) {
                (true, 'n') => found.push('\n'),
                (true, other) => found.push(other),
                (false, '\\') => {}
                (false, '"') => {
                    end = Some(at + 1);
                    break;
                }
                (false, other) => found.push(other),
            }
            escaped = !escaped && character == '\\';
        }
        assert!(labels.insert(name.to_owned(), found).is_none(), "{text}");
        rest = &value[end.unwrap()..];
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
    labels
}

#[test]
fn every_line_of_the_page_parses_and_follows_the_conventions() {
    let text = counted().text();
    let lines: Vec<&str> = text.lines().collect();
    let (end, lines) = lines.split_last().unwrap();
    assert_eq!(*end, "# EOF");
    let (mut family, mut kind, mut unit, mut series) = ("", "", "", BTreeSet::new());
    for line in lines {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (what, name, told) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
            match what {
                "HELP" => {
                    assert!(!told.is_empty() && name.starts_with("weightsync_"), "{line}");
                    (family, kind, unit) = (name, "", "");
                }
                "TYPE" => kind = told,
                "UNIT" => unit = told,
                _ => panic!("{line}"),
            }
            assert_eq!(name, family, "{line}");
            continue;
        }
        let (name, value) = line.rsplit_once(' ').unwrap();
        assert!(value.parse::<f64>().unwrap() >= 0.0, "{line}");
        assert!(series.insert(name), "told twice: {line}");
        let (name, told) = name.split_once('{').unwrap_or((name, "}"));
        let labels = labels(told.strip_suffix('}').unwrap());
        let suffix = name.strip_prefix(family).unwrap_or_else(|| panic!("{line} is not of {family}"));
        assert!(unit.is_empty() || family.ends_with(unit), "{line}");
        match kind {
            "counter" => assert_eq!(suffix, "_total", "{line}"),
            "gauge" => assert_eq!(suffix, "", "{line}"),
            "histogram" => {
                assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}");
                assert_eq!(labels.contains_key("le"), suffix == "_bucket", "{line}");
            }
            _ => panic!("a {kind}: {line}"),
        }
        if let Some(rail) = labels.get("name") {
            assert_eq!(rail, "tcp://[::1]:1 (\"a\\b\"\nc)");
        }
    }
    for expected in [
        r#"weightsync_pushes_total{side="trainer",rank="0",result="committed"} 1"#,
        r#"weightsync_pushes_total{side="trainer",rank="0",result="failed"} 0"#,
        r#"weightsync_version{side="inference",rank="0"} 7"#,
        r#"weightsync_torn{side="inference",rank="0"} 0"#,
        r#"weightsync_transferred_bytes_total{side="trainer",rank="0"} 1000"#,
        r#"weightsync_stage_seconds_count{side="trainer",rank="0",stage="wait_for_trainers"} 1"#,
        r#"weightsync_controller_members{side="trainer"} 0"#,
        r#"weightsync_controller_losses_total{side="trainer"} 1"#,
        r#"weightsync_controller_losses_total{side="inference"} 0"#,
        "weightsync_controller_regroups_total 1",
        r#"weightsync_controller_aborts_total{reason="deadline"} 1"#,
        r#"weightsync_controller_refused_connections_total{reason="secret"} 1"#,
        r#"weightsync_controller_refused_connections_total{reason="timeout"} 0"#,
        "weightsync_controller_version 7",
        "weightsync_controller_planned_bytes 1000",
    ] {
        assert!(text.lines().any(|line| line == expected), "{expected} is not in\n{text}");
    }
    assert!(!text.contains(r#"weightsync_torn{side="trainer""#), "{text}");
}

/// The documentation lists every metric, and no other.
#[test]
fn the_documentation_names_every_metric() {
    let docs = include_str!("../../../../docs/observing.md");
    let text = counted().text();
    let suffix = |kind| if kind == "counter" { "_total" } else { "" };
    let told: BTreeSet<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .map(|line| line.split_once(' ').map(|(name, kind)| format!("{name}{}", suffix(kind))).unwrap())
        .collect();
    let rows = docs.lines().filter_map(|line| line.strip_prefix("| `weightsync_"));
    let listed = rows.map(|row| format!("weightsync_{}", row.split_once('`').unwrap().0)).collect();
    assert_eq!(told, listed);
}

#[test]
fn a_commit_that_not_all_confirmed_is_a_version_and_no_failure() {
    let metrics = Metrics::new();
    let mut watch = Watch::new(&metrics, Rank::Trainer(TrainerRank(0)));
    watch.began(7, None, "write");
    let members = vec![Rank::Receiver(ReceiverRank(1))];
    watch.failed(&Error::Unconfirmed { version: 7, members });
    watch.began(7, None, "write");
    let text = metrics.text();
    for (name, value) in [("version", 7), ("retries_total", 0)] {
        let line = format!("weightsync_{name}{{side=\"trainer\",rank=\"0\"}} {value}\n");
        assert!(text.contains(&line), "{line} is not in\n{text}");
    }
    watch.failed(&Error::Aborted { version: 7, reason: "no".into() });
    watch.began(7, None, "write");
    assert!(metrics.text().contains("weightsync_retries_total{side=\"trainer\",rank=\"0\"} 1\n"));
}
