//! The weights of the tortured job: who has what, and what each byte of a version is.
//!
//! A byte is a function of version, tensor, row and column, written down here and nowhere else. It must know nothing of
//! sessions, plans or rails: what it says is what they are judged by.

use std::fmt;
use std::ops::Range;

use weightsync::{DType, Error, ParamMap, TensorBox, TensorSpec, World};

/// Each tensor has two owners, so any one trainer can be done without; each inference rank is written to by all.
pub(super) const WORLD: World = World { trainers: 3, inference: 3 };

/// Of each tensor. Several writes of a plan, and long enough to be stopped in the middle of one.
const ROWS: u64 = 512;

/// Bytes of a row.
const COLUMNS: usize = 4096;

/// How far the pattern turns from row to row: odd, so that no two rows of a tensor are the same.
const TURN: u64 = 37;

/// Versions before and after the expected one with which wrong bytes are compared, to say what they are.
const NEAR: u64 = 200;

/// The tensors, one per trainer.
pub(super) fn tensors() -> Range<u32> {
    0..WORLD.trainers
}

pub(super) fn name(tensor: u32) -> String {
    format!("w.{tensor}")
}

/// Those that a trainer has: its own and the next one's.
pub(super) fn owned(trainer: u32) -> [u32; 2] {
    [trainer, (trainer + 1) % WORLD.trainers]
}

pub(super) fn spec(tensor: u32) -> Result<TensorSpec, Error> {
    TensorSpec::whole(name(tensor), DType::U8, &[ROWS, COLUMNS as u64])
}

/// The rows of every tensor that an inference rank serves: the last rank the second half, the others all.
fn served(inference: u32) -> Range<u64> {
    if inference + 1 == WORLD.inference { ROWS / 2..ROWS } else { 0..ROWS }
}

/// The parameter that an inference rank makes of a tensor: its shape, and how.
pub(super) fn param(tensor: u32, inference: u32) -> anyhow::Result<([u64; 2], ParamMap)> {
    let (rows, columns) = (served(inference), COLUMNS as u64);
    let shape = [rows.end - rows.start, columns];
    let bounds = TensorBox::new(&[rows.start, 0], &shape)?;
    Ok((shape, ParamMap::tensor(name(tensor)).slice(bounds)))
}

/// Writes a whole tensor of this version.
pub(super) fn fill(version: u64, tensor: u32, into: &mut [u8]) {
    write_rows(version, tensor, 0, into);
}

fn write_rows(version: u64, tensor: u32, first: u64, into: &mut [u8]) {
    let pattern = pattern(version, tensor);
    for (row, into) in (first..).zip(into.chunks_mut(COLUMNS)) {
        let at = (row * TURN) as usize % COLUMNS;
        into.copy_from_slice(&pattern[at..at + into.len()]);
    }
}

/// Random bytes that follow from version and tensor, twice.
fn pattern(version: u64, tensor: u32) -> Vec<u8> {
    let mut random = super::random::Random::new(version << 8 | u64::from(tensor));
    let words = (0..COLUMNS / 8).flat_map(|_| random.word().to_le_bytes());
    words.collect::<Vec<u8>>().repeat(2)
}

/// What an inference rank serves of a version, tensor by tensor.
pub(super) struct Expected {
    version: u64,
    inference: u32,
    tensors: Vec<Vec<u8>>,
}

/// The first byte that is not what it must be.
#[derive(Debug, PartialEq)]
pub(super) struct WrongByte {
    version: u64,
    tensor: String,
    row: u64,
    column: usize,
    expected: u8,
    found: u8,
    /// The version of which the whole row is, if it is of one.
    row_is_of: Option<u64>,
}

