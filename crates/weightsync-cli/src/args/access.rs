//! Who may join: the job's secret, and certificates for TLS.
//!
//! A secret is never an argument: a command line is visible to every user of the host.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use weightsync::{Identity, Secret, Transport};

/// The secret's environment variable.
pub(crate) const SECRET_VARIABLE: &str = "WEIGHTSYNC_SECRET";

/// Where in etcd the controller says where it is.
pub(super) const RENDEZVOUS_VARIABLE: &str = "WEIGHTSYNC_RENDEZVOUS";

const CA_VARIABLE: &str = "WEIGHTSYNC_TLS_CA";
const CERT_VARIABLE: &str = "WEIGHTSYNC_TLS_CERT";
const KEY_VARIABLE: &str = "WEIGHTSYNC_TLS_KEY";
pub(super) const NAME_VARIABLE: &str = "WEIGHTSYNC_TLS_NAME";

/// What asks for TLS without an argument.
pub(crate) const TLS_VARIABLES: [&str; 4] = [CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE, NAME_VARIABLE];

/// What keeps strangers out of a job; the same on all sides.
#[derive(Args, Clone)]
pub(crate) struct AccessArgs {
    /// A file with the job's secret [default: the environment variable WEIGHTSYNC_SECRET]
    #[arg(long, value_name = "FILE")]
    pub(crate) secret_file: Option<PathBuf>,
    /// Talk TLS on the control connection, with peers whose certificates the authorities in this PEM file have signed; with
    /// --tls-cert and --tls-key, and for all processes of the job or none
    #[arg(long, value_name = "FILE", env = CA_VARIABLE, hide_env_values = true)]
    tls_ca: Option<PathBuf>,
    /// This process's certificate in PEM form, and after it what leads to the authority
    #[arg(long, value_name = "FILE", env = CERT_VARIABLE, hide_env_values = true)]
    tls_cert: Option<PathBuf>,
    /// The private key of that certificate in PEM form
    #[arg(long, value_name = "FILE", env = KEY_VARIABLE, hide_env_values = true)]
    tls_key: Option<PathBuf>,
}

impl AccessArgs {
    pub(crate) fn secret(&self) -> anyhow::Result<Secret> {
        let text = match &self.secret_file {
            Some(path) => std::fs::read_to_string(path)
                .with_context(|| format!("cannot read the secret from {}", path.display()))?,
            None => match std::env::var(SECRET_VARIABLE) {
                Ok(text) => text,
                Err(std::env::VarError::NotPresent) => return Ok(Secret::none()),
                Err(error) => bail!("{SECRET_VARIABLE}: {error}"),
            },
        };
        match text.trim() {
            "" => bail!("the secret is empty; leave it out or give one"),
            text => Ok(Secret::new(text)),
        }
    }

    /// TLS where it was asked for. `name` is what the controller's certificate has to be for, if that is not its host.
    pub(crate) fn transport(&self, name: Option<&str>) -> anyhow::Result<Transport> {
        let files = [&self.tls_ca, &self.tls_cert, &self.tls_key];
        // A variable that is set to nothing is not set.
        match files.map(|file| file.as_ref().filter(|file| !file.as_os_str().is_empty())) {
            [None, None, None] if name.is_none() => Ok(Transport::tcp()),
            [Some(ca), Some(certificate), Some(key)] => {
                let (ca, certificate, key) = (ca.clone(), certificate.clone(), key.clone());
                let identity = Identity { ca, certificate, key, name: name.map(str::to_owned) };
                Ok(Transport::tls(&identity)?)
            }
            files => {
                let names = ["--tls-ca", "--tls-cert", "--tls-key"];
                let missing = names.into_iter().zip(files).filter(|(_, file)| file.is_none());
                let missing: Vec<&str> = missing.map(|(name, _)| name).collect();
                bail!(
                    "TLS takes --tls-ca, --tls-cert and --tls-key together: {} not given",
                    missing.join(" and ")
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transport(files: [Option<&str>; 3], name: Option<&str>) -> anyhow::Result<Transport> {
        let [tls_ca, tls_cert, tls_key] = files.map(|file| file.map(PathBuf::from));
        AccessArgs { secret_file: None, tls_ca, tls_cert, tls_key }.transport(name)
    }

    #[test]
    fn tls_is_asked_for_by_three_files_or_not_at_all() {
        assert_eq!(format!("{:?}", transport([None; 3], None).unwrap()), "Transport(tcp)");
        assert_eq!(format!("{:?}", transport([Some(""); 3], None).unwrap()), "Transport(tcp)");
        for (files, name, missing) in [
            ([Some("a"), None, None], None, "--tls-cert and --tls-key not given"),
            ([Some("a"), Some("b"), Some("")], None, "--tls-key not given"),
            ([None; 3], Some("name"), "--tls-ca"),
        ] {
            let error = transport(files, name).unwrap_err().to_string();
            assert!(error.contains(missing), "{error}");
        }
        let error = transport([Some("/no/ca.pem"), Some("b"), Some("c")], None).unwrap_err().to_string();
        assert!(error.contains("/no/ca.pem"), "{error}");
    }
}
