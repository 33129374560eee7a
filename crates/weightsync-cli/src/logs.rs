//! What the program logs: to standard error, as text for a person or as one JSON object per line for a collector.
//!
//! Standard output is never logged to: it is for what a command was asked for.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::args::LogFormat;

/// What to log; the second where the first is not set.
const VARIABLES: [&str; 2] = ["WEIGHTSYNC_LOG", "RUST_LOG"];

/// What is logged where nobody says.
const FILTER_DEFAULT: &str = "warn";

/// Starts to log in this format.
pub(crate) fn start(format: LogFormat) {
    let asked = VARIABLES.iter().find_map(|variable| Some((variable, std::env::var(variable).ok()?)));
    let parsed = asked.map(|(variable, text)| (variable, EnvFilter::try_new(&text)));
    let (filter, wrong) = match parsed {
        Some((_, Ok(filter))) => (filter, None),
        Some((variable, Err(error))) => (EnvFilter::new(FILTER_DEFAULT), Some((variable, error))),
        None => (EnvFilter::new(FILTER_DEFAULT), None),
    };
    // Colours are for a person's terminal, not for a log file.
    let colours = std::io::stderr().is_terminal();
    let logs =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().flatten_event(true).init(),
    }
    if let Some((variable, error)) = wrong {
        tracing::warn!(variable, %error, "cannot tell what to log; info or rendezvous=debug would do");
    }
}

/// Whether somebody said what to log.
pub(crate) fn is_asked_for() -> bool {
    VARIABLES.iter().any(|variable| std::env::var_os(variable).is_some())
}

/// The error that ends the program.
pub(crate) fn last_word(format: LogFormat, error: &str) {
    match format {
        LogFormat::Text => eprintln!("weightsync: {error}"),
        LogFormat::Json => tracing::error!(error, "failed"),
    }
}
