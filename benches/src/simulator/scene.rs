//! What is compared: links, ranks and bytes. Starts nothing and simulates nothing.

use weightsync_lab::{Lab, LabOptions};

use crate::lab::Job;

/// Mebibytes of a push for each link: 2.8 s at 100 Mb/s.
const MIB_PER_LINK: u64 = 32;

/// A configuration.
#[derive(Debug, Clone)]
pub(super) struct Scene {
    pub(super) name: String,
    pub(super) links: LabOptions,
    pub(super) job: Job,
}

/// All that are compared.
pub(super) fn all() -> Vec<Scene> {
    vec![
        Scene::new(1, 1024),
        Scene::new(4, 1024),
        Scene::new(8, 1024),
        Scene::new(32, 1024),
        Scene::new(8, 64),
        Scene::new(32, 64),
        Scene::new(8, 16),
        Scene::new(8, 4),
        Scene::new(8, 1024).slow(10),
        Scene::new(8, 1024).slow(25),
        Scene::new(32, 1024).slow(10),
        Scene::new(8, 1024).replicated(2),
        Scene::new(8, 1024).ranks(2, 2, true),
        Scene::new(32, 1024).ranks(2, 2, false),
        Scene::new(32, 1024).ranks(2, 2, false).slow(10),
        Scene::new(8, 1024).ranks(4, 1, true),
        Scene::new(8, 64).ranks(4, 1, true),
        Scene::new(8, 1024).moves(32),
        Scene::new(8, 1024).moves(32).slow(10),
        Scene::new(8, 1024).moves(20),
        Scene::new(8, 64).moves(32).slow(10),
        Scene::new(8, 1024).rate(500).moves(1024),
        Scene::new(32, 1024).rate(1000).moves(2048),
    ]
}

impl Scene {
    /// One trainer writes to one inference rank over so many links, in WRITEs of so many KiB.
    fn new(links: u16, kib: u64) -> Self {
        let options = LabOptions { links, ..LabOptions::default() };
        let job = Job {
            trainers: 1,
            inference: 1,
            links,
            shares_links: true,
            is_replicated: false,
            bytes: (MIB_PER_LINK << 20) * u64::from(links),
            chunk_bytes: kib << 10,
            rail_bytes_per_second: payload(options.rate_bits, options.mtu) as u64,
        };
        let plural = if links == 1 { "" } else { "s" };
        Self { name: format!("{links} link{plural}, {kib} KiB"), links: options, job }
    }

    /// Link 5 has another rate, in Mb/s.
    fn slow(mut self, rate: u64) -> Self {
        self.name += &format!(", link 5 at {rate} Mb/s");
        self.links.slow = vec![(5, rate * 1_000_000)];
        self
    }

    /// All links have another rate, in Mb/s.
    fn rate(mut self, rate: u64) -> Self {
        self.name += &format!(", all at {rate} Mb/s");
        self.links.rate_bits = rate * 1_000_000;
        self.job.rail_bytes_per_second = payload(self.links.rate_bits, self.links.mtu) as u64;
        self
    }

    /// So many ranks on each side, where each wants a part of what each has. They have all links of their side together, or
    /// a share each.
    fn ranks(mut self, trainers: u32, inference: u32, shares_links: bool) -> Self {
        let links = if shares_links { "all links shared" } else { "links of their own" };
        self.name += &format!(", {trainers} to {inference} ranks, {links}");
        Self { job: Job { trainers, inference, shares_links, ..self.job }, ..self }
    }

    /// So many inference ranks want the same bytes.
    fn replicated(mut self, inference: u32) -> Self {
        self.name += &format!(", 1 to {inference} ranks alike");
        Self { job: Job { inference, is_replicated: true, ..self.job }, ..self }
    }

    /// A push of so many MiB.
    fn moves(mut self, mib: u64) -> Self {
        self.name += &format!(", {mib} MiB");
        self.job.bytes = mib << 20;
        self
    }

    /// What the links alone need, in seconds: all bytes over all rates.
    pub(super) fn links_seconds(&self) -> f64 {
        let bits: u64 = (0..self.links.links).map(|link| self.links.rate_of(link)).sum();
        self.job.bytes as f64 / payload(bits, self.links.mtu)
    }
}

/// Payload of links that have so many bits a second in all, in bytes a second.
fn payload(rate_bits: u64, mtu: u32) -> f64 {
    rate_bits as f64 / 8.0 * Lab::payload_share(mtu)
}
