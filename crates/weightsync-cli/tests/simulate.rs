//! `weightsync simulate` as a user runs it: the summary, the same facts as JSON and as a page, clusters from files, sweeps, and
//! what is refused.

mod common;

use std::fs;

use common::job::{Job, Output};
use serde_json::{Value, json};

const TOY: &str = "simulate --cluster p5.48xlarge --model qwen3-0.6b --from fsdp=4 --to tp=2 --chunk 8192";

fn run(arguments: &str) -> Output {
    let job = Job::new();
    let output = job.run(arguments);
    job.end();
    output
}

/// The facts without what the simulation cost this machine, which alone differs between runs.
fn json_of(arguments: &str) -> Value {
    let mut facts = serde_json::from_str(&run(&format!("{arguments} --json")).succeeds().stdout).unwrap();
    forget_cost(&mut facts);
    facts
}

fn forget_cost(facts: &mut Value) {
    for cost in ["wall_seconds", "events_per_second"] {
        assert!(facts[cost].take().as_f64().unwrap() > 0.0);
    }
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * a.abs().max(b.abs())
}

fn sum(values: &Value, field: &str) -> f64 {
    values.as_array().unwrap().iter().map(|value| value[field].as_f64().unwrap()).sum()
}

/// Bundles are how it is simulated, not what is said of the plan.
#[test]
fn what_is_passed_on_is_counted_in_its_writes() {
    let with = |relay: &str| {
        let job = "simulate --cluster p5.48xlarge --model qwen3-0.6b --from fsdp=4 --to tp=2,replicas=2";
        json_of(&format!("{job} --train-gpus 4 --infer-gpus 4 --relay {relay}"))["report"].take()
    };
    let [direct, relayed] = ["never", "per-host"].map(with);
    assert!(relayed["relayed_bytes"].as_u64() > direct["relayed_bytes"].as_u64());
    assert_eq!(relayed["writes"], direct["writes"]);
}

#[test]
fn the_summary_fits_a_screen_and_says_the_facts() {
    let output = run(TOY).succeeds();
    assert_eq!(output.stderr, "", "progress is for terminals");
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert!(lines.len() <= 28, "{} lines: {output}", lines.len());
    assert!(lines.iter().all(|line| line.chars().count() <= 110), "{output}");
    assert_eq!(
        lines[0],
        "simulated on p5.48xlarge: 8 GPUs and 32 NICs a host, 12.35 GB/s a NIC, SRD, 20 us a WRITE"
    );
    let facts = json_of(TOY);
    let report = &facts["report"];
    let push = &report["pushes"][0];
    let milliseconds = |seconds: &Value| seconds.as_f64().unwrap() * 1e3;
    let percent = |share: &Value| format!("{:.1} %", share.as_f64().unwrap() * 100.0);
    let slowest = facts["slowest"].as_array().unwrap();
    let mut said = vec![
        "qwen3-0.6b, 596.0 M parameters, 4 trainers to 2 inference ranks".to_owned(),
        format!("to commit    {:.1} ms", milliseconds(&push["seconds"])),
        format!("lower bound  {:.1} ms, by the NICs of inference", milliseconds(&report["bound_seconds"])),
        format!("simulated is {:.3} times as long", facts["ratio"].as_f64().unwrap()),
        format!("predicted    {:.1} ms by the plan's cost model", milliseconds(&facts["predicted_seconds"])),
        format!("in {} WRITEs", report["writes"]),
        format!("trainers send at {}", percent(&facts["utilisation"]["trainers_out"])),
        format!("receivers receive at {}", percent(&facts["utilisation"]["receivers_in"])),
        format!("{} events in", report["events"]),
    ];
    said.extend(slowest.iter().map(|slow| format!("{:.3} ms  ", milliseconds(&slow["written_at"]))));
    let path = push["critical_path"].as_array().unwrap();
    let parts = path.iter().filter(|part| part["seconds"].as_f64().unwrap() > 0.0);
    said.extend(parts.map(|part| format!("{:.3} ms  ", milliseconds(&part["seconds"]))));
    for words in said {
        assert!(output.stdout.contains(&words), "{words:?} is not said: {output}");
    }
}

