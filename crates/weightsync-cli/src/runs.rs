//! The contiguous runs of a box of a row-major tensor.
//!
//! Files and memory are read and stepped run by run, so that nothing outside the box is touched. This is about elements
//! only: it must never know of bytes, files or dtypes.

use xfer_plan::TensorBox;

/// The first element of every contiguous run of a box, in increasing order. All runs have the same length.
#[derive(Debug, Clone)]
pub struct Runs {
    run_elements: u64,
    /// Dimensions that the runs step through, outermost first: (how many, stride in elements).
    outer: Vec<(u64, u64)>,
    /// Position in `outer`; `None` when all runs have been given.
    position: Option<Vec<u64>>,
    first_element: u64,
}

impl Runs {
    /// The runs of `bounds` in a row-major tensor of this `shape`. `None` where the box leaves the tensor, its number of
    /// dimensions differs, or the tensor has more elements than fit in 64 bits.
    #[must_use]
    pub fn new(shape: &[u64], bounds: &TensorBox) -> Option<Runs> {
        if !bounds.fits(shape) {
            return None;
        }
        let mut dims = Vec::with_capacity(shape.len());
        let mut stride = 1u64;
        for ((&size, start), len) in shape.iter().zip(bounds.start()).zip(bounds.len()).rev() {
            dims.push((size, start, len, stride));
            stride = stride.checked_mul(size)?;
        }

        let empty = bounds.is_empty();
        let mut run_elements = 1;
        let mut first_element = 0u64;
        let mut outer = Vec::new();
        let mut inside_run = true;
        for (size, start, len, stride) in dims {
            if !empty {
                first_element = first_element.checked_add(start.checked_mul(stride)?)?;
            }
            if inside_run {
                run_elements = len.checked_mul(stride)?;
                inside_run = len == size;
            } else {
                outer.push((len, stride));
            }
        }
        outer.reverse();
        let position = (!empty).then(|| vec![0; outer.len()]);
        Some(Runs { run_elements: if empty { 0 } else { run_elements }, outer, position, first_element })
    }

    /// Elements of one run.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.run_elements
    }

    /// Elements from the start of the first run to the end of the last one.
    #[must_use]
    pub fn span_elements(&self) -> u64 {
        if self.run_elements == 0 {
            return 0;
        }
        self.outer.iter().map(|&(count, stride)| (count - 1) * stride).sum::<u64>() + self.run_elements
    }
}

impl Iterator for Runs {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let position = self.position.as_mut()?;
        let at = position.iter().zip(&self.outer).map(|(&index, &(_, stride))| index * stride).sum::<u64>();
        let mut carried = true;
        for (index, &(count, _)) in position.iter_mut().zip(&self.outer).rev() {
            *index += 1;
            if *index < count {
                carried = false;
                break;
            }
            *index = 0;
        }
        if carried {
            self.position = None;
        }
        Some(self.first_element + at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every element of the box by plain counting through the whole tensor.
    fn by_counting(shape: &[u64], start: &[u64], len: &[u64]) -> Vec<u64> {
        let volume: u64 = shape.iter().product();
        (0..volume)
            .filter(|&element| {
                let mut rest = element;
                let mut inside = true;
                for dim in (0..shape.len()).rev() {
                    let index = rest % shape[dim];
                    rest /= shape[dim];
                    inside &= index >= start[dim] && index < start[dim] + len[dim];
                }
                inside
            })
            .collect()
    }

    #[test]
    fn runs_cover_exactly_the_box() {
        type Case = (&'static [u64], &'static [u64], &'static [u64], u64);
        let cases: &[Case] = &[
            (&[], &[], &[], 1),
            (&[7], &[2], &[3], 3),
            (&[4, 6], &[1, 0], &[2, 6], 12),
            (&[4, 6], &[0, 2], &[4, 3], 3),
            (&[4, 6], &[3, 5], &[1, 1], 1),
            (&[2, 3, 4], &[0, 1, 0], &[2, 2, 4], 8),
            (&[2, 3, 4], &[1, 0, 1], &[1, 3, 2], 2),
            (&[2, 1, 4], &[0, 0, 0], &[2, 1, 4], 8),
            (&[4, 6], &[4, 0], &[0, 6], 0),
            (&[4, 6], &[0, 6], &[4, 0], 0),
            (&[0, 6], &[0, 0], &[0, 6], 0),
        ];
        for &(shape, start, len, run) in cases {
            let runs = Runs::new(shape, &TensorBox::new(start, len).unwrap()).unwrap();
            assert_eq!(runs.elements(), run, "{shape:?} {start:?} {len:?}");
            let span = runs.span_elements();
            let elements: Vec<u64> = runs.flat_map(|first| first..first + run).collect();
            assert_eq!(elements, by_counting(shape, start, len), "{shape:?} {start:?} {len:?}");
            let expected_span = elements.last().map_or(0, |last| last + 1 - elements[0]);
            assert_eq!(span, expected_span, "{shape:?} {start:?} {len:?}");
        }
    }

    #[test]
    fn a_box_outside_the_tensor_has_no_runs() {
        for (shape, start, len) in [
            (vec![4u64], vec![2u64], vec![3u64]),
            (vec![4], vec![5], vec![0]),
            (vec![4, 4], vec![0], vec![4]),
            (vec![u64::MAX, 2], vec![0, 0], vec![1, 1]),
            (vec![4], vec![u64::MAX], vec![1]),
        ] {
            if let Ok(bounds) = TensorBox::new(&start, &len) {
                assert!(Runs::new(&shape, &bounds).is_none(), "{shape:?} {start:?} {len:?}");
            }
        }
    }
}
