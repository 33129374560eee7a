//! The bench's own connection between rank 0's process and every rank: who is there, what to measure, what came out.
//!
//! Both ends prove that they know the job's secret before either says anything. Then come frames: a 32-bit little-endian
//! length and so much JSON, the length checked before a byte is allocated. An empty frame is a sign of life, so a silent
//! peer is told from a busy one and every wait ends. It does not encrypt. It must never carry weights.

use std::io;
use std::marker::PhantomData;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// First bytes of rank 0's side; the digit is the version of what follows.
const MAGIC: [u8; 8] = *b"wsbench1";

const NONCE_BYTES: usize = 32;

/// Bytes of a message. The longest are a host's whole topology and a `config.json`, under 1 MiB each.
const FRAME_BYTES_MAX: u32 = 8 << 20;

/// Messages that may wait for the socket or the reader: the protocol has one or two outstanding.
const MESSAGES_MAX: usize = 16;

/// A handshake takes no longer than this.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);

/// Signs of life per deadline: two may be late before anybody is given up.
const BEATS_PER_DEADLINE: u32 = 4;

/// The job's secret as a key.
#[derive(Clone)]
pub(crate) struct Key([u8; 32]);

impl Key {
    pub(crate) fn new(secret: &str) -> Self {
        Self(blake3::derive_key("weightsync 2026-11 bench cluster link", secret.as_bytes()))
    }

    fn proof(
        &self,
        prover: &[u8],
        theirs: &[u8; NONCE_BYTES],
        ours: &[u8; NONCE_BYTES],
        who: Who,
    ) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(prover).update(theirs).update(ours);
        hasher.update(&who.rank.to_le_bytes()).update(&who.size.to_le_bytes());
        hasher.finalize()
    }
}

/// Who connects, and to how large a job it takes itself to belong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Who {
    pub(crate) rank: u32,
    pub(crate) size: u32,
}

const RANK: &[u8] = b"rank";
const ROOT: &[u8] = b"root";

fn nonce() -> anyhow::Result<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce).context("no random bytes")?;
    Ok(nonce)
}

/// Rank 0's side of the handshake: who it is that connected.
pub(crate) async fn accept(stream: &mut TcpStream, key: &Key) -> anyhow::Result<Who> {
    timeout(HANDSHAKE_MAX, async {
        let ours = nonce()?;
        stream.write_all(&MAGIC).await?;
        stream.write_all(&ours).await?;
        let mut theirs = [0; NONCE_BYTES];
        let mut proof = [0; 32];
        stream.read_exact(&mut theirs).await?;
        let who = Who { rank: stream.read_u32_le().await?, size: stream.read_u32_le().await? };
        stream.read_exact(&mut proof).await?;
        // `blake3::Hash` compares in constant time.
        if key.proof(RANK, &ours, &theirs, who) != blake3::Hash::from(proof) {
            bail!("it does not know this job's secret");
        }
        stream.write_all(key.proof(ROOT, &theirs, &ours, who).as_bytes()).await?;
        Ok(who)
    })
    .await
    .context("it did not introduce itself")?
}

/// A rank's side of the handshake.
pub(crate) async fn introduce(stream: &mut TcpStream, key: &Key, who: Who) -> anyhow::Result<()> {
    timeout(HANDSHAKE_MAX, async {
        let mut magic = [0; MAGIC.len()];
        let mut theirs = [0; NONCE_BYTES];
        stream.read_exact(&mut magic).await?;
        if magic != MAGIC {
            bail!("what listens there is no rank 0 of this benchmark; choose another port with --address HOST:PORT");
        }
        stream.read_exact(&mut theirs).await?;
        let ours = nonce()?;
        let proof = key.proof(RANK, &theirs, &ours, who);
        stream.write_all(&ours).await?;
        stream.write_u32_le(who.rank).await?;
        stream.write_u32_le(who.size).await?;
        stream.write_all(proof.as_bytes()).await?;
        let mut answer = [0; 32];
        let answered = stream.read_exact(&mut answer).await;
        if answered.is_err() || key.proof(ROOT, &ours, &theirs, who) != blake3::Hash::from(answer) {
            bail!("rank 0 has another secret: give the same one to every rank");
        }
        Ok(())
    })
    .await
    .context("rank 0 did not answer")?
}

