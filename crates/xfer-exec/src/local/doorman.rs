//! How a sender gets what leads to a receiver's memory, file descriptors above all: a Unix socket with an abstract name,
//! which vanishes with its process. It serves only processes of the same user (or root) that present the key, which the
//! control plane tells to authenticated peers.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, recvmsg, sendmsg, sockopt,
};

use super::shared::SharedFile;
use super::telling::Teller;
use super::{LocalError, call};
use crate::arrivals::Arrivals;

/// Bytes of the key: not to be guessed.
pub const KEY_BYTES: usize = 16;

/// A client says what it wants within this time, or goes. It blocks the others meanwhile, but only processes of the
/// same user get that far.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(1);

/// What is asked for in place of a region: a descriptor on which to say what has arrived.
const TAGS: u32 = u32::MAX;

/// The key, then the region's index.
const REQUEST_BYTES: usize = KEY_BYTES + 4;

/// Comes first, and with the descriptors.
const GRANTED: u8 = 1;

/// Descriptors of one region at most; the kernel passes 253 at a time.
pub(crate) const FILES_MAX: usize = 64;

/// Bytes that are said about a region at most: 64 lengths and what names them fit twice.
pub(crate) const MESSAGE_BYTES_MAX: usize = 2048;

/// What leads to a region.
pub(crate) struct Offer<'a> {
    /// For the peer to understand; at most [`MESSAGE_BYTES_MAX`] bytes.
    pub(crate) message: &'a [u8],
    /// At most [`FILES_MAX`].
    pub(crate) files: Vec<BorrowedFd<'a>>,
}

/// Regions that can be offered.
pub(crate) trait Offers: Send + 'static {
    /// What leads to a region, if there is one of this number.
    fn offer(&self, region: u32) -> Option<Offer<'_>>;
}

impl Offers for Vec<SharedFile> {
    fn offer(&self, region: u32) -> Option<Offer<'_>> {
        let file = self.get(region as usize)?;
        Some(Offer { message: &[], files: vec![file.as_fd()] })
    }
}

/// What a sender needs to know to fetch a receiver's files.
#[derive(Clone, PartialEq, Eq)]
pub struct DoormanAddress {
    /// Abstract name of the socket.
    pub name: String,
    /// What to present.
    pub key: [u8; KEY_BYTES],
}

/// Without the key.
impl std::fmt::Debug for DoormanAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DoormanAddress").field("name", &self.name).finish_non_exhaustive()
    }
}

/// Hands out the files of this process's regions until it is dropped.
pub struct Doorman {
    address: DoormanAddress,
    listener: UnixListener,
    thread: Option<JoinHandle<()>>,
}

impl Doorman {
    /// Serves `files`, by region index. Name and key are random. What senders have written comes out of the [`Arrivals`], where
    /// it has a tag.
    pub fn open(files: Vec<SharedFile>) -> Result<(Self, Arrivals), LocalError> {
        Self::serving(files)
    }

    /// Serves whatever can be offered.
    pub(crate) fn serving(regions: impl Offers) -> Result<(Self, Arrivals), LocalError> {
        let (arrivals, senders) = Arrivals::over_socket().map_err(call("socketpair"))?;
        let mut random = [0; 2 * KEY_BYTES];
        getrandom::fill(&mut random)
            .map_err(|_| LocalError::Call { call: "getrandom", source: rustix::io::Errno::IO })?;
        let (name, key) = random.split_at(KEY_BYTES);
        let name: String = name.iter().map(|byte| format!("{byte:02x}")).collect();
        let name = format!("weightsync-{name}");
        let failed =
            |error: std::io::Error| LocalError::Doorman { address: name.clone(), reason: error.to_string() };
        let socket = SocketAddr::from_abstract_name(&name).map_err(failed)?;
        let listener = UnixListener::bind_addr(&socket).map_err(failed)?;
        let serving = listener.try_clone().map_err(failed)?;
        let mut address = DoormanAddress { name: name.clone(), key: [0; KEY_BYTES] };
        address.key.copy_from_slice(key);
        let key = address.key;
        let thread = std::thread::Builder::new().name("doorman".into()).spawn(move || {
            loop {
                match serving.accept() {
                    Ok((stream, _)) => {
                        if let Err(error) = serve(stream, &key, &regions, &senders) {
                            tracing::warn!(%error, "refused a request for shared memory");
                        }
                    }
                    // What `accept` says of a listener that was shut down.
                    Err(error) if error.kind() == std::io::ErrorKind::InvalidInput => return,
                    // Out of file descriptors, for instance.
                    Err(error) => {
                        tracing::warn!(%error, "accept");
                        std::thread::sleep(Duration::from_millis(50));
                    }
                }
            }
        });
        Ok((Self { address, listener, thread: Some(thread.map_err(failed)?) }, arrivals))
    }

