//! A spinner on standard error for work that takes more than a moment; where that is no terminal, nothing.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How often it turns.
const TICK: Duration = Duration::from_millis(120);

/// A prefix says which of several works this is.
const TEMPLATE: &str = "{spinner} {prefix}{msg}";

/// Turns, and says this until it is told something else.
pub(crate) fn spinner(message: &'static str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template(TEMPLATE) {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(TICK);
    spinner.set_message(message);
    spinner
}
