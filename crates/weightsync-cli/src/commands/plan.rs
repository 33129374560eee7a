//! `weightsync plan`: makes the plan of a transfer without any of its machines, and shows what it means.
//!
//! Everything is computed here: no rank is asked, no GPU is needed, no figure is measured.

pub(crate) mod args;
mod file;
mod page;
mod summary;

use std::time::Instant;

use anyhow::{Context, bail};
use serde::Serialize;
use xfer_plan::report::PlanReport;
use xfer_plan::{Manifest, Plan, ReceiverRank, diff, explain, plan};

use self::args::{DiffArgs, MakeArgs, PlanCommand, PlanSubcommand};
use self::file::PlanFile;
use super::transfer::JobFacts;
use crate::say::say;
use crate::spinner::spinner;

#[derive(Serialize)]
struct Facts<'a> {
    job: &'a JobFacts,
    report: &'a PlanReport,
    /// Seconds that the check took; none where it was not asked for.
    checked_in_seconds: Option<f64>,
}

pub(crate) fn run(command: &PlanCommand) -> anyhow::Result<()> {
    match &command.command {
        Some(PlanSubcommand::Diff(args)) => compare(args),
        None => make(&command.make),
    }
}

fn make(args: &MakeArgs) -> anyhow::Result<()> {
    // What cannot be written in the end is refused before the work.
    let out = args.out.as_deref().map(PlanFile::at).transpose()?;
    let job = args.transfer.job(args.machine.machine())?;
    let progress = spinner("building the manifest");
    let manifest = job.manifest()?;
    progress.set_message("planning");
    let plan = plan(&manifest)?;
    let checked_in_seconds = match args.check {
        true => {
            progress.set_message("checking the plan");
            let started = Instant::now();
            plan.check(&manifest).context("the plan does not pass its check")?;
            Some(started.elapsed().as_secs_f64())
        }
        false => None,
    };
    let facts = JobFacts::new(&job, &manifest)?;
    progress.set_message("adding up");
    let report = PlanReport::new(&plan, &manifest)?;
    let facts = Facts { job: &facts, report: &report, checked_in_seconds };
    if let Some(out) = &out {
        progress.set_message("writing the plan");
        out.write(&plan)?;
    }
    if let Some(path) = &args.html {
        page::write(path, &facts)?;
    }
    progress.finish_and_clear();
    match &args.explain {
        Some(name) => say_explanation(&plan, &manifest, name, args)?,
        None if args.json => say!("{}", serde_json::to_string(&facts)?),
        None => say!("{}", summary::text(&facts)),
    }
    for path in args.out.iter().chain(&args.html) {
        eprintln!("weightsync: wrote {}", path.display());
    }
    Ok(())
}

fn say_explanation(plan: &Plan, manifest: &Manifest, name: &str, args: &MakeArgs) -> anyhow::Result<()> {
    let explanation = explain(plan, manifest, name, args.rank.map(ReceiverRank))?;
    if args.json {
        say!("{}", serde_json::to_string(&explanation)?);
    } else {
        say!("{}", explanation.to_string().trim_end());
    }
    Ok(())
}

fn compare(args: &DiffArgs) -> anyhow::Result<()> {
    let [a, b] = [&args.a, &args.b].map(|path| PlanFile::at(path).and_then(|file| file.read()));
    let diff = diff(&a?, &b?);
    if args.json {
        say!("{}", serde_json::to_string(&diff)?);
    } else {
        say!("{}", diff.to_string().trim_end());
    }
    if diff.equal { Ok(()) } else { bail!("the plans differ") }
}
