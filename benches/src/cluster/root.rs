//! Rank 0's other half: gathers the ranks, runs one job after another with a controller of its own each, and collects what
//! they report. It must never wait for a rank that is lost, and never say "somebody": every failure names its rank.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use weightsync::{Controller, Rank, Secret, ServerConfig, ServerHandle};
use xfer_plan::PlanOptions;

use super::facts::RankFacts;
use super::job::{FromRank, Job, Payload, Pushed, RailOptions, ToRank};
use super::link::{self, Key, Link, Who};

/// Connections that have not introduced themselves; others wait in the backlog.
const UNPROVED_MAX: usize = 128;

/// After the first failure the others get so long to say theirs, which may be the cause.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Ranks that a message names.
const NAMED_MAX: usize = 8;

/// What comes from the ranks.
pub(crate) enum News {
    Said(FromRank),
    /// Its connection is gone, or its process has ended.
    Lost(String),
}

/// What is heard, by rank.
pub(crate) type Heard = (u32, News);

/// What the root is told about the job.
pub(crate) struct RootConfig {
    pub(crate) size: u32,
    pub(crate) secret: String,
    pub(crate) deadline: Duration,
    /// The host of each rank where it is known before the rank says so.
    pub(crate) hosts: Vec<String>,
}

/// See the module.
pub(crate) struct Root {
    config: RootConfig,
    local: SocketAddr,
    ranks: BTreeMap<u32, Joined>,
    news: mpsc::Receiver<Heard>,
}

struct Joined {
    link: Link<ToRank>,
    facts: RankFacts,
    /// The address of ours that it reaches.
    reached: IpAddr,
}

/// A rank's part in a job.
pub(crate) type Part = (u32, Rank);

/// A job, as it is asked for.
pub(crate) struct Request<'a> {
    pub(crate) payload: Payload,
    pub(crate) rounds: u32,
    /// The longest WRITE.
    pub(crate) chunk_bytes: u64,
    /// Who takes part, trainers first.
    pub(crate) parts: &'a [Part],
    pub(crate) rails: &'a RailOptions,
}

impl Root {
    /// Waits for every rank and its facts. `tell` is another end of `news`, for the links.
    pub(crate) async fn gather(
        listener: TcpListener,
        config: RootConfig,
        tell: mpsc::Sender<Heard>,
        news: mpsc::Receiver<Heard>,
    ) -> anyhow::Result<Self> {
        let local = listener.local_addr()?;
        let mut root = Self { config, local, ranks: BTreeMap::new(), news };
        let gathered = tokio::time::timeout(root.config.deadline, root.gather_all(listener, tell)).await;
        let missing: Vec<u32> = (0..root.config.size).filter(|rank| !root.ranks.contains_key(rank)).collect();
        let error = match gathered {
            Ok(Ok(())) => return Ok(root),
            Ok(Err(error)) => error,
            Err(_) => anyhow::anyhow!(
                "{} never came to port {} within {:?}; the other {} did",
                root.names(&missing),
                local.port(),
                root.config.deadline,
                root.ranks.len(),
            ),
        };
        root.end(true).await;
        Err(error)
    }

