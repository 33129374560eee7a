//! What a launcher's variables say where `push` and `serve` were not told: the rank, how many ranks its side has, and the
//! controller's address. A launcher starts one side of a job.
//!
//! Pure functions of the variables. They must never guess: variables that are no numbers, that are half there or that
//! contradict each other give nothing, and whoever then lacks an argument reads why.

use anyhow::{Context, bail, ensure};
use clap::error::ErrorKind;
use clap::{Command, CommandFactory, Error, FromArgMatches};

use super::Cli;

/// Where `weightsync controller` listens unless told otherwise. Not MASTER_PORT: PyTorch listens there itself.
const PORT: u16 = 7070;

/// A launcher's variables for the rank, and for the number of ranks, the first that is set.
struct Launcher {
    rank: &'static str,
    sizes: &'static [&'static str],
}

/// torchrun, Open MPI, and MPICH or Intel MPI. They contradict each other if they differ.
const NEAR: [Launcher; 3] = [
    Launcher { rank: "RANK", sizes: &["WORLD_SIZE"] },
    Launcher { rank: "OMPI_COMM_WORLD_RANK", sizes: &["OMPI_COMM_WORLD_SIZE"] },
    Launcher { rank: "PMI_RANK", sizes: &["PMI_SIZE"] },
];

/// Slurm's are inherited by whatever runs inside of its job, so that they count only where no other launcher's are set.
const SLURM: Launcher = Launcher { rank: "SLURM_PROCID", sizes: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"] };

/// A process among those of its launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    rank: u32,
    size: u32,
}

type Variable<'a> = &'a dyn Fn(&str) -> Option<String>;

/// Parses a command line, with what the launcher says in the place of what is missing.
pub(crate) fn parse(
    words: impl Iterator<Item = std::ffi::OsString>,
    variable: Variable,
) -> Result<Cli, Error> {
    let (place, address) = (place(variable), address(variable));
    let mut command = Cli::command();
    for (name, side) in [("push", "trainers"), ("serve", "inference")] {
        command = command.mut_subcommand(name, |mut command| {
            if let Ok(Some(Place { rank, size })) = place {
                command = with_default(command, "rank", rank.to_string());
                command = with_default(command, side, size.to_string());
            }
            match &address {
                Ok(Some(address)) => with_default(command, "controller", address.clone()),
                _ => command,
            }
        });
    }
    let matches = command.try_get_matches_from_mut(words).map_err(|error| {
        let reasons = [place.err(), address.err()].into_iter().flatten();
        let reasons: Vec<String> = reasons.map(|reason| format!("{reason:#}")).collect();
        match error.kind() {
            ErrorKind::MissingRequiredArgument if !reasons.is_empty() => {
                let (text, reasons) = (error.to_string(), reasons.join("; "));
                // What clap puts around it, it puts there again.
                let text = text.strip_prefix("error: ").unwrap_or(&text);
                let text = text.split("\n\nUsage:").next().unwrap_or(text);
                command.error(error.kind(), format!("{text}\nwhich the launcher does not say: {reasons}"))
            }
            _ => error,
        }
    })?;
    Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))
}

fn with_default(command: Command, argument: &'static str, value: String) -> Command {
    command.mut_arg(argument, |argument| argument.required(false).default_value(value))
}

/// This process's place, if there is a launcher.
fn place(variable: Variable) -> anyhow::Result<Option<Place>> {
    let mut found: Option<(&str, Place)> = None;
    for launcher in &NEAR {
        let Some(place) = launcher.read(variable)? else { continue };
        match found {
            Some((other, at)) if at != place => bail!(
                "{other} says rank {} of {}, {} says {} of {}: give --rank and the number of ranks",
                at.rank,
                at.size,
                launcher.rank,
                place.rank,
                place.size
            ),
            _ => found = Some((launcher.rank, place)),
        }
    }
    match found {
        Some((_, place)) => Ok(Some(place)),
        None => SLURM.read(variable),
    }
}

impl Launcher {
    fn read(&self, variable: Variable) -> anyhow::Result<Option<Place>> {
        let size = self.sizes.iter().find_map(|name| Some((*name, variable(name)?)));
        let (rank, (size_name, size)) = match (variable(self.rank), size) {
            (Some(rank), Some(size)) => (rank, size),
            (Some(_), None) => bail!("{} is set, but not {}", self.rank, self.sizes.join(" or ")),
            // The number of ranks alone says nothing of this process: a batch script has it too.
            (None, _) => return Ok(None),
        };
        let (rank, size) = (number(self.rank, &rank)?, number(size_name, &size)?);
        ensure!(rank < size, "{} is {rank}, but {size_name} is {size}", self.rank);
        Ok(Some(Place { rank, size }))
    }
}

fn number(name: &str, text: &str) -> anyhow::Result<u32> {
    text.parse().with_context(|| format!("{name} is '{text}', which is no number"))
}

/// The controller's address: on the host that the launcher takes for the first, at the usual port.
fn address(variable: Variable) -> anyhow::Result<Option<String>> {
    let named = ["MASTER_ADDR", "SLURM_LAUNCH_NODE_IPADDR"];
    let named = named.into_iter().find_map(|name| variable(name).filter(|host| !host.is_empty()));
    let host = match (named, variable("SLURM_STEP_NODELIST")) {
        (Some(host), _) => host,
        (None, Some(list)) => first_node(&list).with_context(|| {
            format!("SLURM_STEP_NODELIST is '{list}', and not in Slurm's form p5-[001-004]")
        })?,
        (None, None) => return Ok(None),
    };
    Ok(Some(if host.contains(':') { format!("[{host}]:{PORT}") } else { format!("{host}:{PORT}") }))
}

