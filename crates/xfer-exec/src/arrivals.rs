//! How a receiver learns that WRITEs have arrived, by their tags.
//!
//! NICs put a WRITE's tag into the receiver's completion queue behind its bytes. Senders of its own host say it on a socket, once
//! the bytes are there (`local/telling.rs`): all of them have the same end of one socket pair, which the kernel keeps message by
//! message.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, recv};

/// Tags of one message on a socket at most.
pub(crate) const TAGS_MAX: usize = 1024;

/// Messages that are read from a socket at a time: who tells without end keeps nobody from what else there is to do.
const MESSAGES_MAX: usize = 256;

const TAG_BYTES: usize = size_of::<u32>();

/// Tags from NICs that nobody has asked for yet, at most: who passes on asks thousands of times a second, and a peer that goes on
/// telling costs 16 MiB.
const UNHEARD_MAX: usize = 4 << 20;

/// Why it cannot be said any more what has arrived.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArrivalsError {
    /// The system refuses to read.
    #[error("recv failed: {0}")]
    Receive(Errno),
    /// A sender told something else than tags.
    #[error("a sender told {bytes} bytes that are no tags; is it a weightsync of this version?")]
    NoTags {
        /// How many bytes.
        bytes: usize,
    },
    /// Peers have told more than anybody can have written.
    #[error("more than {UNHEARD_MAX} writes have arrived while nobody listened")]
    TooMany,
}

/// What has arrived in this rank's memory, over all ways that lead to it.
#[derive(Debug, Default)]
pub struct Arrivals {
    socket: Option<OwnedFd>,
    message: Vec<u8>,
    nics: Option<NicArrivals>,
}

/// What NICs have told, for the thread that reads their completion queues to add to.
#[derive(Debug, Clone, Default)]
pub struct NicArrivals(Arc<Mutex<Heard>>);

#[derive(Debug, Default)]
struct Heard {
    tags: Vec<u32>,
    too_many: bool,
}

impl NicArrivals {
    /// Adds the tag of a WRITE whose bytes are there.
    pub(crate) fn add(&self, tag: u32) {
        let mut heard = self.heard();
        if heard.tags.len() < UNHEARD_MAX {
            heard.tags.push(tag);
        } else {
            heard.too_many = true;
        }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Arrivals {
    /// Listens to a socket; also the end that senders get.
    #[cfg(feature = "local")]
    pub(crate) fn over_socket() -> Result<(Self, OwnedFd), Errno> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (socket, senders) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        // One byte more than there may be, so that a longer message is seen as one.
        let message = vec![0; TAGS_MAX * TAG_BYTES + 1];
        Ok((Self { socket: Some(socket), message, nics: None }, senders))
    }

    /// Listens to NICs as well.
    pub fn hear(&mut self, nics: NicArrivals) {
        self.nics = Some(nics);
    }

    /// Appends the tags of WRITEs whose bytes are there, and says whether NICs brought some of them: what these write to a GPU
    /// must be flushed before that reads it. Never blocks.
    ///
    /// # Errors
    ///
    /// When the system refuses to read, or peers have told what cannot be: nothing can be said of their WRITEs then.
    pub fn poll(&mut self, tags: &mut Vec<u32>) -> Result<bool, ArrivalsError> {
        self.poll_socket(tags)?;
        let Some(nics) = &self.nics else { return Ok(false) };
        let mut heard = nics.heard();
        if std::mem::take(&mut heard.too_many) {
            heard.tags.clear();
            return Err(ArrivalsError::TooMany);
        }
        let from_nics = !heard.tags.is_empty();
        tags.append(&mut heard.tags);
        Ok(from_nics)
    }

    /// Forgets what has arrived so far. Nobody writes to a rank that passes on before it has begun: what was told by then is of a
    /// push that was given up.
    ///
    /// # Errors
    ///
    /// When the system refuses to read, or peers go on telling.
    pub(crate) fn forget(&mut self) -> Result<(), ArrivalsError> {
        let mut tags = Vec::new();
        for _ in 0..MESSAGES_MAX {
            tags.clear();
            match self.poll(&mut tags) {
                Ok(_) if tags.is_empty() => return Ok(()),
                Ok(_) => {}
                Err(error @ ArrivalsError::Receive(_)) => return Err(error),
                Err(error) => tracing::warn!(%error, "forgotten"),
            }
        }
        Err(ArrivalsError::TooMany)
    }

    fn poll_socket(&mut self, tags: &mut Vec<u32>) -> Result<(), ArrivalsError> {
        let Some(socket) = &self.socket else { return Ok(()) };
        for _ in 0..MESSAGES_MAX {
            let received = retry_on_intr(|| recv(socket, self.message.as_mut_slice(), RecvFlags::DONTWAIT));
            let len = match received {
                // Senders have their end for as long as the doorman lives.
                Err(Errno::AGAIN) | Ok((0, _)) => return Ok(()),
                Ok((len, _)) => len,
                Err(error) => return Err(ArrivalsError::Receive(error)),
            };
            let (said, rest) = self.message.get(..len).unwrap_or_default().as_chunks::<TAG_BYTES>();
            if !rest.is_empty() {
                return Err(ArrivalsError::NoTags { bytes: len });
            }
            tags.extend(said.iter().map(|tag| u32::from_le_bytes(*tag)));
        }
        Ok(())
    }
}

#[cfg(all(test, feature = "local"))]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use rustix::net::{SendFlags, send};

    use super::*;
    use crate::local::Teller;

    proptest! {
        #[test]
        fn tags_of_all_senders_arrive_once_and_in_each_ones_order(
            messages in vec((any::<bool>(), vec(any::<u32>(), 1..50)), 0..20), over_nics in vec(any::<u32>(), 0..20)
        ) {
            let (mut arrivals, socket) = Arrivals::over_socket().unwrap();
            let mut tellers = [Teller::new(socket.try_clone().unwrap()), Teller::new(socket)];
            let (mut said, mut heard) = (Vec::new(), Vec::new());
            for (who, tags) in messages {
                prop_assert!(tellers[usize::from(who)].tell(tags.iter().copied()).unwrap());
                said.extend(tags);
            }
            let nics = NicArrivals::default();
            arrivals.hear(nics.clone());
            over_nics.iter().for_each(|tag| nics.add(*tag));
            said.extend(&over_nics);
            prop_assert_eq!(arrivals.poll(&mut heard).unwrap(), !over_nics.is_empty());
            prop_assert_eq!(&heard, &said);
            prop_assert!(!arrivals.poll(&mut heard).unwrap());
            prop_assert_eq!(heard, said);
        }
    }

    #[test]
    fn who_does_not_listen_holds_nobody_up_and_loses_nothing() {
        let (mut arrivals, socket) = Arrivals::over_socket().unwrap();
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
            let (mut arrivals, socket) = Arrivals::over_socket().unwrap();
            send(&socket, &vec![0; bytes], SendFlags::empty()).unwrap();
            assert!(arrivals.poll(&mut Vec::new()).is_err(), "{bytes}");
        }
    }

    #[test]
    fn a_peer_that_goes_on_telling_takes_no_more_memory_and_is_found() {
        let (mut arrivals, nics) = (Arrivals::default(), NicArrivals::default());
        arrivals.hear(nics.clone());
        (0..UNHEARD_MAX as u32 + 2).for_each(|tag| nics.add(tag));
        let mut heard = Vec::new();
        assert!(matches!(arrivals.poll(&mut heard), Err(ArrivalsError::TooMany)));
        nics.add(5);
        arrivals.poll(&mut heard).unwrap();
        assert_eq!(heard, [5]);
    }
}