    async fn gather_all(&mut self, listener: TcpListener, tell: mpsc::Sender<Heard>) -> anyhow::Result<()> {
        let key = Key::new(&self.config.secret);
        let mut unproved = JoinSet::new();
        let mut links: BTreeMap<u32, (Link<ToRank>, IpAddr)> = BTreeMap::new();
        while self.ranks.len() < self.config.size as usize {
            tokio::select! {
                accepted = listener.accept(), if unproved.len() < UNPROVED_MAX => {
                    let (mut stream, peer) = accepted.context("cannot accept connections")?;
                    let key = key.clone();
                    unproved.spawn(async move { (link::accept(&mut stream, &key).await, stream, peer) });
                }
                Some(proved) = unproved.join_next(), if !unproved.is_empty() => {
                    let (who, stream, peer) = proved?;
                    match who {
                        Ok(who) => {
                            self.check(who, peer, links.contains_key(&who.rank))?;
                            let reached = stream.local_addr()?.ip();
                            links.insert(who.rank, (self.link(who.rank, stream, &tell)?, reached));
                        }
                        // A stranger's connection; our ranks report their own failure.
                        Err(error) => eprintln!("{peer} was turned away: {error:#}"),
                    }
                }
                Some((rank, news)) = self.news.recv() => match (news, links.remove(&rank)) {
                    (News::Said(FromRank::Facts(facts)), Some((link, reached))) => {
                        self.ranks.insert(rank, Joined { link, facts: *facts, reached });
                    }
                    (News::Said(_), _) => bail!("{} spoke out of turn", self.name(rank)),
                    (News::Lost(reason), _) => bail!("{}: {reason}", self.name(rank)),
                },
            }
        }
        Ok(())
    }

    fn check(&self, who: Who, peer: SocketAddr, waiting: bool) -> anyhow::Result<()> {
        let Who { rank, size } = who;
        if size != self.config.size || rank >= size {
            bail!(
                "{peer} says that it is rank {rank} of {size}, but rank 0 was told of {} ranks",
                self.config.size
            );
        }
        if waiting || self.ranks.contains_key(&rank) {
            bail!("two processes say that they are rank {rank}; the second one is at {peer}");
        }
        Ok(())
    }

    fn link(&self, rank: u32, stream: TcpStream, tell: &mpsc::Sender<Heard>) -> anyhow::Result<Link<ToRank>> {
        let (link, mut incoming) = Link::start::<FromRank>(stream, self.config.deadline)?;
        let tell = tell.clone();
        tokio::spawn(async move {
            while let Some(message) = incoming.recv().await {
                let news = message.map_or_else(News::Lost, News::Said);
                if tell.send((rank, news)).await.is_err() {
                    return;
                }
            }
        });
        Ok(link)
    }

    /// Facts of every rank, by rank.
    pub(crate) fn facts(&self) -> impl Iterator<Item = &RankFacts> {
        self.ranks.values().map(|joined| &joined.facts)
    }

    /// Facts of one rank.
    pub(crate) fn facts_of(&self, rank: u32) -> Option<&RankFacts> {
        self.ranks.get(&rank).map(|joined| &joined.facts)
    }

    /// Runs one job to its end: what each trainer reports, by rank.
    pub(crate) async fn run(&mut self, request: Request<'_>) -> anyhow::Result<BTreeMap<u32, Pushed>> {
        let controller = self.controller(&request).await?;
        let (trainers, receivers) = sides(request.parts);
        for &(rank, member) in request.parts {
            let job = Job {
                payload: request.payload.clone(),
                rounds: request.rounds,
                controller_port: controller.local_addr().port(),
                trainers,
                receivers,
                member,
                local_rank: self.place_on_host(rank).0,
                ranks_on_host: self.place_on_host(rank).1,
                bind: self.bind_of(rank),
                rails: request.rails.clone(),
            };
            let joined = self.ranks.get(&rank).context("a part of a rank that has not joined")?;
            joined.link.send(&ToRank::Run(Box::new(job))).await.with_context(|| self.name(rank))?;
        }
        let mut reports = BTreeMap::new();
        while reports.len() < request.parts.len() {
            // Never silent for long: every link ends after a deadline without a sign of life.
            let (rank, news) = self.news.recv().await.context("no rank is left")?;
            match news {
                News::Said(FromRank::Done(pushed)) => drop(reports.insert(rank, pushed)),
                News::Said(FromRank::Failed(_)) | News::Lost(_) => {
                    return Err(self.failure(rank, news).await);
                }
                News::Said(FromRank::Facts(_)) => bail!("{} spoke out of turn", self.name(rank)),
            }
        }
        let trainers = request.parts.iter().filter(|(_, member)| matches!(member, Rank::Trainer(_)));
        Ok(trainers.filter_map(|(rank, _)| Some((*rank, reports.remove(rank)?))).collect())
    }

