//! Attention one (row, head) at a time: the specification of the fast files, with the same bits.

use super::rope::RopeTable;
use super::{AttentionSaved, AttentionSpec, KEY_BLOCK, QkNorm};
use crate::lanes::{LANES, Lanes, Portable};
use crate::norm::{GAMMA_BLOCK_ROWS, Products, backward_row_in_place, inverse_rms_body, row_sum};
use crate::vmath;
use std::f32::consts::{LN_2, LOG2_E};

/// Queries `[T, H, P]` (normed, clamped, rotated, times scale log2 e), keys `[T, G, P]` (normed, clamped, rotated) and values
/// `[T, G, P]` (clamped).
struct Projections {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

fn project(spec: &AttentionSpec, qkv: &[f32], q_norm: Option<&[f32]>, k_norm: Option<&[f32]>) -> Projections {
    let (heads, kv_heads, p) = (spec.heads, spec.kv_heads, spec.head_dim);
    let rope = RopeTable::get(spec.rope_theta, p, spec.seq);
    let mut all = Projections { q: Vec::new(), k: Vec::new(), v: Vec::new() };
    for (t, row) in qkv.chunks_exact(spec.qkv_width()).enumerate() {
        let (q, rest) = row.split_at(heads * p);
        let (k, v) = rest.split_at(kv_heads * p);
        let (mut q, mut k, mut v) = (q.to_vec(), k.to_vec(), v.to_vec());
        norm_row(spec, &mut q, q_norm);
        norm_row(spec, &mut k, k_norm);
        if let Some(clip) = spec.clip {
            q.iter_mut().chain(&mut k).chain(&mut v).for_each(|x| *x = x.clamp(-clip, clip));
        }
        for head in q.chunks_exact_mut(p).chain(k.chunks_exact_mut(p)) {
            rotate(head, rope.row(t % spec.seq));
        }
        q.iter_mut().for_each(|q| *q *= spec.scale * LOG2_E);
        all.q.extend(q);
        all.k.extend(k);
        all.v.extend(v);
    }
    all
}

fn norm_row(spec: &AttentionSpec, row: &mut [f32], gamma: Option<&[f32]>) {
    let Some(gamma) = gamma else { return };
    for part in row.chunks_exact_mut(gamma.len()) {
        let r = inverse_rms_body::<Portable>(part, spec.norm_eps);
        for (x, &gamma) in part.iter_mut().zip(gamma) {
            *x = *x * r * gamma;
        }
    }
}

fn rotate(head: &mut [f32], (cos, sin): (&[f32], &[f32])) {
    let half = head.len() / 2;
    for i in 0..half {
        let (a, b) = (head[i], head[i + half]);
        head[i] = (-b).mul_add(sin[i], a * cos[i]);
        head[i + half] = a.mul_add(sin[i], b * cos[i]);
    }
}

/// The transpose of [`rotate`].
fn rotate_back(head: &mut [f32], (cos, sin): (&[f32], &[f32])) {
    let half = head.len() / 2;
    for i in 0..half {
        let (a, b) = (head[i], head[i + half]);
        head[i] = b.mul_add(sin[i], a * cos[i]);
        head[i + half] = (-a).mul_add(sin[i], b * cos[i]);
    }
}

/// One chain of FMAs.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (&a, &b)| a.mul_add(b, sum))
}

/// [`super::attention_forward`], one (row, head) at a time; the same bits.
pub fn attention_forward_reference(
    spec: &AttentionSpec,
    qkv: &[f32],
    q_norm: Option<&[f32]>,
    k_norm: Option<&[f32]>,
    out: &mut [f32],
    mut saved: Option<&mut AttentionSaved>,
) {
    const NAME: &str = "attention_forward_reference";
    spec.check(NAME, q_norm, k_norm);
    spec.check_rows(NAME, "qkv", qkv.len(), spec.qkv_width());
    spec.check_rows(NAME, "out", out.len(), spec.out_width());
    if let Some(saved) = saved.as_deref_mut() {
        saved.log_sum_exp = vec![0.0; spec.tokens() * spec.heads];
    }
    let (heads, p) = (spec.heads, spec.head_dim);
    let rows = project(spec, qkv, q_norm, k_norm);
    for t in 0..spec.tokens() {
        let first = t - t % spec.seq;
        for h in 0..heads {
            let q = &rows.q[(t * heads + h) * p..][..p];
            let kv = |token: usize| {
                (token * spec.kv_heads + h / spec.group()) * p..(token * spec.kv_heads + h / spec.group() + 1) * p
            };
            let (mut most, mut sums) = (f32::NEG_INFINITY, [0.0_f32; LANES]);
            let mut acc = vec![0.0_f32; p];
            for block in (first..=t).step_by(KEY_BLOCK) {
                let keys = block..(block + KEY_BLOCK).min(t + 1);
                let scores: Vec<f32> = keys.clone().map(|key| dot(q, &rows.k[kv(key)])).collect();
                let new_most = scores.iter().fold(most, |most, &s| if s > most { s } else { most });
                let shrink = vmath::exp2(most - new_most);
                most = new_most;
                sums.iter_mut().chain(&mut acc).for_each(|x| *x *= shrink);
                for (j, (key, s)) in keys.zip(scores).enumerate() {
                    let e = vmath::exp2(s - most);
                    sums[j % LANES] += e;
                    for (acc, &v) in acc.iter_mut().zip(&rows.v[kv(key)]) {
                        *acc = e.mul_add(v, *acc);
                    }
                }
            }
            let sum = Portable::load(&sums).sum_across();
            let inverse = 1.0 / sum;
            for (out, acc) in out[(t * heads + h) * p..][..p].iter_mut().zip(acc) {
                *out = acc * inverse;
            }
            if let Some(saved) = saved.as_deref_mut() {
                saved.log_sum_exp[t * heads + h] = vmath::log(sum).mul_add(LOG2_E, most);
            }
        }
    }
}

