//! Norm, rotation and repacking of qkv rows, and the way back for the gradient.
//!
//! Tokens are packed in panels of 16, so that a loop over lanes is a loop over keys or over columns (Q = P rounded up to 16):
//!
//! | what | layout | read as |
//! | --- | --- | --- |
//! | across | [panel][head][P][16] | lanes = tokens: scores |
//! | rows | [panel][head][16][Q], columns past P zero | lanes = columns, or one value broadcast |

use super::rope::RopeTable;
use super::{AttentionSpec, QkNorm};
use crate::lanes::{LANES, Lanes, per_isa};
use crate::norm::{backward_row, inverse_rms_body, load_n, store_n};
use std::f32::consts::{LN_2, LOG2_E};

/// Tokens per panel.
pub(super) const PANEL: usize = LANES;

/// Sizes of the packed panels of one layer.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// P.
    pub p: usize,
    /// Q: P rounded up to whole registers.
    pub q: usize,
    /// Values in an "across" panel of one head.
    pub across: usize,
    /// Values in a "rows" panel of one head.
    pub rows: usize,
}

impl Sizes {
    pub(super) fn new(head_dim: usize) -> Sizes {
        let q = head_dim.next_multiple_of(LANES);
        Sizes { p: head_dim, q, across: head_dim * PANEL, rows: q * PANEL }
    }
}

/// Where one panel's packed values go; what stays empty is not wanted.
#[derive(Default)]
pub(super) struct PanelOut<'a> {
    /// Queries times scale log2 e, rows, H heads.
    pub q_rows: &'a mut [f32],
    /// Keys across, G heads.
    pub k_across: &'a mut [f32],
    /// Keys in rows, G heads.
    pub k_rows: &'a mut [f32],
    /// Values across, G heads.
    pub v_across: &'a mut [f32],
    /// Values in rows, G heads.
    pub v_rows: &'a mut [f32],
}

/// One token of qkv: where it lies in its sequence and in its panel.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub position: usize,
    pub lane: usize,
}

per_isa! {
    /// Norms, rotates and packs one row of qkv.
    pub(super) fn pack_row = pack_row_body(
        spec: &AttentionSpec, rope: &RopeTable, place: Place, row: &[f32], q_norm: Option<&[f32]>, k_norm: Option<&[f32]>,
        out: &mut PanelOut<'_>
    );
    /// Packs one row of dout in rows, H heads, and writes `sum(dout out)` of each head to `delta`.
    pub(super) fn pack_dout_row = pack_dout_row_body(spec: &AttentionSpec, lane: usize, dout: &[f32], out: &[f32], rows: &mut [f32], delta: &mut [f32]);
    /// Takes the packed gradients of one row back through rotation and norm, into `dqkv`; adds to the gammas' gradients.
    pub(super) fn unpack_gradient_row = unpack_gradient_row_body(
        spec: &AttentionSpec, rope: &RopeTable, place: Place, dq: &[f32], dk: &[f32], dv: &[f32], qkv: &[f32],
        q_norm: Option<&[f32]>, k_norm: Option<&[f32]>, dqkv: &mut [f32], dq_norm: &mut [f32], dk_norm: &mut [f32]
    );
}

