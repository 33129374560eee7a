//! Copies of spans and boxes on a GPU, and between two, against copies on the CPU.

mod cuda;

use std::sync::Arc;

use cuda::{Gpu, POISON, Random, assert_same, devices};
use gpu_mem::DeviceMemory;
use weight_ops::cuda::{BoxCopy, CopyBatch, DeviceRange, Error, Place, Span, TensorBox};

const SOURCE: usize = 0;
const DESTINATION: usize = 1;

fn span(source: usize, destination: usize, bytes: usize) -> Span {
    let place = |region, offset| Place { region, offset: offset as u64 };
    Span { source: place(SOURCE, source), destination: place(DESTINATION, destination), bytes: bytes as u64 }
}

/// Copies spans of random bytes, from memory that ends with the last of them, with each of these numbers of multiprocessors.
fn check_spans(gpu: &Gpu, spans: &[Span], multiprocessors: &[u32]) {
    let end = |place: fn(&Span) -> u64| spans.iter().map(|span| place(span) + span.bytes).max().unwrap_or(0);
    let source = Random(3).bytes(end(|span| span.source.offset) as usize);
    let mut expected = vec![POISON; end(|span| span.destination.offset) as usize];
    for span in spans {
        let (from, to, len) = (span.source.offset, span.destination.offset, span.bytes as usize);
        expected[to as usize..][..len].copy_from_slice(&source[from as usize..][..len]);
    }
    let on_device = gpu.upload(&source, 0);
    let mut batch = gpu.kernels.batch().with_room(5000).unwrap();
    for &multiprocessors in multiprocessors {
        let destination = gpu.guarded(expected.len(), 0);
        let regions = [on_device.clone(), destination.range.clone()];
        gpu.run(gpu.kernels.copy_spans(&gpu.stream, &regions, spans, multiprocessors).unwrap());
        assert_same(&gpu.read(&destination), &expected, &format!("{} spans", spans.len()));

        let destination = gpu.guarded(expected.len(), 0);
        let regions = [on_device.clone(), destination.range.clone()];
        spans.iter().for_each(|span| batch.span(&regions, span).unwrap());
        batch = run_batch(gpu, batch, multiprocessors);
        assert_same(&gpu.read(&destination), &expected, &format!("a batch of {} spans", spans.len()));
    }
}

/// Runs a batch, which comes back empty to be used again. Its lists take a stream of their own.
fn run_batch(gpu: &Gpu, batch: CopyBatch, multiprocessors: u32) -> CopyBatch {
    let uploads = gpu.device.stream().unwrap();
    batch.enqueue(&uploads, &gpu.stream, multiprocessors).unwrap().wait().unwrap()
}

#[test]
fn every_alignment_and_short_length() {
    let Some(gpu) = Gpu::open() else { return };
    for length in (0..=100).chain([127, 128, 129, 255, 256, 257, 511, 512, 513, 4095, 4096, 4097]) {
        let mut spans = Vec::new();
        let slot = (length + 64_usize).next_multiple_of(16);
        for source in 0..16 {
            for destination in 0..16 {
                let at = spans.len() * slot;
                spans.push(span(at + source, at + destination, length));
            }
        }
        check_spans(&gpu, &spans, &[gpu.kernels.multiprocessors()]);
    }
}

#[test]
fn shuffled_spans_of_any_length() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random(4);
    for case in 0..8 {
        let mut lengths: Vec<usize> =
            (0..200).map(|_| random.below([30, 3000, 40_000, 9000][case % 4])).collect();
        lengths.push([0, 3 << 20, 1, 100_001][case % 4]);
        // Each at its place in the destination, in any order in the source.
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        for index in (1..order.len()).rev() {
            order.swap(index, random.below(index + 1));
        }
        let mut from = vec![0; lengths.len()];
        let mut at = random.below(16);
        for &index in &order {
            from[index] = at;
            at += lengths[index] + if case < 4 { 0 } else { random.below(17) };
        }
        let mut to = random.below(16);
        let mut spans = Vec::new();
        for (&from, &len) in from.iter().zip(&lengths) {
            spans.push(span(from, to, len));
            to += len + if case < 4 { 0 } else { random.below(17) };
        }
        check_spans(&gpu, &spans, &[1, 7, gpu.kernels.multiprocessors(), 1000]);
    }
}

