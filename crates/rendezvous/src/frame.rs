//! Frames: a 32-bit little-endian length, then that many bytes of postcard. The length is checked against a bound
//! before a byte is allocated, and the bytes are read as they come, so a peer that claims much and sends little holds
//! little. What a message takes in memory is bounded too, see [`budget`].

use std::io::ErrorKind;
use std::net::SocketAddr;

use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::budget;
use crate::error::RendezvousError;
use crate::protocol::PROTOCOL_VERSION;

/// First bytes of every connection, before any version-dependent encoding.
const MAGIC: [u8; 8] = *b"wghtsync";

/// Reads one frame. `None` when the peer closed the connection between frames.
pub(crate) async fn read<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
    peer: SocketAddr,
    bytes_max: u32,
) -> Result<Option<T>, RendezvousError> {
    read_bounded(from, peer, || bytes_max).await
}

/// As [`read`], with a bound that counts when the frame begins to come.
pub(crate) async fn read_bounded<T: DeserializeOwned>(
    from: &mut (impl AsyncRead + Unpin),
    peer: SocketAddr,
    bytes_max: impl Fn() -> u32,
) -> Result<Option<T>, RendezvousError> {
    let io = |source| RendezvousError::Io { peer, source };
    let mut prefix = [0; 4];
    match from.read_exact(&mut prefix).await {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(io(error)),
    }
    let (bytes, bytes_max) = (u32::from_le_bytes(prefix), bytes_max());
    if bytes > bytes_max {
        return Err(RendezvousError::FrameTooLong { peer, bytes, bytes_max });
    }
    let mut body = Vec::new();
    let read = from.take(u64::from(bytes)).read_to_end(&mut body).await.map_err(io)?;
    if read != bytes as usize {
        return Err(io(ErrorKind::UnexpectedEof.into()));
    }
    match budget::decode(&body, bytes_max) {
        Ok(message) => Ok(Some(message)),
        Err(reason) => Err(RendezvousError::Malformed { peer, reason }),
    }
}

/// The bytes of one frame.
pub(crate) fn encode(message: &impl Serialize, bytes_max: u32) -> Result<Vec<u8>, RendezvousError> {
    let mut frame = postcard::to_extend(message, vec![0; 4]).map_err(|error| {
        RendezvousError::Unexpected { expected: "a message that can be encoded", found: error.to_string() }
    })?;
    let bytes = frame.len() - 4;
    match u32::try_from(bytes) {
        Ok(prefix) if prefix <= bytes_max => frame[..4].copy_from_slice(&prefix.to_le_bytes()),
        _ => return Err(RendezvousError::MessageTooLong { bytes, bytes_max }),
    }
    Ok(frame)
}

/// Encodes and writes one frame.
pub(crate) async fn write(
    to: &mut (impl AsyncWrite + Unpin),
    message: &impl Serialize,
    peer: SocketAddr,
    bytes_max: u32,
) -> Result<(), RendezvousError> {
    let frame = encode(message, bytes_max)?;
    let io = |source| RendezvousError::Io { peer, source };
    to.write_all(&frame).await.map_err(io)?;
    // TLS keeps what the socket did not take at once.
    to.flush().await.map_err(io)
}

