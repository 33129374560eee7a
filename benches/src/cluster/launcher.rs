//! Which rank this process is, from the variables that its launcher set.
//!
//! A pure function of a map. It must never guess: a variable that is missing, senseless or contradicted by another
//! launcher's is an error that names it. The launcher nearest to the process counts: torchrun and mpirun leave the
//! variables of the Slurm job around them in place.

mod slurm;

use std::collections::BTreeMap;

use clap::ValueEnum;
use serde::Serialize;

/// The port of rank 0 where nobody says one: in nobody's list of services, and below the ports that kernels hand out.
pub(crate) const PORT_DEFAULT: u16 = 27_182;

pub(crate) type Variables = BTreeMap<String, String>;

/// Who starts processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Launcher {
    /// RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    Torchrun,
    /// Open MPI: OMPI_COMM_WORLD_RANK, _SIZE, _LOCAL_RANK
    Openmpi,
    /// MPICH, Intel MPI: PMI_RANK, PMI_SIZE
    Pmi,
    /// srun: SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID
    Slurm,
}

/// The variables of a launcher. The order of [`FAMILIES`] is from the nearest launcher to the farthest.
struct Family {
    launcher: Launcher,
    rank: &'static str,
    size: &'static str,
    local_rank: &'static str,
    /// How many ranks its host has; only where it is of use.
    local_size: Option<&'static str>,
}

const FAMILIES: [Family; 4] = [
    Family {
        launcher: Launcher::Torchrun,
        rank: "RANK",
        size: "WORLD_SIZE",
        local_rank: "LOCAL_RANK",
        local_size: None,
    },
    Family {
        launcher: Launcher::Openmpi,
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: Some("OMPI_COMM_WORLD_LOCAL_SIZE"),
    },
    Family {
        launcher: Launcher::Pmi,
        rank: "PMI_RANK",
        size: "PMI_SIZE",
        local_rank: "MPI_LOCALRANKID",
        local_size: Some("MPI_LOCALNRANKS"),
    },
    Family {
        launcher: Launcher::Slurm,
        rank: "SLURM_PROCID",
        size: "SLURM_NTASKS",
        local_rank: "SLURM_LOCALID",
        local_size: None,
    },
];

/// Torchrun's agent itself listens on MASTER_PORT when this is `True`.
const AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";

/// A process's place in the job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Place {
    pub(crate) launcher: Launcher,
    pub(crate) rank: u32,
    pub(crate) size: u32,
    pub(crate) local_rank: Option<u32>,
    /// Where rank 0 is, and its port.
    pub(crate) host: String,
    pub(crate) port: u16,
    /// The variables that say so.
    pub(crate) found: Variables,
}

/// Why a place cannot be told.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum LaunchError {
    #[error(
        "no launcher's variables are set: start one process per rank with srun, mpirun or torchrun, or let this one start \
         them: --hosts FILE (ssh) or --local TRAINERS:RECEIVERS"
    )]
    NotLaunched,
    #[error("{present} is set but {missing} is not: {hint}")]
    Missing { present: String, missing: &'static str, hint: &'static str },
    #[error("{variable} is '{value}', which is no {what}")]
    Malformed { variable: String, value: String, what: &'static str },
    #[error("{rank} is {value}, but {size} says that there are {ranks} ranks")]
    OutOfRange { rank: &'static str, value: u32, size: &'static str, ranks: u32 },
    #[error(
        "{a} says rank {a_rank} of {a_size}, {b} says rank {b_rank} of {b_size}: say with --launcher which one counts"
    )]
    Contradiction { a: &'static str, a_rank: u32, a_size: u32, b: &'static str, b_rank: u32, b_size: u32 },
    #[error("{size} is {ranks}: there must be a trainer and a receiver, so at least 2 ranks")]
    TooFew { size: &'static str, ranks: u32 },
    #[error("nothing says where rank 0 runs: give --address HOST or set MASTER_ADDR")]
    NoAddress,
}

/// This process's place. `forced` takes one launcher's word whatever others say; `address` is what the person says of
/// rank 0's, a host and perhaps a port.
pub(crate) fn detect(
    variables: &Variables,
    forced: Option<Launcher>,
    address: Option<(&str, Option<u16>)>,
) -> Result<Place, LaunchError> {
    let asked = |family: &&Family| forced.is_none_or(|launcher| launcher == family.launcher);
    let complete = |family: &&Family| family.begun(variables) == 2;
    let Some(family) = FAMILIES.iter().filter(asked).find(complete) else {
        return Err(incomplete(variables, forced));
    };
    let mut reader = Reader { variables, found: Variables::new() };
    let (rank, size) = family.rank_and_size(&mut reader)?;
    // Slurm's variables are inherited by whatever runs inside of a job, so only the others' count as a contradiction.
    for other in FAMILIES.iter().filter(|other| forced.is_none() && other.launcher != Launcher::Slurm) {
        if other.begun(variables) == 2 && family.launcher != Launcher::Slurm {
            let (b_rank, b_size) = other.rank_and_size(&mut Reader { variables, found: Variables::new() })?;
            if (rank, size) != (b_rank, b_size) {
                let (a, b, a_rank, a_size) = (family.rank, other.rank, rank, size);
                return Err(LaunchError::Contradiction { a, a_rank, a_size, b, b_rank, b_size });
            }
        }
    }
    if size < 2 {
        return Err(LaunchError::TooFew { size: family.size, ranks: size });
    }
    let local_rank = reader.number(family.local_rank)?;
    if let Some(value) = local_rank.filter(|&local| local >= size) {
        return Err(LaunchError::OutOfRange {
            rank: family.local_rank,
            value,
            size: family.size,
            ranks: size,
        });
    }
    let (host, port) = family.address(&mut reader, size, address)?;
    Ok(Place { launcher: family.launcher, rank, size, local_rank, host, port, found: reader.found })
}

