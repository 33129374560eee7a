//! Runs of the real program: started, watched, bounded in time, and never left behind.
//!
//! Every process that belongs to a [`Job`] carries a mark in its environment, which its children inherit. So what a
//! test has left running is found, named and killed by process id, whoever its parent was.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// The longest that a test waits for its processes, all together: many times what the slowest needs on a busy machine.
const LIMIT: Duration = Duration::from_secs(90);

/// How long orphans may take to end by themselves.
const ORPHANS_MAX: Duration = Duration::from_secs(15);

/// How often a process is looked at.
const POLL: Duration = Duration::from_millis(10);

/// The longest wait without progress that ranks are given where something goes wrong; faults are noticed within it.
pub const DEADLINE_SECONDS: &str = "4";

/// Marks a job's processes.
const MARK: &str = "WEIGHTSYNC_TEST_JOB";

/// Processes that belong together.
pub struct Job {
    mark: String,
    until: Instant,
    shared_memory: BTreeSet<String>,
    pids: Mutex<BTreeSet<i32>>,
}

impl Job {
    pub fn new() -> Job {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        Job {
            mark: format!("{}.{number}.", std::process::id()),
            until: Instant::now() + LIMIT,
            shared_memory: shared_memory(),
            pids: Mutex::default(),
        }
    }