    /// One failure and what others say meanwhile: first who was lost, which is often why the others failed.
    async fn failure(&mut self, rank: u32, first: News) -> anyhow::Error {
        let until = tokio::time::Instant::now() + LAST_WORDS;
        let (mut lost, mut failed) = (Vec::new(), Vec::new());
        let mut next = Some((rank, first));
        while let Some((rank, news)) = next {
            match news {
                News::Lost(reason) => lost.push(format!("{}: {reason}", self.name(rank))),
                News::Said(FromRank::Failed(reason)) => failed.push(format!("{}: {reason}", self.name(rank))),
                News::Said(_) => {}
            }
            next = tokio::time::timeout_at(until, self.news.recv()).await.ok().flatten();
        }
        lost.append(&mut failed);
        lost.truncate(NAMED_MAX);
        anyhow::anyhow!(lost.join("\n"))
    }

    async fn controller(&self, request: &Request<'_>) -> anyhow::Result<ServerHandle> {
        let (trainers, inference) = sides(request.parts);
        let mut server = ServerConfig {
            listen: SocketAddr::new(self.local.ip(), 0).to_string(),
            secret: Secret::new(&self.config.secret),
            // The launch asked for a secret or for none; a root without one has been allowed to.
            insecure: true,
            ..ServerConfig::loopback(weightsync::World { trainers, inference })?
        };
        server.controller.deadline = request.rails.deadline;
        server.controller.options =
            PlanOptions { chunk_bytes_max: request.chunk_bytes, ..PlanOptions::default() };
        Ok(Controller::bind(server).await?.spawn(|_| {}))
    }

    /// What a rank that reaches this process over loopback must bind to so that ranks of other hosts reach it: the address
    /// at which they reach this process. `None` where loopback is all there is, or not in the way.
    fn bind_of(&self, rank: u32) -> Option<IpAddr> {
        self.ranks.get(&rank).filter(|joined| joined.reached.is_loopback())?;
        self.ranks.values().map(|joined| joined.reached).find(|address| !address.is_loopback())
    }

    /// A rank's number on its host, as its launcher says or in the order of ranks, and how many ranks are there.
    fn place_on_host(&self, rank: u32) -> (u32, u32) {
        let Some(own) = self.facts_of(rank) else { return (0, 1) };
        let here = |other: &&u32| self.facts_of(**other).is_some_and(|facts| facts.host == own.host);
        let before = self.ranks.keys().take_while(|other| **other < rank).filter(here).count() as u32;
        let all = self.ranks.keys().filter(here).count() as u32;
        (own.local_rank.unwrap_or(before), all)
    }

    /// Ends every rank.
    pub(crate) async fn end(self, given_up: bool) {
        let mut closing = JoinSet::new();
        for joined in self.ranks.into_values() {
            closing.spawn(async move {
                // One that is lost cannot be told.
                let _ = joined.link.send(&ToRank::End { given_up }).await;
                joined.link.close().await;
            });
        }
        closing.join_all().await;
    }

    /// `rank 3 (p5-2)`.
    pub(crate) fn name(&self, rank: u32) -> String {
        let joined = self.ranks.get(&rank).map(|joined| &joined.facts.host);
        match joined.or(self.config.hosts.get(rank as usize)) {
            Some(host) => format!("rank {rank} ({host})"),
            None => format!("rank {rank}"),
        }
    }

    fn names(&self, ranks: &[u32]) -> String {
        let named: Vec<String> = ranks.iter().take(NAMED_MAX).map(|&rank| self.name(rank)).collect();
        let more = ranks.len().saturating_sub(NAMED_MAX);
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        named.join(", ") + &more
    }
}

fn sides(parts: &[Part]) -> (u32, u32) {
    let trainers = parts.iter().filter(|(_, member)| matches!(member, Rank::Trainer(_))).count() as u32;
    (trainers, parts.len() as u32 - trainers)
}
