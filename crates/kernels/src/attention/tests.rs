//! Attention against its reference (bits), against f64 (tolerance, finite differences), and against itself: other rows, other threads,
//! token by token.

use super::*;
use crate::isa::Isa;
use crate::testing::{numbers, pools};

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

struct Case {
    spec: AttentionSpec,
    qkv: Vec<f32>,
    dout: Vec<f32>,
    q_norm: Option<Vec<f32>>,
    k_norm: Option<Vec<f32>>,
}

impl Case {
    fn new(mut spec: AttentionSpec, qk_norm: Option<QkNorm>, seed: u64) -> Case {
        spec.qk_norm = qk_norm;
        let lengths = match qk_norm {
            None => None,
            Some(QkNorm::FullProjection) => Some((spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim)),
            Some(QkNorm::PerHead) => Some((spec.head_dim, spec.head_dim)),
        };
        let gamma = |len: usize, seed: u64| numbers(seed, len).into_iter().map(|x| 1.0 + 0.3 * x).collect::<Vec<f32>>();
        Case {
            spec,
            qkv: numbers(seed, spec.tokens() * spec.qkv_width()).into_iter().map(|x| 1.5 * x).collect(),
            dout: numbers(seed + 1, spec.tokens() * spec.out_width()),
            q_norm: lengths.map(|l| gamma(l.0, seed + 2)),
            k_norm: lengths.map(|l| gamma(l.1, seed + 3)),
        }
    }

    /// Output, log-sum-exp, dqkv, dq_norm, dk_norm.
    fn run(&self, isa: Option<Isa>) -> [Vec<f32>; 5] {
        let (q_norm, k_norm) = (self.q_norm.as_deref(), self.k_norm.as_deref());
        let mut out = vec![f32::NAN; self.spec.tokens() * self.spec.out_width()];
        let mut dqkv = vec![f32::NAN; self.qkv.len()];
        let mut dq_norm = q_norm.map(|g| vec![f32::NAN; g.len()]);
        let mut dk_norm = k_norm.map(|g| vec![f32::NAN; g.len()]);
        let mut saved = AttentionSaved::default();
        let (s, dq, dk) = (&self.spec, dq_norm.as_deref_mut(), dk_norm.as_deref_mut());
        match isa {
            Some(isa) => {
                attention_forward(isa, s, &self.qkv, q_norm, k_norm, &mut out, Some(&mut saved));
                attention_backward(isa, s, &self.dout, &out, &self.qkv, q_norm, k_norm, &saved, &mut dqkv, dq, dk);
            }
            None => {
                attention_forward_reference(s, &self.qkv, q_norm, k_norm, &mut out, Some(&mut saved));
                attention_backward_reference(s, &self.dout, &out, &self.qkv, q_norm, k_norm, &saved, &mut dqkv, dq, dk);
            }
        }
        [out, saved.log_sum_exp, dqkv, dq_norm.unwrap_or_default(), dk_norm.unwrap_or_default()]
    }
}

const WHAT: [&str; 5] = ["output", "log-sum-exp", "dqkv", "dq_norm", "dk_norm"];
const CLIPS: [Option<f32>; 2] = [None, Some(0.6)];
const NORMS: [Option<QkNorm>; 3] = [None, Some(QkNorm::FullProjection), Some(QkNorm::PerHead)];

