//! This rank's number among the ranks of its host: by hand, or from the variables that its launcher set.
//!
//! A pure function of the variables. It must never guess: values that are no numbers, or that contradict each other, are
//! errors that name the variable.

use std::str::FromStr;

use anyhow::{Context, bail, ensure};

/// A rank among those of its host, trainers and inference ranks together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LocalRank {
    pub(crate) index: u32,
    pub(crate) count: u32,
}

impl FromStr for LocalRank {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('/').map(|(index, count)| (index.parse(), count.parse()));
        match numbers {
            Some((Ok(index), Ok(count))) if index < count => Ok(Self { index, count }),
            _ => {
                Err("I/N is expected: this rank, from 0, and how many ranks its host has, such as 3/8".into())
            }
        }
    }
}

/// A launcher's variables: the local rank, and how many ranks the host has, the one that counts first.
struct Launcher {
    index: &'static str,
    counts: &'static [&'static str],
}

/// The nearest to the process first. They contradict each other if they differ.
const NEAR: [Launcher; 2] = [
    Launcher { index: "LOCAL_RANK", counts: &["LOCAL_WORLD_SIZE"] },
    Launcher { index: "OMPI_COMM_WORLD_LOCAL_RANK", counts: &["OMPI_COMM_WORLD_LOCAL_SIZE"] },
];

/// Slurm's are inherited by whatever runs inside of its job, so that they count only where no other launcher's are set.
const SLURM: Launcher = Launcher {
    index: "SLURM_LOCALID",
    // Of the step, as it runs; then of the job, as it was asked for.
    counts: &["SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"],
};

/// Which node of the step this is, from 0.
const SLURM_NODE: &str = "SLURM_NODEID";

