//! The attacks, one function each: it goes on until its time is over, and counts what it tried and what was refused.
//!
//! Whoever has to be let in, and is not, is wrong too: the attack that fills the controller with connections tries that.

use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rendezvous::{
    Client, ClientConfig, Holds, Join, MemberManifest, PROTOCOL_VERSION, RendezvousError, Secret, SessionId,
    ToController, ToMember, Transport, World,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};
use xfer_plan::{DType, RailDecl, Rank, RegionIndex, SourcePiece, TensorBox, TrainerManifest, TrainerRank};

/// The job, and its secret for those who are let in first.
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pub(crate) secret: String,
}

/// What came of an attack.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) attempts: u64,
    pub(crate) refused: u64,
    pub(crate) wrong: Vec<String>,
}

type Run = for<'a> fn(&'a Target, Instant) -> Pin<Box<dyn Future<Output = anyhow::Result<Tally>> + 'a>>;

/// One attack.
pub(crate) struct Attack {
    pub(crate) name: &'static str,
    /// What the controller's log says of it.
    pub(crate) named_as: &'static str,
    /// It makes no sense to stop sooner.
    pub(crate) length_min: Duration,
    run: Run,
}

impl Attack {
    pub(crate) async fn run(&self, target: &Target, until: Instant) -> anyhow::Result<Tally> {
        (self.run)(target, until).await
    }
}

macro_rules! attack {
    ($name:literal, $named_as:literal, $seconds:literal, $run:ident) => {
        Attack {
            name: $name,
            named_as: $named_as,
            length_min: Duration::from_secs($seconds),
            run: |target, until| Box::pin($run(target, until)),
        }
    };
}

pub(crate) const ATTACKS: &[Attack] = &[
    attack!("a wrong secret", "does not know this job's secret", 0, wrong_secret),
    attack!("a recorded handshake, again", "does not know this job's secret", 0, replay),
    attack!("a frame of 4 GiB", "more than the 256 allowed", 0, oversize),
    attack!("half a message", "unexpected end of file", 0, truncated),
    attack!("arbitrary bytes", "does not speak the weightsync protocol", 0, garbage),
    attack!("a byte a second, 64 times", "did not prove itself within", 12, slow),
    attack!("10 000 connections without a word", "others needed its place", 6, silent),
    attack!("the secret, and a lie at the door", "refused a connection", 0, lies),
];

/// Several attacks side by side, as one.
pub(crate) async fn all_at_once(
    attacks: &[&Attack],
    target: &Target,
    until: Instant,
) -> anyhow::Result<Tally> {
    let mut running: Vec<_> =
        attacks.iter().map(|attack| (attack.name, (attack.run)(target, until))).collect();
    let mut all = Tally::default();
    std::future::poll_fn(|context| {
        let mut ended = Vec::new();
        running.retain_mut(|(name, run)| match run.as_mut().poll(context) {
            Poll::Pending => true,
            Poll::Ready(tally) => {
                ended.push((*name, tally));
                false
            }
        });
        for (name, tally) in ended {
            let tally = tally.context(name)?;
            all.attempts += tally.attempts;
            all.refused += tally.refused;
            all.wrong.extend(tally.wrong.into_iter().map(|wrong| format!("{name}: {wrong}")));
        }
        if running.is_empty() { Poll::Ready(anyhow::Ok(())) } else { Poll::Pending }
    })
    .await?;
    Ok(all)
}

/// Attempts of the quick attacks follow one another after this.
const PAUSE: Duration = Duration::from_millis(10);

/// The longest wait for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// More of an answer than this is not read.
const ANSWER_BYTES_MAX: u64 = 4096;

fn hello() -> Vec<u8> {
    let mut hello = b"wghtsync".to_vec();
    hello.extend(PROTOCOL_VERSION.to_le_bytes());
    hello
}

/// Repeats an attempt, which says whether it was refused.
async fn repeat(
    until: Instant,
    mut attempt: impl AsyncFnMut(u64) -> anyhow::Result<bool>,
) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    while Instant::now() < until {
        let refused = timeout(ANSWER_MAX, attempt(tally.attempts)).await.context("no answer")??;
        tally.attempts += 1;
        tally.refused += u64::from(refused);
        sleep(PAUSE).await;
    }
    Ok(tally)
}

/// Says this, hangs up, and hears what comes until the other end hangs up too.
async fn said(target: &Target, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(target.address).await?;
    stream.write_all(bytes).await?;
    stream.shutdown().await?;
    let mut heard = Vec::new();
    // A reset is an end as well.
    let _ = stream.take(ANSWER_BYTES_MAX).read_to_end(&mut heard).await;
    Ok(heard)
}

/// The preamble, the challenge and nothing else: what a stranger is told.
fn is_no_more_than_a_challenge(heard: &[u8]) -> bool {
    heard.len() <= 12 + 4 + 32
}

