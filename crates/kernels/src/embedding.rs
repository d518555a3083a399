//! Embedding: row lookup, and the scatter-add of its gradient.
//!
//! Backward sorts the tokens by id (stable), then every table row sums its own tokens in token order: no atomics, and the number of
//! threads cannot change the order of a sum.

use crate::bf16;
use crate::isa::Isa;
use crate::lanes::{LANES, Lanes, per_isa};
use crate::norm::{load_n, store_n};
use rayon::prelude::*;

/// Elements one task should have to be worth its scheduling.
const TASK_ELEMENTS: usize = 1 << 15;

/// `out[t] = table[ids[t]]`, rows of `d` values.
///
/// # Panics
/// If an id is not below the number of table rows, or the shapes disagree.
pub fn embedding_forward(_isa: Isa, table_vd: &[f32], d: usize, ids: &[u32], out_td: &mut [f32]) {
    check("embedding_forward", table_vd.len(), d, ids, out_td.len());
    look_up(table_vd, d, ids, out_td, |row, out| out.copy_from_slice(row));
}

/// [`embedding_forward`] from a table in bf16, widened.
///
/// # Panics
/// If an id is not below the number of table rows, or the shapes disagree.
pub fn embedding_forward_bf16(_isa: Isa, table_vd: &[u16], d: usize, ids: &[u32], out_td: &mut [f32]) {
    check("embedding_forward_bf16", table_vd.len(), d, ids, out_td.len());
    look_up(table_vd, d, ids, out_td, |row, out| {
        out.iter_mut().zip(row).for_each(|(out, &bits)| *out = bf16::to_f32(bits));
    });
}

/// Writes the row of every token, many tokens to a task.
fn look_up<T: Sync>(
    table_vd: &[T],
    d: usize,
    ids: &[u32],
    out_td: &mut [f32],
    write: impl Fn(&[T], &mut [f32]) + Sync,
) {
    let tokens_per_task = TASK_ELEMENTS.div_ceil(d);
    out_td.par_chunks_mut(tokens_per_task * d).zip(ids.par_chunks(tokens_per_task)).for_each(|(out, ids)| {
        for (out, &id) in out.chunks_exact_mut(d).zip(ids) {
            write(&table_vd[id as usize * d..][..d], out);
        }
    });
}

/// `dtable[v] = sum of dy[t] over the tokens t with ids[t] = v`, in token order; added to what is there if `accumulate`.
///
/// # Panics
/// If an id is not below the number of table rows, or the shapes disagree.
pub fn embedding_backward(isa: Isa, dy_td: &[f32], d: usize, ids: &[u32], dtable_vd: &mut [f32], accumulate: bool) {
    check("embedding_backward", dtable_vd.len(), d, ids, dy_td.len());
    let vocab = dtable_vd.len() / d;
    let mut offsets = vec![0_usize; vocab + 1];
    for &id in ids {
        offsets[id as usize + 1] += 1;
    }
    for v in 0..vocab {
        offsets[v + 1] += offsets[v];
    }
    let mut next = offsets.clone();
    let mut tokens = vec![0_u32; ids.len()];
    for (t, &id) in ids.iter().enumerate() {
        tokens[next[id as usize]] = t as u32;
        next[id as usize] += 1;
    }
    // Few rows per task: common tokens make some rows far heavier than others.
    let rows_per_task = vocab.div_ceil(64).min(TASK_ELEMENTS.div_ceil(d)).max(1);
    dtable_vd.par_chunks_mut(rows_per_task * d).enumerate().for_each(|(task, rows)| {
        for (i, row) in rows.chunks_exact_mut(d).enumerate() {
            let v = task * rows_per_task + i;
            if !accumulate {
                row.fill(0.0);
            }
            add_rows(isa, dy_td, &tokens[offsets[v]..offsets[v + 1]], row);
        }
    });
}