#[test]
fn every_isa_gives_the_bits_of_the_reference() {
    // batch, seq, heads, kv_heads, head_dim
    let shapes = [
        (1, 1, 1, 1, 2),
        (2, 7, 2, 1, 6),
        (1, 37, 4, 2, 16),
        (2, 65, 2, 2, 32),
        (1, 130, 4, 1, 64),
        (1, 300, 2, 1, 24),
        (1, 150, 1, 1, 128),
    ];
    for (i, &(batch, seq, heads, kv_heads, head_dim)) in shapes.iter().enumerate() {
        let shape = AttentionSpec::new(batch, seq, heads, kv_heads, head_dim);
        let unclamped = Case::new(shape, NORMS[i % 3], 40 + i as u64).run(None);
        for clip in CLIPS {
            let case = Case::new(AttentionSpec { clip, ..shape }, NORMS[i % 3], 40 + i as u64);
            let want = case.run(None);
            assert_eq!(clip.is_some(), want[0] != unclamped[0], "a bound that binds changes the output");
            for isa in Isa::available() {
                for (what, (ours, want)) in WHAT.iter().zip(case.run(Some(isa)).iter().zip(&want)) {
                    let first = ours.iter().zip(want).position(|(a, b)| a.to_bits() != b.to_bits());
                    assert!(first.is_none(), "{isa}, {:?}: {what} differs at {first:?}", case.spec);
                }
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    for (batch, seq, heads, kv_heads) in [(1, 333, 4, 2), (3, 70, 2, 1)] {
        let case = Case::new(AttentionSpec::new(batch, seq, heads, kv_heads, 32), Some(QkNorm::FullProjection), 7);
        let results: Vec<[Vec<f32>; 5]> = [1, 2, 3, 16]
            .iter()
            .map(|&threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| case.run(Some(Isa::current())))
            })
            .collect();
        for other in &results[1..] {
            for (what, (a, b)) in WHAT.iter().zip(results[0].iter().zip(other)) {
                assert_eq!(bits(a), bits(b), "{what}");
            }
        }
    }
}

#[test]
fn decoding_gives_the_bits_of_the_forward_pass() {
    for (i, (heads, kv_heads, head_dim)) in [(4, 2, 16), (19, 1, 64), (2, 2, 40)].into_iter().enumerate() {
        for isa in Isa::available() {
            let seq = if isa == Isa::Scalar { 40 } else { 291 };
            let spec = AttentionSpec { clip: CLIPS[i % 2], ..AttentionSpec::new(2, seq, heads, kv_heads, head_dim) };
            let case = Case::new(spec, NORMS[i], 90);
            let (q_norm, k_norm) = (case.q_norm.as_deref(), case.k_norm.as_deref());
            let (width, out_width) = (case.spec.qkv_width(), case.spec.out_width());
            let mut want = vec![0.0; case.spec.tokens() * out_width];
            attention_forward(isa, &case.spec, &case.qkv, q_norm, k_norm, &mut want, None);
            let mut caches = vec![KvCache::new(&case.spec); 2];
            // A long prompt, single tokens across a panel edge, a few short runs, the rest.
            let mut position = 0;
            let mut runs = [19, 1, 1, 1, 15, 1, 70, 1, 16, 1, 3, 1].into_iter();
            while position < seq {
                let n = runs.next().unwrap_or(seq).min(seq - position);
                let spec = AttentionSpec { seq: n, ..case.spec };
                let rows = |x: &[f32], width: usize| -> Vec<f32> {
                    (0..2)
                        .flat_map(|b| x[(b * seq + position) * width..(b * seq + position + n) * width].to_vec())
                        .collect()
                };
                let mut out = vec![f32::NAN; 2 * n * out_width];
                attention_decode(isa, &spec, &rows(&case.qkv, width), q_norm, k_norm, &mut caches, &mut out);
                assert_eq!(
                    bits(&out),
                    bits(&rows(&want, out_width)),
                    "{isa}, {:?}: positions {position}..{}",
                    NORMS[i],
                    position + n
                );
                position += n;
            }
            // Going back and decoding again finds the same.
            caches.iter_mut().for_each(|cache| cache.truncate(seq - 2));
            let spec = AttentionSpec { seq: 2, ..case.spec };
            let last = |x: &[f32], width: usize| -> Vec<f32> {
                (0..2).flat_map(|b| x[(b * seq + seq - 2) * width..(b + 1) * seq * width].to_vec()).collect()
            };
            let mut out = vec![f32::NAN; 4 * out_width];
            attention_decode(isa, &spec, &last(&case.qkv, width), q_norm, k_norm, &mut caches, &mut out);
            assert_eq!(bits(&out), bits(&last(&want, out_width)), "{isa}, {:?}: after truncation", NORMS[i]);
        }
    }
}

#[test]
fn a_row_depends_on_earlier_rows_of_its_sequence_only() {
    let case = Case::new(AttentionSpec::new(2, 140, 2, 1, 32), Some(QkNorm::PerHead), 5);
    let isa = Isa::current();
    let [want, ..] = case.run(Some(isa));
    let (cut, width, out_width) = (77, case.spec.qkv_width(), case.spec.out_width());
    let mut other = Case::new(case.spec, case.spec.qk_norm, 5);
    other.qkv[cut * width..].iter_mut().for_each(|x| *x = f32::NAN);
    let [out, ..] = other.run(Some(isa));
    assert_eq!(bits(&out[..cut * out_width]), bits(&want[..cut * out_width]));
    // The second sequence alone.
    let spec = AttentionSpec { batch: 1, ..case.spec };
    let mut alone = vec![0.0; spec.tokens() * out_width];
    let (q_norm, k_norm) = (case.q_norm.as_deref(), case.k_norm.as_deref());
    attention_forward(isa, &spec, &case.qkv[140 * width..], q_norm, k_norm, &mut alone, None);
    assert_eq!(bits(&alone), bits(&want[140 * out_width..]));
}

/// Textbook attention in f64: the whole score matrix, a softmax per row.
fn naive_f64(spec: &AttentionSpec, qkv: &[f64], q_norm: &[f64], k_norm: &[f64]) -> Vec<f64> {
    let (p, width) = (spec.head_dim, spec.qkv_width());
    let norm = |row: &[f64], gamma: &[f64]| -> Vec<f64> {
        if spec.qk_norm.is_none() {
            return row.to_vec();
        }
        row.chunks(gamma.len())
            .flat_map(|part| {
                let r = 1.0
                    / (part.iter().map(|x| x * x).sum::<f64>() / part.len() as f64 + f64::from(spec.norm_eps)).sqrt();
                part.iter().zip(gamma).map(move |(x, g)| x * r * g).collect::<Vec<f64>>()
            })
            .collect()
    };
    let rotate = |head: &[f64], position: usize| -> Vec<f64> {
        let half = p / 2;
        (0..p)
            .map(|i| {
                let angle = position as f64 * spec.rope_theta.powf(-2.0 * (i % half) as f64 / p as f64);
                let other = if i < half { -head[i + half] } else { head[i - half] };
                head[i] * angle.cos() + other * angle.sin()
            })
            .collect()
    };
    let mut out = vec![0.0; spec.tokens() * spec.out_width()];
    for b in 0..spec.batch {
        let row = |s: usize| &qkv[(b * spec.seq + s) * width..][..width];
        for h in 0..spec.heads {
            let g = h / (spec.heads / spec.kv_heads);
            let clamp = |head: &[f64]| -> Vec<f64> {
                let most = spec.clip.map_or(f64::INFINITY, f64::from);
                head.iter().map(|x| x.clamp(-most, most)).collect()
            };
            let q = |s: usize| rotate(&clamp(&norm(&row(s)[..spec.heads * p], q_norm)[h * p..(h + 1) * p]), s);
            let k_columns = spec.heads * p..(spec.heads + spec.kv_heads) * p;
            let keys: Vec<Vec<f64>> = (0..spec.seq)
                .map(|s| rotate(&clamp(&norm(&row(s)[k_columns.clone()], k_norm)[g * p..(g + 1) * p]), s))
                .collect();
            for s in 0..spec.seq {
                let q = q(s);
                let e: Vec<f64> = (0..=s)
                    .map(|j| (q.iter().zip(&keys[j]).map(|(a, b)| a * b).sum::<f64>() * f64::from(spec.scale)).exp())
                    .collect();
                let sum: f64 = e.iter().sum();
                for (j, e) in e.iter().enumerate() {
                    for i in 0..p {
                        out[(b * spec.seq + s) * spec.out_width() + h * p + i] +=
                            e / sum * clamp(&[row(j)[(spec.heads + spec.kv_heads + g) * p + i]])[0];
                    }
                }
            }
        }
    }
    out
}

#[test]
fn output_and_gradients_agree_with_textbook_attention_in_f64() {
    for (norm, clip) in NORMS.into_iter().flat_map(|norm| CLIPS.map(|clip| (norm, clip))) {
        let mut case = Case::new(AttentionSpec::new(2, 11, 4, 2, 8), norm, 60);
        (case.spec.scale, case.spec.clip) = (0.4, clip);
        let [out, _, dqkv, dq_norm, dk_norm] = case.run(Some(Isa::current()));
        let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|&x| f64::from(x)).collect() };
        let gamma = |x: &Option<Vec<f32>>| wide(x.as_deref().unwrap_or(&[1.0]));
        let mut inputs = [wide(&case.qkv), gamma(&case.q_norm), gamma(&case.k_norm)];
        let want = naive_f64(&case.spec, &inputs[0], &inputs[1], &inputs[2]);
        for (i, (a, b)) in out.iter().zip(&want).enumerate() {
            assert!((f64::from(*a) - b).abs() < 2e-6, "{norm:?}: output {i} is {a}, should be {b}");
        }
        for (which, gradient) in [(0, &dqkv), (1, &dq_norm), (2, &dk_norm)] {
            let stride = if which == 0 { 29 } else { 3 };
            for i in (0..gradient.len()).step_by(stride) {
                let x = inputs[which][i];
                let mut loss = |x: f64| -> f64 {
                    inputs[which][i] = x;
                    let out = naive_f64(&case.spec, &inputs[0], &inputs[1], &inputs[2]);
                    out.iter().zip(&case.dout).map(|(o, &d)| o * f64::from(d)).sum()
                };
                let slope = (loss(x + 1e-5) - loss(x - 1e-5)) / 2e-5;
                inputs[which][i] = x;
                let ours = f64::from(gradient[i]);
                assert!(
                    (ours - slope).abs() < 2e-5 * (1.0 + slope.abs()),
                    "{norm:?}, {clip:?}: {which} {i} is {ours}, should be {slope}"
                );
            }
        }
    }
}

