//! What a step costs on paper, for the share of the roofline: multiply-adds as two operations each.

use mixtura_nn::{LayerFfn, ModelConfig, MoeConfig};

/// Floating-point operations of the forward pass for one token at the end of a sequence of `sequence` tokens.
///
/// Matrix products of the projections, the router, the visited experts and the output head, and the two products of
/// attention over `(sequence + 1) / 2` keys on average. Norms and softmax are left out, as is usual.
pub fn forward_flops_per_token(model: &ModelConfig, sequence: usize) -> f64 {
    let (d, heads_width) = (model.d_model as f64, (model.heads * model.head_dim()) as f64);
    let into = if model.activation.kernel().is_gated() { 3.0 } else { 2.0 };
    let attention = d * model.qkv_width() as f64 + heads_width * d + heads_width * (sequence as f64 + 1.0);
    let mut multiply_adds = d * model.vocab as f64;
    for layer in 0..model.layers {
        multiply_adds += attention;
        multiply_adds += match (model.layer_ffn(layer), &model.moe) {
            (Ok(LayerFfn::Dense { d_dense }), _) => into * d * d_dense as f64,
            (Ok(LayerFfn::Moe { experts, d_expert, d_shared }), Some(MoeConfig { soft: Some(soft), .. })) => {
                let one = into * d * d_expert as f64;
                soft.multiply_adds_per_token(model.d_model, experts, one, sequence) + into * d * d_shared as f64
            }
            (Ok(LayerFfn::Moe { experts, d_expert, d_shared }), Some(moe)) => {
                d * experts as f64 + into * d * (moe.top_k * d_expert + d_shared) as f64
            }
            _ => 0.0,
        };
    }
    2.0 * multiply_adds
}

/// The same for training: the backward pass does two products for each one of the forward pass.
pub fn training_flops_per_token(model: &ModelConfig, sequence: usize) -> f64 {
    3.0 * forward_flops_per_token(model, sequence)
}

/// The most memory this process ever held, in bytes, where the system tells.
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cost_of_a_mixture_is_that_of_the_experts_a_token_visits() {
        let model = mixtura_nn::olmoe_1b_7b();
        // By hand: 16 layers of 4 d^2 projections, 64 d router, 8 experts of 3 d f; the head; attention over one key.
        let (d, f) = (2048.0, 1024.0);
        let layer = 4.0 * d * d + 2.0 * d + 64.0 * d + 8.0 * 3.0 * d * f;
        assert_eq!(forward_flops_per_token(&model, 1), 2.0 * (16.0 * layer + d * 50_304.0));
    }

    #[test]
    fn block_causal_slots_cost_their_share_of_a_block_and_merging_its_share_of_a_segment() {
        let mut model = mixtura_nn::olmoe_1b_7b();
        let (d, one) = (2048.0, 3.0 * 2048.0 * 1024.0);
        let mut cost = |soft| {
            model.moe = Some(MoeConfig::soft(8, 1024, soft));
            let others = 16.0 * (4.0 * d * d + d * 257.0) + d * 50_304.0;
            (forward_flops_per_token(&model, 256) / 2.0 - others) / 16.0
        };
        let block = mixtura_nn::SoftConfig::BlockCausal { block: 32, slots_per_expert: 2 };
        assert_eq!(cost(block), 3.0 * d * 16.0 + 16.0 * one / 32.0);
        let smear = mixtura_nn::SoftConfig::Smear { allow_future: true };
        assert_eq!(cost(smear), d + one + 8.0 * (d + one) / 256.0);
    }
}
