//! What a lab is made of, and the bounds of it. Checked before anything is built; touches nothing.

use std::ops::RangeInclusive;

use crate::LabError;

/// The most links of a lab: eight times the NICs of the largest hosts in use.
pub const LINKS_MAX: u16 = 256;

/// Rates that can be shaped, in bits per second. Below, one burst takes seconds; above, no machine's cores keep up.
pub const RATE_BITS_RANGE: RangeInclusive<u64> = 1_000_000..=1_000_000_000_000;

/// MTUs in bytes: what every IPv4 host takes, to the most that a virtual pair has.
pub const MTU_RANGE: RangeInclusive<u32> = 576..=65_535;

/// Bursts in bytes. Below, the kernel must cut its packets of up to 64 KiB to pass them, and a link does not reach its
/// rate (81 % with 32 kB); above, short pushes are not shaped at all.
pub const BURST_BYTES_RANGE: RangeInclusive<u32> = 64 << 10..=16 << 20;

/// The longest name of a lab.
pub const NAME_BYTES_MAX: usize = 32;

/// The links of a lab. The default is a large host at 1:1000: 32 links of 100 Mb/s.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabOptions {
    /// How many links, from 1 to [`LINKS_MAX`].
    pub links: u16,
    /// Each link's rate in bits per second, in each direction, headers included ([`crate::Lab::payload_share`]).
    pub rate_bits: u64,
    /// Links with a rate of their own, in bits per second. The last word on a link counts.
    pub slow: Vec<(u16, u64)>,
    /// The MTU of the links in bytes.
    pub mtu: u32,
    /// What a link that was idle may send at once, in bytes, faster than its rate.
    pub burst_bytes: u32,
}

impl Default for LabOptions {
    fn default() -> Self {
        Self { links: 32, rate_bits: 100_000_000, slow: Vec::new(), mtu: 1500, burst_bytes: 256 << 10 }
    }
}

impl LabOptions {
    /// The rate of one link in bits per second.
    pub fn rate_of(&self, link: u16) -> u64 {
        let own = self.slow.iter().rev().find(|(slow, _)| *slow == link);
        own.map_or(self.rate_bits, |(_, rate_bits)| *rate_bits)
    }

    pub(crate) fn check(&self) -> Result<(), LabError> {
        within("links", self.links, &(1..=LINKS_MAX))?;
        within("MTU in bytes", self.mtu, &MTU_RANGE)?;
        within("burst in bytes", self.burst_bytes, &BURST_BYTES_RANGE)?;
        check_rate(self.rate_bits)?;
        for &(link, rate_bits) in &self.slow {
            if link >= self.links {
                return Err(LabError::Link { link, links: self.links });
            }
            check_rate(rate_bits)?;
        }
        Ok(())
    }
}

pub(crate) fn check_rate(rate_bits: u64) -> Result<(), LabError> {
    within("rate in bits per second", rate_bits, &RATE_BITS_RANGE)
}

fn within<T>(what: &'static str, value: T, range: &RangeInclusive<T>) -> Result<(), LabError>
where
    T: PartialOrd + Copy + Into<u64>,
{
    if range.contains(&value) {
        return Ok(());
    }
    let (least, most) = ((*range.start()).into(), (*range.end()).into());
    Err(LabError::OutOfRange { what, value: value.into(), least, most })
}

/// A name becomes part of file names and command lines.
pub(crate) fn check_name(name: &str) -> Result<(), LabError> {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    let first = name.bytes().next();
    // A leading dash would be an option to somebody.
    if name.len() <= NAME_BYTES_MAX && first.is_some_and(|byte| byte != b'-') && name.bytes().all(plain) {
        Ok(())
    } else {
        Err(LabError::Name { name: name.to_owned() })
    }
}

/// A rate in `tc`'s words (`100mbit`, `1.5gbit`, `640kbit`) in bits per second. `None` for what is no such rate.
pub fn parse_rate(text: &str) -> Option<u64> {
    let number = text.strip_suffix("bit")?;
    let (number, unit) = match number.char_indices().next_back()? {
        (at, 'k') => (number.get(..at)?, 1e3),
        (at, 'm') => (number.get(..at)?, 1e6),
        (at, 'g') => (number.get(..at)?, 1e9),
        _ => (number, 1.0),
    };
    // Neither an exponent nor "inf": digits and one point.
    if !number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.') {
        return None;
    }
    let rate = (number.parse::<f64>().ok()? * unit).round();
    // Up to here a float holds every whole number.
    (0.0..=9e15).contains(&rate).then_some(rate as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_as_tc_reads_them() {
        for (text, rate) in [
            ("100mbit", 100_000_000),
            ("1.5gbit", 1_500_000_000),
            ("640kbit", 640_000),
            ("2500000bit", 2_500_000),
            ("0.1gbit", 100_000_000),
        ] {
            assert_eq!(parse_rate(text), Some(rate), "{text}");
        }
        for wrong in
            ["", "bit", "mbit", "100", "100mb", "-1mbit", "1e9bit", "infbit", "1..2gbit", "1 gbit", "µbit"]
        {
            assert_eq!(parse_rate(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_cannot_be_built_is_refused_and_named() {
        let refused = |options: LabOptions, word: &str| {
            let error = options.check().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        let usual = LabOptions::default;
        usual().check().unwrap();
        refused(LabOptions { links: 0, ..usual() }, "links");
        refused(LabOptions { links: LINKS_MAX + 1, ..usual() }, "256");
        refused(LabOptions { mtu: 68, ..usual() }, "MTU");
        refused(LabOptions { burst_bytes: 32_000, ..usual() }, "burst");
        refused(LabOptions { rate_bits: 0, ..usual() }, "rate");
        refused(LabOptions { slow: vec![(32, 5_000_000)], ..usual() }, "link 32");
        refused(LabOptions { slow: vec![(3, 5)], ..usual() }, "rate");
        for name in ["", "-a", "a b", "A", "a/b", "..", "ü", &"x".repeat(NAME_BYTES_MAX + 1)] {
            assert!(check_name(name).is_err(), "{name}");
        }
        for name in ["a", "run-17", "0-", &"x".repeat(NAME_BYTES_MAX)] {
            check_name(name).unwrap();
        }
    }

    #[test]
    fn the_last_word_on_a_link_counts() {
        let slow = vec![(1, 2_000_000), (1, 3_000_000)];
        let options = LabOptions { links: 2, slow, ..LabOptions::default() };
        assert_eq!([options.rate_of(0), options.rate_of(1)], [100_000_000, 3_000_000]);
    }
}
