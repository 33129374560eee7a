//! The processes of one tortured job, and what can be done to them.
//!
//! Only processes that it started are ever signalled, by their numbers. What they say goes to a channel line by line, and with
//! their logs to files of the job's folder. None of them outlives this program, however that ends.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};
use weightsync::{CommitMode, OnLoss, Secret};
use weightsync_lab::{Lab, Side};

use super::fault::Who;
use super::rank::{NEXT_WRITE_MAX, Part, SECRET, STOP_IN_A_WRITE};
use super::weights::WORLD;

/// The command by which this program becomes another one that does not outlive it.
pub(crate) const LEASH: &str = "on-leash";

/// Ports to listen at are looked for from here on: below those that the kernel gives to whoever asks for any, because a rank
/// that looks for a controller that is down would now and then connect to itself.
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 10_000;

/// One line of a process's standard output.
pub(super) struct Line {
    pub(super) who: Who,
    pub(super) at: Instant,
    pub(super) text: String,
}

/// What the job is.
#[derive(Clone)]
pub(super) struct Setting {
    /// The weightsync command.
    pub(super) weightsync: PathBuf,
    /// For logs, and the controller's record.
    pub(super) folder: PathBuf,
    pub(super) on_loss: OnLoss,
    /// Whether checksums are compared before a commit.
    pub(super) verify: bool,
    /// Whether inference ranks pass on what they get.
    pub(super) relay: bool,
    pub(super) deadline: Duration,
    /// Those of the inference ranks, in turn.
    pub(super) fabrics: Vec<String>,
    /// Theirs, one each.
    pub(super) modes: [CommitMode; WORLD.inference as usize],
}

struct Actor {
    child: Child,
    stopped: bool,
}

/// See the module.
pub(super) struct Cast {
    setting: Setting,
    lab: Option<Lab>,
    address: String,
    secret: String,
    lines: Sender<Line>,
    actors: BTreeMap<Who, Actor>,
    /// Every process that there was.
    pub(super) pids: Vec<u32>,
}

impl Cast {
    /// Nobody yet. In a lab trainers live on its side A with the controller, and inference ranks on side B.
    pub(super) fn new(setting: Setting, lab: Option<Lab>, lines: Sender<Line>) -> anyhow::Result<Self> {
        let address = match &lab {
            Some(_) => format!("{}:{FIRST_PORT}", Lab::control_address(Side::A)),
            None => free_address()?,
        };
        let (secret, actors) = (Secret::random_text()?, BTreeMap::new());
        Ok(Self { setting, lab, address, secret, lines, actors, pids: Vec::new() })
    }

    pub(super) fn record(&self) -> PathBuf {
        self.setting.folder.join("commit")
    }

    /// Whether its process runs, and is not stopped.
    pub(super) fn is_running(&self, who: Who) -> bool {
        self.actors.get(&who).is_some_and(|actor| !actor.stopped)
    }

    /// Starts a process of it.
    pub(super) fn start(&mut self, who: Who) -> anyhow::Result<()> {
        let mut command = match who {
            Who::Controller => self.controller()?,
            Who::Trainer(rank) => self.rank(who, "torture-trainer", rank)?,
            Who::Inference(rank) => self.rank(who, "torture-inference", rank)?,
        };
        let log = self.file(&format!("{who}.log"))?;
        command.env(SECRET, &self.secret).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().with_context(|| format!("cannot start {who}"))?;
        let (stdout, pid) = (child.stdout.take().context("no standard output")?, child.id());
        let (lines, mut kept) = (self.lines.clone(), self.file(&format!("{who}.out"))?);
        writeln!(kept, "--- process {pid}")?;
        std::thread::spawn(move || {
            for text in BufReader::new(stdout).lines().map_while(Result::ok) {
                let at = Instant::now();
                // Who does not listen any more has seen enough.
                let _ = writeln!(kept, "{text}");
                let _ = lines.send(Line { who, at, text });
            }
        });
        self.pids.push(pid);
        self.actors.insert(who, Actor { child, stopped: false });
        Ok(())
    }

    /// SIGKILL, and waits until it is gone.
    pub(super) fn kill(&mut self, who: Who) -> anyhow::Result<()> {
        if let Some(mut actor) = self.actors.remove(&who) {
            actor.child.kill()?;
            actor.child.wait()?;
        }
        Ok(())
    }

