//! `weightsync demo`: a whole job on this machine, in real processes over real rails, with every byte compared.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::sync::mpsc;
use weightsync::metrics::Metrics;
use weightsync::{BlockQuant, Controller, Rank, Report, Secret, ServerConfig, World};
use weightsync_cli::checkpoint::Checkpoint;
use weightsync_cli::synthetic::{self, Shape};
use weightsync_cli::tensor_parallel::Layout;

use crate::args::DemoArgs;
use crate::children::{Children, News};
use crate::events::{BytesDiffer, EXIT_BYTES_DIFFER, Event};
use crate::logs;
use crate::say::say;
use crate::table::bytes_text;
use crate::trace::Trace;

mod facts;

use facts::{Facts, Plan, RankFacts};

/// The seed of the synthetic checkpoint.
const SEED: u64 = 1;

/// Beyond the deadline, for loading, comparing and ending.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) async fn run(args: DemoArgs) -> anyhow::Result<()> {
    let path = match &args.checkpoint {
        Some(path) => path.clone(),
        None => synthetic_checkpoint()?,
    };
    let checkpoint = Checkpoint::open(&path)?;
    let world = World { trainers: args.trainers, inference: args.inference };
    let tp = args.held.tensor_parallel(args.inference)?;
    let mut demo = Demo::new(&args, world)?;
    if !args.json {
        say!("checkpoint {} ({})", path.display(), bytes_text(checkpoint.bytes()));
        say!("{world}, {} versions, fabric {}", args.steps, args.rail.fabric);
        if args.held.fp8 {
            let layout = Layout::new(checkpoint.tensors(), checkpoint.heads(), tp)?;
            let quantised = layout.with_fp8(BlockQuant::default())?.quantised();
            say!("{quantised} parameters of each inference rank in FP8, quantised on the way");
        }
    }
    let failed = demo.play(&args, &path).await;
    let traced = match &args.trace {
        Some(file) => std::fs::write(file, demo.trace.render())
            .with_context(|| format!("cannot write {}", file.display())),
        None => Ok(()),
    };
    failed?;
    traced?;
    demo.facts.check_complete(args.steps)?;
    if args.json {
        say!("{}", demo.facts.json(&path, &args.rail.fabric.to_string())?);
    } else {
        demo.facts.print();
    }
    Ok(())
}

fn synthetic_checkpoint() -> anyhow::Result<PathBuf> {
    let shape = Shape::qwen3_0_6b();
    let bar = bar(0, "{msg} {bar:40} {bytes}/{total_bytes} {eta}");
    bar.set_message("writing a synthetic checkpoint, once");
    let path = synthetic::cached(&shape, SEED, &mut |written, total| {
        bar.set_length(total);
        bar.set_position(written);
    })?;
    bar.finish_and_clear();
    Ok(path)
}

fn bar(len: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(len).with_style(style)
}

struct Demo {
    world: World,
    facts: Facts,
    trace: Trace,
    bar: ProgressBar,
    /// The last words of each rank, printed if the run fails.
    last_words: BTreeMap<usize, String>,
}

impl Demo {
    fn new(args: &DemoArgs, world: World) -> anyhow::Result<Self> {
        let bar = bar(
            args.steps.saturating_mul(u64::from(args.inference)),
            "{msg:32} {bar:40} {pos}/{len} rank versions verified",
        );
        let nics = |rank: Rank| match rank {
            Rank::Trainer(rank) => share(&args.rail.nic, rank.index(), args.trainers as usize),
            Rank::Receiver(rank) => share(&args.rail.nic, rank.index(), args.inference as usize),
        };
        let rank = |(number, rank)| {
            let device = args.device.of_local_rank(number)?;
            anyhow::Ok(RankFacts::new(rank, device, nics(rank).len().max(1)))
        };
        let ranks = (0..).zip(world.members()).map(rank).collect::<Result<_, _>>()?;
        let facts = Facts::new(world, ranks);
        Ok(Self { world, facts, trace: Trace::default(), bar, last_words: BTreeMap::new() })
    }

