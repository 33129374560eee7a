//! The summary: what a person wants to know of a simulated push, on one screen.

use std::fmt::Write;

use xfer_sim::{Semantics, Slow};

use super::facts::{ClusterFacts, Facts};
use crate::table::{bytes_text, seconds_text};

pub(crate) fn text(facts: &Facts) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut text, facts);
    text.trim_end().to_owned()
}

/// The cluster and what of it decides.
pub(crate) fn cluster_text(facts: &ClusterFacts) -> String {
    let (host, nic) = (&facts.cluster.host, &facts.cluster.nic);
    let micros = nic.latency_nanoseconds.saturating_add(nic.completion_nanoseconds) / 1000;
    let plural = |count: u32| if count == 1 { "" } else { "s" };
    format!(
        "{}: {} GPU{} and {} NIC{} a host, {}/s a NIC, {}, {micros} us a WRITE",
        facts.name,
        host.gpus,
        plural(host.gpus),
        host.nics,
        plural(host.nics),
        bytes_text(facts.payload_bytes_per_second),
        match nic.semantics {
            Semantics::Srd => "SRD",
            Semantics::Rc => "RC",
            Semantics::Tcp => "TCP",
        },
    )
}

fn write(text: &mut String, facts: &Facts) -> std::fmt::Result {
    let Facts { job, cluster, report, .. } = facts;
    writeln!(text, "simulated on {}", cluster_text(cluster))?;
    writeln!(text, "{}", job.title)?;
    writeln!(text, "{}", job.subtitle)?;
    if let Some(conditions) = conditions_text(facts) {
        writeln!(text, "{conditions}")?;
    }
    writeln!(text)?;
    let Some(push) = facts.push() else { return Ok(()) };
    let versions = match report.pushes.len() {
        1 => String::new(),
        versions => format!(", the last of {versions} versions: {}", seconds_of_all(facts)),
    };
    writeln!(text, "to commit    {}{versions}", seconds_text(push.seconds))?;
    match (facts.ratio, report.bound_by) {
        (Some(ratio), Some(rank)) => {
            let bound = seconds_text(report.bound_seconds);
            writeln!(
                text,
                "lower bound  {bound}, by the NICs of {rank}; simulated is {ratio:.3} times as long"
            )?;
        }
        _ => writeln!(text, "lower bound  none: nothing moves")?,
    }
    let predicted = seconds_text(facts.predicted_seconds);
    writeln!(text, "predicted    {predicted} by the plan's cost model")?;
    let (bytes, relayed) = (bytes_text(report.bytes), bytes_text(report.relayed_bytes));
    writeln!(text, "moves        {bytes} in {} WRITEs; receivers pass on {relayed} of it", report.writes)?;
    let percent =
        |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.1} %", share * 100.0));
    writeln!(
        text,
        "NICs         trainers send at {} and receivers receive at {} of their rate, mean of the transfer",
        percent(facts.utilisation.trainers_out),
        percent(facts.utilisation.receivers_in)
    )?;
    writeln!(text)?;
    writeln!(text, "critical path, of {}, which was last:", push.last)?;
    for stage in push.critical_path.iter().filter(|stage| stage.seconds > 0.0) {
        let share = stage.seconds / push.seconds.max(f64::MIN_POSITIVE) * 100.0;
        writeln!(text, "  {:>9.3} ms  {share:>5.1} %  {}", stage.seconds * 1e3, stage.stage.text())?;
    }
    writeln!(text, "slowest ranks:")?;
    for slow in &facts.slowest {
        let longest = slow.longest.map_or_else(String::new, |stage| {
            format!(", of that {:.3} ms {}", stage.seconds * 1e3, stage.stage.text())
        });
        writeln!(text, "  {:>9.3} ms  {}{longest}", slow.written_at * 1e3, slow.rank)?;
    }
    let (wall, rate) = (seconds_text(facts.wall_seconds), facts.events_per_second / 1e6);
    writeln!(text, "{} events in {wall} of this machine, {rate:.2} M a second", report.events)?;
    if facts.exchanges > 0 {
        let ranges = facts.exchanges;
        writeln!(
            text,
            "not simulated: messages of trainers about scales, for {ranges} ranges of blocks that borders cut"
        )?;
    }
    Ok(())
}

/// All that is unlike a plain run, in words; none if nothing is.
pub(crate) fn conditions_text(Facts { conditions, cluster, .. }: &Facts) -> Option<String> {
    let mut unlike: Vec<String> = conditions.slow.iter().map(slow_text).collect();
    if conditions.skew_seconds > 0.0 {
        unlike.push(format!("trainers ready over {}", seconds_text(conditions.skew_seconds)));
    }
    if let Some(racks) = cluster.cluster.racks {
        let uplink = bytes_text(racks.uplink_bytes_per_second);
        unlike.push(format!("racks of {} hosts with uplinks of {uplink}/s", racks.hosts));
    }
    (!unlike.is_empty()).then(|| format!("with {}", unlike.join("; ")))
}

fn slow_text(Slow { rank, factor, nic }: &Slow) -> String {
    let nic = nic.map_or_else(String::new, |nic| format!("'s NIC {nic}"));
    format!("{rank}{nic} at {factor} of its speed")
}

fn seconds_of_all(facts: &Facts) -> String {
    let all = facts.report.pushes.iter().map(|push| push.seconds);
    let (least, most) = (all.clone().fold(f64::INFINITY, f64::min), all.fold(0.0, f64::max));
    format!("{} to {}", seconds_text(least), seconds_text(most))
}
