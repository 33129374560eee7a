//! Every rank of made-up hosts, for every number of ranks: there are few enough to try them all.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::*;

#[allow(unreachable_pub)] // the fixtures of another crate's tests
#[path = "../../../../topology/tests/common/dumps.rs"]
mod dumps;

/// Where ranks stop having a core each on the hosts here.
const CORES: u32 = 16;

fn p5(switches: u32) -> Snapshot {
    Snapshot::from_xml(&dumps::hwloc_p5(switches)).unwrap()
}

/// GPUs and ConnectX NICs on the only host bridge of a virtual machine, whose kernel names no node.
fn virtual_machine(gpus: u32, nics: u32) -> Snapshot {
    let mut text = String::from("<system version=\"1\"><cpu numaid=\"-1\" affinity=\"0000ffff\">");
    for gpu in 0..gpus {
        let ids = "class=\"0x030200\" vendor=\"0x10de\" device=\"0x2330\"";
        write!(text, "<pci busid=\"0000:{:02x}:00.0\" {ids}/>", gpu + 1).unwrap();
    }
    for nic in 0..nics {
        write!(
            text,
            "<pci busid=\"0000:{:02x}:00.0\" class=\"0x020700\" vendor=\"0x15b3\" device=\"0x101e\"><nic>\
             <net name=\"mlx5_{nic}\" speed=\"200000\" port=\"1\"/></nic></pci>",
            nic + 0x40
        )
        .unwrap();
    }
    Snapshot::from_xml(&(text + "</cpu></system>")).unwrap()
}

/// What libfabric offers for every RDMA device.
fn offered(snapshot: &Snapshot, provider: Provider) -> Vec<String> {
    let suffix = if provider == Provider::Efa { "-rdm" } else { "" };
    snapshot.rdma_devices.iter().map(|device| format!("{}{suffix}", device.name)).collect()
}

fn all_ranks(snapshot: &Snapshot, provider: Provider, count: u32) -> Vec<Place> {
    let offered = offered(snapshot, provider);
    let offered: Vec<&str> = offered.iter().map(String::as_str).collect();
    let place = |index| choose(snapshot, LocalRank { index, count }, provider, &offered).unwrap().unwrap();
    (0..count).map(place).collect()
}

#[test]
fn a_rank_for_each_gpu_of_a_p5_has_its_four_nics() {
    let ranks = all_ranks(&p5(4), Provider::Efa, 8);
    assert_eq!(ranks[0].nics, ["rdmap19s0-rdm", "rdmap20s0-rdm", "rdmap21s0-rdm", "rdmap22s0-rdm"]);
    assert_eq!(ranks[7].nics, ["rdmap131s0-rdm", "rdmap132s0-rdm", "rdmap133s0-rdm", "rdmap134s0-rdm"]);
    for (rank, place) in ranks.iter().enumerate() {
        assert_eq!(place.reason, Reason::SameSwitch);
        let cpu = place.cpu.unwrap();
        assert_eq!(cpu / 8, rank / 4, "CPU {cpu} is on the node of GPU {rank}");
    }
}

#[test]
fn two_ranks_of_a_p4d_share_a_nic_and_no_core() {
    let ranks = all_ranks(&Snapshot::from_xml(&dumps::nccl_p4d()).unwrap(), Provider::Efa, 8);
    for pair in ranks.chunks(2) {
        assert_eq!((&pair[0].nics, pair[0].nics.len()), (&pair[1].nics, 1));
        assert_ne!(pair[0].cpu, pair[1].cpu);
    }
}

#[test]
fn a_virtual_machine_is_cut_by_order_and_says_so() {
    let ranks = all_ranks(&virtual_machine(2, 4), Provider::Verbs, 2);
    assert_eq!([&ranks[0].nics[..], &ranks[1].nics[..]], [["mlx5_0", "mlx5_1"], ["mlx5_2", "mlx5_3"]]);
    assert!(ranks.iter().all(|place| place.reason == Reason::ByOrder && place.numa_node.is_none()));
}

#[test]
fn no_nic_is_idle_and_no_core_is_shared() {
    let hosts = [
        (p5(1), Provider::Efa),
        (p5(4), Provider::Efa),
        (Snapshot::from_xml(&dumps::nccl_p4d()).unwrap(), Provider::Efa),
        (virtual_machine(0, 1), Provider::Verbs),
        (virtual_machine(0, 5), Provider::Verbs),
        (virtual_machine(4, 6), Provider::Verbs),
    ];
    for (host, provider) in hosts {
        for count in 1..=3 * CORES {
            let ranks = all_ranks(&host, provider, count);
            let used: BTreeSet<&str> =
                ranks.iter().flat_map(|place| &place.nics).map(String::as_str).collect();
            let offered = offered(&host, provider);
            assert_eq!(used, offered.iter().map(String::as_str).collect(), "{count} ranks");
            let cpus: Vec<usize> = ranks.iter().filter_map(|place| place.cpu).collect();
            assert_eq!(BTreeSet::from_iter(&cpus).len(), cpus.len(), "{count} ranks, CPUs {cpus:?}");
            if count <= CORES {
                assert_eq!(cpus.len(), count as usize, "{count} ranks");
            }
        }
    }
}

#[test]
fn a_nic_that_libfabric_lacks_is_named() {
    let host = p5(1);
    let all = offered(&host, Provider::Efa);
    for missing in &all {
        let offered: Vec<&str> = all.iter().filter(|name| *name != missing).map(String::as_str).collect();
        let chosen = |index| choose(&host, LocalRank { index, count: 2 }, Provider::Efa, &offered);
        let device = missing.strip_suffix("-rdm").unwrap();
        let failed: Vec<String> =
            [chosen(0), chosen(1)].into_iter().filter_map(|place| Some(place.err()?.to_string())).collect();
        assert!(matches!(&failed[..], [error] if error.starts_with(device)), "{failed:?}");
    }
}

#[test]
fn only_the_nics_of_the_provider_count() {
    let mut host = p5(1);
    assert_eq!(choose(&host, LocalRank { index: 0, count: 1 }, Provider::Verbs, &["mlx5_0"]).unwrap(), None);
    host.rdma_devices.extend(virtual_machine(0, 2).rdma_devices);
    let nics = |provider| all_ranks(&host, provider, 1).remove(0).nics;
    assert_eq!(nics(Provider::Verbs), ["mlx5_0", "mlx5_1"]);
    assert_eq!(nics(Provider::Efa).len(), 8);
}

#[test]
fn ranks_that_no_host_has_are_refused() {
    for (index, count) in [(0, 0), (8, 8), (9, 8), (0, LOCAL_RANKS_MAX + 1), (u32::MAX, u32::MAX)] {
        assert!(LocalRank::new(index, count).is_err(), "{index} of {count}");
    }
    assert!(LocalRank::new(7, 8).is_ok());
}

#[test]
fn other_fabrics_and_named_nics_stay_as_they_are() {
    let mut config = SessionConfig::new("127.0.0.1:1", rendezvous::World { trainers: 1, inference: 1 }, 0);
    config.fabric = Fabric::Tcp;
    config.place(0, 2).unwrap();
    config.fabric = Fabric::Efa;
    config.nics = vec!["rdmap0s6-rdm".into()];
    config.place(1, 2).unwrap();
    assert_eq!((config.nics.len(), config.cpus.len()), (1, 0));
    assert!(config.place(2, 2).is_err());
}
