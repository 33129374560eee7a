//! Layouts as one writes them on a command line: `fsdp=16,pp=2,ep=8`.

use super::error::ModelError;
use crate::error::shorten;
use crate::limits::{DIMS_MAX, RANKS_MAX};

/// Names and sizes, in the order of the text. Each name comes once, each size is from 1 to [`RANKS_MAX`], and so is
/// their product.
pub(crate) fn axes(text: &str) -> Result<Vec<(&str, u32)>, ModelError> {
    let wrong = |detail: String| ModelError::LayoutText { text: shorten(text), detail };
    let mut axes: Vec<(&str, u32)> = Vec::new();
    let mut ranks = 1u64;
    for part in text.split(',') {
        let (name, size) = part
            .split_once('=')
            .map(|(name, size)| (name.trim(), size.trim()))
            .filter(|(name, _)| !name.is_empty())
            .ok_or_else(|| wrong(format!("`{}` is not of the form name=number", shorten(part))))?;
        let size: u32 = size
            .parse()
            .ok()
            .filter(|size| (1..=RANKS_MAX as u32).contains(size))
            .ok_or_else(|| wrong(format!("{} must be a number from 1 to {RANKS_MAX}", shorten(name))))?;
        if axes.iter().any(|&(other, _)| other == name) {
            return Err(wrong(format!("{} is given twice", shorten(name))));
        }
        if axes.len() == DIMS_MAX {
            return Err(wrong(format!("it has more than {DIMS_MAX} factors")));
        }
        axes.push((name, size));
        ranks *= u64::from(size); // both at most RANKS_MAX
        if ranks > RANKS_MAX as u64 {
            return Err(wrong(format!("its product is more than {RANKS_MAX} ranks")));
        }
    }
    Ok(axes)
}

/// The sizes of `keys`, 1 where one is not given.
pub(crate) fn sizes<const N: usize>(text: &str, keys: [&str; N]) -> Result<[u32; N], ModelError> {
    let mut sizes = [1; N];
    for (name, size) in axes(text)? {
        let slot = keys.iter().zip(&mut sizes).find(|(key, _)| **key == name).map(|(_, slot)| slot);
        *slot.ok_or_else(|| ModelError::LayoutText {
            text: shorten(text),
            detail: format!("{} is not known here: use {}", shorten(name), keys.join(", ")),
        })? = size;
    }
    Ok(sizes)
}

/// Checks that a layout is for as many GPUs as there are.
pub(crate) fn expect_gpus(layout: String, ranks: u64, gpus: u64) -> Result<(), ModelError> {
    if ranks == gpus { Ok(()) } else { Err(ModelError::WrongGpus { layout, ranks, gpus }) }
}
