//! The project's own tool: `cargo xtask help` says what it does.
//!
//! It runs other programs and reads text. It must never need an unsafe block, a package, or a library of the workspace
//! but `weightsync-lab`, which needs nothing itself: so it builds in a moment on a fresh clone.

#![forbid(unsafe_code)]

mod apt;
mod attack;
mod bench;
mod ci;
mod demo;
mod firewalls;
mod hw;
mod lab;
mod libfabric;
mod libfabric_build;
mod real_checkpoint;
mod rust_source;
mod sim;
mod soak;
mod step;
mod test;
mod torture;
mod workspace;

use std::process::ExitCode;

/// What went wrong and what to do about it, for a person. Nothing here is recovered from by kind.
type Failure = String;

/// One command of `cargo xtask`.
struct Command {
    name: &'static str,
    arguments: &'static str,
    about: &'static str,
    run: fn(&[String]) -> Result<(), Failure>,
}

const COMMANDS: &[Command] = &[
    Command {
        name: "demo",
        arguments: "[-- ARGUMENTS]",
        about: "Push weights between processes of this machine and check every byte: finds or builds libfabric, builds
            the release binary, runs `weightsync demo` with your arguments. Without any: 4 trainers, 2 inference
            ranks, 5 steps, over tcp.",
        run: demo::run,
    },
    Command {
        name: "test",
        arguments: "[-- ARGUMENTS]",
        about: "Run every test, with cargo-nextest where it is installed. Finds or builds libfabric and fetches a small
            real checkpoint first; tests say `skipped` for what cannot be had. Arguments go to the test runner, and
            then the documentation's tests are left out.",
        run: test::run,
    },
    Command {
        name: "ci",
        arguments: "",
        about: "What continuous integration runs: formatting, firewalls, clippy, documentation, a minute of torture, every test.
            Stops at the first failure. Here a missing libfabric is one.",
        run: ci::run,
    },
    Command {
        name: "bench",
        arguments: "loopback|plan|weight-ops|lab|ladder|cluster|compare [OPTIONS]",
        about: "Measure beside a reference in the same run; all but compare take --json or write JSON.
            loopback [--gib N] [--rounds N]: one trainer to one inference rank on this machine, tcp beside a plain libfabric
            loop and local beside a memcpy.
            plan: the schedules of Kimi-K2, DeepSeek-V3 and Qwen3-235B, their time, memory and balance beside targets.
            weight-ops [--mib N] [--rounds N]: casts and FP8 quantisation beside a copy of as many bytes by as many threads.
            lab [--links N] [--gib N] [--rounds N]: two trainers to two inference ranks over shaped links, beside a plain
            libfabric loop; needs what `lab` needs.
            ladder [--rounds N]: what each technique is worth, switched on one by one.
            cluster [--help]: pushes on your own hosts, started by Slurm, MPI, torchrun or ssh (--hosts FILE, --local T:I).
            compare BEFORE.json AFTER.json [--margin PERCENT] [--force]: ends with 1 if something got slower beyond noise.",
        run: bench::run,
    },
    Command {
        name: "attack",
        arguments: "[--json] [--seconds N] [--rounds N] [--mib N] [--fabric local|tcp] [--only NAME]",
        about: "Start a job on loopback, then attack it: wrong secrets, replayed and broken messages, silent and slow
            connections, members that lie. Each must be refused and named in the controller's log, and the job must keep
            nine tenths of its pace. Then attack jobs that push without rest in all ways at once, beside the same attacks on
            another job. About 6 min; ends with 1 if anything was not as it must be.",
        run: attack::run,
    },
    Command {
        name: "soak",
        arguments: "[--pushes N] [--fabric local|tcp,...] [--check-every N] [--json]",
        about: "Push a small model 100 000 times over shared memory, then as often over tcp, with a job of real processes, and
            check that memory, file descriptors and threads of each are flat, and that what is served is right. About 10 min;
            ends with 1 if anything grows or is left behind.",
        run: soak::run,
    },
    Command {
        name: "torture",
        arguments: "[--minutes N] [--seed N] [--job-seconds N] [--fabric local|tcp,...] [--json]",
        about: "Kill, stop and cut off the processes of one small job after another, about once a second for 10 min, controllers and
            the links of a lab included, and check at every moment that every inference rank serves exactly one committed
            version, and that everybody comes back. Ends with 1 and keeps all logs if not; the seed that it prints repeats
            the faults.",
        run: torture::run,
    },
    Command {
        name: "hw",
        arguments: "[tests|bench] [--sanitize] [--json FILE] [--mib N] [--rounds N] [--arena-mib N] | --build DIR",
        about: "On a host with GPUs: build and run the tests of memory, kernels and copies, of which none is skipped for want of
            a GPU, then measure each beside CUDA's own copy; prints one table and writes JSON, target/hw/hw.json unless told
            otherwise. --sanitize: the kernels' tests under compute-sanitizer too. --build DIR only builds, into a folder whose
            run.sh does the rest on a host without Rust.",
        run: hw::run,
    },
    Command {
        name: "sim",
        arguments: "[--seeds N] [--first SEED] | --seed SEED [--trace] | --defects | --defect DEFECT ...",
        about: "Simulate small jobs in which things go wrong, 1000 seeds unless told otherwise, and check every invariant at
            every event. --seed SEED --trace replays one and tells of every event. --defects breaks one thing after the other on
            purpose, and says which seed notices. The tests run the first 1000 seeds too.",
        run: sim::run,
    },
    Command {
        name: "lab",
        arguments: "run [OPTIONS] -- ARGUMENTS | up [OPTIONS] | exec [--name NAME] a|b -- COMMAND | down [--name NAME] | status",
        about: "Many NICs on one machine: two network namespaces joined by shaped links. run: weightsync with your
            arguments on side A, a demo's inference ranks on side B; the lab is gone afterwards. up: leaves one standing,
            for exec, until down. Needs root and iproute2.
            OPTIONS: --links N [32], --rate RATE [100mbit], --slow LINK=RATE (repeatable), --mtu BYTES [1500], --name NAME",
        run: lab::run,
    },
    Command {
        name: "firewalls",
        arguments: "",
        about: "Check the borders between crates: who may depend on libfabric and CUDA, where `unsafe` may stand, what
            does no I/O.",
        run: firewalls::run,
    },
    Command {
        name: "libfabric",
        arguments: "",
        about: "Find a usable libfabric or build one under target/, and print the variable that selects it.",
        run: libfabric::run,
    },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((name, rest)) = arguments.split_first() else {
        eprint!("{}", help());
        return ExitCode::FAILURE;
    };
    if matches!(name.as_str(), "help" | "--help" | "-h") {
        print!("{}", help());
        return ExitCode::SUCCESS;
    }
    let Some(command) = COMMANDS.iter().find(|command| command.name == name) else {
        eprintln!("xtask: no command {name:?}\n\n{}", help());
        return ExitCode::FAILURE;
    };
    let rest = rest.strip_prefix(&["--".to_owned()]).unwrap_or(rest);
    if command.arguments.is_empty() && !rest.is_empty() {
        eprintln!("xtask {name}: takes no arguments, but was given {}", rest.join(" "));
        return ExitCode::FAILURE;
    }
    match (command.run)(rest) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("xtask {name}: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn help() -> String {
    let mut text = String::from("cargo xtask COMMAND\n");
    for command in COMMANDS {
        text += format!("\n  {} {}", command.name, command.arguments).trim_end();
        text.push('\n');
        for line in command.about.lines() {
            text += &format!("      {}\n", line.trim());
        }
    }
    text + "
Variables:
  LIBFABRIC_SO                 the libfabric to use; no other is then looked for
  WEIGHTSYNC_REAL_CHECKPOINT   a .safetensors file for the tests on real weights; fetched when unset
  PROPTEST_CASES               cases per property test: 500 by default in the planner's; 10000 is the long profile
  WEIGHTSYNC_REQUIRE           set by ci: what tests may not skip for want of (\"libfabric\", \"lab\", \"etcd\")
"
}