    /// What to tell peers.
    pub fn address(&self) -> &DoormanAddress {
        &self.address
    }
}

impl Drop for Doorman {
    fn drop(&mut self) {
        // Wakes `accept`; a client being served holds the thread for `CLIENT_TIMEOUT` at most.
        if rustix::net::shutdown(&self.listener, Shutdown::Both).is_ok()
            && let Some(thread) = self.thread.take()
        {
            let _ = thread.join();
        }
    }
}

fn serve(
    mut stream: UnixStream,
    key: &[u8; KEY_BYTES],
    regions: &impl Offers,
    senders: &OwnedFd,
) -> Result<(), LocalError> {
    let refused = |reason: String| LocalError::Doorman { address: "this process".into(), reason };
    check_user(&stream).map_err(refused)?;
    let io = |error: std::io::Error| refused(error.to_string());
    stream.set_read_timeout(Some(CLIENT_TIMEOUT)).map_err(io)?;
    stream.set_write_timeout(Some(CLIENT_TIMEOUT)).map_err(io)?;
    let mut request = [0; REQUEST_BYTES];
    stream.read_exact(&mut request).map_err(io)?;
    let (presented, region) = request.split_at(KEY_BYTES);
    // All bytes are compared, so the time tells nothing of where they differ.
    let differs = presented.iter().zip(key).fold(0, |differs, (a, b)| differs | (a ^ b));
    let region = region.try_into().map_or(u32::MAX, u32::from_le_bytes);
    let offer = || match region {
        TAGS => Some(Offer { message: &[], files: vec![senders.as_fd()] }),
        _ => regions.offer(region),
    };
    let Some(Offer { message, files }) = (differs == 0).then(offer).flatten() else {
        return Err(refused(format!("wrong key or no region {region}")));
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(refused(format!("region {region} has {} files, more than {FILES_MAX}", files.len())));
    }
    retry_on_intr(|| sendmsg(&stream, &[IoSlice::new(&[GRANTED])], &mut control, SendFlags::NOSIGNAL))
        .map_err(call("sendmsg"))?;
    stream.write_all(message).map_err(io)
}

/// Both ends must run as the same user, or the other as root: abstract names are there for everybody to take.
fn check_user(stream: &UnixStream) -> Result<(), String> {
    let other =
        sockopt::socket_peercred(stream).map_err(|error| format!("getsockopt(SO_PEERCRED): {error}"))?;
    if other.uid == rustix::process::geteuid() || other.uid.is_root() {
        return Ok(());
    }
    Err(format!("process {} runs as another user", other.pid.as_raw_nonzero()))
}

/// Fetches the file of a peer's region. Each of its few steps takes `deadline` at most.
pub fn fetch(address: &DoormanAddress, region: u32, deadline: Duration) -> Result<OwnedFd, LocalError> {
    fetch_file(address, region, deadline, || format!("region {region} is no shared host memory"))
}

/// Fetches where to tell a peer what has arrived there, as [`fetch`].
pub(crate) fn fetch_teller(address: &DoormanAddress, deadline: Duration) -> Result<Teller, LocalError> {
    fetch_file(address, TAGS, deadline, || "it does not hear what has arrived".into()).map(Teller::new)
}

