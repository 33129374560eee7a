//! What a rank says while it runs: one JSON object per line with `--json`, a sentence for a person otherwise. The demo
//! reads the JSON of its children.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use weightsync::{PushReport, VersionReport};

use crate::say::say;
use crate::table::{bytes_text, seconds_text};

/// How long the exit of a rank whose parent is gone may take. Exit handlers have nothing to do that takes longer.
const EXIT_MAX: Duration = Duration::from_secs(3);

/// See the module.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum Event {
    /// The weights of this rank are in memory, or there is room for them.
    Loaded { weight_bytes: u64, seconds: f64 },
    /// Every rank is connected; by which rail each peer is reached (trainers only).
    Connected { routes: BTreeMap<String, String>, seconds: f64 },
    /// A trainer's version is committed.
    Pushed(PushReport),
    /// An inference rank serves a version.
    Served(VersionReport),
    /// Every byte of a version was as the reference says.
    Verified { version: u64, params: usize, bytes: u64, seconds: f64 },
    /// The rank has left in good order.
    Ended { peak_rss_bytes: Option<u64> },
}

impl Event {
    /// Prints it.
    pub(crate) fn print(&self, json: bool) {
        if json {
            match serde_json::to_string(self) {
                Ok(line) => say!("{line}"),
                Err(error) => tracing::error!(%error, "an event has no JSON"),
            }
            return;
        }
        match self {
            Self::Loaded { weight_bytes, seconds } => {
                say!("loaded {} in {}", bytes_text(*weight_bytes), seconds_text(*seconds));
            }
            Self::Connected { routes, seconds } => {
                say!("connected in {}", seconds_text(*seconds));
                for (to, rail) in routes {
                    say!("  {to} over {rail}");
                }
            }
            Self::Pushed(report) => say!(
                "version {} committed: {} written in {} ({:.2} GB/s), {} in all",
                report.version,
                bytes_text(report.bytes),
                seconds_text(report.write_seconds),
                report.gb_per_second,
                seconds_text(report.seconds),
            ),
            Self::Served(report) => {
                let onward = report.passed_on.as_ref();
                let onward = onward
                    .map_or_else(String::new, |onward| format!(", {} passed on", bytes_text(onward.bytes)));
                say!(
                    "serving version {}: {} arrived in {} ({:.2} GB/s){onward}",
                    report.version,
                    bytes_text(report.bytes),
                    seconds_text(report.seconds),
                    report.gb_per_second,
                );
            }
            Self::Verified { version, params, bytes, seconds } => say!(
                "verified version {version}: {params} parameters, all {} equal the reference ({})",
                bytes_text(*bytes),
                seconds_text(*seconds),
            ),
            Self::Ended { peak_rss_bytes: Some(bytes) } => {
                say!("done; peak memory {}", bytes_text(*bytes))
            }
            Self::Ended { peak_rss_bytes: None } => say!("done"),
        }
    }
}

/// Exit code for weights that arrived, but not as they must be.
pub(crate) const EXIT_BYTES_DIFFER: u8 = 3;

/// Weights that are not as they must be: an exit code of its own.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BytesDiffer(pub(crate) String);

/// The most memory that this process had resident, from /proc.
pub(crate) fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Ends this process when standard input closes, if it was asked to: its parent is gone.
pub(crate) fn end_with_stdin(asked: bool) -> anyhow::Result<()> {
    if asked {
        let watch = || {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            // Exit handlers of libraries run while rails are still busy, and may wait for them without end.
            let force = || {
                std::thread::sleep(EXIT_MAX);
                std::process::abort()
            };
            let _ = std::thread::Builder::new().name("exit".into()).spawn(force);
            std::process::exit(1);
        };
        std::thread::Builder::new().name("stdin".into()).spawn(watch)?;
    }
    Ok(())
}
