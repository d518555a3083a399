//! The slow twins: plain loops that define the order of every sum. The fast kernels must give the same bits.

use super::{Accum, check_offsets};
use crate::bf16;
use crate::kernel::scalar::{flush, fma_flushed};
use crate::pack::MatView;
use crate::precision::Precision;

/// c_mn = a_mk b_kn, with b_kn read through `b`.
///
/// - f32: `c = fma(a[k], b[k], c)` for k ascending.
/// - bf16: operands rounded; per 32 consecutive k, one FMA chain over the even k and one over the odd k, both from +0, then
///   `c += even + odd`; denormal operands and results count as zero.
/// - bf16-native: operands rounded; `c = fma(a[k], b[k], c)` for k = 1, 0, 3, 2, 5, 4 ..., K padded with zeros to a multiple of 32;
///   denormals likewise. That is the order of `vdpbf16ps`. On AMX, where `bf16-native` runs on tiles, it is that of `bf16`.
pub fn matmul_reference(
    precision: Precision,
    a_mk: &[f32],
    b: MatView,
    m: usize,
    k: usize,
    n: usize,
    c_mn: &mut [f32],
    accum: Accum,
) {
    assert!(a_mk.len() == m * k && c_mn.len() == m * n, "matmul_reference: [{m}, {k}] times [{k}, {n}]");
    let inner = k;
    for row in 0..m {
        for column in 0..n {
            let c = &mut c_mn[row * n + column];
            let start = if accum == Accum::Add { *c } else { 0.0 };
            let left = |k: usize| a_mk[row * inner + k];
            let right = |k: usize| b.data[k * b.row_stride + column * b.col_stride];
            *c = dot(precision, k, left, right, start);
        }
    }
}

/// c_mn = a_tm^T b_tn, summed over t as [`matmul_reference`] sums over k.
pub fn matmul_tn_reference(
    precision: Precision,
    a_tm: &[f32],
    b_tn: &[f32],
    t: usize,
    m: usize,
    n: usize,
    c_mn: &mut [f32],
    accum: Accum,
) {
    assert!(a_tm.len() == t * m && b_tn.len() == t * n && c_mn.len() == m * n, "matmul_tn_reference: {t}, {m}, {n}");
    for row in 0..m {
        for column in 0..n {
            let c = &mut c_mn[row * n + column];
            let start = if accum == Accum::Add { *c } else { 0.0 };
            *c = dot(precision, t, |t| a_tm[t * m + row], |t| b_tn[t * n + column], start);
        }
    }
}

/// [`matmul_reference`] for each expert's rows with its own matrix.
pub fn grouped_matmul_reference(
    precision: Precision,
    a_nk: &[f32],
    row_offsets: &[u32],
    b: MatView,
    k: usize,
    n: usize,
    c: &mut [f32],
    accum: Accum,
) {
    check_offsets("grouped_matmul_reference", row_offsets, row_offsets.len() - 1);
    for (expert, offsets) in row_offsets.windows(2).enumerate() {
        let (first, end) = (offsets[0] as usize, offsets[1] as usize);
        if first == end {
            continue;
        }
        let own = MatView { data: &b.data[expert * b.expert_stride..], ..b };
        let (a, c) = (&a_nk[first * k..end * k], &mut c[first * n..end * n]);
        matmul_reference(precision, a, own, end - first, k, n, c, accum);
    }
}

/// [`matmul_tn_reference`] for each expert's rows.
pub fn grouped_matmul_tn_reference(
    precision: Precision,
    a_nm: &[f32],
    b_nn: &[f32],
    row_offsets: &[u32],
    m: usize,
    n: usize,
    c_emn: &mut [f32],
    accum: Accum,
) {
    check_offsets("grouped_matmul_tn_reference", row_offsets, row_offsets.len() - 1);
    for (expert, offsets) in row_offsets.windows(2).enumerate() {
        let (first, end) = (offsets[0] as usize, offsets[1] as usize);
        let c = &mut c_emn[expert * m * n..(expert + 1) * m * n];
        matmul_tn_reference(
            precision,
            &a_nm[first * m..end * m],
            &b_nn[first * n..end * n],
            end - first,
            m,
            n,
            c,
            accum,
        );
    }
}

/// One output: the sum over `k` of left times right, in the order of the precision, from `start`.
pub(crate) fn dot(
    precision: Precision,
    k: usize,
    left: impl Fn(usize) -> f32,
    right: impl Fn(usize) -> f32,
    start: f32,
) -> f32 {
    if !precision.is_bf16() {
        return (0..k).fold(start, |sum, k| left(k).mul_add(right(k), sum));
    }
    if precision == Precision::Bf16Native {
        let element = |of: &dyn Fn(usize) -> f32, at: usize| if at < k { bf16::round(of(at)) } else { 0.0 };
        return (0..k.next_multiple_of(32))
            .map(|at| at ^ 1)
            .fold(start, |sum, at| fma_flushed(element(&left, at), element(&right, at), sum));
    }
    let mut sum = start;
    for step in (0..k).step_by(32) {
        let chain = |parity: usize| {
            (step + parity..k.min(step + 32))
                .step_by(2)
                .fold(0.0, |chain, k| fma_flushed(bf16::round(left(k)), bf16::round(right(k)), chain))
        };
        sum = flush(flush(sum) + flush(chain(0) + chain(1)));
    }
    sum
}
