//! Weights to work on, and whether what came out of it is right.

use std::sync::Arc;

use anyhow::bail;
use gpu_mem::PinnedBuffer;
use rayon::prelude::*;
use weight_ops::Dtype;
use weight_ops::cuda::{DeviceRange, Place, Span};

use crate::gpu::Gpu;

/// What one task makes or compares.
const PART_BYTES: usize = 1 << 20;

/// The same bytes on the host and on a GPU.
pub(crate) struct Source {
    pub(crate) dtype: Dtype,
    pub(crate) host: Arc<PinnedBuffer>,
    pub(crate) device: DeviceRange,
}

/// The weights that kernels read, equally many bytes of each type.
pub(crate) struct Weights {
    pub(crate) halves: Source,
    pub(crate) singles: Source,
}

impl Weights {
    pub(crate) fn new(gpu: &Gpu, bytes: u64) -> anyhow::Result<Self> {
        Ok(Self {
            halves: Source::new(gpu, Dtype::BF16, bytes)?,
            singles: Source::new(gpu, Dtype::F32, bytes)?,
        })
    }
}

impl Source {
    pub(crate) fn new(gpu: &Gpu, dtype: Dtype, bytes: u64) -> anyhow::Result<Self> {
        let mut host = gpu.device.pinned(usize::try_from(bytes)?)?;
        fill(dtype, host.bytes_mut())?;
        let host = Arc::new(host);
        let device = gpu.upload(&host)?;
        Ok(Self { dtype, host, device })
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.device.len_bytes()
    }
}

/// So that callers need not name the trait that `len` is of.
pub(crate) trait LenBytes {
    fn len_bytes(&self) -> u64;
}

impl LenBytes for DeviceRange {
    fn len_bytes(&self) -> u64 {
        gpu_mem::DeviceMemory::len(self)
    }
}

/// Weights that nowhere repeat, so that what was taken from the wrong place shows.
fn fill(dtype: Dtype, bytes: &mut [u8]) -> Result<(), weight_ops::Error> {
    bytes.par_chunks_mut(PART_BYTES).enumerate().try_for_each(|(part, bytes)| {
        let first = part * PART_BYTES / dtype.bytes();
        let count = bytes.len() / dtype.bytes();
        let singles: Vec<u8> = (first..first + count).flat_map(|index| weight(index).to_ne_bytes()).collect();
        weight_ops::cast_bytes(Dtype::F32, &singles, dtype, bytes)
    })
}

/// At most 0.1 in magnitude, as weights are.
fn weight(index: usize) -> f32 {
    mixed(index as u64) as i64 as f32 / i64::MAX as f32 * 0.1
}

/// Number `index` of the sequence of Sebastiano Vigna's SplitMix64.
fn mixed(index: u64) -> u64 {
    let state = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let state = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ state >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ state >> 31
}

/// Spans that fill a region of so many bytes, in its order, and where in the source each comes from: from everywhere, once.
pub(crate) struct Shuffled {
    span_bytes: u64,
    from: Vec<u64>,
}

impl Shuffled {
    pub(crate) fn new(bytes: u64, span_bytes: u64, seed: u64) -> Self {
        let mut from: Vec<u64> = (0..bytes / span_bytes).map(|index| index * span_bytes).collect();
        for index in (1..from.len()).rev() {
            let other = mixed((seed << 40) + index as u64) % (index as u64 + 1);
            from.swap(index, other as usize);
        }
        Self { span_bytes, from }
    }

    /// From region 0 to region 1.
    pub(crate) fn spans(&self) -> Vec<Span> {
        let place = |region, offset| Place { region, offset };
        (0_u64..)
            .zip(&self.from)
            .map(|(index, &from)| Span {
                source: place(0, from),
                destination: place(1, index * self.span_bytes),
                bytes: self.span_bytes,
            })
            .collect()
    }

    /// What the destination must hold then.
    pub(crate) fn expected(&self, source: &[u8]) -> Vec<u8> {
        let span_bytes = self.span_bytes as usize;
        let mut expected = vec![0; self.from.len() * span_bytes];
        expected.par_chunks_mut(span_bytes).zip(&self.from).for_each(|(to, &from)| {
            to.copy_from_slice(&source[from as usize..from as usize + span_bytes]);
        });
        expected
    }
}

/// Fails with the first byte that is not as expected.
pub(crate) fn same(found: &[u8], expected: &[u8]) -> anyhow::Result<()> {
    if found.len() != expected.len() {
        bail!("{} bytes instead of {}", found.len(), expected.len());
    }
    let parts = found.par_chunks(PART_BYTES).zip(expected.par_chunks(PART_BYTES)).enumerate();
    let different = parts.find_map_first(|(part, (found, expected))| {
        let mut pairs = found.iter().zip(expected);
        let at = if found == expected { None } else { pairs.position(|(found, expected)| found != expected) };
        at.map(|at| (part * PART_BYTES + at, found[at], expected[at]))
    });
    match different {
        Some((at, found, expected)) => {
            bail!("byte {at} is {found:#04x} instead of {expected:#04x}: the result is wrong")
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn shuffled_spans_fill_the_destination_and_take_each_byte_once(spans in 1..40_u64, span_bytes in 1..50_u64, seed in 0..9_u64) {
            let source: Vec<u8> = (0..spans * span_bytes).map(|index| mixed(index) as u8).collect();
            let shuffled = Shuffled::new(spans * span_bytes, span_bytes, seed);
            let mut naive = vec![None; source.len()];
            let mut taken = vec![0; source.len()];
            for Span { source: from, destination: to, bytes } in shuffled.spans() {
                prop_assert_eq!((from.region, to.region), (0, 1));
                for byte in 0..bytes {
                    prop_assert_eq!(naive[(to.offset + byte) as usize].replace(source[(from.offset + byte) as usize]), None);
                    taken[(from.offset + byte) as usize] += 1;
                }
            }
            prop_assert!(taken.iter().all(|&times| times == 1));
            prop_assert_eq!(naive.into_iter().collect::<Option<Vec<u8>>>(), Some(shuffled.expected(&source)));
        }

        #[test]
        fn a_single_wrong_byte_is_found(len in 1..3 * PART_BYTES, at: usize, bit in 0..8_u32) {
            let expected: Vec<u8> = (0..len as u64).map(|index| index as u8).collect();
            let mut found = expected.clone();
            prop_assert!(same(&found, &expected).is_ok());
            found[at % len] ^= 1 << bit;
            let told = same(&found, &expected).unwrap_err().to_string();
            prop_assert!(told.starts_with(&format!("byte {} is", at % len)), "{}", told);
            prop_assert!(same(&found[1..], &expected).is_err());
        }
    }

    #[test]
    fn weights_do_not_depend_on_how_they_are_made_and_do_not_repeat() {
        let mut bytes = vec![0; PART_BYTES + 4096];
        fill(Dtype::F32, &mut bytes).unwrap();
        let numbers: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect();
        for (index, &number) in numbers.iter().enumerate() {
            assert_eq!(number, weight(index));
            assert!(number.abs() <= 0.1);
        }
        assert_ne!(bytes[..4096], bytes[PART_BYTES..]);
    }
}