/// What the launcher says. None without one, and where it does not say how many ranks the host has.
pub(crate) fn of_launcher(variable: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<Option<LocalRank>> {
    let [torchrun, mpi] = &NEAR;
    match (torchrun.read(variable)?, mpi.read(variable)?) {
        (Some(a), Some(b)) if a != b => bail!(
            "{} says local rank {} of {}, {} says {} of {}: say with --local-rank I/N which one counts",
            torchrun.index,
            a.index,
            a.count,
            mpi.index,
            b.index,
            b.count
        ),
        (Some(rank), _) | (None, Some(rank)) => Ok(Some(rank)),
        (None, None) => SLURM.read(variable),
    }
}

impl Launcher {
    fn read(&self, variable: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<Option<LocalRank>> {
        let Some(index) = variable(self.index) else { return Ok(None) };
        let count = self.counts.iter().find_map(|name| Some((*name, variable(name)?)));
        let Some((name, text)) = count else { return Ok(None) };
        let index = number(self.index, &index)?;
        let count = match text.contains(['(', ',']) {
            true => of_node(name, &text, variable)?,
            false => number(name, &text)?,
        };
        ensure!(index < count, "{} is {index}, but {name} says that this host has {count} ranks", self.index);
        Ok(Some(LocalRank { index, count }))
    }
}

/// The entry of this node in Slurm's short form: `8(x2),4` are two nodes of 8 tasks and one of 4.
fn of_node(name: &str, text: &str, variable: &dyn Fn(&str) -> Option<String>) -> anyhow::Result<u32> {
    let runs: Vec<(u32, u32)> = text
        .split(',')
        .map(|run| match run.strip_suffix(')').and_then(|run| run.split_once("(x")) {
            Some((tasks, nodes)) => Ok((number(name, tasks)?, number(name, nodes)?)),
            None => Ok((number(name, run)?, 1)),
        })
        .collect::<anyhow::Result<_>>()
        .with_context(|| format!("{name} is '{text}', and not in Slurm's form 8(x2),4"))?;
    if let [(tasks, _)] = runs[..] {
        return Ok(tasks);
    }
    let Some(node) = variable(SLURM_NODE) else { bail!("{name} is '{text}', but {SLURM_NODE} is not set") };
    let node = number(SLURM_NODE, &node)?;
    let mut first = 0_u64;
    for (tasks, nodes) in runs {
        first += u64::from(nodes);
        if u64::from(node) < first {
            return Ok(tasks);
        }
    }
    bail!("{SLURM_NODE} is {node}, but {name} is '{text}', which has {first} nodes")
}

fn number(name: &str, text: &str) -> anyhow::Result<u32> {
    text.parse().with_context(|| format!("{name} is '{text}', which is no number"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn read(variables: &[(&str, &str)]) -> anyhow::Result<Option<LocalRank>> {
        let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
        of_launcher(&|name| variables.get(name).map(|value| (*value).to_owned()))
    }

    const TORCHRUN: [(&str, &str); 2] = [("LOCAL_RANK", "3"), ("LOCAL_WORLD_SIZE", "8")];
    const MPI: [(&str, &str); 2] = [("OMPI_COMM_WORLD_LOCAL_RANK", "3"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "8")];
    const SLURM_STEP: [(&str, &str); 3] =
        [("SLURM_LOCALID", "1"), ("SLURM_STEP_TASKS_PER_NODE", "4(x2)"), ("SLURM_NTASKS_PER_NODE", "9")];

    #[test]
    fn every_launcher_is_understood() {
        let rank = |index, count| Some(LocalRank { index, count });
        assert_eq!(read(&[]).unwrap(), None);
        assert_eq!(read(&TORCHRUN).unwrap(), rank(3, 8));
        assert_eq!(read(&MPI).unwrap(), rank(3, 8));
        assert_eq!(read(&SLURM_STEP).unwrap(), rank(1, 4), "the step as it runs counts");
        assert_eq!(read(&[("SLURM_LOCALID", "1"), ("SLURM_NTASKS_PER_NODE", "2")]).unwrap(), rank(1, 2));
        assert_eq!(read(&[TORCHRUN, MPI].concat()).unwrap(), rank(3, 8));
        assert_eq!(
            read(&[&MPI[..], &SLURM_STEP].concat()).unwrap(),
            rank(3, 8),
            "the nearest launcher counts"
        );
        assert_eq!(read(&TORCHRUN[..1]).unwrap(), None, "of how many is not known");
    }

    #[test]
    fn contradictions_and_malformed_values_name_the_variable() {
        for (variables, named) in [
            (vec![("LOCAL_RANK", "x"), TORCHRUN[1]], "LOCAL_RANK is 'x'"),
            (vec![("LOCAL_RANK", "8"), TORCHRUN[1]], "LOCAL_WORLD_SIZE"),
            (vec![TORCHRUN[0], ("LOCAL_WORLD_SIZE", "-8")], "LOCAL_WORLD_SIZE is '-8'"),
            ([&TORCHRUN[..], &[MPI[0], ("OMPI_COMM_WORLD_LOCAL_SIZE", "4")]].concat(), "--local-rank"),
            (vec![("SLURM_LOCALID", "0"), ("SLURM_STEP_TASKS_PER_NODE", "4(x2")], "4(x2"),
            (vec![("SLURM_LOCALID", "0"), ("SLURM_STEP_TASKS_PER_NODE", "4,2")], "SLURM_NODEID"),
        ] {
            let error = format!("{:#}", read(&variables).unwrap_err());
            assert!(error.contains(named), "{variables:?}: {error}");
        }
    }

    #[test]
    fn a_local_rank_is_two_numbers() {
        assert_eq!("3/8".parse(), Ok(LocalRank { index: 3, count: 8 }));
        for wrong in ["", "3", "8/8", "9/8", "0/0", "-1/8", "a/b", "1/2/3", "1/4294967296"] {
            assert!(wrong.parse::<LocalRank>().is_err(), "{wrong}");
        }
    }

    proptest! {
        /// Nodes of any number of tasks, written shortly, against the list that they stand for.
        #[test]
        fn slurm_nodes_have_their_own_count(runs in prop::collection::vec((1..9u32, 1..4u32), 1..5)) {
            let text: Vec<String> = runs
                .iter()
                .map(|(tasks, nodes)| if *nodes == 1 { tasks.to_string() } else { format!("{tasks}(x{nodes})") })
                .collect();
            let all: Vec<u32> = runs.iter().flat_map(|&(tasks, nodes)| vec![tasks; nodes as usize]).collect();
            for (node, &tasks) in all.iter().enumerate() {
                let (node, text) = (node.to_string(), text.join(","));
                let variables =
                    [("SLURM_LOCALID", "0"), ("SLURM_STEP_TASKS_PER_NODE", &text), ("SLURM_NODEID", &node)];
                prop_assert_eq!(read(&variables).unwrap(), Some(LocalRank { index: 0, count: tasks }));
            }
            let past = all.len().to_string();
            let text = text.join(",");
            let variables = [("SLURM_LOCALID", "0"), ("SLURM_STEP_TASKS_PER_NODE", &text), ("SLURM_NODEID", &past)];
            prop_assert!(runs.len() == 1 || read(&variables).is_err());
        }
    }
}
