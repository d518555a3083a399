//! Which token each row is, and which rows each token and each expert has: all that dispatch needs of an assignment.
//!
//! Axes: `t` tokens, `e` experts, `n` rows: the (token, choice) pairs, sorted by (expert, token).

use std::fmt;
use std::sync::Arc;

use mixtura_kernels::experts;

/// Where the index vectors of a [`DispatchPlan`] are. Whoever holds an assignment lends it, so that a plan copies nothing.
pub trait RowIndices: Send + Sync + 'static {
    /// Number of tokens, `T`.
    fn tokens(&self) -> usize;
    /// `[E + 1]`: where each expert's rows begin.
    fn row_offsets(&self) -> &[u32];
    /// `[N]`: the token of each row.
    fn token_of_row(&self) -> &[u32];
    /// `[T + 1]`: where each token's entries of [`row_of_choice`](Self::row_of_choice) begin.
    fn token_offsets(&self) -> &[u32];
    /// `[N]`: the rows of token 0 in choice order, then those of token 1, and so on.
    fn row_of_choice(&self) -> &[u32];
}

/// How rows are dispatched and combined. A clone shares the index vectors.
///
/// ```
/// use mixtura_ops::DispatchPlan;
/// // Two tokens, three experts, one choice each: token 0 goes to expert 2, token 1 to expert 0.
/// let plan = DispatchPlan::new(2, vec![0, 1, 1, 2], vec![1, 0], vec![0, 1, 2], vec![1, 0]);
/// assert_eq!((plan.tokens(), plan.experts(), plan.rows()), (2, 3, 2));
/// ```
#[derive(Clone)]
pub struct DispatchPlan(Arc<dyn RowIndices>);

impl DispatchPlan {
    /// Takes over the index vectors: expert `e` has rows `row_offsets[e]..row_offsets[e + 1]`, row `n` is token
    /// `token_of_row[n]`, and token `t` has the rows `row_of_choice[token_offsets[t]..token_offsets[t + 1]]`, in choice order.
    ///
    /// # Panics
    /// If the vectors contradict each other: offsets that do not ascend or end at `N`, an index out of range, or a row that
    /// its token does not list.
    pub fn new(
        tokens: usize,
        row_offsets: Vec<u32>,
        token_of_row: Vec<u32>,
        token_offsets: Vec<u32>,
        row_of_choice: Vec<u32>,
    ) -> Self {
        Self::shared(Owned { tokens, row_offsets, token_of_row, token_offsets, row_of_choice })
    }

    /// The plan of index vectors that somebody else holds.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn shared(indices: impl RowIndices) -> Self {
        let (tokens, rows) = (indices.tokens(), indices.token_of_row().len());
        let ascends = |offsets: &[u32]| {
            offsets.first() == Some(&0)
                && offsets.is_sorted()
                && offsets.last().is_some_and(|&end| end as usize == rows)
        };
        let (token_offsets, row_of_choice) = (indices.token_offsets(), indices.row_of_choice());
        assert!(ascends(indices.row_offsets()), "DispatchPlan: row_offsets must ascend from 0 to {rows} rows");
        assert!(ascends(token_offsets), "DispatchPlan: token_offsets must ascend from 0 to {rows} rows");
        assert_eq!(token_offsets.len(), tokens + 1, "DispatchPlan: {tokens} tokens need {} token_offsets", tokens + 1);
        assert_eq!(row_of_choice.len(), rows, "DispatchPlan: {} choices, {rows} rows", row_of_choice.len());
        for (t, range) in token_offsets.windows(2).enumerate() {
            for &n in &row_of_choice[range[0] as usize..range[1] as usize] {
                let owner = indices.token_of_row().get(n as usize);
                assert_eq!(owner, Some(&(t as u32)), "DispatchPlan: token {t} lists row {n}, which is not its own");
            }
        }
        Self(Arc::new(indices))
    }

    /// Number of tokens, `T`.
    pub fn tokens(&self) -> usize {
        self.0.tokens()
    }

    /// Number of experts, `E`.
    pub fn experts(&self) -> usize {
        self.row_offsets().len() - 1
    }

    /// Number of rows, `N`.
    pub fn rows(&self) -> usize {
        self.token_of_row().len()
    }

    /// `[E + 1]`: where each expert's rows begin.
    pub fn row_offsets(&self) -> &[u32] {
        self.0.row_offsets()
    }

    /// `[N]`: the token of each row.
    pub fn token_of_row(&self) -> &[u32] {
        self.0.token_of_row()
    }

    /// `[T + 1]`: where each token's entries of [`row_of_choice`](Self::row_of_choice) begin.
    pub fn token_offsets(&self) -> &[u32] {
        self.0.token_offsets()
    }

    /// `[N]`: the rows of token 0 in choice order, then those of token 1, and so on.
    pub fn row_of_choice(&self) -> &[u32] {
        self.0.row_of_choice()
    }

    pub(crate) fn view(&self) -> experts::Dispatch<'_> {
        experts::Dispatch {
            tokens: self.tokens(),
            row_offsets: self.row_offsets(),
            token_of_row: self.token_of_row(),
            token_offsets: self.token_offsets(),
            row_of_choice: self.row_of_choice(),
        }
    }
}

impl PartialEq for DispatchPlan {
    fn eq(&self, other: &Self) -> bool {
        self.tokens() == other.tokens()
            && self.row_offsets() == other.row_offsets()
            && self.token_of_row() == other.token_of_row()
            && self.token_offsets() == other.token_offsets()
            && self.row_of_choice() == other.row_of_choice()
    }
}

impl Eq for DispatchPlan {}

impl fmt::Debug for DispatchPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DispatchPlan")
            .field("tokens", &self.tokens())
            .field("row_offsets", &self.row_offsets())
            .field("token_of_row", &self.token_of_row())
            .field("token_offsets", &self.token_offsets())
            .field("row_of_choice", &self.row_of_choice())
            .finish()
    }
}

/// Vectors that a plan holds itself.
struct Owned {
    tokens: usize,
    row_offsets: Vec<u32>,
    token_of_row: Vec<u32>,
    token_offsets: Vec<u32>,
    row_of_choice: Vec<u32>,
}

impl RowIndices for Owned {
    fn tokens(&self) -> usize {
        self.tokens
    }
    fn row_offsets(&self) -> &[u32] {
        &self.row_offsets
    }
    fn token_of_row(&self) -> &[u32] {
        &self.token_of_row
    }
    fn token_offsets(&self) -> &[u32] {
        &self.token_offsets
    }
    fn row_of_choice(&self) -> &[u32] {
        &self.row_of_choice
    }
}