#[test]
fn heads_that_share_a_kv_head_decode_alike_however_many_threads_part_them() {
    // 20 heads fill more than one panel of query rows, 70 more than one block.
    for (heads, kv_heads, head_dim) in [(40, 2, 24), (70, 1, 8)] {
        let case = Case::new(AttentionSpec::new(1, 35, heads, kv_heads, head_dim), None, 91);
        let (width, out_width) = (case.spec.qkv_width(), case.spec.out_width());
        let isa = Isa::current();
        let mut want = vec![0.0; case.spec.tokens() * out_width];
        attention_forward(isa, &case.spec, &case.qkv, None, None, &mut want, None);
        let one = AttentionSpec { seq: 1, ..case.spec };
        for got in pools(|| {
            let mut caches = [KvCache::new(&case.spec)];
            let mut out = vec![f32::NAN; want.len()];
            for (qkv, out) in case.qkv.chunks(width).zip(out.chunks_mut(out_width)) {
                attention_decode(isa, &one, qkv, None, None, &mut caches, out);
            }
            out
        }) {
            assert_eq!(bits(&got), bits(&want), "{heads} heads on {kv_heads}");
        }
    }
}

/// `tokens` rows of qkv for one sequence of the layer.
fn new_rows(spec: &AttentionSpec, tokens: usize, seed: u64) -> Vec<f32> {
    numbers(seed, tokens * spec.qkv_width())
}

