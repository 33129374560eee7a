//! Two rails that talk over loopback, and a deadline for everything.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::time::{Duration, Instant};

use efa_core::{
    Completion, Held, Hints, Info, Lease, LeaseMut, Library, PeerId, Provider, Rail, RailConfig, RegionId,
    RejectReason, Rejected, RemoteRegion, Source, Target, Write,
};

/// No test waits longer for anything; a machine under load needs a few hundred milliseconds.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The library, or `None` after saying that the test is skipped. One that was asked for by name must be there.
pub(crate) fn library() -> Option<Library> {
    match Library::open() {
        Ok(library) => Some(library),
        Err(error) => {
            assert!(std::env::var_os("LIBFABRIC_SO").is_none(), "{error}");
            println!("skipped: {error}");
            None
        }
    }
}

/// What the provider offers on loopback, or `None` after saying that the test is skipped.
pub(crate) fn info(provider: Provider) -> Option<Info> {
    let mut hints = Hints::new(provider);
    if provider != Provider::Shm {
        hints = hints.source([127, 0, 0, 1].into());
    }
    match library()?.infos(&hints) {
        Ok(mut infos) => Some(infos.swap_remove(0)),
        Err(error) => {
            println!("skipped: {error}");
            None
        }
    }
}

/// Whatever carries rails over plain TCP in this version.
pub(crate) fn tcp() -> Option<Info> {
    info(library()?.tcp_provider())
}

/// Runs `step` until it answers.
pub(crate) fn until<T>(what: &str, mut step: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = step() {
            return answer;
        }
        assert!(start.elapsed() < PATIENCE, "nothing within {PATIENCE:?}: {what}");
    }
}

/// A sender and a receiver, polled by one thread.
pub(crate) struct Pair {
    pub(crate) sender: Rail,
    pub(crate) receiver: Rail,
    /// The receiver, as the sender knows it.
    pub(crate) to: PeerId,
}

impl Pair {
    pub(crate) fn open(info: &Info, config: &RailConfig) -> Self {
        let mut sender = Rail::open(info, config).unwrap();
        let receiver = Rail::open(info, config).unwrap();
        let to = sender.insert_peer(receiver.address()).unwrap();
        Self { sender, receiver, to }
    }

    /// Polls both ends once.
    pub(crate) fn poll_into(&mut self, ours: &mut Vec<Completion>, theirs: &mut Vec<Completion>) {
        self.sender.poll(ours).unwrap();
        self.receiver.poll(theirs).unwrap();
    }

    /// Posts a write, polling both ends while the provider asks for patience. Nothing else may end meanwhile.
    pub(crate) fn write<S: Source>(&mut self, write: Write<S>) {
        let mut write = Some(write);
        until("the post", || match self.sender.write(write.take()?) {
            Ok(_) => Some(()),
            Err(Rejected { reason: RejectReason::Again, op }) => {
                write = Some(op);
                let (mut ours, mut theirs) = (Vec::new(), Vec::new());
                self.poll_into(&mut ours, &mut theirs);
                assert!(ours.is_empty() && theirs.is_empty(), "{ours:?} {theirs:?}");
                None
            }
            Err(rejected) => panic!("{rejected}"),
        });
    }

    /// Polls both ends until the sender and the receiver have seen so many completions.
    pub(crate) fn collect(
        &mut self,
        ours_wanted: usize,
        theirs_wanted: usize,
    ) -> (Vec<Completion>, Vec<Completion>) {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        until("completions", || {
            self.poll_into(&mut ours, &mut theirs);
            (ours.len() >= ours_wanted && theirs.len() >= theirs_wanted).then_some(())
        });
        (ours, theirs)
    }

    /// A source of these bytes, registered at the sender.
    pub(crate) fn source(&mut self, bytes: &[u8]) -> (Lease, RegionId) {
        let lease = lease_of(bytes);
        let region = self.sender.register(lease.memory()).unwrap();
        (lease, region)
    }

    /// A target of so many zeros, exposed by the receiver.
    pub(crate) fn target(&mut self, len: usize) -> (Target, RegionId, RemoteRegion) {
        let target = LeaseMut::zeroed(len).unwrap().expose();
        let (region, remote) = self.receiver.expose(&target).unwrap();
        (target, region, remote)
    }
}

pub(crate) fn lease_of(bytes: &[u8]) -> Lease {
    let mut lease = LeaseMut::zeroed(bytes.len()).unwrap();
    lease.bytes_mut().copy_from_slice(bytes);
    lease.freeze()
}

pub(crate) fn bytes_of(target: &Target) -> Vec<u8> {
    let mut bytes = vec![0; target.len()];
    target.read(0, &mut bytes).unwrap();
    bytes
}

/// Bytes that differ from place to place.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        })
        .collect()
}

pub(crate) fn shared(held: Held) -> Lease {
    held.shared().expect("the buffer of a write or send")
}

pub(crate) fn unique(held: Held) -> LeaseMut {
    held.unique().expect("the buffer of a read or receive")
}