#[test]
fn from_each_of_two_gpus_to_the_other() {
    let Some(devices) = devices(2) else { return };
    let (here, there) = (Gpu::on(&devices[0]), Gpu::on(&devices[1]));
    let mut random = Random(5);
    let lengths: Vec<usize> = (0..300).map(|_| random.below(50_000)).collect();
    let total: usize = lengths.iter().sum();
    let bytes = random.bytes(total);
    for shift in [0, 5] {
        let mut at = 0;
        let mut spans = Vec::new();
        for &len in &lengths {
            spans.push(span(at, at, len));
            at += len;
        }
        for (writer, other) in [(&here, &there), (&there, &here)] {
            // Pushed, then pulled.
            let source = writer.upload(&bytes, shift);
            let destination = other.guarded(total, 0);
            let regions = [source, destination.range.clone()];
            writer.run(writer.kernels.copy_spans(&writer.stream, &regions, &spans, 16).unwrap());
            assert_same(&other.read(&destination), &bytes, "pushed");
            let destination = other.guarded(total, 0);
            let regions = [regions[0].clone(), destination.range.clone()];
            other.run(other.kernels.copy_spans(&other.stream, &regions, &spans, 132).unwrap());
            assert_same(&other.read(&destination), &bytes, "pulled");
        }
    }
}

#[test]
fn a_batch_holds_all_that_it_copies() {
    let Some(gpu) = Gpu::open() else { return };
    let destination = gpu.guarded(64 * 100, 0);
    let (mut batch, mut random) = (gpu.kernels.batch(), Random(8));
    let mut expected = Vec::new();
    let mut sources: Vec<(Vec<u8>, DeviceRange)> = Vec::new();
    for index in 0..64 {
        // Most are copied from more than once, some long after others.
        if sources.len() < 5 || random.below(3) == 0 {
            let bytes = random.bytes(100);
            sources.push((bytes.clone(), gpu.upload(&bytes, 0)));
        }
        let (bytes, source) = &sources[random.below(sources.len())];
        expected.extend_from_slice(bytes);
        let regions = [source.clone(), destination.range.part(index * 100..(index + 1) * 100).unwrap()];
        batch.span(&regions, &span(0, 0, 100)).unwrap();
    }
    drop(sources);
    run_batch(&gpu, batch, 3);
    assert_same(&gpu.read(&destination), &expected, "from memory that the batch alone holds");
}

#[test]
fn memory_mapped_on_another_gpu_is_refused() {
    let Some(devices) = devices(2) else { return };
    let (here, there) = (Gpu::on(&devices[0]), &devices[1]);
    let Ok(mapped) = there.alloc_vmm(4096, 4096) else {
        println!("skipped: the GPU maps no memory");
        return;
    };
    let chunks = mapped.export().unwrap();
    let shared = DeviceRange::whole(&Arc::new(mapped));
    let regions = [here.upload(&[7; 4096], 0), shared.part(0..4096).unwrap()];
    let spans = [span(0, 0, 4096)];
    let copy = |regions: &[DeviceRange]| here.kernels.copy_spans(&here.stream, regions, &spans, 1);
    assert!(matches!(copy(&regions), Err(Error::MappedElsewhere { .. })));
    let mut batch = here.kernels.batch();
    batch.span(&regions, &spans[0]).unwrap();
    let refused = batch.enqueue(&here.device.stream().unwrap(), &here.stream, 1);
    assert!(matches!(refused, Err(Error::MappedElsewhere { .. })));

    // As the error says: with a mapping of its own a GPU may.
    let Ok(imported) = here.device.import_vmm(chunks) else {
        println!("skipped: the GPUs do not reach each other");
        return;
    };
    let imported = DeviceRange::whole(&Arc::new(imported)).part(0..4096).unwrap();
    here.run(copy(&[regions[0].clone(), imported.clone()]).unwrap());
    assert_same(&here.download(&imported), &[7; 4096], "the mapping");
}

/// Copies boxes on the CPU, byte by byte.
fn copy_on_cpu(source: &[u8], destination: &mut [u8], copy: &BoxCopy) {
    for outer in 0..u64::from(copy.counts[0]) {
        for middle in 0..u64::from(copy.counts[1]) {
            for inner in 0..u64::from(copy.counts[2]) {
                let at = |place: Place, strides: [u64; 3]| {
                    (place.offset + outer * strides[0] + middle * strides[1] + inner * strides[2]) as usize
                };
                let (from, to) =
                    (at(copy.source, copy.source_strides), at(copy.destination, copy.destination_strides));
                let len = copy.row_bytes as usize;
                destination[to..to + len].copy_from_slice(&source[from..from + len]);
            }
        }
    }
}