/// The error for variables of which no launcher's are complete.
fn incomplete(variables: &Variables, forced: Option<Launcher>) -> LaunchError {
    let asked = |family: &&Family| forced.is_none_or(|launcher| launcher == family.launcher);
    for family in FAMILIES.iter().filter(asked) {
        let (rank, size) = (variables.contains_key(family.rank), variables.contains_key(family.size));
        let (present, missing) = match (rank, size) {
            (true, _) => (family.rank, family.size),
            (_, true) => (family.size, family.rank),
            _ if forced.is_some() => {
                return LaunchError::Missing {
                    present: "--launcher".into(),
                    missing: family.rank,
                    hint: "is this process started by that launcher?",
                };
            }
            _ => continue,
        };
        let hint = match family.launcher {
            Launcher::Slurm => "start the ranks with srun",
            _ => "the launcher sets both for every process",
        };
        return LaunchError::Missing { present: present.into(), missing, hint };
    }
    match variables.contains_key("SLURM_JOB_ID") {
        true => LaunchError::Missing {
            present: "SLURM_JOB_ID".into(),
            missing: "SLURM_PROCID",
            hint: "start the ranks with srun",
        },
        false => LaunchError::NotLaunched,
    }
}

/// Reads variables and remembers which.
struct Reader<'a> {
    variables: &'a Variables,
    found: Variables,
}

impl Reader<'_> {
    fn text(&mut self, variable: &str) -> Option<String> {
        let value = self.variables.get(variable).filter(|value| !value.is_empty())?.clone();
        self.found.insert(variable.to_owned(), value.clone());
        Some(value)
    }

    fn parsed<T: std::str::FromStr>(
        &mut self,
        variable: &str,
        what: &'static str,
    ) -> Result<Option<T>, LaunchError> {
        let Some(value) = self.text(variable) else { return Ok(None) };
        match value.trim().parse() {
            Ok(parsed) => Ok(Some(parsed)),
            Err(_) => Err(LaunchError::Malformed { variable: variable.to_owned(), value, what }),
        }
    }

    fn number(&mut self, variable: &str) -> Result<Option<u32>, LaunchError> {
        self.parsed(variable, "whole number")
    }
}

impl Family {
    /// How many of its two necessary variables are set.
    fn begun(&self, variables: &Variables) -> usize {
        [self.rank, self.size].iter().filter(|name| variables.contains_key(**name)).count()
    }

    fn rank_and_size(&self, reader: &mut Reader) -> Result<(u32, u32), LaunchError> {
        let hint = "the launcher sets both for every process";
        let missing =
            |missing, present: &str| LaunchError::Missing { present: present.to_owned(), missing, hint };
        let rank = reader.number(self.rank)?.ok_or_else(|| missing(self.rank, self.size))?;
        let size = reader.number(self.size)?.ok_or_else(|| missing(self.size, self.rank))?;
        if rank >= size {
            let (value, ranks) = (rank, size);
            return Err(LaunchError::OutOfRange { rank: self.rank, value, size: self.size, ranks });
        }
        Ok((rank, size))
    }

    /// Where rank 0 listens: what the person says, then MASTER_ADDR and MASTER_PORT, then what the launcher knows.
    fn address(
        &self,
        reader: &mut Reader,
        size: u32,
        said: Option<(&str, Option<u16>)>,
    ) -> Result<(String, u16), LaunchError> {
        let said_port = said.and_then(|(_, port)| port);
        let host = match said {
            Some((host, _)) => Some(host.to_owned()),
            None => reader.text("MASTER_ADDR"),
        };
        let master_port = match said_port {
            Some(_) => None,
            None => reader.parsed::<u16>("MASTER_PORT", "port")?,
        };
        let host = match (host, self.launcher) {
            (Some(host), _) => host,
            (None, Launcher::Torchrun) => {
                let (present, hint) = (self.rank.to_owned(), "torchrun sets it; or give --address HOST");
                return Err(LaunchError::Missing { present, missing: "MASTER_ADDR", hint });
            }
            (None, Launcher::Slurm) => slurm::first_host(reader)?,
            (None, _) => match self.local_size.map(|variable| reader.number(variable)).transpose()?.flatten()
            {
                // Everybody is on this host.
                Some(local) if local == size => "127.0.0.1".into(),
                _ => return Err(LaunchError::NoAddress),
            },
        };
        let port = match (said_port, master_port) {
            (Some(port), _) => port,
            (None, Some(port)) if reader.text(AGENT_STORE).is_some_and(|is| is == "True") => {
                port.checked_add(1).unwrap_or(PORT_DEFAULT)
            }
            (None, Some(port)) => port,
            (None, None) if self.launcher == Launcher::Slurm => slurm::port(reader)?,
            (None, None) => PORT_DEFAULT,
        };
        Ok((host, port))
    }
}

#[cfg(test)]
mod tests;
