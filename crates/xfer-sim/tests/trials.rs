//! A fixed set of seeds, and whether the trials would notice if something were broken.

use std::collections::BTreeMap;

use xfer_sim::{Sabotage, Time, Trial, TrialEnd};

/// As many as `cargo xtask sim` runs.
const SEEDS: u64 = 1000;

#[test]
fn a_thousand_trials_hold_what_they_must() {
    let mut ends: Vec<TrialEnd> = Vec::new();
    for seed in 0..SEEDS {
        let trial = Trial::new(seed);
        match trial.run(None, None) {
            Ok(end) => ends.push(end),
            Err(error) => {
                panic!("seed {seed}: {trial}\n{error}\nagain: cargo xtask sim --seed {seed} --trace")
            }
        }
    }
    // They are worth something only while they reach what can go wrong.
    let count = |holds: fn(&TrialEnd) -> bool| ends.iter().filter(|end| holds(end)).count();
    for (what, least, found) in [
        ("commit everything", 500, count(|end| end.committed == end.versions)),
        ("end with a reason", 100, count(|end| end.reason.is_some() && end.committed < end.versions)),
        (
            "commit something, and end with a reason",
            30,
            count(|end| end.reason.is_some() && end.committed > 0),
        ),
        ("commit after an abort", 10, count(|end| end.aborts > 0 && end.committed == end.versions)),
        ("close rails at receivers", 20, count(|end| end.fenced > 0)),
        ("have bytes arrive that nobody waits for", 10, count(|end| end.late_arrivals > 0)),
        ("pass bytes on", 100, count(|end| end.relayed_bytes > 0)),
        ("fill slots", 300, count(|end| end.stages > 0)),
        ("refuse", 20, count(|end| end.refusals > 0)),
    ] {
        assert!(found >= least, "only {found} trials {what}");
    }
}

#[test]
fn every_defect_is_found() {
    for defect in Sabotage::ALL {
        let found = (0..SEEDS).find(|seed| Trial::new(*seed).run(Some(defect), None).is_err());
        assert!(found.is_some(), "{defect} is not found within {SEEDS} seeds");
        assert_eq!(defect.name().parse(), Ok(defect));
    }
}

#[test]
fn a_trial_replays_to_the_event() {
    let told = |seed| {
        let mut lines: Vec<String> = Vec::new();
        let mut trace = |at: Time, what: &str| lines.push(format!("{at} {what}"));
        let trial = Trial::new(seed);
        let end = trial.run(None, Some(&mut trace)).map_err(|error| error.to_string());
        (trial.to_string(), end, lines)
    };
    let mut different = BTreeMap::new();
    for seed in 0..30 {
        let (described, end, lines) = told(seed);
        assert!(lines.len() > 10, "seed {seed} tells {} events", lines.len());
        assert_eq!((described.clone(), end, lines), told(seed));
        different.insert(described, seed);
    }
    assert!(different.len() > 25);
}
