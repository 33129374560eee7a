//! The processes of a benchmark.

use std::hint::black_box;
use std::io::BufRead;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use weightsync::{DType, Error, Fabric, Inference, ParamMap, SessionConfig, TensorSpec, Trainer, World};

/// Spans of this size, as the planner cuts them.
pub(crate) const SPAN_BYTES: u64 = 1 << 20;

/// One transfer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Transfer {
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    /// The most memory that the process had so far.
    #[serde(default)]
    pub(crate) peak_rss_bytes: u64,
}

impl Transfer {
    pub(crate) fn gb_per_second(&self) -> f64 {
        self.bytes as f64 / self.seconds / 1e9
    }

    fn print(bytes: u64, seconds: f64) -> anyhow::Result<()> {
        let transfer = Self { bytes, seconds, peak_rss_bytes: peak_rss_bytes() };
        println!("{}", serde_json::to_string(&transfer)?);
        Ok(())
    }
}

pub(crate) fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn config(address: &str, fabric: Fabric) -> SessionConfig {
    let mut config = SessionConfig::new(address, World { trainers: 1, inference: 1 }, 0);
    config.fabric = fabric;
    config
}

fn shape(bytes: u64) -> [u64; 2] {
    [bytes / SPAN_BYTES, SPAN_BYTES]
}

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()
}

/// Pushes once per line of standard input, and answers with the time of its writes.
pub(crate) fn trainer(address: &str, bytes: u64, fabric: Fabric) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let mut trainer = Trainer::new(config(address, fabric));
        let id = trainer.allocate(vec![TensorSpec::whole("w", DType::U8, &shape(bytes))?])?[0];
        if let Some(bytes) = trainer.tensor_mut(id) {
            bytes.fill(1);
        }
        let mut session = trainer.connect().await?;
        for (line, version) in std::io::stdin().lock().lines().zip(1..) {
            line?;
            let report = session.push(version).await?;
            Transfer::print(report.bytes, report.write_seconds)?;
        }
        session.leave().await;
        Ok(())
    })
}

/// Takes versions until the trainer leaves.
pub(crate) fn inference(address: &str, bytes: u64, fabric: Fabric) -> anyhow::Result<()> {
    runtime()?.block_on(async {
        let mut inference = Inference::new(config(address, fabric));
        inference.register("w", DType::U8, &shape(bytes), ParamMap::tensor("w"))?;
        let mut session = inference.connect().await?;
        loop {
            match session.wait_version(u64::MAX, None).await {
                Err(Error::Finished { .. }) => return Ok(()),
                other => drop(other?),
            }
        }
    })
}

/// The reference of `local`: the same bytes copied by one thread in the same spans, once per line of standard input.
pub(crate) fn memcpy(bytes: u64) -> anyhow::Result<()> {
    let bytes = usize::try_from(bytes)?;
    // Both are touched before the first copy is timed.
    let (source, mut target) = (vec![1_u8; bytes], vec![2_u8; bytes]);
    for line in std::io::stdin().lock().lines() {
        line?;
        let began = Instant::now();
        let spans = source.chunks(SPAN_BYTES as usize).zip(target.chunks_mut(SPAN_BYTES as usize));
        for (source, target) in spans {
            target.copy_from_slice(black_box(source));
        }
        black_box(&mut target);
        Transfer::print(bytes as u64, began.elapsed().as_secs_f64())?;
    }
    Ok(())
}
