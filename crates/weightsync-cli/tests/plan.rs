//! A push without a network: real checkpoints, the planner's plan carried out on byte arrays, and the reference.

mod common;

use std::fs;
use std::path::Path;

use common::{bert, write_tensors};
use weightsync_cli::checkpoint::Checkpoint;
use weightsync_cli::reference::{param_names, verify_param};
use weightsync_cli::synthetic::{Shape, ensure};
use weightsync_cli::tensor_parallel::Layout;
use weightsync_cli::training::advance_box;
use xfer_plan::{
    DestinationParam, DeviceMesh, Manifest, Placement, PlanOptions, RailDecl, ReceiverManifest, RegionIndex,
    SourcePiece, TrainerManifest, TrainerRank, plan, shard_box,
};

const REGION: RegionIndex = RegionIndex(0);

/// Every tensor in rows over the trainers, as FSDP2 lays it out.
fn trainers(checkpoint: &Checkpoint, count: u64) -> Vec<TrainerManifest> {
    let mesh = DeviceMesh::new(&[count]).unwrap();
    let trainer = |rank| {
        let mut offset = 0;
        let piece = |tensor: &weightsync_cli::checkpoint::TensorInfo| {
            let placement = if tensor.shape.is_empty() { Placement::Replicate } else { Placement::Shard(0) };
            let bounds = shard_box(&tensor.shape, &mesh, &[placement], rank).unwrap();
            let piece = SourcePiece {
                tensor: tensor.name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                bounds,
                region: REGION,
                offset,
            };
            offset += piece.bytes().unwrap().next_multiple_of(8);
            piece
        };
        let pieces = checkpoint.tensors().iter().map(piece).collect();
        TrainerManifest { host: format!("t{rank}"), regions: vec![offset], rails: rails(), pieces }
    };
    (0..count).map(trainer).collect()
}

fn receivers(checkpoint: &Checkpoint, tp: u32) -> Vec<ReceiverManifest> {
    let layout = Layout::new(checkpoint.tensors(), checkpoint.heads(), tp).unwrap();
    let receiver = |rank| {
        let mut offset = 0;
        let mut params = Vec::new();
        for param in layout.params(rank).unwrap() {
            let bytes = param.bytes();
            let (name, dtype, shape, map) = (param.name, param.dtype, param.shape, param.map);
            params.push(DestinationParam {
                name,
                dtype,
                shape,
                region: REGION,
                offset,
                map: map.into(),
                priority: 0,
            });
            offset += bytes.next_multiple_of(8);
        }
        ReceiverManifest { host: format!("r{rank}"), regions: vec![offset], rails: rails(), params }
    };
    (0..tp).map(receiver).collect()
}

fn rails() -> Vec<RailDecl> {
    vec![RailDecl { bytes_per_second: 1_000_000_000 }]
}

/// Loads, steps, pushes twice and compares every byte of every receiver.
fn push(folder: &Path, trainer_count: u64, tp: u32, options: PlanOptions) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    let manifest = Manifest {
        trainers: trainers(&checkpoint, trainer_count),
        receivers: receivers(&checkpoint, tp),
        options,
    };
    let plan = plan(&manifest).unwrap();
    plan.check(&manifest).unwrap();

    let memory = |regions: &[u64]| vec![0xee; regions[0] as usize];
    let mut sources: Vec<Vec<u8>> =
        manifest.trainers.iter().map(|trainer| memory(&trainer.regions)).collect();
    let mut destinations: Vec<Vec<u8>> =
        manifest.receivers.iter().map(|receiver| memory(&receiver.regions)).collect();
    for (trainer, source) in manifest.trainers.iter().zip(&mut sources) {
        for piece in &trainer.pieces {
            let into = &mut source[piece.offset as usize..][..piece.bytes().unwrap() as usize];
            checkpoint.read_box(&piece.tensor, &piece.bounds, into).unwrap();
        }
    }
    for step in 1..=2 {
        for (trainer, source) in manifest.trainers.iter().zip(&mut sources) {
            for SourcePiece { tensor, dtype, shape, bounds, offset, .. } in &trainer.pieces {
                let length = bounds.volume().unwrap() * dtype.bytes();
                let bytes = &mut source[*offset as usize..][..length as usize];
                assert!(advance_box(*dtype, tensor, shape, bounds, (step - 1, step), bytes));
            }
        }
        for (rank, source) in (0..).map(TrainerRank).zip(&sources) {
            for op in plan.part(rank, &manifest).unwrap().ops {
                let destination = &mut destinations[op.to.index()];
                for row in 0..u64::from(op.rows) {
                    let from = (op.source.offset + row * op.source.stride) as usize;
                    let to = (op.destination.offset + row * op.destination.stride) as usize;
                    let length = op.row_bytes as usize;
                    destination[to..to + length].copy_from_slice(&source[from..from + length]);
                }
            }
        }
        for (rank, (receiver, destination)) in (0..tp).zip(manifest.receivers.iter().zip(&destinations)) {
            assert!(receiver.params.iter().map(|param| &param.name).eq(&param_names(&checkpoint)));
            for param in &receiver.params {
                let verified =
                    verify_param(&checkpoint, &param.name, (tp, rank), step, &mut |offset, found| {
                        found
                            .copy_from_slice(&destination[(param.offset + offset) as usize..][..found.len()]);
                    });
                assert_eq!(verified.unwrap(), param.bytes().unwrap(), "{}, inference {rank}", param.name);
            }
        }
    }
}

#[test]
fn a_qwen_arrives() {
    let folder = tempfile::tempdir().unwrap();
    ensure(folder.path(), &Shape::tiny(), 1, &mut |_, _| {}).unwrap();
    let small =
        PlanOptions { chunk_bytes_max: 1 << 10, gather_chunk_bytes_max: 1 << 10, ..PlanOptions::default() };
    let never_gather = PlanOptions { gather_row_bytes_max: 0, ..PlanOptions::default() };
    for (trainers, tp) in [(1, 1), (4, 2), (3, 4), (2, 8), (5, 3), (1, 12)] {
        for options in [PlanOptions::default(), small, never_gather] {
            push(folder.path(), trainers, tp, options);
        }
    }
}

#[test]
fn a_bert_arrives() {
    let folder = tempfile::tempdir().unwrap();
    write_tensors(&folder.path().join("model.safetensors"), &bert());
    fs::write(folder.path().join("config.json"), r#"{"num_attention_heads": 6}"#).unwrap();
    for (trainers, tp) in [(1, 1), (4, 2), (7, 3), (60, 4)] {
        push(folder.path(), trainers, tp, PlanOptions::default());
    }
}

#[test]
fn a_published_model_arrives() {
    let Some(path) = std::env::var_os("WEIGHTSYNC_REAL_CHECKPOINT") else {
        println!("skipped: WEIGHTSYNC_REAL_CHECKPOINT is not set");
        return;
    };
    for (trainers, tp) in [(4, 2), (3, 3)] {
        push(Path::new(&path), trainers, tp, PlanOptions::default());
    }
}
