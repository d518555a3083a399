//! Where the numbers that are packed lie: a view with strides for what is computed, lists of slices for what a file holds, and the one
//! form that packing reads both in.

/// Where the elements of E logical matrices `[K, N]` lie in memory: element (e, k, n) is
/// `data[e * expert_stride + k * row_stride + n * col_stride]`. A matrix and its transpose are two views of the same memory.
#[derive(Clone, Copy, Debug)]
pub struct MatView<'a> {
    /// All elements of all experts.
    pub data: &'a [f32],
    /// Distance from (k, n) to (k + 1, n).
    pub row_stride: usize,
    /// Distance from (k, n) to (k, n + 1).
    pub col_stride: usize,
    /// Distance from one expert's matrix to the next.
    pub expert_stride: usize,
}

impl<'a> MatView<'a> {
    /// E row-major matrices `[rows, cols]`, one after the other, as they are.
    pub fn row_major(data: &'a [f32], rows: usize, cols: usize) -> MatView<'a> {
        MatView { data, row_stride: cols, col_stride: 1, expert_stride: rows * cols }
    }

    /// E row-major matrices `[rows, cols]`, each read as its transpose `[cols, rows]`.
    pub fn transposed(data: &'a [f32], rows: usize, cols: usize) -> MatView<'a> {
        MatView { data, row_stride: 1, col_stride: cols, expert_stride: rows * cols }
    }

    pub(super) fn assert_holds(&self, experts: usize, k: usize, n: usize) {
        if experts * k * n > 0 {
            let last = (experts - 1) * self.expert_stride + (k - 1) * self.row_stride + (n - 1) * self.col_stride;
            assert!(
                last < self.data.len(),
                "MatView: [{experts}, {k}, {n}] with strides ({}, {}, {}) needs {} elements, got {}",
                self.expert_stride,
                self.row_stride,
                self.col_stride,
                last + 1,
                self.data.len()
            );
        }
    }
}

/// The numbers of a [`Source`]: slices, all of one type.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// f32.
    F32(&'a [&'a [f32]]),
    /// bf16, as its bits.
    Bf16(&'a [&'a [u16]]),
}

/// E matrices `[K, N]` as a file holds them, in as many pieces as it likes.
#[derive(Clone, Copy, Debug)]
pub enum Source<'a> {
    /// Row-major: for each expert a slice of K N numbers.
    ByRow(Elements<'a>),
    /// For each expert, for each of its columns, a slice of K numbers: tensors that are stored `[out, in]`, one or several for a matrix.
    ByColumn(Elements<'a>),
}

impl<'a> Source<'a> {
    pub(super) fn elements(self) -> Elements<'a> {
        let (Source::ByRow(elements) | Source::ByColumn(elements)) = self;
        elements
    }

    /// Panics with the shapes if the pieces are not those of `experts` matrices `[k, n]`.
    pub(super) fn assert_is(self, experts: usize, k: usize, n: usize) {
        let (pieces, len) = match self {
            Source::ByRow(_) => (experts, k * n),
            Source::ByColumn(_) => (experts * n, k),
        };
        let lengths: Vec<usize> = match self.elements() {
            Elements::F32(slices) => slices.iter().map(|slice| slice.len()).collect(),
            Elements::Bf16(slices) => slices.iter().map(|slice| slice.len()).collect(),
        };
        let odd = lengths.iter().position(|&found| found != len);
        assert!(
            lengths.len() == pieces && odd.is_none(),
            "PackedB::from_stored: [{experts}, {k}, {n}] takes {pieces} slices of {len} numbers, not {}{}",
            lengths.len(),
            odd.map_or(String::new(), |at| format!(", slice {at} of {}", lengths[at]))
        );
    }
}

/// The matrix `[K, N]` of one expert, as packing reads it.
#[derive(Clone, Copy)]
pub(super) enum Lines<'a, X> {
    /// Row k is at `k * stride`.
    Rows { data: &'a [X], stride: usize },
    /// Column n is at `n * stride`.
    Columns { data: &'a [X], stride: usize },
    /// The columns.
    List(&'a [&'a [X]]),
    /// Element (k, n) is at `k * row_stride + n * col_stride`.
    Scattered { data: &'a [X], row_stride: usize, col_stride: usize },
}

impl<'a> Lines<'a, f32> {
    /// One expert's part of a view.
    pub(super) fn of(view: MatView<'a>, expert: usize) -> Lines<'a, f32> {
        Lines::at(view, expert * view.expert_stride)
    }

    /// What a view describes from element `start` on.
    pub(super) fn at(view: MatView<'a>, start: usize) -> Lines<'a, f32> {
        let MatView { data, row_stride, col_stride, .. } = view;
        let data = &data[start..];
        match (row_stride, col_stride) {
            (stride, 1) => Lines::Rows { data, stride },
            (1, stride) => Lines::Columns { data, stride },
            _ => Lines::Scattered { data, row_stride, col_stride },
        }
    }
}

impl<'a, X> Lines<'a, X> {
    /// One expert's part of the `slices` of a source of matrices with `n` columns.
    pub(super) fn of_pieces(source: Source, slices: &'a [&'a [X]], n: usize, expert: usize) -> Lines<'a, X> {
        match source {
            Source::ByRow(_) => Lines::Rows { data: slices[expert], stride: n },
            Source::ByColumn(_) => Lines::List(&slices[expert * n..][..n]),
        }
    }
}
