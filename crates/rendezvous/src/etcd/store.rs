//! A job's keys: read together, changed together, leased.
//!
//! What may be repeated after an answer that was lost is the caller's to know.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{DeserializeOwned, Error};
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::Failure;
use super::gateway::Gateway;
use super::place::Place;

/// Where the controller in charge listens.
pub(super) const CONTROLLER: &str = "controller";

/// The last commit.
pub(super) const COMMITTED: &str = "committed";

/// Why the job ended.
pub(super) const ENDED: &str = "ended";

/// Before the name of a rank.
pub(super) const MEMBERS: &str = "members/";

/// Changes in one transaction. etcd takes 128 unless it is told otherwise.
pub(super) const CHANGES_MAX: usize = 100;

/// The keys of one job in etcd.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) gateway: Gateway,
    /// `/prefix/job/`
    keys: String,
}

/// What a key holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) value: Vec<u8>,
    /// The revision of etcd at which the key was created; a key that was deleted and put again has another.
    pub(super) created: i64,
    /// The revision of its last change.
    pub(super) modified: i64,
    /// 0 without one.
    pub(super) lease: i64,
}

/// What must hold for a transaction to change anything. Revision 0 is that of a key that is not there.
pub(super) enum Compare<'a> {
    Created(&'a str, i64),
    Modified(&'a str, i64),
}

/// One change of a transaction. No two may touch the same key.
pub(super) enum Change<'a> {
    Put {
        key: &'a str,
        value: &'a [u8],
        lease: i64,
    },
    Delete(&'a str),
    /// All keys that begin so.
    DeleteAll(&'a str),
}

/// A promise of etcd to keep keys for so long.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lease {
    pub(super) id: i64,
    pub(super) ttl: Duration,
}

impl Store {
    /// The keys of `job` under the address `url`, with what `variable` says of user, password and certificates.
    pub(super) fn new(
        url: &str,
        job: &str,
        deadline: Duration,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let place = Place::parse(url)?;
        let keys = place.of_job(job)?;
        Ok(Self { gateway: Gateway::new(place, deadline, variable)?, keys })
    }

    /// The full name of a key, as `etcdctl get` wants it.
    pub(super) fn name(&self, key: &str) -> String {
        format!("{}{key}", self.keys)
    }

    fn encoded(&self, key: &str) -> String {
        STANDARD.encode(self.name(key))
    }

    /// What these keys hold, all at one revision.
    pub(super) async fn look<const N: usize>(&self, keys: [&str; N]) -> Result<[Option<Entry>; N], Failure> {
        let ranges = keys.iter().map(|key| json!({ "request_range": { "key": self.encoded(key) } }));
        let body = json!({ "success": ranges.collect::<Vec<_>>() });
        let answer: Transaction = self.call("/v3/kv/txn", body).await?;
        let entries: Vec<Option<Entry>> = answer.entries()?;
        entries.try_into().map_err(|_| malformed("an answer for each key is missing"))
    }

    /// All changes, at the revision that is returned; none where something does not compare.
    pub(super) async fn change(
        &self,
        compare: &[Compare<'_>],
        changes: &[Change<'_>],
    ) -> Result<Option<i64>, Failure> {
        let compare: Vec<Value> = compare
            .iter()
            .map(|compare| match compare {
                Compare::Created(key, revision) => json!({
                    "key": self.encoded(key), "target": "CREATE", "result": "EQUAL",
                    "create_revision": revision.to_string(),
                }),
                Compare::Modified(key, revision) => json!({
                    "key": self.encoded(key), "target": "MOD", "result": "EQUAL",
                    "mod_revision": revision.to_string(),
                }),
            })
            .collect();
        let changes: Vec<Value> = changes
            .iter()
            .map(|change| match change {
                Change::Put { key, value, lease } => json!({ "request_put": {
                    "key": self.encoded(key), "value": STANDARD.encode(value), "lease": lease.to_string(),
                } }),
                Change::Delete(key) => json!({ "request_delete_range": { "key": self.encoded(key) } }),
                Change::DeleteAll(start) => {
                    let mut end = self.name(start).into_bytes();
                    // Keys are names of ASCII and a job's: none ends in the highest byte.
                    if let Some(last) = end.last_mut() {
                        *last = last.saturating_add(1);
                    }
                    let (start, end) = (self.encoded(start), STANDARD.encode(end));
                    json!({ "request_delete_range": { "key": start, "range_end": end } })
                }
            })
            .collect();
        let body = json!({ "compare": compare, "success": changes });
        let answer: Transaction = self.call("/v3/kv/txn", body).await?;
        Ok(answer.succeeded.then_some(answer.header.revision))
    }

    /// A lease for so long; etcd may make it longer.
    pub(super) async fn lease(&self, ttl: Duration) -> Result<Lease, Failure> {
        let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
        let granted: Granted = self.call("/v3/lease/grant", json!({ "TTL": seconds.to_string() })).await?;
        match u64::try_from(granted.ttl) {
            Ok(seconds @ 1..) => Ok(Lease { id: granted.id, ttl: Duration::from_secs(seconds) }),
            _ => Err(malformed("a lease without time")),
        }
    }

    /// Begins the lease's time anew. False where it has ended.
    pub(super) async fn keep(&self, lease: Lease) -> Result<bool, Failure> {
        let body = json!({ "ID": lease.id.to_string() });
        let kept: Streamed<Granted> = self.call("/v3/lease/keepalive", body).await?;
        Ok(kept.result.ttl > 0)
    }

    async fn call<T: DeserializeOwned>(&self, path: &str, body: Value) -> Result<T, Failure> {
        let answer = self.gateway.call(path, &body).await?;
        serde_json::from_value(answer).map_err(|error| malformed(&error.to_string()))
    }
}

fn malformed(what: &str) -> Failure {
    Failure::Refused(format!("it gave an answer that etcd does not give: {what}"))
}

#[derive(Deserialize)]
struct Header {
    #[serde(default, deserialize_with = "number")]
    revision: i64,
}

#[derive(Deserialize)]
struct Transaction {
    header: Header,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<Response>,
}

impl Transaction {
    /// What each range holds of its one key.
    fn entries(self) -> Result<Vec<Option<Entry>>, Failure> {
        let entries = self.responses.into_iter().map(|response| {
            let entry = response.response_range.and_then(|range| range.kvs.into_iter().next());
            entry.map(Entry::try_from).transpose()
        });
        entries.collect()
    }
}

/// What is made of bytes that somebody says in etcd's place: values of keys.
#[cfg(feature = "fuzzing")]
pub(super) fn values(status: u16, bytes: Vec<u8>) -> Option<Vec<Entry>> {
    let answer = super::gateway::answer((hyper::StatusCode::from_u16(status).ok()?, bytes)).ok()?;
    let _ = serde_json::from_value::<Streamed<Granted>>(answer.clone());
    let answer: Transaction = serde_json::from_value(answer).ok()?;
    Some(answer.entries().ok()?.into_iter().flatten().collect())
}

#[derive(Deserialize)]
struct Response {
    response_range: Option<Range>,
}

#[derive(Deserialize)]
struct Range {
    #[serde(default)]
    kvs: Vec<KeyValue>,
}

#[derive(Deserialize)]
struct KeyValue {
    #[serde(default)]
    value: String,
    #[serde(deserialize_with = "number")]
    create_revision: i64,
    #[serde(deserialize_with = "number")]
    mod_revision: i64,
    #[serde(default, deserialize_with = "number")]
    lease: i64,
}

impl TryFrom<KeyValue> for Entry {
    type Error = Failure;

    fn try_from(found: KeyValue) -> Result<Self, Failure> {
        let value = STANDARD.decode(found.value).map_err(|error| malformed(&error.to_string()))?;
        let (created, modified) = (found.create_revision, found.mod_revision);
        Ok(Self { value, created, modified, lease: found.lease })
    }
}

#[derive(Deserialize)]
struct Granted {
    #[serde(rename = "ID", deserialize_with = "number")]
    id: i64,
    /// Not said where it is 0.
    #[serde(rename = "TTL", default, deserialize_with = "number")]
    ttl: i64,
}

#[derive(Deserialize)]
struct Streamed<T> {
    result: T,
}

/// JSON has no integers of 64 bits that every reader takes: etcd writes them as text.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<i64, D::Error> {
    String::deserialize(from)?.parse().map_err(D::Error::custom)
}
