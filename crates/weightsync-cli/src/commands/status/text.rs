//! The status for a person, in lines that fit a terminal.
//!
//! No line is wider and there are no more lines than was asked for: ranks that are waited for come first when there is not
//! room for all. What peers named is shown without control characters.

use super::facts::{AttemptFacts, Facts, PushFacts, RailFacts, RankFacts};
use crate::table::{bytes_text, seconds_text};

/// Attempts that are shown.
const ATTEMPTS_SHOWN: usize = 5;

/// Lines that are left to ranks, however few there are.
const RANK_LINES_MIN: usize = 3;

/// The text, in lines of at most `width` characters.
pub(super) fn lines(facts: &Facts, width: usize, height: usize) -> Vec<String> {
    let mut lines = head(facts);
    let attempts = attempts(facts);
    let rails = rails(facts);
    let room = height.saturating_sub(lines.len() + attempts.len() + 3).max(RANK_LINES_MIN);
    lines.extend(ranks(facts, room));
    lines.extend(attempts);
    let room = height.saturating_sub(lines.len());
    // A title and a rail at least.
    if room > 3 {
        let more = rails.len().saturating_sub(room - 1);
        lines.extend(rails.into_iter().take(room - 1));
        if more > 0 {
            lines.push(format!("... {more} more lines of rails"));
        }
    }
    lines.truncate(height);
    lines.into_iter().map(|line| fit(&line, width)).collect()
}

