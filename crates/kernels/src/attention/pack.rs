//! Norm, rotation and repacking of qkv rows, and the way back for the gradient.
//!
//! Tokens are packed in panels of 16, so that a loop over lanes is a loop over keys or over columns (Q = P rounded up to 16):
//!
//! | what | layout | read as |
//! | --- | --- | --- |
//! | across | [panel][head]`[P]`[16] | lanes = tokens: scores |
//! | rows | [panel][head][16]`[Q]`, columns past P zero | lanes = columns, or one value broadcast |

use super::rope::RopeTable;
use super::{AttentionSpec, QkNorm};
use crate::lanes::{LANES, Lanes, per_isa};
use crate::norm::{Products, backward_row_in_place, inverse_rms_body, load_n, row_sum, store_n};
use crate::scratch::Scratch;
use std::f32::consts::{LN_2, LOG2_E};
use std::ops::Range;

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
    let wants_kv = !(out.k_across.is_empty() && out.k_rows.is_empty());
    // Panels across are made from panels in rows; where those are not wanted, they are staged.
    let mut k_staged = Scratch::take(if wants_kv && out.k_rows.is_empty() { spec.kv_heads * size.rows } else { 0 });
    let mut v_staged = Scratch::take(if wants_kv && out.v_rows.is_empty() { spec.kv_heads * size.rows } else { 0 });
    let k_rows: &mut [f32] = if out.k_rows.is_empty() { &mut k_staged } else { out.k_rows };
    let v_rows: &mut [f32] = if out.v_rows.is_empty() { &mut v_staged } else { out.v_rows };
    for (i, row) in rows.qkv.chunks_exact(width).enumerate() {
        let (q, rest) = row.split_at(spec.heads * p);
        let (k, v) = rest.split_at(spec.kv_heads * p);
        let angles = packing.rope.row(rows.position + i);
        let lane = (rows.lane + i) * size.q;
        if !out.q_rows.is_empty() {
            let norm = RowNorm::new::<L>(spec, q, packing.q_norm);
            for h in 0..spec.heads {
                let target = &mut out.q_rows[h * size.rows + lane..][..size.q];
                let (head, factor) = (&q[h * p..(h + 1) * p], spec.scale * LOG2_E);
                norm_and_rotate::<L>(head, norm.head::<L>(q, h), spec.clip, angles, factor, target);
            }
        }
        if wants_kv {
            let norm = RowNorm::new::<L>(spec, k, packing.k_norm);
            for g in 0..spec.kv_heads {
                let target = g * size.rows + lane..g * size.rows + lane + size.q;
                norm_and_rotate::<L>(
                    &k[g * p..(g + 1) * p],
                    norm.head::<L>(k, g),
                    spec.clip,
                    angles,
                    1.0,
                    &mut k_rows[target.clone()],
                );
                copy_row::<L>(&v[g * p..(g + 1) * p], spec.clip, &mut v_rows[target]);
            }
        }
    }
    for (across, rows_of) in [(&mut out.k_across, &*k_rows), (&mut out.v_across, &*v_rows)] {
        if !across.is_empty() {
            for (across, staged) in across.chunks_exact_mut(size.across).zip(rows_of.chunks_exact(size.rows)) {
                write_across::<L>(staged, size, rows.lane..rows.lane + count, across);
            }
        }
    }
}

/// Transposes the rows `lanes` of a panel.
#[inline(always)]
fn write_across<L: Lanes>(rows: &[f32], size: Sizes, lanes: Range<usize>, across: &mut [f32]) {
    let (p, q) = (size.p, size.q);
    let whole = if lanes.len() == PANEL { p / LANES * LANES } else { 0 };
    for column in (0..whole).step_by(LANES) {
        let mut square = [L::splat(0.0); LANES];
        for i in 0..LANES {
            square[i] = L::load(&rows[i * q + column..]);
        }
        for (i, values) in L::transpose(square).into_iter().enumerate() {
            values.store(&mut across[(column + i) * PANEL..]);
        }
    }
    for lane in lanes {
        for column in whole..p {
            across[column * PANEL + lane] = rows[lane * q + column];
        }
    }
}

/// Copies a row, clamped; what `target` has more is zeroed up to the next multiple of 16.
#[inline(always)]
fn copy_row<L: Lanes>(row: &[f32], clip: Option<f32>, target: &mut [f32]) {
    let whole = row.len() / LANES * LANES;
    for (target, row) in target.chunks_exact_mut(LANES).zip(row.chunks_exact(LANES)) {
        clamped(L::load(row), clip).store(target);
    }
    if whole < row.len() {
        let rest = target.len().min(row.len().next_multiple_of(LANES));
        clamped(L::load_first(&row[whole..], 0.0), clip).store_first(&mut target[whole..rest]);
    }
}

