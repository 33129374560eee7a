//! Pages: one HTML file each that needs nothing else, and asks nothing of the network.
//!
//! A template has a place for the style and one for the functions that all pages share, and one for its own facts, which the
//! browser draws. Whatever is named by a user is among the facts, and the browser puts it into the page as text.

use std::fs;
use std::path::Path;

use anyhow::Context;
use serde::Serialize;

const STYLE: &str = include_str!("page/style.css");
const TOOLS: &str = include_str!("page/tools.js");

const STYLE_PLACE: &str = "{{style}}";
const TOOLS_PLACE: &str = "{{tools}}";
const FACTS_PLACE: &str = "{{facts}}";

/// Writes the page that this template makes of the facts.
pub(crate) fn write(path: &Path, template: &str, facts: &impl Serialize) -> anyhow::Result<()> {
    let page = page(template, &serde_json::to_string(facts)?);
    fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))
}

fn page(template: &str, facts: &str) -> String {
    let page = template.replacen(STYLE_PLACE, STYLE, 1).replacen(TOOLS_PLACE, TOOLS, 1);
    // Within a script element, only `<` could end it. In JSON it occurs in strings alone, where it can be escaped. Facts come
    // last: what they contain is no place.
    page.replacen(FACTS_PLACE, &facts.replace('<', "\\u003c"), 1)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What every page must keep to.
    pub(crate) fn check_template(template: &str) {
        for place in [STYLE_PLACE, TOOLS_PLACE, FACTS_PLACE] {
            assert_eq!(template.matches(place).count(), 1, "{place}");
        }
        for text in [template, STYLE, TOOLS] {
            for word in [
                "http:",
                "https:",
                "//cdn",
                "src=",
                "@import",
                "url(",
                "<link",
                "fetch(",
                "XMLHttp",
                "innerHTML",
            ] {
                assert!(!text.contains(word), "{word}");
            }
        }
        // A colour that is not defined is black on black.
        let colours = template.match_indices("var(--").map(|(at, start)| &template[at + start.len()..]);
        for name in colours.filter_map(|rest| rest.split_once(')')).map(|(name, _)| name) {
            assert!(STYLE.contains(&format!("--{name}: ")), "{name}");
        }
        let asked = [template, TOOLS].into_iter().flat_map(|text| {
            let start = "byId(\"";
            text.match_indices(start).filter_map(move |(at, _)| text[at + start.len()..].split_once('"'))
        });
        for (id, _) in asked {
            assert_eq!(template.matches(&format!("id=\"{id}\"")).count(), 1, "{id}");
        }
        let (before, after) = template.split_once(FACTS_PLACE).unwrap();
        let name = r#"</script><script>alert("{{facts}}{{tools}}")</script><!--"#;
        let facts = serde_json::json!({ "name": name });
        let page = page(template, &facts.to_string());
        let page = page.strip_prefix(&before.replacen(STYLE_PLACE, STYLE, 1)).unwrap();
        let between = page.strip_suffix(&after.replacen(TOOLS_PLACE, TOOLS, 1)).unwrap();
        assert!(!between.contains('<'));
        assert_eq!(serde_json::from_str::<serde_json::Value>(between).unwrap(), facts);
    }

    /// Whether so many kinds of things have a colour each, in light and in dark.
    pub(crate) fn check_colours(kinds: usize) {
        for number in 0..kinds {
            assert_eq!(STYLE.matches(&format!("--r{number}: #")).count(), 2, "{number}");
        }
    }
}
