//! The four operations that soft layers are made of: two softmaxes, mixing tokens into slots, and handing answers back.
//!
//! ```text
//! softmax_rows     p_tm = softmax over the M columns of each row
//! softmax_members  w_tm = softmax over the tokens of each group, column by column
//! mix              s_gmd = sum over the tokens t of group g of w_tm x_td
//! unmix            y_td = sum over m of p_tm a_gmd, g the group of token t
//! ```
//!
//! Host code in f32, every sum in the order of tokens or of slots, so a row has the same bits whatever it is computed with:
//! that is what makes decoding equal a pass over the whole sequence. A token is in at most one group; one in none gets 0.
//!
//! Legend: T tokens, D width, M slots of a group, G groups; `s_gmd` and `a_gmd` are `[G M, D]`.

use std::sync::Arc;

use burn::tensor::Tensor;
use mixtura_ops::{host_function, host_function_2, with_slice};
use rayon::prelude::*;

/// Which tokens are mixed with each other.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Groups {
    tokens: usize,
    offsets: Vec<usize>,
    members: Vec<u32>,
}

impl Groups {
    /// Groups of some of `tokens` tokens, each given by its tokens in the order of their sums.
    pub fn new<G: IntoIterator<Item = usize>>(tokens: usize, groups: impl IntoIterator<Item = G>) -> Self {
        let (mut offsets, mut members) = (vec![0], Vec::new());
        for group in groups {
            members.extend(group.into_iter().map(|t| t as u32));
            offsets.push(members.len());
        }
        Self { tokens, offsets, members }
    }

    /// Runs of `length` tokens inside each sequence of `seq` tokens, the last of a sequence may be shorter; those whose index
    /// in their sequence is below `skip` are left out.
    pub fn runs(batch: usize, seq: usize, length: usize, skip: usize) -> Self {
        let starts = move |b: usize| (skip * length..seq).step_by(length).map(move |s| (b, s));
        let run = |(b, s): (usize, usize)| b * seq + s..b * seq + (s + length).min(seq);
        Self::new(batch * seq, (0..batch).flat_map(starts).map(run))
    }

    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Tokens of group `g`.
    pub fn of(&self, g: usize) -> &[u32] {
        &self.members[self.offsets[g]..self.offsets[g + 1]]
    }

    fn map<R: Send>(&self, f: impl Fn(usize, &[u32]) -> R + Sync) -> Vec<R> {
        (0..self.len()).into_par_iter().map(|g| f(g, self.of(g))).collect()
    }

    /// One row of `width` per token from one row per member, zero for tokens in no group.
    fn scatter(&self, rows_of_group: &[Vec<f32>], width: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.tokens * width];
        for (g, rows) in rows_of_group.iter().enumerate() {
            for (&t, row) in self.of(g).iter().zip(rows.chunks_exact(width.max(1))) {
                out[t as usize * width..][..width].copy_from_slice(row);
            }
        }
        out
    }
}

/// Softmax of each row, `[T, M]`.
pub(crate) fn softmax_rows(logits_tm: Tensor<2>) -> Tensor<2> {
    let shape = logits_tm.dims();
    let columns = shape[1].max(1);
    let mut value = with_slice(&logits_tm, |logits| logits.to_vec());
    value.par_chunks_mut(columns).for_each(softmax);
    let probs: Arc<[f32]> = value.as_slice().into();
    host_function(logits_tm, value, shape, move |dp| {
        let rows = probs.par_chunks(columns).zip(dp.par_chunks(columns));
        rows.flat_map_iter(|(p, dp)| softmax_backward(p, dp)).collect()
    })
}

/// Softmax over the tokens of each group, for every column on its own. `[T, M]`.
pub(crate) fn softmax_members(logits_tm: Tensor<2>, groups: &Arc<Groups>) -> Tensor<2> {
    let shape = logits_tm.dims();
    let m = shape[1];
    let column = move |values: &[f32], members: &[u32], j: usize| -> Vec<f32> {
        members.iter().map(|&t| values[t as usize * m + j]).collect()
    };
    let over_columns = move |members: &[u32], f: &dyn Fn(usize) -> Vec<f32>| {
        let mut rows = vec![0.0; members.len() * m];
        for j in 0..m {
            f(j).into_iter().enumerate().for_each(|(i, v)| rows[i * m + j] = v);
        }
        rows
    };
    let value = with_slice(&logits_tm, |logits| {
        let rows = groups.map(|_, members| {
            over_columns(members, &|j| {
                let mut weights = column(logits, members, j);
                softmax(&mut weights);
                weights
            })
        });
        groups.scatter(&rows, m)
    });
    let (weights, groups): (Arc<[f32]>, _) = (value.as_slice().into(), groups.clone());
    host_function(logits_tm, value, shape, move |dw| {
        let rows = groups.map(|_, members| {
            over_columns(members, &|j| {
                softmax_backward(&column(&weights, members, j), &column(dw, members, j)).collect()
            })
        });
        groups.scatter(&rows, m)
    })
}

