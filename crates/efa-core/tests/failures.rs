//! What a sender sees when its peer dies, refuses or falls silent: every operation ends or comes back from `close`, and
//! every lease with it.
//!
//! Peers that die are processes of their own: this test binary, run again with one test and a variable.

mod common;

use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use common::{Pair, bytes_of, pattern, shared, tcp, until};
use efa_core::{
    Completion, LeaseMut, Rail, RailAddress, RailConfig, RejectReason, Rejected, RemoteRegion, Write,
};

const ROLE: &str = "EFA_CORE_TEST_PEER";
const TARGET_BYTES: usize = 4 << 20;

/// A receiver in a process of its own.
struct Peer {
    process: Child,
    stdin: Option<ChildStdin>,
    /// Kept open: the harness of the other process prints until it ends.
    _stdout: BufReader<ChildStdout>,
    address: RailAddress,
    remote: RemoteRegion,
}

impl Peer {
    fn start() -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "peer_process", "--nocapture"])
            .env(ROLE, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(process.stdout.take().unwrap());
        // The test harness prints before its test does.
        let mut lines = (&mut stdout).lines().map(Result::unwrap);
        let hello = lines.find_map(|line| line.split_once("peer: ").map(|(_, hex)| hex.to_owned())).unwrap();
        let bytes: Vec<u8> = (0..hello.len() / 2)
            .map(|index| u8::from_str_radix(&hello[2 * index..2 * index + 2], 16).unwrap())
            .collect();
        let (address, remote) = postcard::from_bytes(&bytes).unwrap();
        let stdin = process.stdin.take();
        Self { process, stdin, _stdout: stdout, address, remote }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Not a test of its own: the receiver that other tests start. It serves until its standard input ends.
#[test]
fn peer_process() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let info = tcp().unwrap();
    let mut rail = Rail::open(&info, &RailConfig::for_info(&info)).unwrap();
    let target = LeaseMut::zeroed(TARGET_BYTES).unwrap().expose();
    let (_, remote) = rail.expose(&target).unwrap();
    let hello = postcard::to_stdvec(&(rail.address(), remote)).unwrap();
    let hex: String = hello.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("\npeer: {hex}");
    std::io::stdout().flush().unwrap();
    let waker = rail.waker();
    let ended = std::thread::spawn(move || {
        std::io::stdin().lines().for_each(drop);
        waker.wake();
    });
    while !ended.is_finished() {
        rail.poll(&mut Vec::new()).unwrap();
        rail.wait(common::PATIENCE).unwrap();
    }
}

/// A sender with a peer in another process, and a source as long as its target.
struct Sender {
    rail: Rail,
    source: (efa_core::Lease, efa_core::RegionId),
    to: efa_core::PeerId,
}

impl Sender {
    fn open(peer: &Peer) -> Self {
        let info = tcp().unwrap();
        let mut rail = Rail::open(&info, &RailConfig::for_info(&info)).unwrap();
        let lease = common::lease_of(&pattern(1, TARGET_BYTES));
        let region = rail.register(lease.memory()).unwrap();
        let to = rail.insert_peer(&peer.address).unwrap();
        Self { rail, source: (lease, region), to }
    }

    fn write(&self, remote: &RemoteRegion, token: u64, len: usize) -> Write {
        Write {
            from: self.source.0.slice(0..len).unwrap(),
            region: self.source.1,
            to: self.to,
            remote: remote.at(0, len as u64).unwrap(),
            immediate: None,
            delivery_complete: true,
            token,
        }
    }

    /// Posts writes until so many are in flight; what ends meanwhile goes to `done`.
    fn post(&mut self, remote: &RemoteRegion, count: usize, len: usize, done: &mut Vec<Completion>) {
        for token in 0..count as u64 {
            let mut write = Some(self.write(remote, token, len));
            until("the post", || match self.rail.write(write.take()?) {
                Ok(_) => Some(()),
                Err(Rejected { reason: RejectReason::Again, op }) => {
                    write = Some(op);
                    self.rail.poll(done).unwrap();
                    None
                }
                Err(rejected) => panic!("{rejected}"),
            });
        }
    }

    /// Everything is back: nobody else holds a part of the source.
    fn assert_whole(self) {
        drop(self.rail);
        assert!(self.source.0.thaw().is_ok(), "a lease is missing");
    }
}

/// Drops the leases that completions carry, counting successes and failures.
fn outcomes(done: &mut Vec<Completion>) -> (usize, Vec<efa_core::OpError>) {
    let (mut good, mut bad) = (0, Vec::new());
    for completion in done.drain(..) {
        match completion {
            Completion::Op { result: Ok(_), lease, .. } => {
                shared(lease);
                good += 1;
            }
            Completion::Op { result: Err(error), lease, .. } => {
                shared(lease);
                bad.push(*error);
            }
            other => panic!("{other:?}"),
        }
    }
    (good, bad)
}

#[test]
fn a_peer_in_another_process_is_written() {
    if tcp().is_none() {
        return;
    }
    let mut peer = Peer::start();
    let mut sender = Sender::open(&peer);
    let mut done = Vec::new();
    sender.post(&peer.remote, 20, 100_000, &mut done);
    until("all writes", || {
        sender.rail.poll(&mut done).unwrap();
        (done.len() == 20).then_some(())
    });
    assert_eq!(outcomes(&mut done).0, 20);
    peer.stdin = None;
    assert!(peer.process.wait().unwrap().success());
    sender.assert_whole();
}

