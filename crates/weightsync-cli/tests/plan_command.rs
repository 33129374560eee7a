//! `weightsync plan` as a user runs it: the summary, the same facts as JSON and as a page, explanations, differences, and
//! what is refused.

mod common;

use std::fs;
use std::path::Path;

use common::job::{Job, Output};
use serde_json::{Value, json};

const TOY: &str = "plan --model qwen3-0.6b --from fsdp=4 --to tp=2 --train-gpus 4 --infer-gpus 2";

fn run(arguments: &str) -> Output {
    let job = Job::new();
    let output = job.run(arguments);
    job.end();
    output
}

fn json_of(arguments: &str) -> Value {
    serde_json::from_str(&run(&format!("{arguments} --json")).succeeds().stdout).unwrap()
}

#[test]
fn the_summary_fits_a_screen_and_says_what_is_predicted() {
    let output = run(TOY).succeeds();
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert!(lines.len() <= 24, "{} lines: {output}", lines.len());
    assert!(lines.iter().all(|line| line.chars().count() <= 100), "{output}");
    for words in [
        "qwen3-0.6b, 596.0 M parameters, 4 trainers to 2 inference ranks",
        "trainers on 1 host: fsdp=4; inference on 1 host: tp=2",
        "bytes per NIC",
        "imbalance",
        "lower bound  11.9 ms: inference 0 receives 596 MB at 50.00 GB/s",
        "predicted    12.0 ms: inference 0 receives",
        "staging",
        "busiest ranks, predicted:",
        "11.9 ms  inference 1 on infer0 receives 596 MB",
    ] {
        assert!(output.stdout.contains(words), "{words:?} is not said: {output}");
    }
    // Nothing is measured: each time is a bound or stands below a word that says what it is.
    for line in lines.iter().filter(|line| line.contains(" ms") && !line.starts_with("  ")) {
        assert!(line.starts_with("lower bound") || line.starts_with("predicted"), "{line}");
    }
}

#[test]
fn json_has_the_facts_of_the_summary() {
    let facts = json_of(TOY);
    assert_eq!(facts["job"]["parameters"], 596_049_920);
    assert_eq!(facts["checked_in_seconds"], Value::Null);
    let report = &facts["report"];
    assert_eq!(report["relay"], "auto");
    // Two bytes an element to two ranks, which share even what both get, and pass that on over NVLink.
    assert_eq!(report["bound"]["bytes"], 596_049_920);
    assert_eq!(report["bound"]["limited_by"], json!([{"receiver": 0}, "nic_in"]));
    assert_eq!(report["trainers"]["sends"]["nics"]["count"], 16);
    assert_eq!(report["receivers"]["receives"]["nics"]["count"], 8);
    assert_eq!(report["busiest"].as_array().unwrap().len(), 5);
    assert_eq!(report["timeline"].as_array().unwrap().len(), 30);
    assert_eq!(report["timeline"][29]["nanoseconds"], report["predicted"]["nanoseconds"]);
    let cells = report["flows"]["from_trainers"].as_array().unwrap();
    let sum: u64 =
        cells.iter().flat_map(|row| row.as_array().unwrap()).map(|cell| cell.as_u64().unwrap()).sum();
    assert_eq!(report["payload"]["trainer_nic_bytes"], sum);
    // Options reach the planner.
    let chunked =
        json_of(&format!("{TOY} --chunk 64 --watermark 64 --relay never --nic-gbps 200 --nics-per-gpu 1"));
    assert_eq!(chunked["report"]["staging"]["watermark_bytes"], 64 << 20);
    assert_eq!(chunked["report"]["payload"]["nvlink_bytes"], 0);
    assert_eq!(chunked["report"]["bound"]["bytes_per_second"], 25_000_000_000_u64);
    assert_eq!(chunked["report"]["trainers"]["sends"]["nics"]["count"], 4);
    let operations = |facts: &Value| facts["report"]["counts"]["operations"].as_u64().unwrap();
    assert!(operations(&chunked) > 5 * operations(&facts));
}

#[test]
fn a_job_file_and_a_config_plan_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let [spec, config] = ["job.json", "config.json"].map(|name| folder.path().join(name));
    let model = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 256,
        "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000,
        "tie_word_embeddings": false
    });
    fs::write(&config, model.to_string()).unwrap();
    let job = json!({
        "model": {"config": model}, "trainers": {"layout": "fsdp=3"},
        "receivers": {"layout": "tp=2,replicas=2", "fp8": {"block": [128, 128], "scales": "ue8m0"}},
        "options": {"relay": "per-host"}
    });
    fs::write(&spec, job.to_string()).unwrap();
    let of_spec = json_of(&format!("plan --spec {} --check", spec.display()));
    let of_config = json_of(&format!(
        "plan --config {} --from fsdp=3 --to tp=2,replicas=2 --fp8 --scales ue8m0 --relay per-host --check",
        config.display()
    ));
    assert_eq!(of_spec["report"], of_config["report"]);
    assert!(of_spec["checked_in_seconds"].as_f64().is_some());
    assert!(of_spec["report"]["exchanges"]["blocks"].as_u64().unwrap() > 0);
    let output = run(&format!("plan --spec {} --relay chain --check", spec.display())).succeeds();
    for words in ["check        passed in", "routes chain", "exchanges"] {
        assert!(output.stdout.contains(words), "{words:?} is not said: {output}");
    }
}

