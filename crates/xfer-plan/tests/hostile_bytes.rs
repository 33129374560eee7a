//! Valid encodings, damaged: every decoder refuses them or reads something that is valid too.

mod hostile;
#[allow(dead_code)] // a part of it is enough here
mod scenario;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use scenario::Choices;
use xfer_plan::model::{JobSpec, ModelSpec};
use xfer_plan::plan;

/// A manifest and the plan for it, as `hostile::plan` reads them.
fn planned(choices: Vec<u32>) -> Vec<u8> {
    let manifest = scenario::manifest(&mut Choices::new(choices));
    let plan = plan(&manifest).unwrap();
    let mut bytes = postcard::to_allocvec(&manifest).unwrap();
    bytes.extend(postcard::to_allocvec(&plan).unwrap());
    bytes
}

/// A place, how many bytes go there, and which come instead: flips, cuts, insertions, and with runs of 0xff numbers
/// that claim to be huge.
type Damage = (Index, usize, Vec<u8>);

fn damage() -> impl Strategy<Value = Vec<Damage>> {
    let byte = prop_oneof![any::<u8>(), Just(0xff), Just(0x80), Just(0)];
    vec((any::<Index>(), 0..4_usize, vec(byte, 0..10)), 1..4)
}

fn damaged(mut bytes: Vec<u8>, damage: Vec<Damage>) -> Vec<u8> {
    for (at, gone, instead) in damage {
        let at = at.index(bytes.len() + 1);
        let end = bytes.len().min(at + gone);
        bytes.splice(at..end, instead);
    }
    bytes
}

#[test]
fn every_truncation_of_a_plan() {
    // The first is empty but for its names; the others have shards, replicas, fused parameters.
    for seed in 0..4 {
        let bytes = planned((0..200).map(|n| n * seed * 7919 % 1009).collect());
        for end in 0..=bytes.len() {
            hostile::plan(&bytes[..end]);
        }
    }
}

/// Found by fuzzing: the summary added up what a plan's trainers claim to send.
#[test]
fn sums_that_overflow_can_be_shown() {
    let manifests = (0..).map(|n| scenario::manifest(&mut Choices::new(vec![n; 100])));
    let manifest = manifests.take(100).find(|manifest| manifest.trainers.len() > 1).unwrap();
    let mut plan = plan(&manifest).unwrap();
    for part in &mut plan.trainers {
        (part.bytes, part.writes) = (u64::MAX, u64::MAX);
    }
    let mut bytes = postcard::to_allocvec(&manifest).unwrap();
    bytes.extend(postcard::to_allocvec(&plan).unwrap());
    hostile::plan(&bytes);
}

#[test]
fn every_truncation_of_a_description() {
    for text in hostile::DESCRIPTIONS {
        for end in 0..=text.len() {
            hostile::model_spec(&text.as_bytes()[..end]);
        }
    }
}

/// The examples must be accepted: a damaged refusal would teach nothing.
#[test]
fn descriptions_are_valid() {
    for text in hostile::DESCRIPTIONS {
        let config = ModelSpec::from_config(text).map(drop);
        let job = JobSpec::from_json(text).and_then(|job| job.manifest());
        let planned = job.map(|manifest| hostile::is_small(&manifest) && plan(&manifest).is_ok());
        assert!(config.is_ok() || planned == Ok(true), "{text}: {config:?}, {planned:?}");
    }
}

/// The text with its numbers, one after another, replaced.
fn with_text_number(text: &str, place: Index, number: &str) -> String {
    let starts = text.char_indices().filter(|&(at, c)| {
        c.is_ascii_digit() && !text[..at].ends_with(|before: char| before.is_ascii_digit())
    });
    let starts: Vec<usize> = starts.map(|(at, _)| at).collect();
    let (before, rest) = text.split_at(*place.get(&starts));
    format!("{before}{number}{}", rest.trim_start_matches(|c: char| c.is_ascii_digit()))
}

const NUMBERS: [&str; 12] = [
    "0",
    "1",
    "2",
    "3",
    "5",
    "64",
    "-1",
    "0.5",
    "1e400",
    "4294967295",
    "9223372036854775808",
    "18446744073709551615",
];

proptest! {
    #[test]
    fn damaged_plans(choices in vec(any::<u32>(), 0..200), damage in damage()) {
        hostile::plan(&damaged(planned(choices), damage));
    }

    #[test]
    fn absurd_numbers_in_plans(
        choices in vec(any::<u32>(), 0..200),
        numbers in vec((any::<Index>(), select(&hostile::NUMBERS[..])), 1..4),
    ) {
        let bytes = planned(choices);
        let absurd = numbers.into_iter().fold(bytes, |bytes, (at, number)| {
            hostile::with_number(&bytes, at.index(bytes.len()), number)
        });
        hostile::plan(&absurd);
    }

    #[test]
    fn damaged_descriptions(which in 0..hostile::DESCRIPTIONS.len(), damage in damage()) {
        hostile::model_spec(&damaged(hostile::DESCRIPTIONS[which].into(), damage));
    }

    #[test]
    fn absurd_numbers_in_descriptions(
        which in 0..hostile::DESCRIPTIONS.len(),
        numbers in vec((any::<Index>(), select(&NUMBERS[..])), 1..4),
    ) {
        let text = hostile::DESCRIPTIONS[which].to_owned();
        let absurd =
            numbers.into_iter().fold(text, |text, (place, number)| with_text_number(&text, place, number));
        hostile::model_spec(absurd.as_bytes());
    }

    #[test]
    fn any_bytes(bytes in vec(any::<u8>(), 0..300)) {
        hostile::plan(&bytes);
        hostile::model_spec(&bytes);
    }
}
