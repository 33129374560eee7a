//! The peers of one rail: addresses that were inserted into its address vector.

use std::fmt;

use libfabric_sys as sys;

use crate::address::{ADDRESS_BYTES_MAX, RailAddress};
use crate::error::PeerError;
use crate::object::{Object, call_error};
use crate::rail::Rail;
use crate::table::Key;

/// How many peers one rail can know: more than the ranks of any cluster that one rail talks to.
pub const PEERS_MAX: usize = 65_536;

/// Names a peer of one rail. The id of a removed peer is never given to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub(crate) Key);

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "peer {}.{}", self.0.index, self.0.generation)
    }
}

pub(crate) struct Peer {
    /// The provider's name for it.
    pub(crate) fi_addr: sys::fi_addr_t,
    address: RailAddress,
    pub(crate) name: String,
    pub(crate) in_flight: u32,
}

impl Rail {
    /// Makes a peer's rail reachable. Connecting is left to the first operation.
    ///
    /// An address dies with its process: after a peer restarted, insert its new address.
    ///
    /// # Errors
    ///
    /// [`PeerError::Address`] when the address is of another kind than this rail's own, [`PeerError::Known`] when it has
    /// been inserted before, [`PeerError::Full`] beyond [`PEERS_MAX`].
    pub fn insert_peer(&mut self, address: &RailAddress) -> Result<PeerId, PeerError> {
        let live = &mut *self.live;
        if live.peers.is_full() {
            return Err(PeerError::Full { on: live.name.clone(), max: PEERS_MAX });
        }
        // Providers differ in what a second insertion gives, and in what its removal takes away.
        if let Some(peer) = live.peers_by_address.get(address) {
            return Err(PeerError::Known { on: live.name.clone(), peer: *peer });
        }
        let padded = padded_address(address, &live.address, live.address_format).map_err(|why| {
            PeerError::Address { on: live.name.clone(), address_bytes: address.as_bytes().len(), why }
        })?;
        let mut inserted = sys::FI_ADDR_NOTAVAIL;
        // SAFETY: the vector is open. The provider reads as many bytes as its addresses have, of a buffer that is
        // longer than any address and zero behind the peer's own.
        let count =
            unsafe { sys::fi_av_insert(live.av.as_ptr(), padded.as_ptr().cast(), 1, &raw mut inserted, 0) };
        if count != 1 || inserted == sys::FI_ADDR_NOTAVAIL {
            let code = if count < 0 { count } else { sys::FI_EINVAL };
            return Err(call_error(&live.library, "fi_av_insert", &live.name, code).into());
        }
        let name = address_text(&live.av, &padded);
        let peer = Peer { fi_addr: inserted, address: address.clone(), name, in_flight: 0 };
        match live.peers.insert(peer) {
            Ok(key) => {
                live.peers_by_address.insert(address.clone(), PeerId(key));
                Ok(PeerId(key))
            }
            Err(_) => Err(PeerError::Full { on: live.name.clone(), max: PEERS_MAX }),
        }
    }

    /// Forgets a peer.
    ///
    /// # Errors
    ///
    /// [`PeerError::Busy`] while operations to it are in flight, [`PeerError::Unknown`] when it is not a peer.
    pub fn remove_peer(&mut self, peer: PeerId) -> Result<(), PeerError> {
        let live = &mut *self.live;
        let Some(entry) = live.peers.get(peer.0) else {
            return Err(PeerError::Unknown { on: live.name.clone(), peer });
        };
        if entry.in_flight > 0 {
            return Err(PeerError::Busy { on: live.name.clone(), peer, in_flight: entry.in_flight });
        }
        let mut fi_addr = entry.fi_addr;
        live.peers_by_address.remove(&entry.address);
        // SAFETY: the vector is open, and the address came from it and is removed once: the entry goes with it.
        let code = unsafe { sys::fi_av_remove(live.av.as_ptr(), &raw mut fi_addr, 1, 0) };
        live.peers.remove(peer.0);
        crate::object::check(&live.library, "fi_av_remove", &live.name, code).map_err(PeerError::from)
    }
}

/// Checks an address that came from a peer, and pads it: libfabric takes a pointer without a length.
fn padded_address(
    address: &RailAddress,
    own: &RailAddress,
    format: u32,
) -> Result<[u8; ADDRESS_BYTES_MAX + 1], &'static str> {
    let (bytes, own) = (address.as_bytes(), own.as_bytes());
    if format == sys::FI_ADDR_STR {
        // A name: its length is its own affair, and the padding terminates it.
        if !bytes.is_ascii() {
            return Err("it is not a name");
        }
    } else {
        if bytes.len() != own.len() {
            return Err("this rail's own has another length");
        }
        let is_socket = matches!(format, sys::FI_SOCKADDR | sys::FI_SOCKADDR_IN | sys::FI_SOCKADDR_IN6);
        // A socket address begins with its family, by which the provider decides how much to read.
        if is_socket && bytes.get(..2) != own.get(..2) {
            return Err("this rail's own is of another address family");
        }
    }
    let mut padded = [0; ADDRESS_BYTES_MAX + 1];
    for (to, from) in padded.iter_mut().zip(bytes) {
        *to = *from;
    }
    Ok(padded)
}

/// An address in words, such as `10.0.0.1:40123`; hexadecimal where the provider has no words.
pub(crate) fn address_text(av: &Object<sys::fid_av>, padded: &[u8; ADDRESS_BYTES_MAX + 1]) -> String {
    const TEXT_BYTES_MAX: usize = 256;
    let mut text = [0_u8; TEXT_BYTES_MAX];
    let mut text_bytes = text.len();
    // SAFETY: the vector is open, the address is padded beyond what any format reads, and the provider writes at most
    // `text_bytes` bytes.
    unsafe {
        sys::fi_av_straddr(av.as_ptr(), padded.as_ptr().cast(), text.as_mut_ptr().cast(), &raw mut text_bytes)
    };
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    let words = String::from_utf8_lossy(text.get(..end).unwrap_or_default());
    if words.is_empty() {
        return padded.iter().take(32).map(|byte| format!("{byte:02x}")).collect();
    }
    words.split_once("://").map_or(&*words, |(_, rest)| rest).to_owned()
}

/// Pads this rail's own address, which came from the provider.
pub(crate) fn padded_own(address: &RailAddress) -> [u8; ADDRESS_BYTES_MAX + 1] {
    let mut padded = [0; ADDRESS_BYTES_MAX + 1];
    for (to, from) in padded.iter_mut().zip(address.as_bytes()) {
        *to = *from;
    }
    padded
}
