//! The simulated half of `bench simulator`: no lab, no clock.

use std::process::Command;

use serde_json::Value;

const BENCH: &str = env!("CARGO_BIN_EXE_weightsync-bench");

/// Every configuration, simulated alone.
fn rows() -> Vec<Value> {
    let folder = tempfile::tempdir().unwrap();
    let json = folder.path().join("record.json");
    let bench = Command::new(BENCH).args(["simulator", "--no-lab", "--json"]).arg(&json).output().unwrap();
    assert!(bench.status.success(), "{}", String::from_utf8_lossy(&bench.stderr));
    let record: Value = serde_json::from_slice(&std::fs::read(&json).unwrap()).unwrap();
    record["rows"].as_array().unwrap().clone()
}

fn named<'r>(rows: &'r [Value], name: &str) -> &'r Value {
    rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("no row is called {name}"))
}

fn seconds(row: &Value, what: &str) -> f64 {
    row[what].as_f64().unwrap()
}

#[test]
fn simulated_pushes_move_what_they_should_near_what_the_links_allow() {
    let rows = rows();
    assert!(rows.len() >= 8);
    for row in &rows {
        assert!(row["lab"].is_null() && row["difference"].is_null(), "{row}");
        let share = seconds(row, "links_seconds") / seconds(row, "simulated_seconds");
        // The fastest order of WRITEs ends with the links; the worst here loses one of 1 MiB of a short push.
        assert!((0.8..1.001).contains(&share), "{row}");
    }
    let even = named(&rows, "8 links, 64 KiB");
    assert_eq!(even["bytes"], 256_u64 << 20);
    assert_eq!(even["writes"], 4096);
    assert!(seconds(even, "simulated_seconds") < seconds(even, "links_seconds") * 1.01, "{even}");
}

#[test]
fn a_slow_link_is_slow_in_the_simulation() {
    let rows = rows();
    let [even, slow, slower] =
        ["8 links, 1024 KiB", "8 links, 1024 KiB, link 5 at 25 Mb/s", "8 links, 1024 KiB, link 5 at 10 Mb/s"]
            .map(|name| seconds(named(&rows, name), "simulated_seconds"));
    assert!(even < slow && slow < slower, "{even} {slow} {slower}");
    // Others take what it cannot: it alone would need ten times as long.
    assert!(slower < 1.25 * even, "{even} {slower}");
}
