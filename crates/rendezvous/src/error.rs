//! What can go wrong between a member and the controller.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::member::Unexpected;

/// An error of the control plane. The message names the peer and says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RendezvousError {
    /// The controller could not open its listening socket.
    #[error("cannot listen on {address}: {source}; is another controller running there? choose another port")]
    Bind {
        /// The address asked for.
        address: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A controller reachable from other hosts needs a secret.
    #[error(
        "refusing to listen on {address} without a secret: anyone who reaches it could join; give a secret \
         (WEIGHTSYNC_SECRET or a secret file) or certificates for TLS, listen on loopback, or allow it by the insecure option"
    )]
    NeedsSecret {
        /// The address asked for.
        address: SocketAddr,
    },
    /// The controller cannot be reached.
    #[error(
        "cannot reach the controller at {address} within {waited:?}: {reason}; is it running, is the port open?"
    )]
    Unreachable {
        /// The address asked for.
        address: String,
        /// How long it was tried.
        waited: Duration,
        /// The last attempt's failure.
        reason: String,
    },
    /// The peer is not a weightsync of any version.
    #[error(
        "{peer} does not speak the weightsync protocol; check the address and port, and that both sides or neither have TLS"
    )]
    NotWeightsync {
        /// Who was asked.
        peer: SocketAddr,
    },
    /// The peer is another release.
    #[error(
        "{peer} speaks protocol version {theirs}, this build speaks {ours}; run the same release everywhere"
    )]
    ProtocolVersion {
        /// Who was asked.
        peer: SocketAddr,
        /// Its version.
        theirs: u32,
        /// This build's version.
        ours: u32,
    },
    /// The secrets differ.
    #[error(
        "{peer} does not know this job's secret (or this process has the wrong one); give both sides the same"
    )]
    Secret {
        /// Who was asked.
        peer: SocketAddr,
    },
    /// TLS failed: a certificate that is not believed, or a peer without TLS.
    #[cfg(feature = "tls")]
    #[error("no TLS with {peer}: {reason}")]
    Tls {
        /// The other end.
        peer: SocketAddr,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// A frame longer than its bound.
    #[error("{peer} sent a frame of {bytes} bytes, more than the {bytes_max} allowed here")]
    FrameTooLong {
        /// The sender.
        peer: SocketAddr,
        /// Its claim.
        bytes: u32,
        /// The bound.
        bytes_max: u32,
    },
    /// A message of ours is longer than a frame may be.
    #[error("a message of {bytes} bytes exceeds the control plane's bound of {bytes_max}")]
    MessageTooLong {
        /// Its length.
        bytes: usize,
        /// The bound.
        bytes_max: u32,
    },
    /// A frame that does not decode.
    #[error("{peer} sent a malformed message: {reason}")]
    Malformed {
        /// The sender.
        peer: SocketAddr,
        /// The decoder's reason.
        reason: String,
    },
    /// A message that is not possible now.
    #[error("the controller sent {found} while this rank waited for {expected}")]
    Unexpected {
        /// What was waited for.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// The controller refused this member, or ended the job.
    #[error("the controller refused: {reason}")]
    Refused {
        /// Its reason.
        reason: String,
    },
    /// The connection ended.
    #[error("lost the controller at {peer} while waiting for {stage}: {reason}")]
    Lost {
        /// The controller.
        peer: SocketAddr,
        /// What was waited for.
        stage: &'static str,
        /// How the connection ended.
        reason: String,
    },
    /// The controller did not answer in time.
    #[error("the controller at {peer} did not answer within {waited:?} while waiting for {stage}")]
    Deadline {
        /// The controller.
        peer: SocketAddr,
        /// What was waited for.
        stage: &'static str,
        /// For how long.
        waited: Duration,
    },
    /// The record of the last commit cannot be used.
    #[error("the commit record {}: {reason}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// Why not, and what to do.
        reason: String,
    },
    /// A controller that members could not be told to come to.
    #[error(
        "{reason}; listen on one address of this host, or advertise the HOST:PORT at which members reach it"
    )]
    Advertise {
        /// The address, and what is wrong with it.
        reason: String,
    },
    /// etcd, which knows where the controller is and what was committed, cannot be used.
    #[error("etcd at {url}: {reason}")]
    Etcd {
        /// Its address, as it was given.
        url: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// The kernel gave no random bytes.
    #[error("no random bytes from the kernel: {0}")]
    Random(#[from] getrandom::Error),
    /// A socket failed.
    #[error("{peer}: {source}")]
    Io {
        /// The other end.
        peer: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
}

impl From<Unexpected> for RendezvousError {
    fn from(Unexpected { expected, found }: Unexpected) -> Self {
        Self::Unexpected { expected, found: found.to_owned() }
    }
}
