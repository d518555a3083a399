//! Attention of new tokens over the keys and values of earlier ones, for generation. No autodiff.
//!
//! The caches are the host's: a tensor on another device than Flex, or of another float type, goes there and back.
//!
//! A token's result has the same bits as in [`causal_attention`](crate::causal_attention) over the whole sequence, however the
//! sequence is cut into calls: prefill is one call with `spec.seq` the prompt's length, then one call per token.

use burn::backend::Flex;
use burn::tensor::Tensor;

use crate::attention::check;
use crate::buffers::buffer;
use crate::fused::{slice, tensor_of};
use crate::host::{like, on_flex};
use crate::{AttentionSpec, Numerics, with_slice};
use mixtura_kernels::attention as kernel;
pub use mixtura_kernels::attention::KvCache;

/// [`attention_decode`] for sequences with different numbers of new tokens: `new[s]` of sequence `s`, one sequence after the other in
/// `qkv_tc`. Of `spec`, `batch` and `seq` are not used.
///
/// # Shapes
/// `[sum of new, (H + 2 G) P]` gives `[sum of new, H P]`.
///
/// # Panics
/// If the sizes disagree with `spec`, or there is not one cache for each sequence.
pub fn attention_decode_ragged(
    qkv_tc: Tensor<2>,
    q_norm: Option<Tensor<1>>,
    k_norm: Option<Tensor<1>>,
    spec: &AttentionSpec,
    new: &[usize],
    caches: &mut [&mut KvCache],
    numerics: Numerics,
) -> Tensor<2> {
    let tokens = new.iter().sum();
    let spec = AttentionSpec { batch: 1, seq: tokens, ..*spec };
    let norms = check(qkv_tc.dims(), q_norm, k_norm, &spec);
    assert_eq!(caches.len(), new.len(), "attention_decode: {} caches for {} sequences", caches.len(), new.len());
    let qkv_tc = qkv_tc.inner();
    let (device, dtype) = (qkv_tc.device(), qkv_tc.dtype());
    let Ok(qkv) = on_flex(qkv_tc).try_into_primitive::<Flex>() else { unreachable!("moved to Flex") };
    let mut out = buffer(tokens * spec.out_width());
    let qkv = qkv.to_contiguous();
    let mut run = |q_norm: Option<&[f32]>, k_norm: Option<&[f32]>| {
        kernel::attention_decode_ragged(numerics.isa, &spec, slice(&qkv), q_norm, k_norm, new, caches, &mut out);
    };
    match norms {
        None => run(None, None),
        Some((q, k)) => with_slice(&q, |q| with_slice(&k, |k| run(Some(q), Some(k)))),
    }
    let out = Tensor::from_primitive::<Flex>(tensor_of(out, [tokens, spec.out_width()]));
    like(out, &device, dtype)
}

/// Attention of `spec.seq` new tokens for each of `spec.batch` sequences; their keys and values join the caches.
///
/// `caches` holds one [`KvCache`] per sequence; a new token's position is its cache's length.
///
/// # Shapes
/// `[batch * seq, (H + 2 G) P]` gives `[batch * seq, H P]`.
///
/// # Panics
/// If the sizes disagree with `spec`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::{AttentionSpec, KvCache, Numerics, attention_decode};
/// let spec = AttentionSpec::new(1, 1, 1, 1, 2);
/// let mut caches = [KvCache::new(&spec)];
/// let qkv_tc = Tensor::<2>::from_data([[1.0, 0.0, 1.0, 0.0, 5.0, 7.0]], &Device::default());
/// let out = attention_decode(qkv_tc, None, None, &spec, &mut caches, Numerics::default());
/// assert_eq!(out.into_data().try_to_vec::<f32>().unwrap(), [5.0, 7.0]);
/// assert_eq!(caches[0].len(), 1);
/// ```
pub fn attention_decode(
    qkv_tc: Tensor<2>,
    q_norm: Option<Tensor<1>>,
    k_norm: Option<Tensor<1>>,
    spec: &AttentionSpec,
    caches: &mut [KvCache],
    numerics: Numerics,
) -> Tensor<2> {
    let norms = check(qkv_tc.dims(), q_norm, k_norm, spec);
    assert_eq!(caches.len(), spec.batch, "attention_decode: {} caches for {} sequences", caches.len(), spec.batch);
    let qkv_tc = qkv_tc.inner();
    let (device, dtype) = (qkv_tc.device(), qkv_tc.dtype());
    let Ok(qkv) = on_flex(qkv_tc).try_into_primitive::<Flex>() else { unreachable!("moved to Flex") };
    let mut out = vec![0.0; spec.tokens() * spec.out_width()];
    let qkv = qkv.to_contiguous();
    let mut run = |q_norm: Option<&[f32]>, k_norm: Option<&[f32]>| {
        kernel::attention_decode(numerics.isa, spec, slice(&qkv), q_norm, k_norm, caches, &mut out);
    };
    match norms {
        None => run(None, None),
        Some((q, k)) => with_slice(&q, |q| with_slice(&k, |k| run(Some(q), Some(k)))),
    }
    let out = Tensor::from_primitive::<Flex>(tensor_of(out, [spec.tokens(), spec.out_width()]));
    like(out, &device, dtype)
}
