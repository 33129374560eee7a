//! The kernel format of vLLM: how the parameters of one rank are made of a checkpoint's tensors.
//!
//! It is the format that vLLM's layers allocate and its kernels read, before any conversion that a kernel library makes
//! of it afterwards. What vLLM refuses is refused here too, by name: a rank that holds other rows than its kernels
//! expect answers nonsense and no error.

use std::sync::Arc;

use super::architecture::{Cut, DOWN_STACKED, ExpertModule, GATE_UP_STACKED, Param, Part};
use super::error::ModelError;
use super::spec::{Depth, ExpertForm};
use crate::dtype::DType;
use crate::error::{LayoutError, shorten};
use crate::param_map::ParamMap;
use crate::quantized::{Stack, TensorPart};
use crate::tensor_box::TensorBox;
use crate::transform::BlockQuant;

/// vLLM's `DEFAULT_VOCAB_PADDING_SIZE`: the vocabulary grows to a multiple of it, and is then divided among tensor-
/// parallel ranks. The padding is at the end of the whole, so only the last ranks have any.
const VOCABULARY_PADDING: u64 = 64;

/// A parameter before it is decided what becomes of its elements.
struct Assembly {
    name: String,
    depth: Depth,
    dtype: DType,
    linear: bool,
    /// What lies one above the other, in groups: blocks never reach from one group into the next.
    groups: Vec<Vec<TensorPart>>,
    /// How many rows there are with padding.
    rows: Option<u64>,
    /// The shape as which the rows are viewed.
    view: Option<Vec<u64>>,
}

/// A parameter without an address. Receivers that make it alike share its map.
#[derive(Clone)]
pub(crate) struct KernelParam {
    pub(crate) name: String,
    pub(crate) depth: Depth,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<u64>,
    pub(crate) map: Arc<ParamMap>,
}

/// Makes the parameters of one tensor-parallel rank. Each comes alone, or with its scales behind it.
#[derive(Clone, Copy)]
pub(crate) struct KernelFormat {
    pub(crate) tp: u64,
    /// Which of the `tp` ranks this is.
    pub(crate) index: u64,
    pub(crate) fp8: Option<BlockQuant>,
    pub(crate) form: ExpertForm,
    /// Whether experts are cut by `tp` too.
    pub(crate) cut_experts: bool,
}

impl KernelFormat {
    pub(crate) fn param(&self, param: &Param) -> Result<Vec<KernelParam>, ModelError> {
        let mut rows = None;
        let mut slices = Vec::with_capacity(param.parts.len());
        for Part { tensor, shape, cut } in &param.parts {
            let bounds = self.bounds(&param.name, shape, *cut)?;
            if let (Cut::Vocabulary, Some(&words)) = (cut, shape.first()) {
                rows = Some(self.vocabulary_rows(&param.name, words)?);
            }
            slices.push(TensorPart { tensor: tensor.clone(), shape: shape.clone(), bounds });
        }
        let &Param { ref name, depth, dtype, linear, .. } = param;
        let (name, groups) = (name.clone(), vec![slices]);
        self.assemble(Assembly { name, depth, dtype, linear, groups, rows, view: None })
    }

    /// The parameters of these experts, in this order.
    pub(crate) fn experts(&self, module: &ExpertModule, own: &[u32]) -> Result<Vec<KernelParam>, ModelError> {
        let &ExpertModule { ref name, depth, dtype, inner, hidden, .. } = module;
        let (tp, index) = if self.cut_experts { (self.tp, self.index) } else { (1, 0) };
        if !inner.is_multiple_of(tp) {
            let (name, what) = (shorten(name), "rows of each expert");
            return Err(ModelError::Indivisible { name, what, count: inner, factor: "tp", by: tp });
        }
        let (each, start) = (inner / tp, inner / tp * index);
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for &expert in own {
            gate_up.push(vec![
                self.expert(module, expert, "gate_proj", [start, 0], [each, hidden])?,
                self.expert(module, expert, "up_proj", [start, 0], [each, hidden])?,
            ]);
            down.push(vec![self.expert(module, expert, "down_proj", [0, start], [hidden, each])?]);
        }
        let local = own.len() as u64;
        let mut params = Vec::new();
        for (param, groups, shape) in
            [("w13_weight", gate_up, [local, 2 * each, hidden]), ("w2_weight", down, [local, hidden, each])]
        {
            let (name, view) = (format!("{name}.{param}"), Some(shape.to_vec()));
            params.extend(self.assemble(Assembly {
                name,
                depth,
                dtype,
                linear: true,
                groups,
                rows: None,
                view,
            })?);
        }
        Ok(params)
    }

    /// Rows and columns of one expert's projection.
    fn expert(
        &self,
        module: &ExpertModule,
        expert: u32,
        projection: &str,
        start: [u64; 2],
        len: [u64; 2],
    ) -> Result<TensorPart, ModelError> {
        let &ExpertModule { experts, inner, hidden, .. } = module;
        let is_down = projection == "down_proj";
        let (tensor, shape, bounds) = match self.form {
            ExpertForm::Separate => {
                let shape = if is_down { vec![hidden, inner] } else { vec![inner, hidden] };
                (module.tensor(expert, projection), shape, TensorBox::new(&start, &len))
            }
            ExpertForm::Stacked => {
                let [row, column] = start;
                let above = if projection == "up_proj" { inner } else { 0 };
                let [rows, columns] = len;
                let bounds = TensorBox::new(&[expert.into(), above + row, column], &[1, rows, columns]);
                if is_down {
                    (module.stacked(DOWN_STACKED), vec![experts, hidden, inner], bounds)
                } else {
                    (module.stacked(GATE_UP_STACKED), vec![experts, 2 * inner, hidden], bounds)
                }
            }
        };
        let bounds = bounds.map_err(in_param(&tensor))?;
        Ok(TensorPart { tensor, shape, bounds })
    }