#[test]
fn sequences_with_different_numbers_of_new_tokens_decode_as_each_alone() {
    // Held and new: a prompt, single tokens in the first and in a later page, none, over the end of a page, up to it, a long one.
    let (held, new) = ([0, 5, 130, 127, 120, 260, 0], [19, 1, 0, 2, 8, 1, 140]);
    for (i, (heads, kv_heads, head_dim)) in [(4, 2, 16), (19, 1, 24), (2, 2, 40)].into_iter().enumerate() {
        let case = Case::new(AttentionSpec::new(1, 1, heads, kv_heads, head_dim), NORMS[i], 95);
        let (q_norm, k_norm) = (case.q_norm.as_deref(), case.k_norm.as_deref());
        for isa in Isa::available() {
            let run = |tokens: usize, qkv: &[f32], cache: &mut KvCache| {
                let mut out = vec![f32::NAN; tokens * case.spec.out_width()];
                let spec = AttentionSpec { seq: tokens, ..case.spec };
                attention_decode(isa, &spec, qkv, q_norm, k_norm, std::slice::from_mut(cache), &mut out);
                out
            };
            let held: Vec<KvCache> = held
                .into_iter()
                .zip(100..)
                .map(|(tokens, seed)| {
                    let mut cache = KvCache::new(&case.spec);
                    run(tokens, &new_rows(&case.spec, tokens, seed), &mut cache);
                    cache
                })
                .collect();
            let qkv: Vec<Vec<f32>> =
                new.into_iter().zip(200..).map(|(tokens, seed)| new_rows(&case.spec, tokens, seed)).collect();
            let mut alone = held.clone();
            let want: Vec<f32> = alone
                .iter_mut()
                .zip(&qkv)
                .zip(new)
                .flat_map(|((cache, qkv), tokens)| run(tokens, qkv, cache))
                .collect();
            for (threads, (together, got)) in pools(|| {
                let mut together = held.clone();
                let mut got = vec![f32::NAN; want.len()];
                let mut caches: Vec<&mut KvCache> = together.iter_mut().collect();
                // Neither batch nor seq of the spec counts.
                let spec = AttentionSpec { batch: 3, seq: 11, ..case.spec };
                attention_decode_ragged(isa, &spec, &qkv.concat(), q_norm, k_norm, &new, &mut caches, &mut got);
                (together, got)
            })
            .into_iter()
            .enumerate()
            {
                assert_eq!(bits(&got), bits(&want), "{isa}, {heads} heads on {kv_heads}, {} threads", threads + 1);
                for (at, (mut together, mut alone)) in together.into_iter().zip(alone.clone()).enumerate() {
                    assert_eq!(together.len(), held[at].len() + new[at]);
                    let next = new_rows(&case.spec, 1, 300);
                    let (got, want) = (run(1, &next, &mut together), run(1, &next, &mut alone));
                    assert_eq!(bits(&got), bits(&want), "{isa}, what sequence {at} left in its cache");
                }
            }
        }
    }
}

