//! A real etcd server on free ports of the loopback interface, with its data in a folder of its own.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// etcd starts within a second on an idle machine.
const START_MAX: Duration = Duration::from_secs(60);

/// A server, which ends with the test.
pub(crate) struct Daemon {
    process: Option<Child>,
    folder: TempDir,
    endpoint: String,
    peers: String,
    /// Paths of the authority, the certificate and the key, where it is to speak TLS, with those only whom that authority knows.
    tls: Option<[String; 3]>,
}

impl Daemon {
    /// Starts one; `None` where there is none to start, which is an error where `WEIGHTSYNC_REQUIRE` asks for it.
    pub(crate) fn start() -> Option<Self> {
        Self::start_with(None)
    }

    /// One that speaks TLS.
    pub(crate) fn start_with(tls: Option<[String; 3]>) -> Option<Self> {
        let found =
            Command::new("etcd").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if let Err(error) = found {
            let required = std::env::var("WEIGHTSYNC_REQUIRE").unwrap_or_default();
            assert!(!required.contains("etcd"), "etcd is required here: {error}");
            println!("skipped: no etcd (Debian's package etcd-server): {error}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut daemon = Self { process: None, folder, endpoint: free_address(), peers: free_address(), tls };
        daemon.resume();
        Some(daemon)
    }

    /// `host:port`.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// An address of this etcd, with a prefix.
    pub(crate) fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "etcds" } else { "etcd" };
        format!("{scheme}://{}/jobs", self.endpoint)
    }

    /// Kills it. What it has said that it keeps, it keeps.
    pub(crate) fn stop(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Starts it again where it was, and waits until it listens.
    pub(crate) fn resume(&mut self) {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let (clients, peers) = (format!("{scheme}://{}", self.endpoint), format!("http://{}", self.peers));
        let mut command = Command::new("etcd");
        command.args(["--name", "test", "--data-dir"]).arg(self.folder.path().join("data"));
        command.args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients]);
        command.args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers]);
        command.args(["--initial-cluster", &format!("test={peers}")]);
        if let Some([ca, certificate, key]) = &self.tls {
            command.args(["--trusted-ca-file", ca, "--cert-file", certificate, "--key-file", key]);
        }
        let log = std::fs::File::create(self.folder.path().join("log")).unwrap();
        let process =
            command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let process = self.process.insert(process);
        let began = Instant::now();
        while TcpStream::connect(&self.endpoint).is_err() {
            let ended = process.try_wait().unwrap();
            let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(ended.is_none(), "etcd has ended: {ended:?}\n{}", log());
            assert!(began.elapsed() < START_MAX, "etcd does not listen\n{}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Below the ports that the kernel gives to others: it is to be free still when etcd is started, and when it is started again.
fn free_address() -> String {
    let random = || RandomState::new().build_hasher().finish();
    let candidates = std::iter::repeat_with(|| format!("127.0.0.1:{}", 12_000 + random() % 16_000));
    candidates.take(100).find(|address| TcpListener::bind(address).is_ok()).expect("a free port")
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}