#[test]
fn tensors_and_parameters_are_explained() {
    let (norm, qkv) = ("model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.qkv_proj.weight");
    let output = run(&format!("{TOY} --explain {norm}")).succeeds();
    for words in [
        "a source tensor, and a parameter",
        "trainer 0 (train0) sends 512 B",
        "to inference 0-1",
        "nobody else has all of it",
    ] {
        assert!(output.stdout.contains(words), "{words:?} is not said: {output}");
    }
    assert!(!output.stdout.contains("bytes per NIC"), "{output}");
    let all = json_of(&format!("{TOY} --explain {qkv} --rank 1"));
    assert_eq!(
        (&all["is_param"], &all["is_tensor"], &all["receiver"]),
        (&json!(true), &json!(false), &json!(1))
    );
    let boxes = all["transfers"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|transfer| transfer["boxes"].as_array().unwrap());
    let rows = boxes.map(|of| of["result"][0][1].as_u64().unwrap()).sum::<u64>();
    assert_eq!(rows, (16 + 8 + 8) * 128 / 2);
    let with_replicas = "plan --model qwen3-0.6b --from fsdp=2,dp=2 --to tp=2";
    let output = run(&format!("{with_replicas} --explain model.norm.weight")).succeeds();
    assert!(output.stdout.contains("one of 2 that have it"), "{output}");
}

#[test]
fn plans_are_written_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (bin, text, other) = (path("a.bin"), path("a.json"), path("other.bin"));
    let wrote = run(&format!("{TOY} --out {bin}")).succeeds();
    assert!(wrote.stderr.contains(&format!("wrote {bin}")), "{wrote}");
    run(&format!("{TOY} --out {text}")).succeeds();
    run(&format!("{TOY} --relay never --out {other}")).succeeds();
    let equal = run(&format!("plan diff {bin} {text}")).succeeds();
    assert!(equal.stdout.contains("the plans are equal"), "{equal}");
    let differ = run(&format!("plan diff {bin} {other}")).fails(1, &["the plans differ"]);
    for words in ["different manifests", "predicted:", "lower bound:", "only in b"] {
        assert!(differ.stdout.contains(words), "{words:?} is not said: {differ}");
    }
    let output = run(&format!("plan diff {bin} {other} --json")).fails(1, &["the plans differ"]);
    let facts: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(facts["equal"], false);
    assert!(facts["trainer_bytes"]["a"].as_u64() < facts["trainer_bytes"]["b"].as_u64());
}

#[test]
fn damaged_plan_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (good, bad) = (path("good.bin"), path("bad.bin"));
    run(&format!("{TOY} --out {good}")).succeeds();
    let bytes = fs::read(&good).unwrap();
    let changed = |at: usize| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        bytes
    };
    // The first byte counts parameters: a huge number of them must not take huge memory.
    let many = [&[0xff, 0xff, 0xff, 0xff, 0x7f], &bytes[1..]].concat();
    let longer = [&bytes[..], &[0]].concat();
    let cut = bytes[..bytes.len() / 2].to_vec();
    let digest = changed(bytes.len() - 1);
    let cases: [(Vec<u8>, &str); 7] = [
        (Vec::new(), "it is no plan"),
        (cut, "it is no plan"),
        (many, "it is no plan"),
        (longer, "it goes on after the plan"),
        (digest, "its digest is not"),
        (changed(bytes.len() / 3), "cannot use"),
        (changed(bytes.len() * 2 / 3), "cannot use"),
    ];
    for (bytes, words) in cases {
        fs::write(&bad, bytes).unwrap();
        let output = run(&format!("plan diff {good} {bad}")).fails(1, &[words, bad.as_str()]);
        assert!(output.stdout.is_empty(), "{output}");
    }
    let text = path("bad.json");
    for content in ["", "{}", "[1, 2", "{\"params\": 7}"] {
        fs::write(&text, content).unwrap();
        run(&format!("plan diff {good} {text}")).fails(1, &["it is no plan"]);
    }
}