fn head(facts: &Facts) -> Vec<String> {
    let mut lines = vec![format!(
        "job {} at {}, up {}, deadline {}, verify {}",
        facts.job,
        facts.controller,
        rough(facts.up_seconds),
        rough(facts.deadline_seconds),
        facts.verify
    )];
    let joined = format!(
        "{} of {} trainers, {} of {} inference ranks",
        facts.joined_trainers, facts.trainers, facts.joined_inference, facts.inference
    );
    lines.push(match &facts.plan {
        None => joined,
        Some(plan) => {
            let bound = seconds_text(plan.bound_seconds);
            format!("{joined}; {} a push, at least {bound}", bytes_text(plan.bytes))
        }
    });
    let committed = match facts.committed {
        0 => "nothing committed".to_owned(),
        version => format!("version {version} committed"),
    };
    let phase = format!("{} for {}", facts.phase, seconds_text(facts.phase_seconds));
    lines.push(match &facts.push {
        None => format!("{committed}; {phase}"),
        Some(push) => format!("{committed}; version {}: {phase}", push.version),
    });
    if let Some(push) = &facts.push {
        lines.push(progress(push));
    }
    if let (Some(first), Some(missing)) = (facts.waiting_for.first(), facts.waiting_to) {
        let more = match facts.waiting_for.len() - 1 {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        lines.push(format!("waiting for {first}{more} {missing}"));
    }
    lines
}

fn progress(push: &PushFacts) -> String {
    let id = push.push.get(..12).unwrap_or(&push.push);
    let PushFacts { bytes, bytes_planned, gb_per_second, .. } = push;
    let now = rate(*gb_per_second).map(|rate| format!(", {rate} GB/s now")).unwrap_or_default();
    let percent = match bytes_planned {
        0 => 100.0,
        planned => 100.0 * *bytes as f64 / *planned as f64,
    };
    format!(
        "push {id}: {} of {} ({percent:.0} %) after {}{now}",
        bytes_text(*bytes),
        bytes_text(*bytes_planned),
        seconds_text(push.seconds)
    )
}

/// A line for each rank, those waited for first where there is not room for all.
fn ranks(facts: &Facts, room: usize) -> Vec<String> {
    let mut lines = vec![
        String::new(),
        format!(
            "{:<15} {:<16}{:>7}  {:<13} {:>8}/{:<8} {:>6}",
            "rank", "address", "heard", "state", "moved", "planned", "GB/s"
        ),
    ];
    let mut ranks: Vec<&RankFacts> = facts.ranks.iter().collect();
    if ranks.len() > room {
        ranks.sort_by_key(|rank| !rank.waited_for);
    }
    lines.extend(ranks.iter().take(room).map(|rank| rank_line(rank, &facts.phase)));
    if ranks.len() > room {
        lines.push(format!("... {} more ranks", ranks.len() - room));
    }
    lines
}

fn rank_line(rank: &RankFacts, phase: &str) -> String {
    let state = match (rank.left, rank.serves, rank.torn_by) {
        (true, ..) => "left".to_owned(),
        (_, Some(version), _) => format!("serves {version}"),
        (_, _, Some(version)) => format!("torn by {version}"),
        _ if rank.behind => "behind".to_owned(),
        _ if rank.waited_for => phase.to_owned(),
        _ => "joined".to_owned(),
    };
    let mark = if rank.waited_for { '*' } else { ' ' };
    let heard = format!("{:.1} s", rank.heard_seconds);
    // The port says nothing to a person.
    let address = rank.address.rsplit_once(':').map_or("", |(host, _)| host);
    let start = format!("{mark}{:<14} {address:<16}{heard:>7}  {state:<13}", rank.rank);
    match rank.bytes_planned {
        Some(planned) => {
            let rate = rate(rank.gb_per_second).unwrap_or_default();
            format!("{start} {:>8}/{:<8} {rate:>6}", tight(rank.bytes), tight(planned))
        }
        None => start,
    }
}

/// GB/s, where so much moves that it is not 0 in two digits.
fn rate(gb_per_second: f64) -> Option<String> {
    (gb_per_second >= 0.005).then(|| format!("{gb_per_second:.2}"))
}

/// Bytes without the blank before the unit.
fn tight(bytes: u64) -> String {
    bytes_text(bytes).replace(' ', "")
}

fn attempts(facts: &Facts) -> Vec<String> {
    let mut lines = vec![];
    if !facts.attempts.is_empty() {
        lines.push(String::new());
        lines.push(format!("{:<15} {:>10} {:>10} {:>7}", "version", "ended", "took", "GB/s"));
    }
    lines.extend(facts.attempts.iter().take(ATTEMPTS_SHOWN).map(attempt_line));
    lines
}

fn attempt_line(attempt: &AttemptFacts) -> String {
    let ended = format!("{} ago", ago(attempt.ended_seconds_ago));
    let start = format!(" {:<14} {ended:>10} {:>10}", attempt.version, seconds_text(attempt.seconds));
    match (&attempt.aborted, attempt.gb_per_second) {
        (Some(reason), _) => format!("{start}  aborted: {reason}"),
        (None, Some(rate)) => format!("{start} {rate:>7.2}"),
        (None, None) => start,
    }
}

/// A time of which nobody needs more than its size.
fn rough(seconds: f64) -> String {
    if seconds < 10.0 { seconds_text(seconds) } else { ago(seconds) }
}

/// A time that passes while one looks at it: no fractions.
fn ago(seconds: f64) -> String {
    match seconds {
        s if s < 100.0 => format!("{s:.0} s"),
        s if s < 6000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.0} h", s / 3600.0),
    }
}

/// What the rails did last, those that were given up first.
fn rails(facts: &Facts) -> Vec<String> {
    let all = facts.ranks.iter().flat_map(|rank| rank.rails.iter().map(move |rail| (rank, rail)));
    let mut all: Vec<(&RankFacts, &RailFacts)> = all.collect();
    if all.is_empty() {
        return Vec::new();
    }
    all.sort_by_key(|(_, rail)| rail.up);
    let mut lines =
        vec![String::new(), format!("{:<15} {:>10} {:>7}  {}", "rails, last push", "moved", "GB/s", "rail")];
    lines.extend(all.into_iter().map(|(rank, rail)| {
        let down = if rail.up { "" } else { "given up: " };
        let moved = bytes_text(rail.bytes);
        format!(" {:<15} {moved:>10} {:>7.2}  {down}{}", rank.rank, rail.gb_per_second, rail.name)
    }));
    lines
}