    /// What this rank takes of a tensor.
    fn bounds(&self, param: &str, shape: &[u64], cut: Cut) -> Result<TensorBox, ModelError> {
        let whole = TensorBox::whole(shape).map_err(in_param(param))?;
        let extent = |dim: usize| {
            let missing = LayoutError::NoSuchDim { dim, rank: whole.rank() };
            whole.extent(dim).map(|(_, len)| len).ok_or(missing).map_err(in_param(param))
        };
        let indivisible = |what, count| {
            let name = shorten(param);
            Err(ModelError::Indivisible { name, what, count, factor: "tp", by: self.tp })
        };
        let (dim, start, len) = match cut {
            Cut::Whole => return Ok(whole),
            Cut::Rows { units, what } | Cut::Columns { units, what } => {
                if !units.is_multiple_of(self.tp) {
                    return indivisible(what, units);
                }
                let dim = usize::from(matches!(cut, Cut::Columns { .. }));
                let len = extent(dim)? / self.tp;
                (dim, len * self.index, len)
            }
            Cut::KeyValueHeads { heads } => {
                let head = extent(0)? / heads.max(1);
                if heads.is_multiple_of(self.tp) {
                    let own = heads / self.tp;
                    (0, own * self.index * head, own * head)
                } else if self.tp.is_multiple_of(heads) {
                    (0, self.index / (self.tp / heads) * head, head)
                } else {
                    return indivisible("key/value heads", heads);
                }
            }
            Cut::Vocabulary => {
                let words = extent(0)?;
                let rows = self.vocabulary_rows(param, words)?;
                let start = (rows * self.index).min(words);
                (0, start, rows.min(words - start))
            }
        };
        whole.with_dim(dim, start, len).map_err(in_param(param))
    }

    /// Rows of the vocabulary on each rank, with padding.
    fn vocabulary_rows(&self, param: &str, words: u64) -> Result<u64, ModelError> {
        let padded = words.next_multiple_of(VOCABULARY_PADDING); // words are bounded by the config's limits
        if padded.is_multiple_of(self.tp) {
            return Ok(padded / self.tp);
        }
        let (name, what) = (shorten(param), "rows of the padded vocabulary");
        Err(ModelError::Indivisible { name, what, count: padded, factor: "tp", by: self.tp })
    }

    /// One parameter, and its scales if it is quantised.
    fn assemble(&self, assembly: Assembly) -> Result<Vec<KernelParam>, ModelError> {
        let Assembly { name, depth, dtype, linear, groups, rows, view } = assembly;
        let Some(quant) = self.fp8.filter(|_| linear) else {
            let mut values = Stack::default();
            for slice in groups.into_iter().flatten() {
                values.push(slice.whole(), &slice.shape, slice.bounds);
            }
            let (mut map, mut shape) = values.join();
            if let (Some(rows), Some(held)) = (rows, shape.first_mut())
                && *held < rows
            {
                *held = rows;
                map = map.pad(0, rows);
            }
            // Trainers may hold another type. From this one, a cast does nothing.
            return Ok(vec![kernel_param(name, depth, dtype, (map.cast(dtype), shape), view)]);
        };
        let (mut values, mut scales) = (Stack::default(), Stack::default());
        for group in groups {
            let last = group.len().saturating_sub(1);
            for (nth, slice) in group.into_iter().enumerate() {
                let blocks = slice.blocks(quant, nth < last).map_err(in_blocks(&name))?;
                let all = quant.scales_shape(&slice.shape).map_err(in_param(&name))?;
                scales.push(slice.whole().scales(quant), &all, blocks);
                values.push(slice.whole().quantize(quant), &slice.shape, slice.bounds);
            }
        }
        let scale_view =
            view.as_ref().map(|view| quant.scales_shape(view)).transpose().map_err(in_param(&name))?;
        let scale_name = format!("{name}_scale_inv");
        Ok(vec![
            kernel_param(name, depth, DType::F8E4M3, values.join(), view),
            kernel_param(scale_name, depth, quant.scales.dtype(), scales.join(), scale_view),
        ])
    }
}

fn kernel_param(
    name: String,
    depth: Depth,
    dtype: DType,
    (map, shape): (ParamMap, Vec<u64>),
    view: Option<Vec<u64>>,
) -> KernelParam {
    let (map, shape) = match view {
        Some(view) if view != shape => (map.view(&view), view),
        _ => (map, shape),
    };
    KernelParam { name, depth, dtype, shape, map: Arc::new(map) }
}

pub(crate) fn in_param(name: &str) -> impl Fn(LayoutError) -> ModelError {
    move |source| ModelError::Layout { name: shorten(name), source }
}

fn in_blocks(name: &str) -> impl Fn(LayoutError) -> ModelError {
    move |error| match error {
        LayoutError::CutBlocks { tensor, bounds, block } => {
            ModelError::Blocks { param: shorten(name), tensor, bounds, block }
        }
        other => in_param(name)(other),
    }
}
