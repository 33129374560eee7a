//! `weightsync traffic` as a user runs it: the worked example of Llama-3-70B, the same facts as JSON, and what is refused.

mod common;

use common::job::Job;
use serde_json::{Value, json};

/// A figure of the JSON: digits in a string.
fn figure(value: &Value) -> u128 {
    value.as_str().expect("a string of digits").parse().unwrap()
}

fn json_of(arguments: &str) -> Value {
    let job = Job::new();
    let output = job.run(&format!("traffic {arguments} --json")).succeeds();
    job.end();
    serde_json::from_str(&output.stdout).unwrap()
}

/// Llama-3-70B has 70.55 billion parameters, which the example rounds to 70: figures that carry them are that much larger.
#[test]
fn the_worked_example_as_json() {
    let facts = json_of("--model llama-3-70b --tp 8 --pp 8 --dp 8");
    assert_eq!(facts["mini_batches"], 178_028);
    assert_eq!((&facts["layers"], &facts["hidden"]), (&json!(80), &json!(8192)));
    let parameters = u128::from(facts["parameters"].as_u64().unwrap());
    assert_eq!(parameters / 100_000_000, 705);
    let per_parameter = 178_028 * 2 * parameters;
    let activations = 2 * 156_000_000_000 * 8192_u128;
    let expected = [
        ("data_parallel", 56 * per_parameter, 0, 178_028, 0),
        ("fsdp", 7 * per_parameter, 7 * per_parameter, 80 * 178_028, 80 * 178_028),
        (
            "tensor_parallel",
            2 * 80 * 7 * per_parameter,
            2 * 80 * 56 * activations,
            160 * 178_028,
            160 * 156_000_000_000,
        ),
        ("pipeline_parallel", 7 * activations, 7 * activations, 0, 0),
    ];
    let found = facts["schemes"].as_array().unwrap().iter().map(|of| {
        assert_eq!(of["ranks"], 8);
        let scheme = of["scheme"].as_str().unwrap();
        let [backward, forward] = ["backward_bytes", "forward_bytes"].map(|key| figure(&of[key]));
        (scheme, backward, forward, figure(&of["syncs"]), figure(&of["passes"]))
    });
    assert_eq!(found.collect::<Vec<_>>(), expected);

    let facts = json_of("--model llama-3-70b --tp 8 --pp 8 --dp 16");
    let job = &facts["three_d"];
    assert_eq!(job["ranks"], 1024);
    let total = figure(&job["backward_bytes"]) + figure(&job["forward_bytes"]);
    assert_eq!(total / 1_000_000_000_000_000_000, 85);
    assert_eq!(figure(&facts["push"]["bytes"]), 2 * parameters);
    let fraction = facts["push"]["fraction_of_mini_batch"].as_f64().unwrap();
    assert!((fraction * total as f64 / (178_028.0 * 2.0 * parameters as f64) - 1.0).abs() < 1e-12);
}

#[test]
fn the_table_has_decimal_units() {
    let job = Job::new();
    let output = job.run("traffic --model llama-3-70b --tp 8 --pp 8 --dp 16").succeeds();
    for words in ["Llama-3-70B", "17.89 PB", "22.90 EB", "tp 8 x pp 8 x dp 16", "1024", "178028 mini-batches"]
    {
        let found = output.stdout.to_lowercase().contains(&words.to_lowercase());
        assert!(found, "{words:?} is not said: {output}");
    }
    // One rank sends nothing, and a push is no fraction of that.
    let output = job.run("traffic --model llama-3-70b").succeeds();
    assert!(output.stdout.contains("the job itself sends nothing"), "{output}");
    job.end();
}

#[test]
fn any_config_and_any_push() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 64,
        "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100,
        "tie_word_embeddings": false
    });
    std::fs::write(&path, config.to_string()).unwrap();
    let facts = json_of(&format!(
        "--config {} --dp 3 --tokens 1e6 --samples 1000 --batch 300 --push-bytes 12345",
        path.display()
    ));
    // Two embeddings, and per layer four square projections, three of the MLP, two norms; one norm at the end.
    let parameters = 2 * 100 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64;
    assert_eq!(facts["parameters"], parameters);
    assert_eq!(facts["mini_batches"], 4);
    assert_eq!(figure(&facts["three_d"]["backward_bytes"]), 2 * 4 * parameters as u128 * 3 * 2);
    assert_eq!(facts["push"]["bytes"], "12345");
}

#[test]
fn what_is_wrong_is_named() {
    let job = Job::new();
    let folder = tempfile::tempdir().unwrap();
    let config = |text: &[u8]| {
        let path = folder.path().join("config.json");
        std::fs::write(&path, text).unwrap();
        format!("traffic --config {}", path.display())
    };
    for (arguments, code, words) in [
        ("traffic".to_owned(), 2, &["--model", "--config"][..]),
        ("traffic --model llama-3-70b --config x".to_owned(), 2, &["--config"]),
        ("traffic --model llama-3-70b --tokens 0".to_owned(), 2, &["--tokens"]),
        ("traffic --model llama-3-70b --batch 1.5".to_owned(), 2, &["--batch"]),
        ("traffic --model nobody-7b".to_owned(), 1, &["nobody-7b", "llama-3-70b"]),
        ("traffic --model llama-3-70b --tp 0".to_owned(), 1, &["tensor-parallel group is 0"]),
        ("traffic --model llama-3-70b --dp 65537".to_owned(), 1, &["data-parallel group", "65536"]),
        ("traffic --model llama-3-70b --tp 256 --dp 257".to_owned(), 1, &["65536 ranks"]),
        (
            "traffic --model llama-3-70b --tokens 2e15 --tp 2".to_owned(),
            1,
            &["number of tokens is 2000000000000000"],
        ),
        (
            "traffic --config /nonexistent/config.json".to_owned(),
            1,
            &["/nonexistent/config.json", "No such file"],
        ),
        (config(b"{"), 1, &["config.json"]),
        (config(&[b' '; (1 << 20) + 1]), 1, &["config.json", "longer than 1.05 MB"]),
    ] {
        job.run(&arguments).fails(code, words);
    }
    job.end();
}
