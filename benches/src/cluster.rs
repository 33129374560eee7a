//! `bench cluster`: measures the cluster that a user has, launched by Slurm, MPI, torchrun, ssh or on one host.
//!
//! One process is the root: it finds out who is there, says what to measure and writes down what came out. It is rank 0
//! itself where a launcher started the ranks, and their parent where it starts them. Every figure is a push through the
//! `weightsync` facade, as a user's job would do it.

mod facts;
mod hosts;
mod job;
mod launcher;
mod link;
mod measure;
mod member;
mod model;
mod options;
mod record;
mod report;
mod root;
mod spawn;

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::Path;

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

pub(crate) use options::Options;
pub(crate) use spawn::{RANK_COMMAND, rank};

use launcher::Place;
use link::Who;
use member::Member;
use options::{Address, LocalWorld};
use record::Launch;
use root::{Root, RootConfig};
use spawn::{Processes, RankCommand};

const SECRET_VARIABLE: &str = "WEIGHTSYNC_SECRET";

/// Bytes of a secret or host file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// News that may wait for the root.
const NEWS_MAX: usize = 1024;

fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    // Refused before anything is started.
    options.rails()?;
    runtime()?.block_on(async {
        match (&options.local, &options.hosts) {
            (Some(world), _) => local(options, *world).await,
            (_, Some(file)) => over_ssh(options, file).await,
            (None, None) => launched(options).await,
        }
    })
}

/// This host only.
async fn local(options: &Options, world: LocalWorld) -> anyhow::Result<()> {
    let LocalWorld { trainers, receivers } = world;
    let address = options.address.clone().unwrap_or(Address { host: "127.0.0.1".into(), port: None });
    let listener = TcpListener::bind((address.host.as_str(), address.port.unwrap_or(0)))
        .await
        .with_context(|| format!("cannot listen on {}", address.host))?;
    let at = listener.local_addr()?.to_string();
    let program = own_path()?;
    let prefixes = (options.launch_trainers.as_str(), options.launch_receivers.as_str());
    let commands = spawn::local(&program, &at, options.deadline()?, (trainers, receivers), prefixes);
    let launch = Launch { launcher: "local".into(), ..Launch::default() };
    parent(options, listener, &commands, trainers, launch).await
}

/// The hosts of a file.
async fn over_ssh(options: &Options, file: &Path) -> anyhow::Result<()> {
    let hosts = hosts::parse(&read(file)?).with_context(|| format!("{}", file.display()))?;
    let size: u32 = hosts.iter().map(|host| host.slots).sum();
    let trainers = trainers_of(options, size)?;
    let (host, port) = match &options.address {
        Some(Address { host, port }) => (host.clone(), port.unwrap_or(0)),
        None => {
            let first = hosts.first().map(|host| host.name.as_str()).unwrap_or_default();
            (address_towards(first)?.to_string(), 0)
        }
    };
    let listener = listen(&host, port).await?;
    let at = with_port(&host, listener.local_addr()?.port());
    let program = options.program.clone().map_or_else(own_path, Ok)?;
    let commands = spawn::over_ssh(&program, &at, options.deadline()?, &hosts);
    let launch = Launch { launcher: "ssh".into(), ..Launch::default() };
    parent(options, listener, &commands, trainers, launch).await
}

/// As the parent of all ranks.
async fn parent(
    options: &Options,
    listener: TcpListener,
    commands: &[RankCommand],
    trainers: u32,
    launch: Launch,
) -> anyhow::Result<()> {
    report::prepare(&options.out)?;
    let secret = weightsync::Secret::random_text()?;
    let (tell, news) = mpsc::channel(NEWS_MAX);
    let hosts = commands.iter().map(|command| command.host.clone()).collect();
    let config = RootConfig { size: commands.len() as u32, secret, deadline: options.deadline()?, hosts };
    eprintln!("starting {} ranks ({})", config.size, launch.launcher);
    let processes = Processes::start(commands, &config.secret, &tell)?;
    let root = Root::gather(listener, config, tell, news).await?;
    measure::run(root, options, trainers, launch).await?;
    processes.finish().await;
    Ok(())
}

