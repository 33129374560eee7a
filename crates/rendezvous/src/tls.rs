//! Mutual TLS on the control connection: what it is made from, and what its errors mean.
//!
//! TLS 1.3 alone, with certificates on both sides that one authority has signed. The controller takes any certificate of that
//! authority, so it should be the job's or the cluster's own; a member also compares the controller's name. Nothing is
//! resumed: every connection shows its certificate, so one that has expired is refused from then on. What is wrong with
//! a file is found when it is loaded, before anything listens or connects.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::rustls::client::{Resumption, WebPkiServerVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{
    AlertDescription, CertificateError, ClientConfig, Error, RootCertStore, ServerConfig, version,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::error::RendezvousError;

/// How long a refused peer may take to read why. A socket that is closed with unread bytes resets, and a reset can overtake
/// the alert.
const REFUSAL_MAX: Duration = Duration::from_millis(500);

/// What one process shows to others, and by what it believes them: files in PEM form.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Certificates of the authorities that sign the other side's.
    pub ca: PathBuf,
    /// This process's certificate, then what leads from it to the authority.
    pub certificate: PathBuf,
    /// Its private key.
    pub key: PathBuf,
    /// The name in the controller's certificate; `None` takes the host of the controller's address. Only members look at it.
    pub name: Option<String>,
}

/// Why an [`Identity`] cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A file that cannot be read.
    #[error("cannot read the {what} from {file}: {source}")]
    Read {
        /// What was looked for.
        what: &'static str,
        /// Where.
        file: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file that holds something else.
    #[error("there is no {what} in {file}; a file in PEM form is expected, with lines `-----BEGIN ...-----`")]
    Missing {
        /// What was looked for.
        what: &'static str,
        /// Where.
        file: PathBuf,
    },
    /// A file that is damaged, or of a form that is not known.
    #[error("the {what} in {file} cannot be used: {reason}")]
    Malformed {
        /// What was looked for.
        what: &'static str,
        /// Where.
        file: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The key of another certificate.
    #[error(
        "the private key in {key} is not that of the first certificate in {certificate}; give the two of one process"
    )]
    KeyMismatch {
        /// The key's file.
        key: PathBuf,
        /// The certificate's.
        certificate: PathBuf,
    },
    /// A certificate whose time is over, or has not come.
    #[error("the certificate in {file} is not valid now: {reason}; make a new one, or set this host's clock")]
    Expired {
        /// Its file.
        file: PathBuf,
        /// Since when.
        reason: String,
    },
    /// A certificate of another authority.
    #[error(
        "the certificate in {file} is not signed by an authority in {ca}; give the authority's certificate, and in {file} those \
         that lead to it"
    )]
    UnknownCa {
        /// Its file.
        file: PathBuf,
        /// The authorities'.
        ca: PathBuf,
    },
    /// A name that no certificate can have.
    #[error("'{0}' is neither a host name nor an address, so no certificate can be for it")]
    Name(String),
}

/// Both roles, ready for connections.
#[derive(Clone)]
pub(crate) struct Tls {
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
    name: Option<ServerName<'static>>,
}

impl Tls {
    pub(crate) fn load(identity: &Identity) -> Result<Self, IdentityError> {
        let Identity { ca, certificate, key, name } = identity;
        let provider = Arc::new(ring::default_provider());
        let mut roots = RootCertStore::empty();
        for authority in certificates(ca, "certificate of an authority")? {
            roots.add(authority).map_err(|error| malformed("certificate of an authority", ca, &error))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(certificate, "certificate")?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|error| unread("private key", key, error))?;
        check_own(&chain, &roots, &provider, identity)?;
        let rejected = |error: Error| match error {
            Error::InconsistentKeys(_) => IdentityError::KeyMismatch {
                key: identity.key.clone(),
                certificate: identity.certificate.clone(),
            },
            error => malformed("private key", &identity.key, &error),
        };
        let unusable =
            |error: &dyn std::fmt::Display| malformed("certificate of an authority", &identity.ca, error);

        let members = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone());
        let members = members.build().map_err(|error| unusable(&error))?;
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&version::TLS13])
            .map_err(|error| unusable(&error))?
            .with_client_cert_verifier(members)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(rejected)?;
        server.send_tls13_tickets = 0;

        let controllers = WebPkiServerVerifier::builder_with_provider(roots, provider.clone());
        let controllers = controllers.build().map_err(|error| unusable(&error))?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])
            .map_err(|error| unusable(&error))?
            .with_webpki_verifier(controllers)
            .with_client_auth_cert(chain, key)
            .map_err(rejected)?;
        client.resumption = Resumption::disabled();

        let name = name.as_deref().map(server_name).transpose()?;
        Ok(Self { server: server.into(), client: client.into(), name })
    }

    pub(crate) async fn accept(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
    ) -> Result<TlsStream<TcpStream>, RendezvousError> {
        let accept = TlsAcceptor::from(self.server.clone()).accept(stream).into_fallible();
        match accept.await {
            Ok(stream) => Ok(TlsStream::Server(stream)),
            Err((error, mut stream)) => {
                let _ = stream.shutdown().await;
                let mut sink = [0; 1024];
                let drain = async { while matches!(stream.read(&mut sink).await, Ok(1..)) {} };
                let _ = timeout(REFUSAL_MAX, drain).await;
                Err(explained(peer, error))
            }
        }
    }

    pub(crate) async fn connect(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        address: &str,
    ) -> Result<TlsStream<TcpStream>, RendezvousError> {
        let name = match &self.name {
            Some(name) => name.clone(),
            None => server_name(host_of(address))
                .map_err(|error| RendezvousError::Tls { peer, reason: error.to_string() })?,
        };
        let connect = TlsConnector::from(self.client.clone()).connect(name, stream);
        connect.await.map(TlsStream::Client).map_err(|error| explained(peer, error))
    }
}

