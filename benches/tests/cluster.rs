//! `bench cluster` and `bench compare` as a user runs them: real processes, real pushes over tcp, every launcher.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

const BENCH: &str = env!("CARGO_BIN_EXE_weightsync-bench");

/// Small: 1 MiB a round, a model of some hundred kB.
const TINY: [&str; 11] = [
    "--fabric",
    "tcp",
    "--rounds",
    "2",
    "--mib",
    "1",
    "--message-kib",
    "64,512",
    "--deadline",
    "60",
    "--config",
];

/// A Qwen3 in small.
const CONFIG: &str = r#"{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
    "num_hidden_layers": 3, "hidden_size": 64, "vocab_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 96, "tie_word_embeddings": false}"#;

/// A folder with the model, where results go too.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), CONFIG).unwrap();
    folder
}

/// `bench cluster` in `folder` with small sizes.
fn bench(folder: &Path) -> Command {
    let mut bench = clean(BENCH, folder);
    bench.args(arguments());
    bench
}

fn arguments() -> Vec<&'static str> {
    [&["cluster"], &TINY[..], &["config.json", "--out", "out"]].concat()
}

/// A command that no launcher's variable of the machine reaches.
fn clean(program: impl AsRef<std::ffi::OsStr>, folder: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let launcher = ["SLURM_", "OMPI_", "PMI_", "MPI_", "MASTER_", "TORCHELASTIC_"];
        if launcher.iter().any(|prefix| name.starts_with(prefix))
            || ["RANK", "WORLD_SIZE", "LOCAL_RANK"].contains(&name.as_str())
        {
            command.env_remove(name);
        }
    }
    command.env("WEIGHTSYNC_SECRET", "a secret of this test");
    command
}

/// Whether there is a libfabric to measure with.
fn skipped() -> bool {
    match efa_core::Library::open() {
        Ok(_) => false,
        Err(error) if std::env::var("WEIGHTSYNC_REQUIRE").is_ok_and(|what| what.contains("libfabric")) => {
            panic!("{error}")
        }
        Err(error) => {
            eprintln!("skipped: {error}");
            true
        }
    }
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn succeeded(output: &Output) {
    assert!(output.status.success(), "{}\n{}", output.status, errors(output));
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn record(folder: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder.join("out/results.json")).unwrap()).unwrap()
}

/// What every run of 2 trainers and 2 receivers must leave behind.
fn check_results(folder: &Path, launcher: &str) {
    let record = record(folder);
    assert_eq!((&record["benchmark"], &record["launch"]["launcher"]), (&"cluster".into(), &launcher.into()));
    assert_eq!((&record["machine"]["trainers"], &record["machine"]["receivers"]), (&2.into(), &2.into()));
    assert_eq!(record["hosts"][0]["ranks"], serde_json::json!([0, 1, 2, 3]));
    assert!(record["hosts"][0]["topology"]["host"]["kernel_release"].is_string());
    let measurements = record["measurements"].as_array().unwrap();
    let of = |key: &str| measurements.iter().map(|m| m[key].clone()).collect::<Vec<_>>();
    assert_eq!(of("measure"), ["pair", "pair", "all", "model"]);
    // 1 MiB in messages of 64 and of 512 KiB; 512 KiB for each of 4 pairs.
    assert_eq!(of("writes")[..2], [16, 2]);
    assert_eq!(of("bytes")[..3], [1 << 20, 1 << 20, 2 << 20]);
    for measurement in measurements {
        let rounds = measurement["rounds"].as_array().unwrap();
        assert_eq!(rounds.len(), 2);
        for round in rounds {
            let pushes = round["pushes"].as_array().unwrap();
            let bytes: u64 = pushes.iter().map(|push| push["bytes"].as_u64().unwrap()).sum();
            assert_eq!(bytes, measurement["bytes"].as_u64().unwrap());
            assert!(round["gb_per_second"].as_f64().unwrap() > 0.0);
        }
        for trainer in measurement["trainers"].as_array().unwrap() {
            let samples = trainer["samples"].as_array().unwrap();
            let own: u64 =
                trainer["rails"].as_array().unwrap().iter().map(|r| r["bytes"].as_u64().unwrap()).sum();
            assert_eq!(samples.last().unwrap()[1].as_u64().unwrap(), own, "{}", measurement["name"]);
        }
    }
    let series = record["series"].as_array().unwrap();
    assert_eq!(series.len(), 2 * measurements.len());
    assert!(series.iter().all(|series| series["rounds"].as_array().unwrap().len() == 2));
    let markdown = std::fs::read_to_string(folder.join("out/results.md")).unwrap();
    for plot in ["bandwidth.svg", "use-all.svg", "use-model.svg"] {
        assert!(markdown.contains(&format!("({plot})")), "{plot}");
        let svg = std::fs::read_to_string(folder.join("out").join(plot)).unwrap();
        assert!(roxmltree::Document::parse(&svg).is_ok() && !svg.contains("NaN"), "{svg}");
    }
}

