//! Rectangles of elements in row-major memory, rows a stride apart.
//!
//! Elements are held as the bytes they are made of: memory that came as bytes may begin at any address. No reference to
//! an element itself is ever made.

use std::ops::Range;

use crate::element::Element;
use crate::error::Error;
use crate::grid::check_inside;

/// A row-major matrix to read. Its rows begin `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct MatrixRef<'a, T: Element> {
    elements: &'a [T::Bytes],
    layout: Layout,
}

/// A row-major matrix to write. Its rows begin `stride` elements apart; what lies between them is left alone.
#[derive(Debug)]
pub struct MatrixMut<'a, T: Element> {
    elements: &'a mut [T::Bytes],
    layout: Layout,
}

/// Rows and columns, and how far apart rows are: at least 1, also in an empty matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    pub(crate) shape: [usize; 2],
    pub(crate) stride: usize,
}

impl Layout {
    /// Fails unless rows do not overlap and all lie in so many elements.
    pub(crate) fn new(shape: [usize; 2], stride: usize, elements: usize) -> Result<Layout, Error> {
        let [rows, columns] = shape;
        if columns > stride {
            return Err(Error::StrideTooShort { columns, stride });
        }
        let layout = Layout { shape, stride: stride.max(1) };
        let last_row = rows.saturating_sub(1).checked_mul(stride);
        match last_row.and_then(|start| start.checked_add(columns)) {
            Some(end) if end <= elements => Ok(layout),
            _ if layout.is_empty() => Ok(layout),
            _ => Err(Error::MatrixTooShort { shape, stride, elements }),
        }
    }

    fn is_empty(self) -> bool {
        self.shape.contains(&0)
    }

    /// The layout of a part that lies inside, and where its first element is.
    fn part(self, rows: Range<usize>, columns: Range<usize>) -> (Layout, usize) {
        debug_assert!(rows.start <= rows.end && rows.end <= self.shape[0], "{rows:?} of {self:?}");
        debug_assert!(
            columns.start <= columns.end && columns.end <= self.shape[1],
            "{columns:?} of {self:?}"
        );
        // Overflows only where the part is empty.
        let start = rows.start.saturating_mul(self.stride).saturating_add(columns.start);
        (Layout { shape: [rows.len(), columns.len()], ..self }, start)
    }
}

impl<'a, T: Element> MatrixRef<'a, T> {
    /// `shape` is rows by columns. `stride` is in elements; it is the number of columns where rows follow each other.
    ///
    /// # Errors
    /// When `stride` is less than a row, or `elements` end before the last row does.
    pub fn new(elements: &'a [T], shape: [usize; 2], stride: usize) -> Result<Self, Error> {
        Self::from_elements(bytemuck::must_cast_slice(elements), shape, stride)
    }

    /// The same for elements that are there as bytes, in the machine's order and at any address.
    ///
    /// # Errors
    /// Those of [`new`](Self::new), and when the bytes are no whole number of elements.
    pub fn from_bytes(bytes: &'a [u8], shape: [usize; 2], stride: usize) -> Result<Self, Error> {
        Self::from_elements(elements_of::<T>(bytes)?, shape, stride)
    }

    fn from_elements(elements: &'a [T::Bytes], shape: [usize; 2], stride: usize) -> Result<Self, Error> {
        Ok(Self { elements, layout: Layout::new(shape, stride, elements.len())? })
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.layout.shape
    }

    /// The part of `shape` that begins at `origin`.
    ///
    /// # Errors
    /// When it is not inside this matrix.
    pub fn rectangle(&self, origin: [usize; 2], shape: [usize; 2]) -> Result<Self, Error> {
        check_inside(origin, shape, self.shape())?;
        Ok(self.part(origin[0]..origin[0] + shape[0], origin[1]..origin[1] + shape[1]))
    }

    /// The part of these rows and columns, which the caller knows to be inside.
    pub(crate) fn part(&self, rows: Range<usize>, columns: Range<usize>) -> Self {
        let (layout, start) = self.layout.part(rows, columns);
        // Only an empty part can begin behind the last element.
        Self { elements: self.elements.get(start..).unwrap_or_default(), layout }
    }