fn check_boxes(gpu: &Gpu, source: &[u8], destination_bytes: usize, boxes: &[BoxCopy]) {
    let mut expected = vec![POISON; destination_bytes];
    for copy in boxes {
        copy_on_cpu(source, &mut expected, copy);
    }
    let on_device = gpu.upload(source, 0);
    let mut batch = gpu.kernels.batch();
    for multiprocessors in [1, gpu.kernels.multiprocessors()] {
        let destination = gpu.guarded(destination_bytes, 0);
        let regions = [on_device.clone(), destination.range.clone()];
        gpu.run(gpu.kernels.copy_boxes(&gpu.stream, &regions, boxes, multiprocessors).unwrap());
        assert_same(&gpu.read(&destination), &expected, &format!("{boxes:?}"));

        // Every second box with row after row as a span, in one batch.
        let destination = gpu.guarded(destination_bytes, 0);
        let regions = [on_device.clone(), destination.range.clone()];
        for (index, copy) in boxes.iter().enumerate() {
            match index % 2 {
                0 => batch.rows(&regions, copy).unwrap(),
                _ => spans_of(copy).iter().for_each(|span| batch.span(&regions, span).unwrap()),
            }
        }
        batch = run_batch(gpu, batch, multiprocessors);
        assert_same(&gpu.read(&destination), &expected, &format!("a batch of {boxes:?}"));
    }
}

/// Each row of a box.
fn spans_of(copy: &BoxCopy) -> Vec<Span> {
    let rows = copy.counts.map(u64::from);
    let row = |index: u64| {
        let place = |place: Place, strides: [u64; 3]| {
            let steps = [index / rows[2] / rows[1], index / rows[2] % rows[1], index % rows[2]];
            let skipped: u64 = steps.iter().zip(strides).map(|(step, stride)| step * stride).sum();
            Place { region: place.region, offset: place.offset + skipped }
        };
        Span {
            source: place(copy.source, copy.source_strides),
            destination: place(copy.destination, copy.destination_strides),
            bytes: copy.row_bytes,
        }
    };
    (0..rows.iter().product()).map(row).collect()
}

fn tensor<'a>(region: usize, offset: u64, shape: &'a [u64], origin: &'a [u64]) -> TensorBox<'a> {
    TensorBox { tensor: Place { region, offset }, shape, origin }
}

#[test]
fn boxes_of_tensors_of_any_shape() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random(6);
    for case in 0..120 {
        let element_bytes = [1, 2, 4, 8][random.below(4)];
        let dims = 1 + random.below(4);
        // The last dimension makes rows: some shorter than what a warp takes at once, some longer.
        let mut extent: Vec<u64> = (0..dims).map(|_| 1 + random.below(6) as u64).collect();
        extent[dims - 1] = 1 + random.below([20, 300, 9000][case % 3]) as u64;
        let mut around = |even: bool| -> (Vec<u64>, Vec<u64>) {
            let step = if even { 16 } else { 1 };
            let origin: Vec<u64> = extent.iter().map(|_| random.below(3) as u64 * step).collect();
            let shape = extent
                .iter()
                .zip(&origin)
                .map(|(len, first)| (len + first + random.below(3) as u64).next_multiple_of(step));
            (shape.collect(), origin)
        };
        let even = case % 2 == 0;
        let ((from_shape, from), (to_shape, to)) = (around(even), around(even));
        let bytes = |shape: &[u64]| shape.iter().product::<u64>() * element_bytes;
        let offset = if even { 0 } else { random.below(8) as u64 };
        let source = random.bytes((bytes(&from_shape) + offset) as usize);
        let copy = BoxCopy::new(
            element_bytes,
            &extent,
            tensor(SOURCE, offset, &from_shape, &from),
            tensor(DESTINATION, offset, &to_shape, &to),
        )
        .unwrap();
        check_boxes(&gpu, &source, (bytes(&to_shape) + offset) as usize, &[copy]);
    }
}