#[test]
fn the_facts_agree_with_each_other_and_with_the_plan() {
    let facts = json_of(TOY);
    assert_eq!(facts["simulated"], true);
    assert_eq!(facts, json_of(TOY), "two runs differ");
    assert_ne!(facts["report"], json_of(&format!("{TOY} --seed 2"))["report"], "the seed changes nothing");
    let report = &facts["report"];
    let push = &report["pushes"][0];
    let seconds = push["seconds"].as_f64().unwrap();
    assert!(close(sum(&push["critical_path"], "seconds"), seconds));
    assert!(close(facts["ratio"].as_f64().unwrap(), seconds / report["bound_seconds"].as_f64().unwrap()));
    // Both receivers take half of the model over four NICs at the payload rate of the cluster.
    let rate = facts["cluster"]["payload_bytes_per_second"].as_f64().unwrap();
    assert!(close(report["bound_seconds"].as_f64().unwrap() * 4.0 * rate, 596_049_920.0));
    // What the plan sends over NICs leaves 16 of them, and arrives at 8.
    let nics = report["nics"].as_array().unwrap();
    let planned =
        run(&format!("{} --json", TOY.replace("simulate --cluster p5.48xlarge", "plan"))).succeeds();
    let planned: Value = serde_json::from_str(&planned.stdout).unwrap();
    let bytes = planned["report"]["payload"]["trainer_nic_bytes"].as_f64().unwrap();
    for field in ["out_bytes", "in_bytes"] {
        assert_eq!(sum(&report["nics"], field), bytes, "{field}");
    }
    let all = report["bytes"].as_f64().unwrap();
    assert_eq!(all - report["relayed_bytes"].as_f64().unwrap(), bytes);
    assert_eq!(all, planned["report"]["payload"]["arrives_bytes"].as_f64().unwrap());
    let used = |field| nics.iter().filter(|nic| nic[field].as_u64().unwrap() > 0).count();
    assert_eq!((used("out_bytes"), used("in_bytes")), (16, 8));
    let share = |side: &str| facts["utilisation"][side].as_f64().unwrap();
    assert!(close(share("trainers_out") * 2.0, share("receivers_in")));
    assert!(share("receivers_in") > 0.0 && share("receivers_in") <= 1.0);
    // The slowest are the ranks with the latest ends.
    let ends = |of: &Value| {
        let ends = of.as_array().unwrap().iter().map(|rank| rank["written_at"].as_f64().unwrap());
        let mut ends: Vec<f64> = ends.collect();
        ends.sort_by(|a, b| b.total_cmp(a));
        ends
    };
    assert_eq!(ends(&facts["slowest"]), ends(&report["ranks"])[..5]);
}

#[test]
fn conditions_reach_the_simulation() {
    let plain = json_of(TOY);
    let seconds = |facts: &Value| facts["report"]["pushes"][0]["seconds"].as_f64().unwrap();
    let slow = json_of(&format!("{TOY} --slow trainer1=0.1"));
    assert!(seconds(&slow) > 1.5 * seconds(&plain));
    let nic = json_of(&format!("{TOY} --slow inference0.nic2=0.1"));
    assert!(seconds(&nic) > 1.2 * seconds(&plain));
    let skewed = json_of(&format!("{TOY} --skew-ms 30"));
    let path = skewed["report"]["pushes"][0]["critical_path"].as_array().unwrap();
    assert!(
        path.iter().any(|part| part["stage"] == "stragglers" && part["seconds"].as_f64().unwrap() > 0.02)
    );
    let text = run(&format!("{TOY} --slow trainer1=0.1 --skew-ms 30 --versions 3")).succeeds();
    for words in [
        "with trainer 1 at 0.1 of its speed; trainers ready over 30.0 ms",
        "the last of 3 versions",
        "waiting for trainers",
    ] {
        assert!(text.stdout.contains(words), "{words:?} is not said: {text}");
    }
    let chunked = json_of(&TOY.replace("--chunk 8192", "--chunk 1024"));
    assert!(chunked["report"]["writes"].as_u64() > plain["report"]["writes"].as_u64());
}

