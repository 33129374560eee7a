//! What a user, a file or a stranger gets wrong: the program says which tensor, rank or peer it is and what to do, with
//! the documented exit code, and leaves nothing behind.

mod common;

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use common::job::{Cluster, DEADLINE_SECONDS, Job, Output, has_libfabric, listening_at};
use common::{checkpoint_of, tiny, write_raw};
use efa_core::{Hints, Library, Provider};
use safetensors::Dtype;
use serde_json::Value;
use tempfile::TempDir;
use weightsync_cli::checkpoint::MODEL_FILE;

/// For what fails before anybody is heard: no heartbeat has to come within it.
const SOON_SECONDS: &str = "1.5";

over_each_fabric! {
    two_checkpoints_that_do_not_fit_are_explained_to_every_rank,
    wrong_bytes_have_an_exit_code_of_their_own,
}

// --- checkpoints -----------------------------------------------------------------------------------------------------

#[test]
fn a_damaged_checkpoint_is_named_with_its_tensor() {
    let job = Job::new();
    let whole = fs::read(tiny().path().join(MODEL_FILE)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(MODEL_FILE);
    // A header of two tensors over the same bytes, in 16 bytes of data.
    let overlap = r#"{"first": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]},
                      "second": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}"#;
    let last = "model.norm.weight";
    type Damage<'a> = &'a dyn Fn();
    let cases: [(Damage<'_>, &[&str]); 5] = [
        (&|| fs::write(&file, &whole[..whole.len() - 1]).unwrap(), &["cut short", last, "copy it again"]),
        (&|| fs::write(&file, &whole[..100]).unwrap(), &["cut short", "100 bytes"]),
        (&|| fs::write(&file, [b"{{{{{{{{", &whole[8..]].concat()).unwrap(), &["header"]),
        (&|| write_raw(&file, overlap, 16), &["`second` overlaps tensor `first`"]),
        (&|| fs::remove_file(&file).unwrap(), &["No such file"]),
    ];
    for (damage, words) in cases {
        damage();
        let words = [&[MODEL_FILE], words].concat();
        let path = file.display();
        job.run(&format!("demo --checkpoint {path}")).fails(1, &words);
        for side in ["push", "serve"] {
            // Nobody is there to join: it does not get that far.
            let rank = "--controller 127.0.0.1:1 --rank 0 --trainers 1 --inference 1";
            let output = job.run(&format!("{side} {rank} --checkpoint {path}")).fails(1, &words);
            let told = output.stderr.matches("copy it again").count()
                + output.stderr.matches("No such file").count();
            assert!(told <= 1, "told twice: {output}");
        }
    }
    job.end();
}

#[test]
fn a_checkpoint_that_shrinks_after_it_was_opened_is_an_error() {
    let (cluster, controller) = Cluster::start("local", 1, 1);
    let checkpoint = tiny();
    let arguments = cluster.arguments("serve", 0, checkpoint.path());
    let serve = cluster.job.start(&format!("{arguments} --verify"));
    let mut push = cluster.rank("push", 0, checkpoint.path(), "--steps 100000");
    push.wait_for("pushed");
    let file = OpenOptions::new().write(true).open(checkpoint.path().join(MODEL_FILE)).unwrap();
    file.set_len(1000).unwrap();
    serve.finish().fails(1, &[MODEL_FILE]);
    push.finish().fails(1, &["inference 0"]);
    controller.finish().fails(1, &["inference 0"]);
    cluster.job.end();
}

/// Both inference ranks, and what the reference and the trainers have.
fn base() -> TempDir {
    checkpoint_of(&[("lm_head.weight", Dtype::F32, &[6, 4]), ("model.norm.weight", Dtype::F32, &[4])])
}

/// Runs a job whose trainers and inference ranks have different checkpoints, to an end that must be a failure.
fn mismatch(fabric: &'static str, inference: u32, wanted: &Path) -> Vec<Output> {
    let (cluster, controller) = Cluster::start(fabric, 2, inference);
    let base = base();
    let trainers = (0..2).map(|rank| cluster.rank("push", rank, base.path(), ""));
    let ranks: Vec<_> =
        trainers.chain((0..inference).map(|rank| cluster.rank("serve", rank, wanted, ""))).collect();
    let outputs = ranks.into_iter().chain([controller]).map(|process| process.finish()).collect();
    cluster.job.end();
    outputs
}

fn two_checkpoints_that_do_not_fit_are_explained_to_every_rank(fabric: &'static str) {
    let norm: (&str, Dtype, &[usize]) = ("model.norm.weight", Dtype::F32, &[4]);
    let head = |dtype, shape| [("lm_head.weight", dtype, shape), norm];
    let one_more: [(&str, Dtype, &[usize]); 3] =
        [("lm_head.weight", Dtype::F32, &[6, 4]), norm, ("lm_head.bias", Dtype::F32, &[6])];
    let cases = [
        (1, checkpoint_of(&one_more), &["inference 0", "lm_head.bias", "which no trainer declares"][..]),
        (
            1,
            checkpoint_of(&head(Dtype::F32, &[4, 4])),
            &["inference 0", "`lm_head.weight`", "[4, 4]", "[6, 4]"],
        ),
        (
            1,
            checkpoint_of(&head(Dtype::F32, &[6, 5])),
            &["inference 0", "`lm_head.weight`", "[6, 5]", "[6, 4]"],
        ),
        (
            2,
            checkpoint_of(&head(Dtype::F32, &[8, 4])),
            &["inference 0", "`lm_head.weight`", "[8, 4]", "[6, 4]"],
        ),
        (
            2,
            checkpoint_of(&head(Dtype::BF16, &[6, 4])),
            &["inference 0", "`lm_head.weight`", "F32", "BF16", "cast"],
        ),
    ];
    for (inference, wanted, words) in cases {
        for output in mismatch(fabric, inference, wanted.path()) {
            output.fails(1, words);
        }
    }
}

/// Each inference rank slices what it takes for half of the rows.
#[test]
fn a_shard_of_a_smaller_tensor_is_refused() {
    let wanted =
        checkpoint_of(&[("lm_head.weight", Dtype::F32, &[4, 4]), ("model.norm.weight", Dtype::F32, &[4])]);
    for output in mismatch("local", 2, wanted.path()) {
        output.fails(1, &["`lm_head.weight`", "[4, 4]", "[6, 4]"]);
    }
}

fn wrong_bytes_have_an_exit_code_of_their_own(fabric: &'static str) {
    let (cluster, controller) = Cluster::start(fabric, 1, 1);
    let (pushed, wanted) = (tiny(), tiny());
    // One bit of the last tensor.
    let file = wanted.path().join(MODEL_FILE);
    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let serve = cluster.rank("serve", 0, wanted.path(), "--verify");
    let push = cluster.rank("push", 0, pushed.path(), "--steps 100000");
    serve
        .finish()
        .fails(3, &["inference 0", "version 1", "`model.norm.weight` differs in 1 bytes", "expected"]);
    for other in [push, controller] {
        other.finish().fails(1, &["inference 0 was lost", "`model.norm.weight` differs"]);
    }
    cluster.job.end();
}

// --- the command line ------------------------------------------------------------------------------------------------

#[test]
fn a_wrong_command_line_is_a_usage_error() {
    let job = Job::new();
    let rank = "--controller 127.0.0.1:1 --trainers 1 --inference 1 --checkpoint x";
    for (arguments, words) in [
        ("demo --fabric rdma", &["'rdma'", "auto, local, tcp, shm, efa, verbs"][..]),
        ("demo --trainers 0", &["--trainers"]),
        ("demo --steps 0", &["--steps"]),
        ("demo --deadline 0", &["--deadline", "must be"]),
        ("demo --verify sampled=2", &["--verify", "above 0 and at most 1"]),
        ("controller --trainers 1", &["--inference"]),
        (&format!("push {rank}"), &["--rank"]),
        (&format!("push {rank} --rank one"), &["--rank", "'one'"]),
        (&format!("serve {rank} --rank 0 --bind localhost"), &["--bind", "'localhost'"]),
        ("conquer", &["conquer"]),
        ("", &["Usage", "demo"]),
    ] {
        job.run(arguments).fails(2, words);
    }
    job.end();
}

#[test]
fn help_says_what_matters() {
    let job = Job::new();
    let says = |arguments: &str, words: &[&str]| {
        let output = job.run(arguments).succeeds();
        for word in words {
            assert!(output.stdout.contains(word), "{word:?} is missing: {output}");
        }
    };
    let exit_codes = ["Exit codes", "the run failed", "the command line is wrong", "not as they must be"];
    let commands = ["demo", "controller", "push", "serve", "info", "LIBFABRIC_SO", "WEIGHTSYNC_SECRET"];
    says("--help", &[&exit_codes[..], &commands[..]].concat());
    says("demo --help", &["--trainers", "--inference", "--steps", "--fabric", "--trace", "every byte"]);
    says(
        "controller --help",
        &["--listen", "--secret-file", "--insecure", "--deadline", "--verify", "WEIGHTSYNC_SECRET"],
    );
    says(
        "push --help",
        &["--controller", "--rank", "--checkpoint", "--steps", "--fabric", "--bind", "--deadline"],
    );
    says("serve --help", &["--controller", "--rank", "--checkpoint", "--verify", "--fabric", "--deadline"]);
    says("info --help", &["--json"]);
    says("--version", &[env!("CARGO_PKG_VERSION")]);
    job.end();
}

#[test]
fn info_works_with_and_without_libfabric() {
    let job = Job::new();
    let libraries: &[Option<&str>] = if has_libfabric() {
        &[None, Some("/nonexistent/libfabric.so.1")]
    } else {
        &[Some("/nonexistent/libfabric.so.1")]
    };
    for library in libraries {
        let run = |arguments: &[&str]| {
            let mut command = job.command(arguments);
            if let Some(library) = library {
                command.env("LIBFABRIC_SO", library);
            }
            job.spawn(&mut command).finish().succeeds()
        };
        let text = run(&["info"]);
        let facts: Value = serde_json::from_str(&run(&["info", "--json"]).stdout).unwrap();
        assert!(!facts["meaning"].as_array().unwrap().is_empty());
        assert!(facts["snapshot"]["host"].is_object());
        match library {
            None => {
                let version = facts["libfabric"]["version"].as_str().unwrap();
                assert!(text.stdout.contains(&format!("libfabric   {version} at ")), "{text}");
            }
            Some(library) => {
                assert!(facts["libfabric"].is_null());
                assert!(facts["libfabric_error"].as_str().unwrap().contains(library));
                assert!(text.stdout.contains("libfabric   none") && text.stdout.contains(library), "{text}");
            }
        }
    }
    job.end();
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let (job, checkpoint) = (Job::new(), tiny());
    let demo = format!(
        "demo --fabric local --trainers 1 --inference 1 --checkpoint {}",
        checkpoint.path().display()
    );
    let controller = "controller --listen 127.0.0.1:0 --trainers 1 --inference 1";
    for arguments in ["info", "info --json", controller, &demo, &format!("{demo} --json")] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut command = job.command(arguments.split_whitespace());
        let output = job.spawn_into(&mut command, writer.into()).finish();
        assert_eq!(output.status.code(), Some(1), "{output}");
    }
    job.end();
}

