//! The arguments of what an operator sees: logs, metrics, and the status of a running job.

use std::time::Duration;

use anyhow::Context;
use clap::{Args, ValueEnum};
use weightsync::ClientConfig;
use weightsync::metrics::{Metrics, MetricsEndpoint};

use super::AccessArgs;
use super::access::RENDEZVOUS_VARIABLE;

/// How to log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    /// For a person.
    Text,
    /// One object per line.
    Json,
}

/// Where to tell metrics.
#[derive(Args, Clone)]
pub(crate) struct MetricsArgs {
    /// Serve metrics for Prometheus at http://ADDR/metrics: HOST:PORT, or a port of the loopback interface. There is no
    /// authentication; docs/observing.md lists them
    #[arg(long, value_name = "ADDR", value_parser = address)]
    metrics: Option<String>,
}

impl MetricsArgs {
    /// Serves them, if that was asked for, until the endpoint is dropped.
    pub(crate) async fn serve(&self, metrics: &Metrics) -> anyhow::Result<Option<MetricsEndpoint>> {
        let Some(address) = &self.metrics else { return Ok(None) };
        let served = metrics.serve(address.as_str()).await;
        let endpoint = served.with_context(|| format!("cannot serve metrics at {address}"))?;
        tracing::info!(address = %endpoint.local_addr(), "metrics");
        Ok(Some(endpoint))
    }
}

/// A port alone is one of the loopback interface.
fn address(text: &str) -> Result<String, String> {
    let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
    match (host, port.parse::<u16>()) {
        (_, Err(_)) => Err("HOST:PORT or a port is expected, such as 9464".into()),
        ("", Ok(port)) => Ok(format!("127.0.0.1:{port}")),
        (host, Ok(port)) => Ok(format!("{host}:{port}")),
    }
}

#[derive(Args)]
pub(crate) struct StatusArgs {
    /// The controller's HOST:PORT, or where in etcd it says where it is: etcd://HOST:2379/PREFIX
    #[arg(value_name = "ADDR", env = RENDEZVOUS_VARIABLE, hide_env_values = true)]
    pub(crate) controller: String,
    /// The job's name, by which etcd knows it
    #[arg(long, default_value = weightsync::JOB_DEFAULT)]
    job: String,
    #[command(flatten)]
    access: AccessArgs,
    /// What the controller's certificate is for, where that is not the host of ADDR
    #[arg(long, value_name = "NAME", env = super::access::NAME_VARIABLE)]
    tls_name: Option<String>,
    /// Print the status once and end, as where standard output is no terminal
    #[arg(long)]
    pub(crate) once: bool,
    /// Print one JSON object and end
    #[arg(long)]
    pub(crate) json: bool,
    /// How long to wait for the controller, in seconds
    #[arg(long, default_value = "5", value_name = "SECONDS", value_parser = super::seconds)]
    timeout: Duration,
}

impl StatusArgs {
    /// What was asked for, as it may be shown: an address of etcd with a password is refused, and not repeated.
    pub(crate) fn asked(&self) -> &str {
        self.controller.rsplit_once('@').map_or(&self.controller, |(_, rest)| rest)
    }

    pub(crate) fn client(&self) -> anyhow::Result<ClientConfig> {
        let (secret, controller, job) = (self.access.secret()?, self.controller.clone(), self.job.clone());
        let transport = self.access.transport(self.tls_name.as_deref())?;
        Ok(ClientConfig { controller, job, secret, transport, deadline: self.timeout })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_alone_is_of_loopback() {
        for (text, address_of) in [
            ("9464", "127.0.0.1:9464"),
            (":9464", "127.0.0.1:9464"),
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("[::1]:80", "[::1]:80"),
        ] {
            assert_eq!(address(text).as_deref(), Ok(address_of));
        }
        for wrong in ["", "host", "host:", "70000", "host:-1", "[::1]"] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
    }
}
