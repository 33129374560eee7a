//! Whether a described cluster can be: nothing that divides is zero, everything has its place.

use super::{Cluster, ClusterError};

/// Hosts, and GPUs or NICs of one host: every link has a 32-bit number, and the idle network fits into memory.
const HOSTS_MAX: u64 = 1 << 14;
const PER_HOST_MAX: u64 = 1 << 8;

/// No wire is faster, in bytes a second: rates stay exact as 64-bit floating point, sums of thousands included.
const RATE_MAX: u64 = 1 << 50;

/// No delay is longer: an hour, in nanoseconds. Longer ones are slips of the unit.
const DELAY_MAX: u64 = 3_600_000_000_000;

/// Bytes of a packet, payload or header.
const PACKET_MAX: u64 = 1 << 24;

impl Cluster {
    /// Whether it can be simulated.
    ///
    /// # Errors
    ///
    /// The first field that is wrong, and what it must be.
    pub fn check(&self) -> Result<(), ClusterError> {
        let Cluster { hosts, trainers, receivers, host, nic, racks, control } = self;
        let gpu = &host.gpu;
        within("hosts", *hosts, 1, HOSTS_MAX)?;
        within("host.gpus", host.gpus, 1, PER_HOST_MAX)?;
        within("host.nics", host.nics, 1, PER_HOST_MAX)?;
        within("trainers", *trainers, 0, HOSTS_MAX * PER_HOST_MAX)?;
        within("receivers", *receivers, 0, HOSTS_MAX * PER_HOST_MAX)?;
        within("host.gpu.nvlink_bytes_per_second", gpu.nvlink_bytes_per_second, 1, RATE_MAX)?;
        within("host.gpu.copy_engine_bytes_per_second", gpu.copy_engine_bytes_per_second, 1, RATE_MAX)?;
        within("host.gpu.hbm_bytes_per_second", gpu.hbm_bytes_per_second, 1, RATE_MAX)?;
        within("host.gpu.launch_nanoseconds", gpu.launch_nanoseconds, 0, DELAY_MAX)?;
        within("nic.bytes_per_second", nic.bytes_per_second, 1, RATE_MAX)?;
        within("nic.post_nanoseconds", nic.post_nanoseconds, 0, DELAY_MAX)?;
        within("nic.message_nanoseconds", nic.message_nanoseconds, 0, DELAY_MAX)?;
        within("nic.queue_depth", nic.queue_depth, 1, u64::from(u32::MAX))?;
        within("nic.packet_payload_bytes", nic.packet_payload_bytes, 1, PACKET_MAX)?;
        within("nic.packet_header_bytes", nic.packet_header_bytes, 0, PACKET_MAX)?;
        within("nic.latency_nanoseconds", nic.latency_nanoseconds, 0, DELAY_MAX)?;
        within("nic.jitter_nanoseconds", nic.jitter_nanoseconds, 0, DELAY_MAX)?;
        within("nic.completion_nanoseconds", nic.completion_nanoseconds, 0, DELAY_MAX)?;
        within("control.latency_nanoseconds", control.latency_nanoseconds, 0, DELAY_MAX)?;
        within("control.bytes_per_second", control.bytes_per_second, 1, RATE_MAX)?;
        if let Some(racks) = racks {
            within("racks.hosts", racks.hosts, 1, HOSTS_MAX)?;
            within("racks.uplink_bytes_per_second", racks.uplink_bytes_per_second, 1, RATE_MAX)?;
        }
        self.check_gpu_nics()?;
        let needed = u64::from(trainers.div_ceil(host.gpus)) + u64::from(receivers.div_ceil(host.gpus));
        if needed > u64::from(*hosts) {
            let (hosts, trainers, receivers, gpus) = (*hosts, *trainers, *receivers, host.gpus);
            return Err(ClusterError::TooFewHosts { hosts, trainers, receivers, needed, gpus });
        }
        Ok(())
    }

    fn check_gpu_nics(&self) -> Result<(), ClusterError> {
        let Some(listed) = &self.host.gpu_nics else { return Ok(()) };
        let (gpus, nics) = (self.host.gpus, self.host.nics);
        if u32::try_from(listed.len()) != Ok(gpus) {
            return Err(ClusterError::WrongGpuCount { listed: listed.len(), gpus });
        }
        for (gpu, used) in listed.iter().enumerate() {
            if used.is_empty() {
                return Err(ClusterError::NoNic { gpu });
            }
            for (place, &nic) in used.iter().enumerate() {
                if nic >= nics {
                    return Err(ClusterError::NoSuchNic { gpu, nic, nics });
                }
                if used.iter().take(place).any(|earlier| *earlier == nic) {
                    return Err(ClusterError::NicTwice { gpu, nic });
                }
            }
        }
        Ok(())
    }
}

fn within(field: &'static str, value: impl Into<u64>, least: u64, max: u64) -> Result<(), ClusterError> {
    match value.into() {
        0 if least > 0 => Err(ClusterError::Zero { field }),
        value if value > max => Err(ClusterError::TooLarge { field, value, max }),
        _ => Ok(()),
    }
}