#[inline(always)]
fn pack_row_body<L: Lanes>(
    spec: &AttentionSpec,
    rope: &RopeTable,
    place: Place,
    row: &[f32],
    q_norm: Option<&[f32]>,
    k_norm: Option<&[f32]>,
    out: &mut PanelOut<'_>,
) {
    let (size, lane) = (Sizes::new(spec.head_dim), place.lane);
    let p = size.p;
    let angles = rope.row(place.position);
    let (q, rest) = row.split_at(spec.heads * p);
    let (k, v) = rest.split_at(spec.kv_heads * p);
    if !out.q_rows.is_empty() {
        let norm = RowNorm::new::<L>(spec, q, q_norm);
        for h in 0..spec.heads {
            let target = &mut out.q_rows[h * size.rows + lane * size.q..][..size.q];
            norm_and_rotate::<L>(&q[h * p..(h + 1) * p], norm.head::<L>(q, h), angles, spec.scale * LOG2_E, target);
            target[p..].fill(0.0);
        }
    }
    if out.k_across.is_empty() && out.k_rows.is_empty() {
        return;
    }
    let norm = RowNorm::new::<L>(spec, k, k_norm);
    let mut rotated = [0.0_f32; MAX_STACK_HEAD];
    let mut rotated_heap = Vec::new();
    let rotated = if p <= MAX_STACK_HEAD {
        &mut rotated[..p]
    } else {
        rotated_heap.resize(p, 0.0);
        &mut rotated_heap[..]
    };
    for g in 0..spec.kv_heads {
        norm_and_rotate::<L>(&k[g * p..(g + 1) * p], norm.head::<L>(k, g), angles, 1.0, rotated);
        if !out.k_across.is_empty() {
            write_across(rotated, lane, &mut out.k_across[g * size.across..][..size.across]);
        }
        if !out.k_rows.is_empty() {
            write_row(rotated, &mut out.k_rows[g * size.rows + lane * size.q..][..size.q]);
        }
        let v = &v[g * p..(g + 1) * p];
        if !out.v_across.is_empty() {
            write_across(v, lane, &mut out.v_across[g * size.across..][..size.across]);
        }
        if !out.v_rows.is_empty() {
            write_row(v, &mut out.v_rows[g * size.rows + lane * size.q..][..size.q]);
        }
    }
}

/// Widest head whose rotated row is kept on the stack.
const MAX_STACK_HEAD: usize = 256;

#[inline(always)]
fn write_across(values: &[f32], lane: usize, panel: &mut [f32]) {
    for (lanes, &value) in panel.chunks_exact_mut(PANEL).zip(values) {
        lanes[lane] = value;
    }
}

#[inline(always)]
fn write_row(values: &[f32], target: &mut [f32]) {
    target[..values.len()].copy_from_slice(values);
    target[values.len()..].fill(0.0);
}

/// The norm factor of a row's heads: none, one for the whole projection, or one per head.
struct RowNorm<'a> {
    spec: &'a AttentionSpec,
    gamma: Option<&'a [f32]>,
    whole: f32,
}

impl<'a> RowNorm<'a> {
    #[inline(always)]
    fn new<L: Lanes>(spec: &'a AttentionSpec, part: &[f32], gamma: Option<&'a [f32]>) -> RowNorm<'a> {
        let whole = match (spec.qk_norm, gamma) {
            (Some(QkNorm::FullProjection), Some(_)) => inverse_rms_body::<L>(part, spec.norm_eps),
            _ => 0.0,
        };
        RowNorm { spec, gamma, whole }
    }

    /// Factor and gammas of one head.
    #[inline(always)]
    fn head<L: Lanes>(&self, part: &[f32], head: usize) -> Option<(f32, &'a [f32])> {
        let (gamma, p) = (self.gamma?, self.spec.head_dim);
        let columns = head * p..(head + 1) * p;
        match self.spec.qk_norm {
            Some(QkNorm::FullProjection) => Some((self.whole, &gamma[columns])),
            _ => Some((inverse_rms_body::<L>(&part[columns], self.spec.norm_eps), gamma)),
        }
    }
}

#[inline(always)]
fn norm_and_rotate<L: Lanes>(
    head: &[f32],
    norm: Option<(f32, &[f32])>,
    (cos, sin): (&[f32], &[f32]),
    factor: f32,
    target: &mut [f32],
) {
    let half = head.len() / 2;
    let factor = L::splat(factor);
    for i in (0..half).step_by(LANES) {
        let n = LANES.min(half - i);
        let (mut a, mut b) = (load_n::<L>(head, i, n), load_n::<L>(head, half + i, n));
        if let Some((r, gamma)) = norm {
            let r = L::splat(r);
            a = a.mul(r).mul(load_n::<L>(gamma, i, n));
            b = b.mul(r).mul(load_n::<L>(gamma, half + i, n));
        }
        let (cos, sin) = (load_n::<L>(cos, i, n), load_n::<L>(sin, i, n));
        store_n(b.neg_mul_add(sin, a.mul(cos)).mul(factor), target, i, n);
        store_n(a.mul_add(sin, b.mul(cos)).mul(factor), target, half + i, n);
    }
}