#[test]
fn a_cache_grows_by_pages_that_stay_where_they_are_and_gives_them_back() {
    let case = Case::new(AttentionSpec::new(1, 300, 4, 2, 24), Some(QkNorm::PerHead), 96);
    let (spec, isa, width, out_width) = (case.spec, Isa::current(), case.spec.qkv_width(), case.spec.out_width());
    let (q_norm, k_norm) = (case.q_norm.as_deref(), case.k_norm.as_deref());
    let mut want = vec![0.0; spec.tokens() * out_width];
    attention_forward(isa, &spec, &case.qkv, q_norm, k_norm, &mut want, None);
    let mut cache = KvCache::new(&spec);
    // 8 panels of 16 tokens: keys of 24 values and values in rows of 32.
    assert_eq!(KvCache::page_bytes(&spec), 8 * 2 * 16 * (24 + 32) * 4);
    let mut places = Vec::new();
    let mut decode = |cache: &mut KvCache, to: usize| {
        let from = cache.len();
        let mut out = vec![f32::NAN; (to - from) * out_width];
        let run = AttentionSpec { seq: to - from, ..spec };
        let qkv = &case.qkv[from * width..to * width];
        attention_decode(isa, &run, qkv, q_norm, k_norm, std::slice::from_mut(cache), &mut out);
        assert_eq!(bits(&out), bits(&want[from * out_width..to * out_width]), "tokens {from}..{to}");
        let now: Vec<*const f32> = cache.blocks().iter().map(|block| block.k_across.as_ptr()).collect();
        assert_eq!(now[..places.len().min(now.len())], places[..places.len().min(now.len())], "a page moved");
        places = now;
    };
    for (to, pages) in [(1, 1), (128, 1), (129, 2), (256, 2), (300, 3)] {
        decode(&mut cache, to);
        assert_eq!((cache.len(), cache.bytes()), (to, pages * KvCache::page_bytes(&spec)));
    }
    for (len, pages) in [(257, 3), (256, 2), (140, 2), (100, 1), (0, 0)] {
        let mut shorter = cache.clone();
        shorter.truncate(len);
        assert_eq!((shorter.len(), shorter.bytes()), (len, pages * KvCache::page_bytes(&spec)));
    }
    // Back into a page, and on over its end with what was there before; the page after it is a new one.
    cache.truncate(100);
    let kept = cache.blocks()[0].k_across.as_ptr();
    let mut out = vec![f32::NAN; 200 * out_width];
    let rest = AttentionSpec { seq: 200, ..spec };
    attention_decode(isa, &rest, &case.qkv[100 * width..], q_norm, k_norm, std::slice::from_mut(&mut cache), &mut out);
    assert_eq!(bits(&out), bits(&want[100 * out_width..]));
    assert_eq!(cache.blocks()[0].k_across.as_ptr(), kept);
    cache.clear();
    assert!(cache.is_empty() && cache.bytes() == 0);
}

#[test]
#[should_panic(expected = "24 values of qkv and 4 of out with 1 caches for new tokens [2, 1]; [3, 6], [3, 2] expected")]
fn rows_that_are_not_those_of_the_new_tokens_are_refused_with_the_shapes() {
    let spec = AttentionSpec::new(1, 1, 1, 1, 2);
    let mut cache = KvCache::new(&spec);
    attention_decode_ragged(Isa::Scalar, &spec, &[0.0; 24], None, None, &[2, 1], &mut [&mut cache], &mut [0.0; 4]);
}