#[test]
fn fused_scattered_and_gathered_again() {
    let Some(gpu) = Gpu::open() else { return };
    // q, k and v of one rank of two, each a shard by columns of another tensor, become one by rows.
    let (hidden, rows) = (512_u64, [256_u64, 64, 64]);
    let source = Random(7).bytes((rows.iter().sum::<u64>() * hidden * 2) as usize);
    let fused_shape = [rows.iter().sum::<u64>() / 2, hidden];
    let (mut boxes, mut at, mut first_row) = (Vec::new(), 0, 0);
    for rows in rows {
        let extent = [rows / 2, hidden];
        let from = tensor(SOURCE, at, &[0, 0], &[0, 0]);
        let (shape, origin) = ([rows, hidden], [rows / 2, 0]);
        let from = TensorBox { shape: &shape, origin: &origin, ..from };
        boxes.push(
            BoxCopy::new(2, &extent, from, tensor(DESTINATION, 0, &fused_shape, &[first_row, 0])).unwrap(),
        );
        at += rows * hidden * 2;
        first_row += rows / 2;
    }
    check_boxes(&gpu, &source, (fused_shape[0] * hidden * 2) as usize, &boxes);

    // Columns that interleave: strides in both, and a transposition, in which rows are single elements.
    let place = |region, offset| Place { region, offset };
    let columns: Vec<BoxCopy> = (0..4)
        .map(|column| BoxCopy {
            source: place(SOURCE, column * 4096),
            destination: place(DESTINATION, column * 8),
            row_bytes: 8,
            counts: [1, 1, 512],
            source_strides: [0, 0, 8],
            destination_strides: [0, 0, 32],
        })
        .collect();
    check_boxes(&gpu, &source, 512 * 32, &columns);
    let transposed = BoxCopy {
        source: place(SOURCE, 2),
        destination: place(DESTINATION, 0),
        row_bytes: 2,
        counts: [1, 70, 90],
        source_strides: [0, 2, 140],
        destination_strides: [0, 180, 2],
    };
    check_boxes(&gpu, &source, 70 * 180, &[transposed]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(gpu) = Gpu::open() else { return };
    let memory = gpu.guarded(100, 0);
    let regions: [DeviceRange; 2] = [memory.range.part(0..50).unwrap(), memory.range.part(50..100).unwrap()];
    let copy = |spans: &[Span], blocks| gpu.kernels.copy_spans(&gpu.stream, &regions, spans, blocks);
    let error = copy(&[span(0, 0, 50), span(1, 0, 50)], 1).unwrap_err();
    assert_eq!(error, Error::OutsideRegion { what: "span", index: 1, region_bytes: 50 });
    assert!(copy(&[span(0, usize::MAX, 2)], 1).is_err());
    let nowhere = Span { destination: Place { region: 2, offset: 0 }, ..span(0, 0, 1) };
    assert_eq!(copy(&[nowhere], 1).unwrap_err(), Error::NoSuchRegion { region: 2, regions: 2 });
    assert_eq!(copy(&[span(0, 0, 1)], 0).unwrap_err(), Error::NoMultiprocessor);
    let place = |region| Place { region, offset: 0 };
    let one = BoxCopy {
        source: place(0),
        destination: place(1),
        row_bytes: 10,
        counts: [1, 2, 2],
        source_strides: [0, 20, 10],
        destination_strides: [0, 30, 11],
    };
    let copy = |copy: BoxCopy| gpu.kernels.copy_boxes(&gpu.stream, &regions, &[copy], 1);
    let error = copy(one).unwrap_err();
    assert_eq!(error, Error::OutsideRegion { what: "box", index: 0, region_bytes: 50 });
    assert!(copy(BoxCopy { source_strides: [0, u64::MAX, 1], ..one }).is_err());
    assert!(matches!(copy(BoxCopy { counts: [u32::MAX, 2, 1], ..one }), Err(Error::TooMany { .. })));
    // Without strides any number of rows lies in its region.
    let endless =
        BoxCopy { counts: [1, 1, u32::MAX], source_strides: [0; 3], destination_strides: [0; 3], ..one };
    assert_eq!(copy(endless).unwrap_err(), Error::Overlap { index: 0 });
    let mut batch = gpu.kernels.batch();
    assert_eq!(batch.rows(&regions, &endless), Err(Error::Overlap { index: 0 }));

    // Nothing, in three ways, writes nothing.
    gpu.run(gpu.kernels.copy_spans(&gpu.stream, &regions, &[], 1).unwrap());
    gpu.run(gpu.kernels.copy_spans(&gpu.stream, &regions, &[span(50, 50, 0)], 1).unwrap());
    gpu.run(copy(BoxCopy { counts: [0, 9, 9], ..one }).unwrap());
    assert_eq!(gpu.read(&memory), vec![POISON; 100]);
    assert_eq!(regions[0].len(), 50);
}
