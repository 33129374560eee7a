//! The page of a plan.

use std::path::Path;

use serde::Serialize;
use xfer_plan::Resource;

use super::Facts;
use crate::commands::page;

const TEMPLATE: &str = include_str!("page.html");

/// What the page is told.
#[derive(Serialize)]
struct PageFacts<'a> {
    #[serde(flatten)]
    facts: &'a Facts<'a>,
    /// Every resource, and how to say that a rank uses it.
    verbs: [(Resource, &'static str); Resource::ALL.len()],
}

pub(crate) fn write(path: &Path, facts: &Facts<'_>) -> anyhow::Result<()> {
    let verbs = Resource::ALL.map(|resource| (resource, resource.verb()));
    page::write(path, TEMPLATE, &PageFacts { facts, verbs })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::page::tests::{check_colours, check_template};

    #[test]
    fn the_page_keeps_to_the_rules() {
        check_template(TEMPLATE);
        check_colours(Resource::ALL.len());
    }
}