/// Says our protocol version and hears the peer's: 12 bytes each way whose form never changes.
pub(crate) async fn exchange_preambles(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    peer: SocketAddr,
) -> Result<(), RendezvousError> {
    let io = |source| RendezvousError::Io { peer, source };
    let mut ours = [0; 12];
    ours[..8].copy_from_slice(&MAGIC);
    ours[8..].copy_from_slice(&PROTOCOL_VERSION.to_le_bytes());
    stream.write_all(&ours).await.map_err(io)?;
    stream.flush().await.map_err(io)?;
    let mut theirs = [0; 12];
    // Who hangs up before a word may be a controller that has just died.
    let said = match stream.read(&mut theirs).await.map_err(io)? {
        0 => return Err(io(ErrorKind::UnexpectedEof.into())),
        said => said,
    };
    match stream.read_exact(theirs.get_mut(said..).unwrap_or_default()).await {
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => {
            return Err(RendezvousError::NotWeightsync { peer });
        }
        Err(error) => return Err(io(error)),
    }
    let (magic, version) = theirs.split_at(8);
    if magic != MAGIC {
        return Err(RendezvousError::NotWeightsync { peer });
    }
    match version.try_into().map(u32::from_le_bytes) {
        Ok(PROTOCOL_VERSION) => Ok(()),
        Ok(theirs) => Err(RendezvousError::ProtocolVersion { peer, theirs, ours: PROTOCOL_VERSION }),
        Err(_) => Err(RendezvousError::NotWeightsync { peer }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer() -> SocketAddr {
        ([127, 0, 0, 1], 1).into()
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    fn read_bytes<T: DeserializeOwned>(bytes: &[u8], max: u32) -> Result<Option<T>, RendezvousError> {
        block_on(read(&mut &bytes[..], peer(), max))
    }

    proptest! {
        #[test]
        fn a_frame_survives_the_wire(text in ".{0,200}", numbers in prop::collection::vec(any::<u64>(), 0..50)) {
            let message = (text, numbers);
            let frame = encode(&message, 1 << 20).unwrap();
            prop_assert_eq!(read_bytes(&frame, 1 << 20).unwrap(), Some(message));
        }

        #[test]
        fn every_truncation_is_an_error_and_never_a_message(numbers in prop::collection::vec(any::<u64>(), 1..20), cut in any::<prop::sample::Index>()) {
            let frame = encode(&numbers, 1 << 20).unwrap();
            let cut = cut.index(frame.len());
            match read_bytes::<Vec<u64>>(&frame[..cut], 1 << 20) {
                Ok(None) => prop_assert!(cut < 4),
                Ok(Some(_)) => prop_assert!(false, "decoded a truncated frame"),
                Err(_) => {}
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = read_bytes::<crate::protocol::ToController>(&bytes, 1 << 16);
            let _ = read_bytes::<crate::protocol::ToMember>(&bytes, 1 << 16);
        }
    }

    #[test]
    fn a_long_claim_is_refused_before_it_is_read() {
        let error = read_bytes::<Vec<u8>>(&u32::MAX.to_le_bytes(), 1 << 10).unwrap_err();
        assert!(
            matches!(error, RendezvousError::FrameTooLong { bytes: u32::MAX, bytes_max: 1024, .. }),
            "{error}"
        );
    }

    #[test]
    fn a_bound_that_is_raised_while_nothing_comes_counts() {
        use std::sync::atomic::{AtomicU32, Ordering};
        for (raised, fits) in [(64, true), (7, false)] {
            let bytes_max = AtomicU32::new(8);
            let (mut near, mut far) = tokio::io::duplex(128);
            let (read, ()) = block_on(async {
                let read = read_bounded::<Vec<u8>>(&mut near, peer(), || bytes_max.load(Ordering::Relaxed));
                // It waits already.
                tokio::join!(biased; read, async {
                    bytes_max.store(raised, Ordering::Relaxed);
                    far.write_all(&encode(&vec![1u8; 32], 64).unwrap()).await.unwrap();
                })
            });
            assert_eq!(read.is_ok(), fits, "{read:?}");
        }
    }

    #[test]
    fn bytes_after_the_message_are_refused() {
        let mut frame = encode(&7u64, 64).unwrap();
        frame.push(0);
        frame[0] += 1;
        assert!(matches!(read_bytes::<u64>(&frame, 64), Err(RendezvousError::Malformed { .. })));
    }

    #[test]
    fn another_version_is_named() {
        let (mut ours, mut theirs) = tokio::io::duplex(64);
        let error = block_on(async {
            let mut preamble = MAGIC.to_vec();
            preamble.extend((PROTOCOL_VERSION + 1).to_le_bytes());
            theirs.write_all(&preamble).await.unwrap();
            exchange_preambles(&mut ours, peer()).await.unwrap_err()
        });
        let RendezvousError::ProtocolVersion { theirs, .. } = error else { panic!("{error}") };
        assert_eq!(theirs, PROTOCOL_VERSION + 1);
    }
}