fn fetch_file(
    address: &DoormanAddress,
    region: u32,
    deadline: Duration,
    reason: impl FnOnce() -> String,
) -> Result<OwnedFd, LocalError> {
    let (message, mut files) = fetch_all(address, region, deadline)?;
    match files.pop() {
        Some(file) if message.is_empty() && files.is_empty() => Ok(file),
        _ => Err(LocalError::Doorman { address: address.name.clone(), reason: reason() }),
    }
}

/// Fetches what leads to a peer's region: what it says about it, and files. As [`fetch`].
pub(crate) fn fetch_all(
    address: &DoormanAddress,
    region: u32,
    deadline: Duration,
) -> Result<(Vec<u8>, Vec<OwnedFd>), LocalError> {
    let failed = |reason: String| LocalError::Doorman { address: address.name.clone(), reason };
    let io = |error: std::io::Error| failed(error.to_string());
    let socket = SocketAddr::from_abstract_name(&address.name).map_err(io)?;
    let mut stream = UnixStream::connect_addr(&socket).map_err(io)?;
    check_user(&stream).map_err(failed)?;
    stream.set_read_timeout(Some(deadline)).map_err(io)?;
    stream.set_write_timeout(Some(deadline)).map_err(io)?;
    let mut request = [0; REQUEST_BYTES];
    request[..KEY_BYTES].copy_from_slice(&address.key);
    request[KEY_BYTES..].copy_from_slice(&region.to_le_bytes());
    stream.write_all(&request).map_err(io)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut answer = [0];
    let received = retry_on_intr(|| {
        recvmsg(&stream, &mut [IoSliceMut::new(&mut answer)], &mut control, RecvFlags::CMSG_CLOEXEC)
    });
    let received = received.map_err(call("recvmsg"))?;
    let mut files = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            files.extend(received);
        }
    }
    if received.bytes == 0 || answer != [GRANTED] || received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(failed("it refused".into()));
    }
    let mut message = Vec::new();
    stream.take(MESSAGE_BYTES_MAX as u64 + 1).read_to_end(&mut message).map_err(io)?;
    if message.len() > MESSAGE_BYTES_MAX {
        return Err(failed(format!("it says more than {MESSAGE_BYTES_MAX} bytes about region {region}")));
    }
    Ok((message, files))
}

#[cfg(test)]
mod tests {
    use super::super::shared::{Attached, SharedFile};
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn a_peer_with_the_key_gets_the_memory() {
        let (target, file) = SharedFile::create(64).unwrap();
        let (doorman, _) = Doorman::open(vec![file]).unwrap();
        let file = fetch(doorman.address(), 0, SOON).unwrap();
        Attached::new(&file, 0, 64).unwrap().copy_in(0, b"hello").unwrap();
        let mut read = [0; 5];
        target.read(0, &mut read).unwrap();
        assert_eq!(&read, b"hello");
    }

    #[test]
    fn a_wrong_key_or_region_is_refused_and_the_next_is_served() {
        let (_target, file) = SharedFile::create(64).unwrap();
        let (doorman, _) = Doorman::open(vec![file]).unwrap();
        let wrong = DoormanAddress { key: [0; KEY_BYTES], ..doorman.address().clone() };
        assert!(matches!(fetch(&wrong, 0, SOON), Err(LocalError::Doorman { .. })));
        assert!(matches!(fetch(doorman.address(), 1, SOON), Err(LocalError::Doorman { .. })));
        fetch(doorman.address(), 0, SOON).unwrap();
    }

    #[test]
    fn a_doorman_that_is_gone_is_an_error() {
        let (doorman, _) = Doorman::open(vec![]).unwrap();
        let address = doorman.address().clone();
        drop(doorman);
        assert!(matches!(fetch(&address, 0, SOON), Err(LocalError::Doorman { .. })));
    }
}
