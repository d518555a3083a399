//! Parts made on their own are the parts of a layer or a model, value for value; what cannot be built is refused by name.

use burn::tensor::{Device, Tensor};
use mixtura_nn::{
    AttentionConfig, Decoder, Exchange, ExpertsConfig, Feedforward, ForwardContext, ModelConfig, MoeConfig, MoeLayer,
    MoeLayerConfig, QkNorm, RmsNormConfig, RouterLayerConfig,
};
use mixtura_routing::{HashTable, Policy, RouterConfig};

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    mixtura_ops::with_slice(&tensor, |values| values.to_vec())
}

fn x_td(rows: usize, width: usize) -> Tensor<2> {
    let values: Vec<f32> = (0..rows * width).map(|i| (i as f32 * 0.37).sin()).collect();
    Tensor::from_data(burn::tensor::TensorData::new(values, [rows, width]), &Device::default())
}

#[test]
fn a_router_and_experts_of_their_own_do_what_an_moe_layer_does() {
    let device = Device::default();
    let router = RouterLayerConfig { seed: 3, ..RouterLayerConfig::new(8, 4, 2) }.init(&device).unwrap();
    let experts = ExpertsConfig { seed: 4, ..ExpertsConfig::new(4, 8, 12) }.init(&device).unwrap();
    let context = ForwardContext::evaluation(Default::default());
    let mut layer =
        MoeLayer::new(&MoeLayerConfig::new(8, 4, 2, 12), 9, &device).unwrap().with_exchange(Exchange::default());
    (layer.router, layer.experts) = (router.clone(), experts.clone());
    let whole = layer.forward(x_td(10, 8), &context).unwrap();
    let (routing, plan) = router.forward(x_td(10, 8), 0, &context).unwrap();
    let y_td = experts.forward(x_td(10, 8), routing.weight_n, &plan, context.numerics);
    assert_eq!(values(y_td), values(whole.y_td));
    assert!(values(routing.logits_te).iter().any(|logit| *logit != 0.0));
}

#[test]
fn attention_and_norm_of_their_own_are_those_of_a_model() {
    let device = Device::default();
    let config = ModelConfig {
        vocab: 16,
        kv_heads: Some(2),
        qk_norm: QkNorm::PerHead,
        clip_qkv: Some(8.0),
        moe: Some(MoeConfig::new(4, 2, 12)),
        ..ModelConfig::new(16, 2, 4, 8)
    };
    let model = Decoder::new(&config, 7, &device).unwrap();
    let block = &model.layers[0];
    assert!(matches!(block.ffn, Feedforward::Moe(_)));
    let mut attention = config.attention().init(&device).unwrap();
    assert_ne!(values(attention.qkv.val()), values(block.attention.qkv.val()), "drawn from another seed and name");
    attention.qkv = block.attention.qkv.clone();
    attention.out = block.attention.out.clone();
    let norm = RmsNormConfig { eps: config.norm_eps, ..RmsNormConfig::new(16) }.init(&device);
    let numerics = Default::default();
    let run = |norm: &mixtura_nn::RmsNorm, attention: &mixtura_nn::Attention| {
        values(attention.forward(norm.forward(x_td(6, 16), numerics), 2, 3, numerics))
    };
    assert_eq!(run(&norm, &attention), run(&block.attention_norm, &block.attention));
}

#[test]
fn modules_of_one_seed_start_equal_and_of_two_seeds_differ() {
    let device = Device::default();
    let draw = |seed| values(ExpertsConfig { seed, ..ExpertsConfig::new(2, 8, 12) }.init(&device).unwrap().down.val());
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn what_cannot_be_built_is_refused_by_name() {
    let device = Device::default();
    let attention = |change: fn(&mut AttentionConfig)| {
        let mut config = AttentionConfig::new(16, 4);
        change(&mut config);
        config.init(&device).unwrap_err().to_string()
    };
    assert!(attention(|c| c.heads = 0).contains("heads"));
    assert!(attention(|c| c.kv_heads = 3).contains("a divisor of heads = 4"));
    assert!(attention(|c| c.head_dim = 3).contains("head_dim"));
    assert!(ExpertsConfig::new(4, 8, 0).init(&device).unwrap_err().to_string().contains("d_hidden"));
    assert!(RouterLayerConfig::new(8, 4, 5).init(&device).is_err());
    assert!(RouterLayerConfig::new(0, 4, 2).init(&device).unwrap_err().to_string().contains("d_model"));
    let hash = RouterConfig { hash_table: HashTable::Random, ..RouterConfig::of(Policy::Hash, 1) };
    let config = RouterLayerConfig { router: hash, ..RouterLayerConfig::new(8, 4, 1) };
    assert!(config.init(&device).unwrap_err().to_string().contains("vocab"));
}
