//! Cross-entropy fused with the output projection: `loss_t = ln(sum_v exp(logits_tv)) - logits_t,target` with `logits = x w`.
//!
//! Axes: T tokens, D width, V vocabulary. Logits exist for one chunk of rows at a time (256 to 1024 rows, about 4 MiB), become their own
//! gradient in place, and feed the two products `dx = dlogits w^T` and `dw += x^T dlogits`. Tokens whose target is [`IGNORED`] are left
//! out before the first product. The chunk size depends on V only and chunks go in order, so neither threads nor ignored tokens change
//! the order of a sum; losses are added in f64 in token order.
//!
//! Softmax is f32 in every precision; only the products follow the precision of the packed head.

use crate::gemm::{Accum, matmul, matmul_tn};
use crate::isa::Isa;
use crate::lanes::{LANES, Lanes, per_isa};
use crate::norm::{load_n, store_n};
use crate::pack::PackedB;
use crate::scratch::Scratch;
use crate::softmax::{exp_row, row_max};
use crate::vmath;
use rayon::prelude::*;

/// The target of a token that does not count.
pub const IGNORED: u32 = u32::MAX;

/// Sum of the losses of the tokens that count.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CrossEntropy {
    /// Sum over the counted tokens, in token order.
    pub loss_sum: f64,
    /// How many tokens count.
    pub counted: usize,
}

/// Where the gradient of the output projection goes; overwritten.
#[derive(Debug)]
pub enum HeadGradient<'a> {
    /// Nowhere: the projection is frozen.
    None,
    /// `[D, V]`, for a projection of its own.
    InOut(&'a mut [f32]),
    /// `[V, D]`, for a projection tied to the embedding.
    OutIn(&'a mut [f32]),
}

/// Losses only: `head` is the packed `[D, V]`; `per_token`, if given, gets every token's loss (0 where ignored).
///
/// # Panics
/// If shapes disagree or a target is neither below V nor [`IGNORED`].
pub fn linear_cross_entropy(
    isa: Isa,
    x_td: &[f32],
    d: usize,
    head: &PackedB,
    targets: &[u32],
    per_token: Option<&mut [f32]>,
) -> CrossEntropy {
    run(isa, x_td, d, head, targets, None, per_token)
}

/// Losses and the gradients of `scale * sum of losses`: overwrites `dx_td` and `dw`. `head` is the packed `[D, V]`, `head_t` the packed
/// `[V, D]`; the products run in the precision they were packed for.
///
/// # Panics
/// If shapes disagree or a target is neither below V nor [`IGNORED`].
pub fn linear_cross_entropy_forward_backward(
    isa: Isa,
    x_td: &[f32],
    d: usize,
    head: &PackedB,
    head_t: &PackedB,
    targets: &[u32],
    scale: f32,
    dx_td: &mut [f32],
    dw: HeadGradient<'_>,
    per_token: Option<&mut [f32]>,
) -> CrossEntropy {
    const NAME: &str = "linear_cross_entropy_forward_backward";
    let v = head.n();
    assert!(
        head_t.k() == v && head_t.n() == d,
        "{NAME}: head_t is [{}, {}], should be [{v}, {d}]",
        head_t.k(),
        head_t.n()
    );
    assert_eq!(dx_td.len(), x_td.len(), "{NAME}: dx has {} values, x has {}", dx_td.len(), x_td.len());
    if let HeadGradient::InOut(dw) | HeadGradient::OutIn(dw) = &dw {
        assert_eq!(dw.len(), d * v, "{NAME}: dw has {} values, the head is [{d}, {v}]", dw.len());
    }
    run(isa, x_td, d, head, targets, Some(Gradient { head_t, scale, dx_td, dw }), per_token)
}

/// `logits = x w`, [T, V]: for sampling and scoring, where whole rows are wanted.
///
/// # Panics
/// If shapes disagree.
pub fn linear_logits(isa: Isa, x_td: &[f32], d: usize, head: &PackedB, logits_tv: &mut [f32]) {
    assert!(
        d > 0 && head.k() == d && x_td.len().is_multiple_of(d),
        "linear_logits: x has {} values of width {d}, head is [{}, {}]",
        x_td.len(),
        head.k(),
        head.n()
    );
    matmul(isa, x_td, x_td.len() / d, head, logits_tv, Accum::Replace);
}

struct Gradient<'a> {
    head_t: &'a PackedB,
    scale: f32,
    dx_td: &'a mut [f32],
    dw: HeadGradient<'a>,
}

/// Rows whose logits exist at once.
fn chunk_rows(v: usize) -> usize {
    ((1 << 20) / v / 64 * 64).clamp(256, 1024)
}