/// A line without control characters, cut to the width.
fn fit(line: &str, width: usize) -> String {
    let clean = || line.chars().map(|c| if c.is_control() { ' ' } else { c });
    if line.chars().count() <= width {
        return clean().collect();
    }
    clean().take(width.saturating_sub(1)).chain(std::iter::once('~')).take(width).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;
    use rendezvous::PushId;
    use weightsync::status::{
        AttemptStatus, PhaseStatus, PlanStatus, PushStatus, RailStatus, RankStatus, Status,
    };
    use weightsync::{Rank, Served, Stage, Verify, World};
    use xfer_plan::Digest;

    use super::*;

    /// A job of so many trainers of which the second half still writes, with everything known that can be, and this text
    /// wherever peers or users name something.
    fn facts(trainers: u32, text: &str) -> Facts {
        let world = World { trainers, inference: 1 };
        let seconds = Duration::from_secs;
        let rank = |rank: Rank| RankStatus {
            rank,
            address: "10.20.30.40:50000".into(),
            heard: seconds(12),
            left: false,
            served: matches!(rank, Rank::Receiver(_)).then_some(Served::Torn(999_999)),
            bytes: 999_500_000,
            planned: matches!(rank, Rank::Trainer(_)).then_some(u64::MAX),
            bytes_per_second: 400e9,
            rails: vec![RailStatus::new(text, 12_345_678, 0.1, false)],
        };
        let push = PushId([0xab; 16]);
        let attempt = |aborted| AttemptStatus {
            version: 999_998,
            push,
            ended: seconds(360_000),
            took: seconds(20),
            aborted,
        };
        let status = Status {
            job: text.into(),
            world,
            up: seconds(1_000_000),
            deadline: seconds(30),
            verify: Verify::Sampled(0.25),
            phase: PhaseStatus::Pushing(Stage::Writing),
            since: seconds(1),
            waiting: world
                .members()
                .filter(|rank| matches!(rank, Rank::Trainer(rank) if rank.0 >= trainers / 2))
                .collect(),
            committed: 999_998,
            plan: Some(PlanStatus {
                digest: Digest([1; 32]),
                bytes: u64::MAX,
                writes: 1,
                bound_seconds: 0.5,
            }),
            push: Some(PushStatus { version: 999_999, push, elapsed: seconds(1) }),
            ranks: world.members().map(rank).collect(),
            attempts: vec![attempt(None), attempt(Some(text.into()))],
        };
        Facts::new("controller:7070", status)
    }

    #[test]
    fn a_terminal_of_80_columns_is_enough() {
        let lines = lines(&facts(128, "a name"), 200, usize::MAX);
        // What is cut is a name, an address or a reason; here there is none that is long.
        let long: Vec<&String> = lines.iter().filter(|line| line.chars().count() > 80).collect();
        assert!(long.is_empty(), "{long:#?}");
    }

    #[test]
    fn those_waited_for_are_seen_where_there_is_no_room_for_all() {
        let lines = lines(&facts(128, "a name"), 80, 24);
        let ranks = |mark| lines.iter().filter(|line| line.starts_with(mark)).count();
        assert!(ranks("*trainer") > 0 && ranks(" trainer") == 0, "{lines:#?}");
        assert!(lines.iter().any(|line| line.contains("more ranks")), "{lines:#?}");
    }

    proptest! {
        #[test]
        fn the_text_fits_any_terminal(trainers in 1u32..200, width in 1usize..200, height in 0usize..60, name in ".{0,300}") {
            let lines = lines(&facts(trainers, &name), width, height);
            prop_assert!(lines.len() <= height);
            for line in lines {
                prop_assert!(line.chars().count() <= width && !line.contains(char::is_control), "{line:?}");
            }
        }
    }
}
