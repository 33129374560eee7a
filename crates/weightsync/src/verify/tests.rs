//! Random plans, carried out naively on byte arrays: what was hashed where it was read, cast or not, is what is hashed where it
//! landed, until one byte is another.

use std::cell::Cell;
use std::time::Duration;

use efa_core::LeaseMut;
use half::{bf16, f16};
use proptest::prelude::*;
use xfer_plan::{
    DType, DestinationParam, Manifest, ParamMap, Parts, PlanOptions, RailDecl, ReceiverManifest, SourcePiece,
    TensorBox, TrainerManifest, plan,
};

use super::*;

/// A job of matrices in BF16 that trainers hold by rows and receivers by columns, or whole.
#[derive(Debug, Clone)]
struct Job {
    trainers: u64,
    receivers: u64,
    matrices: Vec<Matrix>,
    chunk_bytes: u64,
    gather_row_bytes_max: u64,
}

#[derive(Debug, Clone, Copy)]
struct Matrix {
    rows: u64,
    columns: u64,
    /// Every receiver wants it whole.
    whole: bool,
    /// What the first receiver wants it as, of [`DTYPES`]; the others take turns.
    dtype: usize,
}

/// Two as long as each other, so that what is copied for one receiver has the place of what is cast for another.
const DTYPES: [DType; 3] = [DType::BF16, DType::F16, DType::F32];

prop_compose! {
    fn matrix()(
        rows in 1..60_u64, columns in 1..60_u64, whole in any::<bool>(), dtype in 0..DTYPES.len(),
    ) -> Matrix {
        Matrix { rows, columns, whole, dtype }
    }
}

prop_compose! {
    fn job()(
        trainers in 1..4_u64,
        receivers in 1..4_u64,
        matrices in prop::collection::vec(matrix(), 1..6),
        chunk_bytes in (8..40_u64).prop_map(|words| words * 8),
        gather_row_bytes_max in 0..60_u64,
    ) -> Job {
        Job { trainers, receivers, matrices, chunk_bytes, gather_row_bytes_max }
    }
}

/// Where the share of a rank begins, and how long it is.
fn share(len: u64, rank: u64, ranks: u64) -> (u64, u64) {
    let start = len * rank / ranks;
    (start, len * (rank + 1) / ranks - start)
}

impl Job {
    fn manifest(&self) -> Manifest {
        let rails = vec![RailDecl { bytes_per_second: 1000 }];
        let trainer = |rank| {
            let mut end = 0;
            let mut pieces = Vec::new();
            for (number, &Matrix { rows, columns, .. }) in self.matrices.iter().enumerate() {
                let (first, own) = share(rows, rank, self.trainers);
                let bytes = own * columns * 2;
                let (tensor, shape, dtype) = (format!("w{number}"), vec![rows, columns], DType::BF16);
                if bytes > 0 {
                    let bounds = TensorBox::new(&[first, 0], &[own, columns]).unwrap();
                    pieces.push(SourcePiece { tensor, dtype, shape, bounds, region: ARENA, offset: end });
                }
                end += bytes;
            }
            TrainerManifest { host: "t".into(), regions: vec![end], rails: rails.clone(), pieces }
        };
        let receiver = |rank| {
            let mut end = 0;
            let mut params = Vec::new();
            for (number, &Matrix { rows, columns, whole, dtype }) in self.matrices.iter().enumerate() {
                let (first, wanted) = if whole { (0, columns) } else { share(columns, rank, self.receivers) };
                let dtype = DTYPES[(dtype + rank as usize) % DTYPES.len()];
                let (name, shape) = (format!("w{number}"), vec![rows, wanted]);
                if wanted > 0 {
                    let bounds = TensorBox::new(&[0, first], &[rows, wanted]).unwrap();
                    let map = ParamMap::tensor(name.as_str()).slice(bounds);
                    let map = if dtype == DType::BF16 { map } else { map.cast(dtype) };
                    let (region, map) = (ARENA, map.into());
                    params.push(DestinationParam {
                        name,
                        dtype,
                        shape,
                        region,
                        offset: end,
                        map,
                        priority: 0,
                    });
                }
                end += rows * wanted * dtype.bytes();
            }
            ReceiverManifest { host: "r".into(), regions: vec![end], rails: rails.clone(), params }
        };
        let options = PlanOptions {
            chunk_bytes_max: self.chunk_bytes,
            gather_row_bytes_max: self.gather_row_bytes_max,
            gather_chunk_bytes_max: self.chunk_bytes,
            ..PlanOptions::default()
        };
        Manifest {
            trainers: (0..self.trainers).map(trainer).collect(),
            receivers: (0..self.receivers).map(receiver).collect(),
            options,
        }
    }
}

/// A push that has been carried out.
struct Pushed {
    parts: Parts,
    names: Names,
    sources: Vec<Vec<u8>>,
    arenas: Vec<Vec<u8>>,
}