    /// SIGSTOP.
    pub(super) fn stop(&mut self, who: Who) -> anyhow::Result<()> {
        self.signal(who, Signal::STOP, true)
    }

    /// SIGSTOP of a trainer, in the middle of its writes if it writes soon. It may be gone meanwhile.
    pub(super) fn stop_in_a_write(&mut self, who: Who) -> anyhow::Result<()> {
        // Who has not yet joined the job listens later, and is stopped as others are.
        if self.tell(who, STOP_IN_A_WRITE).is_ok() {
            let pid = self.actors.get(&who).map_or(0, |actor| actor.child.id());
            let until = Instant::now() + NEXT_WRITE_MAX;
            while !is_stopped(pid) && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        self.stop(who)
    }

    /// SIGCONT.
    pub(super) fn resume(&mut self, who: Who) -> anyhow::Result<()> {
        self.signal(who, Signal::CONT, false)
    }

    fn signal(&mut self, who: Who, signal: Signal, stopped: bool) -> anyhow::Result<()> {
        let Some(actor) = self.actors.get_mut(&who) else { return Ok(()) };
        // Not reaped, so the number is still its own.
        kill_process(Pid::from_child(&actor.child), signal)?;
        actor.stopped = stopped;
        Ok(())
    }

    /// Says a line to its standard input.
    pub(super) fn tell(&mut self, who: Who, line: &str) -> anyhow::Result<()> {
        let stdin = self.actors.get_mut(&who).and_then(|actor| actor.child.stdin.as_mut());
        writeln!(stdin.with_context(|| format!("{who} is gone"))?, "{line}")?;
        Ok(())
    }

    /// Those who have ended by themselves since the last call, and how.
    pub(super) fn ended(&mut self) -> anyhow::Result<Vec<(Who, ExitStatus)>> {
        let mut ended = Vec::new();
        for (who, actor) in &mut self.actors {
            if let Some(status) = actor.child.try_wait()? {
                ended.push((*who, status));
            }
        }
        ended.iter().for_each(|(who, _)| drop(self.actors.remove(who)));
        Ok(ended)
    }

    /// Whether a process is left.
    pub(super) fn is_empty(&self) -> bool {
        self.actors.is_empty()
    }

    /// Those that are left.
    pub(super) fn names(&self) -> String {
        self.actors.keys().map(Who::to_string).collect::<Vec<_>>().join(", ")
    }

    /// Processes of this job that run though nobody knows them any more.
    pub(super) fn orphans(&self) -> Vec<u32> {
        let known = |pid: &u32| self.actors.values().any(|actor| actor.child.id() == *pid);
        let secret = format!("{SECRET}={}", self.secret).into_bytes();
        let ours = |pid: &u32| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable == secret)
        };
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| !known(pid) && ours(pid)).collect()
    }

    /// Whether its ranks reach each other over links of a lab.
    pub(super) fn has_links(&self) -> bool {
        self.lab.is_some()
    }

    /// Sets the NIC of a link up or down.
    pub(super) fn set_link(&self, on_trainers: bool, link: u16, up: bool) -> anyhow::Result<()> {
        match &self.lab {
            Some(lab) => Ok(lab.set_link(side(on_trainers), link, up)?),
            None => Ok(()),
        }
    }

    /// Sets the NIC of the control link up or down.
    pub(super) fn set_control(&self, on_trainers: bool, up: bool) -> anyhow::Result<()> {
        match &self.lab {
            Some(lab) => Ok(lab.set_control(side(on_trainers), up)?),
            None => Ok(()),
        }
    }

    /// Gives the NIC of a link its address, or takes it away.
    pub(super) fn set_address(&self, on_trainers: bool, link: u16, there: bool) -> anyhow::Result<()> {
        let Some(lab) = &self.lab else { return Ok(()) };
        let (side, verb) = (side(on_trainers), if there { "add" } else { "del" });
        let address = format!("{}/24", Lab::address(side, link));
        let mut ip = lab.command(side, "ip");
        let done = ip.args(["address", verb, &address, "dev", &Lab::device(link)]).output()?;
        if !done.status.success() {
            bail!("ip address {verb} {address}: {}", String::from_utf8_lossy(&done.stderr).trim());
        }
        Ok(())
    }

    fn controller(&self) -> anyhow::Result<Command> {
        let Setting { weightsync, on_loss, verify, relay, deadline, .. } = &self.setting;
        let mut command = self.leash(Side::A, weightsync)?;
        command.args(["controller", "--listen", &self.address, "--on-loss", &on_loss.to_string(), "--json"]);
        command.args([
            "--trainers",
            &WORLD.trainers.to_string(),
            "--inference",
            &WORLD.inference.to_string(),
        ]);
        command.args(["--deadline", &deadline.as_secs_f64().to_string()]);
        if *verify {
            command.args(["--verify", "full"]);
        }
        if *relay {
            command.args(["--relay", "per-host"]);
        }
        command.arg("--record").arg(self.record());
        Ok(command)
    }

    fn rank(&self, who: Who, role: &str, rank: u32) -> anyhow::Result<Command> {
        let Setting { deadline, fabrics, modes, .. } = &self.setting;
        let of_inference = fabrics.get(rank as usize % fabrics.len().max(1)).context("no fabric")?;
        let fabric = match (who, fabrics.as_slice()) {
            (Who::Trainer(_), [_, _, ..]) => "auto",
            _ => of_inference,
        };
        let nics = self.lab.as_ref().map(|lab| (0..lab.options().links).map(Lab::device).collect());
        let part = Part {
            controller: self.address.clone(),
            rank,
            deadline: *deadline,
            fabric: fabric.to_owned(),
            mode: modes.get(rank as usize).copied().unwrap_or_default().to_string(),
            nics: nics.unwrap_or_default(),
            record: self.record(),
            // One that often looks after other things meanwhile.
            patience: (rank == 1).then_some(Duration::from_millis(100)),
        };
        let mut command = self.leash(side(matches!(who, Who::Trainer(_))), &std::env::current_exe()?)?;
        command.arg(role).arg(serde_json::to_string(&part)?);
        Ok(command)
    }

    fn leash(&self, side: Side, program: &Path) -> anyhow::Result<Command> {
        let here = std::env::current_exe()?;
        let mut command = match &self.lab {
            Some(lab) => lab.command(side, here),
            None => Command::new(here),
        };
        command.args([LEASH, &std::process::id().to_string()]).arg(program);
        // Nothing of the caller's environment makes it another job.
        for variable in ["RUST_LOG", "LOCAL_RANK"] {
            command.env_remove(variable);
        }
        for of_tls in ["CA", "CERT", "KEY", "NAME"] {
            command.env_remove(format!("WEIGHTSYNC_TLS_{of_tls}"));
        }
        command.env("WEIGHTSYNC_LOG", "info");
        Ok(command)
    }

    fn file(&self, name: &str) -> anyhow::Result<File> {
        let path = self.setting.folder.join(name.replace(' ', "-"));
        File::options().create(true).append(true).open(&path).with_context(|| path.display().to_string())
    }
}

impl Drop for Cast {
    fn drop(&mut self) {
        for actor in self.actors.values_mut() {
            let _ = actor.child.kill();
            let _ = actor.child.wait();
        }
    }
}

fn side(on_trainers: bool) -> Side {
    if on_trainers { Side::A } else { Side::B }
}

fn is_stopped(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name, which may have spaces.
    stat.rsplit_once(") ").is_some_and(|(_, state)| state.starts_with('T'))
}

/// An address of loopback at which nobody listens now.
fn free_address() -> anyhow::Result<String> {
    let start = std::process::id() as u16 % PORTS;
    for port in (start..PORTS).chain(0..start) {
        let address = format!("127.0.0.1:{}", FIRST_PORT + port);
        if std::net::TcpListener::bind(&address).is_ok() {
            return Ok(address);
        }
    }
    bail!("no port of 127.0.0.1 is free")
}

/// Becomes `program`, which ends when the process `parent` does.
pub(crate) fn on_leash(parent: &str, program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent = parent.parse().ok().and_then(Pid::from_raw);
    if getppid() != parent {
        bail!("whoever started it is gone");
    }
    Err(Command::new(program).args(arguments).exec().into())
}
