//! What strangers and peers can send, as functions of bytes: for the project's fuzz targets, and for nobody else.
//!
//! Nothing here is a second way in: each function hands the bytes to what the sockets hand them to.

use std::net::{Ipv4Addr, SocketAddr};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::frame;
use crate::handshake::{Secret, accept, prove};
use crate::protocol::{FRAME_BYTES_MAX, ToController, ToMember};

/// More than a handshake writes.
const PIPE_BYTES: usize = 4096;

fn peer() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 1).into()
}

/// What a future that never has to wait comes to. `None` if it waits.
fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}

/// Reads frame after frame, until one is refused; what was read has to survive another trip.
fn messages<T: DeserializeOwned + Serialize>(mut bytes: &[u8]) -> Vec<T> {
    let mut messages = Vec::new();
    while let Some(Ok(Some(message))) = at_once(frame::read::<T>(&mut bytes, peer(), FRAME_BYTES_MAX)) {
        if let Ok(again) = frame::encode(&message, FRAME_BYTES_MAX) {
            let read = at_once(frame::read::<T>(&mut &again[..], peer(), FRAME_BYTES_MAX));
            let same = matches!(&read, Some(Ok(Some(read))) if frame::encode(read, FRAME_BYTES_MAX).is_ok_and(|read| read == again));
            assert!(same, "a message changes on its way");
        }
        messages.push(message);
    }
    messages
}

/// As the controller reads a member's.
pub fn to_controller(bytes: &[u8]) -> Vec<ToController> {
    messages(bytes)
}

/// As a member reads the controller's.
pub fn to_member(bytes: &[u8]) -> Vec<ToMember> {
    messages(bytes)
}

/// Both sides of the handshake with somebody who says this and hangs up; whether either was convinced.
pub fn handshake(bytes: &[u8]) -> bool {
    let secret = Secret::new("not to be guessed");
    let convinced = |side: &dyn Fn(tokio::io::DuplexStream) -> bool| {
        let (near, mut far) = tokio::io::duplex(PIPE_BYTES);
        let said = at_once(async {
            let _ = far.write_all(bytes.get(..PIPE_BYTES).unwrap_or(bytes)).await;
            let _ = far.shutdown().await;
        });
        let convinced = side(near);
        let mut heard = Vec::new();
        let read = at_once(far.read_to_end(&mut heard));
        assert!(said.is_some() && read.is_some(), "a handshake waits for somebody who has hung up");
        assert!(heard.len() < 512, "a stranger is told {} bytes", heard.len());
        convinced
    };
    let controller = convinced(&|mut near| {
        at_once(accept(&mut near, peer(), &secret)).expect("it waits for somebody who has hung up").is_ok()
    });
    let member = convinced(&|mut near| {
        at_once(prove(&mut near, peer(), &secret)).expect("it waits for somebody who has hung up").is_ok()
    });
    controller || member
}

/// As a controller reads the record of the last commit, from a file or from etcd. What it takes for one, it would have written.
pub fn record(bytes: &[u8]) -> bool {
    let Some((job, commit)) = std::str::from_utf8(bytes).ok().and_then(crate::record::parse) else {
        return false;
    };
    assert_eq!(
        crate::record::text(&job, commit).as_bytes(),
        bytes,
        "a record that nobody writes is believed"
    );
    true
}

/// As etcd's answers are read, of which the first two bytes are the HTTP status; how many keys were of use.
#[cfg(feature = "etcd")]
pub fn etcd_answer(bytes: &[u8]) -> usize {
    let Some((status, body)) = bytes.split_at_checked(2) else { return 0 };
    let status = status.try_into().map_or(0, u16::from_le_bytes);
    crate::etcd::read_answer(status, body.to_vec())
}