/// Refuses a certificate of our own that no peer would take. What it may be used for is left to the peer: a controller's
/// and a member's differ in that.
fn check_own(
    chain: &[CertificateDer<'static>],
    roots: &Arc<RootCertStore>,
    provider: &Arc<CryptoProvider>,
    identity: &Identity,
) -> Result<(), IdentityError> {
    let (file, ca) = (identity.certificate.clone(), identity.ca.clone());
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
    let verifier = verifier.map_err(|error| malformed("certificate of an authority", &ca, &error))?;
    let Some((own, intermediates)) = chain.split_first() else { return Ok(()) };
    let Err(error) = verifier.verify_client_cert(own, intermediates, UnixTime::now()) else { return Ok(()) };
    let Error::InvalidCertificate(reason) = &error else {
        return Err(malformed("certificate", &file, &error));
    };
    match reason {
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => Ok(()),
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            Err(IdentityError::UnknownCa { file, ca })
        }
        CertificateError::Expired
        | CertificateError::ExpiredContext { .. }
        | CertificateError::NotValidYet
        | CertificateError::NotValidYetContext { .. } => {
            Err(IdentityError::Expired { file, reason: reason.to_string() })
        }
        _ => Err(malformed("certificate", &file, &error)),
    }
}

pub(crate) fn certificates(
    file: &Path,
    what: &'static str,
) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let read = CertificateDer::pem_file_iter(file).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(found) if found.is_empty() => Err(IdentityError::Missing { what, file: file.into() }),
        Ok(found) => Ok(found),
        Err(error) => Err(unread(what, file, error)),
    }
}

fn unread(what: &'static str, file: &Path, error: pem::Error) -> IdentityError {
    match error {
        pem::Error::Io(source) => IdentityError::Read { what, file: file.into(), source },
        pem::Error::NoItemsFound => IdentityError::Missing { what, file: file.into() },
        error => malformed(what, file, &error),
    }
}

fn malformed(what: &'static str, file: &Path, error: &dyn std::fmt::Display) -> IdentityError {
    IdentityError::Malformed { what, file: file.into(), reason: error.to_string() }
}

pub(crate) fn server_name(name: &str) -> Result<ServerName<'static>, IdentityError> {
    ServerName::try_from(name.to_owned()).map_err(|_| IdentityError::Name(name.to_owned()))
}

/// The host of `host:port` or `[v6]:port`.
pub(crate) fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

/// What a failed read, write or handshake means, where it is TLS that failed.
pub(crate) fn explained(peer: SocketAddr, source: io::Error) -> RendezvousError {
    let reason = source.get_ref().and_then(|inner| inner.downcast_ref::<Error>()).map(in_words);
    match reason {
        Some(reason) => RendezvousError::Tls { peer, reason },
        None => RendezvousError::Io { peer, source },
    }
}

fn in_words(error: &Error) -> String {
    let advice = match error {
        Error::InvalidMessage(_) => "does it speak TLS? give both sides certificates, or neither",
        Error::NoCertificatesPresented => "give it a certificate and a key",
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "its certificate is of another authority than this side trusts"
        }
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "connect by a name in its certificate, or say which name to expect",
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "make a new one for it, or set the clocks"
        }
        Error::InvalidCertificate(_) => "make it another certificate",
        Error::AlertReceived(
            AlertDescription::UnknownCA | AlertDescription::DecryptError | AlertDescription::BadCertificate,
        ) => "it does not trust this side's certificate: is that of the same authority?",
        Error::AlertReceived(AlertDescription::CertificateExpired) => "this side's certificate has expired",
        Error::AlertReceived(AlertDescription::CertificateRequired) => "this side showed no certificate",
        _ => return error.to_string(),
    };
    format!("{error}; {advice}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_is_what_the_port_leaves() {
        for (address, host) in [
            ("trainer-0.cluster:7070", "trainer-0.cluster"),
            ("10.0.0.1:7070", "10.0.0.1"),
            ("[fe80::1]:7070", "fe80::1"),
        ] {
            assert_eq!(host_of(address), host);
            assert!(server_name(host).is_ok(), "{host}");
        }
        assert!(matches!(server_name("no name"), Err(IdentityError::Name(_))));
    }
}
