//! Arrays whose elements say where they come from, and the plain operations that a loader needs.

use std::collections::BTreeMap;

use xfer_plan::{BlockQuant, ParamMap};

/// Never written.
pub(crate) const PAD: u64 = u64::MAX;
/// Set on elements that are quantised.
pub(crate) const QUANTISED: u64 = 1 << 62;
/// Set on the scale of a block; the rest names the block's first element.
pub(crate) const SCALE: u64 = 1 << 61;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Array {
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Vec<u64>,
}

impl Array {
    pub(crate) fn filled(shape: &[usize], value: u64) -> Array {
        Array { shape: shape.to_vec(), data: vec![value; shape.iter().product()] }
    }

    /// Elements from outside to inside: those before `dim`, along it, and after it.
    fn around(&self, dim: usize) -> (usize, usize, usize) {
        let (outer, inner) = (self.shape[..dim].iter().product(), self.shape[dim + 1..].iter().product());
        (outer, self.shape[dim], inner)
    }

    pub(crate) fn narrow(&self, dim: usize, start: usize, len: usize) -> Array {
        let (outer, along, inner) = self.around(dim);
        let mut data = Vec::new();
        for o in 0..outer {
            let row = o * along * inner;
            data.extend_from_slice(&self.data[row + start * inner..row + (start + len) * inner]);
        }
        let mut shape = self.shape.clone();
        shape[dim] = len;
        Array { shape, data }
    }

    pub(crate) fn concat(dim: usize, parts: &[Array]) -> Array {
        let mut shape = parts[0].shape.clone();
        shape[dim] = parts.iter().map(|part| part.shape[dim]).sum();
        let mut data = Vec::new();
        for o in 0..parts[0].around(dim).0 {
            for part in parts {
                let (_, along, inner) = part.around(dim);
                data.extend_from_slice(&part.data[o * along * inner..(o + 1) * along * inner]);
            }
        }
        Array { shape, data }
    }

    pub(crate) fn reshape(&self, shape: &[usize]) -> Array {
        assert_eq!(self.data.len(), shape.iter().product::<usize>());
        Array { shape: shape.to_vec(), data: self.data.clone() }
    }

    /// Rows and columns of the last two dimensions.
    pub(crate) fn matrix(&self) -> (usize, usize) {
        (self.shape[self.shape.len() - 2], self.shape[self.shape.len() - 1])
    }

    pub(crate) fn scales(&self, quant: BlockQuant) -> Array {
        let (rows, columns) = self.matrix();
        let [high, wide] = quant.block.map(|side| side as usize);
        let mut shape = self.shape.clone();
        let rank = shape.len();
        (shape[rank - 2], shape[rank - 1]) = (rows.div_ceil(high), columns.div_ceil(wide));
        let matrices = self.data.chunks(rows * columns);
        let data = matrices
            .flat_map(|matrix| {
                let rows = (0..rows).step_by(high);
                rows.flat_map(move |row| {
                    (0..columns).step_by(wide).map(move |column| SCALE | matrix[row * columns + column])
                })
            })
            .collect();
        Array { shape, data }
    }
}

/// What a map makes of these tensors.
pub(crate) fn evaluate(map: &ParamMap, tensors: &BTreeMap<String, Array>) -> Array {
    let all = |shape: &[u64]| shape.iter().map(|&len| len as usize).collect::<Vec<_>>();
    match map {
        ParamMap::Tensor(name) => tensors[name].clone(),
        ParamMap::Shaped { of, shape } => {
            let of = evaluate(of, tensors);
            assert_eq!(of.shape, all(shape));
            of
        }
        ParamMap::Slice { of, bounds } => {
            let mut of = evaluate(of, tensors);
            for dim in 0..bounds.rank() {
                let (start, len) = bounds.extent(dim).unwrap();
                of = of.narrow(dim, start as usize, len as usize);
            }
            of
        }
        ParamMap::Concat { dim, parts } => {
            let parts: Vec<Array> = parts.iter().map(|part| evaluate(part, tensors)).collect();
            Array::concat(*dim, &parts)
        }
        ParamMap::Pad { of, dim, len } => {
            let of = evaluate(of, tensors);
            let mut shape = of.shape.clone();
            shape[*dim] = *len as usize - shape[*dim];
            Array::concat(*dim, &[of, Array::filled(&shape, PAD)])
        }
        ParamMap::View { of, shape } => evaluate(of, tensors).reshape(&all(shape)),
        ParamMap::Cast { of, .. } => evaluate(of, tensors),
        ParamMap::Quantize { of, .. } => {
            let mut of = evaluate(of, tensors);
            of.data.iter_mut().for_each(|element| *element |= QUANTISED);
            of
        }
        ParamMap::Scales { of, quant } => evaluate(of, tensors).scales(*quant),
    }
}