    /// Starts the job and follows it to its end.
    async fn play(&mut self, args: &DemoArgs, checkpoint: &Path) -> anyhow::Result<()> {
        let secret = Secret::random_text()?;
        let (reports_in, mut reports) = mpsc::unbounded_channel();
        let mut server = ServerConfig {
            secret: Secret::new(&secret),
            listen: args.launch.listen.clone(),
            ..ServerConfig::loopback(self.world)?
        };
        server.controller.deadline = args.rail.deadline;
        server.controller.options = args.plan.options();
        server.controller.verify = args.checksums.verify;
        let metrics = Metrics::new();
        let _page = args.metrics.serve(&metrics).await?;
        let mut counted = metrics.controller(self.world);
        let observe = move |report| {
            counted.observe(&report);
            drop(reports_in.send(report));
        };
        let controller = Controller::bind(server).await?.spawn(observe);
        let address = controller.local_addr();
        if address.ip().is_unspecified() {
            bail!(
                "--listen {}: ranks cannot connect to {address}; name an address of this host",
                args.launch.listen
            );
        }

        let mut children = Children::new(secret);
        for number in 0..self.facts.ranks.len() {
            let (launcher, line) = self.child_command(number, args, checkpoint, &address.to_string());
            children.start(launcher, line)?;
        }
        self.bar.set_message("loading and connecting");
        let mut failures = Vec::new();
        loop {
            // Once something has failed, the others have their deadline to find out, and no more.
            let patience = if failures.is_empty() { PATIENCE } else { Duration::ZERO };
            let news = tokio::select! {
                news = children.next(args.rail.deadline + patience) => news,
                Some(report) = reports.recv() => {
                    self.hear(report, &mut failures);
                    continue;
                }
            };
            match news {
                Ok(None) => break,
                Ok(Some((number, news))) => self.note(number, news, &mut failures),
                Err(waited) => {
                    let running: Vec<String> = children
                        .running()
                        .filter_map(|number| self.facts.ranks.get(number))
                        .map(|rank| rank.rank.clone())
                        .collect();
                    failures.push(Ending::Failed(format!(
                        "nothing was heard from {} for {waited:?}",
                        running.join(", ")
                    )));
                    children.kill();
                    break;
                }
            }
        }
        while let Ok(report) = reports.try_recv() {
            self.hear(report, &mut failures);
        }
        self.bar.finish_and_clear();
        match failures.iter().find(|ending| matches!(ending, Ending::Differs(_))).or(failures.first()) {
            None => Ok(()),
            Some(worst) => {
                for (number, words) in &self.last_words {
                    if let Some(RankFacts { rank, .. }) = self.facts.ranks.get(*number) {
                        // Most name their rank already.
                        let words = words.strip_prefix(&format!("{rank}: ")).unwrap_or(words);
                        eprintln!("{rank}: {words}");
                    }
                }
                Err(match worst {
                    Ending::Differs(reason) => BytesDiffer(reason.clone()).into(),
                    Ending::Failed(reason) => anyhow::Error::msg(reason.clone()),
                })
            }
        }
    }

