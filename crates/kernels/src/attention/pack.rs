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
use crate::norm::{backward_row_in_place, inverse_rms_body, load_n, store_n};
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

/// Consecutive tokens of one sequence that share a panel.
#[derive(Clone, Copy)]
pub(super) struct PanelRows<'a> {
    /// Their rows of qkv.
    pub qkv: &'a [f32],
    /// Position of the first.
    pub position: usize,
    /// Lane of the first.
    pub lane: usize,
}

/// One token: where it lies in its sequence and in its panel.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub position: usize,
    pub lane: usize,
}

/// What packing needs besides the rows.
#[derive(Clone, Copy)]
pub(super) struct Packing<'a> {
    pub spec: &'a AttentionSpec,
    pub rope: &'a RopeTable,
    pub q_norm: Option<&'a [f32]>,
    pub k_norm: Option<&'a [f32]>,
}

per_isa! {
    /// Norms, rotates and packs up to 16 rows of qkv.
    pub(super) fn pack_panel = pack_panel_body(packing: &Packing<'_>, rows: PanelRows<'_>, out: &mut PanelOut<'_>);
    /// Packs one row of dout in rows, H heads, and writes `sum(dout out)` of each head to `delta`.
    pub(super) fn pack_dout_row = pack_dout_row_body(spec: &AttentionSpec, lane: usize, dout: &[f32], out: &[f32], rows: &mut [f32], delta: &mut [f32]);
    /// Takes the packed gradients of one row back through rotation and norm, into `dqkv`; adds to the gammas' gradients.
    pub(super) fn unpack_gradient_row = unpack_gradient_row_body(
        packing: &Packing<'_>, place: Place, dq: &[f32], dk: &[f32], dv: &[f32], qkv: &[f32],
        dqkv: &mut [f32], dq_norm: &mut [f32], dk_norm: &mut [f32]
    );
}

#[inline(always)]
fn pack_panel_body<L: Lanes>(packing: &Packing<'_>, rows: PanelRows<'_>, out: &mut PanelOut<'_>) {
    let spec = packing.spec;
    let (size, width) = (Sizes::new(spec.head_dim), spec.qkv_width());
    let (p, count) = (size.p, rows.qkv.len() / width);
    let (q_columns, k_columns) = (0..spec.heads * p, spec.heads * p..(spec.heads + spec.kv_heads) * p);
    let mut staged = Stage::new(size);
    if !out.q_rows.is_empty() {
        for i in 0..count {
            let q = &rows.qkv[i * width..][q_columns.clone()];
            let norm = RowNorm::new::<L>(spec, q, packing.q_norm);
            for h in 0..spec.heads {
                let target = &mut out.q_rows[h * size.rows + (rows.lane + i) * size.q..][..size.q];
                let angles = packing.rope.row(rows.position + i);
                norm_and_rotate::<L>(&q[h * p..(h + 1) * p], norm.head::<L>(q, h), angles, spec.scale * LOG2_E, target);
                target[p..].fill(0.0);
            }
        }
    }
    if out.k_across.is_empty() && out.k_rows.is_empty() {
        return;
    }
    let mut whole = [0.0; PANEL];
    for i in 0..count {
        whole[i] = RowNorm::new::<L>(spec, &rows.qkv[i * width..][k_columns.clone()], packing.k_norm).whole;
    }
    for g in 0..spec.kv_heads {
        for i in 0..count {
            let k = &rows.qkv[i * width..][k_columns.clone()];
            let norm = RowNorm { spec, gamma: packing.k_norm, whole: whole[i] }.head::<L>(k, g);
            norm_and_rotate::<L>(&k[g * p..(g + 1) * p], norm, packing.rope.row(rows.position + i), 1.0, staged.row(i));
        }
        staged.write::<L>(rows.lane, count, &mut out.k_across, &mut out.k_rows, g);
        for i in 0..count {
            staged.row(i).copy_from_slice(&rows.qkv[i * width + k_columns.end + g * p..][..p]);
        }
        staged.write::<L>(rows.lane, count, &mut out.v_across, &mut out.v_rows, g);
    }
}

/// Sixteen rows of one head, Q apart, on their way into panels.
struct Stage {
    size: Sizes,
    stack: [f32; STACK_HEAD * PANEL],
    heap: Vec<f32>,
}

/// Widest head that is staged on the stack.
const STACK_HEAD: usize = 128;

impl Stage {
    #[inline(always)]
    fn new(size: Sizes) -> Stage {
        let heap = if size.q > STACK_HEAD { vec![0.0; size.rows] } else { Vec::new() };
        Stage { size, stack: [0.0; STACK_HEAD * PANEL], heap }
    }

    #[inline(always)]
    fn all(&mut self) -> &mut [f32] {
        if self.heap.is_empty() { &mut self.stack[..self.size.rows] } else { &mut self.heap }
    }

    #[inline(always)]
    fn row(&mut self, i: usize) -> &mut [f32] {
        let (q, p) = (self.size.q, self.size.p);
        &mut self.all()[i * q..i * q + p]
    }

    /// Writes the first `count` rows as lanes `lane..` of head `g`'s panels.
    #[inline(always)]
    fn write<L: Lanes>(&mut self, lane: usize, count: usize, across: &mut &mut [f32], rows: &mut &mut [f32], g: usize) {
        let Sizes { p, q, across: across_len, rows: rows_len } = self.size;
        let staged = self.all();
        if !rows.is_empty() {
            let rows = &mut rows[g * rows_len..(g + 1) * rows_len];
            for i in 0..count {
                rows[(lane + i) * q..(lane + i) * q + p].copy_from_slice(&staged[i * q..i * q + p]);
                rows[(lane + i) * q + p..(lane + i + 1) * q].fill(0.0);
            }
        }
        if !across.is_empty() {
            let across = &mut across[g * across_len..(g + 1) * across_len];
            let whole = if count == PANEL { p / LANES * LANES } else { 0 };
            for column in (0..whole).step_by(LANES) {
                let mut square = [L::splat(0.0); LANES];
                for i in 0..LANES {
                    square[i] = L::load(&staged[i * q + column..]);
                }
                for (i, values) in L::transpose(square).into_iter().enumerate() {
                    values.store(&mut across[(column + i) * PANEL..]);
                }
            }
            for i in 0..count {
                for column in whole..p {
                    across[column * PANEL + lane + i] = staged[i * q + column];
                }
            }
        }
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
    packing: &Packing<'_>,
    place: Place,
    dq: &[f32],
    dk: &[f32],
    dv: &[f32],
    qkv: &[f32],
    dqkv: &mut [f32],
    dq_norm: &mut [f32],
    dk_norm: &mut [f32],
) {
    let spec = packing.spec;
    let size = Sizes::new(spec.head_dim);
    let angles = packing.rope.row(place.position);
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
    norm_backward::<L>(spec, &qkv[..q_width], packing.q_norm, dq_out, dq_norm);
    norm_backward::<L>(spec, &qkv[q_width..q_width + k_width], packing.k_norm, dk_out, dk_norm);
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
        backward_row_in_place::<L>(x, gamma, spec.norm_eps, dx, dgamma);
    }
}
