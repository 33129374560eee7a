//! From wherever an inference rank is to where versions reach it: reach the controller, expose the arena, join. The same at
//! the start, after a loss and after a controller that came back.
//!
//! Every step leaves its result with the session, so a call that is dropped in the middle is taken up by the next.

use std::net::IpAddr;

use efa_core::{LeaseMut, RegionError};
use rendezvous::member::InferenceStep;
use rendezvous::{Holds, Join, MemberManifest, Planned, PlannedPart, RendezvousError};
use xfer_exec::arrivals::Arrivals;
use xfer_exec::cuda;
use xfer_exec::local::{Doorman, LocalError};
use xfer_exec::ofi::OfiTarget;
use xfer_plan::{RailDecl, Rank, ReceiverManifest, ReceiverRank};

use super::InferenceSession;
use super::session::LOST;
use crate::arena::Ways;
use crate::connect::{PassingOn, decode_peers};
use crate::endpoint::{Endpoint, LocalEndpoint, LocalMemory, RailEndpoint};
use crate::error::Error;
use crate::fabric::{self, FabricError, OpenRail};
use crate::line::out_of_turn;
use crate::memory::Exposed as Arena;
use crate::verify::Incoming;

/// Bytes that anybody may overwrite, for warm-ups.
const SCRATCH_BYTES: usize = 4096;

/// The ways by which trainers reach the arena.
#[derive(Default)]
pub(super) struct Exposed {
    rails: usize,
    target: Option<OfiTarget>,
    _doorman: Option<Doorman>,
    /// What has arrived over all of them, until somebody passes it on.
    arrivals: Arrivals,
    /// What this rank has said of them, and by which address it reaches the controller.
    told: Option<(Endpoint, IpAddr)>,
}

impl InferenceSession {
    /// Gets to where versions reach this rank.
    pub(super) async fn ready(&mut self) -> Result<(), Error> {
        loop {
            match self.step("every rank to join").await? {
                None => {}
                Some(InferenceStep::Started) => return Ok(()),
                Some(_) => return Err(out_of_turn("the start")),
            }
        }
    }

    /// What the controller has this rank do next, but joining, which is done here. `stage` is what it waits for, for errors.
    pub(super) async fn step(&mut self, stage: &'static str) -> Result<Option<InferenceStep>, Error> {
        if !self.line.is_open() || self.member.is_out() {
            self.join().await?;
        }
        if self.connected_onward().await? {
            return Ok(None);
        }
        let Some(message) = self.receive(stage).await? else {
            // Where the commit was decided, every byte has arrived.
            self.close_rails().await?;
            return Ok(None);
        };
        match self.member.handle(message).map_err(RendezvousError::from)? {
            None => Ok(None),
            Some(InferenceStep::Refused { reason }) => Err(RendezvousError::Refused { reason }.into()),
            Some(InferenceStep::Regroup { reason }) => {
                tracing::info!(rank = %self.rank(), reason, "joining again");
                self.close_rails().await?;
                Ok(None)
            }
            Some(InferenceStep::Planned(planned)) => {
                self.take_part(*planned).await?;
                Ok(None)
            }
            Some(step) => {
                if let InferenceStep::Started = step {
                    self.watch.connected(std::iter::empty());
                }
                Ok(Some(step))
            }
        }
    }

    pub(super) fn rank(&self) -> Rank {
        Rank::Receiver(ReceiverRank(self.config.rank))
    }

    async fn join(&mut self) -> Result<(), Error> {
        self.close_rails().await?;
        self.failed_onward = 0;
        if self.arenas.is_soiled() && !self.member.is_undecided() && self.renewing.is_none() {
            let arenas = self.arenas.clone();
            self.renewing = Some(tokio::task::spawn_blocking(move || arenas.renew()));
        }
        if let Some(renewing) = &mut self.renewing {
            let renewed = renewing.await;
            self.renewing = None;
            self.arenas = renewed.map_err(|error| std::io::Error::other(error.to_string()))??;
        }
        let local = self.line.open().await?;
        let opened = fabric::open(&self.config, self.config.bind.unwrap_or(local))?;
        let declared = fabric::declare(&self.config, &opened, self.arenas.gpu());
        let endpoint = self.expose(opened)?;
        self.exposed.told = Some((endpoint.clone(), self.config.bind.unwrap_or(local)));
        let join = self.describe(declared, &endpoint)?;
        self.was_undecided = self.member.is_undecided();
        let joins = self.member.rejoin(join);
        self.line.send(joins)
    }

    /// Opens the ways to the arena.
    fn expose(&mut self, mut opened: Vec<OpenRail>) -> Result<Endpoint, Error> {
        let peer = self.rank().to_string();
        let local_error = |error: LocalError| FabricError::Local { peer, reason: error.to_string() };
        let (arenas, Ways { files, device }) = self.arenas.expose()?;
        let memory = if device.is_empty() { LocalMemory::Host } else { LocalMemory::Device };
        let (doorman, arrivals) = match (device.is_empty(), files.is_empty()) {
            (false, _) => Some(cuda::expose(device)?).unzip(),
            (true, false) => Some(Doorman::open(files).map_err(local_error)?).unzip(),
            (true, true) => (None, None),
        };
        let mut arrivals = arrivals.unwrap_or_default();
        let rails = opened.iter_mut().map(|opened| expose(opened, &arenas)).collect::<Result<_, _>>()?;
        let bytes = arenas.iter().map(Arena::len).collect();
        let endpoint = Endpoint {
            host: fabric::host_identity(),
            rails,
            local: doorman.as_ref().map(|doorman| LocalEndpoint::new(doorman.address(), memory, bytes)),
            stages: self.arenas.has_banks(),
        };
        let rails: Vec<_> = opened.into_iter().map(|opened| opened.rail).collect();
        let count = rails.len();
        self.has_rails = count > 0;
        let target = match rails.is_empty() {
            true => None,
            false => Some(OfiTarget::start(rails, self.config.cpus.clone())?),
        };
        if let Some(target) = &target {
            arrivals.hear(target.arrivals());
        }
        self.exposed = Exposed { rails: count, target, _doorman: doorman, arrivals, told: None };
        Ok(endpoint)
    }

