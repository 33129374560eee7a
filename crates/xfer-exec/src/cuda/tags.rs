//! How a receiver learns that WRITEs have arrived: a socket on which senders say so, WRITE by WRITE, by its tag.
//!
//! The bytes are there before the tag is: a sender speaks after the event of a batch has passed. All senders of a receiver
//! have the same end of one socket pair, which the kernel keeps message by message. Nobody ever waits: a receiver that does not
//! listen holds back the WRITEs that it would have to be told of, and no others.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};

use super::CudaError;
use crate::local::{LocalError, call};

/// Tags of one message at most: those of one batch.
pub(super) const TAGS_MAX: usize = 1024;

const TAG_BYTES: usize = size_of::<u32>();

/// What has arrived in this rank's memory, from all senders of its host.
pub struct Arrivals {
    socket: OwnedFd,
    message: Vec<u8>,
}

/// Where to say what has arrived at a receiver.
pub(super) struct Teller {
    socket: OwnedFd,
    message: Vec<u8>,
}

impl Arrivals {
    /// A receiver's end, and the end that its senders get.
    pub(super) fn new() -> Result<(Self, OwnedFd), CudaError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (socket, senders) = pair.map_err(call("socketpair"))?;
        // One byte more than there may be, so that a longer message is seen as one.
        let message = vec![0; TAGS_MAX * TAG_BYTES + 1];
        Ok((Self { socket, message }, senders))
    }

    /// Appends the tags of WRITEs whose bytes are there. Never blocks.
    ///
    /// # Errors
    ///
    /// When the system refuses to read, or a sender says what is no list of tags: nothing can be said of its WRITEs then.
    pub fn poll(&mut self, tags: &mut Vec<u32>) -> Result<(), CudaError> {
        loop {
            let received =
                retry_on_intr(|| recv(&self.socket, self.message.as_mut_slice(), RecvFlags::DONTWAIT));
            let len = match received {
                // Senders have their end for as long as the doorman lives.
                Err(Errno::AGAIN) | Ok((0, _)) => return Ok(()),
                Ok((len, _)) => len,
                Err(source) => return Err(LocalError::Call { call: "recv", source }.into()),
            };
            let (said, rest) = self.message.get(..len).unwrap_or_default().as_chunks::<TAG_BYTES>();
            if !rest.is_empty() {
                return Err(CudaError::Tags { bytes: len });
            }
            tags.extend(said.iter().map(|tag| u32::from_le_bytes(*tag)));
        }
    }
}

/// Readable when there is something to poll.
impl AsFd for Arrivals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Teller {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, message: Vec::new() }
    }

    /// Says these tags, at most [`TAGS_MAX`]; `false` when there is no room now.
    pub(super) fn tell(&mut self, tags: impl Iterator<Item = u32>) -> Result<bool, Errno> {
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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn tags_of_all_senders_arrive_once_and_in_each_ones_order(messages in vec((any::<bool>(), vec(any::<u32>(), 1..50)), 0..20)) {
            let (mut arrivals, socket) = Arrivals::new().unwrap();
            let mut tellers = [Teller::new(socket.try_clone().unwrap()), Teller::new(socket)];
            let (mut said, mut heard) = (Vec::new(), Vec::new());
            for (who, tags) in messages {
                prop_assert!(tellers[usize::from(who)].tell(tags.iter().copied()).unwrap());
                said.extend(tags);
            }
            arrivals.poll(&mut heard).unwrap();
            prop_assert_eq!(heard, said);
        }
    }

    #[test]
    fn who_does_not_listen_holds_nobody_up_and_loses_nothing() {
        let (mut arrivals, socket) = Arrivals::new().unwrap();
        let mut teller = Teller::new(socket);
        let batch = |number: u32| (0..TAGS_MAX as u32).map(move |at| number * TAGS_MAX as u32 + at);
        let mut said = 0;
        while teller.tell(batch(said)).unwrap() {
            said += 1;
        }
        let mut heard = Vec::new();
        arrivals.poll(&mut heard).unwrap();
        assert!(said > 1 && heard.iter().copied().eq(0..said * TAGS_MAX as u32));
        assert!(teller.tell(batch(0)).unwrap(), "there is room again");
        drop(arrivals);
        assert!(teller.tell(batch(0)).is_err(), "nobody is there any more");
    }

    #[test]
    fn what_is_no_list_of_tags_is_an_error() {
        for bytes in [1, TAG_BYTES + 1, TAGS_MAX * TAG_BYTES + 1, TAGS_MAX * TAG_BYTES * 2] {
            let (mut arrivals, socket) = Arrivals::new().unwrap();
            send(&socket, &vec![0; bytes], SendFlags::empty()).unwrap();
            assert!(arrivals.poll(&mut Vec::new()).is_err(), "{bytes}");
        }
    }
}
