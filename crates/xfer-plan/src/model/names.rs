//! Names with variables: `model.layers.{layer}.mlp.experts.{expert}.up_proj.weight`.
//!
//! One template stands for a tensor per layer and expert. Matching takes time in proportion to the product of the
//! lengths of pattern and name at most, whatever the pattern is.

use std::collections::BTreeMap;

use crate::limits::NAME_BYTES_MAX;

/// The values of a variable: from the first number to below the second.
pub(crate) type Ranges = BTreeMap<String, [u32; 2]>;

/// What each variable stands for.
pub(crate) type Values<'a> = Vec<(&'a str, u32)>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token<'a> {
    Text(&'a str),
    Variable(&'a str),
}

fn tokens(template: &str) -> Result<Vec<Token<'_>>, String> {
    if template.len() > NAME_BYTES_MAX {
        return Err(format!("it is longer than {NAME_BYTES_MAX} bytes"));
    }
    let mut tokens = Vec::new();
    let mut rest = template;
    while let Some((text, after)) = rest.split_once('{') {
        let (name, after) = after.split_once('}').ok_or("a `{` is not closed")?;
        tokens.extend([Token::Text(text), Token::Variable(name)]);
        rest = after;
    }
    tokens.push(Token::Text(rest));
    Ok(tokens)
}

/// The variables of a template, in the order of the text.
pub(crate) fn variables(template: &str) -> Result<Vec<&str>, String> {
    let mut names = Vec::new();
    for token in tokens(template)? {
        if let Token::Variable(name) = token
            && !names.contains(&name)
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// The template with its variables replaced.
pub(crate) fn fill(template: &str, values: &[(&str, u32)]) -> Result<String, String> {
    let mut name = String::with_capacity(template.len());
    for token in tokens(template)? {
        match token {
            Token::Text(text) => name.push_str(text),
            Token::Variable(variable) => {
                // The innermost of the same name.
                let (_, value) = values
                    .iter()
                    .rev()
                    .find(|(other, _)| *other == variable)
                    .ok_or_else(|| format!("`{{{variable}}}` stands for nothing: give it a range"))?;
                name.push_str(&value.to_string());
            }
        }
    }
    Ok(name)
}

/// All values that the variables of `template` take, the first variable slowest; at most `max` of them.
pub(crate) fn expand<'a>(template: &'a str, ranges: &Ranges, max: usize) -> Result<Vec<Values<'a>>, String> {
    let names = variables(template)?;
    if let Some(unused) = ranges.keys().find(|name| !names.contains(&name.as_str())) {
        return Err(format!("range `{unused}` is not used: write {{{unused}}} where it belongs"));
    }
    let mut all: Vec<Values<'a>> = vec![Vec::new()];
    for name in names {
        let &[from, to] = ranges
            .get(name)
            .ok_or_else(|| format!("`{{{name}}}` has no range: add \"{name}\": [from, to] to ranges"))?;
        if from >= to {
            return Err(format!("range `{name}` is empty: give the first number and the one after the last"));
        }
        let count = (to - from) as usize;
        if all.len().saturating_mul(count) > max {
            return Err(format!("it stands for more than {max} names"));
        }
        all = all
            .iter()
            .flat_map(|values| {
                (from..to).map(move |value| values.iter().copied().chain([(name, value)]).collect())
            })
            .collect();
    }
    Ok(all)
}

/// A template in which `*` stands for any text, and a variable for a number of its range, or for any without one.
pub(crate) struct Pattern<'a> {
    parts: Vec<Match<'a>>,
}

enum Match<'a> {
    Text(&'a str),
    Number(Option<[u32; 2]>),
    Any,
}

