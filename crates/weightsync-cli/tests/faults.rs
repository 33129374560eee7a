//! Ranks, controllers and parents that are killed, stopped or lie, over real processes and real memory: whoever is left
//! ends within its deadline, names who was lost, and no version is half committed.

mod common;

use std::any::Any;
use std::fs;
use std::thread;
use std::time::Duration;

use common::job::{Cluster, DEADLINE_SECONDS, Job, Output, Process};
use common::{checkpoint_of, tiny};
use efa_core::{Hints, LeaseMut, Library, Rail, RailAddress, RailConfig, RemoteRegion};
use rendezvous::{
    Client, ClientConfig, Holds, Join, MemberManifest, Secret, SessionId, ToController, ToMember, Transport,
    World,
};
use rustix::process::{Pid, Signal, kill_process};
use safetensors::Dtype;
use serde::Serialize;
use tempfile::TempDir;
use xfer_exec::local::{Doorman, KEY_BYTES, SharedFile};
use xfer_exec::ofi::OfiTarget;
use xfer_plan::{
    DType, DestinationParam, ParamMap, RailDecl, Rank, ReceiverManifest, ReceiverRank, RegionIndex,
};

over_each_fabric! {
    a_killed_inference_rank_is_named_by_all,
    a_killed_trainer_is_named_by_all,
    a_killed_controller_ends_the_ranks,
    a_stopped_inference_rank_is_named_by_all,
    a_stopped_trainer_is_named_by_all,
    a_stopped_controller_ends_the_ranks,
    the_ranks_of_a_killed_demo_end_by_themselves,
    a_killed_rank_of_a_demo_is_named,
    a_stopped_rank_of_a_demo_is_named_and_killed,
    a_region_that_is_shorter_than_its_manifest_is_named,
}

/// More than can be pushed while a test lasts.
const STEPS: u32 = 10_000_000;

// --- a controller and two ranks, pushing without a pause -------------------------------------------------------------

struct Running {
    cluster: Cluster,
    controller: Process,
    push: Process,
    serve: Process,
    _checkpoint: TempDir,
}

