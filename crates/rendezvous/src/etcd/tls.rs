//! TLS to etcd: its certificate is checked, and ours shown where there is one.
//!
//! The authority is etcd's own, which is rarely the job's: so it has files of its own. There is no way to leave the check out.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring, version};

use super::Failure;
use crate::tls::{certificates, host_of, server_name};

const CA_VARIABLE: &str = "WEIGHTSYNC_ETCD_CA";
const CERT_VARIABLE: &str = "WEIGHTSYNC_ETCD_CERT";
const KEY_VARIABLE: &str = "WEIGHTSYNC_ETCD_KEY";

pub(super) struct Tls(Arc<ClientConfig>);

impl Tls {
    pub(super) fn load(variable: &dyn Fn(&'static str) -> Option<String>) -> Result<Self, String> {
        let ca = variable(CA_VARIABLE).map(PathBuf::from).ok_or_else(|| {
            format!("TLS to etcd needs {CA_VARIABLE}: a PEM file with the authority of etcd's certificate")
        })?;
        let mut roots = RootCertStore::empty();
        for authority in
            certificates(&ca, "certificate of an authority").map_err(|error| error.to_string())?
        {
            roots.add(authority).map_err(|error| format!("{CA_VARIABLE}: {error}"))?;
        }
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_protocol_versions(&[&version::TLS13])
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots);
        let config = match (variable(CERT_VARIABLE), variable(KEY_VARIABLE)) {
            (None, None) => config.with_no_client_auth(),
            (Some(certificate), Some(key)) => {
                let chain = certificates(&PathBuf::from(certificate), "certificate");
                let chain = chain.map_err(|error| error.to_string())?;
                let key =
                    PrivateKeyDer::from_pem_file(key).map_err(|error| format!("{KEY_VARIABLE}: {error}"))?;
                config
                    .with_client_auth_cert(chain, key)
                    .map_err(|error| format!("{KEY_VARIABLE}: {error}"))?
            }
            _ => return Err(format!("{CERT_VARIABLE} and {KEY_VARIABLE} must be set together")),
        };
        Ok(Self(Arc::new(config)))
    }

    pub(super) async fn connect(
        &self,
        stream: TcpStream,
        endpoint: &str,
    ) -> Result<TlsStream<TcpStream>, Failure> {
        let name = server_name(host_of(endpoint)).map_err(|error| Failure::Refused(error.to_string()))?;
        // Also where another server of the cluster may do better.
        let failed = |error: std::io::Error| Failure::Away(format!("no TLS: {error}"));
        TlsConnector::from(self.0.clone()).connect(name, stream).await.map_err(failed)
    }
}
