//! Matrices, grids and their parts.

use proptest::prelude::*;

use crate::element::F8E4M3;
use crate::error::Error;
use crate::grid::{BlockGrid, segments};
use crate::matrix::{MatrixMut, MatrixRef};

type Bytes<'a> = MatrixRef<'a, F8E4M3>;

fn cells(matrix: MatrixRef<'_, F8E4M3>) -> Vec<u8> {
    matrix.rows().flatten().copied().collect()
}

proptest! {
    #[test]
    fn a_part_holds_the_cells_of_its_rectangle(
        shape in [0..9_usize, 0..9_usize],
        gap in 0..3_usize,
        origin in [0..10_usize, 0..10_usize],
        part in [0..10_usize, 0..10_usize],
    ) {
        let stride = shape[1] + gap;
        // The last row may end with its columns.
        let len = if shape[0] == 0 { 0 } else { (shape[0] - 1) * stride + shape[1] };
        let mut memory: Vec<u8> = (0..len as u8).collect();
        let inside = origin[0] + part[0] <= shape[0] && origin[1] + part[1] <= shape[1];
        let expected: Vec<u8> = (origin[0]..origin[0] + part[0])
            .flat_map(|row| (origin[1]..origin[1] + part[1]).map(move |column| row * stride + column))
            .map(|index| index as u8)
            .collect();
        match Bytes::from_bytes(&memory, shape, stride).unwrap().rectangle(origin, part) {
            Ok(found) => prop_assert!(inside && cells(found) == expected && found.shape() == part),
            Err(error) => {
                prop_assert!(!inside);
                prop_assert_eq!(error, Error::Outside { origin, shape: part, outer: shape });
            }
        }
        let mut matrix = MatrixMut::<F8E4M3>::from_bytes(&mut memory, shape, stride).unwrap();
        if let Ok(part) = matrix.rectangle(origin, part) {
            let found: Vec<u8> = part.rows().flat_map(|row| row.to_vec()).collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn bands_are_the_rows_in_order(rows in 0..20_usize, columns in 1..5_usize, height in 1..7_usize) {
        let stride = columns + 1;
        let mut memory = vec![0_u8; rows * stride];
        let matrix = MatrixMut::<F8E4M3>::from_bytes(&mut memory, [rows, columns], stride).unwrap();
        let mut row = 0;
        for band in matrix.bands(std::iter::repeat(height)) {
            prop_assert_eq!(band.shape(), [height.min(rows - row), columns]);
            for cells in band.rows() {
                row += 1;
                cells.fill(row as u8);
            }
        }
        prop_assert_eq!(row, rows);
        for (row, cells) in memory.chunks(stride).enumerate() {
            prop_assert!(cells[..columns].iter().all(|&cell| cell == row as u8 + 1));
            prop_assert_eq!(cells[columns], 0);
        }
    }

    #[test]
    fn segments_hold_each_index_once(first in 0..50_usize, len in 0..50_usize, block in 1..20_usize) {
        let found: Vec<(usize, usize)> = segments(first, len, block)
            .flat_map(|(index, segment)| segment.map(move |offset| (index, offset)))
            .collect();
        let expected: Vec<(usize, usize)> = (0..len).map(|offset| ((first + offset) / block, offset)).collect();
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn memory_must_hold_the_matrix() {
    let memory = [0.0; 11];
    let new = |shape, stride| MatrixRef::new(&memory, shape, stride).map(|matrix| matrix.shape());
    assert_eq!(new([3, 3], 4), Ok([3, 3]), "the last row needs no gap behind it");
    assert_eq!(new([0, 3], 4), Ok([0, 3]));
    assert_eq!(new([usize::MAX, 0], usize::MAX), Ok([usize::MAX, 0]), "no columns, no memory");
    assert_eq!(new([3, 4], 4), Err(Error::MatrixTooShort { shape: [3, 4], stride: 4, elements: 11 }));
    assert_eq!(new([2, 5], 4), Err(Error::StrideTooShort { columns: 5, stride: 4 }));
    let large = Error::MatrixTooShort { shape: [usize::MAX, 3], stride: 4, elements: 11 };
    assert_eq!(new([usize::MAX, 3], 4), Err(large));
    let odd = MatrixRef::<f32>::from_bytes(&[0; 6], [1, 1], 1).unwrap_err();
    assert_eq!(odd.to_string(), "6 bytes end inside an element of F32: pass a multiple of 4");
}

#[test]
fn a_grid_has_whole_and_cut_blocks() {
    let grid = BlockGrid::new([300, 256], [128, 128]).unwrap();
    assert_eq!((grid.blocks(), grid.table_len()), ([3, 2], 6));
    assert_eq!(BlockGrid::new([0, 7], [128, 128]).unwrap().table_len(), 0);
    assert_eq!(BlockGrid::new([1, 1], [1, 0]).unwrap_err(), Error::EmptyBlock { block: [1, 0] });
    let shape = [usize::MAX, usize::MAX];
    assert_eq!(BlockGrid::new(shape, [1, 1]).unwrap_err(), Error::TooManyBlocks { shape });
    // A table's bytes are counted too, not its entries alone.
    let shape = [usize::MAX / 4 + 1, 1];
    assert_eq!(BlockGrid::new(shape, [1, 1]).unwrap_err(), Error::TooManyBlocks { shape });
    assert_eq!(BlockGrid::new([usize::MAX / 4, 1], [1, 1]).unwrap().table_len(), usize::MAX / 4);
}
