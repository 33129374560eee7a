//! Which links the bytes take, and what becomes of a push when a link fails.

use std::thread::sleep;
use std::time::Duration;

use weightsync_lab::{Lab, LabOptions, Side};

use crate::common::job::listening_at;
use crate::common::tiny;
use crate::{Bed, GivenUp, Summary, medium};

/// The links of most tests, and a rate that lets a version take most of a second. WRITEs have to be short then (`--chunk`):
/// a rail that takes longer for one than it may stall looks like a dead one.
fn slow_links() -> LabOptions {
    LabOptions { links: 4, rate_bits: 50_000_000, ..LabOptions::default() }
}

/// Into a version that has just begun.
const INTO_A_VERSION: Duration = Duration::from_millis(300);

/// Bytes that a side has sent by a NIC.
fn sent(lab: &Lab, side: Side, nic: &str) -> u64 {
    let mut read = lab.command(side, "cat");
    let output = read.arg(format!("/sys/class/net/{nic}/statistics/tx_bytes")).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// Every byte goes by the links, all of which are used.
fn weights_go_over(links: u16, ranks: (u32, u32)) {
    let options = LabOptions { links, rate_bits: 1_000_000_000, ..LabOptions::default() };
    let Some(bed) = Bed::up(&format!("bytes{links}"), tiny, options) else { return };
    let summary = Summary::of(bed.demo(ranks, 10, "--steps 3 --chunk 16 --json").finish(), 3);
    let pushed: u64 = summary.rails().iter().map(|(_, bytes, _)| bytes).sum();
    let by_link: Vec<u64> = (0..links).map(|link| sent(&bed.lab, Side::A, &Lab::device(link))).collect();
    assert!(by_link.iter().sum::<u64>() > pushed, "{pushed} pushed, sent by link {by_link:?}");
    let least = pushed / u64::from(links) / 4;
    assert!(by_link.iter().all(|sent| *sent > least), "{pushed} pushed, sent by link {by_link:?}");
    let control = sent(&bed.lab, Side::A, "control");
    assert!(control < pushed / 4, "{pushed} pushed, {control} on the control link");
    bed.job.end();
}

#[test]
fn weights_go_over_one_shaped_link() {
    weights_go_over(1, (2, 2));
}

#[test]
fn weights_go_over_four_shaped_links() {
    weights_go_over(4, (2, 2));
}

#[test]
fn weights_go_over_more_links_than_cores() {
    weights_go_over(16, (1, 1));
}

#[test]
fn a_slow_nic_carries_less_than_the_others() {
    let Some(bed) = Bed::up("slow", medium, LabOptions { slow: vec![(2, 12_500_000)], ..slow_links() })
    else {
        return;
    };
    let summary = Summary::of(bed.demo((1, 1), 20, "--steps 3 --chunk 64 --json").finish(), 3);
    let rails = summary.rails();
    let ((slow, slow_bytes, _), others): (&_, Vec<_>) =
        (&rails[2], rails.iter().filter(|(name, ..)| !name.contains("(rail2)")).collect());
    assert!(slow.contains("(rail2)") && others.len() == 3, "{rails:?}");
    assert!(*slow_bytes > 0 && others.iter().all(|(_, bytes, _)| bytes > slow_bytes), "{rails:?}");
    assert!(summary.given_up().is_empty(), "{:?}", summary.given_up());
    bed.job.end();
}

#[test]
fn a_nic_that_is_pulled_out_in_the_middle_is_given_up_by_name() {
    let Some(bed) = Bed::up("pulled", medium, slow_links()) else { return };
    let mut demo = bed.demo((1, 1), 5, "--steps 4 --chunk 64 --json");
    demo.wait_for("version 1: every byte verified");
    sleep(INTO_A_VERSION);
    bed.lab.delete_link(2).unwrap();
    let told = demo.wait_for("gave up");
    assert!(told.contains("WARN") && told.contains("(rail2)"), "{told}");
    let summary = Summary::of(demo.finish(), 4);
    let given_up = summary.given_up();
    let [GivenUp { rank, rail, to, version: 2..=4, reason }] = &given_up[..] else { panic!("{given_up:?}") };
    assert_eq!((rank.as_str(), to.as_str()), ("trainer 0", ""));
    assert!(rail.contains("(rail2)") && reason.contains("inference 0"), "{given_up:?}");
    bed.job.end();
}

/// With two ranks on each side, one rail of each trainer leads to inference rank 1 by link 2. Who gives its rail up has
/// the other ends closed, so that nothing late arrives when the link is back; the other trainer's writes then fail there.
#[test]
fn a_link_that_comes_back_after_it_was_given_up_tears_nothing() {
    let Some(bed) = Bed::up("back", medium, slow_links()) else { return };
    let mut demo = bed.demo((2, 2), 5, "--steps 5 --chunk 64");
    demo.wait_for("version 1: every byte verified");
    sleep(INTO_A_VERSION);
    bed.lab.set_link(Side::B, 2, false).unwrap();
    demo.wait_for("gave up");
    bed.lab.set_link(Side::B, 2, true).unwrap();
    let output = demo.finish().succeeds();
    assert!(output.stdout.contains("verified: 5 versions on 2 inference ranks"), "{output}");
    let told: Vec<&str> = output.stdout.lines().filter(|line| line.starts_with("rail given up: ")).collect();
    for trainer in ["trainer 0: ", "trainer 1: "] {
        let own: Vec<_> = told.iter().filter(|line| line.contains(trainer)).collect();
        assert!(own.iter().any(|line| line.contains("inference 1")), "{told:?}");
        let mut rails: Vec<_> =
            own.iter().filter_map(|line| line.split("(rail").nth(1)?.chars().next()).collect();
        rails.dedup();
        assert_eq!(rails.len(), 1, "its other rail leads over sound links: {told:?}");
    }
    bed.job.end();
}

#[test]
fn a_link_that_flaps_loses_and_doubles_nothing() {
    let Some(bed) = Bed::up("flaps", medium, slow_links()) else { return };
    // So long a deadline that no outage here is a stall: retransmissions carry on where they were.
    let mut demo = bed.demo((1, 1), 60, "--steps 6 --chunk 64 --json");
    demo.wait_for("version 1: every byte verified");
    for outage_ms in [50, 200, 80, 120, 50, 180, 60, 100, 150, 90] {
        bed.lab.set_link(Side::B, 2, false).unwrap();
        sleep(Duration::from_millis(outage_ms));
        bed.lab.set_link(Side::B, 2, true).unwrap();
        sleep(Duration::from_millis(outage_ms));
    }
    let summary = Summary::of(demo.finish(), 6);
    assert!(summary.given_up().is_empty(), "{:?}", summary.given_up());
    bed.job.end();
}

/// What a trainer says that nobody but a person listens to.
#[test]
fn a_trainer_by_itself_says_once_which_rail_it_gave_up() {
    let Some(bed) = Bed::up("words", medium, slow_links()) else { return };
    let control = Lab::control_address(Side::A);
    let start = |side, arguments: &str| {
        let arguments = format!("{arguments} --trainers 1 --inference 1 --deadline 5");
        bed.job.spawn(bed.command(side, &arguments).env("WEIGHTSYNC_SECRET", "of this test alone"))
    };
    let mut controller = start(Side::A, &format!("controller --listen {control}:0 --chunk 64 --json"));
    let rank = format!(
        "--controller {} --rank 0 --fabric tcp --nic {} --checkpoint {}",
        listening_at(&mut controller),
        bed.nics(),
        bed.checkpoint.path().display()
    );
    let serve = start(Side::B, &format!("serve {rank} --verify"));
    let mut push = start(Side::A, &format!("push {rank} --steps 4"));
    push.wait_for("version 1 committed");
    sleep(INTO_A_VERSION);
    bed.lab.delete_link(2).unwrap();
    let pushed = push.finish().succeeds();
    let told: Vec<_> =
        pushed.stdout.lines().filter(|line| line.starts_with("rail given up: tcp://")).collect();
    let [told] = told[..] else { panic!("{pushed}") };
    assert!(told.contains("(rail2), in version ") && told.contains(": inference 0 took none of "), "{told}");
    assert!(pushed.stderr.contains("WARN") && pushed.stderr.contains("(rail2)"), "{pushed}");
    let served = serve.finish().succeeds();
    assert!(served.stdout.contains("verified version 4"), "{served}");
    controller.finish().succeeds();
    bed.job.end();
}

/// The only link of a job that goes on after losses: what was a connection over it is dead for good.
#[test]
fn the_last_link_is_used_again_when_it_is_back() {
    let options = LabOptions { links: 1, rate_bits: 200_000_000, ..LabOptions::default() };
    let Some(bed) = Bed::up("last", medium, options) else { return };
    let control = Lab::control_address(Side::A);
    let start = |side, arguments: &str| {
        let arguments = format!("{arguments} --trainers 1 --inference 1 --deadline 3");
        bed.job.spawn(bed.command(side, &arguments).env("WEIGHTSYNC_SECRET", "of this test alone"))
    };
    let mut controller =
        start(Side::A, &format!("controller --listen {control}:0 --chunk 64 --on-loss wait --json"));
    let rank = format!(
        "--controller {} --rank 0 --fabric tcp --nic {} --checkpoint {}",
        listening_at(&mut controller),
        bed.nics(),
        bed.checkpoint.path().display()
    );
    let serve = start(Side::B, &format!("serve {rank} --verify"));
    let mut push = start(Side::A, &format!("push {rank} --steps 4 --retries 1000000"));
    push.wait_for("version 1 committed");
    sleep(INTO_A_VERSION);
    let address = format!("{}/24", Lab::address(Side::A, 0));
    for verb in ["del", "add"] {
        let mut ip = bed.lab.command(Side::A, "ip");
        assert!(ip.args(["address", verb, &address, "dev", &Lab::device(0)]).status().unwrap().success());
        // Longer than the trainer waits for a write.
        sleep(Duration::from_secs(2));
    }
    push.finish().succeeds();
    let served = serve.finish().succeeds();
    assert!(served.stdout.contains("verified version 4"), "{served}");
    controller.finish().succeeds();
    bed.job.end();
}

/// A link that does not lead to the receiver from the start: nothing is pushed, and the NIC is named.
fn is_refused(name: &str, side: Side, how: &[&str], words: &[&str]) {
    let Some(bed) = Bed::up(name, tiny, slow_links()) else { return };
    let status = bed.lab.command(side, "ip").args(how).status().unwrap();
    assert!(status.success(), "{how:?}");
    let refused = bed.demo((1, 1), 4, "--steps 2").finish().fails(1, words);
    assert!(!refused.stderr.contains("version 1"), "{refused}");
    bed.job.end();
}

#[test]
fn a_receiver_whose_nic_has_no_address_is_refused() {
    is_refused("noaddress", Side::B, &["addr", "flush", "dev", "rail2"], &["inference 0", "'rail2'"]);
}

#[test]
fn a_rail_without_a_route_is_refused() {
    let words = ["trainer 0", "(rail2)", "inference 0"];
    is_refused("noroute", Side::A, &["route", "del", "10.0.2.0/24"], &words);
}

#[test]
fn a_rail_whose_packets_are_not_answered_is_refused() {
    let words = ["trainer 0", "(rail2)", "inference 0 took no write"];
    is_refused("silent", Side::B, &["route", "add", "blackhole", "10.0.2.1/32"], &words);
}
