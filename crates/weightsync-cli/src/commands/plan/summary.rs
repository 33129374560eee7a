//! The summary: what a person wants to know of a plan, on one screen.

use std::fmt::Write;

use xfer_plan::report::{Nics, RouteUse};
use xfer_plan::{Relay, Resource, Route};

use super::Facts;
use crate::table::{Table, bytes_text, seconds_text};

/// Longer lines, of long names, are cut.
const COLUMNS: usize = 100;

/// Kinds of groups that are listed.
const ROUTES_MAX: usize = 2;

pub(crate) fn text(facts: &Facts<'_>) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write(&mut text, facts);
    let line = |line: &str| match line.char_indices().nth(COLUMNS) {
        None => line.to_owned(),
        Some(_) => line.chars().take(COLUMNS - 3).chain("...".chars()).collect(),
    };
    text.lines().map(line).collect::<Vec<String>>().join("\n")
}

fn write(text: &mut String, Facts { job, report, checked_in_seconds }: &Facts<'_>) -> std::fmt::Result {
    let counts = &report.counts;
    writeln!(text, "{}", job.title)?;
    writeln!(text, "{}", job.subtitle)?;
    writeln!(
        text,
        "plan {}: {} transfers, {} operations, {} WRITEs",
        report.plan_digest.get(..16).unwrap_or_default(),
        counts.transfers,
        counts.operations,
        counts.trainer_writes
    )?;
    let payload = &report.payload;
    writeln!(
        text,
        "moves {}: {} over trainers' NICs, {} over receivers' NICs, {} over NVLink",
        bytes_text(payload.arrives_bytes),
        bytes_text(payload.trainer_nic_bytes),
        bytes_text(payload.receiver_nic_bytes),
        bytes_text(payload.nvlink_bytes)
    )?;
    let mut routes: Vec<String> = report.routes.iter().take(ROUTES_MAX).map(route_text).collect();
    if report.routes.len() > ROUTES_MAX {
        routes.push(format!("{} more", report.routes.len() - ROUTES_MAX));
    }
    let asked = if report.relay == Relay::Auto { "auto: " } else { "" };
    let routes = if routes.is_empty() { "none".to_owned() } else { routes.join("; ") };
    writeln!(text, "routes {asked}{routes}")?;
    writeln!(text)?;
    let mut table = Table::new(&["bytes per NIC", "NICs", "min", "median", "max", "mean", "imbalance"]);
    let mut row = |name: &str, Nics { nics, .. }: &Nics| {
        let figures = [nics.min, nics.median, nics.max, nics.mean].map(bytes_text);
        let imbalance = nics.imbalance.map_or_else(|| "-".to_owned(), |imbalance| format!("{imbalance:.3}"));
        let first = [name.to_owned(), nics.count.to_string()];
        table.row(first.into_iter().chain(figures).chain([imbalance]).collect());
    };
    row("trainers send", &report.trainers.sends);
    row("receivers receive", &report.receivers.receives);
    if payload.receiver_nic_bytes > 0 {
        row("receivers pass on", &report.receivers.passes_on);
    }
    writeln!(text, "{}", table.render())?;
    writeln!(text)?;
    let bound = &report.bound;
    if let Some((rank, resource)) = bound.limited_by {
        let (bytes, rate) = (bytes_text(bound.bytes), bytes_text(bound.bytes_per_second));
        let bound = seconds_text(bound.seconds());
        writeln!(text, "lower bound  {bound}: {rank} {} {bytes} at {rate}/s", resource.verb())?;
    }
    match report.predicted.limited_by {
        None => writeln!(text, "nothing moves")?,
        Some((rank, resource)) => {
            let predicted = seconds_text(report.predicted_seconds);
            let busiest = seconds_text(report.predicted.busiest_nanoseconds as f64 / 1e9);
            writeln!(text, "predicted    {predicted}: {rank} {} for {busiest}", resource.verb())?;
        }
    }
    let steps = &report.timeline;
    if let (Some(first), Some(middle)) = (steps.first(), steps.get(steps.len() / 2)) {
        let seconds = |nanoseconds: u64| seconds_text(nanoseconds as f64 / 1e9);
        let (first, half) = (seconds(first.nanoseconds), seconds(middle.nanoseconds));
        writeln!(
            text,
            "predicted    first of {} priorities complete after {first}, half after {half}",
            steps.len()
        )?;
    }
    let staging = &report.staging;
    match staging.trainer {
        None => writeln!(text, "staging      none")?,
        Some(trainer) => writeln!(
            text,
            "staging      {} of {} in the largest of {} wave(s) of {trainer}, which stages most",
            bytes_text(staging.largest_wave_bytes),
            bytes_text(staging.watermark_bytes),
            staging.waves,
        )?,
    }
    let exchanges = &report.exchanges;
    if exchanges.blocks > 0 {
        let (blocks, bytes) = (exchanges.blocks, bytes_text(exchanges.bytes));
        writeln!(text, "exchanges    {bytes} between trainers, for {blocks} blocks that shard borders cut")?;
    }
    if let Some(seconds) = checked_in_seconds {
        writeln!(text, "check        passed in {}", seconds_text(*seconds))?;
    }
    writeln!(text, "busiest ranks, predicted:")?;
    for busy in &report.busiest {
        let (rank, host) = (busy.rank.to_string(), &busy.host);
        let amount = match busy.resource {
            Resource::Posts => format!("{} WRITEs", busy.amount),
            _ => bytes_text(busy.amount),
        };
        let seconds = seconds_text(busy.nanoseconds as f64 / 1e9);
        writeln!(text, "  {seconds:>8}  {rank} on {host} {} {amount}", busy.resource.verb())?;
    }
    Ok(())
}

fn route_text(of: &RouteUse) -> String {
    let how = match of.route {
        Route::Direct => "direct",
        Route::PerHost => "per host",
        Route::Chain => "chain",
    };
    let RouteUse { groups, members, hosts, .. } = of;
    let plural = if *groups == 1 { "group" } else { "groups" };
    format!("{how} to {groups} {plural} of {members} on {hosts} host(s)")
}