/// As one of the ranks that a launcher started.
async fn launched(options: &Options) -> anyhow::Result<()> {
    let variables = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let said = options.address.as_ref().map(|Address { host, port }| (host.as_str(), *port));
    let place = launcher::detect(&variables, options.launcher, said)?;
    let secret = secret(options)?;
    let deadline = options.deadline()?;
    let Place { rank, size, local_rank, ref host, port, .. } = place;
    let who = Who { rank, size };
    let address = with_port(host, port);
    let member = |address| Member { who, local_rank, address, secret: secret.clone(), deadline };
    if rank > 0 {
        return member(address).run().await.with_context(|| format!("rank {rank}"));
    }
    report::prepare(&options.out)?;
    let trainers = trainers_of(options, size)?;
    for (name, value) in &place.found {
        eprintln!("{name}={value}");
    }
    let launcher = format!("{:?}", place.launcher).to_lowercase();
    eprintln!("launched by {launcher}: rank {rank} of {size}, ranks meet at {address}");
    let listener = listen(host, port).await?;
    let loopback = match listener.local_addr()?.ip() {
        IpAddr::V4(_) => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        IpAddr::V6(_) => SocketAddr::from((Ipv6Addr::LOCALHOST, port)),
    };
    let own = tokio::spawn(member(loopback.to_string()).run());
    let (tell, news) = mpsc::channel(NEWS_MAX);
    let config = RootConfig { size, secret, deadline, hosts: Vec::new() };
    let root = Root::gather(listener, config, tell, news).await?;
    let launch = Launch { launcher, variables: place.found };
    measure::run(root, options, trainers, launch).await?;
    own.await?
}

/// Listens where other hosts reach this one, whatever of its addresses they take.
async fn listen(host: &str, port: u16) -> anyhow::Result<TcpListener> {
    let resolved = tokio::net::lookup_host((host, port)).await;
    let first = resolved.with_context(|| format!("cannot resolve {host}"))?.next();
    let any: IpAddr = match first {
        Some(SocketAddr::V6(_)) => Ipv6Addr::UNSPECIFIED.into(),
        _ => Ipv4Addr::UNSPECIFIED.into(),
    };
    TcpListener::bind((any, port)).await.with_context(|| {
        format!("cannot listen on port {port}; is another benchmark running here? --address HOST:PORT takes another port")
    })
}

/// The address of this host that leads to `host`. Nothing is sent.
fn address_towards(host: &str) -> anyhow::Result<IpAddr> {
    let name = host.rsplit_once('@').map_or(host, |(_, name)| name);
    let found = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect((name, 22))?;
        Ok(socket.local_addr()?.ip())
    });
    found.with_context(|| format!("cannot tell how {name} reaches this host: give --address HOST"))
}

fn with_port(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// The number of trainers: as asked for, or half of the ranks.
fn trainers_of(options: &Options, size: u32) -> anyhow::Result<u32> {
    let trainers = options.trainers.unwrap_or(size / 2);
    if trainers == 0 || trainers >= size {
        bail!("--trainers {trainers} of {size} ranks: there must be at least one trainer and one receiver");
    }
    Ok(trainers)
}

/// The job's secret, as every rank of a launcher knows it.
fn secret(options: &Options) -> anyhow::Result<String> {
    let secret = match &options.secret_file {
        Some(file) => read(file)?,
        None => std::env::var(SECRET_VARIABLE).unwrap_or_default(),
    };
    let secret = secret.trim().to_owned();
    if secret.is_empty() && !options.insecure {
        bail!(
            "no secret: whoever reaches rank 0 could join. Give every rank the same --secret-file or {SECRET_VARIABLE}, \
             or allow it with --insecure"
        );
    }
    Ok(secret)
}

fn read(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).with_context(|| format!("{}", path.display()))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        bail!("{} is longer than {FILE_BYTES_MAX} bytes: is it the right file?", path.display());
    }
    Ok(text)
}

fn own_path() -> anyhow::Result<String> {
    let path = std::env::current_exe().context("cannot find this program's own file")?;
    path.into_os_string().into_string().ok().context("this program's path is not text")
}