async fn wrong_secret(target: &Target, until: Instant) -> anyhow::Result<Tally> {
    repeat(until, async |number| {
        let guess = Target { address: target.address, secret: format!("guess {number}") };
        Ok(matches!(client(&guess).await, Err(RendezvousError::Secret { .. })))
    })
    .await
}

async fn client(target: &Target) -> Result<Client, RendezvousError> {
    let (controller, secret) = (target.address.to_string(), Secret::new(&target.secret));
    // As the job's, or the controller would refuse every join for that.
    let deadline = Duration::from_secs(20);
    Client::connect(ClientConfig {
        controller,
        job: rendezvous::JOB_DEFAULT.into(),
        secret,
        transport: Transport::tcp(),
        deadline,
    })
    .await
}

/// A proxy records what a member with the secret says; the same is said again.
async fn replay(target: &Target, until: Instant) -> anyhow::Result<Tally> {
    let proxy = TcpListener::bind("127.0.0.1:0").await?;
    let through = Target { address: proxy.local_addr()?, secret: target.secret.clone() };
    let recorded = async {
        let (mut member, _) = proxy.accept().await?;
        let mut controller = TcpStream::connect(target.address).await?;
        let (mut recorded, mut from_member, mut from_controller) = (Vec::new(), [0; 512], [0; 512]);
        loop {
            tokio::select! {
                read = member.read(&mut from_member) => match read? {
                    0 => return anyhow::Ok(recorded),
                    read => {
                        recorded.extend(&from_member[..read]);
                        controller.write_all(&from_member[..read]).await?;
                    }
                },
                read = controller.read(&mut from_controller) => match read? {
                    0 => return anyhow::Ok(recorded),
                    read => member.write_all(&from_controller[..read]).await?,
                },
            }
        }
    };
    let admitted = async { client(&through).await.map(drop) };
    let (recorded, admitted) = timeout(ANSWER_MAX, async { tokio::join!(recorded, admitted) }).await?;
    admitted.context("the member that is recorded")?;
    let recorded = recorded?;
    ensure!(recorded.len() >= 12 + 4 + 64, "only {} bytes of a handshake were recorded", recorded.len());
    repeat(until, async |_| {
        let heard = said(target, &recorded).await?;
        // After the challenge the verdict, a frame of one byte: no proof.
        Ok(heard.get(48..) == Some(&[1, 0, 0, 0, 0]))
    })
    .await
}

async fn oversize(target: &Target, until: Instant) -> anyhow::Result<Tally> {
    let bytes = [hello(), u32::MAX.to_le_bytes().to_vec(), vec![7; 1024]].concat();
    repeat(until, async |_| Ok(is_no_more_than_a_challenge(&said(target, &bytes).await?))).await
}

async fn truncated(target: &Target, until: Instant) -> anyhow::Result<Tally> {
    let bytes = [hello(), 64_u32.to_le_bytes().to_vec(), vec![7; 20]].concat();
    repeat(until, async |_| Ok(is_no_more_than_a_challenge(&said(target, &bytes).await?))).await
}

async fn garbage(target: &Target, until: Instant) -> anyhow::Result<Tally> {
    repeat(until, async |number| {
        let noise: Vec<u8> = (0..600_u64).map(|n| ((n * (number + 3) * 2_654_435_761) >> 13) as u8).collect();
        Ok(is_no_more_than_a_challenge(&said(target, &noise).await?))
    })
    .await
}

/// Connections that say one byte of a good handshake each second. Each must have been hung up on in the end.
async fn slow(target: &Target, until: Instant) -> anyhow::Result<Tally> {
    let mut streams = Vec::new();
    for _ in 0..64 {
        streams.push(TcpStream::connect(target.address).await?);
    }
    let bytes = hello();
    let mut said = bytes.iter().cycle();
    while Instant::now() < until {
        let byte = *said.next().context("no end of bytes")?;
        for stream in &mut streams {
            // What was hung up on cannot be written to.
            let _ = stream.write_all(&[byte]).await;
        }
        sleep(Duration::from_secs(1)).await;
    }
    let mut tally = Tally { attempts: streams.len() as u64, ..Tally::default() };
    for stream in streams {
        tally.refused += u64::from(has_hung_up(stream).await);
    }
    Ok(tally)
}

async fn has_hung_up(mut stream: TcpStream) -> bool {
    let mut heard = Vec::new();
    timeout(Duration::from_millis(100), stream.read_to_end(&mut heard)).await.is_ok()
}

