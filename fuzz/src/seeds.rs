//! Writes the first corpus of every target: `seeds FOLDER`.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

#[path = "../../crates/topology/tests/common/dumps.rs"]
mod dumps;
#[allow(dead_code)] // a part of it is enough here
#[path = "../../crates/xfer-plan/tests/hostile/mod.rs"]
mod hostile;
#[allow(dead_code)] // a part of it is enough here
#[path = "../../crates/xfer-plan/tests/scenario/mod.rs"]
mod scenario;

use rendezvous::{
    Bank, Checksum, Commit, Fence, Holds, Join, MemberManifest, PushId, SessionId, ToController, ToMember,
    World,
};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use scenario::Choices;
use xfer_plan::{ParamId, Rank, ReceiverRank, TrainerRank};

fn main() -> io::Result<()> {
    let folder = std::env::args_os().nth(1).ok_or_else(|| io::Error::other("usage: seeds FOLDER"))?;
    let folder = Path::new(&folder);
    for seed in 0..64u32 {
        let choices = (0..200).map(|n| n * seed * 7919 % 1009).collect();
        let manifest = scenario::manifest(&mut Choices::new(choices));
        let plan = xfer_plan::plan(&manifest).map_err(io::Error::other)?;
        let mut bytes = postcard::to_allocvec(&manifest).map_err(io::Error::other)?;
        bytes.extend(postcard::to_allocvec(&plan).map_err(io::Error::other)?);
        write(&folder.join("plan"), seed, &bytes)?;
    }
    for (seed, description) in (0..).zip(hostile::DESCRIPTIONS) {
        write(&folder.join("model_spec"), seed, description.as_bytes())?;
    }
    for (seed, dump) in (0..).zip([dumps::hwloc_p5(1), dumps::nccl_p4d()]) {
        write(&folder.join("topology"), seed, dump.as_bytes())?;
    }
    messages(folder)?;
    records(folder)?;
    let tensor = TensorView::new(Dtype::BF16, vec![2, 2], &[7; 8]).map_err(io::Error::other)?;
    let names = ["model.norm.weight", "model.layers.0.self_attn.q_proj.weight"];
    let bytes =
        safetensors::serialize(names.map(|name| (name, tensor.clone())), None).map_err(io::Error::other)?;
    write(&folder.join("safetensors"), 0, &bytes)
}