#[test]
fn what_is_planned_but_not_simulated_is_said() {
    // Three shards of 256 rows cut blocks of 128.
    let folder = tempfile::tempdir().unwrap();
    let spec = folder.path().join("job.json");
    let job = |layout: &str| {
        json!({
            "model": {"config": {
                "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 256,
                "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000,
                "tie_word_embeddings": false
            }},
            "trainers": {"layout": layout}, "receivers": {"layout": "replicas=2", "fp8": {"block": [128, 128], "scales": "f32"}}
        })
    };
    let arguments = format!("simulate --cluster p5.48xlarge --spec {}", spec.display());
    for (layout, is_said) in [("fsdp=3", true), ("fsdp=2", false)] {
        fs::write(&spec, job(layout).to_string()).unwrap();
        let output = run(&arguments).succeeds();
        assert_eq!(output.stdout.contains("not simulated:"), is_said, "{output}");
        assert_eq!(json_of(&arguments)["exchanges"].as_u64().unwrap() > 0, is_said);
    }
}

#[test]
fn a_printed_cluster_is_the_preset_and_can_be_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine.toml");
    let printed = run(&format!("{TOY} --print-cluster")).succeeds().stdout;
    assert!(printed.contains("hosts = 2\ntrainers = 4\nreceivers = 2\n"), "{printed}");
    fs::write(&path, &printed).unwrap();
    let from_file = TOY.replace("p5.48xlarge", path.to_str().unwrap());
    let plain = json_of(TOY);
    assert_eq!(json_of(&from_file)["report"], plain["report"]);
    let halved = printed.replace("bytes_per_second = 12500000000", "bytes_per_second = 6250000000");
    assert_ne!(halved, printed);
    fs::write(&path, halved).unwrap();
    let halved = json_of(&from_file);
    let bound = |facts: &Value| facts["report"]["bound_seconds"].as_f64().unwrap();
    assert!((bound(&halved) / bound(&plain) - 2.0).abs() < 1e-6);
    // GPUs may have different numbers of NICs: GPU 0, which has trainer 0 and inference 0, has one.
    let uneven = printed
        .replace("nics = 32", "nics = 32\ngpu_nics = [[0], [4, 5], [8], [12], [16], [20], [24], [28]]");
    fs::write(&path, uneven).unwrap();
    let used = json_of(&from_file)["report"]["nics"].clone();
    let used = used.as_array().unwrap().iter().filter(|nic| nic["in_bytes"].as_u64().unwrap() > 0);
    let used: Vec<u64> = used.map(|nic| nic["nic"].as_u64().unwrap()).collect();
    assert_eq!(used, [0, 4, 5]);
}

#[test]
fn the_page_needs_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.html");
    let output = run(&format!("{TOY} --html {}", page.display())).succeeds();
    assert!(output.stderr.contains("page.html"), "{output}");
    let text = fs::read_to_string(&page).unwrap();
    for word in ["http:", "https:", "src=", "href=", "@import", "url(", "{{"] {
        assert!(!text.contains(word), "{word}");
    }
    let facts = text.split_once(r#"<script id="facts" type="application/json">"#).unwrap().1;
    let mut facts: Value = serde_json::from_str(facts.split_once("</script>").unwrap().0).unwrap();
    forget_cost(&mut facts);
    assert_eq!(facts["trainer_nics"].as_array().unwrap().len(), 16);
    assert_eq!(facts["receiver_nics"].as_array().unwrap().len(), 8);
    for (field, value) in json_of(TOY).as_object().unwrap() {
        assert_eq!(&facts[field], value, "{field}");
    }

    // A name that would be markup.
    let cluster = folder.path().join("<img src=x>.toml");
    fs::write(&cluster, run(&format!("{TOY} --print-cluster")).succeeds().stdout).unwrap();
    let job = Job::new();
    let mut arguments: Vec<String> = TOY.split(' ').map(str::to_owned).collect();
    arguments[2] = cluster.display().to_string();
    arguments.extend(["--html".to_owned(), page.display().to_string()]);
    job.spawn(&mut job.command(arguments)).finish().succeeds();
    job.end();
    let text = fs::read_to_string(&page).unwrap();
    assert!(!text.contains("<img") && text.contains("\\u003cimg"));
}

