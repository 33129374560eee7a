//! How a sender gets a receiver's file descriptors: a Unix socket with an abstract name, which vanishes with its
//! process. It serves only processes of the same user (or root) that present the key, which the control plane tells to
//! authenticated peers.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
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
use super::{LocalError, call};

/// Bytes of the key: not to be guessed.
pub const KEY_BYTES: usize = 16;

/// A client says what it wants within this time, or goes. It blocks the others meanwhile, but only processes of the
/// same user get that far.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(1);

/// The key, then the region's index.
const REQUEST_BYTES: usize = KEY_BYTES + 4;

/// Comes with the descriptor.
const GRANTED: u8 = 1;

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
    /// Serves `files`, by region index. Name and key are random.
    pub fn open(files: Vec<SharedFile>) -> Result<Self, LocalError> {
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
                        if let Err(error) = serve(stream, &key, &files) {
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
        Ok(Self { address, listener, thread: Some(thread.map_err(failed)?) })
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

fn serve(mut stream: UnixStream, key: &[u8; KEY_BYTES], files: &[SharedFile]) -> Result<(), LocalError> {
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
    let Some(file) = files.get(region as usize).filter(|_| differs == 0) else {
        return Err(refused(format!("wrong key or no region {region}")));
    };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&files));
    retry_on_intr(|| sendmsg(&stream, &[IoSlice::new(&[GRANTED])], &mut control, SendFlags::NOSIGNAL))
        .map_err(call("sendmsg"))?;
    Ok(())
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
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut answer = [0];
    let received = retry_on_intr(|| {
        recvmsg(&stream, &mut [IoSliceMut::new(&mut answer)], &mut control, RecvFlags::CMSG_CLOEXEC)
    });
    let received = received.map_err(call("recvmsg"))?;
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    match file {
        Some(file) if answer == [GRANTED] && !received.flags.contains(ReturnFlags::CTRUNC) => Ok(file),
        _ => Err(failed("it refused".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::super::shared::{Attached, SharedFile};
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn a_peer_with_the_key_gets_the_memory() {
        let (target, file) = SharedFile::create(64).unwrap();
        let doorman = Doorman::open(vec![file]).unwrap();
        let file = fetch(doorman.address(), 0, SOON).unwrap();
        Attached::new(&file, 0, 64).unwrap().copy_in(0, b"hello").unwrap();
        let mut read = [0; 5];
        target.read(0, &mut read).unwrap();
        assert_eq!(&read, b"hello");
    }

    #[test]
    fn a_wrong_key_or_region_is_refused_and_the_next_is_served() {
        let (_target, file) = SharedFile::create(64).unwrap();
        let doorman = Doorman::open(vec![file]).unwrap();
        let wrong = DoormanAddress { key: [0; KEY_BYTES], ..doorman.address().clone() };
        assert!(matches!(fetch(&wrong, 0, SOON), Err(LocalError::Doorman { .. })));
        assert!(matches!(fetch(doorman.address(), 1, SOON), Err(LocalError::Doorman { .. })));
        fetch(doorman.address(), 0, SOON).unwrap();
    }

    #[test]
    fn a_doorman_that_is_gone_is_an_error() {
        let doorman = Doorman::open(vec![]).unwrap();
        let address = doorman.address().clone();
        drop(doorman);
        assert!(matches!(fetch(&address, 0, SOON), Err(LocalError::Doorman { .. })));
    }
}
