//! Reads the JSON of any benchmark as series.
//!
//! Records with `series` say it themselves. In others every array of numbers whose key names a unit is one, and the text
//! fields of the objects around it are its name. Where there are none, single numbers are series of one round; elsewhere
//! they are made of the rounds and say nothing more.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context, bail};
use serde_json::Value;

use crate::series::{Better, Series};

/// Bytes of a record. One of 384 ranks with every round and sample has some 50 MB.
const RECORD_BYTES_MAX: u64 = 512 << 20;

/// A record, as far as it is compared.
pub(crate) struct Record {
    benchmark: Value,
    machine: Value,
    settings: Value,
    pub(crate) series: Vec<Series>,
}

impl Record {
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let mut text = String::new();
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        file.take(RECORD_BYTES_MAX + 1).read_to_string(&mut text)?;
        if text.len() as u64 > RECORD_BYTES_MAX {
            bail!("{} is longer than any benchmark's JSON", path.display());
        }
        let value = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        Self::of(value).with_context(|| format!("{} is not the JSON of a benchmark", path.display()))
    }

    fn of(mut value: Value) -> anyhow::Result<Self> {
        let Some(record) = value.as_object_mut() else { bail!("it is not an object") };
        let mut take = |key: &str| record.remove(key);
        let (Some(benchmark), Some(machine)) = (take("benchmark"), take("machine")) else {
            bail!("it has no `benchmark` or no `machine`");
        };
        let (settings, series) = (take("settings"), take("series"));
        let series = match series {
            Some(series) => serde_json::from_value(series).context("its `series`")?,
            None => {
                let mut found = Found::default();
                found.object("", record);
                if found.rounds.is_empty() { found.single } else { found.rounds }
            }
        };
        // Benchmarks without a list of settings say them as plain numbers and texts.
        let settings = settings.unwrap_or_else(|| {
            let plain = |(_, value): &(&String, &Value)| value.is_number() || value.is_string();
            record.iter().filter(plain).map(|(key, value)| (key.clone(), value.clone())).collect()
        });
        Ok(Self { benchmark, machine, settings, series })
    }

    /// What keeps this record from being compared with another one, one line each.
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        let mut all = Vec::new();
        different("benchmark", &self.benchmark, &other.benchmark, &mut all);
        different("machine", &self.machine, &other.machine, &mut all);
        different("settings", &self.settings, &other.settings, &mut all);
        all
    }
}

fn different(path: &str, a: &Value, b: &Value, all: &mut Vec<String>) {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: std::collections::BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let of = |side: &serde_json::Map<String, Value>| side.get(key).cloned().unwrap_or_default();
                different(&format!("{path}.{key}"), &of(a), &of(b), all);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (index, (a, b)) in a.iter().zip(b).enumerate() {
                different(&format!("{path}[{index}]"), a, b, all);
            }
        }
        _ if a == b => {}
        _ => all.push(format!("{path}: {a} and {b}")),
    }
}

/// The unit that a key names, and which way is good.
fn unit_of(key: &str) -> Option<(&'static str, Better)> {
    match key {
        "gb_per_second" => Some(("GB/s", Better::Higher)),
        "ratio" => Some(("", Better::Higher)),
        "seconds" => Some(("s", Better::Lower)),
        _ if key.ends_with("gb_per_second") => Some(("GB/s", Better::Higher)),
        _ if key.ends_with("_seconds") => Some(("s", Better::Lower)),
        _ if key.ends_with("_bytes") => Some(("bytes", Better::Lower)),
        _ => None,
    }
}

#[derive(Default)]
struct Found {
    rounds: Vec<Series>,
    single: Vec<Series>,
    /// How often each name has come: objects without a text of their own are numbered.
    names: BTreeMap<String, usize>,
}

impl Found {
    fn object(&mut self, path: &str, object: &serde_json::Map<String, Value>) {
        for (key, value) in object {
            let here = if path.is_empty() { key.clone() } else { format!("{path} / {key}") };
            match (unit_of(key), value) {
                (Some((unit, better)), Value::Number(figure)) => {
                    let name = self.unique(here);
                    self.single.push(Series::new(name, unit, better, figure.as_f64().into_iter().collect()));
                }
                (Some((unit, better)), Value::Array(rounds)) if rounds.iter().all(Value::is_number) => {
                    let rounds: Vec<f64> = rounds.iter().filter_map(Value::as_f64).collect();
                    if !rounds.is_empty() {
                        let name = self.unique(here);
                        self.rounds.push(Series::new(name, unit, better, rounds));
                    }
                }
                (_, Value::Object(inner)) => self.object(&named(&here, inner), inner),
                (_, Value::Array(items)) => {
                    for inner in items.iter().filter_map(Value::as_object) {
                        self.object(&named(&here, inner), inner);
                    }
                }
                _ => {}
            }
        }
    }

    fn unique(&mut self, name: String) -> String {
        let times = self.names.entry(name.clone()).or_default();
        *times += 1;
        if *times == 1 { name } else { format!("{name} #{times}") }
    }
}

fn named(path: &str, object: &serde_json::Map<String, Value>) -> String {
    object.values().filter_map(Value::as_str).fold(path.to_owned(), |path, text| format!("{path} {text}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn rounds_of_other_benchmarks_are_found() {
        let record = Record::of(json!({
            "benchmark": "loopback", "machine": {"cpu": "a"}, "span_bytes": 1024,
            "comparisons": [
                {"name": "tcp", "target": 0.95, "ratio": 1.0, "ours": {"name": "weightsync", "gb_per_second": [1.0, 2.0]},
                 "references": [{"name": "x", "gb_per_second": [3.0]}, {"name": "x", "gb_per_second": [4.0]}]}
            ]
        }))
        .unwrap();
        let names: Vec<(&str, usize)> =
            record.series.iter().map(|series| (series.name.as_str(), series.rounds.len())).collect();
        assert_eq!(
            names,
            [
                ("comparisons tcp / ours weightsync / gb_per_second", 2),
                ("comparisons tcp / references x / gb_per_second", 1),
                ("comparisons tcp / references x / gb_per_second #2", 1),
            ]
        );
    }

    #[test]
    fn single_figures_count_where_there_are_no_rounds() {
        let record = Record::of(json!({
            "benchmark": "plan", "machine": {},
            "jobs": [{"model": "m", "relay": "never", "transfers": 7, "plan_seconds": 1.5, "imbalance": [1.0, 1.1]}]
        }))
        .unwrap();
        assert_eq!(
            record.series,
            [Series::new("jobs m never / plan_seconds", "s", Better::Lower, vec![1.5])]
        );
    }

    #[test]
    fn a_difference_is_named_with_its_place() {
        let record = |cpu: &str, rounds: u32| {
            Record::of(json!({"benchmark": "b", "machine": {"hosts": [{"cpu": cpu}]}, "settings": {"rounds": rounds}, "series": []}))
                .unwrap()
        };
        assert!(record("x", 5).differences(&record("x", 5)).is_empty());
        assert_eq!(
            record("x", 5).differences(&record("y", 7)),
            [r#"machine.hosts[0].cpu: "x" and "y""#, "settings.rounds: 5 and 7"]
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,200}") {
            if let Ok(value) = serde_json::from_str(&text) {
                let _ = Record::of(value);
            }
        }
    }
}
