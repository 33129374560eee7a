//! Plans how the rows of a trained attention layer reach the fused `qkv_proj` of two tensor-parallel
//! inference ranks, and prints the plan for a person to read.
//!
//! Four trainers own q, k and v by rows, as FSDP leaves them. Inference rank r wants its heads of q, then of
//! k, then of v, in one matrix; and its columns of the output projection.

use xfer_plan::{
    DType, DestinationParam, DeviceMesh, LayoutError, Manifest, OpKind, ParamMap, Placement, RailDecl,
    ReceiverManifest, RegionIndex, SourcePiece, TrainerManifest, TrainerRank, plan, shard_box,
};

const HIDDEN: u64 = 1024;
const TENSORS: [(&str, [u64; 2]); 4] = [
    ("q_proj", [2048, HIDDEN]),
    ("k_proj", [1024, HIDDEN]),
    ("v_proj", [1024, HIDDEN]),
    ("o_proj", [HIDDEN, 2048]),
];
const TRAINERS: u64 = 4;
const TENSOR_PARALLEL: u64 = 2;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let manifest = Manifest {
        trainers: (0..TRAINERS).map(trainer).collect::<Result<_, _>>()?,
        receivers: (0..TENSOR_PARALLEL).map(receiver).collect::<Result<_, _>>()?,
        ..Manifest::default()
    };
    let plan = plan(&manifest)?;
    plan.check(&manifest)?;

    println!("{plan}");
    for trainer in (0..TRAINERS as u32).map(TrainerRank) {
        println!("{trainer}:");
        for op in plan.part(trainer, &manifest)?.ops {
            let how = match op.kind() {
                OpKind::Direct => "one piece".to_string(),
                OpKind::Gather => format!("{} rows of {} B gathered", op.rows, op.row_bytes),
                OpKind::Rows => format!("{} rows of {} B", op.rows, op.row_bytes),
                OpKind::Transform => format!("{} rows of {} B by {:?}", op.rows, op.row_bytes, op.transform),
            };
            let (from, to) = (op.source.offset, op.destination.offset);
            println!("  {:8} B {from:>8} -> {} {} {to:>8}  {how}", op.bytes(), op.to, plan.name(op.param));
        }
    }
    Ok(())
}

/// Every tensor cut by rows; the shards one after the other in one region.
fn trainer(rank: u64) -> Result<TrainerManifest, LayoutError> {
    let mesh = DeviceMesh::new(&[TRAINERS])?;
    let (mut pieces, mut end) = (Vec::new(), 0);
    for (name, shape) in TENSORS {
        let bounds = shard_box(&shape, &mesh, &[Placement::Shard(0)], rank)?;
        let (tensor, dtype, shape) = (name.to_string(), DType::BF16, shape.to_vec());
        let piece = SourcePiece { tensor, dtype, shape, bounds, region: RegionIndex(0), offset: end };
        end += piece.bytes().unwrap_or(0);
        pieces.push(piece);
    }
    let rails = vec![RailDecl { bytes_per_second: 12_500_000_000 }; 4];
    Ok(TrainerManifest { host: "train-0".into(), regions: vec![end], rails, pieces })
}

fn receiver(rank: u64) -> Result<ReceiverManifest, LayoutError> {
    let shape_of = |name: &str| TENSORS.iter().find(|(n, _)| *n == name).map(|(_, shape)| shape.to_vec());
    let shard = |name: &str, dim| {
        let shape = shape_of(name).unwrap_or_default();
        ParamMap::tensor(name).shard(&shape, dim, TENSOR_PARALLEL, rank)
    };
    let qkv = ParamMap::concat(0, [shard("q_proj", 0)?, shard("k_proj", 0)?, shard("v_proj", 0)?]);
    let (mut params, mut end) = (Vec::new(), 0);
    for (name, map) in [("qkv_proj", qkv), ("o_proj", shard("o_proj", 1)?)] {
        let (name, dtype, shape) = (name.to_string(), DType::BF16, map.shape(shape_of)?);
        let param = DestinationParam {
            name,
            dtype,
            shape,
            region: RegionIndex(0),
            offset: end,
            map: map.into(),
            priority: 0,
        };
        end += param.bytes().unwrap_or(0);
        params.push(param);
    }
    let rails = vec![RailDecl { bytes_per_second: 12_500_000_000 }; 4];
    Ok(ReceiverManifest { host: "infer-0".into(), regions: vec![end], rails, params })
}
