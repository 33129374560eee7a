//! `cargo xtask lab`: a network of many shaped links on this machine, and `weightsync` in it.

use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};

use weightsync_lab::{Lab, LabError, LabOptions, LabState, Side};

use crate::libfabric::{self, Profile};
use crate::{Failure, step, workspace};

/// The name of a lab that is left standing, unless it is given one.
const NAME: &str = "lab";

/// By which this program tells a second one of its kind to wait until it is gone.
const WHEN_STDIN_CLOSES: &str = "--when-stdin-closes";

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let usage = || "say what to do: up, run, exec, down or status (`cargo xtask help` tells more)".to_owned();
    let (what, rest) = arguments.split_first().ok_or_else(usage)?;
    match what.as_str() {
        "up" => up(rest),
        "run" => run_in(rest),
        "exec" => exec(rest),
        "down" => down(rest),
        "status" if rest.is_empty() => status(),
        _ => Err(usage()),
    }
}

/// What the words before a command say.
#[derive(Debug, Default, PartialEq)]
struct Settings {
    name: Option<String>,
    options: LabOptions,
}

/// Reads options up to the first word that is none; that and what follows, without a `--` between.
fn settings(arguments: &[String]) -> Result<(Settings, &[String]), Failure> {
    let mut settings = Settings::default();
    let mut rest = arguments;
    while let Some((word, after)) = rest.split_first() {
        if word == "--" {
            return Ok((settings, after));
        }
        if !word.starts_with("--") {
            break;
        }
        let (flag, value, after) = match (word.split_once('='), after.split_first()) {
            (Some((flag, value)), _) => (flag, value, after),
            (None, Some((value, after))) => (word.as_str(), value.as_str(), after),
            (None, None) => return Err(format!("{word} needs a value")),
        };
        let wrong = |expected: &str| format!("{flag} {value}: {expected} is expected");
        let rate = |text: &str| {
            weightsync_lab::parse_rate(text).ok_or_else(|| wrong("a rate such as 100mbit or 1.5gbit"))
        };
        let options = &mut settings.options;
        match flag {
            "--name" => settings.name = Some(value.to_owned()),
            "--links" => options.links = value.parse().map_err(|_| wrong("a number of links"))?,
            "--mtu" => options.mtu = value.parse().map_err(|_| wrong("a number of bytes"))?,
            "--rate" => options.rate_bits = rate(value)?,
            "--slow" => {
                let expected = "LINK=RATE, such as 5=10mbit,";
                let (link, own) = value.split_once('=').ok_or_else(|| wrong(expected))?;
                options.slow.push((link.parse().map_err(|_| wrong(expected))?, rate(own)?));
            }
            _ => return Err(format!("no option {flag} here; `cargo xtask help` lists them")),
        }
        rest = after;
    }
    Ok((settings, rest))
}

fn up(arguments: &[String]) -> Result<(), Failure> {
    let (Settings { name, options }, rest) = settings(arguments)?;
    nothing_more(rest)?;
    let name = name.as_deref().unwrap_or(NAME);
    let lab = Lab::up(name, &options).map_err(told)?;
    lab.keep().map_err(told)?;
    println!("the lab {name} stands: {}", in_words(&options));
    println!("  cargo xtask lab exec --name {name} a|b -- COMMAND   runs something in it");
    println!("  cargo xtask lab down --name {name}                  takes it down");
    Ok(())
}

/// A lab for one run of `weightsync`, on side A.
fn run_in(arguments: &[String]) -> Result<(), Failure> {
    let (Settings { name, options }, weightsync) = settings(arguments)?;
    if weightsync.is_empty() {
        return Err("say what to run, as in: cargo xtask lab run --links 1 -- demo --steps 2".to_owned());
    }
    // Before anything is built that takes minutes.
    weightsync_lab::check().map_err(told)?;
    let library = libfabric::find_or_build(Profile::Release)?.path;
    let mut build = workspace::cargo();
    build.args(["build", "--release", "--package", "weightsync-cli"]);
    step::shown("build weightsync", &mut build)?;
    let program = workspace::target()?.join("release/weightsync");

    let name = name.unwrap_or_else(|| format!("run-{}", std::process::id()));
    let lab = Lab::up(&name, &options).map_err(told)?;
    println!("==> lab {name}: {}", in_words(&options));
    let mut cleaner = Cleaner::start(&name)?;
    let mut command = lab.command(Side::A, program);
    command.env(libfabric::VARIABLE, library).args(in_lab(&lab, weightsync));
    println!("==> {command:?}");
    let status = command.status();
    drop(lab);
    cleaner.dismiss();
    let status = status.map_err(|error| format!("cannot start {command:?}: {error}"))?;
    match exit_code(status) {
        0 => Ok(()),
        code => std::process::exit(code),
    }
}

/// The arguments, with what the demo must be told to have its inference ranks on the other side of the links. What the
/// person says comes first.
fn in_lab(lab: &Lab, arguments: &[String]) -> Vec<String> {
    let Some((command, rest)) = arguments.split_first().filter(|(command, _)| *command == "demo") else {
        return arguments.to_vec();
    };
    let options = lab.options();
    let gbps = options.rate_bits as f64 / 1e9 * Lab::payload_share(options.mtu);
    let additions = [
        // Shared memory would not use the links.
        ("--fabric", "tcp".to_owned()),
        ("--listen", format!("{}:0", Lab::control_address(Side::A))),
        ("--nic", (0..options.links).map(Lab::device).collect::<Vec<_>>().join(",")),
        ("--launch-inference", lab.prefix(Side::B).join(" ")),
        ("--nic-gbps", gbps.to_string()),
    ];
    let given = |flag: &str| rest.iter().any(|argument| argument.split('=').next() == Some(flag));
    let mut all = vec![command.clone()];
    for (flag, value) in additions.into_iter().filter(|(flag, _)| !given(flag)) {
        all.extend([flag.to_owned(), value]);
    }
    all.extend_from_slice(rest);
    all
}

