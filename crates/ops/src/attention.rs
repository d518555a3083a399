//! Rotary causal attention with grouped-query heads, on the fused projection `qkv_tc`.
//!
//! Axes: `t` rows (`batch * seq` tokens, sequence after sequence), `h` query heads, `g` key/value heads, `p` head width. A row of
//! `qkv` holds the `H` query heads, then the `G` key heads, then the `G` value heads. The result has `H * P` columns.
//!
//! Optionally queries and keys are RMS-normalised first (over all heads at once, or each head on its own), optionally queries, keys and
//! values are clamped (OLMoE), then queries and keys are rotated
//! by their position (rotate-half), then `softmax(scale q k^T) v` over the positions up to the row's own. The kernel never holds a
//! `[seq, seq]` matrix, and is f32 in every precision: attention is a small part of the arithmetic and all of the sensitivity.

use burn::backend::Dispatch;
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, DType, Tensor, TensorData};
use burn_flex::FlexTensor;
use mixtura_kernels::attention::{AttentionSaved, attention_backward, attention_forward};

use crate::buffers::{buffer, give_back};
use crate::fused::{self, FlexOp, Fused, slice, tensor_of};
use crate::rms_norm::rms_norm_portable;
use crate::{AttentionSpec, Numerics, QkNorm};

/// Causal attention over `spec.batch` sequences of `spec.seq` tokens.
///
/// `q_norm` and `k_norm` scale the normalised queries and keys; give both if `spec.qk_norm` asks for normalisation, and neither
/// otherwise. With [`QkNorm::FullProjection`] they are `[H * P]` and `[G * P]`, with [`QkNorm::PerHead`] both are `[P]`.
///
/// # Shapes
/// `[T, (H + 2 G) P]` gives `[T, H P]`, `T = batch * seq`.
///
/// # Panics
/// If the sizes disagree with `spec`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::{AttentionSpec, Numerics, causal_attention};
/// // One sequence of two tokens, one head of width 2. The first token sees itself only: its value passes through.
/// let spec = AttentionSpec::new(1, 2, 1, 1, 2);
/// let qkv_tc = Tensor::<2>::from_data([[1.0, 0.0, 1.0, 0.0, 5.0, 7.0], [0.0, 1.0, 0.0, 1.0, 1.0, 1.0]], &Device::default());
/// let out = causal_attention(qkv_tc, None, None, &spec, Numerics::default()).into_data().try_to_vec::<f32>().unwrap();
/// assert_eq!(out[..2], [5.0, 7.0]);
/// ```
pub fn causal_attention(
    qkv_tc: Tensor<2>,
    q_norm: Option<Tensor<1>>,
    k_norm: Option<Tensor<1>>,
    spec: &AttentionSpec,
    numerics: Numerics,
) -> Tensor<2> {
    let norms = check(qkv_tc.dims(), q_norm, k_norm, spec);
    let qkv = qkv_tc.into_dispatch();
    if !fused::is_fused(&qkv) {
        let (q_norm, k_norm) = norms.unzip();
        return causal_attention_portable(Tensor::from_dispatch(qkv), q_norm, k_norm, spec);
    }
    let op = CausalAttention { spec: *spec, numerics };
    Tensor::from_dispatch(match norms {
        None => Dispatch::one(qkv, op),
        Some((q, k)) => Dispatch::three(qkv, q.into_dispatch(), k.into_dispatch(), op),
    })
}

/// [`causal_attention`] in plain Burn operations, on any device. Holds the `[seq, seq]` scores.
pub fn causal_attention_portable(
    qkv_tc: Tensor<2>,
    q_norm: Option<Tensor<1>>,
    k_norm: Option<Tensor<1>>,
    spec: &AttentionSpec,
) -> Tensor<2> {
    let norms = check(qkv_tc.dims(), q_norm, k_norm, spec);
    let (tokens, h, g, p) = (spec.batch * spec.seq, spec.heads, spec.kv_heads, spec.head_dim);
    let mut q = qkv_tc.clone().narrow(1, 0, h * p);
    let mut k = qkv_tc.clone().narrow(1, h * p, g * p);
    let mut v = qkv_tc.narrow(1, (h + g) * p, g * p);
    if let Some((q_norm, k_norm)) = norms {
        let per_head = matches!(spec.qk_norm, Some(QkNorm::PerHead));
        let normed = |x: Tensor<2>, gamma: Tensor<1>, heads: usize| {
            let width = if per_head { p } else { heads * p };
            rms_norm_portable(x.reshape([tokens * heads * p / width, width]), gamma, spec.norm_eps)
                .reshape([tokens, heads * p])
        };
        (q, k) = (normed(q, q_norm, h), normed(k, k_norm, g));
    }
    if let Some(clip) = spec.clip {
        [q, k, v] = [q, k, v].map(|x| x.clamp(-clip, clip));
    }
    // [batch, head, seq, p]; each key/value head serves h / g query heads in a row.
    let split = |x: Tensor<2>, heads: usize| x.reshape([spec.batch, spec.seq, heads, p]).swap_dims(1, 2);
    let share = |x: Tensor<4>| {
        let x: Tensor<5> = x.unsqueeze_dim(2);
        x.repeat_dim(2, h / g).reshape([spec.batch, h, spec.seq, p])
    };
    let (q, k, v) = (rotate(split(q, h), spec), share(rotate(split(k, g), spec)), share(split(v, g)));
    let future = Tensor::<2, Bool>::tril_mask([spec.seq, spec.seq], 0, &q.device()).unsqueeze();
    let scores = q.matmul(k.swap_dims(2, 3)).mul_scalar(spec.scale).mask_fill(future, f32::NEG_INFINITY);
    softmax(scores, 3).matmul(v).swap_dims(1, 2).reshape([tokens, h * p])
}

