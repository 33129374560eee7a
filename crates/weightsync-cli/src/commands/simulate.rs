//! `weightsync simulate`: plays a whole push in virtual time on a modelled cluster, and shows where the time goes.
//!
//! The plan and the engine are those of a real push; hosts, NICs and their network are modelled. Nothing here is measured,
//! and nothing that is printed may read as if it were.

pub(crate) mod args;
mod case;
mod cluster;
mod facts;
mod page;
mod pipeline;
mod summary;
mod sweep;

use self::args::SimulateArgs;
use self::case::Case;
use self::cluster::NamedCluster;
use crate::say::say;
use crate::spinner::spinner;

pub(crate) fn run(args: &SimulateArgs) -> anyhow::Result<()> {
    if let Some(sweep) = &args.sweep {
        return sweep::run(args, sweep);
    }
    if let Some(pipeline) = args.pipeline {
        return pipeline::run(args, pipeline);
    }
    let case = Case::new(args)?;
    if args.print_cluster {
        let (_, cluster) = case.placed()?;
        let NamedCluster { name, .. } = &case.cluster;
        say!("# {name} for this job. Rates are each way; docs/simulate.md says what the fields mean.");
        say!("{}", toml::to_string(&cluster)?.trim_end());
        return Ok(());
    }
    let spinner = spinner("building the manifest");
    let facts = case.run(&spinner)?;
    spinner.finish_and_clear();
    if let Some(path) = &args.html {
        page::write(path, &facts)?;
    }
    if args.json {
        say!("{}", serde_json::to_string(&facts)?);
    } else {
        say!("{}", summary::text(&facts));
    }
    if let Some(path) = &args.html {
        eprintln!("weightsync: wrote {}", path.display());
    }
    Ok(())
}