/// The first of Slurm's short form: `p5-[001-004,7],head` begins with `p5-001`.
fn first_node(list: &str) -> Option<String> {
    let (head, rest) = list.split_at(list.find(['[', ',']).unwrap_or(list.len()));
    let Some(rest) = rest.strip_prefix('[') else {
        return Some(head.to_owned()).filter(|head| !head.is_empty());
    };
    let (numbers, tail) = rest.split_once(']')?;
    let first =
        numbers.split(['-', ',']).next().filter(|first| first.bytes().all(|byte| byte.is_ascii_digit()))?;
    // What follows the bracket up to the next comma belongs to every name; another bracket is not for us to read.
    let tail = tail.split(',').next().filter(|tail| !tail.contains('['))?;
    (!first.is_empty()).then(|| format!("{head}{first}{tail}"))
}

#[cfg(test)]
mod tests {
    use super::super::Command as Chosen;
    use super::*;

    fn variable<'a>(variables: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        |name| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    }

    fn parsed(line: &str, variables: &[(&str, &str)]) -> Result<(u32, u32, u32, String), String> {
        let words = line.split(' ').map(Into::into);
        let cli = parse(words, &variable(variables)).map_err(|error| error.to_string())?;
        let rank = match cli.command {
            Chosen::Push(args) => args.rank,
            Chosen::Serve(args) => args.rank,
            _ => return Err("another command".into()),
        };
        Ok((rank.rank, rank.job.trainers, rank.job.inference, rank.controller))
    }

    const TORCHRUN: [(&str, &str); 4] =
        [("RANK", "3"), ("WORLD_SIZE", "8"), ("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "29500")];
    const SLURM_STEP: [(&str, &str); 4] = [
        ("SLURM_PROCID", "1"),
        ("SLURM_STEP_NUM_TASKS", "4"),
        ("SLURM_NTASKS", "16"),
        ("SLURM_STEP_NODELIST", "p5-[001-004]"),
    ];

    #[test]
    fn a_launcher_says_what_was_not_said() {
        let push = "weightsync push --checkpoint x --inference 2";
        assert_eq!(parsed(push, &TORCHRUN), Ok((3, 8, 2, "10.0.0.1:7070".into())));
        assert_eq!(parsed(push, &SLURM_STEP), Ok((1, 4, 2, "p5-001:7070".into())));
        assert_eq!(
            parsed(push, &[&SLURM_STEP[..], &TORCHRUN].concat()),
            Ok((3, 8, 2, "10.0.0.1:7070".into())),
            "the nearest launcher counts"
        );
        let mpi = [("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2"), ("MASTER_ADDR", "fe80::1")];
        let serve = "weightsync serve --checkpoint x --trainers 8";
        assert_eq!(parsed(serve, &mpi), Ok((0, 8, 2, "[fe80::1]:7070".into())));
        let pmi = [("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("SLURM_LAUNCH_NODE_IPADDR", "10.1.1.1")];
        assert_eq!(parsed(serve, &pmi), Ok((0, 8, 2, "10.1.1.1:7070".into())));
    }

    #[test]
    fn what_was_said_counts() {
        let line = "weightsync push --checkpoint x --rank 0 --trainers 1 --inference 1 --controller h:1";
        for variables in [&TORCHRUN[..], &[("RANK", "no"), ("WORLD_SIZE", "8")], &[]] {
            assert_eq!(parsed(line, variables), Ok((0, 1, 1, "h:1".into())), "{variables:?}");
        }
    }

    #[test]
    fn what_helps_nobody_is_named() {
        let push = "weightsync push --checkpoint x --inference 2 --controller h:1";
        for (variables, named) in [
            (vec![("RANK", "x"), ("WORLD_SIZE", "8")], "RANK is 'x'"),
            (vec![("RANK", "8"), ("WORLD_SIZE", "8")], "RANK is 8, but WORLD_SIZE is 8"),
            (vec![("PMI_RANK", "1")], "PMI_RANK is set, but not PMI_SIZE"),
            (
                vec![("RANK", "1"), ("WORLD_SIZE", "8"), ("PMI_RANK", "2"), ("PMI_SIZE", "8")],
                "PMI_RANK says 2",
            ),
            (vec![("WORLD_SIZE", "8")], "--rank"),
        ] {
            let error = parsed(push, &variables).unwrap_err();
            assert!(error.contains(named) && error.contains("--rank"), "{variables:?}: {error}");
        }
        let error = parsed(push, &[("RANK", "0"), ("WORLD_SIZE", "70000")]).unwrap_err();
        assert!(error.contains("70000"), "bounds hold for what a launcher says too: {error}");
    }

    #[test]
    fn the_first_node_is_found() {
        for (list, first) in [
            ("head", Some("head")),
            ("a1,b2", Some("a1")),
            ("p5-[001-004,7],head", Some("p5-001")),
            ("p5-[7]", Some("p5-7")),
            ("n[1-2]-ib", Some("n1-ib")),
            ("", None),
            ("p[", None),
            ("p[]", None),
            ("p[x]", None),
            ("r[1-2]n[1-2]", None),
        ] {
            assert_eq!(first_node(list).as_deref(), first, "{list}");
        }
    }
}
