//! The page: one HTML file that needs nothing else, and asks nothing of the network.

use std::fs;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;
use xfer_plan::Resource;

use super::Facts;

/// The page without its facts. All names are put into it by the browser as text.
const TEMPLATE: &str = include_str!("page.html");

/// Where the facts go.
const PLACE: &str = "{{facts}}";

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
    let page = page(&serde_json::to_string(&PageFacts { facts, verbs })?);
    fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))
}

fn page(facts: &str) -> String {
    // Within a script element, only `<` could end it. In JSON it occurs in strings alone, where it can be escaped.
    TEMPLATE.replacen(PLACE, &facts.replace('<', "\\u003c"), 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_the_facts() {
        let name = r#"</script><script>alert("{{facts}}")</script><!--"#;
        let facts = serde_json::json!({ "name": name });
        let page = page(&facts.to_string());
        let (before, after) = TEMPLATE.split_once(PLACE).unwrap();
        let between = page.strip_prefix(before).unwrap().strip_suffix(after).unwrap();
        assert!(!between.contains('<'));
        assert_eq!(serde_json::from_str::<serde_json::Value>(between).unwrap(), facts);
    }

    #[test]
    fn every_resource_has_a_colour_in_light_and_dark() {
        for number in 0..Resource::ALL.len() {
            assert_eq!(TEMPLATE.matches(&format!("--r{number}: #")).count(), 2, "{number}");
        }
    }

    #[test]
    fn the_page_asks_nobody() {
        for word in
            ["http:", "https:", "//cdn", "src=", "@import", "url(", "<link", "fetch(", "XMLHttp", "innerHTML"]
        {
            assert!(!TEMPLATE.contains(word), "{word}");
        }
        assert_eq!(TEMPLATE.matches(PLACE).count(), 1);
    }
}
