//! Descriptions: what is written is read again, and what cannot be is refused by the name of its field.

use proptest::prelude::*;
use serde_json::Value;
use xfer_sim::{Cluster, ClusterError, NicId, Preset, Racks};

fn example() -> Cluster {
    let mut cluster = Preset::P5.cluster(12, 8);
    cluster.racks = Some(Racks { hosts: 2, uplink_bytes_per_second: 100_000_000_000 });
    cluster
}

/// The paths of all numbers, as JSON pointers.
fn numbers(at: &str, value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| numbers(&format!("{at}/{name}"), value, found))
        }
        Value::Number(_) => found.push(at.to_owned()),
        _ => {}
    }
}

fn with(pointer: &str, number: u64) -> Cluster {
    let mut value = serde_json::to_value(example()).unwrap();
    *value.pointer_mut(pointer).unwrap() = number.into();
    serde_json::from_value(value).unwrap()
}

#[test]
fn presets_are_sound_and_are_found_by_their_names() {
    for preset in Preset::ALL {
        assert_eq!(preset.name().parse(), Ok(preset));
        for (trainers, receivers) in [(0, 0), (1, 1), (256, 128), (9, 17)] {
            let cluster = preset.cluster(trainers, receivers);
            assert_eq!(cluster.check(), Ok(()), "{preset}");
            let json = serde_json::to_string(&cluster).unwrap();
            assert_eq!(serde_json::from_str::<Cluster>(&json).unwrap(), cluster);
        }
    }
    assert!("p5".parse::<Preset>().unwrap_err().to_string().contains("p5.48xlarge"));
}

#[test]
fn every_number_has_a_range_and_is_named_when_it_leaves_it() {
    let mut pointers = vec![];
    numbers("", &serde_json::to_value(example()).unwrap(), &mut pointers);
    assert_eq!(pointers.len(), 22, "{pointers:?}");
    let mut may_be_zero = vec![];
    for pointer in pointers {
        let name = pointer[1..].replace('/', ".");
        match with(&pointer, 0).check() {
            Ok(()) => may_be_zero.push(name.clone()),
            Err(ClusterError::Zero { field }) => assert_eq!(field, name),
            Err(other) => panic!("{name} = 0: {other}"),
        }
        let max = if matches!(name.as_str(), "nic.queue_depth") { continue } else { u64::from(u32::MAX) };
        let large =
            if name.ends_with("_per_second") || name.ends_with("_nanoseconds") { u64::MAX } else { max };
        match with(&pointer, large).check() {
            Err(ClusterError::TooLarge { field, value, .. }) => assert_eq!((field, value), (&*name, large)),
            other => panic!("{name} = {large}: {other:?}"),
        }
    }
    let delays = |name: &String| name.ends_with("_nanoseconds");
    may_be_zero.retain(|name| !delays(name));
    assert_eq!(may_be_zero, ["nic.packet_header_bytes", "receivers", "trainers"]);
}

#[test]
fn unknown_fields_are_refused() {
    for pointer in ["", "/host", "/host/gpu", "/nic", "/racks", "/control"] {
        let mut value = serde_json::to_value(example()).unwrap();
        value.pointer_mut(pointer).unwrap()["spare"] = 1.into();
        let error = serde_json::from_value::<Cluster>(value).unwrap_err().to_string();
        assert!(error.contains("spare"), "{pointer}: {error}");
    }
}

#[test]
fn ranks_need_gpus_and_gpus_need_nics() {
    let mut cluster = example();
    assert_eq!(cluster.hosts, 3, "trainers and receivers share no host");
    cluster.hosts = 2;
    let message = cluster.check().unwrap_err().to_string();
    assert!(message.starts_with("hosts is 2") && message.contains("12 trainers"), "{message}");

    let gpu_nics = |listed: Vec<Vec<u32>>| {
        let mut cluster = Preset::H100Ib400.cluster(2, 2);
        (cluster.hosts, cluster.host.gpus, cluster.host.nics) = (2, 2, 3);
        cluster.host.gpu_nics = Some(listed);
        cluster.check().map(|()| cluster)
    };
    assert_eq!(gpu_nics(vec![vec![0]]), Err(ClusterError::WrongGpuCount { listed: 1, gpus: 2 }));
    assert_eq!(gpu_nics(vec![vec![0], vec![]]), Err(ClusterError::NoNic { gpu: 1 }));
    assert_eq!(gpu_nics(vec![vec![0], vec![3]]), Err(ClusterError::NoSuchNic { gpu: 1, nic: 3, nics: 3 }));
    assert_eq!(gpu_nics(vec![vec![0], vec![1, 2, 1]]), Err(ClusterError::NicTwice { gpu: 1, nic: 1 }));
    let cluster = gpu_nics(vec![vec![2], vec![0, 1]]).unwrap();
    let second_host = cluster.receiver_gpu(0).unwrap();
    assert_eq!(cluster.nics_of(second_host), [NicId(5)]);
}

proptest! {
    #[test]
    fn every_rank_has_a_gpu_of_its_own_with_nics_of_its_host(
        trainers in 0..40_u32, receivers in 0..40_u32, gpus in 1..9_u32, nics in 1..17_u32,
    ) {
        let mut cluster = Preset::P5.cluster(trainers, receivers);
        (cluster.host.gpus, cluster.host.nics) = (gpus, nics);
        cluster.hosts = (trainers.div_ceil(gpus) + receivers.div_ceil(gpus)).max(1);
        prop_assert_eq!(cluster.check(), Ok(()));
        let trained = (0..trainers).map(|rank| cluster.trainer_gpu(rank).unwrap());
        let placed: Vec<_> = trained.chain((0..receivers).map(|rank| cluster.receiver_gpu(rank).unwrap())).collect();
        prop_assert!(placed.is_sorted_by(|a, b| a < b));
        prop_assert!(cluster.trainer_gpu(trainers).is_none() && cluster.receiver_gpu(receivers).is_none());
        let mut uses = vec![0_u32; cluster.nics() as usize];
        for gpu in (0..cluster.gpus()).map(xfer_sim::GpuId) {
            let used = cluster.nics_of(gpu);
            prop_assert!(!used.is_empty());
            for nic in used {
                prop_assert_eq!(nic.0 / nics, gpu.0 / gpus);
                uses[nic.0 as usize] += 1;
            }
        }
        // No NIC is idle, and none is used by more than its part.
        let (least, most) = (uses.iter().min().unwrap(), uses.iter().max().unwrap());
        prop_assert!(*least >= 1 && *most <= gpus.div_ceil(nics).max(2), "{:?}", uses);
    }
}