impl Expected {
    pub(super) fn new(version: u64, inference: u32) -> Self {
        let rows = served(inference);
        let tensor = |tensor| {
            let mut bytes = vec![0; (rows.end - rows.start) as usize * COLUMNS];
            write_rows(version, tensor, rows.start, &mut bytes);
            bytes
        };
        Self { version, inference, tensors: tensors().map(tensor).collect() }
    }

    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Compares a whole tensor.
    pub(super) fn compare(&self, tensor: u32, found: &[u8]) -> Result<(), WrongByte> {
        let expected = self.tensors.get(tensor as usize).map_or(&[][..], Vec::as_slice);
        if expected == found {
            return Ok(());
        }
        let differs = expected.iter().zip(found).position(|(expected, found)| expected != found);
        let at = differs.unwrap_or(expected.len().min(found.len()));
        let row = served(self.inference).start + (at / COLUMNS) as u64;
        let row_found = found.chunks(COLUMNS).nth(at / COLUMNS).unwrap_or_default();
        let is_of = |version: &u64| {
            let mut bytes = vec![0; row_found.len()];
            write_rows(*version, tensor, row, &mut bytes);
            bytes == row_found
        };
        let near = self.version.saturating_sub(NEAR)..=self.version + NEAR;
        Err(WrongByte {
            version: self.version,
            tensor: name(tensor),
            row,
            column: at % COLUMNS,
            expected: expected.get(at).copied().unwrap_or_default(),
            found: found.get(at).copied().unwrap_or_default(),
            row_is_of: near.into_iter().find(is_of),
        })
    }
}

impl fmt::Display for WrongByte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { version, tensor, row, column, expected, found, row_is_of } = self;
        write!(
            f,
            "version {version}: {tensor}[{row}, {column}] is {found} and must be {expected}; the row is of "
        )?;
        match row_is_of {
            Some(version) => write!(f, "version {version}"),
            None => write!(f, "no version near"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn whole(version: u64, tensor: u32) -> Vec<u8> {
        let mut bytes = vec![0; ROWS as usize * COLUMNS];
        fill(version, tensor, &mut bytes);
        bytes
    }

    #[test]
    fn each_tensor_has_two_owners() {
        for tensor in tensors() {
            let owners = (0..WORLD.trainers).filter(|trainer| owned(*trainer).contains(&tensor));
            assert_eq!(owners.count(), 2);
        }
    }

    #[test]
    fn no_two_rows_are_the_same() {
        let (one, other) = (whole(1, 0), whole(1, 1));
        let rows: std::collections::BTreeSet<&[u8]> =
            one.chunks(COLUMNS).chain(other.chunks(COLUMNS)).collect();
        assert_eq!(rows.len(), 2 * ROWS as usize);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        /// One byte, or one row of another version or another place, is found and named.
        #[test]
        fn what_is_wrong_is_found(
            version in 1_u64..1000,
            tensor in tensors(),
            at in 0..ROWS as usize * COLUMNS,
            change in 1_u8..,
            back in 1_u64..5,
        ) {
            let (expected, right) = (Expected::new(version, 0), whole(version, tensor));
            prop_assert_eq!(expected.compare(tensor, &right), Ok(()));
            prop_assert!(expected.compare((tensor + 1) % 3, &right).is_err());
            prop_assert!(expected.compare(tensor, &right[..at]).is_err());

            let mut flipped = right.clone();
            flipped[at] ^= change;
            let wrong = expected.compare(tensor, &flipped).unwrap_err();
            prop_assert_eq!((wrong.row as usize, wrong.column), (at / COLUMNS, at % COLUMNS));
            prop_assert_eq!((wrong.found, wrong.expected, wrong.row_is_of), (flipped[at], right[at], None));

            let mut stale = right.clone();
            let row = at / COLUMNS * COLUMNS..(at / COLUMNS + 1) * COLUMNS;
            stale[row.clone()].copy_from_slice(&whole(version.saturating_sub(back), tensor)[row]);
            let wrong = expected.compare(tensor, &stale).unwrap_err();
            prop_assert_eq!(wrong.row_is_of, Some(version.saturating_sub(back)));
        }

        /// The rank that serves half of every tensor has the same bytes of it as the others.
        #[test]
        fn half_a_tensor_is_its_second_half(version in 1_u64..1000, tensor in tensors()) {
            let half = Expected::new(version, WORLD.inference - 1);
            prop_assert_eq!(half.compare(tensor, &whole(version, tensor)[ROWS as usize / 2 * COLUMNS..]), Ok(()));
        }
    }
}
