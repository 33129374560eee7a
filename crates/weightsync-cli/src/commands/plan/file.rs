//! Plans on disk. A file is never trusted: its length is bounded, it must decode to its last byte, and the plan's own
//! digest must be right.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::Path;

use anyhow::{Context, bail};
use xfer_plan::Plan;

use crate::table::bytes_text;

/// Length of a plan file. Kimi-K2 from 256 to 128 GPUs has some 50 MB as .bin, and 500 MB as .json.
const PLAN_BYTES_MAX: u64 = 4 << 30;

/// A plan's file, in the form that its name asks for.
pub(crate) struct PlanFile<'p> {
    path: &'p Path,
    json: bool,
}

impl<'p> PlanFile<'p> {
    /// The plan at this path.
    pub(crate) fn at(path: &'p Path) -> anyhow::Result<PlanFile<'p>> {
        let json = match path.extension().and_then(|extension| extension.to_str()) {
            Some("bin") => false,
            Some("json") => true,
            _ => bail!("{}: a plan's file ends in .bin or .json", path.display()),
        };
        Ok(PlanFile { path, json })
    }

    pub(crate) fn write(&self, plan: &Plan) -> anyhow::Result<()> {
        let write = || {
            let mut file = BufWriter::new(File::create(self.path)?);
            if self.json {
                serde_json::to_writer(&mut file, plan)?;
            } else {
                postcard::to_io(plan, &mut file)?;
            }
            file.flush().map_err(anyhow::Error::from)
        };
        write().with_context(|| format!("cannot write {}", self.path.display()))
    }

    pub(crate) fn read(&self) -> anyhow::Result<Plan> {
        let read = || {
            let mut bytes = Vec::new();
            let file = BufReader::new(File::open(self.path)?);
            file.take(PLAN_BYTES_MAX + 1).read_to_end(&mut bytes)?;
            if bytes.len() as u64 > PLAN_BYTES_MAX {
                bail!("it is longer than {}", bytes_text(PLAN_BYTES_MAX));
            }
            let plan: Plan = if self.json {
                serde_json::from_slice(&bytes).context("it is no plan")?
            } else {
                match postcard::take_from_bytes(&bytes) {
                    Ok((plan, [])) => plan,
                    Ok(_) => bail!("it goes on after the plan"),
                    Err(error) => bail!("it is no plan: {error}"),
                }
            };
            if !plan.is_intact() {
                bail!("it was changed after planning, or damaged: its digest is not the one that it states");
            }
            Ok(plan)
        };
        read().with_context(|| format!("cannot use {}", self.path.display()))
    }
}
