//! Telling receivers of this host what has arrived, WRITE by WRITE, by its tag.
//!
//! The bytes are there before the tag is. Nobody ever waits: a receiver that does not listen holds back the WRITEs that it would
//! have to be told of, and no others.

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

/// WRITEs whose bytes are there, but of which their receivers have not been told, in their order.
pub(crate) struct Untold<B>(VecDeque<Arrived<B>>);

impl<B> Untold<B> {
    pub(crate) fn with_capacity(writes: usize) -> Self {
        Self(VecDeque::with_capacity(writes))
    }

    pub(crate) fn push(&mut self, write: Arrived<B>) {
        self.0.push_back(write);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn ids(&self) -> impl Iterator<Item = WriteId> {
        self.0.iter().map(|write| write.id)
    }

    /// Tells receivers what has arrived, as far as they listen. A WRITE is done when its receiver has been told of it.
    pub(crate) fn tell<P: AsMut<Teller>>(
        &mut self,
        peers: &mut BTreeMap<ReceiverRank, P>,
        done: &mut Vec<Done<B>>,
    ) {
        while let Some(Arrived { to, tag, .. }) = self.0.front() {
            let (to, silent) = (*to, *tag == NO_TAG);
            let alike = |write: &&Arrived<B>| match silent {
                true => write.tag == NO_TAG,
                false => write.to == to && write.tag != NO_TAG,
            };
            let count = self.0.iter().take(TAGS_MAX).take_while(alike).count();
            let tags = self.0.iter().take(count).map(|write| write.tag);
            let told = match peers.get_mut(&to) {
                Some(peer) if !silent => peer.as_mut().tell(tags),
                _ => Ok(true),
            };
            let result = match told {
                Ok(true) => Ok(()),
                Ok(false) => return,
                Err(error) => Err(format!("{to} cannot be told what has arrived: {error}; is it alive?")),
            };
            let over = |Arrived { id, from, .. }| Done { id, from, result: result.clone() };
            done.extend(self.0.drain(..count).map(over));
        }
    }
}
