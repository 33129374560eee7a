//! Telling receivers of this host what has arrived, WRITE by WRITE, by its tag.
//!
//! The bytes are there before the tag is. Nobody ever waits: a receiver that does not listen holds back the WRITEs to it alone, as
//! far as the rail's depth allows others beside them.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SendFlags, send};
use xfer_plan::{NO_TAG, ReceiverRank};

use crate::arrivals::TAGS_MAX;
use crate::program::WriteId;
use crate::rail::Done;

/// Where to say what has arrived at a receiver of this host.
#[derive(Debug)]
pub(crate) struct Teller {
    socket: OwnedFd,
    message: Vec<u8>,
}

impl Teller {
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket, message: Vec::new() }
    }

    /// Says these tags, at most [`TAGS_MAX`]; `false` when there is no room now.
    pub(crate) fn tell(&mut self, tags: impl Iterator<Item = u32>) -> Result<bool, Errno> {
        self.message.clear();
        tags.for_each(|tag| self.message.extend(tag.to_le_bytes()));
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match retry_on_intr(|| send(&self.socket, &self.message, flags)) {
            Ok(_) => Ok(true),
            Err(Errno::AGAIN | Errno::NOBUFS) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// A WRITE whose bytes are there.
pub(crate) struct Arrived<B> {
    pub(crate) id: WriteId,
    pub(crate) from: B,
    pub(crate) to: ReceiverRank,
    pub(crate) tag: u32,
}

/// WRITEs whose bytes are there, but of which their receivers have not been told: by receiver, in their order.
pub(crate) struct Untold<B>(BTreeMap<ReceiverRank, VecDeque<Arrived<B>>>);

impl<B> Untold<B> {
    pub(crate) fn new() -> Self {
        Self(BTreeMap::new())
    }

    pub(crate) fn push(&mut self, write: Arrived<B>) {
        self.0.entry(write.to).or_default().push_back(write);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.values().all(VecDeque::is_empty)
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = WriteId> {
        self.0.values().flatten().map(|write| write.id)
    }

    /// Tells receivers what has arrived, as far as they listen. A WRITE is done when its receiver has been told of it.
    pub(crate) fn tell<P: AsMut<Teller>>(
        &mut self,
        peers: &mut BTreeMap<ReceiverRank, P>,
        done: &mut Vec<Done<B>>,
    ) {
        for (to, writes) in &mut self.0 {
            while !writes.is_empty() {
                let count = writes.len().min(TAGS_MAX);
                let mut tags =
                    writes.iter().take(count).map(|write| write.tag).filter(|tag| *tag != NO_TAG).peekable();
                let told = match peers.get_mut(to) {
                    Some(peer) if tags.peek().is_some() => peer.as_mut().tell(tags),
                    _ => Ok(true),
                };
                let result = match told {
                    Ok(true) => Ok(()),
                    Ok(false) => break,
                    Err(error) => Err(format!("{to} cannot be told what has arrived: {error}; is it alive?")),
                };
                // Of a WRITE without a tag nobody has to hear.
                let result_of = |tag| if tag == NO_TAG { Ok(()) } else { result.clone() };
                let over = |Arrived { id, from, tag, .. }| Done { id, from, result: result_of(tag) };
                done.extend(writes.drain(..count).map(over));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arrivals::Arrivals;

    impl AsMut<Teller> for Teller {
        fn as_mut(&mut self) -> &mut Teller {
            self
        }
    }

    #[test]
    fn who_does_not_listen_keeps_nobody_else_from_being_told() {
        let ((mut deaf, to_deaf), (mut other, to_other)) =
            (Arrivals::over_socket().unwrap(), Arrivals::over_socket().unwrap());
        let (first, second) = (ReceiverRank(0), ReceiverRank(1));
        let mut peers = BTreeMap::from([(first, Teller::new(to_deaf)), (second, Teller::new(to_other))]);
        while peers.get_mut(&first).unwrap().tell(0..TAGS_MAX as u32).unwrap() {}
        let (mut untold, mut done) = (Untold::new(), Vec::new());
        let write = |number: u32, to, tag| Arrived { id: WriteId { op: number, row: 0 }, from: (), to, tag };
        for number in 0..4 {
            untold.push(write(number, ReceiverRank(number % 2), number));
        }
        untold.push(write(4, second, NO_TAG));
        untold.tell(&mut peers, &mut done);
        let ids = |done: &[Done<()>]| done.iter().map(|done| done.id.op).collect::<Vec<_>>();
        assert_eq!((ids(&done), untold.is_empty()), (vec![1, 3, 4], false));
        assert_eq!(untold.ids().map(|id| id.op).collect::<Vec<_>>(), [0, 2]);
        let mut heard = Vec::new();
        other.poll(&mut heard).unwrap();
        assert_eq!(heard, [1, 3]);

        deaf.forget().unwrap();
        untold.tell(&mut peers, &mut done);
        heard.clear();
        deaf.poll(&mut heard).unwrap();
        assert_eq!((ids(&done), untold.is_empty(), heard), (vec![1, 3, 4, 0, 2], true, vec![0, 2]));

        drop(deaf);
        done.clear();
        (5..8)
            .for_each(|number| untold.push(write(number, first, if number == 6 { NO_TAG } else { number })));
        untold.tell(&mut peers, &mut done);
        assert_eq!(done.iter().map(|done| done.result.is_ok()).collect::<Vec<_>>(), [false, true, false]);
    }
}