/// `x` within [-clip, clip]; what is no number stays none.
#[inline(always)]
fn clamped<L: Lanes>(x: L, clip: Option<f32>) -> L {
    let Some(clip) = clip else { return x };
    let (least, most) = (L::splat(-clip), L::splat(clip));
    let x = L::select_lt(most, x, most, x);
    L::select_lt(x, least, least, x)
}

/// Zeroes the gradients `d` of what was clamped: one head, normed again.
#[inline(always)]
fn clip_backward<L: Lanes>(head: &[f32], norm: Option<(f32, &[f32])>, clip: Option<f32>, d: &mut [f32]) {
    let Some(clip) = clip else { return };
    let (least, most, zero) = (L::splat(-clip), L::splat(clip), L::splat(0.0));
    for i in (0..head.len()).step_by(LANES) {
        let n = LANES.min(head.len() - i);
        let (x, passed) = (normed(load_n::<L>(head, i, n), norm, i, n), load_n::<L>(d, i, n));
        let passed = L::select_lt(most, x, zero, passed);
        store_n(L::select_lt(x, least, zero, passed), d, i, n);
    }
}

/// Columns i.. of a head, n of them, normed.
#[inline(always)]
fn normed<L: Lanes>(x: L, norm: Option<(f32, &[f32])>, i: usize, n: usize) -> L {
    let Some((r, gamma)) = norm else { return x };
    x.mul(L::splat(r)).mul(load_n::<L>(gamma, i, n))
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
    clip: Option<f32>,
    (cos, sin): (&[f32], &[f32]),
    factor: f32,
    target: &mut [f32],
) {
    let half = head.len() / 2;
    let (target, padding) = target.split_at_mut(head.len());
    padding.fill(0.0);
    let (first, second) = target.split_at_mut(half);
    let whole = half / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        let (a, b) = rotated::<L>(head, norm, clip, cos, sin, i, LANES);
        a.mul(L::splat(factor)).store(&mut first[i..i + LANES]);
        b.mul(L::splat(factor)).store(&mut second[i..i + LANES]);
    }
    if whole < half {
        let (a, b) = rotated::<L>(head, norm, clip, cos, sin, whole, half - whole);
        a.mul(L::splat(factor)).store_first(&mut first[whole..]);
        b.mul(L::splat(factor)).store_first(&mut second[whole..]);
    }
}

/// Columns i.. and P/2 + i.. of a normed, clamped, rotated head, n of each.
#[inline(always)]
fn rotated<L: Lanes>(
    head: &[f32],
    norm: Option<(f32, &[f32])>,
    clip: Option<f32>,
    cos: &[f32],
    sin: &[f32],
    i: usize,
    n: usize,
) -> (L, L) {
    let half = head.len() / 2;
    let [a, b] = [i, half + i].map(|i| clamped(normed(load_n::<L>(head, i, n), norm, i, n), clip));
    let (cos, sin) = (load_n::<L>(cos, i, n), load_n::<L>(sin, i, n));
    (b.neg_mul_add(sin, a.mul(cos)), a.mul_add(sin, b.mul(cos)))
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
        delta[h] = row_sum::<L>(size.p, &Products(dout, out));
        copy_row::<L>(dout, None, &mut rows[h * size.rows + lane * size.q..][..size.q]);
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
    let (q, kv) = qkv.split_at(q_width);
    let (k, v) = kv.split_at(k_width);
    let head = |h: usize| h * size.p..(h + 1) * size.p;
    for h in 0..spec.heads {
        rotate_back::<L>(&dq[at(h)], angles, spec.scale, &mut dq_out[head(h)]);
    }
    for g in 0..spec.kv_heads {
        // The packed queries carried log2 e, so dk came out that much too large.
        rotate_back::<L>(&dk[at(g)], angles, LN_2, &mut dk_out[head(g)]);
        copy_row::<L>(&dv[at(g)], None, &mut dv_out[head(g)]);
    }
    if spec.clip.is_some() {
        let norms = (RowNorm::new::<L>(spec, q, packing.q_norm), RowNorm::new::<L>(spec, k, packing.k_norm));
        for h in 0..spec.heads {
            clip_backward::<L>(&q[head(h)], norms.0.head::<L>(q, h), spec.clip, &mut dq_out[head(h)]);
        }
        for g in 0..spec.kv_heads {
            clip_backward::<L>(&k[head(g)], norms.1.head::<L>(k, g), spec.clip, &mut dk_out[head(g)]);
            clip_backward::<L>(&v[head(g)], None, spec.clip, &mut dv_out[head(g)]);
        }
    }
    norm_backward::<L>(spec, q, packing.q_norm, dq_out, dq_norm);
    norm_backward::<L>(spec, k, packing.k_norm, dk_out, dk_norm);
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
