//! The page of a simulated push.

use std::path::Path;

use serde::Serialize;
use xfer_sim::{NicUse, Stage};

use super::facts::Facts;
use super::summary::{cluster_text, conditions_text};
use crate::commands::page;

const TEMPLATE: &str = include_str!("page.html");

/// What the page is told.
#[derive(Serialize)]
struct PageFacts<'a> {
    #[serde(flatten)]
    facts: &'a Facts,
    cluster_text: String,
    conditions_text: Option<String>,
    /// Every stage, and its name in words.
    stages: [(Stage, &'static str); Stage::ALL.len()],
    trainer_nics: Vec<NicUse>,
    receiver_nics: Vec<NicUse>,
}

pub(crate) fn write(path: &Path, facts: &Facts) -> anyhow::Result<()> {
    let [trainer_nics, receiver_nics] = facts.nics();
    let facts = PageFacts {
        facts,
        cluster_text: cluster_text(&facts.cluster),
        conditions_text: conditions_text(facts),
        stages: Stage::ALL.map(|stage| (stage, stage.text())),
        trainer_nics,
        receiver_nics,
    };
    page::write(path, TEMPLATE, &facts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::page::tests::{check_colours, check_template};

    #[test]
    fn the_page_keeps_to_the_rules() {
        check_template(TEMPLATE);
        check_colours(Stage::ALL.len());
    }
}
