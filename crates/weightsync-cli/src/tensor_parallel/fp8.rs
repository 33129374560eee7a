//! Linear layers in FP8: which can be, and their parameters with the scales beside them.
//!
//! A layer whose parts on any rank begin or end within blocks stays as it is, on every rank: an engine has one format for a
//! layer. Its rule says which it got.

use xfer_plan::{BlockQuant, DType, Quantized, TensorPart};

use super::rules::{Role, role_of};
use super::{Layout, LayoutError, LocalParam, Param, Part};

impl Layout {
    /// Quantises the weights of linear layers in such blocks, where no rank's part cuts one. Behind each comes the parameter of
    /// its scales, of its name and `_scale_inv`. Embeddings, norms and biases stay as they are.
    ///
    /// # Errors
    /// When a box cannot be.
    pub fn with_fp8(mut self, quant: BlockQuant) -> Result<Layout, LayoutError> {
        for param in &mut self.params {
            let linear = param.parts.iter().all(Part::is_linear);
            if linear && param.keeps_blocks(quant, self.tp)? {
                let [rows, columns] = quant.block;
                param.quant = Some(quant);
                param.rule = format!("{}; quantised in blocks of {rows} x {columns}", param.rule);
            }
        }
        Ok(self)
    }

    /// How many parameters are quantised.
    #[must_use]
    pub fn quantised(&self) -> usize {
        self.params.iter().filter(|param| param.quant.is_some()).count()
    }
}

impl Part {
    fn is_linear(&self) -> bool {
        let name = &self.tensor.name;
        let linear = role_of(name).is_some_and(|role| role != Role::Vocabulary);
        linear && name.ends_with(".weight") && matches!(self.tensor.dtype, DType::BF16 | DType::F32)
    }

    fn on(&self, tp: u32, rank: u32) -> Result<TensorPart, LayoutError> {
        let (tensor, shape) = (self.tensor.name.clone(), self.tensor.shape.clone());
        match self.cut.bounds(&shape, tp, rank) {
            Ok(bounds) => Ok(TensorPart { tensor, shape, bounds }),
            Err(source) => Err(LayoutError::Box { tensor, source }),
        }
    }
}

impl Param {
    fn parts_on(&self, tp: u32, rank: u32) -> Result<Vec<TensorPart>, LayoutError> {
        self.parts.iter().map(|part| part.on(tp, rank)).collect()
    }

    /// Whether every rank has something of every part, and none of them cuts a block.
    fn keeps_blocks(&self, quant: BlockQuant, tp: u32) -> Result<bool, LayoutError> {
        for rank in 0..tp {
            let parts = self.parts_on(tp, rank)?;
            if parts.iter().any(|part| part.bounds.is_empty()) || Quantized::stack(&parts, quant).is_err() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn quantised(
        &self,
        quant: BlockQuant,
        tp: u32,
        rank: u32,
    ) -> Result<Vec<LocalParam>, LayoutError> {
        let in_param = |source| LayoutError::Box { tensor: self.name.clone(), source };
        let Quantized { codes, shape, scales, scales_shape } =
            Quantized::stack(&self.parts_on(tp, rank)?, quant).map_err(in_param)?;
        Ok(vec![
            LocalParam { name: self.name.clone(), dtype: DType::F8E4M3, shape, map: codes },
            LocalParam {
                name: format!("{}_scale_inv", self.name),
                dtype: quant.scales.dtype(),
                shape: scales_shape,
                map: scales,
            },
        ])
    }
}