// --- fabrics ---------------------------------------------------------------------------------------------------------

#[test]
fn without_libfabric_a_host_can_still_push_to_itself() {
    let (job, checkpoint) = (Job::new(), tiny());
    let demo = |fabric: &str| {
        let checkpoint = checkpoint.path().display();
        let arguments =
            format!("demo --fabric {fabric} --trainers 2 --inference 1 --steps 1 --checkpoint {checkpoint}");
        let mut command = job.command(arguments.split_whitespace());
        job.spawn(command.env("LIBFABRIC_SO", "/nonexistent/libfabric.so.1")).finish()
    };
    for fabric in ["tcp", "efa"] {
        demo(fabric).fails(1, &[fabric, "needs libfabric", "/nonexistent/libfabric.so.1", "LIBFABRIC_SO"]);
    }
    demo("local").succeeds();
    // `auto` refuses to leave RDMA NICs idle.
    match fs::read_dir("/sys/class/infiniband").is_ok_and(|mut nics| nics.next().is_some()) {
        true => drop(demo("auto").fails(1, &["RDMA NICs", "no libfabric"])),
        false => drop(demo("auto").succeeds()),
    }
    job.end();
}

#[test]
fn a_fabric_that_the_host_lacks_is_an_error_and_no_slow_push() {
    if !has_libfabric() {
        return;
    }
    if Library::open().unwrap().infos(&Hints::new(Provider::Efa)).is_ok() {
        return println!("skipped: this host has EFA");
    }
    let (job, checkpoint) = (Job::new(), tiny());
    let output = job.run(&format!(
        "demo --fabric efa --trainers 2 --inference 1 --checkpoint {}",
        checkpoint.path().display()
    ));
    output.fails(1, &["no efa rail here", "trainer 0", "trainer 1", "inference 0", "/opt/amazon/efa"]);
    job.end();
}