#[test]
fn local_processes_and_what_compare_says_of_them() {
    if skipped() {
        return;
    }
    let folder = folder();
    let output = bench(folder.path()).args(["--local", "2:2", "--json"]).output().unwrap();
    succeeded(&output);
    check_results(folder.path(), "local");
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed, record(folder.path()));

    let compare = |b: &Value, more: &[&str]| {
        std::fs::write(folder.path().join("b.json"), b.to_string()).unwrap();
        let compared =
            clean(BENCH, folder.path()).args(["compare", "out/results.json", "b.json"]).args(more).output();
        let compared = compared.unwrap();
        let text = String::from_utf8(compared.stdout.clone()).unwrap() + &errors(&compared);
        (compared.status.code(), text)
    };
    let (code, text) = compare(&printed, &[]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains("8 series: 0 worse, 0 better, 8 the same"), "{text}");
    // The writes of the last measurement took a hundred times as long.
    let mut slower = printed.clone();
    for round in slower["series"][6]["rounds"].as_array_mut().unwrap() {
        *round = (round.as_f64().unwrap() / 100.0).into();
    }
    let (code, text) = compare(&slower, &[]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("WORSE") && text.contains("8 series: 1 worse"), "{text}");
    let mut elsewhere = slower;
    elsewhere["machine"]["kinds"][0]["cpu"] = "another".into();
    let (code, text) = compare(&elsewhere, &[]);
    assert_eq!(code, Some(2), "{text}");
    assert!(text.contains("machine.kinds[0].cpu"), "{text}");
    assert_eq!(compare(&elsewhere, &["--force"]).0, Some(1));
}

/// Ranks `which` of `size` as torchrun starts them.
fn torchrun(folder: &Path, which: std::ops::Range<u32>, size: u32, port: u16, more: &[&str]) -> Vec<Child> {
    let start = |rank: u32| {
        bench(folder)
            .args(more)
            .envs(
                [("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", rank), ("MASTER_PORT", port.into())]
                    .map(|(n, v)| (n, v.to_string())),
            )
            .env("MASTER_ADDR", "127.0.0.1")
            .spawn()
            .unwrap()
    };
    which.map(start).collect()
}

#[test]
fn torchruns_variables() {
    if skipped() {
        return;
    }
    let folder = folder();
    for child in torchrun(folder.path(), 0..4, 4, free_port(), &[]) {
        succeeded(&child.wait_with_output().unwrap());
    }
    check_results(folder.path(), "torchrun");
    assert_eq!(record(folder.path())["launch"]["variables"]["WORLD_SIZE"], "4");
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let folder = folder();
    let children = torchrun(folder.path(), 0..2, 4, free_port(), &["--deadline", "2"]);
    let outputs: Vec<Output> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    assert!(outputs.iter().all(|output| !output.status.success()));
    let text = errors(&outputs[0]);
    assert!(text.contains("rank 2, rank 3 never came"), "{text}");
    assert!(errors(&outputs[1]).contains("given up"), "{}", errors(&outputs[1]));
}