#[test]
fn sweeps_print_lines_and_write_files() {
    let folder = tempfile::tempdir().unwrap();
    let [csv, svg] = ["out.csv", "out.svg"].map(|name| folder.path().join(name));
    let files = format!("--csv {} --svg {}", csv.display(), svg.display());
    let output = run(&format!("{TOY} --sweep replicas=1,2,4 {files}")).succeeds();
    assert!(output.stdout.starts_with("simulated on p5.48xlarge: "), "{output}");
    let rows: Vec<Vec<String>> = fs::read_to_string(&csv)
        .unwrap()
        .lines()
        .map(|line| line.split(',').map(str::to_owned).collect())
        .collect();
    assert_eq!(
        rows[0][..5],
        ["replicas", "trainers", "inference_ranks", "simulated_seconds", "bound_seconds"]
    );
    assert!(rows.iter().all(|row| row.len() == rows[0].len()));
    for (row, (value, ranks)) in rows[1..].iter().zip([("1", "2"), ("2", "4"), ("4", "8")]) {
        assert_eq!(row[..3], [value, "4", ranks]);
        let milliseconds = format!("{:.1} ms", row[3].parse::<f64>().unwrap() * 1e3);
        assert!(output.stdout.contains(&milliseconds), "{milliseconds} is not said: {output}");
    }
    assert_eq!(rows.len(), 4);
    let single = json_of(&TOY.replace("tp=2", "tp=2,replicas=4"));
    assert_eq!(rows[3][3], single["report"]["pushes"][0]["seconds"].to_string());
    let text = fs::read_to_string(&svg).unwrap();
    let drawing = roxmltree::Document::parse(&text).unwrap();
    assert_eq!(drawing.descendants().filter(|node| node.has_tag_name("circle")).count(), 6);
    assert!(text.contains("simulated"));

    let points = |sweep: &str| {
        let output = run(&format!("{TOY} --sweep {sweep} --json")).succeeds();
        let facts: Value = serde_json::from_str(&output.stdout).unwrap();
        assert_eq!(facts["simulated"], true);
        facts["points"].as_array().unwrap().clone()
    };
    let of = |points: &[Value], field: &str| -> Vec<f64> {
        points.iter().map(|point| point[field].as_f64().unwrap()).collect()
    };
    assert_eq!(of(&points("train-gpus=2,8"), "trainers"), [2.0, 8.0]);
    assert_eq!(of(&points("infer-gpus=2,6"), "receivers"), [2.0, 6.0]);
    let slow = of(&points("slow=1,0.1"), "simulated_seconds");
    assert!(slow[1] > 1.5 * slow[0]);
    let skewed = of(&points("skew-ms=0,30"), "simulated_seconds");
    assert!(skewed[1] > skewed[0] + 0.02);
    let writes = of(&points("chunk=1024,8192"), "writes");
    assert!(writes[0] > writes[1]);
    assert_eq!(points("relay=never,auto").len(), 2);
    assert_eq!(points("watermark=8,256").len(), 2);
}