#[test]
fn two_fabrics_have_nothing_in_common() {
    if !has_libfabric() {
        return;
    }
    let (cluster, controller) = Cluster::start("local", 1, 1);
    let checkpoint = tiny();
    let push = cluster.rank("push", 0, checkpoint.path(), "");
    let serve = Cluster { fabric: "tcp", ..cluster };
    let words = ["no common fabric with inference 0", "tcp", "choose the same fabric on both sides"];
    let receiver = serve.rank("serve", 0, checkpoint.path(), "");
    push.finish().fails(1, &words);
    receiver.finish().fails(1, &["trainer 0", words[0]]);
    controller.finish().fails(1, &["trainer 0", words[0]]);
    serve.job.end();
}

// --- who may join ----------------------------------------------------------------------------------------------------

#[test]
fn a_controller_that_cannot_listen_says_why() {
    let job = Job::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let world = "--trainers 1 --inference 1";
    job.run(&format!("controller --listen {address} {world}"))
        .fails(1, &["cannot listen on", &address, "choose another port"]);
    job.run(&format!("controller --listen nowhere {world}")).fails(1, &["cannot listen on nowhere"]);
    let open = format!("controller --listen 0.0.0.0:0 --json {world}");
    job.run(&open).fails(1, &["without a secret", "WEIGHTSYNC_SECRET", "insecure"]);
    for allowed in [
        job.start(&format!("{open} --insecure")),
        job.spawn(job.command(open.split(' ')).env("WEIGHTSYNC_SECRET", "s")),
    ] {
        let mut controller = allowed;
        assert!(listening_at(&mut controller).starts_with("0.0.0.0:"));
        controller.kill().was_killed();
    }
    for (secret, words) in [("", "the secret is empty"), ("  ", "the secret is empty")] {
        job.spawn(job.command(open.split(' ')).env("WEIGHTSYNC_SECRET", secret)).finish().fails(1, &[words]);
    }
    job.run(&format!("{open} --secret-file /nonexistent/secret")).fails(1, &["/nonexistent/secret"]);
    job.end();
}

