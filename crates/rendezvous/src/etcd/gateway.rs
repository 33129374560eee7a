//! etcd's JSON gateway: one POST per call, over a connection of its own.
//!
//! So nothing has to be noticed about a connection between calls, and a call can be given up by dropping it. An answer that
//! is longer than ours ever are is refused before it is held.

use std::fmt;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::place::Place;
#[cfg(feature = "tls")]
use super::tls::Tls;
use super::{Failure, PASSWORD_VARIABLE, USER_VARIABLE};
use crate::protocol::cut;

/// Bytes of an answer. The longest that we ask for has three values of at most 4 KiB.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// A call takes at most this part of the deadline, so that another server can be asked.
const CALL_DIVISOR: u32 = 4;

/// And at most so long: etcd gives up on a request itself after some seconds.
const CALL_MAX: Duration = Duration::from_secs(5);

/// Between attempts to reach an etcd that is away.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

struct Credentials {
    user: String,
    password: String,
}

/// An etcd, and how to talk to it.
pub(super) struct Gateway {
    place: Place,
    credentials: Option<Credentials>,
    #[cfg(feature = "tls")]
    tls: Option<Tls>,
    deadline: Duration,
    /// What the password was last exchanged for.
    token: Mutex<Option<HeaderValue>>,
    /// The server that answered last.
    endpoint: AtomicUsize,
}

impl fmt::Debug for Gateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Gateway").field(&self.place.url).finish()
    }
}

impl Gateway {
    /// The etcd of this place, with what `variable` says of user, password and certificates. Nothing is sent yet.
    pub(super) fn new(
        place: Place,
        deadline: Duration,
        variable: &dyn Fn(&str) -> Option<String>,
    ) -> Result<Self, String> {
        let set = |name| variable(name).filter(|value| !value.is_empty());
        let credentials = match (set(USER_VARIABLE), set(PASSWORD_VARIABLE)) {
            (Some(user), Some(password)) => Some(Credentials { user, password }),
            (None, None) => None,
            _ => return Err(format!("{USER_VARIABLE} and {PASSWORD_VARIABLE} must be set together")),
        };
        #[cfg(not(feature = "tls"))]
        if place.tls {
            return Err(format!("'{}' asks for TLS, which this build does not have", place.url));
        }
        Ok(Self {
            credentials,
            #[cfg(feature = "tls")]
            tls: place.tls.then(|| Tls::load(&set)).transpose()?,
            deadline,
            token: Mutex::default(),
            endpoint: AtomicUsize::new(0),
            place,
        })
    }

    pub(super) fn url(&self) -> &str {
        &self.place.url
    }

    /// The longest that is waited for etcd.
    pub(super) fn deadline(&self) -> Duration {
        self.deadline
    }

    /// Repeats what can be repeated without harm until etcd is there, for the deadline at most.
    pub(super) async fn patiently<T, F>(&self, attempt: impl Fn() -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let until = Instant::now() + self.deadline;
        loop {
            match attempt().await {
                Err(Failure::Away(reason)) if Instant::now() + RETRY_PAUSE > until => {
                    let waited = self.deadline;
                    let reason = format!(
                        "no answer within {waited:?}: {reason}; is etcd there, and is the address right?"
                    );
                    return Err(Failure::Away(reason));
                }
                Err(Failure::Away(_)) => sleep(RETRY_PAUSE).await,
                done => return done,
            }
        }
    }

    /// Asks the server that answered last, then the others. Where none says that it has done it, one may have done it.
    pub(super) async fn call(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let call_max = (self.deadline / CALL_DIVISOR).min(CALL_MAX);
        let endpoints = &self.place.endpoints;
        let first = self.endpoint.load(Ordering::Relaxed);
        let mut last = Failure::Away("it has no servers".to_owned());
        for number in (first..).take(endpoints.len()).map(|number| number % endpoints.len()) {
            let Some(endpoint) = endpoints.get(number) else { continue };
            let done = timeout(call_max, self.ask(endpoint, path, body)).await;
            last = match done {
                Ok(Err(Failure::Away(reason))) => Failure::Away(format!("{endpoint}: {reason}")),
                Err(_) => Failure::Away(format!("{endpoint}: no answer within {call_max:?}")),
                Ok(done) => {
                    self.endpoint.store(number, Ordering::Relaxed);
                    return done;
                }
            };
        }
        Err(last)
    }

    /// One server, once; twice where the token may have been too old.
    async fn ask(&self, endpoint: &str, path: &str, body: &Value) -> Result<Value, Failure> {
        let Some(credentials) = &self.credentials else {
            return self.post(endpoint, path, body, None).await;
        };
        let kept = self.token().clone();
        if let Some(token) = kept {
            match self.post(endpoint, path, body, Some(token)).await {
                Err(Failure::Refused(_)) => *self.token() = None,
                done => return done,
            }
        }
        let who = json!({ "name": credentials.user, "password": credentials.password });
        let answer = self.post(endpoint, "/v3/auth/authenticate", &who, None).await?;
        let token =
            answer.get("token").and_then(Value::as_str).and_then(|token| HeaderValue::from_str(token).ok());
        let mut token =
            token.ok_or_else(|| Failure::Refused("it took the password and gave no token".into()))?;
        token.set_sensitive(true);
        *self.token() = Some(token.clone());
        self.post(endpoint, path, body, Some(token)).await
    }