#[test]
fn the_pipeline_runs_for_its_one_job() {
    let arguments = "simulate --cluster p5.48xlarge --model kimi-k2 --from fsdp=16,pp=2,ep=8 --to ep=32,replicas=4 --fp8 \
                     --tolerance 0.1 --pipeline full-gather";
    let output = run(&format!("{arguments} --json")).succeeds();
    let facts: Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!((&facts["simulated"], &facts["pipeline"]), (&json!(true), &json!("full-gather")));
    let report = &facts["report"];
    let (seconds, stages) = (report["seconds"].as_f64().unwrap(), sum(&report["stages"], "exposed_seconds"));
    assert!((stages / seconds - 1.0).abs() < 1e-3, "{stages} of {seconds}");
    let text = run(arguments).succeeds();
    assert!(text.stdout.starts_with("simulated on p5.48xlarge: "), "{text}");
    for stage in report["stages"].as_array().unwrap() {
        assert!(text.stdout.contains(stage["name"].as_str().unwrap()), "{text}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = run(&format!("{TOY} --print-cluster")).succeeds().stdout;
    let with = |name: &str, text: String, job: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        job.replace("p5.48xlarge", path.to_str().unwrap())
    };
    let spec = folder.path().join("job.json");
    let machine = json!({
        "model": {"preset": "qwen3-0.6b"}, "trainers": {"layout": "fsdp=4", "machine": {"rails_per_gpu": 2}},
        "receivers": {"layout": "tp=2"}
    });
    fs::write(&spec, machine.to_string()).unwrap();
    let spec = format!("simulate --cluster p5.48xlarge --spec {}", spec.display());
    let more = TOY.replace("fsdp=4", "fsdp=8");
    let nothing = good.replace("\nbytes_per_second = 12500000000", "\nbytes_per_second = 0");
    let fewer = good.replace("hosts = 2", "hosts = 1");
    let broken = good.replace("nics = 32", "nics = 32 or so");
    let misspelt = good.replace("nics = 32", "nicks = 32");
    let sweep = |sweep: &str| format!("{TOY} --sweep {sweep}");
    for (arguments, code, words) in [
        (TOY.replace("--cluster p5.48xlarge ", ""), 2, &["--cluster"][..]),
        (TOY.replace("p5.48xlarge", "p6"), 2, &["\"p6\"", "p5en.48xlarge", ".toml"]),
        (TOY.replace("p5.48xlarge", "/nonexistent/c.toml"), 2, &["/nonexistent/c.toml", "No such file"]),
        (with("zero.toml", nothing, TOY), 2, &["nic.bytes_per_second is 0"]),
        (with("hosts.toml", fewer, TOY), 2, &["hosts is 1", "need 2 hosts"]),
        (with("broken.toml", broken, TOY), 2, &["broken.toml", "line 8", "or so"]),
        (with("field.toml", misspelt, TOY), 2, &["nicks"]),
        (with("broken.json", "{\"hosts\": 2,".to_owned(), TOY), 2, &["broken.json", "line 1"]),
        (with("ranks.toml", good.clone(), &more), 2, &["8 trainers", "the cluster 4"]),
        (format!("{TOY} --nic-gbps 100"), 2, &["--nic-gbps"]),
        (format!("{TOY} --slow trainer3"), 2, &["trainer3=0.5"]),
        (format!("{TOY} --slow trainer9=0.5"), 2, &["slow"]),
        (format!("{TOY} --slow trainer0=2"), 2, &["--slow", "at most 1"]),
        (format!("{TOY} --versions 0"), 2, &["--versions"]),
        (format!("{TOY} --tolerance 0.9"), 2, &["--tolerance"]),
        (format!("{TOY} --events-max 100"), 1, &["no end after 100 events"]),
        (format!("{TOY} --csv out.csv"), 2, &["--sweep"]),
        (format!("{TOY} --html /nonexistent/page.html"), 1, &["/nonexistent/page.html"]),
        (sweep("hosts=1"), 2, &["hosts", "train-gpus"]),
        (sweep("replicas=1,0"), 2, &["replicas=0", "above 0"]),
        (sweep("infer-gpus=2,3"), 2, &["infer-gpus=3", "2 GPUs"]),
        (sweep("train-gpus=many"), 2, &["train-gpus=many"]),
        (sweep("relay=auto,sometimes"), 2, &["relay=sometimes", "per-host"]),
        (sweep("slow=0.5,0"), 2, &["slow=0"]),
        (format!("{TOY} --pipeline full-gather"), 2, &["--pipeline", "--chunk"]),
        (TOY.replace("--chunk 8192", "--pipeline full-gather"), 2, &["full-gather", "kimi-k2"]),
        (TOY.replace("qwen3-0.6b", "nobody-7b"), 1, &["nobody-7b"]),
        (spec, 2, &["trainers.machine", "cluster"]),
    ] {
        let output = run(&arguments).fails(code, words);
        assert!(output.stdout.is_empty(), "{output}");
    }
}