#[inline(always)]
fn pack_dout_row_body<L: Lanes>(
    spec: &AttentionSpec,
    lane: usize,
    dout: &[f32],
    out: &[f32],
    rows: &mut [f32],
    delta: &mut [f32],
) {
    let size = Sizes::new(spec.head_dim);
    for h in 0..spec.heads {
        let (dout, out) = (&dout[h * size.p..(h + 1) * size.p], &out[h * size.p..(h + 1) * size.p]);
        delta[h] =
            crate::norm::row_sum::<L>(size.p, |sum, i, n| load_n::<L>(dout, i, n).mul_add(load_n::<L>(out, i, n), sum));
        write_row(dout, &mut rows[h * size.rows + lane * size.q..][..size.q]);
    }
}

#[inline(always)]
fn unpack_gradient_row_body<L: Lanes>(
    spec: &AttentionSpec,
    rope: &RopeTable,
    place: Place,
    dq: &[f32],
    dk: &[f32],
    dv: &[f32],
    qkv: &[f32],
    q_norm: Option<&[f32]>,
    k_norm: Option<&[f32]>,
    dqkv: &mut [f32],
    dq_norm: &mut [f32],
    dk_norm: &mut [f32],
) {
    let size = Sizes::new(spec.head_dim);
    let angles = rope.row(place.position);
    let (q_width, k_width) = (spec.heads * size.p, spec.kv_heads * size.p);
    let (dq_out, rest) = dqkv.split_at_mut(q_width);
    let (dk_out, dv_out) = rest.split_at_mut(k_width);
    let at = |head: usize| head * size.rows + place.lane * size.q..head * size.rows + place.lane * size.q + size.p;
    for h in 0..spec.heads {
        rotate_back::<L>(&dq[at(h)], angles, spec.scale, &mut dq_out[h * size.p..(h + 1) * size.p]);
    }
    for g in 0..spec.kv_heads {
        // The packed queries carried log2 e, so dk came out that much too large.
        rotate_back::<L>(&dk[at(g)], angles, LN_2, &mut dk_out[g * size.p..(g + 1) * size.p]);
        dv_out[g * size.p..(g + 1) * size.p].copy_from_slice(&dv[at(g)]);
    }
    norm_backward::<L>(spec, &qkv[..q_width], q_norm, dq_out, dq_norm);
    norm_backward::<L>(spec, &qkv[q_width..q_width + k_width], k_norm, dk_out, dk_norm);
}

/// The transpose of the rotation, times `factor`.
#[inline(always)]
fn rotate_back<L: Lanes>(head: &[f32], (cos, sin): (&[f32], &[f32]), factor: f32, target: &mut [f32]) {
    let half = head.len() / 2;
    let factor = L::splat(factor);
    for i in (0..half).step_by(LANES) {
        let n = LANES.min(half - i);
        let (a, b) = (load_n::<L>(head, i, n).mul(factor), load_n::<L>(head, half + i, n).mul(factor));
        let (cos, sin) = (load_n::<L>(cos, i, n), load_n::<L>(sin, i, n));
        store_n(b.mul_add(sin, a.mul(cos)), target, i, n);
        store_n(a.neg_mul_add(sin, b.mul(cos)), target, half + i, n);
    }
}

#[inline(always)]
fn norm_backward<L: Lanes>(spec: &AttentionSpec, x: &[f32], gamma: Option<&[f32]>, dx: &mut [f32], dgamma: &mut [f32]) {
    let Some(gamma) = gamma else { return };
    for (x, dx) in x.chunks_exact(gamma.len()).zip(dx.chunks_exact_mut(gamma.len())) {
        let dy = dx.to_vec();
        backward_row::<L>(&dy, x, gamma, spec.norm_eps, dx, dgamma);
    }
}