#[test]
fn the_page_needs_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    let output = run(&format!("{TOY} --html {}", page.display())).succeeds();
    assert!(output.stderr.contains("page.html"), "{output}");
    let text = fs::read_to_string(&page).unwrap();
    for word in ["http:", "https:", "src=", "href=", "@import", "url("] {
        assert!(!text.contains(word), "{word}");
    }
    let facts = text.split_once(r#"<script id="facts" type="application/json">"#).unwrap().1;
    let facts: Value = serde_json::from_str(facts.split_once("</script>").unwrap().0).unwrap();
    assert_eq!(facts["report"], json_of(TOY)["report"]);

    // A name that would be markup, in a job of one's own.
    let spec = folder.path().join("job.json");
    let tensor = "</script><img src=x>";
    let job = json!({
        "model": {"tensors": [{"name": tensor, "dtype": "BF16", "shape": [8, 8]}]},
        "trainers": {"layout": "fsdp=2"},
        "receivers": {"layout": "replicas=1", "parameters": [{"name": tensor, "dtype": "BF16", "map": {"tensor": tensor}}]}
    });
    fs::write(&spec, job.to_string()).unwrap();
    run(&format!("plan --spec {} --html {}", spec.display(), page.display())).succeeds();
    let text = fs::read_to_string(&page).unwrap();
    assert!(!text.contains("<img") && text.contains("\\u003cimg"));

    // Without a name the page is in the present folder, and only if it is asked for.
    let job = Job::new();
    let mut command = job.command(TOY.split(' '));
    job.spawn(command.current_dir(folder.path())).finish().succeeds();
    assert!(!folder.path().join("weightsync-plan.html").exists());
    let mut command = job.command(TOY.split(' ').chain(["--html"]));
    job.spawn(command.current_dir(folder.path())).finish().succeeds();
    assert!(folder.path().join("weightsync-plan.html").exists());
    job.end();
}

#[test]
fn what_is_wrong_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let spec = folder.path().join("job.json");
    fs::write(&spec, r#"{"model": {"preset": "qwen3-0.6b"}, "trainer": {}}"#).unwrap();
    let with = |from: &str, to: &str| format!("plan --model qwen3-0.6b --from {from} --to {to}");
    let spec = |more: &str| format!("plan --spec {}{more}", Path::new(&spec).display());
    for (arguments, code, words) in [
        ("plan".to_owned(), 2, &["--model", "--config", "--spec"][..]),
        ("plan --model qwen3-0.6b".to_owned(), 2, &["--from", "--to"]),
        ("plan --model qwen3-0.6b --from fsdp=2 --to tp=2 --spec x".to_owned(), 2, &["--spec"]),
        (format!("{TOY} --scales ue8m0"), 2, &["--fp8"]),
        (format!("{TOY} --rank 1"), 2, &["--explain"]),
        (format!("{TOY} --relay sometimes"), 2, &["per-host", "chain"]),
        (format!("{TOY} --nic-gbps 0"), 2, &["--nic-gbps"]),
        ("plan diff a.bin".to_owned(), 2, &["<B>"]),
        ("plan --model nobody-7b --from fsdp=2 --to tp=2".to_owned(), 1, &["nobody-7b", "qwen3-0.6b"]),
        (TOY.replace("--train-gpus 4", "--train-gpus 8"), 1, &["4 GPU(s)", "there are 8"]),
        (TOY.replace("--infer-gpus 2", "--infer-gpus 3"), 1, &["2 GPU(s)", "there are 3"]),
        (with("fsdp=0", "tp=2"), 1, &["fsdp=0", "from 1"]),
        (with("fsdp=1048576", "tp=2"), 1, &["fsdp", "65536"]),
        (with("fsdp=65536,pp=65536", "tp=2"), 1, &["65536 ranks"]),
        (with("fsdp=2", "replicas=65537"), 1, &["replicas"]),
        (with("fsdp=2,sp=2", "tp=2"), 1, &["sp", "fsdp, hsdp"]),
        (with("fsdp=2", "tp=5"), 1, &["tp=5"]),
        (format!("{TOY} --nics-per-gpu 0"), 1, &["rails_per_gpu"]),
        (format!("{TOY} --gpus-per-host 0"), 1, &["gpus_per_host"]),
        (format!("{TOY} --out plan.txt"), 1, &["plan.txt", ".bin or .json"]),
        (format!("{TOY} --out /nonexistent/plan.bin"), 1, &["/nonexistent/plan.bin", "No such file"]),
        (format!("{TOY} --html /nonexistent/page.html"), 1, &["/nonexistent/page.html"]),
        (
            format!("{TOY} --explain model.norm.wieght"),
            1,
            &["model.norm.wieght", "near it", "`model.norm.weight`"],
        ),
        (format!("{TOY} --explain model.norm.weight --rank 2"), 1, &["inference 2", "2 inference rank(s)"]),
        ("plan --spec /nonexistent/job.json".to_owned(), 1, &["/nonexistent/job.json", "No such file"]),
        (spec(""), 1, &["job.json", "unknown field `trainer`"]),
        (spec(" --fp8"), 2, &["--fp8"]),
        (
            "plan diff /nonexistent/a.bin /nonexistent/b.bin".to_owned(),
            1,
            &["/nonexistent/a.bin", "No such file"],
        ),
    ] {
        let output = run(&arguments).fails(code, words);
        assert!(output.stdout.is_empty(), "{output}");
    }
}
