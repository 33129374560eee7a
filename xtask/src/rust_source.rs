//! Rust sources as text without comments and literals: enough to find a word where it is code.
//!
//! This is no parser. It knows what can hide or fake a word: comments, strings, characters.

/// The source with every comment and literal blanked. Lines stay where they are.
pub(crate) fn code_only(source: &str) -> String {
    let chars: Vec<char> = source.chars().collect();
    let mut code: Vec<char> = Vec::with_capacity(chars.len());
    while code.len() < chars.len() {
        let at = code.len();
        if is_word_char(chars[at]) {
            let end = end_of_word(&chars, at);
            let word: String = chars[at..end].iter().collect();
            code.extend(&chars[at..end]);
            if let ("r" | "br" | "cr", Some(end)) = (word.as_str(), end_of_raw_string(&chars, end)) {
                blank(&chars, &mut code, end);
            }
        } else if let Some(end) = end_of_hidden(&chars, at) {
            blank(&chars, &mut code, end);
        } else {
            code.push(chars[at]);
        }
    }
    code.into_iter().collect()
}

/// Lines, from 1, on which `word` stands as a whole word.
pub(crate) fn lines_with_word(code: &str, word: &str) -> Vec<usize> {
    tokens(code).into_iter().filter(|(_, token)| *token == word).map(|(line, _)| line).collect()
}

/// Every module of `std` that is named, with its line: in paths, and at the first level of `std::{...}`.
pub(crate) fn std_modules(code: &str) -> Vec<(usize, String)> {
    let tokens = tokens(code);
    let mut modules = Vec::new();
    for (index, window) in tokens.windows(4).enumerate() {
        let [(_, "std"), (_, ":"), (_, ":"), (line, next)] = *window else {
            continue;
        };
        if next != "{" {
            modules.push((line, next.to_owned()));
            continue;
        }
        let mut depth = 0;
        let mut first = false;
        for &(line, token) in &tokens[index + 3..] {
            match token {
                "{" => (depth, first) = (depth + 1, true),
                "}" if depth == 1 => break,
                "}" => depth -= 1,
                "," => first = true,
                word if first && depth == 1 => {
                    modules.push((line, word.to_owned()));
                    first = false;
                }
                _ => {}
            }
        }
    }
    modules
}

/// Words and single other characters, with their lines.
fn tokens(code: &str) -> Vec<(usize, &str)> {
    let mut tokens = Vec::new();
    for (number, line) in code.lines().enumerate() {
        let mut rest = line;
        while let Some(first) = rest.chars().next() {
            let word_len = rest.find(|c| !is_word_char(c)).unwrap_or(rest.len());
            let (token, tail) = rest.split_at(word_len.max(first.len_utf8()));
            if !first.is_whitespace() {
                tokens.push((number + 1, token));
            }
            rest = tail;
        }
    }
    tokens
}

fn is_word_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn end_of_word(chars: &[char], at: usize) -> usize {
    chars[at..].iter().position(|&c| !is_word_char(c)).map_or(chars.len(), |len| at + len)
}

