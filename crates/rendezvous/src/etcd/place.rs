//! Where in which etcd: `etcd://host:2379,host:2379/prefix`.
//!
//! An address is shown and logged, so it never holds a password: one that does is refused, and not repeated.

use crate::locate::host_and_port;

/// Servers of one address: an etcd cluster has three or five.
const ENDPOINTS_MAX: usize = 16;

/// Bytes of a prefix.
const PREFIX_BYTES_MAX: usize = 256;

/// An etcd, and where in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    /// As it was given.
    pub(super) url: String,
    /// `host:port` of its servers, any of which will do.
    pub(super) endpoints: Vec<String>,
    pub(super) tls: bool,
    /// `/prefix`, without a slash at its end.
    pub(super) prefix: String,
}

impl Place {
    /// The place that this address names, or what is wrong with it.
    pub(super) fn parse(url: &str) -> Result<Self, String> {
        const FORM: &str = "etcd://HOST:2379/PREFIX is expected, with etcds: for TLS and HOST:PORT,HOST:PORT for several servers";
        if url.contains('@') {
            return Err(format!(
                "an address of etcd holds no user or password, because it is shown and logged: set {} and {}",
                super::USER_VARIABLE,
                super::PASSWORD_VARIABLE
            ));
        }
        let (tls, rest) = match (url.strip_prefix("etcd://"), url.strip_prefix("etcds://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Err(format!("'{url}': {FORM}")),
        };
        let (hosts, prefix) = rest.split_once('/').ok_or_else(|| {
            format!("'{url}' has no prefix: {FORM}; jobs of different prefixes know nothing of each other")
        })?;
        let endpoints: Vec<String> = hosts.split(',').map(str::to_owned).collect();
        if let Some(wrong) = endpoints.iter().find(|endpoint| host_and_port(endpoint).is_none()) {
            return Err(format!("'{wrong}' in '{url}' is no HOST:PORT; {FORM}"));
        }
        if endpoints.len() > ENDPOINTS_MAX {
            return Err(format!("'{url}' names {} servers, more than {ENDPOINTS_MAX}", endpoints.len()));
        }
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte);
        let fits = prefix.len() <= PREFIX_BYTES_MAX;
        if !fits || !prefix.split('/').all(|part| !part.is_empty() && part.bytes().all(plain)) {
            return Err(format!(
                "the prefix in '{url}' must be names of letters, digits and -_.~ with a / between them, at most \
                 {PREFIX_BYTES_MAX} bytes"
            ));
        }
        Ok(Self { url: url.to_owned(), endpoints, tls, prefix: format!("/{prefix}") })
    }

    /// The part of the keys that are this job's, with a slash at its end.
    pub(super) fn of_job(&self, job: &str) -> Result<String, String> {
        if job.is_empty() || job.contains('/') || job.chars().any(char::is_control) {
            return Err(format!(
                "a job whose controller is found through {} needs a name that can be a part of a key, without '/': not {job:?}",
                self.url
            ));
        }
        Ok(format!("{}/{job}/", self.prefix))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_place_is_servers_and_a_prefix() {
        let place = Place::parse("etcd://a:2379,[::1]:1,10.0.0.1:2/team/jobs/").unwrap();
        assert_eq!(place.endpoints, ["a:2379", "[::1]:1", "10.0.0.1:2"]);
        assert_eq!((place.prefix.as_str(), place.tls), ("/team/jobs", false));
        assert_eq!(place.of_job("run 7").unwrap(), "/team/jobs/run 7/");
        assert!(Place::parse("etcds://a:2379/x").unwrap().tls);
        for job in ["", "a/b", "a\n"] {
            assert!(place.of_job(job).is_err(), "{job:?}");
        }
    }

    #[test]
    fn what_is_no_place_says_why() {
        for (url, why) in [
            ("http://a:2379/x", "etcd://HOST:2379/PREFIX"),
            ("etcd:/a:2379/x", "etcd://HOST:2379/PREFIX"),
            ("a:2379/x", "etcd://HOST:2379/PREFIX"),
            ("etcd://a:2379", "no prefix"),
            ("etcd://a:2379/", "the prefix"),
            ("etcd://a:2379//x", "the prefix"),
            ("etcd://a:2379/x y", "the prefix"),
            ("etcd://a:2379/x?timeout=1", "the prefix"),
            ("etcd://a/x", "'a'"),
            ("etcd://a:0/x", "'a:0'"),
            ("etcd://a:2379,/x", "''"),
            ("etcd:///x", "''"),
        ] {
            let error = Place::parse(url).unwrap_err();
            assert!(error.contains(why), "{url}: {error}");
        }
        assert!(Place::parse(&format!("etcd://a:1{}/x", ",a:1".repeat(ENDPOINTS_MAX))).is_err());
    }

    #[test]
    fn a_password_is_refused_and_not_repeated() {
        for url in ["etcd://root:hunter2@a:2379/x", "root:hunter2@a:2379", "etcds://hunter2@a:2379/x"] {
            let error = Place::parse(url).unwrap_err();
            assert!(error.contains("WEIGHTSYNC_ETCD_PASSWORD") && !error.contains("hunter2"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_is_too_much(text in any::<String>()) {
            let _ = Place::parse(&text);
            let _ = Place::parse(&format!("etcd://{text}"));
            let _ = Place::parse(&format!("etcd://a:1/{text}"));
        }
    }
}