    /// The program, to be given more than arguments before it is started. Nothing of the caller's environment that
    /// changes its behaviour reaches it, but for the libfabric to open.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weightsync"));
        command.args(arguments).env(MARK, &self.mark);
        for variable in [
            "RUST_LOG",
            "WEIGHTSYNC_LOG",
            "WEIGHTSYNC_SECRET",
            "RUST_BACKTRACE",
            "RANK",
            "PMI_RANK",
            "SLURM_PROCID",
        ] {
            command.env_remove(variable);
        }
        for variable in ["MASTER_ADDR", "WEIGHTSYNC_TLS_CA", "WEIGHTSYNC_TLS_CERT", "WEIGHTSYNC_TLS_KEY"] {
            command.env_remove(variable);
        }
        command
    }

    /// Starts the program with these arguments, separated by spaces.
    pub fn start(&self, arguments: &str) -> Process {
        self.spawn(&mut self.command(arguments.split_whitespace()))
    }

    /// Starts what [`Job::command`] made.
    pub fn spawn(&self, command: &mut Command) -> Process {
        self.spawn_into(command, Stdio::piped())
    }

    /// The same with a standard output of the caller's, which is then not read here.
    pub fn spawn_into(&self, command: &mut Command, stdout: Stdio) -> Process {
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_string_lossy()).collect();
        let name = arguments.join(" ");
        let spawned = command.stdin(Stdio::null()).stdout(stdout).stderr(Stdio::piped()).spawn();
        let mut child = spawned.unwrap_or_else(|error| panic!("cannot start `{name}`: {error}"));
        self.pids.lock().unwrap().insert(child.id() as i32);
        let stdout = Text::collect(child.stdout.take());
        let stderr = Text::collect(child.stderr.take());
        Process { name, child, stdout, stderr, until: self.until }
    }

    /// Runs the program to its end.
    pub fn run(&self, arguments: &str) -> Output {
        self.start(arguments).finish()
    }

    /// The live processes of this job.
    pub fn alive(&self) -> Vec<Pid> {
        let mark = format!("{MARK}={}", self.mark);
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let pids = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
        // An environment that cannot be read is another user's, a zombie's, or gone.
        let marked =
            |pid: &i32| fs::read(format!("/proc/{pid}/environ")).is_ok_and(|found| contains(&found, &mark));
        let alive: Vec<i32> = pids.filter(marked).collect();
        self.pids.lock().unwrap().extend(&alive);
        alive.into_iter().filter_map(Pid::from_raw).collect()
    }

    /// Says that the test is over: no process of it may be left, and nothing in /dev/shm.
    pub fn end(self) {
        let until = Instant::now() + ORPHANS_MAX;
        let mut alive = self.alive();
        while !alive.is_empty() && Instant::now() < until {
            thread::sleep(POLL);
            alive = self.alive();
        }
        let lines: Vec<String> = alive.iter().map(|pid| command_line(*pid)).collect();
        assert!(lines.is_empty(), "still running {ORPHANS_MAX:?} after the end: {lines:#?}");
        // Other programs use /dev/shm too: ours carry our name, or the number of the process that made them.
        let pids = self.pids.lock().unwrap();
        let ours = |name: &&String| {
            let mut numbers =
                name.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok());
            name.contains("weightsync") || numbers.any(|number: i32| pids.contains(&number))
        };
        let now = shared_memory();
        let left: Vec<&String> = now.difference(&self.shared_memory).filter(ours).collect();
        assert!(left.is_empty(), "left in /dev/shm: {left:?}");
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for pid in self.alive() {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn contains(text: &[u8], word: &str) -> bool {
    text.windows(word.len()).any(|window| window == word.as_bytes())
}

fn command_line(pid: Pid) -> String {
    let line = fs::read(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
    String::from_utf8_lossy(&line).replace('\0', " ")
}

fn shared_memory() -> BTreeSet<String> {
    let entries = fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// What a process writes, as it comes.
struct Text {
    text: Arc<Mutex<Vec<u8>>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Text {
    fn collect(from: Option<impl Read + Send + 'static>) -> Text {
        let text = Arc::new(Mutex::new(Vec::new()));
        let reader = from.map(|mut from| {
            let into = text.clone();
            thread::spawn(move || {
                let mut block = [0; 4096];
                while let Ok(count @ 1..) = from.read(&mut block) {
                    into.lock().unwrap().extend_from_slice(&block[..count]);
                }
            })
        });
        Text { text, reader }
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap()).into_owned()
    }

    /// All of it, once nobody can write more.
    fn whole(&mut self, until: Instant) -> String {
        if let Some(reader) = self.reader.take() {
            while !reader.is_finished() && Instant::now() < until {
                thread::sleep(POLL);
            }
            assert!(reader.is_finished(), "the process has ended, but another one holds its output open");
        }
        self.so_far()
    }
}

/// A process of a job. Dropping it kills it.
pub struct Process {
    name: String,
    child: Child,
    stdout: Text,
    stderr: Text,
    until: Instant,
}

impl Process {
    /// Waits until a whole line of what it writes contains `words`, and returns that line.
    pub fn wait_for(&mut self, words: &str) -> String {
        loop {
            // Whether it has ended is asked before what it wrote is read: its last words are not missed.
            let ended = self.child.try_wait().unwrap().is_some();
            for text in [&mut self.stdout, &mut self.stderr] {
                let text = if ended { text.whole(self.until) } else { text.so_far() };
                let mut whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
                if let Some(line) = whole.find(|line| line.contains(words)) {
                    return line.trim_end().to_owned();
                }
            }
            assert!(!ended && Instant::now() < self.until, "never said {words:?}: {self}");
            thread::sleep(POLL);
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap_or_else(|error| panic!("{signal:?}: {error}: {self}"));
    }

    pub fn kill(mut self) -> Output {
        self.child.kill().unwrap();
        self.finish()
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Output {
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < self.until, "has not ended: {self}");
            thread::sleep(POLL);
        };
        let (stdout, stderr) = (self.stdout.whole(self.until), self.stderr.whole(self.until));
        let output = Output { name: self.name.clone(), status, stdout, stderr };
        assert!(!output.stderr.contains("panicked at"), "panicked: {output}");
        output
    }
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (stdout, stderr) = (self.stdout.so_far(), self.stderr.so_far());
        write!(f, "`weightsync {}`\nstdout:\n{stdout}\nstderr:\n{stderr}", self.name)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process has said and how it ended.
pub struct Output {
    name: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Output {
    /// It succeeded.
    pub fn succeeds(self) -> Output {
        assert!(self.status.success(), "failed: {self}");
        self
    }

    /// It failed with this exit code, and its standard error has all of `words`.
    pub fn fails(self, code: i32, words: &[&str]) -> Output {
        assert_eq!(self.status.code(), Some(code), "another exit code: {self}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} is not said: {self}");
        }
        self
    }

    /// It was killed, as the test meant it to be.
    pub fn was_killed(self) -> Output {
        assert_eq!(self.status.signal(), Some(Signal::KILL.as_raw()), "was not killed: {self}");
        self
    }

    /// The objects of its standard output that are of this event.
    pub fn events(&self, event: &str) -> Vec<serde_json::Value> {
        // A process that was killed may have left half a line.
        let whole = self.stdout.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let parse =
            |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}: {self}"));
        let objects = whole.map(parse);
        objects.filter(|object: &serde_json::Value| object["event"] == event).collect()
    }

    /// The versions of an event, in order.
    pub fn versions(&self, event: &str) -> Vec<u64> {
        self.events(event).iter().map(|object| object["version"].as_u64().unwrap()).collect()
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Output { name, status, stdout, stderr } = self;
        write!(f, "`weightsync {name}` ({status})\nstdout:\n{stdout}\nstderr:\n{stderr}")
    }
}

/// Whether libfabric can be opened. Where it is missing the caller has nothing to test, which is said, or is an error
/// where `WEIGHTSYNC_REQUIRE` asks for it.
pub fn has_libfabric() -> bool {
    let Err(error) = efa_core::Library::open() else { return true };
    let required = std::env::var("WEIGHTSYNC_REQUIRE").unwrap_or_default();
    assert!(!required.contains("libfabric"), "libfabric is required here: {error}");
    println!("skipped: no libfabric: {error}");
    false
}

/// Makes of each function of a fabric's name two tests: over shared memory, and over libfabric's TCP.
#[macro_export]
macro_rules! over_each_fabric {
    ($($case:ident),* $(,)?) => {
        mod local {
            $(#[test] fn $case() { super::$case("local"); })*
        }
        mod tcp {
            $(#[test] fn $case() { if super::common::job::has_libfabric() { super::$case("tcp"); } })*
        }
    };
}

/// A job of a controller and ranks, each a process, with one wording for all of them.
pub struct Cluster {
    pub job: Job,
    pub fabric: &'static str,
    pub trainers: u32,
    pub inference: u32,
    pub address: String,
}

impl Cluster {
    /// Starts a controller and waits until it listens.
    pub fn start(fabric: &'static str, trainers: u32, inference: u32) -> (Cluster, Process) {
        let job = Job::new();
        let mut controller = job.start(&format!(
            "controller --listen 127.0.0.1:0 --json --deadline {DEADLINE_SECONDS} --trainers {trainers} --inference {inference}"
        ));
        let address = listening_at(&mut controller);
        (Cluster { job, fabric, trainers, inference, address }, controller)
    }

    /// The arguments of a rank: `side` is push or serve.
    pub fn arguments(&self, side: &str, rank: u32, checkpoint: &Path) -> String {
        let Cluster { fabric, trainers, inference, address, .. } = self;
        let checkpoint = checkpoint.display();
        format!(
            "{side} --controller {address} --rank {rank} --trainers {trainers} --inference {inference} \
             --fabric {fabric} --deadline {DEADLINE_SECONDS} --checkpoint {checkpoint} --json"
        )
    }

    /// Starts a rank.
    pub fn rank(&self, side: &str, rank: u32, checkpoint: &Path, more: &str) -> Process {
        self.job.start(&format!("{} {more}", self.arguments(side, rank, checkpoint)))
    }
}

/// Where a controller that was started with `--json` listens.
pub fn listening_at(controller: &mut Process) -> String {
    let line = controller.wait_for("listening");
    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    event["address"].as_str().unwrap().to_owned()
}
