//! How a member finds the controller: at an address, or at the one that etcd says.

use std::net::IpAddr;
use std::time::Duration;

use crate::error::RendezvousError;
#[cfg(feature = "etcd")]
use crate::etcd::Finder;

/// How addresses of etcd begin.
const SCHEMES: [&str; 2] = ["etcd://", "etcds://"];

/// Bytes of a host's name at most, as DNS has it.
const HOST_BYTES_MAX: usize = 253;

/// Pause between attempts to reach a controller that is not up yet.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// Where to look for the controller.
pub(crate) enum Locator {
    /// There.
    Fixed(String),
    /// Wherever etcd says, which may change.
    #[cfg(feature = "etcd")]
    Etcd(Box<Finder>),
}

impl Locator {
    /// `address` is `host:port`, or an address of etcd.
    pub(crate) fn new(
        address: &str,
        #[cfg_attr(not(feature = "etcd"), allow(unused_variables))] // a fixed address needs neither
        (job, deadline): (&str, Duration),
    ) -> Result<Self, RendezvousError> {
        if !is_etcd(address) {
            return Ok(Self::Fixed(address.to_owned()));
        }
        #[cfg(feature = "etcd")]
        return Finder::new(address, job, deadline).map(|finder| Self::Etcd(Box::new(finder)));
        #[cfg(not(feature = "etcd"))]
        return Err(no_etcd(address));
    }

    /// Where the controller listens now.
    pub(crate) async fn find(&self) -> Result<String, RendezvousError> {
        match self {
            Self::Fixed(address) => Ok(address.clone()),
            #[cfg(feature = "etcd")]
            Self::Etcd(finder) => finder.find().await,
        }
    }

    /// How long to wait before another attempt, and how long one may take: while one waits for an address that nobody answers
    /// at, etcd may come to say another.
    pub(crate) fn pace(&self, deadline: Duration) -> (Duration, Duration) {
        match self {
            Self::Fixed(_) => (RETRY_PAUSE, deadline),
            #[cfg(feature = "etcd")]
            Self::Etcd(_) => Finder::pace(deadline),
        }
    }
}

/// Whether this is an address of etcd, and not of a controller.
pub(crate) fn is_etcd(address: &str) -> bool {
    SCHEMES.iter().any(|scheme| address.starts_with(scheme))
}

/// What of an address of etcd may be shown: it may hold a password, which is refused and not repeated.
pub(crate) fn shown(address: &str) -> &str {
    address.rsplit_once('@').map_or(address, |(_, rest)| rest)
}

/// What a build without etcd says to such an address.
#[cfg(not(feature = "etcd"))]
pub(crate) fn no_etcd(address: &str) -> RendezvousError {
    let reason = "this build knows nothing of etcd: build it with the feature `etcd`".to_owned();
    RendezvousError::Etcd { url: shown(address).to_owned(), reason }
}

/// The parts of `host:port`, with a v6 address in brackets, where others can be sent there.
#[cfg_attr(not(feature = "etcd"), allow(dead_code))]
pub(crate) fn host_and_port(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let port = port.bytes().all(|byte| byte.is_ascii_digit()).then(|| port.parse().ok())??;
    let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let is_host = match inner {
        Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
        None => {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
            !host.is_empty() && host.len() <= HOST_BYTES_MAX && host.bytes().all(plain)
        }
    };
    let anywhere = inner.unwrap_or(host).parse::<IpAddr>().is_ok_and(|address| address.is_unspecified());
    (is_host && !anywhere && port > 0).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_and_a_port_are_where_others_can_be_sent() {
        for (address, parts) in [
            ("node-7.cluster:7070", Some(("node-7.cluster", 7070))),
            ("10.0.0.1:1", Some(("10.0.0.1", 1))),
            ("[fe80::1]:7070", Some(("[fe80::1]", 7070))),
            ("0.0.0.0:7070", None),
            ("[::]:7070", None),
            ("host:0", None),
            ("host:70000", None),
            ("host:+1", None),
            ("host", None),
            (":1", None),
            ("a b:1", None),
            ("fe80::1:7070", None),
            ("[host]:1", None),
        ] {
            assert_eq!(host_and_port(address), parts, "{address}");
        }
        assert_eq!(host_and_port(&format!("{}:1", "a".repeat(HOST_BYTES_MAX + 1))), None);
    }
}