    fn describe(&self, rails: Vec<RailDecl>, endpoint: &Endpoint) -> Result<Join, Error> {
        let config = &self.config;
        let manifest = ReceiverManifest {
            host: endpoint.host.clone(),
            regions: vec![self.arenas.served().len()],
            rails,
            params: self.params.clone(),
        };
        Ok(Join {
            job: config.job.clone(),
            member: self.rank(),
            world: config.world,
            deadline: config.deadline,
            manifest: MemberManifest::Inference(manifest),
            endpoint: endpoint.encode()?,
            holds: Holds::Nothing,
            stages: false,
            session: self.line.session(),
        })
    }

    /// Takes this rank's part of the plan.
    async fn take_part(&mut self, planned: Planned) -> Result<(), Error> {
        self.line.on_loss = planned.on_loss;
        self.learn().await?;
        if self.was_undecided && self.showing.is_none() && self.arenas.is_soiled() {
            // It did not know when it joined, and has told of an arena that has to be renewed before.
            self.line.hang_up();
            return Ok(());
        }
        self.busy_poll = fabric::cores_each(1, &fabric::host_identity(), &decode_peers(&planned.peers)?);
        let PlannedPart::Inference { part, relay, names, inbound } = planned.part else {
            return Err(out_of_turn("an inference rank's part of the plan"));
        };
        let sizes = (part.bytes, self.arenas.served().len());
        let incoming = Incoming::new(planned.verify, inbound, names.clone(), sizes, self.line.progress());
        self.incoming = match incoming {
            Ok(incoming) => incoming,
            Err(error) => {
                self.line.give_up(error.to_string()).await;
                return Err(error);
            }
        };
        self.bytes_per_push = part.bytes;
        if relay.plan.ops.is_empty() {
            return self.line.say(self.member.ready());
        }
        let (endpoint, bind) = self.exposed.told.clone().ok_or(Error::Broken)?;
        let passing = PassingOn {
            config: self.config.clone(),
            endpoint,
            bind,
            arenas: self.arenas.exposed(),
            arrivals: std::mem::take(&mut self.exposed.arrivals),
            verify: planned.verify,
            relay,
            names,
            peers: planned.peers,
            progress: self.line.progress(),
        };
        self.connect_onward(passing);
        Ok(())
    }

    /// How the push ended whose end this rank had not heard of when it lost the controller. What is to be shown is, before
    /// anything else that the controller says.
    async fn learn(&mut self) -> Result<(), Error> {
        if let Some(version) = self.member.take_missed_commit() {
            return self.show(version, false).await;
        }
        if let Some(push) = self.push.take() {
            let error = Error::Aborted { version: push.version, reason: LOST.to_owned() };
            self.hooks.aborted(push.version, LOST);
            self.watch.failed(&error);
            self.lost_sight_of = Some(error);
        }
        Ok(())
    }

    /// Once this returns, nobody can write to the arena any more but a process of this host that has it mapped.
    async fn close_rails(&mut self) -> Result<(), Error> {
        // What it compares is over.
        self.verifying = None;
        self.close_onward().await;
        let exposed = std::mem::take(&mut self.exposed);
        let closed = (0..exposed.rails).try_for_each(|rail| exposed.close_rail(rail));
        drop(exposed);
        if let Err(reason) = closed {
            self.line.give_up(reason.clone()).await;
            return Err(FabricError::Rail(reason).into());
        }
        Ok(())
    }
}

impl Exposed {
    /// Closes a rail over which bytes may still come that nobody waits for.
    pub(super) fn close_rail(&self, rail: usize) -> Result<(), String> {
        let Some(target) = &self.target else { return Ok(()) };
        target.close_rail(rail).map_err(|reason| format!("rail {rail} does not close: {reason}"))
    }

    /// Reads what has arrived over NICs so far: nothing of it is told later.
    pub(super) fn settle(&self) -> Result<(), String> {
        self.target.as_ref().map_or(Ok(()), OfiTarget::settle)
    }

    /// Has the rails' thread poll without sleeping, or not.
    pub(super) fn busy_poll(&self, on: bool) {
        if let Some(target) = &self.target {
            target.busy_poll(on);
        }
    }
}

/// Exposes arenas and a scratch page on the rail, and describes them.
fn expose(opened: &mut OpenRail, arenas: &[Arena]) -> Result<RailEndpoint, Error> {
    let rail_error = |error: RegionError| FabricError::Rail(error.to_string());
    let scratch = LeaseMut::zeroed(SCRATCH_BYTES)
        .map_err(|error| Error::Memory { what: "the scratch page", reason: error.to_string() })?
        .expose();
    let (_, scratch) = opened.rail.expose(&scratch).map_err(rail_error)?;
    // A rank that needs nothing has nothing to expose.
    let arenas = arenas.iter().filter(|arena| arena.len() > 0);
    let regions = arenas.map(|arena| {
        // Where this cannot be done, better now than after a commit.
        arena.flush()?;
        arena.expose(&mut opened.rail)
    });
    let regions = regions.collect::<Result<_, Error>>()?;
    Ok(RailEndpoint {
        provider: opened.provider.to_string(),
        address: opened.rail.address().clone(),
        regions,
        scratch: Some(scratch),
    })
}