/// Puts a program of this name into `folder`, found before any other.
fn fake(folder: &Path, name: &str, script: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    format!("{}:{}", folder.display(), std::env::var("PATH").unwrap_or_default())
}

#[test]
fn sruns_variables() {
    if skipped() {
        return;
    }
    let folder = folder();
    let path = fake(
        folder.path(),
        "srun",
        "for rank in 0 1 2 3; do
            SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=4 SLURM_NODEID=0 SLURM_JOB_NODELIST='localhost,other[1-2]' \
            SLURM_JOB_ID=7 \"$@\" & pids=\"$pids $!\"
         done
         for pid in $pids; do wait $pid || exit 1; done",
    );
    let port = free_port();
    let address = format!("127.0.0.1:{port}");
    let mut srun = clean("srun", folder.path());
    srun.env("PATH", path).arg(BENCH).args(arguments()).args(["--address", &address]);
    succeeded(&srun.output().unwrap());
    check_results(folder.path(), "slurm");
}

#[test]
fn hosts_over_ssh() {
    if skipped() {
        return;
    }
    let folder = folder();
    // As ssh does: everything after the host is one line for a shell.
    let path = fake(
        folder.path(),
        "ssh",
        "while [ \"$1\" != -- ]; do shift; done; echo \"$2\" >> asked; shift 2; exec sh -c \"$*\"",
    );
    std::fs::write(folder.path().join("hosts"), "localhost slots=3\nuser@other # the last receiver\n")
        .unwrap();
    let output = bench(folder.path()).env("PATH", path).args(["--hosts", "hosts"]).output().unwrap();
    succeeded(&output);
    check_results(folder.path(), "ssh");
    let mut asked: Vec<String> =
        std::fs::read_to_string(folder.path().join("asked")).unwrap().lines().map(str::to_owned).collect();
    asked.sort();
    assert_eq!(asked, ["localhost", "localhost", "localhost", "user@other"]);
}

#[test]
fn a_host_that_ssh_cannot_reach_is_named() {
    let folder = folder();
    let path = fake(folder.path(), "ssh", "echo no route >&2; exit 255");
    std::fs::write(folder.path().join("hosts"), "localhost\nlocalhost\n").unwrap();
    let output = bench(folder.path()).env("PATH", path).args(["--hosts", "hosts"]).output().unwrap();
    let text = errors(&output);
    assert!(!output.status.success() && text.contains("(localhost): its process ended"), "{text}");
}

#[test]
fn a_rank_that_dies_in_the_middle_is_named() {
    if skipped() {
        return;
    }
    let folder = folder();
    // More rounds than anybody can do before rank 2 is killed.
    let script = folder.path().join("mortal");
    fake(folder.path(), "mortal", "sh -c 'sleep 3; kill -9 $0' $$ & exec \"$@\"");
    let prefix = script.display().to_string();
    let output = bench(folder.path())
        .args([
            "--local",
            "2:1",
            "--measure",
            "all",
            "--mib",
            "256",
            "--rounds",
            "1000",
            "--launch-receivers",
            &prefix,
        ])
        .output()
        .unwrap();
    let text = errors(&output);
    assert!(!output.status.success() && text.contains("process ended with signal: 9"), "{text}");
    assert!(!folder.path().join("out/results.json").exists());
}

#[test]
fn what_is_missing_is_said() {
    let folder = folder();
    for (variables, expected) in [
        (&[][..], "--hosts"),
        (&[("RANK", "0")][..], "WORLD_SIZE"),
        (&[("RANK", "4"), ("WORLD_SIZE", "4")][..], "RANK is 4"),
        (&[("RANK", "0"), ("WORLD_SIZE", "4")][..], "MASTER_ADDR"),
        (
            &[("RANK", "0"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "127.0.0.1"), ("WEIGHTSYNC_SECRET", "")][..],
            "--secret-file",
        ),
    ] {
        let output = bench(folder.path()).envs(variables.iter().copied()).output().unwrap();
        let text = errors(&output);
        assert!(!output.status.success() && text.contains(expected), "{variables:?}: {text}");
    }
}
