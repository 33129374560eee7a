//! Writes the first corpus of every target: `seeds FOLDER`.

use std::fs;
use std::io;
use std::path::Path;

#[path = "../../crates/topology/tests/common/dumps.rs"]
mod dumps;
#[allow(dead_code)] // a part of it is enough here
#[path = "../../crates/xfer-plan/tests/hostile/mod.rs"]
mod hostile;
#[allow(dead_code)] // a part of it is enough here
#[path = "../../crates/xfer-plan/tests/scenario/mod.rs"]
mod scenario;

use scenario::Choices;

fn main() -> io::Result<()> {
    let folder = std::env::args_os().nth(1).ok_or_else(|| io::Error::other("usage: seeds FOLDER"))?;
    let folder = Path::new(&folder);
    for seed in 0..64u32 {
        let choices = (0..200).map(|n| n * seed * 7919 % 1009).collect();
        let manifest = scenario::manifest(&mut Choices::new(choices));
        let plan = xfer_plan::plan(&manifest).map_err(io::Error::other)?;
        let mut bytes = postcard::to_allocvec(&manifest).map_err(io::Error::other)?;
        bytes.extend(postcard::to_allocvec(&plan).map_err(io::Error::other)?);
        write(&folder.join("plan"), seed, &bytes)?;
    }
    for (seed, description) in (0..).zip(hostile::DESCRIPTIONS) {
        write(&folder.join("model_spec"), seed, description.as_bytes())?;
    }
    for (seed, dump) in (0..).zip([dumps::hwloc_p5(1), dumps::nccl_p4d()]) {
        write(&folder.join("topology"), seed, dump.as_bytes())?;
    }
    Ok(())
}

fn write(folder: &Path, seed: u32, bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join(format!("seed{seed}")), bytes)
}
