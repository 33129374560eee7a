//! Who may join: both ends prove that they know the job's secret before either says an address or a key.
//!
//! The controller sends 32 random bytes, the member answers with 32 of its own and a BLAKE3 keyed hash over both; the
//! controller proves itself in the same way with the roles swapped. The secret never travels, and a recorded handshake
//! is of no use against new random bytes. This authenticates the ends when they connect; it does not encrypt or
//! authenticate the bytes that follow, and those name addresses and keys: run it on TLS, or over a network that outsiders can
//! neither read nor write. A weak secret can be guessed from one recorded handshake; take 32 random bytes.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::error::RendezvousError;
use crate::frame;
use crate::protocol::HANDSHAKE_FRAME_BYTES_MAX;

const NONCE_BYTES: usize = 32;
type Nonce = [u8; NONCE_BYTES];

/// The job's shared secret, as a key. It does not print itself.
#[derive(Clone)]
pub struct Secret {
    key: [u8; 32],
    empty: bool,
}

impl Secret {
    /// A secret from text or bytes of any length; surrounding white space of a file is the caller's to trim.
    pub fn new(secret: impl AsRef<[u8]>) -> Self {
        let secret = secret.as_ref();
        Self { key: blake3::derive_key("weightsync 2026-11 join secret", secret), empty: secret.is_empty() }
    }

    /// No secret: everybody who reaches the controller can join. For loopback, or by an explicit choice.
    pub fn none() -> Self {
        Self::new([])
    }

    /// A new random secret, as text that can be handed to child processes.
    pub fn random_text() -> Result<String, RendezvousError> {
        Ok(random_seed()?.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    pub(crate) fn is_none(&self) -> bool {
        self.empty
    }

    fn proof(&self, prover: &'static [u8], challenge: &Nonce, own: &Nonce) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(prover).update(challenge).update(own);
        hasher.finalize()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.empty { "Secret(none)" } else { "Secret(..)" })
    }
}

#[derive(Serialize, Deserialize)]
struct Challenge {
    nonce: Nonce,
}

#[derive(Serialize, Deserialize)]
struct Answer {
    nonce: Nonce,
    proof: [u8; 32],
}

/// The controller's proof, or `None` when it did not accept the member's.
#[derive(Serialize, Deserialize)]
struct Verdict {
    proof: Option<[u8; 32]>,
}

const MEMBER: &[u8] = b"weightsync member";
const CONTROLLER: &[u8] = b"weightsync controller";

/// 32 random bytes from the kernel.
pub(crate) fn random_seed() -> Result<[u8; 32], RendezvousError> {
    let mut seed = [0; NONCE_BYTES];
    getrandom::fill(&mut seed)?;
    Ok(seed)
}

async fn receive<T: serde::de::DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
    peer: SocketAddr,
) -> Result<T, RendezvousError> {
    let closed = || RendezvousError::Io { peer, source: io::ErrorKind::UnexpectedEof.into() };
    frame::read(stream, peer, HANDSHAKE_FRAME_BYTES_MAX).await?.ok_or_else(closed)
}

/// Whether the peer has ended the connection.
pub(crate) fn is_hang_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

/// The controller's side.
pub(crate) async fn accept(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    peer: SocketAddr,
    secret: &Secret,
) -> Result<(), RendezvousError> {
    frame::exchange_preambles(stream, peer).await.map_err(|error| match error {
        // A member says who it is at once.
        RendezvousError::Io { peer, source } if is_hang_up(&source) => {
            RendezvousError::NotWeightsync { peer }
        }
        error => error,
    })?;
    let ours = random_seed()?;
    frame::write(stream, &Challenge { nonce: ours }, peer, HANDSHAKE_FRAME_BYTES_MAX).await?;
    let answer: Answer = receive(stream, peer).await?;
    // `blake3::Hash` compares in constant time.
    if secret.proof(MEMBER, &ours, &answer.nonce) != blake3::Hash::from(answer.proof) {
        frame::write(stream, &Verdict { proof: None }, peer, HANDSHAKE_FRAME_BYTES_MAX).await?;
        return Err(RendezvousError::Secret { peer });
    }
    let proof = Some(secret.proof(CONTROLLER, &answer.nonce, &ours).into());
    frame::write(stream, &Verdict { proof }, peer, HANDSHAKE_FRAME_BYTES_MAX).await
}

/// The member's side.
pub(crate) async fn prove(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    peer: SocketAddr,
    secret: &Secret,
) -> Result<(), RendezvousError> {
    frame::exchange_preambles(stream, peer).await?;
    let challenge: Challenge = receive(stream, peer).await?;
    let ours = random_seed()?;
    let answer = Answer { nonce: ours, proof: secret.proof(MEMBER, &challenge.nonce, &ours).into() };
    frame::write(stream, &answer, peer, HANDSHAKE_FRAME_BYTES_MAX).await?;
    let verdict: Verdict = receive(stream, peer).await?;
    let expected = secret.proof(CONTROLLER, &ours, &challenge.nonce);
    match verdict.proof {
        Some(proof) if expected == blake3::Hash::from(proof) => Ok(()),
        _ => Err(RendezvousError::Secret { peer }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn shake(
        controller: Secret,
        member: Secret,
    ) -> (Result<(), RendezvousError>, Result<(), RendezvousError>) {
        let peer = ([127, 0, 0, 1], 1).into();
        let (mut near, mut far) = tokio::io::duplex(1024);
        tokio::join!(accept(&mut near, peer, &controller), prove(&mut far, peer, &member))
    }

    #[tokio::test]
    async fn the_same_secret_is_accepted_on_both_sides() {
        let (controller, member) = shake(Secret::new("a"), Secret::new("a")).await;
        controller.unwrap();
        member.unwrap();
    }

    #[tokio::test]
    async fn different_secrets_are_refused_on_both_sides() {
        for (controller, member) in [("a", "b"), ("a", ""), ("", "a")] {
            let (controller, member) = shake(Secret::new(controller), Secret::new(member)).await;
            assert!(matches!(controller, Err(RendezvousError::Secret { .. })), "{controller:?}");
            assert!(matches!(member, Err(RendezvousError::Secret { .. })), "{member:?}");
        }
    }

    #[test]
    fn a_proof_binds_the_role_and_both_nonces() {
        let secret = Secret::new("a");
        let proof = secret.proof(MEMBER, &[1; 32], &[2; 32]);
        assert_ne!(proof, secret.proof(CONTROLLER, &[1; 32], &[2; 32]));
        assert_ne!(proof, secret.proof(MEMBER, &[2; 32], &[1; 32]));
        assert!(!format!("{secret:?}").contains('a') || format!("{secret:?}") == "Secret(..)");
    }
}
