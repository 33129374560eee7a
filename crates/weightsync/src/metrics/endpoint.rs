//! The page of the metrics over HTTP/1.1: one path, two methods, nothing else.
//!
//! Whoever reaches the address may read the page, and can do no more: a request is bounded in length and time, the number of
//! connections is too, and each gets one answer. It knows no keep-alive, no body and no encoding, because a scraper needs
//! none.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{sleep, timeout};

use super::Metrics;

/// Bytes of a request's head. Scrapers send some hundreds.
const HEAD_BYTES_MAX: usize = 8 << 10;

/// From accepting a connection to the end of its answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Connections at a time; more wait to be accepted.
const CONNECTIONS_MAX: usize = 16;

/// After a connection that could not be accepted: out of file descriptors, most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the text is.
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

const PATH: &str = "/metrics";

/// Answers `GET /metrics` until it is dropped.
#[derive(Debug)]
pub struct MetricsEndpoint {
    local: SocketAddr,
    task: JoinHandle<()>,
}

impl MetricsEndpoint {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }
}

impl Drop for MetricsEndpoint {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Metrics {
    /// Serves the page at `http://address/metrics`, as a task of the present tokio runtime: a runtime that is blocked answers
    /// nobody. There is no authentication, so an address other than loopback is for a network that may read the page.
    ///
    /// # Errors
    ///
    /// When it cannot listen there.
    pub async fn serve(&self, address: impl tokio::net::ToSocketAddrs) -> io::Result<MetricsEndpoint> {
        let listener = TcpListener::bind(address).await?;
        let local = listener.local_addr()?;
        Ok(MetricsEndpoint { local, task: tokio::spawn(answer_all(listener, self.clone())) })
    }
}

async fn answer_all(listener: TcpListener, metrics: Metrics) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // They end with this task.
    let mut answers = JoinSet::new();
    while let Ok(permit) = room.clone().acquire_owned().await {
        while answers.try_join_next().is_some() {}
        match listener.accept().await {
            Ok((stream, peer)) => {
                let metrics = metrics.clone();
                answers.spawn(async move {
                    let _permit = permit;
                    match timeout(ANSWER_MAX, answer(stream, &metrics)).await {
                        Ok(Ok(status)) => tracing::debug!(%peer, status, "asked for metrics"),
                        Ok(Err(error)) => tracing::debug!(%peer, %error, "asked for metrics"),
                        Err(_) => tracing::debug!(%peer, "asked for metrics and did not end in time"),
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accept a connection for metrics");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The status that was answered.
async fn answer(mut stream: TcpStream, metrics: &Metrics) -> io::Result<&'static str> {
    let head = read_head(&mut stream).await?;
    let (status, more, body, send_body) = match head.as_deref().map(request) {
        None => ("431 Request Header Fields Too Large", "", String::new(), true),
        Some(Request::Malformed) => ("400 Bad Request", "", String::new(), true),
        Some(Request::OtherMethod) => ("405 Method Not Allowed", "Allow: GET, HEAD\r\n", String::new(), true),
        Some(Request::OtherPath) => ("404 Not Found", "", format!("the metrics are at {PATH}\n"), true),
        Some(Request::Page { head }) => ("200 OK", "", metrics.text(), !head),
    };
    let content_type = if status.starts_with("200") { CONTENT_TYPE } else { "text/plain; charset=utf-8" };
    let mut response = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\n{more}Connection: close\r\n\r\n",
        body.len()
    );
    if send_body {
        response.push_str(&body);
    }
    stream.write_all(response.as_bytes()).await?;
    stream.shutdown().await?;
    // Closing a socket with unread bytes resets it, and a reset can overtake the answer.
    let mut sink = [0; 1024];
    while stream.read(&mut sink).await? > 0 {}
    Ok(status)
}

/// A request's head; `None` where it is longer than it may be. One that is cut short is told as it is, for what it is.
async fn read_head(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut head = Vec::new();
    let mut block = [0; 1024];
    loop {
        let read = stream.read(&mut block).await?;
        // What was searched already may end with a part of the empty line.
        let from = head.len().saturating_sub(3);
        head.extend_from_slice(block.get(..read).unwrap_or_default());
        if read == 0 || head.get(from..).is_some_and(|new| new.windows(4).any(|four| four == b"\r\n\r\n")) {
            return Ok(Some(head));
        }
        if head.len() > HEAD_BYTES_MAX {
            return Ok(None);
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Request {
    Page { head: bool },
    OtherPath,
    OtherMethod,
    Malformed,
}

/// What the first line of a head asks for. The other lines change nothing.
fn request(head: &[u8]) -> Request {
    let line = head.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").and_then(|line| std::str::from_utf8(line).ok());
    let mut words = line.unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version), None) =
        (words.next(), words.next(), words.next(), words.next())
    else {
        return Request::Malformed;
    };
    if !version.starts_with("HTTP/1.") || !target.starts_with('/') {
        return Request::Malformed;
    }
    let path = target.split('?').next().unwrap_or_default();
    match method {
        "GET" | "HEAD" if path == PATH => Request::Page { head: method == "HEAD" },
        "GET" | "HEAD" => Request::OtherPath,
        _ => Request::OtherMethod,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_page_and_two_methods() {
        for (line, asked) in [
            ("GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", Request::Page { head: false }),
            ("HEAD /metrics HTTP/1.0\r\n\r\n", Request::Page { head: true }),
            ("GET /metrics?name=a HTTP/1.1\r\n\r\n", Request::Page { head: false }),
            ("GET / HTTP/1.1\r\n\r\n", Request::OtherPath),
            ("GET /metrics/ HTTP/1.1\r\n\r\n", Request::OtherPath),
            ("POST /metrics HTTP/1.1\r\n\r\n", Request::OtherMethod),
            ("GET /metrics HTTP/2\r\n\r\n", Request::Malformed),
            ("GET  /metrics HTTP/1.1\r\n\r\n", Request::Malformed),
            ("GET http://a/metrics HTTP/1.1\r\n\r\n", Request::Malformed),
            ("GET /metrics HTTP/1.1", Request::Malformed),
            ("", Request::Malformed),
        ] {
            assert_eq!(request(line.as_bytes()), asked, "{line:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            request(&bytes);
        }
    }

    async fn ask(endpoint: &MetricsEndpoint, request: &[u8]) -> String {
        let mut stream = TcpStream::connect(endpoint.local_addr()).await.unwrap();
        // It may answer, and stop reading, before all is written.
        let _ = stream.write_all(request).await;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn the_page_is_served_in_whatever_pieces_it_is_asked_for() {
        let metrics = Metrics::new();
        let endpoint = metrics.serve("127.0.0.1:0").await.unwrap();
        let answer = ask(&endpoint, b"GET /metrics HTTP/1.1\r\n\r\n").await;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains(CONTENT_TYPE), "{head}");
        assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
        assert_eq!(body, metrics.text());
        let answer = ask(&endpoint, b"HEAD /metrics HTTP/1.1\r\n\r\n").await;
        assert_eq!(answer.split_once("\r\n\r\n").unwrap(), (head, ""));

        let mut stream = TcpStream::connect(endpoint.local_addr()).await.unwrap();
        for byte in b"GET /other HTTP/1.1\r\n\r\n" {
            stream.write_all(&[*byte]).await.unwrap();
            stream.flush().await.unwrap();
        }
        stream.shutdown().await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    }

    #[tokio::test]
    async fn too_long_a_head_is_refused_and_silence_is_no_obstacle() {
        let endpoint = Metrics::new().serve("127.0.0.1:0").await.unwrap();
        let long = [b"GET /metrics HTTP/1.1\r\nA: ", vec![b'a'; HEAD_BYTES_MAX].as_slice()].concat();
        assert!(ask(&endpoint, &long).await.starts_with("HTTP/1.1 431 "));
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            silent.push(TcpStream::connect(endpoint.local_addr()).await.unwrap());
        }
        // It waits until they have had their time.
        assert!(ask(&endpoint, b"GET /metrics HTTP/1.1\r\n\r\n").await.starts_with("HTTP/1.1 200 "));
    }
}