/// Rotates pairs `(i, i + P/2)` of each head by `position * theta^(-2i/P)`.
fn rotate(x: Tensor<4>, spec: &AttentionSpec) -> Tensor<4> {
    let (seq, half) = (spec.seq, spec.head_dim / 2);
    let angle = |s: usize, i: usize| {
        let frequency = spec.rope_theta.powf(-2.0 * i as f64 / spec.head_dim as f64);
        s as f64 * frequency
    };
    let table = |f: fn(f64) -> f64| {
        let values: Vec<f64> = (0..seq).flat_map(|s| (0..half).map(move |i| f(angle(s, i)))).collect();
        let dtype: DType = x.dtype();
        Tensor::<2>::from_data(TensorData::new(values, [seq, half]).convert_dtype(dtype), (&x.device(), dtype))
            .unsqueeze::<4>()
    };
    let (cos, sin) = (table(f64::cos), table(f64::sin));
    let (a, b) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    Tensor::cat(vec![a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin], 3)
}

/// Checks the sizes, and that there are norms if and only if the spec asks for them.
pub(crate) fn check(
    [t, c]: [usize; 2],
    q_norm: Option<Tensor<1>>,
    k_norm: Option<Tensor<1>>,
    spec: &AttentionSpec,
) -> Option<(Tensor<1>, Tensor<1>)> {
    let (h, g, p) = (spec.heads, spec.kv_heads, spec.head_dim);
    assert!(g > 0 && h % g == 0, "attention: {h} query heads cannot share {g} key/value heads evenly");
    assert_eq!(p % 2, 0, "attention: rotary embedding needs an even head width, not {p}");
    assert!(
        (t, c) == (spec.batch * spec.seq, (h + 2 * g) * p),
        "attention: qkv is [{t}, {c}], expected [{} * {}, ({h} + 2 * {g}) * {p}]",
        spec.batch,
        spec.seq
    );
    let (q_width, k_width) = match spec.qk_norm {
        None => {
            assert!(q_norm.is_none() && k_norm.is_none(), "attention: norms given, but spec.qk_norm is None");
            return None;
        }
        Some(QkNorm::FullProjection) => (h * p, g * p),
        Some(QkNorm::PerHead) => (p, p),
    };
    let norms = q_norm.zip(k_norm).expect("attention: spec.qk_norm asks for both q_norm and k_norm");
    let given = (norms.0.dims(), norms.1.dims());
    assert_eq!(given, ([q_width], [k_width]), "attention: wrong widths of q_norm and k_norm for {:?}", spec.qk_norm);
    Some(norms)
}

/// The non-tensor part of [`causal_attention`].
pub(crate) struct CausalAttention {
    spec: AttentionSpec,
    numerics: Numerics,
}

/// What backward needs of [`CausalAttention`].
pub(crate) struct Saved<const N: usize> {
    op: CausalAttention,
    inputs: [FlexTensor; N],
    out: FlexTensor,
    rows: AttentionSaved,
}

impl<const N: usize> FlexOp<N> for CausalAttention {
    type Saved = Saved<N>;

    fn infer(self, inputs: [FlexTensor; N]) -> FlexTensor {
        self.run(&inputs, None)
    }

    fn forward(self, inputs: [FlexTensor; N], _: [bool; N]) -> (FlexTensor, Saved<N>) {
        let mut rows = AttentionSaved::default();
        let out = self.run(&inputs, Some(&mut rows));
        (out.clone(), Saved { op: self, inputs, out, rows })
    }

    fn backward(saved: Saved<N>, dout: &FlexTensor, _: [bool; N]) -> [Option<FlexTensor>; N] {
        let Saved { op: CausalAttention { spec, numerics }, inputs, out, rows } = saved;
        let mut gradients = inputs.each_ref().map(|input| buffer(slice(input).len()));
        let (dqkv, dnorms) = gradients.split_first_mut().expect("attention has at least qkv");
        let (dq_norm, dk_norm) = match dnorms {
            [q, k] => (Some(q.as_mut_slice()), Some(k.as_mut_slice())),
            _ => (None, None),
        };
        let [qkv, q_norm, k_norm] = parts(&inputs);
        let qkv = qkv.expect("attention has at least qkv");
        attention_backward(
            numerics.isa,
            &spec,
            slice(dout),
            slice(&out),
            qkv,
            q_norm,
            k_norm,
            &rows,
            dqkv,
            dq_norm,
            dk_norm,
        );
        give_back(out);
        let mut inputs = inputs.into_iter();
        gradients.map(|gradient| {
            let input = inputs.next()?;
            let gradient = tensor_of(gradient, input.layout().shape());
            give_back(input);
            Some(gradient)
        })
    }
}

impl CausalAttention {
    fn run<const N: usize>(&self, inputs: &[FlexTensor; N], saved: Option<&mut AttentionSaved>) -> FlexTensor {
        let [qkv, q_norm, k_norm] = parts(inputs);
        let (t, width) = (self.spec.batch * self.spec.seq, self.spec.heads * self.spec.head_dim);
        let mut out = buffer(t * width);
        let qkv = qkv.expect("attention has at least qkv");
        attention_forward(self.numerics.isa, &self.spec, qkv, q_norm, k_norm, &mut out, saved);
        tensor_of(out, [t, width])
    }
}

/// `qkv`, and the norms where there are any.
fn parts<const N: usize>(inputs: &[FlexTensor; N]) -> [Option<&[f32]>; 3] {
    std::array::from_fn(|i| inputs.get(i).map(slice))
}