fn push(job: &Job, seed: u8) -> Pushed {
    let manifest = job.manifest();
    let plan = plan(&manifest).unwrap();
    let parts = plan.parts(&manifest).unwrap();
    let names = (0..).map(ParamId).zip(plan.params.iter().map(|param| param.name.clone())).collect();
    let element = |at: u64| {
        let mixed = (at + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ u64::from(seed)) >> 40;
        bf16::from_f32(mixed as f32 / 8_388_608.0 - 1.0).to_ne_bytes()
    };
    let source = |trainer: &TrainerManifest| (0..trainer.regions[0] / 2).flat_map(element).collect();
    let sources: Vec<Vec<u8>> = manifest.trainers.iter().map(source).collect();
    let mut arenas: Vec<Vec<u8>> =
        manifest.receivers.iter().map(|receiver| vec![0; receiver.regions[0] as usize]).collect();
    for (source, plan) in sources.iter().zip(&parts.trainers) {
        for op in &plan.ops {
            for row in 0..u64::from(op.rows) {
                let from = (op.source.offset + row * op.source.stride) as usize;
                let to = (op.destination.offset + row * op.destination.stride) as usize;
                let len = op.transform.source_bytes(op.row_bytes.into()) as usize;
                let sent = converted(op.transform, &source[from..from + len]);
                arenas[op.to.index()][to..to + sent.len()].copy_from_slice(&sent);
            }
        }
    }
    Pushed { parts, names, sources, arenas }
}

/// What one row comes to.
fn converted(transform: Transform, row: &[u8]) -> Vec<u8> {
    let elements = row.chunks_exact(2).map(|bytes| bf16::from_ne_bytes([bytes[0], bytes[1]]).to_f32());
    match transform {
        Transform::Copy => row.to_vec(),
        Transform::Cast { to: DType::F32, .. } => elements.flat_map(f32::to_ne_bytes).collect(),
        Transform::Cast { to: DType::F16, .. } => {
            elements.flat_map(|element| f16::from_f32(element).to_ne_bytes()).collect()
        }
        other => panic!("{other:?}"),
    }
}

fn lease(bytes: &[u8]) -> LeaseMut {
    let mut lease = LeaseMut::zeroed(bytes.len()).unwrap();
    lease.bytes_mut().copy_from_slice(bytes);
    lease
}

impl Pushed {
    /// What all trainers have sent to a receiver.
    fn sent(&self, to: usize, covered: &BTreeSet<ParamId>) -> BTreeMap<ParamId, Checksum> {
        let mut sent: BTreeMap<ParamId, Checksum> = BTreeMap::new();
        for (source, plan) in self.sources.iter().zip(&self.parts.trainers) {
            let (ops, regions) = (by_place(&plan.ops), Lent::Host(vec![lease(source).freeze()]));
            let summed = sum(&ops, &regions, Transforms::default(), covered, || true).unwrap();
            for ParamSum { param, sum, .. } in summed.sums.iter().filter(|sum| sum.to.index() == to) {
                sent.entry(*param).or_default().add(*sum);
            }
        }
        sent
    }

    fn compare(&self, to: usize, covered: &BTreeSet<ParamId>) -> Result<VerifyReport, BTreeSet<ParamId>> {
        let arena = Exposed::Host(lease(&self.arenas[to]).expose());
        compare(&self.parts.inbound()[to], &arena, covered, &self.sent(to, covered), |_| true)
    }
}

proptest! {
    #[test]
    fn what_arrives_unchanged_is_found_to_be_what_was_sent(job in job(), part in 0.01..1.0) {
        let pushed = push(&job, 1);
        for verify in [Verify::Full, Verify::Sampled(part)] {
            let covered = covered(verify, PushId([3; 16]), &pushed.names);
            for to in 0..pushed.arenas.len() {
                let report = pushed.compare(to, &covered);
                prop_assert!(report.is_ok(), "{:?}", report);
                if verify == Verify::Full {
                    // Every byte of the arena is some parameter's.
                    prop_assert_eq!(report.unwrap().bytes, pushed.arenas[to].len() as u64);
                }
            }
        }
    }

    #[test]
    fn a_byte_that_is_another_is_found_and_its_parameter_named(
        job in job(), to in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), flip in 1..=255_u8,
    ) {
        let mut pushed = push(&job, 2);
        let to = to.index(pushed.arenas.len());
        prop_assume!(!pushed.arenas[to].is_empty());
        let at = at.index(pushed.arenas[to].len());
        pushed.arenas[to][at] ^= flip;
        let covered = covered(Verify::Full, PushId([3; 16]), &pushed.names);
        let params = &job.manifest().receivers[to].params;
        let hit = params.iter().rfind(|param| param.offset <= at as u64).unwrap();
        let differ = pushed.compare(to, &covered).unwrap_err();
        let named: Vec<&String> = differ.iter().map(|param| &pushed.names[param]).collect();
        prop_assert_eq!(named, [&hit.name]);
        let reason = super::differ(7, &differ, &covered, &pushed.names);
        prop_assert!(reason.contains("version 7") && reason.contains(&hit.name), "{}", reason);
    }

    #[test]
    fn rows_that_changed_places_are_found(job in job(), pick in any::<prop::sample::Index>()) {
        let mut pushed = push(&job, 3);
        let inbound = pushed.parts.inbound();
        let alike = |a: &Inbound, b: &Inbound| (a.param, a.rows, a.row_bytes) == (b.param, b.rows, b.row_bytes);
        let pairs: Vec<(usize, Inbound, Inbound)> = inbound
            .iter()
            .enumerate()
            .flat_map(|(to, all)| all.windows(2).map(move |two| (to, two[0], two[1])))
            .filter(|(_, a, b)| alike(a, b))
            .collect();
        prop_assume!(!pairs.is_empty());
        let (to, a, b) = pairs[pick.index(pairs.len())];
        let before = pushed.arenas[to].clone();
        for row in 0..u64::from(a.rows) {
            let place = |it: Strided| (it.offset + row * it.stride) as usize;
            for byte in 0..a.row_bytes as usize {
                pushed.arenas[to].swap(place(a.destination) + byte, place(b.destination) + byte);
            }
        }
        let covered = covered(Verify::Full, PushId([3; 16]), &pushed.names);
        prop_assert_eq!(pushed.compare(to, &covered).is_ok(), pushed.arenas[to] == before);
    }
}