#[test]
fn a_killed_peer_ends_every_write_in_error() {
    if tcp().is_none() {
        return;
    }
    let mut peer = Peer::start();
    let mut sender = Sender::open(&peer);
    let mut done = Vec::new();
    sender.post(&peer.remote, 1, 8, &mut done);
    until("the first write", || {
        sender.rail.poll(&mut done).unwrap();
        (done.len() == 1).then_some(())
    });
    assert_eq!(outcomes(&mut done).0, 1);
    // More than the socket takes, so most of it is in flight when the peer dies.
    sender.post(&peer.remote, 16, TARGET_BYTES, &mut done);
    peer.process.kill().unwrap();
    peer.process.wait().unwrap();
    until("the end of every write", || {
        sender.rail.poll(&mut done).unwrap();
        (sender.rail.in_flight() == 0).then_some(())
    });
    let (good, bad) = outcomes(&mut done);
    assert_eq!(good + bad.len(), 16);
    let error = bad.last().expect("the peer died before all was written").to_string();
    println!("{error}");
    assert!(error.contains("127.0.0.1") && error.contains("write") && error.contains("; "), "{error}");

    // The address is dead for ever: a write to it is refused, or ends in error, and never blocks the close.
    let write = sender.write(&peer.remote, 99, 8);
    if let Err(rejected) = sender.rail.write(write) {
        assert!(matches!(rejected.reason, RejectReason::Again), "{rejected}");
    }
    sender.assert_whole();
}

#[test]
fn a_silent_peer_keeps_writes_until_the_rail_is_closed() {
    if tcp().is_none() {
        return;
    }
    let peer = Peer::start();
    let mut sender = Sender::open(&peer);
    let mut done = Vec::new();
    sender.post(&peer.remote, 1, 8, &mut done);
    until("the first write", || {
        sender.rail.poll(&mut done).unwrap();
        (done.len() == 1).then_some(())
    });
    outcomes(&mut done);
    let stopped = Command::new("kill").args(["-STOP", &peer.process.id().to_string()]).status().unwrap();
    assert!(stopped.success());
    // More than two sockets' buffers hold.
    sender.post(&peer.remote, 16, TARGET_BYTES, &mut done);
    for _ in 0..1000 {
        sender.rail.poll(&mut done).unwrap();
    }
    let in_flight = sender.rail.in_flight();
    assert!(in_flight > 0, "a stopped peer takes nothing");
    assert!(sender.source.0.clone().thaw().is_err(), "the rail owns what is in flight");
    let held = sender.rail.close().unwrap();
    assert_eq!(held.len(), in_flight);
    drop(held);
    outcomes(&mut done);
    assert!(sender.source.0.thaw().is_ok());
}

#[test]
fn a_bad_key_or_range_changes_nothing_at_the_peer() {
    let Some(info) = tcp() else { return };
    let forge = |change: &dyn Fn(&mut RemoteRegion)| {
        let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
        let source = pair.source(&[7; 64]);
        let (target, _, mut remote) = pair.target(64);
        change(&mut remote);
        let write = Write {
            from: source.0.clone(),
            region: source.1,
            to: pair.to,
            remote: remote.at(remote.len - 64, 64).unwrap(),
            immediate: Some(1),
            delivery_complete: true,
            token: 0,
        };
        pair.write(write);
        let (mut ours, theirs) = pair.collect(1, 0);
        let (good, bad) = outcomes(&mut ours);
        assert_eq!((good, bad.len()), (0, 1));
        assert!(
            theirs.iter().all(|completion| !matches!(completion, Completion::Immediate { .. })),
            "{theirs:?}"
        );
        assert_eq!(bytes_of(&target), [0; 64]);
        assert!(source.0.thaw().is_ok());
    };
    forge(&|remote| remote.key ^= 1);
    forge(&|remote| remote.len = 65);
    forge(&|remote| remote.len = 1 << 40);
}

#[test]
fn a_hidden_region_refuses_writes() {
    let Some(info) = tcp() else { return };
    let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
    let source = pair.source(&[7; 64]);
    let (target, region, remote) = pair.target(64);
    pair.receiver.close_region(region).unwrap();
    let write = Write {
        from: source.0.clone(),
        region: source.1,
        to: pair.to,
        remote: remote.at(0, 64).unwrap(),
        immediate: None,
        delivery_complete: true,
        token: 0,
    };
    pair.write(write);
    let (mut ours, _) = pair.collect(1, 0);
    assert_eq!(outcomes(&mut ours).0, 0);
    assert_eq!(bytes_of(&target), [0; 64]);
}

#[test]
fn shared_bytes_cannot_be_written() {
    let Some(info) = tcp() else { return };
    let pair = &mut Pair::open(&info, &RailConfig::for_info(&info));
    let source = pair.source(&[7; 64]);
    let frozen = common::lease_of(&[1; 64]);
    let (_, remote) = pair.receiver.share(&frozen).unwrap();
    let write = Write {
        from: source.0.clone(),
        region: source.1,
        to: pair.to,
        remote: remote.at(0, 64).unwrap(),
        immediate: None,
        delivery_complete: true,
        token: 0,
    };
    pair.write(write);
    let (mut ours, _) = pair.collect(1, 0);
    assert_eq!(outcomes(&mut ours).0, 0);
    assert_eq!(frozen.bytes(), [1; 64]);
}
