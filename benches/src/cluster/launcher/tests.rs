use proptest::prelude::*;

use super::slurm::first_of;
use super::*;

fn variables(pairs: &[(&str, &str)]) -> Variables {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

const TORCHRUN: [(&str, &str); 5] = [
    ("RANK", "3"),
    ("WORLD_SIZE", "4"),
    ("LOCAL_RANK", "1"),
    ("MASTER_ADDR", "10.0.0.1"),
    ("MASTER_PORT", "29500"),
];

const SLURM: [(&str, &str); 6] = [
    ("SLURM_PROCID", "5"),
    ("SLURM_NTASKS", "16"),
    ("SLURM_LOCALID", "1"),
    ("SLURM_NODEID", "1"),
    ("SLURM_JOB_NODELIST", "p5-[001-002]"),
    ("SLURM_JOB_ID", "4097"),
];

#[test]
fn torchrun() {
    let place = detect(&variables(&TORCHRUN), None, None).unwrap();
    assert_eq!(
        (place.launcher, place.rank, place.size, place.local_rank),
        (Launcher::Torchrun, 3, 4, Some(1))
    );
    assert_eq!((place.host.as_str(), place.port), ("10.0.0.1", 29500));
    assert_eq!(place.found, variables(&TORCHRUN));
    let mut agent = variables(&TORCHRUN);
    agent.insert("TORCHELASTIC_USE_AGENT_STORE".into(), "True".into());
    assert_eq!(detect(&agent, None, None).unwrap().port, 29501, "the agent listens on MASTER_PORT itself");
}

#[test]
fn slurm() {
    let place = detect(&variables(&SLURM), None, None).unwrap();
    assert_eq!((place.launcher, place.rank, place.size, place.local_rank), (Launcher::Slurm, 5, 16, Some(1)));
    assert_eq!((place.host.as_str(), place.port), ("p5-001", PORT_DEFAULT + 1));
    let place = detect(&variables(&SLURM), None, Some(("head", Some(9)))).unwrap();
    assert_eq!((place.host.as_str(), place.port), ("head", 9));
}

#[test]
fn mpi_on_one_host_needs_no_address_and_on_several_it_does() {
    let mut mpi = variables(&[
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
    ]);
    let place = detect(&mpi, None, None).unwrap();
    assert_eq!((place.host.as_str(), place.port), ("127.0.0.1", PORT_DEFAULT));
    mpi.insert("OMPI_COMM_WORLD_LOCAL_SIZE".into(), "2".into());
    assert_eq!(detect(&mpi, None, None), Err(LaunchError::NoAddress));
    mpi.insert("MASTER_ADDR".into(), "a".into());
    assert_eq!(detect(&mpi, None, None).unwrap().host, "a");
    let pmi = variables(&[("PMI_RANK", "0"), ("PMI_SIZE", "2"), ("MPI_LOCALNRANKS", "2")]);
    assert_eq!(detect(&pmi, None, None).unwrap().launcher, Launcher::Pmi);
}

#[test]
fn the_nearest_launcher_counts_and_two_that_disagree_are_refused() {
    let both: Vec<_> = TORCHRUN.into_iter().chain(SLURM).collect();
    assert_eq!(detect(&variables(&both), None, None).unwrap().launcher, Launcher::Torchrun);
    let forced = detect(&variables(&both), Some(Launcher::Slurm), None).unwrap();
    assert_eq!((forced.launcher, forced.rank), (Launcher::Slurm, 5));
    let mpi = [("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "4")];
    let three = variables(&TORCHRUN.into_iter().chain(mpi).collect::<Vec<_>>());
    let error = detect(&three, None, None).unwrap_err().to_string();
    assert!(error.contains("RANK") && error.contains("OMPI_COMM_WORLD_RANK"), "{error}");
    assert_eq!(detect(&three, Some(Launcher::Torchrun), None).unwrap().rank, 3);
}

#[test]
fn nothing_and_an_allocation_without_srun_say_what_to_do() {
    assert_eq!(detect(&Variables::new(), None, None), Err(LaunchError::NotLaunched));
    let error = detect(&variables(&[("SLURM_JOB_ID", "1"), ("SLURM_NTASKS", "4")]), None, None);
    assert!(
        matches!(error, Err(LaunchError::Missing { missing: "SLURM_PROCID", .. })),
        "an allocation's shell has no rank: {error:?}"
    );
}

#[test]
fn the_first_host_of_slurms_notation() {
    for (list, first) in [
        ("a", "a"),
        ("a,b", "a"),
        ("gpu[03-07,9]-ib,login1", "gpu03-ib"),
        ("gpu[1,3]", "gpu1"),
        ("r[1-2]n[08-09]", "r1n08"),
    ] {
        assert_eq!(first_of(list).as_deref(), Some(first), "{list}");
    }
    for list in ["", ",a", "a[", "a[]", "a[x-y]", "a b", "$(x)"] {
        assert_eq!(first_of(list), None, "{list}");
    }
}

proptest! {
    /// Whatever the variables say: a place is within its bounds, and every error names a variable or what to do.
    #[test]
    fn a_place_is_sound_or_the_error_names_a_variable(
        picked in prop::collection::vec((0..11usize, prop_oneof!["[0-9]", "[0-9]{1,3}", "-1", "x", "", "h\\[1-2\\]"]), 0..11),
    ) {
        const NAMES: [&str; 11] = [
            "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST",
        ];
        let variables: Variables =
            picked.into_iter().map(|(name, value)| (NAMES[name].to_owned(), value)).collect();
        match detect(&variables, None, None) {
            Ok(place) => {
                prop_assert!(place.rank < place.size && place.size >= 2 && !place.host.is_empty());
                prop_assert!(place.local_rank.is_none_or(|local| local < place.size));
                prop_assert!(place.found.iter().all(|(name, value)| variables.get(name) == Some(value)));
            }
            Err(error) => {
                let text = error.to_string();
                let named = NAMES.iter().any(|name| text.contains(name)) || text.contains("--");
                prop_assert!(named, "{}", text);
            }
        }
    }

    /// Without one of its variables a launcher's word is not taken, and the missing one is named.
    #[test]
    fn a_missing_variable_is_named(which in 0..2usize) {
        let mut variables = variables(&TORCHRUN);
        let missing = ["RANK", "WORLD_SIZE"][which];
        variables.remove(missing);
        let error = detect(&variables, None, None).unwrap_err().to_string();
        let sentence = format!("{} is set but {missing} is not", ["WORLD_SIZE", "RANK"][which]);
        prop_assert!(error.contains(&sentence), "{}", error);
    }

    #[test]
    fn a_host_list_never_panics(list in ".{0,60}") {
        let _ = first_of(&list);
    }
}
