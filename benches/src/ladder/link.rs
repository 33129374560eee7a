//! The ladder's two processes in the lab: one that receives for every GPU, and one that sends for every GPU.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use efa_core::{
    Hints, LeaseMut, Library, MemoryRef, Provider, Rail, RailAddress, RailConfig, RemoteRegion, Target,
};
use serde::{Deserialize, Serialize};
use weightsync_lab::Lab;
use xfer_exec::driver::HostRail;
use xfer_exec::ofi::{OfiPeer, OfiRail, OfiTarget};
use xfer_plan::ReceiverRank;

use super::gpu::{Gpu, on, push};
use super::handicap::Shared;
use super::{CHUNK_BYTES, RUNGS, Rung};
use crate::roles::{Transfer, peak_rss_bytes};

const DEADLINE: Duration = Duration::from_secs(30);

/// One receiver's NIC.
#[derive(Serialize, Deserialize)]
struct Nic {
    address: RailAddress,
    region: RemoteRegion,
    scratch: RemoteRegion,
}

/// What the sending process is told: by receiver, then by NIC.
type Receivers = Vec<Vec<Nic>>;

/// The `count` links of one GPU, of all `gpus` that share `links`.
fn links_of(gpu: u16, gpus: u16, links: u16) -> std::ops::Range<u16> {
    let each = links / gpus.max(1);
    gpu * each..(gpu + 1) * each
}

fn open(library: &Library, link: u16) -> anyhow::Result<Rail> {
    let device = Lab::device(link);
    let infos = library.infos(&Hints::new(Provider::Tcp).domain(device.clone()))?;
    let info = infos.first().with_context(|| format!("libfabric has nothing on {device}"))?;
    Ok(Rail::open(info, &RailConfig::for_info(info))?)
}

/// Receives until its standard input ends. Its first line says where.
pub(crate) fn target(gpus: u16, links: u16, bytes: usize) -> anyhow::Result<()> {
    let library = Library::open()?;
    let (mut receivers, mut targets): (Receivers, Vec<(OfiTarget, Target)>) = Default::default();
    for gpu in 0..gpus {
        let arena = LeaseMut::committed(bytes)?.expose();
        let scratch = LeaseMut::zeroed(64)?.expose();
        let (mut nics, mut rails) = (Vec::new(), Vec::new());
        for link in links_of(gpu, gpus, links) {
            let mut rail = open(&library, link)?;
            let (_, region) = rail.expose(&arena)?;
            let (_, scratch) = rail.expose(&scratch)?;
            nics.push(Nic { address: rail.address().clone(), region, scratch });
            rails.push(rail);
        }
        receivers.push(nics);
        targets.push((OfiTarget::start(rails, Vec::new())?, arena));
    }
    println!("{}", serde_json::to_string(&receivers)?);
    std::io::stdin().lock().lines().try_for_each(|line| line.map(drop))?;
    Ok(())
}

/// Pushes once for each line of its standard input after the first, which says where to.
pub(crate) fn sender(rung: usize, links: u16, bytes: usize) -> anyhow::Result<()> {
    let rung = RUNGS.get(rung).context("there is no such rung")?;
    let mut lines = std::io::stdin().lock().lines();
    let receivers: Receivers = serde_json::from_str(&lines.next().context("nobody receives")??)?;
    let library = Library::open()?;
    let shared = Arc::new(Shared::default());
    let count = receivers.len() as u16;
    let gpu = |gpu: u16| {
        let weights = LeaseMut::committed(bytes)?.freeze();
        let rail = |(at, link)| rail(&library, link, at, rung, &receivers, weights.memory(), &shared);
        let rails = links_of(gpu, count, links).enumerate().map(rail).collect::<anyhow::Result<_>>()?;
        Gpu::new(weights, CHUNK_BYTES, 1, u32::from(count), rails)
    };
    let mut gpus = (0..count).map(gpu).collect::<anyhow::Result<Vec<_>>>()?;
    for line in lines {
        line?;
        let (writes, seconds) = push(&mut gpus, rung)?;
        let bytes = writes * u64::from(CHUNK_BYTES);
        println!(
            "{}",
            serde_json::to_string(&Transfer { bytes, seconds, peak_rss_bytes: peak_rss_bytes() })?
        );
    }
    Ok(())
}

/// The rail of one link, to the NIC at the same place of every receiver.
fn rail(
    library: &Library,
    link: u16,
    at: usize,
    rung: &Rung,
    receivers: &Receivers,
    memory: &MemoryRef,
    shared: &Arc<Shared>,
) -> anyhow::Result<HostRail> {
    let peer = |(to, nics): (u32, &Vec<Nic>)| {
        let Nic { address, region, scratch } = nics.get(at)?;
        Some((
            ReceiverRank(to),
            OfiPeer { address: address.clone(), regions: vec![*region], scratch: *scratch },
        ))
    };
    let peers: BTreeMap<_, _> = (0..).zip(receivers).filter_map(peer).collect();
    let (rail, memories) = (open(library, link)?, [memory.clone()]);
    let connected = match rung.warm {
        true => OfiRail::connect(rail, &memories, peers, DEADLINE)?,
        false => OfiRail::connect_cold(rail, &memories, peers)?,
    };
    Ok(on(rung, Box::new(connected), shared))
}
