//! `weightsync controller`: the control plane of a job, in a process of its own.

use anyhow::bail;
use serde_json::json;
use weightsync::metrics::Metrics;
use weightsync::{Controller, Record, Report, ServerConfig};

use crate::args::ControllerArgs;
use crate::say::say;
use crate::table::{bytes_text, seconds_text};

pub(crate) async fn run(args: ControllerArgs) -> anyhow::Result<()> {
    let world = args.job.world();
    let secret = args.job.access.secret()?;
    // A variable that is set to nothing is not set.
    let record = match (args.record, args.rendezvous.filter(|url| !url.is_empty())) {
        (_, Some(url)) => Record::Etcd { url, advertise: args.advertise },
        (Some(path), None) => Record::File(path),
        (None, None) => Record::Nowhere,
    };
    let mut server = ServerConfig {
        listen: args.listen,
        secret,
        transport: args.job.access.transport(None)?,
        insecure: args.insecure,
        record,
        ..ServerConfig::loopback(world)?
    };
    server.controller.job = args.job.job;
    server.controller.deadline = args.deadline;
    server.controller.options = args.plan.options();
    server.controller.verify = args.checksums.verify;
    server.controller.on_loss = args.on_loss;
    let controller = Controller::bind(server).await?;
    let address = controller.local_addr();
    if args.json {
        say!("{}", json!({ "event": "listening", "address": address.to_string() }));
    } else {
        say!("listening on {address} for {world}");
    }
    let metrics = Metrics::new();
    let _page = args.metrics.serve(&metrics).await?;
    let mut counted = metrics.controller(world);
    let observe = |report| {
        counted.observe(&report);
        print(&report, args.json);
    };
    match controller.run(observe).await {
        None => Ok(()),
        Some(reason) => bail!("{reason}"),
    }
}

fn print(report: &Report, json: bool) {
    if json {
        say!("{}", as_json(report));
    } else if let Some(line) = as_text(report) {
        say!("{line}");
    }
}

/// One object per event, with the same facts as the text.
pub(crate) fn as_json(report: &Report) -> serde_json::Value {
    match report {
        Report::StandingBy { holder } => json!({ "event": "standing_by", "holder": holder }),
        Report::InCharge { version } => json!({ "event": "in_charge", "version": version }),
        Report::Joined(member) => json!({ "event": "joined", "rank": member.to_string() }),
        Report::Left(member) => json!({ "event": "left", "rank": member.to_string() }),
        Report::Lost { rank, reason } => {
            json!({ "event": "lost", "rank": rank.to_string(), "reason": reason })
        }
        Report::Refused { peer, refusal, reason } => {
            json!({ "event": "refused", "peer": peer, "refusal": refusal.name(), "reason": reason })
        }
        Report::Regrouping { reason } => json!({ "event": "regrouping", "reason": reason }),
        Report::Planned { digest, bytes, writes, bound_seconds, limited_by, without } => json!({
            "event": "planned",
            "digest": digest.to_string(),
            "bytes": bytes,
            "writes": writes,
            "bound_seconds": bound_seconds,
            "limited_by": limited_by.map(|rank| rank.to_string()),
            "without": without.iter().map(ToString::to_string).collect::<Vec<_>>(),
        }),
        Report::Started => json!({ "event": "started" }),
        Report::Pushing { version, push } => {
            json!({ "event": "pushing", "version": version, "push": push.to_string() })
        }
        Report::Committed { version, push, elapsed } => json!({
            "event": "committed",
            "version": version,
            "push": push.to_string(),
            "seconds": elapsed.as_secs_f64(),
        }),
        Report::Aborted { version, push, stage, cause, reason } => json!({
            "event": "aborted",
            "version": version,
            "push": push.to_string(),
            "stage": stage.name(),
            "cause": cause.name(),
            "reason": reason,
        }),
        Report::Ended { reason } => json!({ "event": "ended", "reason": reason }),
    }
}

fn as_text(report: &Report) -> Option<String> {
    Some(match report {
        Report::StandingBy { holder } => {
            format!("standing by: the controller at {holder} is in charge")
        }
        Report::InCharge { version: None } => "in charge: nothing was committed before".into(),
        Report::InCharge { version: Some(version) } => {
            format!("in charge: version {version} was committed last")
        }
        Report::Joined(member) => format!("{member} joined"),
        Report::Left(member) => format!("{member} left"),
        Report::Regrouping { reason } => format!("everybody joins again: {reason}"),
        Report::Planned { digest, bytes, writes, bound_seconds, limited_by, without } => {
            let limit = limited_by.map(|rank| format!(", limited by {rank}")).unwrap_or_default();
            let digest = digest.to_string();
            let without = match without.as_slice() {
                [] => String::new(),
                lost => format!(
                    ", without {}",
                    lost.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
                ),
            };
            format!(
                "plan {}: {} in {writes} writes, lower bound {}{limit}{without}",
                digest.get(..12).unwrap_or(&digest),
                bytes_text(*bytes),
                seconds_text(*bound_seconds),
            )
        }
        Report::Started => "all ranks are connected".into(),
        Report::Pushing { version, .. } => format!("version {version} begins"),
        Report::Committed { version, elapsed, .. } => {
            format!("version {version} committed after {}", seconds_text(elapsed.as_secs_f64()))
        }
        Report::Aborted { version, reason, .. } => format!("version {version} aborted: {reason}"),
        Report::Ended { reason: None } => "all trainers have left".into(),
        // Said as the command's error, in the abort, or in the log.
        Report::Ended { reason: Some(_) } | Report::Lost { .. } | Report::Refused { .. } => return None,
    })
}
