//! The host file of `--hosts`: one host a line, `host slots=8`.
//!
//! A pure reader. What it lets through becomes a word of an ssh command, so it must never let an option or a shell's
//! character through.

/// Ranks that a file may ask for: the planner's own limit on either side.
const SLOTS_MAX: u32 = 65_536;

/// A host, and how many ranks it gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    /// As ssh takes it: `name` or `user@name`.
    pub(crate) name: String,
    pub(crate) slots: u32,
}

/// What is wrong with a host file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum HostsError {
    #[error("line {line}: '{text}' is no host; write `host` or `host slots=8`")]
    Malformed { line: usize, text: String },
    #[error("line {line}: slots={slots} is not a number from 1 to {SLOTS_MAX}")]
    Slots { line: usize, slots: String },
    #[error(
        "the hosts have {slots} slots together; a trainer and a receiver need 2, and {SLOTS_MAX} is the most"
    )]
    Total { slots: u64 },
}

/// Reads a host file. `#` begins a comment; a host without slots has one.
pub(crate) fn parse(text: &str) -> Result<Vec<Host>, HostsError> {
    let mut hosts: Vec<Host> = Vec::new();
    for (line, whole) in (1..).zip(text.lines()) {
        let content = whole.split('#').next().unwrap_or_default();
        let mut words = content.split_whitespace();
        let Some(name) = words.next() else { continue };
        let malformed = || HostsError::Malformed { line, text: whole.trim().chars().take(80).collect() };
        let sound = |char: char| char.is_ascii_alphanumeric() || "-._:@%".contains(char);
        if name.starts_with('-') || !name.chars().all(sound) {
            return Err(malformed());
        }
        let slots = match words.next() {
            None => 1,
            Some(word) => {
                let slots = word.strip_prefix("slots=").ok_or_else(malformed)?;
                let number = slots.parse().ok().filter(|slots| (1..=SLOTS_MAX).contains(slots));
                number.ok_or_else(|| HostsError::Slots { line, slots: slots.chars().take(20).collect() })?
            }
        };
        if words.next().is_some() {
            return Err(malformed());
        }
        hosts.push(Host { name: name.to_owned(), slots });
    }
    let slots = hosts.iter().map(|host| u64::from(host.slots)).sum();
    match (2..=u64::from(SLOTS_MAX)).contains(&slots) {
        true => Ok(hosts),
        false => Err(HostsError::Total { slots }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hosts_slots_and_comments() {
        let hosts = parse("# training\np5-1 slots=8\n\n  ubuntu@p5-2   slots=4 # half\n10.0.0.7\n").unwrap();
        let hosts: Vec<_> = hosts.iter().map(|host| (host.name.as_str(), host.slots)).collect();
        assert_eq!(hosts, [("p5-1", 8), ("ubuntu@p5-2", 4), ("10.0.0.7", 1)]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, expected) in [
            ("a slots=0\n", "line 1: slots=0"),
            ("a\nb slots=x\n", "line 2: slots=x"),
            ("a\nb cpus=4\n", "line 2: 'b cpus=4'"),
            ("-oProxyCommand=x\n", "line 1"),
            ("a;rm\n", "line 1"),
            ("a slots=1 b\n", "line 1"),
            ("a\n", "have 1 slots"),
            ("a slots=65536\nb slots=1\n", "have 65537 slots"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(hosts in prop::collection::vec(("[a-z][a-z0-9.-]{0,10}", 1..9u32), 2..9)) {
            let text: String = hosts.iter().map(|(name, slots)| format!("{name} slots={slots}\n")).collect();
            let read = parse(&text).unwrap();
            prop_assert!(read.iter().map(|host| (host.name.clone(), host.slots)).eq(hosts));
        }

        #[test]
        fn no_text_gives_a_word_that_is_an_option(text in "[ -~\\n]{0,80}") {
            for host in parse(&text).unwrap_or_default() {
                prop_assert!(!host.name.starts_with('-') && !host.name.contains(['$', '`', ';', '\'', ' ']));
            }
        }
    }
}