    /// The rows, top to bottom.
    #[inline(always)]
    pub(crate) fn rows(self) -> impl Iterator<Item = &'a [T::Bytes]> {
        let Layout { shape: [rows, columns], stride } = self.layout;
        let rows = if self.layout.is_empty() { 0 } else { rows };
        self.elements.chunks(stride).take(rows).map(move |row| &row[..columns])
    }
}

impl<'a, T: Element> MatrixMut<'a, T> {
    /// As [`MatrixRef::new`].
    ///
    /// # Errors
    /// Those of [`MatrixRef::new`].
    pub fn new(elements: &'a mut [T], shape: [usize; 2], stride: usize) -> Result<Self, Error> {
        Self::from_elements(bytemuck::must_cast_slice_mut(elements), shape, stride)
    }

    /// As [`MatrixRef::from_bytes`].
    ///
    /// # Errors
    /// Those of [`MatrixRef::from_bytes`].
    pub fn from_bytes(bytes: &'a mut [u8], shape: [usize; 2], stride: usize) -> Result<Self, Error> {
        Self::from_elements(elements_of_mut::<T>(bytes)?, shape, stride)
    }

    fn from_elements(elements: &'a mut [T::Bytes], shape: [usize; 2], stride: usize) -> Result<Self, Error> {
        let layout = Layout::new(shape, stride, elements.len())?;
        Ok(Self { elements, layout })
    }

    /// Rows and columns.
    pub fn shape(&self) -> [usize; 2] {
        self.layout.shape
    }

    /// The part of `shape` that begins at `origin`.
    ///
    /// # Errors
    /// When it is not inside this matrix.
    pub fn rectangle(&mut self, origin: [usize; 2], shape: [usize; 2]) -> Result<MatrixMut<'_, T>, Error> {
        check_inside(origin, shape, self.shape())?;
        Ok(self.part(origin[0]..origin[0] + shape[0], origin[1]..origin[1] + shape[1]))
    }

    /// The part of these rows and columns, which the caller knows to be inside.
    pub(crate) fn part(&mut self, rows: Range<usize>, columns: Range<usize>) -> MatrixMut<'_, T> {
        let (layout, start) = self.layout.part(rows, columns);
        MatrixMut { elements: self.elements.get_mut(start..).unwrap_or_default(), layout }
    }

    /// The rows, top to bottom.
    #[inline(always)]
    pub(crate) fn rows(self) -> impl Iterator<Item = &'a mut [T::Bytes]> {
        let Layout { shape: [rows, columns], stride } = self.layout;
        let rows = if self.layout.is_empty() { 0 } else { rows };
        self.elements.chunks_mut(stride).take(rows).map(move |row| &mut row[..columns])
    }

    /// The matrix in bands of `heights` rows, top to bottom, as far as it has rows.
    pub(crate) fn bands(
        self,
        heights: impl Iterator<Item = usize>,
    ) -> impl Iterator<Item = MatrixMut<'a, T>> {
        let Layout { shape: [mut rows, columns], stride } = self.layout;
        let mut rest = self.elements;
        heights.map_while(move |height| {
            if rows == 0 {
                return None;
            }
            let height = height.min(rows);
            rows -= height;
            let elements = std::mem::take(&mut rest);
            // The last row ends where its columns do, which may be before its stride does.
            let cut = elements.len().min(height.saturating_mul(stride));
            let (band, below) = elements.split_at_mut(cut);
            rest = below;
            Some(MatrixMut { elements: band, layout: Layout { shape: [height, columns], stride } })
        })
    }
}

/// Bytes as elements of `T`, wherever they begin.
pub(crate) fn elements_of<T: Element>(bytes: &[u8]) -> Result<&[T::Bytes], Error> {
    bytemuck::try_cast_slice(bytes).map_err(|_| Error::PartialElement { dtype: T::DTYPE, bytes: bytes.len() })
}

/// As [`elements_of`], to write.
pub(crate) fn elements_of_mut<T: Element>(bytes: &mut [u8]) -> Result<&mut [T::Bytes], Error> {
    let len = bytes.len();
    bytemuck::try_cast_slice_mut(bytes).map_err(|_| Error::PartialElement { dtype: T::DTYPE, bytes: len })
}