fn small() -> Job {
    let matrices = vec![
        Matrix { rows: 16, columns: 16, whole: true, dtype: 0 },
        Matrix { rows: 12, columns: 12, whole: false, dtype: 1 },
    ];
    Job { trainers: 2, receivers: 2, matrices, chunk_bytes: 64, gather_row_bytes_max: 0 }
}

#[test]
fn what_was_not_sent_or_not_read_is_not_verified() {
    let pushed = push(&small(), 4);
    let covered = covered(Verify::Full, PushId([3; 16]), &pushed.names);
    let (inbound, arena) = (&pushed.parts.inbound()[0], Exposed::Host(lease(&pushed.arenas[0]).expose()));
    let sent = pushed.sent(0, &covered);
    let one = ParamId(1);
    let mut fewer = sent.clone();
    fewer.remove(&one);
    assert_eq!(compare(inbound, &arena, &covered, &fewer, |_| true).unwrap_err(), [one].into());
    let unread =
        compare(inbound, &Exposed::Host(lease(&[0; 4]).expose()), &covered, &sent, |_| true).unwrap_err();
    assert_eq!(unread, covered);
    let left = Cell::new(3);
    let stopped = compare(inbound, &arena, &covered, &sent, |_| left.replace(left.get() - 1) > 0);
    assert!(stopped.is_err());
}

#[test]
fn a_list_that_is_not_what_arrives_is_refused() {
    let pushed = push(&small(), 5);
    let inbound = &pushed.parts.inbound()[0];
    let bytes = pushed.arenas[0].len() as u64;
    let incoming = |inbound: &[Inbound], sizes| {
        let (inbound, names) = (inbound.to_vec(), pushed.names.clone());
        let incoming = Incoming::new(Verify::Full, inbound, names, sizes, Arc::default());
        incoming.map(|incoming| incoming.is_some()).map_err(|error| error.to_string())
    };
    assert_eq!(incoming(inbound, (bytes, bytes)), Ok(true));
    assert!(incoming(&inbound[1..], (bytes, bytes)).unwrap_err().contains("says where"));
    assert!(incoming(inbound, (bytes, bytes - 1)).unwrap_err().contains("outside"));
    let mut elsewhere = inbound.clone();
    elsewhere[0].destination.region = RegionIndex(1);
    assert!(incoming(&elsewhere, (bytes, bytes)).unwrap_err().contains("outside"));
    elsewhere[0] =
        Inbound { destination: Strided { offset: u64::MAX, ..inbound[0].destination }, ..inbound[0] };
    assert!(incoming(&elsewhere, (bytes, bytes)).unwrap_err().contains("outside"));
}

#[test]
fn weights_are_free_once_hashing_was_given_up() {
    // One operation that takes a while to hash.
    let matrices = vec![Matrix { rows: 2048, columns: 2048, whole: true, dtype: 0 }];
    let job = Job { trainers: 1, receivers: 1, matrices, chunk_bytes: 8 << 20, gather_row_bytes_max: 0 };
    let pushed = push(&job, 6);
    let ops = &pushed.parts.trainers[0].ops;
    let outgoing = Outgoing::new(Verify::Full, ops, &pushed.names, Arc::default()).unwrap().unwrap();
    let mut weights = lease(&pushed.sources[0]);
    for _ in 0..10 {
        let frozen = weights.freeze();
        let summing =
            outgoing.start((PushId([3; 16]), &[]), Lent::Host(vec![frozen.clone()]), Arc::default());
        std::thread::sleep(Duration::from_micros(200));
        summing.end(false);
        weights = frozen.thaw().expect("the thread that hashes holds them");
    }
    // A rank that passes on gives up from elsewhere.
    let (regions, given_up) = (Lent::Host(vec![weights.freeze()]), Arc::new(AtomicBool::new(true)));
    assert!(outgoing.start((PushId([4; 16]), &[]), regions, given_up).end(true).is_none());
}