/// What members and the controller say in a small job.
fn messages(folder: &Path) -> io::Result<()> {
    let manifest = scenario::manifest(&mut Choices::new((0..200).collect()));
    let world = World { trainers: 1, inference: 1 };
    let join = |member, manifest, holds| {
        let (job, deadline, endpoint) = ("default".to_owned(), Duration::from_secs(1), vec![1, 2, 3]);
        ToController::Join(Box::new(Join {
            job,
            member,
            world,
            deadline,
            manifest,
            endpoint,
            holds,
            stages: false,
            session: SessionId::default(),
        }))
    };
    let trainer = manifest.trainers.first().cloned().ok_or_else(|| io::Error::other("no trainer"))?;
    let receiver = manifest.receivers.first().cloned().ok_or_else(|| io::Error::other("no receiver"))?;
    let push = PushId([7; 16]);
    let fences = vec![Fence { at: ReceiverRank(0), rail: 1 }];
    let said = [
        join(Rank::Trainer(TrainerRank(0)), MemberManifest::Trainer(trainer), Holds::Nothing),
        join(Rank::Receiver(ReceiverRank(0)), MemberManifest::Inference(receiver.clone()), Holds::Nothing),
        ToController::Begin { version: 1 },
        ToController::Magnitudes { push, magnitudes: vec![0.5, 2.0] },
        ToController::Prepared { push },
        ToController::Written { push, bytes: 1, writes: 1, fences: fences.clone(), sums: Vec::new() },
        ToController::Failed { push, reason: "no".into(), fences },
        ToController::Heartbeat { progress: 5 },
        ToController::Leave { reason: Some("bye".into()) },
        join(
            Rank::Receiver(ReceiverRank(0)),
            MemberManifest::Inference(receiver),
            Holds::Undecided { attempt: Commit { version: 1, push }, serves: None },
        ),
    ];
    let heard = [
        ToMember::Start,
        ToMember::Measure { push, version: 1 },
        ToMember::Prepare { push, version: 1, fence: vec![0], bank: Bank::default() },
        ToMember::Write { push, version: 1, bank: Bank::default(), told: vec![2.0] },
        ToMember::Verify { push, sums: vec![(ParamId(0), Checksum([3; 16]))] },
        ToMember::Done { push, version: 1, unconfirmed: vec![Rank::Receiver(ReceiverRank(0))] },
        ToMember::Abort { version: 1, reason: "no".into() },
        ToMember::Regroup { reason: "inference 1 is back".into() },
    ];
    // What the targets take before the frames: a policy, and control bytes.
    let controls = |number: usize| [&[number as u8, 8][..], &[0, 0, 4, 130, 128, 1, 0, 40]].concat();
    for (seed, number) in (0..).zip(0..said.len()) {
        let bytes = [controls(number), frames(&said[..=number])?].concat();
        write(&folder.join("controller"), seed, &bytes)?;
    }
    for kind in 0..4 {
        write(&folder.join("member"), kind.into(), &[vec![kind, 3], frames(&heard)?].concat())?;
    }
    // The first words of either side.
    let mut hello = b"wghtsync".to_vec();
    hello.extend(rendezvous::PROTOCOL_VERSION.to_le_bytes());
    for (seed, bytes) in [(0, 32), (1, 64), (2, 1), (3, 33)] {
        let body: Vec<u8> = vec![1; bytes];
        let frame = [&hello[..], &(bytes as u32).to_le_bytes(), &body].concat();
        write(&folder.join("handshake"), seed, &frame)?;
    }
    write(&folder.join("doorman"), 0, &[0; 5])?;
    write(&folder.join("doorman"), 1, &[1; 21])?;
    // A host, one rail of `tcp` with an address, a region and none for warm-ups, and no shared memory.
    write(&folder.join("endpoint"), 0, b"\x04host\x01\x03tcp\x04\x01\x02\x03\x04\x01\x00\x07\x40\x00\x00")
}

/// A record, and etcd's answers with one, with an address and with a lease.
fn records(folder: &Path) -> io::Result<()> {
    let record = folder.join("commit");
    let (file, _) = rendezvous::RecordFile::open(&record, "default").map_err(io::Error::other)?;
    file.store(Commit { version: 7, push: PushId([7; 16]) })?;
    let text = fs::read(&record)?;
    fs::remove_file(&record)?;
    // The address is 127.0.0.1:7070, in etcd's base64.
    let answers = [
        r#"{"header":{"revision":"5"},"succeeded":true,"responses":[{"response_range":{"kvs":[{"value":"MTI3LjAuMC4xOjcwNzA=","create_revision":"3","mod_revision":"4","lease":"9"}]}},{"response_range":{}}]}"#,
        r#"{"result":{"ID":"9","TTL":"30"}}"#,
        r#"{"error":{"message":"etcdserver: mvcc: required revision has been compacted","code":11}}"#,
    ];
    let answers = answers.map(|answer| [&200_u16.to_le_bytes()[..], answer.as_bytes()].concat());
    for (seed, bytes) in (0..).zip([text].into_iter().chain(answers)) {
        write(&folder.join("record"), seed, &bytes)?;
    }
    Ok(())
}

fn frames(messages: &[impl serde::Serialize]) -> io::Result<Vec<u8>> {
    let mut frames = Vec::new();
    for message in messages {
        let bytes = postcard::to_allocvec(message).map_err(io::Error::other)?;
        frames.extend((bytes.len() as u32).to_le_bytes());
        frames.extend(bytes);
    }
    Ok(frames)
}

fn write(folder: &Path, seed: u32, bytes: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join(format!("seed{seed}")), bytes)
}