fn run(
    isa: Isa,
    x_td: &[f32],
    d: usize,
    head: &PackedB,
    targets: &[u32],
    mut gradient: Option<Gradient<'_>>,
    mut per_token: Option<&mut [f32]>,
) -> CrossEntropy {
    const NAME: &str = "linear_cross_entropy";
    let v = head.n();
    assert!(
        head.k() == d && x_td.len() == targets.len() * d,
        "{NAME}: {} targets, x of {} values, head [{}, {v}], d {d}",
        targets.len(),
        x_td.len(),
        head.k()
    );
    if let Some(per_token) = per_token.as_deref_mut() {
        assert_eq!(
            per_token.len(),
            targets.len(),
            "{NAME}: per_token has {} values for {} tokens",
            per_token.len(),
            targets.len()
        );
        per_token.fill(0.0);
    }
    if let Some((t, &target)) =
        targets.iter().enumerate().find(|&(_, &target)| target != IGNORED && target as usize >= v)
    {
        panic!("{NAME}: target {target} of token {t}, the vocabulary has {v}");
    }
    let counted: Vec<usize> = (0..targets.len()).filter(|&t| targets[t] != IGNORED).collect();
    let whole = counted.len() == targets.len();
    if let Some(gradient) = &mut gradient {
        if !whole {
            gradient.dx_td.fill(0.0);
        }
        if counted.is_empty()
            && let HeadGradient::InOut(dw) | HeadGradient::OutIn(dw) = &mut gradient.dw
        {
            dw.fill(0.0);
        }
    }
    let rows_at_once = chunk_rows(v).min(counted.len());
    let mut logits = Scratch::take(rows_at_once * v);
    let gathered = if whole { 0 } else { rows_at_once * d };
    let (mut x_rows, mut dx_rows) = (Scratch::take(gathered), Scratch::take(gathered));
    let mut losses = vec![0.0_f64; rows_at_once];
    let mut loss_sum = 0.0;
    for (chunk, tokens) in counted.chunks(rows_at_once.max(1)).enumerate() {
        let rows = tokens.len();
        let x = if whole {
            &x_td[tokens[0] * d..(tokens[0] + rows) * d]
        } else {
            for (row, &t) in x_rows.chunks_exact_mut(d).zip(tokens) {
                row.copy_from_slice(&x_td[t * d..(t + 1) * d]);
            }
            &x_rows[..rows * d]
        };
        let logits = &mut logits[..rows * v];
        matmul(isa, x, rows, head, logits, Accum::Replace);
        let scale = gradient.as_ref().map(|g| g.scale);
        (logits.par_chunks_mut(v), &mut losses[..rows], tokens).into_par_iter().with_min_len(ROWS_PER_TASK).for_each(
            |(logits, loss, &t)| {
                *loss = softmax_loss(isa, logits, targets[t] as usize, scale);
            },
        );
        for (&loss, &t) in losses.iter().zip(tokens) {
            loss_sum += loss;
            if let Some(per_token) = per_token.as_deref_mut() {
                per_token[t] = loss as f32;
            }
        }
        let Some(gradient) = &mut gradient else { continue };
        if whole {
            let dx = &mut gradient.dx_td[tokens[0] * d..(tokens[0] + rows) * d];
            matmul(isa, logits, rows, gradient.head_t, dx, Accum::Replace);
        } else {
            matmul(isa, logits, rows, gradient.head_t, &mut dx_rows[..rows * d], Accum::Replace);
            for (row, &t) in dx_rows.chunks_exact(d).zip(tokens) {
                gradient.dx_td[t * d..(t + 1) * d].copy_from_slice(row);
            }
        }
        let accum = if chunk == 0 { Accum::Replace } else { Accum::Add };
        match &mut gradient.dw {
            HeadGradient::None => {}
            HeadGradient::InOut(dw) => matmul_tn(isa, head.precision(), x, logits, rows, d, v, dw, accum),
            HeadGradient::OutIn(dw) => matmul_tn(isa, head.precision(), logits, x, rows, v, d, dw, accum),
        }
    }
    CrossEntropy { loss_sum, counted: counted.len() }
}

/// Rows of logits per task.
const ROWS_PER_TASK: usize = 16;

per_isa! {
    fn softmax_loss = softmax_loss_body(logits: &mut [f32], target: usize, scale: Option<f32>) -> f64;
}

/// The loss of one row; with a scale, `logits` become `scale (softmax - one-hot)`.
#[inline(always)]
fn softmax_loss_body<L: Lanes>(logits: &mut [f32], target: usize, scale: Option<f32>) -> f64 {
    let most = row_max::<L>(logits);
    let gap = f64::from(most) - f64::from(logits[target]);
    let sum = exp_row::<L>(logits, most);
    if let Some(scale) = scale {
        let factor = L::splat(scale / sum);
        let v = logits.len();
        for i in (0..v).step_by(LANES) {
            let n = LANES.min(v - i);
            store_n(load_n::<L>(logits, i, n).mul(factor), logits, i, n);
        }
        logits[target] -= scale;
    }
    gap + vmath::log_f64(f64::from(sum))
}

