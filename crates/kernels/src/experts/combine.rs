//! From rows back to tokens: out_t = sum over the token's choices, in choice order, of weight * row (forward) or of the row (backward).
#![allow(unsafe_code)]

use super::Dispatch;
use crate::isa::Isa;
use crate::lanes::{LANES, Lanes, per_isa};
use crate::parallel::{SharedSlice, for_each_job};

/// Tokens per job: 64 rows of 512 f32 are 128 KiB.
const TOKENS_PER_JOB: usize = 64;

/// Overwrites out_td. A token without rows gets zeros.
pub(super) fn combine(
    isa: Isa,
    rows_nd: &[f32],
    d: usize,
    dispatch: &Dispatch,
    weight_n: Option<&[f32]>,
    out_td: &mut [f32],
) {
    let out = SharedSlice::new(out_td);
    for_each_job(dispatch.tokens.div_ceil(TOKENS_PER_JOB), |job| {
        let tokens = job * TOKENS_PER_JOB..((job + 1) * TOKENS_PER_JOB).min(dispatch.tokens);
        for token in tokens {
            // SAFETY: token `token` belongs to this job alone.
            let out = unsafe { out.slice(token * d, d) };
            let choices = dispatch.token_offsets[token] as usize..dispatch.token_offsets[token + 1] as usize;
            combine_token(isa, rows_nd, d, &dispatch.row_of_choice[choices], weight_n, out);
        }
    });
}

per_isa! {
    fn combine_token = combine_token_body(rows_nd: &[f32], d: usize, rows: &[u32], weight_n: Option<&[f32]>, out: &mut [f32]);
}

#[inline(always)]
fn combine_token_body<L: Lanes>(rows_nd: &[f32], d: usize, rows: &[u32], weight_n: Option<&[f32]>, out: &mut [f32]) {
    let mut at = 0;
    while at < d {
        let width = LANES.min(d - at);
        let mut sum = L::splat(0.0);
        for &row in rows {
            let row = row as usize;
            let source = &rows_nd[row * d + at..][..width];
            let value = if width == LANES { L::load(source) } else { L::load_first(source, 0.0) };
            sum = match weight_n {
                Some(weight_n) => L::splat(weight_n[row]).mul_add(value, sum),
                None => sum.add(value),
            };
        }
        if width == LANES {
            sum.store(&mut out[at..])
        } else {
            sum.store_first(&mut out[at..])
        }
        at += LANES;
    }
}
