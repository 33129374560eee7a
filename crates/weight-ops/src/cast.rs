//! Conversion of elements from one type to another, one to one.
//!
//! All goes through f32: every type widens to it exactly, so there is one rounding at most.

use std::marker::PhantomData;

use half::{bf16, f16};

use crate::dtype::Dtype;
use crate::element::{Element, F8E4M3};
use crate::error::Error;
use crate::isa::{Isa, Kernel};
use crate::matrix::{elements_of, elements_of_mut};
use crate::parallel::{PORTION_ELEMENTS, for_each};

/// Converts each element of `source` as [`Element`] says. Between equal types it copies.
///
/// ```
/// use half::{bf16, f16};
/// let mut halves = [f16::ZERO; 2];
/// weight_ops::cast(&[bf16::from_f32(1.5), bf16::MAX], &mut halves)?;
/// assert_eq!(halves, [f16::from_f32(1.5), f16::INFINITY]);
/// # Ok::<(), weight_ops::Error>(())
/// ```
///
/// # Errors
/// When the lengths differ.
pub fn cast<S: Element, D: Element>(source: &[S], destination: &mut [D]) -> Result<(), Error> {
    convert::<S, D>(
        Isa::best(),
        bytemuck::must_cast_slice(source),
        bytemuck::must_cast_slice_mut(destination),
    )
}

/// As [`cast`], for bytes: in the machine's order, at any address.
///
/// ```
/// use weight_ops::{Dtype, cast_bytes};
/// let mut single = [0; 4];
/// cast_bytes(Dtype::BF16, &0x3fc0_u16.to_ne_bytes(), Dtype::F32, &mut single)?;
/// assert_eq!(f32::from_ne_bytes(single), 1.5);
/// # Ok::<(), weight_ops::Error>(())
/// ```
///
/// # Errors
/// When bytes are no whole number of elements, or the numbers of elements differ.
pub fn cast_bytes(from: Dtype, source: &[u8], to: Dtype, destination: &mut [u8]) -> Result<(), Error> {
    cast_bytes_on(Isa::best(), from, source, to, destination)
}

pub(crate) fn cast_bytes_on(
    isa: Isa,
    from: Dtype,
    source: &[u8],
    to: Dtype,
    destination: &mut [u8],
) -> Result<(), Error> {
    match from {
        Dtype::BF16 => cast_bytes_from::<bf16>(isa, source, to, destination),
        Dtype::F16 => cast_bytes_from::<f16>(isa, source, to, destination),
        Dtype::F32 => cast_bytes_from::<f32>(isa, source, to, destination),
        Dtype::F8E4M3 => cast_bytes_from::<F8E4M3>(isa, source, to, destination),
    }
}

fn cast_bytes_from<S: Element>(
    isa: Isa,
    source: &[u8],
    to: Dtype,
    destination: &mut [u8],
) -> Result<(), Error> {
    let source = elements_of::<S>(source)?;
    match to {
        Dtype::BF16 => convert::<S, bf16>(isa, source, elements_of_mut::<bf16>(destination)?),
        Dtype::F16 => convert::<S, f16>(isa, source, elements_of_mut::<f16>(destination)?),
        Dtype::F32 => convert::<S, f32>(isa, source, elements_of_mut::<f32>(destination)?),
        Dtype::F8E4M3 => convert::<S, F8E4M3>(isa, source, elements_of_mut::<F8E4M3>(destination)?),
    }
}

fn convert<S: Element, D: Element>(
    isa: Isa,
    source: &[S::Bytes],
    destination: &mut [D::Bytes],
) -> Result<(), Error> {
    if source.len() != destination.len() {
        return Err(Error::LengthMismatch {
            source_elements: source.len(),
            destination_elements: destination.len(),
        });
    }
    let portions = destination.chunks_mut(PORTION_ELEMENTS).zip(source.chunks(PORTION_ELEMENTS)).collect();
    for_each(portions, source.len(), |(destination, source): (&mut [D::Bytes], &[S::Bytes])| {
        if S::DTYPE == D::DTYPE {
            // Through f32 a NaN would not come back as it was.
            bytemuck::cast_slice_mut(destination).copy_from_slice(bytemuck::cast_slice::<_, u8>(source));
        } else {
            isa.run(Convert::<S, D> { source, destination, types: PhantomData });
        }
    });
    Ok(())
}

/// Converts elements of two equally long slices.
struct Convert<'a, S: Element, D: Element> {
    source: &'a [S::Bytes],
    destination: &'a mut [D::Bytes],
    types: PhantomData<(S, D)>,
}

impl<S: Element, D: Element> Kernel for Convert<'_, S, D> {
    #[inline(always)]
    fn run(self) {
        for (destination, &source) in self.destination.iter_mut().zip(self.source) {
            *destination = D::encode(S::decode(source));
        }
    }
}
