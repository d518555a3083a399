//! Recomputing activations of the layers that are more than a router and equal experts: on and off, bit for bit.

use burn::tensor::Device;
use mixtura_nn::{Decoder, ForwardContext, ModelConfig, NamedParameters};
use mixtura_ops::{Numerics, into_vec, with_slice};

const VOCAB: usize = 19;

/// Values between -1 and 1.
fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mix =
        |i: u32| (i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(2_654_435_761).rotate_left(13).wrapping_mul(40_503);
    (0..n as u32).map(|i| (mix(i) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Four layers from the text of a `[model.moe]` table, gates that start at zero moved away from it.
fn model(moe: &str) -> Decoder {
    let text = format!(
        "vocab = {VOCAB}\nd_model = 16\nlayers = 4\nheads = 2\ncontext = 24\nd_dense = 8\ninit_std = 0.3\n[moe]\n{moe}\n"
    );
    let config: ModelConfig = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
    let mut model = Decoder::new(&config, 11, &Device::default().autodiff()).unwrap();
    let mut index = 0;
    model.for_each_parameter_mut(|_, info, values| {
        index += 1;
        if info.name.contains("router") && !info.name.ends_with("table") && values.iter().all(|v| *v == 0.0) {
            values.iter_mut().zip(noise(info.len(), 50 + index)).for_each(|(w, n)| *w = 0.3 * n);
        }
    });
    model
}

fn ids(n: usize, seed: u32) -> Vec<u32> {
    noise(n, seed).iter().map(|v| ((v + 1.0) * 0.5 * VOCAB as f32) as u32 % VOCAB as u32).collect()
}

#[test]
fn recomputing_changes_no_bit_of_losses_routing_or_gradients() {
    const BASE: &str = "experts = 4\ntop_k = 2\nd_expert = 12\n";
    const ZERO: &str = "experts = 4\ntop_k = 2\nd_expert = 12\nrouter = { normalize = false }\n";
    let shared = "shared_experts = 1\nshared_gate = true\n";
    let mut failures = Vec::new();
    for (name, moe) in [
        ("moe++", format!("{ZERO}[moe.zero_computation]\ngamma = 0\nbeta = 0.2")),
        ("moe++ with a shared network", format!("{shared}{ZERO}[moe.zero_computation]\ngamma = 0\nbeta = 0.2")),
        ("across a dense layer", format!("{ZERO}layers = [4, 0, 6, 4]\n[moe.zero_computation]\ngamma = 0\nbeta = 0.1")),
        ("two levels", "experts = 6\ntop_k = 4\nd_expert = 12\nrouter = { policy = { hierarchical = { groups = 3, keep = 2 } }, activation = \"softmax_selected\" }".into()),
        ("widths", "experts = 4\ntop_k = 2\nd_expert_each = [4, 6, 6, 8]\n".into()),
        ("residual", format!("{BASE}residual = \"coefficient\"\nshared_experts = 1")),
        ("base", "experts = 4\ntop_k = 1\nd_expert = 12\nrouter = { policy = \"base\", activation = \"sigmoid\", normalize = false }".into()),
        ("hash", format!("{BASE}router = {{ policy = \"hash\" }}")),
    ] {
        let model = model(&moe);
        let (tokens, targets) = (ids(24, 1), ids(24, 2));
        let run = |recompute_activations| {
            let context = ForwardContext::training(5, 3, Numerics::default());
            let context = ForwardContext { recompute_activations, ..context };
            let out = model.loss(&tokens, &targets, 3, 8, &context).unwrap();
            let loss = with_slice(&out.total, |v| v[0]);
            let routed: Vec<_> = out.routing.iter().map(|l| l.routed.clone()).collect();
            let gradients = model.take_gradients(&mut out.total.mul_scalar(0.5).backward());
            (loss, routed, gradients.into_iter().map(|g| g.map(into_vec)).collect::<Vec<_>>())
        };
        let (off, on) = (run(false), run(true));
        assert!(off.0 == on.0 && off.1 == on.1, "{name}: {} {}", off.0, on.0);
        for (info, (off, on)) in model.parameter_infos().iter().zip(off.2.iter().zip(&on.2)) {
            assert_eq!(off.is_some(), on.is_some(), "{name}: {}", info.name);
            let (Some(off), Some(on)) = (off, on) else { continue };
            let worst = off.iter().zip(on).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            if off != on {
                failures.push(format!("{name}: {} differs by up to {worst:e}", info.name));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
