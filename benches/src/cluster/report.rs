//! Writes a record as JSON, as Markdown and as plots.

use std::path::Path;

use anyhow::Context;

use super::options::Measure;
use super::record::{Measurement, Record};
use crate::series::Spread;
use crate::svg::{HeatMap, LineChart, Point};
use crate::table::Table;

const BANDWIDTH_FILE: &str = "bandwidth.svg";

/// Rails that the Markdown lists: those of 16 GPUs with 4 NICs, twice.
const RAIL_ROWS_MAX: usize = 128;

/// Makes the folder before anything is measured, so that a wrong path costs nothing.
pub(crate) fn prepare(out: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make the folder {}", out.display()))
}

/// Writes everything into the folder.
pub(crate) fn write(record: &Record, out: &Path) -> anyhow::Result<()> {
    let mut files = vec![
        ("results.json".to_owned(), serde_json::to_string_pretty(record)? + "\n"),
        ("results.md".to_owned(), markdown(record)),
    ];
    files.extend(plots(record).into_iter().map(|plot| (plot.file, plot.svg)));
    for (file, text) in files {
        let path = out.join(file);
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

struct Plot {
    file: String,
    title: String,
    svg: String,
}

fn plots(record: &Record) -> Vec<Plot> {
    let use_over_time =
        record.measurements.iter().filter(|measurement| measurement.measure != Measure::Pair).map(
            |measurement| use_plot(measurement, &format!("use-{:?}.svg", measurement.measure).to_lowercase()),
        );
    bandwidth_plot(record).into_iter().chain(use_over_time).collect()
}

/// Bandwidth by message size; `None` where that was not measured.
fn bandwidth_plot(record: &Record) -> Option<Plot> {
    let pairs: Vec<(&Measurement, u64)> = record
        .measurements
        .iter()
        .filter_map(|measurement| Some((measurement, measurement.message_bytes?)))
        .collect();
    let (first, _) = pairs.first()?;
    let limit = first.line_rate().map(|rate| (rate, "line rate"));
    let point = |(measurement, bytes): &(&Measurement, u64)| {
        let Spread { median, min, max } = measurement.bandwidth().spread();
        Point { x: *bytes as f64, label: binary(*bytes), median, min, max }
    };
    let mut points: Vec<Point> = pairs.iter().map(point).collect();
    points.sort_by(|a, b| a.x.total_cmp(&b.x));
    let title = "One trainer to one receiver, by message size".to_owned();
    let svg = LineChart {
        title: &title,
        x_title: "bytes of a WRITE",
        y_title: "GB/s, median with least and most",
        points: &points,
        limit,
    }
    .draw();
    Some(Plot { file: BANDWIDTH_FILE.into(), title, svg })
}

fn use_plot(measurement: &Measurement, file: &str) -> Plot {
    let title = format!("What each trainer delivered over time: {}", measurement.name);
    let rows: Vec<(String, Vec<(f64, f64)>)> = measurement
        .trainers
        .iter()
        .map(|of| {
            let samples = of.samples.iter().map(|&(second, bytes)| (second, bytes as f64 / 1e9)).collect();
            (format!("trainer {}", of.trainer), samples)
        })
        .collect();
    let svg = HeatMap {
        title: "What each trainer delivered over time",
        subtitle: &measurement.name,
        rows: &rows,
        unit: "GB",
    }
    .draw();
    Plot { file: file.to_owned(), title, svg }
}

/// The record for people.
pub(crate) fn markdown(record: &Record) -> String {
    let cluster = &record.machine;
    let commit = record.commit.as_deref().unwrap_or("unknown");
    let mut text = format!(
        "# Cluster benchmark\n\nweightsync {}, commit {commit}; launched by {}; {} trainers and {} receivers; hosts: {}; fabric asked \
         for: {}\n\n## Hosts\n\n",
        record.version,
        record.launch.launcher,
        cluster.trainers,
        cluster.receivers,
        record.hosts.len(),
        record.settings.fabric,
    );
    let mut hosts = Table::new(&["hosts", "machine", "GPUs", "NICs", "libfabric offers"]);
    for kind in &cluster.kinds {
        let facts = &kind.kind;
        let nics = facts.nics.iter().map(|nic| match nic.gigabits_per_second {
            Some(speed) => format!("{} {speed} Gb/s", nic.name),
            None => format!("{} (speed unknown)", nic.name),
        });
        let rails = facts.rails.iter().map(|rail| format!("{} on {}", rail.provider, rail.domain));
        hosts.row(vec![
            kind.hosts.to_string(),
            facts.machine.to_string(),
            listed(facts.gpus.iter().cloned()),
            listed(nics),
            listed(rails),
        ]);
    }
    text += &hosts.markdown();
    text += "\n## Measured\n\n";
    let mut table = Table::new(&[
        "what",
        "bytes",
        "writes",
        "GB/s, median (min .. max)",
        "of line rate",
        "until committed, s, median (min .. max)",
    ]);
    for measurement in &record.measurements {
        let rate = measurement.bandwidth().spread();
        let seconds: Vec<f64> = measurement.rounds.iter().map(|round| round.seconds).collect();
        let seconds = Spread::of(&seconds);
        table.row(vec![
            measurement.name.clone(),
            binary(measurement.bytes),
            measurement.writes.to_string(),
            format!("{:.2} ({:.2} .. {:.2})", rate.median, rate.min, rate.max),
            measurement
                .line_rate()
                .map_or_else(|| "-".into(), |line| format!("{:.0} %", 100.0 * rate.median / line)),
            format!("{:.4} ({:.4} .. {:.4})", seconds.median, seconds.min, seconds.max),
        ]);
    }
    text += &table.markdown();
    text += "\nGB/s are all trainers' bytes over the time of the slowest one's writes. The share is of what the busiest NIC \
             allows; `-` where no NIC says its speed (`--line-rate` does).\n";
    text += &rails(record);
    for plot in plots(record) {
        text += &format!("\n![{}]({})\n", plot.title, plot.file);
    }
    text
}

/// What went over each rail of each trainer, where all of them took part.
fn rails(record: &Record) -> String {
    let mut table = Table::new(&["what", "trainer", "rail", "bytes", "writes", "state"]);
    let (mut rows, mut left_out) = (0, 0);
    for measurement in record.measurements.iter().filter(|measurement| measurement.measure != Measure::Pair) {
        for (of, rail) in
            measurement.trainers.iter().flat_map(|of| of.rails.iter().map(move |rail| (of, rail)))
        {
            if rows == RAIL_ROWS_MAX {
                left_out += 1;
                continue;
            }
            rows += 1;
            table.row(vec![
                measurement.name.clone(),
                of.trainer.to_string(),
                rail.name.clone(),
                binary(rail.bytes),
                rail.writes.to_string(),
                rail.closed.as_ref().map_or_else(|| "open".into(), |why| format!("given up: {why}")),
            ]);
        }
    }
    let more = match left_out {
        0 => String::new(),
        _ => format!("\n{left_out} more are in results.json.\n"),
    };
    if rows == 0 { String::new() } else { format!("\n## Rails, last round\n\n{}{more}", table.markdown()) }
}

/// Many of the same are counted.
fn listed(names: impl Iterator<Item = String>) -> String {
    let mut counted: Vec<(String, usize)> = Vec::new();
    for name in names {
        match counted.iter_mut().find(|(known, _)| *known == name) {
            Some((_, times)) => *times += 1,
            None => counted.push((name, 1)),
        }
    }
    let words = counted.into_iter().map(|(name, times)| match times {
        1 => name,
        _ => format!("{times} x {name}"),
    });
    let text = words.collect::<Vec<_>>().join(", ");
    if text.is_empty() { "none".into() } else { text }
}

/// `64 KiB`, `1.5 GiB`.
pub(crate) fn binary(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(4);
    let value = bytes as f64 / (1u64 << (10 * unit)) as f64;
    let digits = usize::from(value.fract() != 0.0);
    format!("{value:.digits$} {}", UNITS.get(unit as usize).unwrap_or(&""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_in_words() {
        let words = [0, 1, 1023, 1 << 16, 3 << 19, 1 << 40, u64::MAX].map(binary);
        assert_eq!(words, ["0 bytes", "1 bytes", "1023 bytes", "64 KiB", "1.5 MiB", "1 TiB", "16777216 TiB"]);
    }

    #[test]
    fn the_same_many_times_is_counted() {
        assert_eq!(listed(["a", "b", "a"].map(str::to_owned).into_iter()), "2 x a, b");
        assert_eq!(listed(std::iter::empty()), "none");
    }
}
