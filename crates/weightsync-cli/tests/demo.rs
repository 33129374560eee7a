//! `weightsync demo`, as a user runs it: a whole job of real processes, over every fabric that works anywhere.

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use common::job::{Cluster, Job, Output};
use common::{blocks, checkpoint_of, synthetic, tiny, write_tensors};
use safetensors::Dtype;
use serde_json::Value;
use weightsync_cli::checkpoint::{Checkpoint, INDEX_FILE};
use weightsync_cli::synthetic::Shape;

over_each_fabric! {
    every_version_is_verified_and_traced,
    the_json_adds_up,
    linear_layers_arrive_in_fp8,
    checksums_are_compared_before_each_commit,
    ranks_without_a_row_take_part,
    an_indexed_checkpoint_goes_to_more_ranks_than_it_comes_from,
    one_to_one,
}

fn demo(job: &Job, fabric: &str, checkpoint: &Path, more: &str) -> Output {
    let checkpoint = checkpoint.display();
    job.run(&format!("demo --fabric {fabric} --checkpoint {checkpoint} {more}")).succeeds()
}

fn json(output: &Output) -> Value {
    serde_json::from_str(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output}"))
}

fn sum<'a>(values: impl IntoIterator<Item = &'a Value>, of: &str) -> u64 {
    values.into_iter().map(|value| value[of].as_u64().unwrap()).sum()
}

fn every_version_is_verified_and_traced(fabric: &str) {
    let (job, checkpoint) = (Job::new(), tiny());
    let trace = checkpoint.path().join("trace.json");
    let shape = format!("--trainers 3 --inference 2 --steps 3 --trace {}", trace.display());
    let output = demo(&job, fabric, checkpoint.path(), &shape);
    let verified = output.stdout.lines().find(|line| line.starts_with("verified:"));
    let verified = verified.unwrap_or_else(|| panic!("no line that says so: {output}"));
    assert!(verified.contains("3 versions on 2 inference ranks"), "{verified}");

    let trace: Value = serde_json::from_str(&fs::read_to_string(trace).unwrap()).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let of_phase = |phase: &'static str| events.iter().filter(move |event| event["ph"] == phase);
    let mut found = BTreeSet::new();
    for span in of_phase("X") {
        let named =
            of_phase("M").find(|event| event["name"] == "process_name" && event["pid"] == span["pid"]);
        let rank = named.unwrap()["args"]["name"].as_str().unwrap().to_owned();
        assert!(span["ts"].as_f64().unwrap() > 0.0 && span["dur"].as_f64().unwrap() >= 0.0, "{span}");
        found.insert((rank, span["args"]["version"].as_u64().unwrap()));
    }
    let ranks = ["trainer 0", "trainer 1", "trainer 2", "inference 0", "inference 1"];
    let expected = ranks.iter().flat_map(|rank| (1..=3).map(|version| ((*rank).to_owned(), version)));
    assert_eq!(found, expected.collect());
    job.end();
}

fn the_json_adds_up(fabric: &str) {
    let (job, checkpoint) = (Job::new(), tiny());
    let output = demo(&job, fabric, checkpoint.path(), "--trainers 3 --inference 2 --steps 3 --json");
    let summary = json(&output);
    assert_eq!(summary["verified"], true);
    assert_eq!(summary["fabric"], fabric);
    let ranks = summary["ranks"].as_array().unwrap();
    let (trainers, inference) = ranks.split_at(3);
    assert_eq!(sum(trainers, "weight_bytes"), Shape::tiny().bytes(), "the shards are the checkpoint");
    let held = sum(inference, "weight_bytes");
    assert_eq!(inference.len(), 2);
    assert!(held > Shape::tiny().bytes(), "norms are held twice");
    assert_eq!(summary["plan"]["bytes"], held, "every byte that is held is written, once");
    for trainer in trainers {
        let routes = trainer["routes"].as_object().unwrap();
        assert_eq!(routes.keys().collect::<Vec<_>>(), ["inference 0", "inference 1"]);
        assert!(routes.values().all(|rail| rail.as_str().unwrap().contains(fabric)), "{trainer}");
    }
    let versions = summary["versions"].as_array().unwrap();
    for (version, number) in versions.iter().zip(1_u64..) {
        assert_eq!(version["version"], number);
        assert_eq!(version["bytes"], held);
        assert_eq!(version["verified_bytes"], held);
        assert_eq!(version["verified_ranks"], 2);
        assert_eq!(version["writes"], summary["plan"]["writes"]);
    }
    assert_eq!(versions.len(), 3);
    job.end();
}

/// Trainers' shards cut blocks, and those of two inference ranks do not. Those of three do: then nothing is quantised.
fn linear_layers_arrive_in_fp8(fabric: &str) {
    let (job, shape) = (Job::new(), blocks());
    let checkpoint = synthetic(&shape);
    let held = |inference: u32, more: &str| {
        let line = format!("--trainers 3 --inference {inference} --steps 2 --json {more}");
        let summary = json(&demo(&job, fabric, checkpoint.path(), &line));
        assert_eq!(summary["verified"], true);
        let held = sum(&summary["ranks"].as_array().unwrap()[3..], "weight_bytes");
        for version in summary["versions"].as_array().unwrap() {
            assert_eq!((&version["verified_bytes"], &version["bytes"]), (&held.into(), &held.into()));
        }
        held
    };
    // Of two bytes an element one is left, and there is a scale for each block.
    let linear = 2 * (4 * 256 * 200 + 3 * 512 * 200);
    let scales = 2 * 4 * (4 * 2 * 2 + 3 * 4 * 2);
    assert_eq!(held(2, "") - held(2, "--fp8"), linear - scales);
    assert_eq!(held(3, ""), held(3, "--fp8"));
    job.end();
}