fn check(name: &str, table: usize, d: usize, ids: &[u32], tokens: usize) {
    assert!(d > 0 && table.is_multiple_of(d), "{name}: a table of {table} values has no rows of {d}");
    assert_eq!(tokens, ids.len() * d, "{name}: {} ids of {d} values each, the other slice has {tokens}", ids.len());
    if let Some(&id) = ids.iter().find(|&&id| id as usize >= table / d) {
        panic!("{name}: id {id}, the table has {} rows", table / d);
    }
}

per_isa! {
    fn add_rows = add_rows_body(dy_td: &[f32], tokens: &[u32], row: &mut [f32]);
}

#[inline(always)]
fn add_rows_body<L: Lanes>(dy_td: &[f32], tokens: &[u32], row: &mut [f32]) {
    let d = row.len();
    for i in (0..d).step_by(LANES) {
        let n = LANES.min(d - i);
        let mut sum = load_n::<L>(row, i, n);
        for &t in tokens {
            sum = sum.add(load_n::<L>(dy_td, t as usize * d + i, n));
        }
        store_n(sum, row, i, n);
    }
}

/// [`embedding_forward`], one token after the other.
pub fn embedding_forward_reference(table_vd: &[f32], d: usize, ids: &[u32], out_td: &mut [f32]) {
    for (t, &id) in ids.iter().enumerate() {
        out_td[t * d..(t + 1) * d].copy_from_slice(&table_vd[id as usize * d..(id as usize + 1) * d]);
    }
}

/// [`embedding_backward`], one token after the other; the same bits.
pub fn embedding_backward_reference(dy_td: &[f32], d: usize, ids: &[u32], dtable_vd: &mut [f32], accumulate: bool) {
    if !accumulate {
        dtable_vd.fill(0.0);
    }
    for (t, &id) in ids.iter().enumerate() {
        for i in 0..d {
            dtable_vd[id as usize * d + i] += dy_td[t * d + i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_same_bits, numbers, pools};

    #[test]
    fn a_table_in_bf16_gives_its_numbers_widened() {
        let (tokens, d, v) = (900, 20, 7);
        let table: Vec<u16> = numbers(1, v * d).into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = table.iter().map(|&bits| bf16::to_f32(bits)).collect();
        let ids: Vec<u32> = (0..tokens).map(|t| (t * t * 7 % v) as u32).collect();
        let (mut want, mut found) = (vec![0.0; tokens * d], vec![7.0; tokens * d]);
        embedding_forward_reference(&wide, d, &ids, &mut want);
        embedding_forward_bf16(Isa::current(), &table, d, &ids, &mut found);
        assert_same_bits("bf16", &found, &want);
    }

    #[test]
    fn every_isa_and_number_of_threads_gives_the_bits_of_the_reference() {
        for (tokens, d, v) in [(0, 4, 3), (1, 1, 1), (50, 20, 7), (900, 64, 300)] {
            let (table, dy) = (numbers(1, v * d), numbers(2, tokens * d));
            let ids: Vec<u32> = (0..tokens).map(|t| (t * t * 7 % v) as u32).collect();
            let mut want = vec![0.0; tokens * d];
            embedding_forward_reference(&table, d, &ids, &mut want);
            for accumulate in [false, true] {
                let mut want_gradient = numbers(3, v * d);
                embedding_backward_reference(&dy, d, &ids, &mut want_gradient, accumulate);
                for isa in Isa::available() {
                    let both = pools(|| {
                        let (mut out, mut gradient) = (vec![7.0; tokens * d], numbers(3, v * d));
                        embedding_forward(isa, &table, d, &ids, &mut out);
                        embedding_backward(isa, &dy, d, &ids, &mut gradient, accumulate);
                        (out, gradient)
                    });
                    for (out, gradient) in both {
                        assert_same_bits("out", &out, &want);
                        assert_same_bits(&format!("gradient, {isa}"), &gradient, &want_gradient);
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "id 3, the table has 3 rows")]
    fn an_id_outside_the_table_is_named() {
        embedding_forward(Isa::Scalar, &[0.0; 6], 2, &[0, 3], &mut [0.0; 4]);
    }
}
