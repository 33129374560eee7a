//! Casts on a GPU against those of the CPU, bit by bit.

use std::ops::Range;

mod cuda;

use cuda::{Gpu, Random, adversarial, assert_same};
use weight_ops::cuda::Error;
use weight_ops::{Dtype, Error as ShapeError, cast_bytes};

const DTYPES: [Dtype; 4] = [Dtype::BF16, Dtype::F16, Dtype::F32, Dtype::F8E4M3];

/// Casts from and to addresses that are so many elements off.
fn check(gpu: &Gpu, from: Dtype, source: &[u8], to: Dtype, shifts: [usize; 2]) {
    let mut expected = vec![0; source.len() / from.bytes() * to.bytes()];
    cast_bytes(from, source, to, &mut expected).unwrap();
    let on_device = gpu.upload(source, shifts[0] * from.bytes());
    let destination = gpu.guarded(expected.len(), shifts[1] * to.bytes());
    gpu.run(gpu.kernels.cast(from, &on_device, to, &destination.range).unwrap());
    let what = format!("{from} to {to}, {} bytes, shifts {shifts:?}", source.len());
    assert_same(&gpu.read(&destination), &expected, &what);
}

#[test]
fn every_bit_pattern_and_every_tie() {
    let Some(gpu) = Gpu::open() else { return };
    for from in DTYPES {
        let source = adversarial(from);
        for to in DTYPES {
            check(&gpu, from, &source, to, [0, 0]);
            check(&gpu, from, &source, to, [1, 0]);
        }
    }
}

#[test]
fn any_length_at_any_element() {
    let Some(gpu) = Gpu::open() else { return };
    let mut random = Random(1);
    for from in DTYPES {
        for to in DTYPES {
            for case in 0..12 {
                // Few, a block of threads, several.
                let count = random.below([40, 300, 9000, 50_000][case % 4]);
                let source = random.elements(from, count);
                let shift = random.below(24);
                // Half of them reach a vector's start together.
                let shifts = if case < 6 { [shift, shift] } else { [shift, random.below(24)] };
                check(&gpu, from, &source, to, shifts);
            }
        }
    }
}

#[test]
fn an_operation_is_repeated_on_what_memory_holds_then() {
    let Some(gpu) = Gpu::open() else { return };
    let source = gpu.upload(&1.0_f32.to_ne_bytes().repeat(1000), 0);
    let destination = gpu.guarded(2000, 0);
    let cast = gpu.run(gpu.kernels.cast(Dtype::F32, &source, Dtype::BF16, &destination.range).unwrap());
    assert_eq!(gpu.read(&destination), 0x3f80_u16.to_ne_bytes().repeat(1000));
    gpu.stream.fill(source, 0).unwrap().wait().unwrap();
    gpu.run(cast);
    assert_eq!(gpu.read(&destination), vec![0; 2000]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(gpu) = Gpu::open() else { return };
    let memory = gpu.guarded(64, 0);
    let part = |start, end| memory.range.part(start..end).unwrap();
    let error =
        |from, source, to, destination| gpu.kernels.cast(from, &source, to, &destination).unwrap_err();
    assert_eq!(
        error(Dtype::BF16, part(0, 4), Dtype::F32, part(32, 36)),
        Error::Shape(ShapeError::LengthMismatch { source_elements: 2, destination_elements: 1 })
    );
    assert_eq!(
        error(Dtype::BF16, part(0, 3), Dtype::F32, part(32, 36)),
        Error::Shape(ShapeError::PartialElement { dtype: Dtype::BF16, bytes: 3 })
    );
    let odd = error(Dtype::BF16, part(1, 5), Dtype::F32, part(32, 40));
    assert!(matches!(odd, Error::Misaligned { element_bytes: 2, .. }), "{odd}");
    assert!(memory.range.part(60..65).is_err() && memory.range.part(Range { start: 5, end: 4 }).is_err());
    gpu.run(gpu.kernels.cast(Dtype::BF16, &part(8, 8), Dtype::F32, &part(32, 32)).unwrap());
    assert_eq!(gpu.read(&memory), vec![cuda::POISON; 64]);
}
