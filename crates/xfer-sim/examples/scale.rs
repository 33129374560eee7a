//! How many transfers a second are simulated: every NIC of every trainer writes to receivers in an order of its own,
//! messages of uneven lengths, with a fixed number of them under way. Nothing is in step, so nearly every end of a message
//! changes rates.
//!
//! `cargo run --release -p xfer-sim --example scale -- [trainers] [receivers] [messages] [bytes] [depth] [tolerance]
//! [hosts of a rack]`. Racks have uplinks of half of what their NICs could send; without them the fabric is non-blocking.

use std::error::Error;
use std::time::Instant;

use xfer_sim::{Network, NicId, Preset, Racks, Time, Way};

/// Messages to one receiver before the next one's turn.
const TURN: u64 = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let mut whole = |default: u64| args.next().map_or(Ok(default), |text| text.parse());
    let (trainers, receivers) = (whole(256)? as u32, whole(128)? as u32);
    let (messages, bytes, depth) = (whole(1_000_000)?, whole(1 << 20)?, whole(16)?);
    let tolerance: f64 = args.next().map_or(Ok(0.02), |text| text.parse())?;

    let racks: u32 = args.next().map_or(Ok(0), |text| text.parse())?;

    let mut cluster = Preset::P5.cluster(trainers, receivers);
    let uplink_bytes_per_second = u64::from(racks * cluster.host.nics) * cluster.nic.bytes_per_second / 2;
    cluster.racks = (racks > 0).then_some(Racks { hosts: racks, uplink_bytes_per_second });
    let mut network = Network::new(&cluster, tolerance, 1)?;
    let targets: Vec<Vec<NicId>> = (0..receivers)
        .filter_map(|rank| cluster.receiver_gpu(rank))
        .map(|gpu| cluster.nics_of(gpu))
        .collect();
    let gpus = (0..trainers).filter_map(|rank| cluster.trainer_gpu(rank));
    let mut senders: Vec<Sender> = gpus
        .flat_map(|gpu| (0..).zip(cluster.nics_of(gpu)))
        .map(|(rail, nic)| Sender { nic, rail, sent: 0 })
        .collect();
    let each = messages / senders.len() as u64;

    let start = Instant::now();
    for (place, sender) in senders.iter_mut().enumerate() {
        for _ in 0..depth.min(each) {
            sender.send(&mut network, place, &targets, bytes)?;
        }
    }
    let (mut done, mut over, mut calls) = (Vec::new(), 0_u64, 0_u64);
    while let Some(next) = network.next_time() {
        network.advance(next, &mut done);
        calls += 1;
        for ended in done.drain(..) {
            over += 1;
            let place = ended.tag as usize;
            if senders[place].sent < each {
                senders[place].send(&mut network, place, &targets, bytes)?;
            }
        }
    }
    let wall = start.elapsed().as_secs_f64();
    // Evenly spread, which random targets are not quite: no schedule is faster.
    let received = over as f64 * cluster.nic.wire_bytes(bytes) as f64;
    let bound = received / (f64::from(receivers) * 4.0) / cluster.nic.bytes_per_second as f64;
    println!(
        "{over} messages of {bytes} bytes, {} NICs to {}, tolerance {tolerance}",
        senders.len(),
        4 * receivers
    );
    println!("simulated {:.3} ms, bound {:.3} ms", seconds(network.now()) * 1e3, bound * 1e3);
    println!(
        "{wall:.1} s of wall time: {:.0} messages/s, {:.0} calls/s",
        over as f64 / wall,
        calls as f64 / wall
    );
    println!("{}", memory());
    Ok(())
}

/// A NIC and what it has sent.
struct Sender {
    nic: NicId,
    rail: usize,
    sent: u64,
}

impl Sender {
    fn send(
        &mut self,
        network: &mut Network,
        tag: usize,
        targets: &[Vec<NicId>],
        bytes: u64,
    ) -> Result<(), Box<dyn Error>> {
        let turn = mixed((u64::from(self.nic.0) << 32) | (self.sent / TURN));
        let to = targets[turn as usize % targets.len()][self.rail];
        let length = bytes / 2 + mixed((u64::from(self.nic.0) << 32) | self.sent) % bytes.max(1);
        self.sent += 1;
        network.start(network.now(), Way::Nic { from: self.nic, to }, length, tag as u64)?;
        Ok(())
    }
}

/// A word that looks random: the finaliser of SplitMix64.
fn mixed(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn seconds(time: Time) -> f64 {
    time.since(Time::ZERO).as_secs_f64()
}

/// The most memory that this process has had, where Linux tells.
fn memory() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM"));
    line.unwrap_or("memory unknown").to_owned()
}