/// The sending half of a connection after its handshake. Dropping it closes the connection once what waits was written;
/// [`Link::close`] waits for that.
pub(crate) struct Link<Out> {
    outgoing: mpsc::Sender<Vec<u8>>,
    writer: JoinHandle<()>,
    messages: PhantomData<fn(Out)>,
}

/// What comes in, up to the reason why nothing more will.
pub(crate) type Incoming<In> = mpsc::Receiver<Result<In, String>>;

impl<Out: Serialize> Link<Out> {
    pub(crate) fn start<In>(stream: TcpStream, deadline: Duration) -> io::Result<(Self, Incoming<In>)>
    where
        In: DeserializeOwned + Send + 'static,
    {
        stream.set_nodelay(true)?;
        let (from, to) = stream.into_split();
        let (news, incoming) = mpsc::channel(MESSAGES_MAX);
        let (outgoing, frames) = mpsc::channel(MESSAGES_MAX);
        tokio::spawn(read_all(from, deadline, news));
        let writer = tokio::spawn(write_all(to, deadline, frames));
        Ok((Self { outgoing, writer, messages: PhantomData }, incoming))
    }

    /// Sends a message, or says that the connection is gone.
    pub(crate) async fn send(&self, message: &Out) -> anyhow::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() as u64 > u64::from(FRAME_BYTES_MAX) {
            bail!("a message of {} bytes is longer than a frame may be", bytes.len());
        }
        self.outgoing.send(bytes).await.ok().context("the connection is closed")
    }

    /// Writes what waits, then closes.
    pub(crate) async fn close(self) {
        drop(self.outgoing);
        // A failed write has nobody left to tell.
        let _ = self.writer.await;
    }
}

async fn read_all<In: DeserializeOwned>(
    mut from: OwnedReadHalf,
    deadline: Duration,
    news: mpsc::Sender<Result<In, String>>,
) {
    loop {
        let frame = tokio::select! {
            frame = timeout(deadline, read_frame(&mut from)) => frame,
            () = news.closed() => return,
        };
        let message = match frame {
            Ok(Ok(frame)) if frame.is_empty() => continue,
            Ok(Ok(frame)) => {
                serde_json::from_slice(&frame).map_err(|error| format!("it sent nonsense: {error}"))
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err("its connection closed: it has ended".into())
            }
            Ok(Err(error)) => Err(format!("its connection broke: {error}")),
            Err(_) => Err(format!("it gave no sign of life for {deadline:?}")),
        };
        let last = message.is_err();
        if news.send(message).await.is_err() || last {
            return;
        }
    }
}

async fn read_frame(from: &mut OwnedReadHalf) -> io::Result<Vec<u8>> {
    let bytes = from.read_u32_le().await?;
    if bytes > FRAME_BYTES_MAX {
        let claim = format!("a frame of {bytes} bytes, more than {FRAME_BYTES_MAX}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, claim));
    }
    let mut frame = Vec::new();
    from.take(bytes.into()).read_to_end(&mut frame).await?;
    if frame.len() < bytes as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(frame)
}

async fn write_all(mut to: OwnedWriteHalf, deadline: Duration, mut frames: mpsc::Receiver<Vec<u8>>) {
    loop {
        let frame = match timeout(deadline / BEATS_PER_DEADLINE, frames.recv()).await {
            Ok(Some(frame)) => frame,
            Ok(None) => break,
            Err(_) => Vec::new(),
        };
        let mut bytes = (frame.len() as u32).to_le_bytes().to_vec();
        bytes.extend(frame);
        // The reader of the other end says what is wrong; here there is nobody to tell.
        if !matches!(timeout(deadline, to.write_all(&bytes)).await, Ok(Ok(()))) {
            return;
        }
    }
    let _ = to.shutdown().await;
}

#[cfg(test)]
mod tests;