impl Running {
    /// Some versions have been committed.
    fn start(fabric: &'static str) -> Running {
        let (cluster, controller) = Cluster::start(fabric, 1, 1);
        let checkpoint = tiny();
        let mut serve = cluster.rank("serve", 0, checkpoint.path(), "--verify");
        let mut push = cluster.rank("push", 0, checkpoint.path(), &format!("--steps {STEPS} --pause 0"));
        push.wait_for(r#""pushed","version":3,"#);
        serve.wait_for(r#""verified","version":3,"#);
        Running { cluster, controller, push, serve, _checkpoint: checkpoint }
    }
}

/// What each of them has said by its end. Versions are told one by one from 1 on, and nobody tells of one that the
/// controller has not committed.
struct Told {
    committed: u64,
    pushed: u64,
    served: u64,
    verified: u64,
}

impl Told {
    fn new(controller: &Output, push: &Output, serve: &Output) -> Told {
        let last = |output: &Output, event| {
            let versions = output.versions(event);
            let last = versions.len() as u64;
            assert_eq!(versions, (1..=last).collect::<Vec<_>>(), "{event}: {output}");
            last
        };
        let told = Told {
            committed: last(controller, "committed"),
            pushed: last(push, "pushed"),
            served: last(serve, "served"),
            verified: last(serve, "verified"),
        };
        let Told { committed, pushed, served, verified } = told;
        let all = format!("committed {committed}, pushed {pushed}, served {served}, verified {verified}");
        assert!(pushed <= committed && served <= committed && verified <= served, "{all}");
        // One version at a time.
        assert!(served <= pushed + 1 && verified + 1 >= served, "{all}");
        told
    }
}

fn a_killed_inference_rank_is_named_by_all(fabric: &'static str) {
    let Running { cluster, controller, push, serve, .. } = Running::start(fabric);
    let serve = serve.kill().was_killed();
    let push = push.finish().fails(1, &["trainer 0: ", "inference 0"]);
    // It hears of the loss from the trainer, whose writes fail, or by itself.
    let controller = controller.finish().fails(1, &["inference 0"]);
    let told = Told::new(&controller, &push, &serve);
    // The last one may have been committed without the confirmation of the rank that died.
    assert!(told.pushed + 1 >= told.committed);
    cluster.job.end();
}

fn a_killed_trainer_is_named_by_all(fabric: &'static str) {
    let Running { cluster, controller, push, serve, .. } = Running::start(fabric);
    let push = push.kill().was_killed();
    let serve = serve.finish().fails(1, &["inference 0: ", "trainer 0 was lost"]);
    let controller = controller.finish().fails(1, &["trainer 0 was lost"]);
    let told = Told::new(&controller, &push, &serve);
    // The survivor serves, whole and compared, exactly what was decided.
    assert_eq!((told.served, told.verified), (told.committed, told.committed));
    cluster.job.end();
}

fn a_killed_controller_ends_the_ranks(fabric: &'static str) {
    let Running { cluster, controller, push, serve, .. } = Running::start(fabric);
    let address = cluster.address.as_str();
    controller.kill().was_killed();
    push.finish().fails(1, &["trainer 0: ", "lost the controller", address]);
    serve.finish().fails(1, &["inference 0: ", "lost the controller", address]);
    cluster.job.end();
}

fn a_stopped_inference_rank_is_named_by_all(fabric: &'static str) {
    let Running { cluster, controller, push, serve, .. } = Running::start(fabric);
    serve.signal(Signal::STOP);
    let push = push.finish().fails(1, &["trainer 0: ", "inference 0"]);
    let controller = controller.finish().fails(1, &["inference 0"]);
    // Once it can, it learns what has happened.
    serve.signal(Signal::CONT);
    let serve = serve.finish().fails(1, &["inference 0: "]);
    Told::new(&controller, &push, &serve);
    cluster.job.end();
}

fn a_stopped_trainer_is_named_by_all(fabric: &'static str) {
    let Running { cluster, controller, push, serve, .. } = Running::start(fabric);
    push.signal(Signal::STOP);
    let serve = serve.finish().fails(1, &["inference 0: ", "trainer 0 was lost"]);
    let controller = controller.finish().fails(1, &["trainer 0 was lost", "nothing was heard from it"]);
    push.signal(Signal::CONT);
    let push = push.finish().fails(1, &["trainer 0: "]);
    let told = Told::new(&controller, &push, &serve);
    assert_eq!((told.served, told.verified), (told.committed, told.committed));
    cluster.job.end();
}

fn a_stopped_controller_ends_the_ranks(fabric: &'static str) {
    let Running { cluster, controller, push, serve, .. } = Running::start(fabric);
    controller.signal(Signal::STOP);
    let silence = ["the controller at", &cluster.address, "did not answer within"];
    let push = push.finish().fails(1, &[&silence[..], &["trainer 0: "]].concat());
    let serve = serve.finish().fails(1, &[&silence[..], &["inference 0: "]].concat());
    controller.signal(Signal::CONT);
    let controller = controller.finish().fails(1, &["was lost"]);
    Told::new(&controller, &push, &serve);
    cluster.job.end();
}

// --- the demo, which has its ranks as children -----------------------------------------------------------------------

fn demo(job: &Job, fabric: &str, checkpoint: &TempDir) -> Process {
    let checkpoint = checkpoint.path().display();
    let mut demo = job.start(&format!(
        "demo --fabric {fabric} --trainers 2 --inference 2 --steps {STEPS} --deadline {DEADLINE_SECONDS} \
         --checkpoint {checkpoint}"
    ));
    demo.wait_for("version 2: every byte verified");
    demo
}

/// The process of a rank of the demo.
fn rank_of(job: &Job, side: &str, rank: u32) -> Pid {
    let wanted = format!("\0{side}\0--controller\0");
    let rank = format!("\0--rank\0{rank}\0");
    let is_it = |pid: &Pid| {
        let line = fs::read_to_string(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default();
        line.contains(&wanted) && line.contains(&rank)
    };
    job.alive().into_iter().find(is_it).unwrap_or_else(|| panic!("no {wanted:?} with {rank:?}"))
}

fn the_ranks_of_a_killed_demo_end_by_themselves(fabric: &'static str) {
    let (job, checkpoint) = (Job::new(), tiny());
    let demo = demo(&job, fabric, &checkpoint);
    assert_eq!(job.alive().len(), 5, "the demo and its four ranks");
    demo.kill().was_killed();
    job.end();
}

fn a_killed_rank_of_a_demo_is_named(fabric: &'static str) {
    for (side, name) in [("push", "trainer 1"), ("serve", "inference 1")] {
        let (job, checkpoint) = (Job::new(), tiny());
        let demo = demo(&job, fabric, &checkpoint);
        kill_process(rank_of(&job, side, 1), Signal::KILL).unwrap();
        let output = demo.finish().fails(1, &[name]);
        assert!(!output.stdout.contains("verified:"), "{output}");
        job.end();
    }
}

fn a_stopped_rank_of_a_demo_is_named_and_killed(fabric: &'static str) {
    let (job, checkpoint) = (Job::new(), tiny());
    let demo = demo(&job, fabric, &checkpoint);
    kill_process(rank_of(&job, "serve", 0), Signal::STOP).unwrap();
    demo.finish().fails(1, &["inference 0"]);
    job.end();
}

// --- a rank that lies ------------------------------------------------------------------------------------------------

/// How a rank tells its peers where it is; `weightsync` keeps this form to itself, so it is written down once more.
#[derive(Serialize)]
struct Endpoint {
    host: String,
    rails: Vec<RailEndpoint>,
    local: Option<LocalEndpoint>,
    stages: bool,
}

#[derive(Serialize)]
struct RailEndpoint {
    provider: String,
    address: RailAddress,
    regions: Vec<RemoteRegion>,
    scratch: Option<RemoteRegion>,
}

#[derive(Serialize)]
struct LocalEndpoint {
    name: String,
    key: [u8; KEY_BYTES],
    memory: LocalMemory,
    region_bytes: Vec<u64>,
}

#[derive(Serialize)]
enum LocalMemory {
    Host,
}

/// What an inference rank's manifest says that it has: one parameter that fills its one region.
const SHAPE: [u64; 2] = [64, 16];
const MANIFEST_BYTES: u64 = 64 * 16 * 4;
/// What it really has.
const EXPOSED_BYTES: u64 = MANIFEST_BYTES - 1024;
const PARAM: &str = "lm_head.weight";

/// Boot and network namespace, as `weightsync` names a host.
fn host() -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    format!("{} {}", boot.trim(), fs::read_link("/proc/self/ns/net").unwrap().display())
}

/// An endpoint over `EXPOSED_BYTES` that says `region_bytes`, and what keeps it open.
fn short_endpoint(fabric: &str, region_bytes: u64) -> (Endpoint, Box<dyn Any + Send>) {
    let mut endpoint = Endpoint { host: host(), rails: Vec::new(), local: None, stages: false };
    if fabric == "local" {
        let (memory, file) = SharedFile::create(EXPOSED_BYTES).unwrap();
        let (doorman, _) = Doorman::open(vec![file]).unwrap();
        let address = doorman.address();
        let (name, key, region_bytes) = (address.name.clone(), address.key, vec![region_bytes]);
        endpoint.local = Some(LocalEndpoint { name, key, memory: LocalMemory::Host, region_bytes });
        return (endpoint, Box::new((memory, doorman)));
    }
    let library = Library::open().unwrap();
    let provider = library.tcp_provider();
    let infos = library.infos(&Hints::new(provider).source("127.0.0.1".parse().unwrap())).unwrap();
    let mut rail = Rail::open(&infos[0], &RailConfig::for_info(&infos[0])).unwrap();
    let mut expose = |bytes: u64| {
        let target = LeaseMut::zeroed(bytes as usize).unwrap().expose();
        rail.expose(&target).unwrap().1
    };
    let region = RemoteRegion { len: region_bytes, ..expose(EXPOSED_BYTES) };
    let scratch = Some(expose(64));
    let (provider, address) = (provider.to_string(), rail.address().clone());
    endpoint.rails.push(RailEndpoint { provider, address, regions: vec![region], scratch });
    (endpoint, Box::new(OfiTarget::start(vec![rail], Vec::new()).unwrap()))
}

/// Takes part as inference rank 0, like an honest one, until the controller ends it; what it was told last.
fn pretend(cluster: &Cluster, endpoint: &Endpoint) -> thread::JoinHandle<String> {
    let member = Rank::Receiver(ReceiverRank(0));
    let world = World { trainers: cluster.trainers, inference: cluster.inference };
    let (shape, region) = (SHAPE.to_vec(), RegionIndex(0));
    let (name, map) = (PARAM.to_owned(), ParamMap::tensor(PARAM));
    let manifest = ReceiverManifest {
        host: endpoint.host.clone(),
        regions: vec![MANIFEST_BYTES],
        rails: vec![RailDecl { bytes_per_second: 1 << 30 }],
        params: vec![DestinationParam {
            name,
            dtype: DType::F32,
            shape,
            region,
            offset: 0,
            map: map.into(),
            priority: 0,
        }],
    };
    let (job, manifest) = ("default".to_owned(), MemberManifest::Inference(manifest));
    let deadline = Duration::from_secs(DEADLINE_SECONDS.parse().unwrap());
    let endpoint = postcard::to_stdvec(endpoint).unwrap();
    let join = Join {
        job,
        member,
        world,
        deadline,
        manifest,
        endpoint,
        holds: Holds::Nothing,
        stages: false,
        session: SessionId::default(),
    };
    let config = ClientConfig {
        controller: cluster.address.clone(),
        job: weightsync::JOB_DEFAULT.into(),
        secret: Secret::none(),
        transport: Transport::tcp(),
        deadline,
    };
    thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut client = Client::connect(config).await.unwrap();
            client.send(ToController::Join(Box::new(join))).unwrap();
            loop {
                match client.receive("anything").await {
                    Ok(ToMember::Planned(planned)) => {
                        client.send(ToController::Ready { digest: planned.digest }).unwrap();
                    }
                    Ok(ToMember::Prepare { push, .. }) => {
                        client.send(ToController::Prepared { push }).unwrap()
                    }
                    Ok(ToMember::Commit { .. }) => return "a commit".to_owned(),
                    Ok(_) => {}
                    Err(error) => return error.to_string(),
                }
            }
        })
    })
}