#[test]
fn a_rank_without_a_controller_gives_up_at_its_deadline() {
    let (job, checkpoint) = (Job::new(), tiny());
    // Bound and closed again: nobody listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for (side, name) in [("push", "trainer 0"), ("serve", "inference 0")] {
        let checkpoint = checkpoint.path().display();
        let rank =
            format!("--controller {address} --rank 0 --trainers 1 --inference 1 --deadline {SOON_SECONDS}");
        job.run(&format!("{side} {rank} --checkpoint {checkpoint}"))
            .fails(1, &[name, "cannot reach the controller", &address.to_string(), "is it running"]);
    }
    job.end();
}

#[test]
fn who_does_not_belong_is_refused_and_the_job_goes_on() {
    let job = Job::new();
    let checkpoint = tiny();
    let mut controller = job.spawn(
        job.command(format!("controller --listen 127.0.0.1:0 --json --deadline {DEADLINE_SECONDS} --trainers 1 --inference 1").split(' '))
            .env("WEIGHTSYNC_SECRET", "right"),
    );
    let address = listening_at(&mut controller);
    let cluster = Cluster { job, fabric: "local", trainers: 1, inference: 1, address };
    let start = |side: &str, rank: u32, secret: &str, more: &str| {
        let arguments = format!("{} {more}", cluster.arguments(side, rank, checkpoint.path()));
        cluster.job.spawn(cluster.job.command(arguments.split_whitespace()).env("WEIGHTSYNC_SECRET", secret))
    };
    for side in ["push", "serve"] {
        start(side, 0, "wrong", "").finish().fails(1, &["127.0.0.1", "secret", "give both sides the same"]);
        start(side, 0, "right", "--job other").finish().fails(1, &["another job than 'default'"]);
        let other = cluster.arguments(side, 0, checkpoint.path());
        let other = other.replace(&format!("--deadline {DEADLINE_SECONDS}"), "--deadline 7");
        let mut command = cluster.job.command(other.split_whitespace());
        let output = cluster.job.spawn(command.env("WEIGHTSYNC_SECRET", "right")).finish();
        output.fails(1, &["a deadline of 7s", "give the same everywhere"]);
    }
    start("push", 1, "right", "").finish().fails(1, &["no trainer 1", "the job has 1"]);
    start("serve", 9, "right", "").finish().fails(1, &["no inference rank 9", "the job has 1"]);
    // Ranks of a larger job, one of which this job has and one not.
    let larger = Cluster { trainers: 3, ..cluster };
    let checkpoint = checkpoint.path();
    for rank in [0, 2] {
        let arguments = larger.arguments("push", rank, checkpoint);
        let mut command = larger.job.command(arguments.split_whitespace());
        let output = larger.job.spawn(command.env("WEIGHTSYNC_SECRET", "right")).finish();
        output.fails(1, &[&format!("trainer {rank}"), "expects 3 trainers", "this job has 1 trainers"]);
    }
    let cluster = Cluster { trainers: 1, ..larger };
    let start = |side: &str| {
        let arguments = cluster.arguments(side, 0, checkpoint);
        cluster.job.spawn(cluster.job.command(arguments.split_whitespace()).env("WEIGHTSYNC_SECRET", "right"))
    };
    let first = start("push");
    controller.wait_for(r#""event":"joined""#);
    start("push").finish().fails(1, &["trainer 0 has joined already", "started twice"]);
    start("serve").finish().succeeds();
    assert_eq!(first.finish().succeeds().versions("pushed"), [1]);
    let output = controller.finish().succeeds();
    for told in ["secret", "another job", "has joined already"] {
        assert!(output.stderr.contains(told), "the controller's log tells of '{told}' too: {output}");
    }
    assert!(!output.stderr.contains('\u{1b}'), "colours in a log: {output}");
    cluster.job.end();
}

#[test]
fn a_rank_that_never_joins_is_named() {
    let (cluster, controller) = Cluster::start("local", 2, 1);
    let checkpoint = tiny();
    let push = cluster.rank("push", 0, checkpoint.path(), "");
    for process in [push, controller] {
        process.finish().fails(1, &["trainer 1, inference 0 to join"]);
    }
    cluster.job.end();
}

// --- strangers -------------------------------------------------------------------------------------------------------

/// The first bytes of a connection, from a weightsync of this protocol version.
fn preamble(version: u32) -> Vec<u8> {
    [&b"wghtsync"[..], &version.to_le_bytes()].concat()
}

#[test]
fn strangers_do_not_disturb_a_controller() {
    let (cluster, controller) = Cluster::start("local", 1, 1);
    let checkpoint = tiny();
    let request = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec();
    // A frame that claims 4 GB, where the answer to the challenge should be.
    let huge = [preamble(weightsync::PROTOCOL_VERSION), vec![0xff; 4]].concat();
    let mut silent = Vec::new();
    for said in [preamble(99), request, huge, b"wght".to_vec(), vec![]] {
        let mut stranger = TcpStream::connect(&cluster.address).unwrap();
        stranger.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stranger.write_all(&said).unwrap();
        let mut heard = [0; 12];
        stranger.read_exact(&mut heard).unwrap();
        assert_eq!(heard[..], preamble(weightsync::PROTOCOL_VERSION), "what the stranger may learn");
        silent.push(stranger); // and stays, saying nothing
    }
    let serve = cluster.rank("serve", 0, checkpoint.path(), "--verify");
    cluster.rank("push", 0, checkpoint.path(), "--steps 2").finish().succeeds();
    assert_eq!(serve.finish().succeeds().versions("verified"), [1, 2]);
    let stranger = |index: usize| silent[index].local_addr().unwrap().to_string();
    let version = format!("{} speaks protocol version 99", stranger(0));
    let release = "run the same release everywhere";
    let http = format!("{} does not speak the weightsync protocol", stranger(1));
    let frame = format!("{} sent a frame of 4294967295 bytes", stranger(2));
    let output = controller.finish().succeeds();
    for words in [&version, release, &http, &frame] {
        assert!(output.stderr.contains(words), "{words:?} is not said: {output}");
    }
    cluster.job.end();
}

#[test]
fn a_controller_that_is_none_is_named() {
    let (job, checkpoint) = (Job::new(), tiny());
    let http = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n".to_vec();
    let none: &[&str] = &["does not speak the weightsync protocol", "check the address and port"];
    // It may be one that is being replaced.
    let silent: &[&str] = &["cannot reach the controller", "hung up", "check the address and port"];
    let stopped: &[&str] = &["cannot reach the controller", "did not answer", "check the address and port"];
    let release: &[&str] = &["speaks protocol version 99", "run the same release everywhere"];
    // What it says, if it listens at all, whether it then hangs up, and what the rank makes of it.
    let cases = [
        (Some(preamble(99)), false, release),
        (Some(http), true, none),
        (Some(vec![]), true, silent),
        (None, true, silent),
        (Some(b"SSH-2.0-x".to_vec()), false, stopped),
        (Some(vec![]), false, stopped),
    ];
    for (says, hangs_up, words) in cases {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        // To whoever comes, for as long as this test runs.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, Some(says)) = (stream.unwrap(), &says) else { continue };
                let mut heard = [0; 12];
                stream.read_exact(&mut heard).unwrap();
                stream.write_all(says).unwrap();
                while !hangs_up && matches!(stream.read(&mut heard), Ok(1..)) {}
            }
        });
        let checkpoint = checkpoint.path().display();
        let rank =
            format!("--controller {address} --rank 0 --trainers 1 --inference 1 --deadline {SOON_SECONDS}");
        let words = [words, &["trainer 0", &address]].concat();
        job.run(&format!("push {rank} --checkpoint {checkpoint}")).fails(1, &words);
    }
    job.end();
}
