//! Ranks that this process starts itself: here, or on other hosts through ssh.
//!
//! The secret goes over standard input and never onto a command line. A rank ends when its standard input closes, so it
//! goes with this process however that one dies; here it is also killed.

use std::io::BufRead as _;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::hosts::Host;
use super::link::Who;
use super::member::Member;
use super::root::{Heard, News};

/// The hidden command of a rank.
pub(crate) const RANK_COMMAND: &str = "cluster-rank";

/// How long ranks may take to end once they were told.
const END_MAX: Duration = Duration::from_secs(10);

/// How long exit handlers of libraries may take.
const EXIT_MAX: Duration = Duration::from_secs(2);

/// What tells ranks on other hosts which libfabric to open, where it was set here.
const LIBFABRIC_VARIABLE: &str = "LIBFABRIC_SO";

/// A rank that is to be started.
pub(crate) struct RankCommand {
    /// The program and its arguments.
    pub(crate) words: Vec<String>,
    /// Where it runs, for messages.
    pub(crate) host: String,
}

/// The ranks of `--local`, with the words that come before each side's.
pub(crate) fn local(
    program: &str,
    address: &str,
    deadline: Duration,
    (trainers, receivers): (u32, u32),
    prefixes: (&str, &str),
) -> Vec<RankCommand> {
    let size = trainers + receivers;
    let command = |rank| {
        // Quotes are not understood: a script can hold what needs them.
        let prefix = if rank < trainers { prefixes.0 } else { prefixes.1 };
        let words = prefix.split_whitespace().map(str::to_owned);
        let words = words.chain(rank_words(program, address, Who { rank, size }, rank, deadline)).collect();
        RankCommand { words, host: "this host".into() }
    };
    (0..size).map(command).collect()
}

/// The ranks of `--hosts`, in the order of the file.
pub(crate) fn over_ssh(program: &str, address: &str, deadline: Duration, hosts: &[Host]) -> Vec<RankCommand> {
    let size = hosts.iter().map(|host| host.slots).sum();
    let places = hosts.iter().flat_map(|host| (0..host.slots).map(move |local| (host, local)));
    let command = |(rank, (host, local)): (u32, (&Host, u32))| {
        let ssh = ["ssh", "-o", "BatchMode=yes", "--", &host.name].map(str::to_owned);
        let library = std::env::var(LIBFABRIC_VARIABLE).ok().filter(|path| !path.is_empty());
        let library = library.map(|path| format!("{LIBFABRIC_VARIABLE}={path}"));
        let variables = library.into_iter().flat_map(|setting| ["env".to_owned(), setting]);
        let there = variables.chain(rank_words(program, address, Who { rank, size }, local, deadline));
        // ssh hands the words to a shell.
        RankCommand { words: ssh.into_iter().chain(there.map(quoted)).collect(), host: host.name.clone() }
    };
    (0..).zip(places).map(command).collect()
}

fn rank_words(program: &str, address: &str, who: Who, local: u32, deadline: Duration) -> [String; 7] {
    let Who { rank, size } = who;
    let millis = deadline.as_millis().to_string();
    let (rank, size, local) = (rank.to_string(), size.to_string(), local.to_string());
    [program.to_owned(), RANK_COMMAND.to_owned(), address.to_owned(), rank, size, local, millis]
}

/// A word as a POSIX shell reads it back.
fn quoted(word: String) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Running ranks. Dropping this kills what runs here, and closes the standard input of what runs elsewhere.
pub(crate) struct Processes(JoinSet<()>);

impl Processes {
    pub(crate) fn start(
        commands: &[RankCommand],
        secret: &str,
        tell: &mpsc::Sender<Heard>,
    ) -> anyhow::Result<Self> {
        let mut all = JoinSet::new();
        for (rank, command) in (0..).zip(commands) {
            let (program, arguments) = command.words.split_first().context("a rank without a command")?;
            let child = Command::new(program)
                .args(arguments)
                .stdin(Stdio::piped())
                // Standard output is the results'.
                .stdout(Stdio::null())
                .kill_on_drop(true)
                .spawn()
                .with_context(|| format!("cannot start rank {rank}: {program}"))?;
            all.spawn(watch(rank, child, format!("{secret}\n"), tell.clone()));
        }
        Ok(Self(all))
    }

    /// Waits a while for their end; what does not end is killed.
    pub(crate) async fn finish(mut self) {
        let ended = async { while self.0.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(END_MAX, ended).await;
    }
}

async fn watch(rank: u32, mut child: Child, secret: String, tell: mpsc::Sender<Heard>) {
    // Held until the rank has ended.
    let mut stdin = child.stdin.take();
    if let Some(stdin) = &mut stdin {
        // A child that is gone already says so below.
        let _ = stdin.write_all(secret.as_bytes()).await;
    }
    let ended = match child.wait().await {
        Ok(status) => format!("its process ended with {status}"),
        Err(error) => format!("its process cannot be waited for: {error}"),
    };
    let _ = tell.send((rank, News::Lost(ended))).await;
}

/// The process of a rank that was started above.
pub(crate) fn rank(words: &[&str]) -> anyhow::Result<()> {
    let [address, rank, size, local, deadline_ms] = words else {
        anyhow::bail!("{RANK_COMMAND} is started by `bench cluster` itself");
    };
    let mut secret = String::new();
    std::io::stdin().lock().read_line(&mut secret)?;
    std::thread::Builder::new().name("stdin".into()).spawn(end_with_stdin)?;
    let member = Member {
        who: Who { rank: rank.parse()?, size: size.parse()? },
        local_rank: Some(local.parse()?),
        address: (*address).to_owned(),
        secret: secret.trim().to_owned(),
        deadline: Duration::from_millis(deadline_ms.parse()?),
    };
    super::runtime()?.block_on(member.run()).with_context(|| format!("rank {rank}"))
}

fn end_with_stdin() {
    let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
    // Exit handlers of libraries run while rails are still busy, and may wait for them without end.
    let force = || {
        std::thread::sleep(EXIT_MAX);
        std::process::abort()
    };
    let _ = std::thread::Builder::new().name("exit".into()).spawn(force);
    std::process::exit(1);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// A real shell reads back what was quoted.
        #[test]
        fn a_shell_reads_a_quoted_word_back(word in "[ -~]{1,40}") {
            let command = format!("printf %s {}", quoted(word.clone()));
            let output = std::process::Command::new("sh").args(["-c", &command]).output().unwrap();
            prop_assert_eq!(String::from_utf8(output.stdout).unwrap(), word);
        }
    }

    #[test]
    fn ranks_are_dealt_to_hosts_in_order() {
        let hosts = super::super::hosts::parse("a slots=2\nb\n").unwrap();
        let commands = over_ssh("/x y/bench", "h:1", Duration::from_secs(1), &hosts);
        let of: Vec<(&str, String)> =
            commands.iter().map(|c| (c.host.as_str(), c.words[c.words.len() - 4..].join(" "))).collect();
        assert_eq!(
            of,
            [
                ("a", "'0' '3' '0' '1000'".into()),
                ("a", "'1' '3' '1' '1000'".into()),
                ("b", "'2' '3' '0' '1000'".into())
            ]
        );
        assert!(commands[0].words.contains(&"'/x y/bench'".to_owned()));
    }
}
