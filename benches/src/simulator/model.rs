//! A configuration as the simulator's input.
//!
//! The manifest is made of the tensors that the processes declare. It must never take a shortcut that they do not have.

use std::ops::Range;

use anyhow::Context as _;
use weightsync::{ParamMap, PlanOptions, TensorSpec};
use weightsync_lab::LabOptions;
use xfer_plan::{
    DestinationParam, Manifest, RailDecl, Rank, ReceiverManifest, ReceiverRank, RegionIndex, SourcePiece,
    TrainerManifest,
};
use xfer_sim::{JobConfig, JobReport, Preset, Slow, simulate};

use super::scene::Scene;

/// Versions that are simulated. The rails learn their rates in the first, as in the lab; the last counts.
const VERSIONS: u32 = 2;

impl Scene {
    /// Runs it in virtual time.
    pub(super) fn simulate(&self) -> anyhow::Result<JobReport> {
        let config = self.config()?;
        simulate(&config, &mut |_| {}).with_context(|| format!("{} cannot be simulated", self.name))
    }

    fn config(&self) -> anyhow::Result<JobConfig> {
        let Self { links: LabOptions { links, rate_bits, .. }, job, .. } = self;
        let mut cluster = Preset::Lab32x100M.cluster(job.trainers, job.inference);
        // Side A is a host, side B another.
        (cluster.hosts, cluster.host.gpus) = (2, job.trainers.max(job.inference));
        cluster.host.nics = (*links).into();
        cluster.nic.bytes_per_second = rate_bits / 8;
        let numbers = |rank| job.links_of(rank, cluster.host.gpus).map(u32::from).collect::<Vec<_>>();
        cluster.host.gpu_nics = Some((0..cluster.host.gpus).map(numbers).collect());
        let mut config = JobConfig::new(cluster, self.manifest()?);
        (config.versions, config.tolerance, config.bundle_bytes) = (VERSIONS, 0.0, 0);
        config.slow = self.slow_nics();
        Ok(config)
    }

    /// A slow link is slow where it ends: in the lab it is the NIC that is written to which decides over which link bytes go,
    /// whatever NIC they come from.
    fn slow_nics(&self) -> Vec<Slow> {
        let inference = self.job.inference;
        let ranks = (0..inference).map(|rank| (rank, self.job.links_of(rank, inference)));
        let slow = |(rank, links): (u32, Range<u16>)| {
            let here = self.links.slow.iter().filter(|(link, _)| links.contains(link));
            let slow = |&(link, rate): &(u16, u64)| Slow {
                rank: Rank::Receiver(ReceiverRank(rank)),
                factor: rate as f64 / self.links.rate_bits as f64,
                nic: Some((link - links.start).into()),
            };
            here.map(slow).collect::<Vec<_>>()
        };
        ranks.flat_map(slow).collect()
    }

    fn manifest(&self) -> anyhow::Result<Manifest> {
        let job = &self.job;
        let options = PlanOptions { chunk_bytes_max: job.chunk_bytes, ..PlanOptions::default() };
        let trainers = (0..job.trainers).map(|rank| self.trainer(rank)).collect::<anyhow::Result<_>>()?;
        let receivers = (0..job.inference).map(|rank| self.receiver(rank)).collect::<anyhow::Result<_>>()?;
        Ok(Manifest { trainers, receivers, options })
    }

    fn trainer(&self, rank: u32) -> anyhow::Result<TrainerManifest> {
        let (mut pieces, mut end) = (Vec::new(), 0);
        for spec in self.job.sources(rank)? {
            let (offset, bytes) = (end, spec.bytes()?);
            let TensorSpec { name: tensor, dtype, shape, bounds } = spec;
            pieces.push(SourcePiece { tensor, dtype, shape, bounds, region: RegionIndex(0), offset });
            end += bytes;
        }
        let rails = self.rails(rank, self.job.trainers);
        Ok(TrainerManifest { host: "side A".into(), regions: vec![end], rails, pieces })
    }

    fn receiver(&self, rank: u32) -> anyhow::Result<ReceiverManifest> {
        let (mut params, mut end) = (Vec::new(), 0);
        for spec in self.job.wanted(rank)? {
            let (offset, bytes) = (end, spec.bytes()?);
            let TensorSpec { name, dtype, shape, .. } = spec;
            let map = ParamMap::tensor(name.clone()).into();
            params.push(DestinationParam {
                name,
                dtype,
                shape,
                region: RegionIndex(0),
                offset,
                map,
                priority: 0,
            });
            end += bytes;
        }
        let rails = self.rails(rank, self.job.inference);
        Ok(ReceiverManifest { host: "side B".into(), regions: vec![end], rails, params })
    }

    fn rails(&self, rank: u32, ranks: u32) -> Vec<RailDecl> {
        let declared = RailDecl { bytes_per_second: self.job.rail_bytes_per_second };
        self.job.links_of(rank, ranks).map(|_| declared).collect()
    }
}
