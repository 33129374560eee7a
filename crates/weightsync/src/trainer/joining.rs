//! From wherever a trainer is to where it can begin a version: reach the controller, open rails, join, connect. The same at
//! the start, after a loss and after a controller that came back.
//!
//! Every step leaves its result with the session, so a call that is dropped in the middle is taken up by the next.

use rendezvous::member::TrainerStep;
use rendezvous::{Holds, Join, MemberManifest, OnLoss, Planned};
use tokio::task::JoinHandle;
use xfer_plan::{Rank, TrainerManifest, TrainerRank};

use super::TrainerSession;
use crate::connect::{Connected, ConnectedRail, Connecting};
use crate::endpoint::{Endpoint, RailEndpoint};
use crate::error::Error;
use crate::fabric::{self, OpenRail};
use crate::line::out_of_turn;

/// How far the rails of a trainer are.
pub(super) enum Rails {
    Closed,
    /// And told to the controller.
    Open(Vec<OpenRail>, Endpoint),
    Connecting(JoinHandle<Result<Connected, Error>>),
    Connected(Connected),
}

impl Rails {
    pub(super) fn connected(&self) -> &[ConnectedRail] {
        if let Self::Connected(connected) = self { &connected.rails } else { &[] }
    }
}

impl TrainerSession {
    /// Gets to where [`TrainerSession::push`] may begin a version.
    pub(super) async fn ready(&mut self) -> Result<(), Error> {
        let rank = Rank::Trainer(TrainerRank(self.config.rank));
        self.line.give_up_dead_rails((&self.config, rank), self.failed_here).await?;
        while !self.line.is_open() || !self.member.is_idle() {
            if !self.line.is_open() || self.member.is_out() {
                self.join().await?;
            }
            if let Rails::Connecting(connecting) = &mut self.rails {
                let connected = connecting.await;
                self.rails = Rails::Closed;
                match connected.map_err(|error| std::io::Error::other(error.to_string()))? {
                    Ok(connected) => {
                        self.rails = Rails::Connected(connected);
                        self.line.say(self.member.ready())?;
                    }
                    Err(error) => self.not_connected(error).await?,
                }
                continue;
            }
            let stage = match self.rails {
                Rails::Connected(_) => "every rank to connect",
                _ => "every rank to join",
            };
            match self.next(stage).await? {
                None => {}
                Some(TrainerStep::Connect(planned)) => self.connect(*planned)?,
                Some(TrainerStep::Started) => {
                    self.watch.connected(self.rails.connected().iter().map(|rail| rail.name.as_str()));
                }
                Some(TrainerStep::Aborted { reason, .. }) => return Err(Error::Incomplete { reason }),
                Some(_) => return Err(out_of_turn("the job")),
            }
        }
        Ok(())
    }

    async fn join(&mut self) -> Result<(), Error> {
        self.close_rails().await;
        self.failed_here = 0;
        let local = self.line.open().await?;
        let config = &self.config;
        let rank = TrainerRank(config.rank);
        let opened = fabric::open(config, config.bind.unwrap_or(local))?;
        let manifest = TrainerManifest {
            host: fabric::host_identity(),
            regions: self.region_bytes.clone(),
            rails: fabric::declare(config, &opened, self.gpu.as_deref()),
            pieces: self.pieces.clone(),
        };
        let endpoint = Endpoint {
            host: manifest.host.clone(),
            rails: opened.iter().map(RailEndpoint::of_trainer).collect(),
            local: None,
            stages: false,
        };
        let joins = self.member.rejoin(Join {
            job: config.job.clone(),
            member: Rank::Trainer(rank),
            world: config.world,
            deadline: config.deadline,
            manifest: MemberManifest::Trainer(manifest),
            endpoint: endpoint.encode()?,
            holds: Holds::Nothing,
            stages: false,
            session: self.line.session(),
        });
        self.rails = Rails::Open(opened, endpoint);
        self.line.send(joins)
    }

    /// Begins to connect, as the plan says.
    fn connect(&mut self, planned: Planned) -> Result<(), Error> {
        let Rails::Open(opened, endpoint) = std::mem::replace(&mut self.rails, Rails::Closed) else {
            return Err(out_of_turn("the start"));
        };
        self.line.on_loss = planned.on_loss;
        self.bound_seconds = planned.bound_seconds;
        self.committed = planned.committed.map_or(0, |commit| commit.version);
        self.behind = planned.behind.iter().copied().map(Rank::Receiver).collect();
        // What this rank waited for when it lost the controller is decided.
        let missed = self.member.take_missed_commit();
        self.decided = self.undecided.take().filter(|report| Some(report.version) == missed);
        let (config, rank) = (self.config.clone(), TrainerRank(self.config.rank));
        let (memories, region_bytes) = (self.memories.clone(), self.region_bytes.clone());
        let (gpu, device_memories) = (self.gpu.clone(), self.device_memories.clone());
        let (offloaded, progress) = (self.offloaded, self.line.progress());
        let connecting = Connecting {
            config,
            endpoint,
            opened,
            memories,
            gpu,
            device_memories,
            offloaded,
            region_bytes,
            progress,
        };
        self.rails =
            Rails::Connecting(tokio::task::spawn_blocking(move || connecting.connect(rank, planned)));
        Ok(())
    }

    /// A peer that is lost cannot be connected to. Where the job goes on, the controller finds that too and says so.
    async fn not_connected(&mut self, error: Error) -> Result<(), Error> {
        if self.line.on_loss != OnLoss::Fail {
            tracing::warn!(rank = %Rank::Trainer(TrainerRank(self.config.rank)), %error, "not connected");
            let deadline = self.config.deadline / 2;
            if let Ok(next) = tokio::time::timeout(deadline, self.next("its own rails")).await {
                return match next? {
                    None => Ok(()),
                    Some(_) => Err(out_of_turn("its own rails")),
                };
            }
        }
        self.line.give_up(error.to_string()).await;
        Err(error)
    }

    /// Returns when nothing of this rank is on its way any more.
    pub(super) async fn close_rails(&mut self) {
        let pusher = match std::mem::replace(&mut self.rails, Rails::Closed) {
            Rails::Closed | Rails::Open(..) => return,
            Rails::Connecting(connecting) => match connecting.await {
                Ok(Ok(connected)) => connected.pusher,
                _ => return,
            },
            Rails::Connected(connected) => connected.pusher,
        };
        let _ = tokio::task::spawn_blocking(move || pusher.close()).await;
    }
}