/// Copies `chars` up to `end` as spaces, line ends kept.
fn blank(chars: &[char], code: &mut Vec<char>, end: usize) {
    let hidden = &chars[code.len()..end];
    code.extend(hidden.iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
}

/// The end of the comment, string or character that starts here, if one does. What is never closed runs to the end.
fn end_of_hidden(chars: &[char], at: usize) -> Option<usize> {
    let next = chars.get(at + 1);
    match chars[at] {
        '/' if next == Some(&'/') => {
            Some(chars[at..].iter().position(|&c| c == '\n').map_or(chars.len(), |len| at + len))
        }
        '/' if next == Some(&'*') => Some(end_of_block_comment(chars, at)),
        '"' => Some(end_of_quoted(chars, at)),
        // A quote may also start a lifetime: a character literal has an escape, or its end just behind one character.
        '\'' if next == Some(&'\\') || chars.get(at + 2) == Some(&'\'') => Some(end_of_quoted(chars, at)),
        _ => None,
    }
}

fn end_of_block_comment(chars: &[char], at: usize) -> usize {
    let (mut depth, mut here) = (0, at);
    while here < chars.len() {
        match (chars[here], chars.get(here + 1)) {
            ('/', Some('*')) => (depth, here) = (depth + 1, here + 2),
            ('*', Some('/')) => {
                (depth, here) = (depth - 1, here + 2);
                if depth == 0 {
                    return here;
                }
            }
            _ => here += 1,
        }
    }
    chars.len()
}

/// From an opening quote to behind the same one, escapes skipped.
fn end_of_quoted(chars: &[char], at: usize) -> usize {
    let mut here = at + 1;
    while here < chars.len() {
        match chars[here] {
            '\\' => here += 2,
            c if c == chars[at] => return here + 1,
            _ => here += 1,
        }
    }
    chars.len()
}

/// What follows `r`: hashes, a quote, anything, the quote and as many hashes. `r#word` is no string.
fn end_of_raw_string(chars: &[char], at: usize) -> Option<usize> {
    let hashes = chars[at..].iter().take_while(|&&c| c == '#').count();
    let body = at + hashes + 1;
    if chars.get(at + hashes) != Some(&'"') {
        return None;
    }
    let closes = |end: &usize| {
        chars[*end] == '"' && chars[end + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes
    };
    Some((body..chars.len()).find(closes).map_or(chars.len(), |end| end + 1 + hashes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_words_are_not_code() {
        for source in [
            "// unsafe",
            "/* a /* nested unsafe */ still unsafe */",
            "//! unsafe\n/// unsafe",
            r#"let x = "unsafe";"#,
            r#"let x = "quoted \" unsafe";"#,
            r##"let x = r"\" ; let y = r#"a " unsafe"#;"##,
            r##"let x = b"unsafe"; let y = br#"unsafe"#; let z = c"unsafe";"##,
            "let x = \"two lines\nunsafe\";",
            "#![deny(unsafe_op_in_unsafe_fn)]",
            "/* never closed unsafe",
            "let x = \"never closed unsafe",
            "let x = r#\"never closed unsafe\"",
        ] {
            assert_eq!(lines_with_word(&code_only(source), "unsafe"), [0; 0], "{source}");
        }
    }

    #[test]
    fn code_is_found_behind_what_hides() {
        for (source, line) in [
            ("unsafe {}", 1),
            ("/* a */ unsafe {}", 1),
            ("let x = \"a\"; unsafe {}", 1),
            ("let x = '\"'; unsafe { f('\"') }", 1),
            ("let x = '\\''; unsafe {}", 1),
            ("fn f<'a>(x: &'a str) { unsafe {} } // 'a", 1),
            ("let x = r\"\\\"; unsafe {}", 1),
            ("let r#type = 1; unsafe {}", 1),
            ("let x = b'\"'; unsafe {}", 1),
            ("let x = r##\"a \"# b\"##; unsafe {}", 1),
            ("// one\n/* two\nthree */\nunsafe fn f() {}", 4),
        ] {
            assert_eq!(lines_with_word(&code_only(source), "unsafe"), [line], "{source}");
        }
    }

    #[test]
    fn lines_and_lengths_stay() {
        let source = "a \"b\nc\" // d\n'e' /* f\n */ g";
        let code = code_only(source);
        assert_eq!(code.chars().count(), source.chars().count());
        assert_eq!(code.lines().count(), source.lines().count());
        assert_eq!(code.split_whitespace().collect::<Vec<_>>(), ["a", "g"]);
    }

    #[test]
    fn std_modules_are_found_in_every_form() {
        let code = "use std::fs;\nuse std :: {\n  fmt,\n  collections::{BTreeMap, thread},\n  net::{TcpStream, IpAddr},\n};\n\
                    fn f(t: std::time::Instant) { ::std::thread::yield_now() }\nuse core::time::Duration; my_std::fs();";
        let expected = [(1, "fs"), (3, "fmt"), (4, "collections"), (5, "net"), (7, "time"), (7, "thread")];
        assert_eq!(std_modules(code), expected.map(|(line, name)| (line, name.to_owned())));
    }
}