/// A process that takes the lab down if this one cannot: a pipe tells it that this one is gone, by Ctrl-C or killed. It is
/// in a group of its own, where the terminal's signals do not reach it.
struct Cleaner(Child);

impl Cleaner {
    fn start(name: &str) -> Result<Self, Failure> {
        let failed = |error| format!("cannot start the process that cleans up: {error}");
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        command.args(["lab", "down", WHEN_STDIN_CLOSES, "--name", name]);
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0).spawn();
        Ok(Self(spawned.map_err(failed)?))
    }

    /// There is nothing left for it to do.
    fn dismiss(&mut self) {
        // If that fails it finds no lab, and ends with us.
        if self.0.kill().is_ok() {
            self.0.wait().ok();
        }
    }
}

fn exec(arguments: &[String]) -> Result<(), Failure> {
    let (Settings { name, .. }, rest) = settings(arguments)?;
    let usage = "say where and what, as in: cargo xtask lab exec b -- ip address";
    let (side, command) = rest.split_first().ok_or(usage)?;
    let side = match side.as_str() {
        "a" => Side::A,
        "b" => Side::B,
        _ => return Err(usage.to_owned()),
    };
    let command = command.strip_prefix(&["--".to_owned()]).unwrap_or(command);
    if command.is_empty() {
        return Err(usage.to_owned());
    }
    let namespace = weightsync_lab::namespace(name.as_deref().unwrap_or(NAME), side);
    let mut inside = Command::new("ip");
    let error = inside.args(["netns", "exec", &namespace]).args(command).exec();
    Err(format!("cannot start `ip` (iproute2): {error}"))
}

fn down(arguments: &[String]) -> Result<(), Failure> {
    let waiting = arguments.first().is_some_and(|first| first == WHEN_STDIN_CLOSES);
    let (Settings { name, .. }, rest) = settings(arguments.get(usize::from(waiting)..).unwrap_or_default())?;
    nothing_more(rest)?;
    if waiting {
        // An error is an end, too.
        io::copy(&mut io::stdin().lock(), &mut io::sink()).ok();
    }
    let removed = weightsync_lab::down(name.as_deref()).map_err(told)?;
    match &removed[..] {
        [] => println!("nothing to take down"),
        names => println!("taken down: {}", names.join(", ")),
    }
    Ok(())
}

fn status() -> Result<(), Failure> {
    let labs = weightsync_lab::list();
    if labs.is_empty() {
        println!("no lab stands");
    }
    for (name, state) in labs {
        match state {
            LabState::Kept => println!("{name}: stands until it is taken down"),
            LabState::LeftOver => println!("{name}: left by a process that was killed"),
            LabState::InUse(None) => println!("{name}: in use"),
            LabState::InUse(Some(process)) => println!("{name}: in use by process {process}"),
        }
    }
    Ok(())
}

fn in_words(options: &LabOptions) -> String {
    let mbit = |rate_bits: u64| format!("{} Mb/s", rate_bits as f64 / 1e6);
    let slow: Vec<String> =
        options.slow.iter().map(|(link, rate)| format!("{link} at {}", mbit(*rate))).collect();
    let slow = if slow.is_empty() { String::new() } else { format!(" (link {})", slow.join(", ")) };
    let payload = Lab::payload_share(options.mtu) * 100.0;
    let (links, rate, mtu) = (options.links, mbit(options.rate_bits), options.mtu);
    let plural = if links == 1 { "" } else { "s" };
    format!("{links} link{plural} of {rate}{slow}, MTU {mtu}: at most {payload:.1} % of it payload")
}

fn nothing_more(rest: &[String]) -> Result<(), Failure> {
    if rest.is_empty() { Ok(()) } else { Err(format!("too much: {}", rest.join(" "))) }
}

/// As a shell would report it.
fn exit_code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default())
}

fn told(error: LabError) -> Failure {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn options_are_read_up_to_the_command() {
        let line = words(
            "--links 4 --rate=3gbit --slow 1=10mbit --slow=2=640kbit --mtu 9000 --name x -- demo --links 5",
        );
        let (settings, rest) = settings(&line).unwrap();
        assert_eq!(settings.name.as_deref(), Some("x"));
        let slow = vec![(1, 10_000_000), (2, 640_000)];
        let expected =
            LabOptions { links: 4, rate_bits: 3_000_000_000, slow, mtu: 9000, ..LabOptions::default() };
        assert_eq!(settings.options, expected);
        assert_eq!(rest, words("demo --links 5"));
        let bare = words("demo --rate 7");
        assert_eq!(super::settings(&bare), Ok((Settings::default(), &bare[..])));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, word) in [
            ("--links", "--links"),
            ("--links many", "many"),
            ("--links 70000", "70000"),
            ("--rate 100", "100mbit"),
            ("--slow 3", "LINK=RATE"),
            ("--slow a=1mbit", "a=1mbit"),
            ("--slow 3=fast", "--slow 3=fast"),
            ("--speed 3", "--speed"),
        ] {
            let failure = settings(&words(line)).unwrap_err();
            assert!(failure.contains(word), "{line}: {failure}");
        }
        for line in ["", "fly", "status now", "exec", "exec c -- true", "exec a", "run --links 2", "up here"]
        {
            assert!(run(&words(line)).is_err(), "{line}");
        }
    }

    #[test]
    fn a_signal_is_told_as_a_shell_tells_it() {
        assert_eq!(exit_code(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }
}