    /// The launcher and the arguments of a rank.
    fn child_command<'a>(
        &self,
        number: usize,
        args: &'a DemoArgs,
        checkpoint: &Path,
        address: &str,
    ) -> (&'a str, Vec<OsString>) {
        let trainers = self.world.trainers as usize;
        let (launcher, command, rank, ranks) = if number < trainers {
            (&args.launch.launch_trainers, "push", number, trainers)
        } else {
            let ranks = self.world.inference as usize;
            (&args.launch.launch_inference, "serve", number - trainers, ranks)
        };
        let mut line: Vec<OsString> = [
            command,
            "--controller",
            address,
            "--rank",
            &rank.to_string(),
            "--trainers",
            &self.world.trainers.to_string(),
            "--inference",
            &self.world.inference.to_string(),
            "--fabric",
            &args.rail.fabric.to_string(),
            "--deadline",
            &args.rail.deadline.as_secs_f64().to_string(),
        ]
        .map(OsString::from)
        .into();
        if let Some(facts) = self.facts.ranks.get(number) {
            line.extend(["--device".into(), facts.device.clone().into()]);
        }
        if let Some(gbps) = args.rail.nic_gbps {
            line.extend(["--nic-gbps".into(), gbps.to_string().into()]);
        }
        line.extend(["--checkpoint".into(), checkpoint.into()]);
        let nics = share(&args.rail.nic, rank, ranks);
        if !nics.is_empty() {
            line.extend(["--nic".into(), nics.join(",").into()]);
        }
        // Sides with the same launcher run on the same host and share its NICs.
        let (local_rank, local_ranks) = match args.launch.launch_trainers == args.launch.launch_inference {
            true => (number, trainers + self.world.inference as usize),
            false => (rank, ranks),
        };
        line.extend(["--local-rank".into(), format!("{local_rank}/{local_ranks}").into()]);
        match command {
            "push" => {
                let watermark = args.staging.watermark.to_string();
                let staging = ["--steps".into(), args.steps.to_string(), "--watermark".into(), watermark];
                line.extend(staging.map(OsString::from));
                line.extend(args.staging.offload.then(|| "--offload".into()));
            }
            _ => {
                let (commit, replicas) = (args.held.commit.to_string(), args.held.replicas.to_string());
                let held = ["--verify", "--commit", &commit, "--replicas", &replicas];
                line.extend(held.map(OsString::from));
                line.extend(args.held.fp8.then(|| "--fp8".into()));
            }
        }
        (launcher, line)
    }

    fn hear(&mut self, report: Report, failures: &mut Vec<Ending>) {
        match report {
            Report::Planned { digest, bytes, writes, bound_seconds, limited_by, .. } => {
                let limited_by = limited_by.map(|rank| rank.to_string());
                self.facts.plan =
                    Some(Plan { digest: digest.to_string(), bytes, writes, bound_seconds, limited_by });
            }
            Report::Pushing { version, .. } => self.bar.set_message(format!("version {version}: pushing")),
            Report::Committed { version, .. } => {
                self.bar.set_message(format!("version {version}: verifying"))
            }
            // The controller knows the cause; the ranks' own words come after it.
            Report::Ended { reason: Some(reason) } => failures.insert(0, Ending::Failed(reason)),
            _ => {}
        }
    }

    fn note(&mut self, number: usize, news: News, failures: &mut Vec<Ending>) {
        let Some(facts) = self.facts.ranks.get_mut(number) else { return };
        match news {
            News::Said(Event::Loaded { weight_bytes, .. }) => facts.weight_bytes = weight_bytes,
            News::Said(Event::Connected { routes, .. }) => facts.routes = routes,
            News::Said(Event::Ended { peak_rss_bytes }) => facts.peak_rss_bytes = peak_rss_bytes,
            News::Said(Event::Pushed(report)) => {
                self.trace.add(number, &facts.rank, report.version, &report.stages);
                let rank = facts.rank.clone();
                for loss in self.facts.pushed(number, &report) {
                    self.bar
                        .suspend(|| tracing::warn!(rank, version = report.version, %loss, "gave up a rail"));
                }
            }
            News::Said(Event::Served(report)) => {
                self.trace.add(number, &facts.rank, report.version, &report.stages);
                let rank = facts.rank.clone();
                for loss in self.facts.served(number, &report) {
                    self.bar
                        .suspend(|| tracing::warn!(rank, version = report.version, %loss, "gave up a rail"));
                }
            }
            News::Said(Event::Verified { version, bytes, .. }) => {
                self.bar.inc(1);
                if self.facts.verified(version, bytes) && !std::io::stderr().is_terminal() {
                    let ranks = self.world.inference;
                    eprintln!("version {version}: every byte verified on {ranks} inference ranks");
                }
            }
            News::Complained(line) => {
                if logs::is_asked_for() {
                    let line = format!("{}: {line}", facts.rank);
                    self.bar.suspend(|| eprintln!("{line}"));
                }
                let line = line.strip_prefix("weightsync: ").unwrap_or(&line).to_owned();
                self.last_words.insert(number, line);
            }
            News::Exited(Ok(status)) if status.success() => {}
            News::Exited(status) => {
                let differs =
                    matches!(&status, Ok(status) if status.code() == Some(i32::from(EXIT_BYTES_DIFFER)));
                let ended = match status {
                    Ok(status) => status.to_string(),
                    Err(error) => error.to_string(),
                };
                let words = self.last_words.get(&number).cloned();
                let reason = words.unwrap_or_else(|| format!("{} ended without a word: {ended}", facts.rank));
                failures.push(if differs { Ending::Differs(reason) } else { Ending::Failed(reason) });
            }
        }
    }
}

/// How a rank, or the job, failed.
enum Ending {
    Failed(String),
    Differs(String),
}

/// The NICs of one of `ranks` ranks: as many as every other one has, neighbours; where there are fewer than ranks, one that
/// it shares.
fn share(nics: &[String], rank: usize, ranks: usize) -> &[String] {
    let each = (nics.len() / ranks.max(1)).max(1);
    let first = (rank * each).checked_rem(nics.len()).unwrap_or(0);
    nics.get(first..first + each).unwrap_or_default()
}
