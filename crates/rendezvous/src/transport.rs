//! How the bytes of a control connection travel: plain TCP, or TLS on it.
//!
//! The rest of the crate sees one stream that is read and written. A connection is never plain where TLS was asked for.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use crate::error::RendezvousError;
#[cfg(feature = "tls")]
use crate::tls::{Identity, IdentityError, Tls};

/// How the bytes of control connections travel; both ends say the same. The default is plain TCP.
#[derive(Clone, Default)]
pub struct Transport(Kind);

#[derive(Clone, Default)]
enum Kind {
    #[default]
    Tcp,
    #[cfg(feature = "tls")]
    Tls(Tls),
}

impl Transport {
    /// Plain TCP: the ends prove themselves by the job's secret, and what follows can be read and changed on its way.
    pub fn tcp() -> Self {
        Self::default()
    }

    /// TLS 1.3, with certificates on both sides that one authority has signed.
    ///
    /// # Errors
    ///
    /// A file that is missing or holds something else, a key of another certificate, a certificate that has expired or
    /// that the authority has not signed. The error names the file.
    #[cfg(feature = "tls")]
    pub fn tls(identity: &Identity) -> Result<Self, IdentityError> {
        Tls::load(identity).map(|tls| Self(Kind::Tls(tls)))
    }

    /// Whether it keeps strangers out by itself.
    pub(crate) fn authenticates(&self) -> bool {
        match &self.0 {
            Kind::Tcp => false,
            #[cfg(feature = "tls")]
            Kind::Tls(_) => true,
        }
    }

    /// The controller's side of a new connection.
    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
    ) -> Result<Stream, RendezvousError> {
        stream.set_nodelay(true).map_err(|source| RendezvousError::Io { peer, source })?;
        match &self.0 {
            Kind::Tcp => Ok(Stream::Tcp(stream)),
            #[cfg(feature = "tls")]
            Kind::Tls(tls) => Ok(Stream::Tls(Box::new(tls.accept(stream, peer).await?))),
        }
    }

    /// The member's side of a new connection to the controller at `address`, its `host:port`.
    #[cfg_attr(not(feature = "tls"), allow(unused_variables))] // only TLS looks at the name
    pub(crate) async fn connect(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        address: &str,
    ) -> Result<Stream, RendezvousError> {
        stream.set_nodelay(true).map_err(|source| RendezvousError::Io { peer, source })?;
        match &self.0 {
            Kind::Tcp => Ok(Stream::Tcp(stream)),
            #[cfg(feature = "tls")]
            Kind::Tls(tls) => Ok(Stream::Tls(Box::new(tls.connect(stream, peer, address).await?))),
        }
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.authenticates() { "Transport(tls)" } else { "Transport(tcp)" })
    }
}

/// In TLS 1.3 a member learns only after its own handshake that the controller refuses its certificate: as a failed read.
/// This says what that was.
pub(crate) fn explained(error: RendezvousError) -> RendezvousError {
    #[cfg(feature = "tls")]
    if let RendezvousError::Io { peer, source } = error {
        return crate::tls::explained(peer, source);
    }
    error
}

/// One connection.
pub(crate) enum Stream {
    Tcp(TcpStream),
    #[cfg(feature = "tls")]
    Tls(Box<tokio_rustls::TlsStream<TcpStream>>),
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, to),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, to),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            #[cfg(feature = "tls")]
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