/// Losses and gradients in f64 from the unpacked head: `w` element (i, j) of `[D, V]` is `w[i * row_stride + j * col_stride]`. `dx_td` and
/// `dw_dv` `[D, V]` are overwritten; the fast path must agree up to rounding.
pub fn linear_cross_entropy_reference(
    x_td: &[f32],
    d: usize,
    v: usize,
    w: &[f32],
    row_stride: usize,
    col_stride: usize,
    targets: &[u32],
    scale: f32,
    dx_td: &mut [f32],
    dw_dv: &mut [f32],
) -> CrossEntropy {
    let w = |i: usize, j: usize| f64::from(w[i * row_stride + j * col_stride]);
    let mut dw = vec![0.0_f64; d * v];
    dx_td.fill(0.0);
    let mut total = CrossEntropy::default();
    for (t, &target) in targets.iter().enumerate().filter(|&(_, &target)| target != IGNORED) {
        let x: Vec<f64> = x_td[t * d..(t + 1) * d].iter().map(|&x| f64::from(x)).collect();
        let logits: Vec<f64> = (0..v).map(|j| (0..d).map(|i| x[i] * w(i, j)).sum()).collect();
        let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = logits.iter().map(|l| (l - most).exp()).sum();
        total.loss_sum += most + sum.ln() - logits[target as usize];
        total.counted += 1;
        let dlogits: Vec<f64> = (0..v)
            .map(|j| f64::from(scale) * ((logits[j] - most).exp() / sum - if j == target as usize { 1.0 } else { 0.0 }))
            .collect();
        for i in 0..d {
            dx_td[t * d + i] = (0..v).map(|j| dlogits[j] * w(i, j)).sum::<f64>() as f32;
            for j in 0..v {
                dw[i * v + j] += x[i] * dlogits[j];
            }
        }
    }
    for (out, dw) in dw_dv.iter_mut().zip(dw) {
        *out = dw as f32;
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::MatView;
    use crate::precision::Precision;
    use crate::testing::{assert_same_bits, numbers, pools};

    struct Case {
        d: usize,
        v: usize,
        x: Vec<f32>,
        w: Vec<f32>,
        targets: Vec<u32>,
    }

    impl Case {
        fn new(tokens: usize, d: usize, v: usize, ignored_every: usize) -> Case {
            let targets =
                (0..tokens).map(|t| if t % ignored_every == 1 { IGNORED } else { (t * 31 % v) as u32 }).collect();
            Case { d, v, x: numbers(1, tokens * d), w: numbers(2, d * v), targets }
        }

        /// Result, per-token losses, dx, dw as `[D, V]`.
        fn run(&self, isa: Isa, precision: Precision, tied: bool) -> (CrossEntropy, [Vec<f32>; 3]) {
            let (d, v) = (self.d, self.v);
            // The tied head is the same matrix stored the other way round.
            let stored: Vec<f32> = if tied { transpose(&self.w, d, v) } else { self.w.clone() };
            let view = |rows, cols, flip| {
                if flip { MatView::transposed(&stored, rows, cols) } else { MatView::row_major(&stored, rows, cols) }
            };
            let (rows, cols) = if tied { (v, d) } else { (d, v) };
            let head = PackedB::pack(isa, precision, 1, d, v, view(rows, cols, tied));
            let head_t = PackedB::pack(isa, precision, 1, v, d, view(rows, cols, !tied));
            let (mut losses, mut dx, mut dw) =
                (vec![f32::NAN; self.targets.len()], vec![f32::NAN; self.x.len()], vec![f32::NAN; d * v]);
            let gradient = if tied { HeadGradient::OutIn(&mut dw) } else { HeadGradient::InOut(&mut dw) };
            let total = linear_cross_entropy_forward_backward(
                isa,
                &self.x,
                d,
                &head,
                &head_t,
                &self.targets,
                0.25,
                &mut dx,
                gradient,
                Some(&mut losses),
            );
            assert_eq!(linear_cross_entropy(isa, &self.x, d, &head, &self.targets, None), total);
            (total, [losses, dx, if tied { transpose(&dw, v, d) } else { dw }])
        }
    }

    fn transpose(x: &[f32], rows: usize, cols: usize) -> Vec<f32> {
        (0..rows * cols).map(|i| x[i % rows * cols + i / rows]).collect()
    }

    #[test]
    fn losses_and_gradients_agree_with_f64() {
        for (tokens, d, v, ignored_every, tied) in [(5, 16, 33, 100, false), (70, 24, 19, 3, true), (1, 8, 2, 2, false)]
        {
            let case = Case::new(tokens, d, v, ignored_every);
            let (total, [losses, dx, dw]) = case.run(Isa::current(), Precision::F32, tied);
            let (mut want_dx, mut want_dw) = (vec![0.0; dx.len()], vec![0.0; dw.len()]);
            let want = linear_cross_entropy_reference(
                &case.x,
                d,
                v,
                &case.w,
                v,
                1,
                &case.targets,
                0.25,
                &mut want_dx,
                &mut want_dw,
            );
            assert_eq!(total.counted, want.counted);
            assert!((total.loss_sum - want.loss_sum).abs() < 1e-5 * want.loss_sum.abs(), "{total:?} {want:?}");
            let sum: f64 = losses.iter().map(|&l| f64::from(l)).sum();
            assert!((sum - want.loss_sum).abs() < 1e-5 * sum.abs());
            for (what, ours, want) in [("dx", &dx, &want_dx), ("dw", &dw, &want_dw)] {
                for (i, (a, b)) in ours.iter().zip(want).enumerate() {
                    assert!((a - b).abs() < 2e-6, "{what} {i} is {a}, should be {b}");
                }
            }
        }
    }

    #[test]
    fn the_gradient_of_the_loss_in_f64_agrees_with_finite_differences() {
        let mut case = Case::new(6, 8, 11, 4);
        let loss = |case: &Case| {
            let (mut dx, mut dw) = (vec![0.0; case.x.len()], vec![0.0; case.w.len()]);
            let total =
                linear_cross_entropy_reference(&case.x, 8, 11, &case.w, 11, 1, &case.targets, 0.25, &mut dx, &mut dw);
            (0.25 * total.loss_sum, dx, dw)
        };
        let (_, dx, dw) = loss(&case);
        let h = 1.0 / 1024.0; // exact steps in f32
        for i in 0..case.x.len() {
            let x = case.x[i];
            let mut at = |value: f32| {
                case.x[i] = value;
                loss(&case).0
            };
            let slope = (at(x + h) - at(x - h)) / f64::from((x + h) - (x - h));
            case.x[i] = x;
            assert!((slope - f64::from(dx[i])).abs() < 1e-5, "dx {i}: {} against {slope}", dx[i]);
        }
        for i in 0..case.w.len() {
            let w = case.w[i];
            let mut at = |value: f32| {
                case.w[i] = value;
                loss(&case).0
            };
            let slope = (at(w + h) - at(w - h)) / f64::from((w + h) - (w - h));
            case.w[i] = w;
            assert!((slope - f64::from(dw[i])).abs() < 1e-5, "dw {i}: {} against {slope}", dw[i]);
        }
    }

    #[test]
    fn isa_threads_and_layout_of_the_head_change_no_bit() {
        for precision in [Precision::F32, Precision::Bf16] {
            let case = Case::new(150, 40, 70, 7);
            let (want_total, want) = case.run(Isa::Scalar, precision, false);
            for isa in Isa::available() {
                for (total, got) in pools(|| case.run(isa, precision, true)) {
                    assert_eq!(total, want_total, "{isa} {precision}");
                    for (what, (got, want)) in ["losses", "dx", "dw"].iter().zip(got.iter().zip(&want)) {
                        assert_same_bits(&format!("{isa} {precision} {what}"), got, want);
                    }
                }
            }
        }
    }

    #[test]
    fn ignored_tokens_leave_the_others_as_they_were() {
        let all = Case::new(300, 16, 32, 1000);
        let mut some = Case::new(300, 16, 32, 1000);
        some.targets[200..].fill(IGNORED);
        let (_, [losses, dx, _]) = some.run(Isa::current(), Precision::F32, false);
        let (_, [all_losses, all_dx, _]) = all.run(Isa::current(), Precision::F32, false);
        assert_same_bits("losses", &losses[..200], &all_losses[..200]);
        assert_same_bits("dx", &dx[..200 * 16], &all_dx[..200 * 16]);
        assert!(losses[200..].iter().chain(&dx[200 * 16..]).all(|&x| x == 0.0));
        some.targets.fill(IGNORED);
        let (total, [losses, dx, dw]) = some.run(Isa::current(), Precision::F32, false);
        assert_eq!(total, CrossEntropy::default());
        assert!(losses.iter().chain(&dx).chain(&dw).all(|&x| x == 0.0));
    }

    #[test]
    #[should_panic(expected = "target 9 of token 1, the vocabulary has 8")]
    fn a_target_outside_the_vocabulary_is_named() {
        let head = PackedB::pack(Isa::Scalar, Precision::F32, 1, 4, 8, MatView::row_major(&[0.0; 32], 4, 8));
        linear_cross_entropy(Isa::Scalar, &[0.0; 8], 4, &head, &[3, 9], None);
    }
}