/// One mixture of its group's tokens per slot.
///
/// # Shapes
/// `[T, D]` and `[T, M]` give `[G M, D]`.
pub(crate) fn mix(x_td: Tensor<2>, w_tm: Tensor<2>, groups: &Arc<Groups>) -> Tensor<2> {
    let ([_, d], [_, m]) = (x_td.dims(), w_tm.dims());
    let (x, w) = (x_td.clone().inner(), w_tm.clone().inner());
    let value = both(&x, &w, |x, w| groups.map(|_, members| down(members, w, m, x, d)).concat());
    let groups = groups.clone();
    host_function_2(x_td, w_tm, value, [groups.len() * m, d], move |ds| {
        both(&x, &w, |x, w| {
            let slots = |g: usize| &ds[g * m * d..(g + 1) * m * d];
            let dx = groups.map(|g, members| up(members, w, m, slots(g), d));
            let dw = groups.map(|g, members| dots(members, x, slots(g), d));
            (groups.scatter(&dx, d), groups.scatter(&dw, m))
        })
    })
}

/// Each token's mixture of its group's answers.
///
/// # Shapes
/// `[T, M]` and `[G M, D]` give `[T, D]`.
pub(crate) fn unmix(p_tm: Tensor<2>, answers_gmd: Tensor<2>, groups: &Arc<Groups>) -> Tensor<2> {
    let ([tokens, m], [_, d]) = (p_tm.dims(), answers_gmd.dims());
    let (p, a) = (p_tm.clone().inner(), answers_gmd.clone().inner());
    let value = both(&p, &a, |p, a| {
        groups.scatter(&groups.map(|g, members| up(members, p, m, &a[g * m * d..(g + 1) * m * d], d)), d)
    });
    let groups = groups.clone();
    host_function_2(p_tm, answers_gmd, value, [tokens, d], move |dy| {
        both(&p, &a, |p, a| {
            let dp = groups.map(|g, members| dots(members, dy, &a[g * m * d..(g + 1) * m * d], d));
            (groups.scatter(&dp, m), groups.map(|_, members| down(members, p, m, dy, d)).concat())
        })
    })
}

fn both<R>(a: &Tensor<2>, b: &Tensor<2>, f: impl FnOnce(&[f32], &[f32]) -> R) -> R {
    with_slice(a, |a| with_slice(b, |b| f(a, b)))
}

/// `sum over the members t of w_tm x_td`, `[M, D]`.
fn down(members: &[u32], w: &[f32], m: usize, x: &[f32], d: usize) -> Vec<f32> {
    let mut out = vec![0.0; m * d];
    for &t in members {
        let t = t as usize;
        for (out, &w) in out.chunks_exact_mut(d).zip(&w[t * m..(t + 1) * m]) {
            axpy(out, w, &x[t * d..(t + 1) * d]);
        }
    }
    out
}

/// `sum over m of w_tm a_md` for each member t.
fn up(members: &[u32], w: &[f32], m: usize, a: &[f32], d: usize) -> Vec<f32> {
    let mut out = vec![0.0; members.len() * d];
    for (out, &t) in out.chunks_exact_mut(d).zip(members) {
        for (a, &w) in a.chunks_exact(d).zip(&w[t as usize * m..][..m]) {
            axpy(out, w, a);
        }
    }
    out
}

/// `<x_t, a_m>` for each member t.
fn dots(members: &[u32], x: &[f32], a: &[f32], d: usize) -> Vec<f32> {
    let row = |&t: &u32| a.chunks_exact(d).map(move |a| dot(&x[t as usize * d..][..d], a));
    members.iter().flat_map(row).collect()
}

/// `out += w x`.
pub(crate) fn axpy(out: &mut [f32], w: f32, x: &[f32]) {
    out.iter_mut().zip(x).for_each(|(o, x)| *o += w * x);
}

/// In eight lanes, which the compiler can keep in vector registers; the order of the sum is fixed all the same.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    for (a, b) in a.iter().zip(b) {
        lanes.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    lanes.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

fn softmax(values: &mut [f32]) {
    let top = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    values.iter_mut().for_each(|v| *v = (*v - top).exp());
    let total: f32 = values.iter().sum();
    values.iter_mut().for_each(|v| *v /= total);
}

fn softmax_backward<'a>(probs: &'a [f32], dprobs: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
    let mean: f32 = probs.iter().zip(dprobs).map(|(p, d)| p * d).sum();
    probs.iter().zip(dprobs).map(move |(p, d)| p * (d - mean))
}
