//! Which machine the figures are from: what must be equal for two runs to be compared.

use std::fmt;
use std::fs;

use gpu_mem::{Cuda, Device};
use serde::Serialize;

/// The host's GPUs and what drives them.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    /// By number.
    gpus: Vec<Gpu>,
    /// NVIDIA's kernel driver; none where the kernel does not tell.
    driver: Option<String>,
    /// The newest CUDA that the driver serves.
    cuda: String,
    nvrtc: String,
    cpu: String,
    /// Those that this process may run on.
    cpus: usize,
    kernel: Option<String>,
}

#[derive(Debug, Serialize)]
struct Gpu {
    name: String,
    capability: String,
    multiprocessors: u32,
    memory_bytes: u64,
}

impl Machine {
    pub(crate) fn read(cuda: &Cuda, devices: &[Device]) -> anyhow::Result<Self> {
        let gpu = |device: &Device| {
            let (major, minor) = device.capability()?;
            Ok(Gpu {
                name: device.name().to_owned(),
                capability: format!("{major}.{minor}"),
                multiprocessors: device.multiprocessors()?,
                memory_bytes: device.memory()?.total,
            })
        };
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        Ok(Self {
            gpus: devices.iter().map(gpu).collect::<Result<_, gpu_mem::Error>>()?,
            driver: driver(),
            cuda: cuda.driver_version().to_string(),
            nvrtc: match gpu_mem::nvrtc_version() {
                Ok(version) => version.to_string(),
                Err(error) => error.to_string(),
            },
            cpu: model.map_or_else(|| "unknown CPU".into(), |(_, name)| name.to_owned()),
            cpus: std::thread::available_parallelism()?.get(),
            kernel: line_of("/proc/sys/kernel/osrelease"),
        })
    }
}

/// The version of the kernel module.
fn driver() -> Option<String> {
    line_of("/sys/module/nvidia/version").or_else(|| {
        let text = fs::read_to_string("/proc/driver/nvidia/version").ok()?;
        let is_version =
            |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
        text.split_whitespace().find(is_version).map(str::to_owned)
    })
}

fn line_of(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, Gpu { name, capability, multiprocessors, memory_bytes }) in self.gpus.iter().enumerate()
        {
            let gib = memory_bytes >> 30;
            writeln!(f, "GPU {number}: {name}, {capability}, {multiprocessors} multiprocessors, {gib} GiB")?;
        }
        let (driver, kernel) = (self.driver.as_deref().unwrap_or("?"), self.kernel.as_deref().unwrap_or("?"));
        write!(
            f,
            "driver {driver}, CUDA {}, NVRTC {}; {}, {} CPUs, ",
            self.cuda, self.nvrtc, self.cpu, self.cpus
        )?;
        write!(f, "Linux {kernel}")
    }
}
