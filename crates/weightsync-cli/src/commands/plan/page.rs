//! The page: one HTML file that needs nothing else, and asks nothing of the network.

use std::fs;
use std::path::Path;

use anyhow::Context;

use super::Facts;

/// The page without its facts. All names are put into it by the browser as text.
const TEMPLATE: &str = include_str!("page.html");

/// Where the facts go.
const PLACE: &str = "{{facts}}";

pub(crate) fn write(path: &Path, facts: &Facts<'_>) -> anyhow::Result<()> {
    let page = page(&serde_json::to_string(facts)?);
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
    fn the_page_asks_nobody() {
        for word in
            ["http:", "https:", "//cdn", "src=", "@import", "url(", "<link", "fetch(", "XMLHttp", "innerHTML"]
        {
            assert!(!TEMPLATE.contains(word), "{word}");
        }
        assert_eq!(TEMPLATE.matches(PLACE).count(), 1);
    }
}