impl<'a> Pattern<'a> {
    pub(crate) fn new(template: &'a str, ranges: &Ranges) -> Result<Pattern<'a>, String> {
        let names = variables(template)?;
        if let Some(unused) = ranges.keys().find(|name| !names.contains(&name.as_str())) {
            return Err(format!("range `{unused}` is not used: write {{{unused}}} where it belongs"));
        }
        let mut parts = Vec::new();
        for token in tokens(template)? {
            match token {
                Token::Variable(name) => parts.push(Match::Number(ranges.get(name).copied())),
                Token::Text(text) => {
                    for (nth, text) in text.split('*').enumerate() {
                        if nth > 0 {
                            parts.push(Match::Any);
                        }
                        parts.push(Match::Text(text));
                    }
                }
            }
        }
        Ok(Pattern { parts })
    }

    pub(crate) fn matches(&self, name: &str) -> bool {
        let (mut part, mut at) = (0, 0);
        // After the last `*`: going further back never helps.
        let mut again = None;
        loop {
            let next = match self.parts.get(part) {
                None if at == name.len() => return true,
                None => None,
                Some(Match::Any) => {
                    again = Some((part + 1, at));
                    Some(at)
                }
                Some(Match::Text(text)) => {
                    name.get(at..).filter(|rest| rest.starts_with(text)).map(|_| at + text.len())
                }
                Some(Match::Number(range)) => number(name, at, *range),
            };
            match (next, again) {
                (Some(next), _) => (part, at) = (part + 1, next),
                (None, Some((after, from))) if from < name.len() => {
                    again = Some((after, from + 1));
                    (part, at) = (after, from + 1);
                }
                (None, _) => return false,
            }
        }
    }
}

/// Where the number that starts at `at` ends, if there is a whole one and it lies in the range.
fn number(name: &str, at: usize, range: Option<[u32; 2]>) -> Option<usize> {
    let is_digit = |byte: &u8| byte.is_ascii_digit();
    let before = at.checked_sub(1).and_then(|before| name.as_bytes().get(before));
    let digits = name.as_bytes().get(at..)?.iter().take_while(|byte| is_digit(byte)).count();
    let end = at + digits;
    let value: u32 = name.get(at..end)?.parse().ok()?;
    let inside = range.is_none_or(|[from, to]| (from..to).contains(&value));
    (inside && !before.is_some_and(is_digit)).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        let ranges = Ranges::from([("layer".to_owned(), [2, 12])]);
        let ranges = if pattern.contains("{layer}") { ranges } else { Ranges::new() };
        Pattern::new(pattern, &ranges).unwrap().matches(name)
    }

    #[test]
    fn patterns() {
        assert!(matches("*", "") && matches("*", "a.b") && matches("a*", "a") && matches("*b*", "abc"));
        assert!(matches("layers.{layer}.*.weight", "layers.11.mlp.weight"));
        assert!(!matches("layers.{layer}.*.weight", "layers.12.mlp.weight"));
        assert!(!matches("layers.{layer}.*.weight", "layers.11.weight"));
        assert!(!matches("*{layer}", "layers.12") && matches("*{layer}", "layers.2"));
        assert!(matches("{layer}.{any}", "2.77") && !matches("{layer}.{any}", "2."));
        assert!(!matches("", "a") && !matches("a", "ab") && !matches("*a", "ab") && matches("*ä*", "xäöx"));
        // A pattern that takes exponential time when matched carelessly.
        assert!(!matches(&"*a".repeat(200), &"a".repeat(190)));
    }

    #[test]
    fn templates_expand_with_the_first_variable_slowest() {
        let ranges = Ranges::from([("a".to_owned(), [0, 2]), ("b".to_owned(), [3, 5])]);
        let names: Vec<String> = expand("{b}.{a}", &ranges, 4)
            .unwrap()
            .iter()
            .map(|values| fill("{b}.{a}", values).unwrap())
            .collect();
        assert_eq!(names, ["3.0", "3.1", "4.0", "4.1"]);
        assert!(expand("{b}.{a}", &ranges, 3).unwrap_err().contains("more than 3"));
        assert!(expand("{b}", &ranges, 9).unwrap_err().contains("`a` is not used"));
        assert!(expand("{c}", &Ranges::new(), 9).unwrap_err().contains("{c}"));
        assert!(expand("{c", &Ranges::new(), 9).unwrap_err().contains("closed"));
        assert!(fill("{c}", &[]).unwrap_err().contains("{c}"));
        let empty = Ranges::from([("c".to_owned(), [2, 2])]);
        assert!(expand("{c}", &empty, 9).unwrap_err().contains("empty"));
        assert!(expand(&"c".repeat(2000), &Ranges::new(), 9).unwrap_err().contains("longer"));
    }
}