    fn token(&self) -> MutexGuard<'_, Option<HeaderValue>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn post(
        &self,
        endpoint: &str,
        path: &str,
        body: &Value,
        token: Option<HeaderValue>,
    ) -> Result<Value, Failure> {
        let mut request = Request::post(path).header(HOST, endpoint).header(CONTENT_TYPE, "application/json");
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, token);
        }
        let request = request.body(body.to_string()).map_err(|error| Failure::Refused(error.to_string()))?;
        let away = |error: std::io::Error| Failure::Away(error.to_string());
        let stream = TcpStream::connect(endpoint).await.map_err(away)?;
        stream.set_nodelay(true).map_err(away)?;
        #[cfg(feature = "tls")]
        if let Some(tls) = &self.tls {
            let stream = tls.connect(stream, endpoint).await?;
            return answer(exchange(stream, request).await?);
        }
        answer(exchange(stream, request).await?)
    }
}

/// Sends a request and reads the whole answer.
async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: Request<String>,
) -> Result<(StatusCode, Vec<u8>), Failure> {
    let away = |error: hyper::Error| Failure::Away(with_sources(&error));
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(away)?;
    let mut answered = pin!(async move {
        let response: Response<Incoming> = sender.send_request(request).await.map_err(away)?;
        let (head, mut body) = response.into_parts();
        let mut bytes = Vec::new();
        while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            let frame = frame.map_err(away)?.into_data().unwrap_or_default();
            if bytes.len() + frame.len() > ANSWER_BYTES_MAX {
                return Err(Failure::Refused(format!("an answer of more than {ANSWER_BYTES_MAX} bytes")));
            }
            bytes.extend_from_slice(&frame);
        }
        Ok((head.status, bytes))
    });
    tokio::select! {
        biased;
        done = &mut answered => done,
        // The connection is done first where the answer is its last: what was read is there still.
        _ = connection => answered.await,
    }
}

/// hyper says what it did, and its source why that failed.
fn with_sources(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |source| source.source());
    sources.fold(error.to_string(), |told, source| format!("{told}: {source}"))
}

/// What an answer means.
pub(super) fn answer((status, bytes): (StatusCode, Vec<u8>)) -> Result<Value, Failure> {
    // A stream has one value a line; ours have one.
    let first = serde_json::Deserializer::from_slice(&bytes).into_iter::<Value>().next();
    if let (StatusCode::OK, Some(Ok(value))) = (status, &first)
        && value.get("error").is_none()
    {
        return Ok(value.clone());
    }
    let error = first.and_then(Result::ok).and_then(|value| {
        let error = value.get("error")?;
        Some(error.as_str().or_else(|| error.get("message")?.as_str())?.to_owned())
    });
    let mut reason = match (error, status) {
        (Some(error), _) => error,
        (None, StatusCode::NOT_FOUND) => {
            "it has no JSON gateway: etcd 3.4 or newer is needed, without --enable-grpc-gateway=false"
                .to_owned()
        }
        (None, _) => {
            let text = String::from_utf8_lossy(bytes.get(..200).unwrap_or(&bytes)).trim().to_owned();
            format!("status {status}, which etcd does not answer: {text}")
        }
    };
    cut(&mut reason);
    let passes = status.is_server_error()
        || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT);
    Err(if passes { Failure::Away(reason) } else { Failure::Refused(reason) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_answer_is_taken_once_it_is_one() {
        let read = |status: u16, text: &str| {
            answer((StatusCode::from_u16(status).unwrap(), text.as_bytes().to_vec()))
        };
        assert_eq!(read(200, "{\"a\":1}\n{\"a\":2}"), Ok(json!({ "a": 1 })));
        for (status, text, passes, reason) in [
            (200, "{\"error\":{\"message\":\"no leader\"}}", false, "no leader"),
            (503, "{\"error\":\"etcdserver: no leader\",\"code\":14}", true, "no leader"),
            (429, "{\"error\":\"mvcc: database space exceeded\"}", true, "space"),
            (403, "{\"error\":\"permission denied\"}", false, "permission"),
            (404, "Not Found", false, "JSON gateway"),
            (400, "Client sent an HTTP request to an HTTPS server.", false, "HTTPS server"),
            (200, "", false, "200"),
            (500, "{\"error\"", true, "500"),
        ] {
            let failure = read(status, text).unwrap_err();
            assert_eq!(matches!(failure, Failure::Away(_)), passes, "{failure:?}");
            assert!(failure.to_string().contains(reason), "{failure}");
        }
    }

    proptest! {
        #[test]
        fn no_answer_is_too_much(status in 100..600_u16, bytes in any::<Vec<u8>>()) {
            let _ = answer((StatusCode::from_u16(status).unwrap(), bytes));
        }
    }

    #[test]
    fn a_user_has_a_password() {
        let place = || Place::parse("etcd://a:1/x").unwrap();
        let gateway = |set: &'static [&'static str]| {
            let variable = move |name: &str| set.contains(&name).then(|| "x".to_owned());
            Gateway::new(place(), Duration::from_secs(1), &variable)
        };
        assert!(gateway(&[]).unwrap().credentials.is_none());
        let both = gateway(&[USER_VARIABLE, PASSWORD_VARIABLE]).unwrap();
        assert!(both.credentials.is_some());
        for half in [&[USER_VARIABLE], &[PASSWORD_VARIABLE]] {
            assert!(gateway(half).unwrap_err().contains("together"));
        }
        let empty = |name: &str| (name == USER_VARIABLE).then(String::new);
        assert!(Gateway::new(place(), Duration::from_secs(1), &empty).unwrap().credentials.is_none());
    }
}
