//! The demo's rank processes: started from this very program, read line by line, and never left behind.
//!
//! A child ends when its standard input closes, so it goes with its parent however that one dies; a child that does not
//! end by itself is killed. Where a launcher stands between the two (`ip netns exec`, `ssh`), it is the launcher that is
//! killed, and the child then ends with its standard input.

use std::ffi::OsString;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;

use crate::args::{SECRET_VARIABLE, TLS_VARIABLES};
use crate::events::Event;

/// Lines that may wait to be read; a child that writes more waits.
const LINES_MAX: usize = 256;

/// What a child did.
pub(crate) enum News {
    /// It said something.
    Said(Event),
    /// A line of its standard error.
    Complained(String),
    /// It ended.
    Exited(std::io::Result<ExitStatus>),
}

/// Rank processes, numbered in the order in which they were started.
pub(crate) struct Children {
    news: mpsc::Receiver<(usize, News)>,
    sender: mpsc::Sender<(usize, News)>,
    alive: Vec<Option<(ChildStdin, tokio::task::AbortHandle)>>,
    secret: String,
}

impl Children {
    pub(crate) fn new(secret: String) -> Self {
        let (sender, news) = mpsc::channel(LINES_MAX);
        Self { news, sender, alive: Vec::new(), secret }
    }

    /// Starts this program with `args` and `--json`, behind the words of a launcher if it has any; the child's number.
    pub(crate) fn start(&mut self, launcher: &str, args: Vec<OsString>) -> anyhow::Result<usize> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut words = launcher.split_whitespace();
        let mut command = match words.next() {
            Some(first) => {
                let mut command = Command::new(first);
                command.args(words).arg(program);
                command
            }
            None => Command::new(program),
        };
        // The controller of a demo is this process, and plain.
        for variable in TLS_VARIABLES {
            command.env_remove(variable);
        }
        let mut child = command
            .args(args)
            .args(["--json", "--until-stdin-closes"])
            .env(SECRET_VARIABLE, &self.secret)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| match launcher {
                "" => "cannot start a rank process".to_owned(),
                _ => format!("cannot start a rank process with `{launcher}`"),
            })?;
        let number = self.alive.len();
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
            anyhow::bail!("a rank process has no pipes");
        };
        let task = tokio::spawn(watch(number, child, stdout, stderr, self.sender.clone()));
        self.alive.push(Some((stdin, task.abort_handle())));
        Ok(number)
    }

    /// The next news, or `None` when every child has ended. `Err` when there were none for `at_most`.
    pub(crate) async fn next(&mut self, at_most: Duration) -> Result<Option<(usize, News)>, Duration> {
        if self.alive.iter().all(Option::is_none) {
            return Ok(None);
        }
        let news = tokio::time::timeout(at_most, self.news.recv()).await.map_err(|_| at_most)?;
        if let Some((number, News::Exited(_))) = &news
            && let Some(slot) = self.alive.get_mut(*number)
        {
            *slot = None;
        }
        Ok(news)
    }

    /// The numbers of the children that run.
    pub(crate) fn running(&self) -> impl Iterator<Item = usize> {
        self.alive.iter().enumerate().filter_map(|(number, alive)| alive.as_ref().map(|_| number))
    }

    /// Kills what still runs.
    pub(crate) fn kill(&mut self) {
        for (_stdin, task) in self.alive.iter_mut().filter_map(Option::take) {
            // Ending its task drops the child, which kills it.
            task.abort();
        }
    }
}

async fn watch(
    number: usize,
    mut child: Child,
    stdout: impl AsyncRead + Unpin,
    stderr: impl AsyncRead + Unpin,
    news: mpsc::Sender<(usize, News)>,
) {
    let (mut out, mut err) = (BufReader::new(stdout).lines(), BufReader::new(stderr).lines());
    let said = async {
        while let Ok(Some(line)) = out.next_line().await {
            let item = match serde_json::from_str(&line) {
                Ok(event) => News::Said(event),
                Err(_) => News::Complained(line),
            };
            let _ = news.send((number, item)).await;
        }
    };
    let complained = async {
        while let Ok(Some(line)) = err.next_line().await {
            let _ = news.send((number, News::Complained(line))).await;
        }
    };
    tokio::join!(said, complained);
    let status = child.wait().await;
    let _ = news.send((number, News::Exited(status))).await;
}