/// More trainers than any tensor has rows, more inference ranks than one has, a scalar, and tensors of nothing.
fn checksums_are_compared_before_each_commit(fabric: &str) {
    let (job, checkpoint) = (Job::new(), tiny());
    // Short chunks and a low watermark: many operations, gathered and not.
    let shape = "--trainers 3 --inference 2 --steps 2 --chunk 1 --watermark 1";
    for quantised in ["", "--fp8"] {
        let shape = format!("{shape} {quantised} --verify full --json");
        let facts = json(&demo(&job, fabric, checkpoint.path(), &shape));
        for version in facts["versions"].as_array().unwrap() {
            let Value::Object(sides) = &version["checksums"] else { panic!("no checksums in {version}") };
            for side in sides.values() {
                assert_eq!(side["bytes"], version["bytes"], "{version}");
                assert!(
                    side["params"].as_u64().unwrap() > 0 && side["seconds"].as_f64().unwrap() > 0.0,
                    "{side}"
                );
            }
        }
    }
    let output = demo(&job, fabric, checkpoint.path(), &format!("{shape} --verify sampled=0.5"));
    assert!(output.stdout.contains("checksums of version 2: "), "{output}");
    let facts = json(&demo(&job, fabric, checkpoint.path(), &format!("{shape} --json")));
    assert!(facts["versions"].as_array().unwrap().iter().all(|version| version.get("checksums").is_none()));
    job.end();
}

fn ranks_without_a_row_take_part(fabric: &str) {
    let job = Job::new();
    let small: [(&str, Dtype, &[usize]); 5] = [
        ("lm_head.weight", Dtype::BF16, &[2, 8]),
        ("scale", Dtype::F32, &[]),
        ("no_rows.weight", Dtype::F32, &[0, 4]),
        ("no_columns.weight", Dtype::U8, &[3, 0]),
        ("steps", Dtype::I64, &[3]),
    ];
    // In the second one trainers and an inference rank have no byte at all.
    for tensors in [&small[..], &small[..1]] {
        let checkpoint = checkpoint_of(tensors);
        let output = demo(&job, fabric, checkpoint.path(), "--trainers 5 --inference 3 --steps 2 --json");
        let summary = json(&output);
        assert_eq!(summary["verified"], true);
        let ranks = summary["ranks"].as_array().unwrap();
        assert_eq!(ranks.iter().any(|rank| rank["weight_bytes"] == 0), tensors.len() == 1, "{output}");
    }
    job.end();
}

fn an_indexed_checkpoint_goes_to_more_ranks_than_it_comes_from(fabric: &str) {
    let (job, folder) = (Job::new(), tiny());
    // The same checkpoint in two files, which only their index joins.
    let whole = Checkpoint::open(folder.path()).unwrap();
    let mut files = [Vec::new(), Vec::new()];
    let mut weight_map = serde_json::Map::new();
    for (index, tensor) in whole.tensors().iter().enumerate() {
        let shape = tensor.shape.iter().map(|&size| size as usize).collect();
        files[index % 2].push((tensor.name.clone(), Dtype::BF16, shape));
        weight_map.insert(tensor.name.clone(), format!("part-{}.safetensors", index % 2).into());
    }
    let split = tempfile::tempdir().unwrap();
    for (number, tensors) in files.iter().enumerate() {
        write_tensors(&split.path().join(format!("part-{number}.safetensors")), tensors);
    }
    let index = split.path().join(INDEX_FILE);
    fs::write(&index, serde_json::json!({ "metadata": {}, "weight_map": weight_map }).to_string()).unwrap();
    fs::copy(folder.path().join("config.json"), split.path().join("config.json")).unwrap();
    demo(&job, fabric, &index, "--trainers 2 --inference 3 --steps 2");
    job.end();
}

fn one_to_one(fabric: &str) {
    let (job, checkpoint) = (Job::new(), tiny());
    let output = demo(&job, fabric, checkpoint.path(), "--trainers 1 --inference 1 --steps 2 --json");
    let summary = json(&output);
    assert_eq!(summary["plan"]["bytes"], Shape::tiny().bytes());
    assert_eq!(summary["verified"], true);
    job.end();
}

#[test]
fn an_inference_rank_compares_every_nth_version() {
    let (cluster, controller) = Cluster::start("local", 1, 1);
    let checkpoint = tiny();
    let serve = cluster.rank("serve", 0, checkpoint.path(), "--verify --verify-every 3");
    cluster.rank("push", 0, checkpoint.path(), "--steps 7").finish().succeeds();
    let output = serve.finish().succeeds();
    assert_eq!(output.versions("served"), [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(output.versions("verified"), [3, 6]);
    controller.finish().succeeds();
    let refused = cluster
        .job
        .run("serve --controller x --rank 0 --trainers 1 --inference 1 --checkpoint x --verify-every 3");
    refused.fails(2, &["--verify"]);
    cluster.job.end();
}