/// [`super::attention_backward`], one (row, head) at a time; the same bits.
pub fn attention_backward_reference(
    spec: &AttentionSpec,
    dout: &[f32],
    out: &[f32],
    qkv: &[f32],
    q_norm: Option<&[f32]>,
    k_norm: Option<&[f32]>,
    saved: &AttentionSaved,
    dqkv: &mut [f32],
    dq_norm: Option<&mut [f32]>,
    dk_norm: Option<&mut [f32]>,
) {
    let gammas = [q_norm, k_norm, dq_norm.as_deref(), dk_norm.as_deref()];
    let lengths = [qkv.len(), dqkv.len(), out.len(), dout.len(), saved.log_sum_exp.len()];
    spec.check_backward("attention_backward_reference", gammas, lengths);
    let (heads, kv_heads, p, width) = (spec.heads, spec.kv_heads, spec.head_dim, spec.qkv_width());
    let rows = project(spec, qkv, q_norm, k_norm);
    dqkv.fill(0.0);
    for h in 0..heads {
        for t in 0..spec.tokens() {
            let at = (t * heads + h) * p..(t * heads + h + 1) * p;
            let (q, dout, out) = (&rows.q[at.clone()], &dout[at.clone()], &out[at]);
            let delta = row_sum::<Portable>(p, &Products(dout, out));
            for key in t - t % spec.seq..=t {
                let kv = (key * kv_heads + h / spec.group()) * p..(key * kv_heads + h / spec.group() + 1) * p;
                let (k, v) = (&rows.k[kv.clone()], &rows.v[kv]);
                let probability = vmath::exp2(dot(q, k) - saved.log_sum_exp[t * heads + h]);
                let dscore = probability * (dot(dout, v) - delta);
                for i in 0..p {
                    let dq = &mut dqkv[t * width + h * p + i];
                    *dq = dscore.mul_add(k[i], *dq);
                    let dk = &mut dqkv[key * width + (heads + h / spec.group()) * p + i];
                    *dk = dscore.mul_add(q[i], *dk);
                    let dv = &mut dqkv[key * width + (heads + kv_heads + h / spec.group()) * p + i];
                    *dv = probability.mul_add(dout[i], *dv);
                }
            }
        }
    }
    let rope = RopeTable::get(spec.rope_theta, p, spec.seq);
    for (t, row) in dqkv.chunks_exact_mut(width).enumerate() {
        let (dq, rest) = row.split_at_mut(heads * p);
        let dk = &mut rest[..kv_heads * p];
        dq.iter_mut().for_each(|dq| *dq *= spec.scale);
        dk.iter_mut().for_each(|dk| *dk *= LN_2); // q carried log2(e)
        for head in dq.chunks_exact_mut(p).chain(dk.chunks_exact_mut(p)) {
            rotate_back(head, rope.row(t % spec.seq));
        }
        let Some(clip) = spec.clip else { continue };
        let mut x = qkv[t * width..(t + 1) * width].to_vec();
        let (q, kv) = x.split_at_mut(heads * p);
        norm_row(spec, q, q_norm);
        norm_row(spec, &mut kv[..kv_heads * p], k_norm);
        row.iter_mut().zip(&x).filter(|(_, x)| x.abs() > clip).for_each(|(d, _)| *d = 0.0);
    }
    for (start, norm, dnorm) in [(0, q_norm, dq_norm), (heads * p, k_norm, dk_norm)] {
        let (Some(gamma), Some(dgamma)) = (norm, dnorm) else { continue };
        let columns = match spec.qk_norm {
            Some(QkNorm::PerHead) => p * if start == 0 { heads } else { kv_heads },
            _ => gamma.len(),
        };
        dgamma.fill(0.0);
        let blocks = (0..spec.batch).flat_map(|batch| {
            let tokens = batch * spec.seq..(batch + 1) * spec.seq;
            tokens.clone().step_by(GAMMA_BLOCK_ROWS).map(move |from| from..(from + GAMMA_BLOCK_ROWS).min(tokens.end))
        });
        for block in blocks {
            let mut partial = vec![0.0; gamma.len()];
            for t in block {
                for c in (t * width + start..t * width + start + columns).step_by(gamma.len()) {
                    let part = c..c + gamma.len();
                    backward_row_in_place::<Portable>(
                        &qkv[part.clone()],
                        gamma,
                        spec.norm_eps,
                        &mut dqkv[part],
                        &mut partial,
                    );
                }
            }
            for (sum, partial) in dgamma.iter_mut().zip(partial) {
                *sum += partial;
            }
        }
    }
}