fn a_region_that_is_shorter_than_its_manifest_is_named(fabric: &'static str) {
    let checkpoint = checkpoint_of(&[(PARAM, Dtype::F32, &SHAPE.map(|size| size as usize))]);
    let short = format!("{EXPOSED_BYTES}");
    let found_early: &[&str] = &["inference 0", "region 0", &short, "its manifest says"];
    // It says what it has; or it says what it should have, which shared memory shows at once, and a NIC when it is
    // written to.
    let found_late: &[&str] = &["inference 0", PARAM];
    let lie = if fabric == "local" { found_early } else { found_late };
    for (region_bytes, words) in [(EXPOSED_BYTES, found_early), (MANIFEST_BYTES, lie)] {
        let (cluster, controller) = Cluster::start(fabric, 1, 1);
        let (endpoint, open) = short_endpoint(fabric, region_bytes);
        let liar = pretend(&cluster, &endpoint);
        let push = cluster.rank("push", 0, checkpoint.path(), "");
        let output = push.finish().fails(1, &[words, &["trainer 0: "]].concat());
        assert_eq!(output.versions("pushed"), [0; 0], "{output}");
        let output = controller.finish().fails(1, &["trainer 0 was lost"]);
        assert_eq!(output.versions("committed"), [0; 0], "{output}");
        let told = liar.join().unwrap();
        assert!(told.contains("trainer 0"), "{told}");
        drop(open);
        cluster.job.end();
    }
}