/// As many connections as this process may have, from many addresses, that say nothing. Meanwhile somebody with the secret
/// comes from one of those addresses and from another.
async fn silent(target: &Target, until: Instant) -> anyhow::Result<Tally> {
    const WANTED: u64 = 10_000;
    let count = WANTED.min(file_limit().saturating_sub(100));
    let mut streams = Vec::new();
    let mut tally = Tally::default();
    for number in 0..count {
        let socket = TcpSocket::new_v4()?;
        socket.bind((Ipv4Addr::new(127, 0, 0, 2 + (number % 4) as u8), 0).into())?;
        streams
            .push(timeout(ANSWER_MAX, socket.connect(target.address)).await.context("no room to connect")??);
        if number % 500 == 499 {
            welcome(target, &mut tally.wrong).await;
        }
        if number % 50 == 49 {
            // About 10 000 a second at most; whoever floods the kernel's own queue attacks the kernel.
            sleep(Duration::from_millis(5)).await;
        }
    }
    while Instant::now() < until {
        welcome(target, &mut tally.wrong).await;
        sleep(Duration::from_millis(200)).await;
    }
    // Those that still stand have been told no more than a challenge, and go when they have had their time.
    tally.attempts = streams.len() as u64;
    for stream in streams {
        let mut heard = vec![0; 256];
        let told = stream.try_read(&mut heard).unwrap_or(0);
        tally.refused += u64::from(is_no_more_than_a_challenge(heard.get(..told).unwrap_or_default()));
    }
    Ok(tally)
}

/// Somebody with the secret has to be let in, in time.
async fn welcome(target: &Target, wrong: &mut Vec<String>) {
    const WELCOME_MAX: Duration = Duration::from_secs(1);
    let came = Instant::now();
    let found = match timeout(ANSWER_MAX, client(target)).await {
        Ok(Ok(_)) if came.elapsed() <= WELCOME_MAX => return,
        Ok(Ok(_)) => format!("a member was let in after {:?}", came.elapsed()),
        Ok(Err(error)) => format!("a member was not let in: {error}"),
        Err(_) => format!("a member was not let in within {ANSWER_MAX:?}"),
    };
    if wrong.is_empty() {
        wrong.push(found);
    }
}

/// Proves itself, then claims to be what it is not, to have what cannot be, or more of it than fits.
async fn lies(target: &Target, until: Instant) -> anyhow::Result<Tally> {
    repeat(until, async |number| {
        let mut liar = client(target).await.context("the liar knows the secret")?;
        liar.send(ToController::Join(Box::new(lie(number)?)))?;
        Ok(matches!(
            liar.receive("an answer").await,
            Err(RendezvousError::Refused { .. }) | Ok(ToMember::Refused { .. })
        ))
    })
    .await
}

/// One lie after another.
fn lie(number: u64) -> anyhow::Result<Join> {
    let piece = |offset: u64, rows: u64| -> anyhow::Result<SourcePiece> {
        let (dtype, region) = (DType::U8, RegionIndex(0));
        let (tensor, shape) = ("model.norm.weight".to_owned(), vec![rows]);
        let bounds = TensorBox::new(&[0], &[rows])?;
        Ok(SourcePiece { tensor, dtype, shape, bounds, region, offset })
    };
    let (mut member, mut world) = (Rank::Trainer(TrainerRank(0)), World { trainers: 2, inference: 1 });
    let (mut job, mut regions, mut endpoint) = ("default".to_owned(), vec![64], Vec::new());
    let mut pieces = vec![piece(0, 64)?];
    match number % 7 {
        0 => {} // the rank is taken
        1 => pieces = vec![piece(u64::MAX - 3, 64)?],
        2 => pieces = vec![piece(0, u64::MAX)?],
        3 => (world.trainers, member) = (65_536, Rank::Trainer(TrainerRank(65_535))),
        4 => job = "another".into(),
        5 => regions = vec![u64::MAX; 20_000],
        _ => endpoint = vec![0xff; 100_000],
    }
    let rails = vec![RailDecl { bytes_per_second: u64::MAX }];
    let manifest = MemberManifest::Trainer(TrainerManifest { host: "h".into(), regions, rails, pieces });
    let deadline = Duration::from_secs(20);
    Ok(Join {
        job,
        member,
        world,
        deadline,
        manifest,
        endpoint,
        holds: Holds::Nothing,
        stages: false,
        session: SessionId::default(),
    })
}

/// As many open files as this process may ask for, until it is dropped. Jobs are started without it, so that their processes have
/// the limit that a user's have.
pub(crate) struct FileLimit(rustix::process::Rlimit);

impl FileLimit {
    pub(crate) fn raised() -> Self {
        let before = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        let raised = rustix::process::Rlimit { current: before.maximum, ..before };
        // What cannot be raised is told by `file_limit`.
        let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, raised);
        Self(before)
    }
}

impl Drop for FileLimit {
    fn drop(&mut self) {
        let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, self.0);
    }
}

fn file_limit() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX)
}
