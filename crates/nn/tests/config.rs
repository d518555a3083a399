//! The `[model]` table: what is accepted, what is refused and how the refusal reads.

use mixtura_nn::{ConfigError, LayerFfn, ModelConfig, ParameterCounts, mixtral_8x7b, olmoe_1b_7b};

const SMALL: &str = r#"
vocab = 64
d_model = 16
layers = 4
heads = 2
context = 32
d_dense = 40
[moe]
experts = 8
top_k = 2
d_expert = 24
"#;

fn parse(text: &str) -> Result<ModelConfig, toml::de::Error> {
    toml::from_str(text)
}

fn small(change: impl FnOnce(&mut ModelConfig)) -> ModelConfig {
    let mut config = parse(SMALL).unwrap();
    change(&mut config);
    config
}

fn refused(key: &str, change: impl FnOnce(&mut ModelConfig)) -> ConfigError {
    let error = small(change).validate().expect_err(key);
    assert_eq!(error.key, key, "{error}");
    error
}

#[test]
fn the_smallest_table_gets_its_defaults_and_survives_a_round_trip() {
    let config = parse(SMALL).unwrap();
    config.validate().unwrap();
    assert_eq!((config.kv_heads(), config.head_dim(), config.tied), (2, 8, false));
    let text = toml::to_string(&config).unwrap();
    assert_eq!(parse(&text).unwrap(), config, "{text}");
}

#[test]
fn an_unknown_key_is_refused_by_name() {
    for (text, key) in [
        (SMALL.replace("heads = 2", "heads = 2\nheadz = 2"), "headz"),
        (SMALL.replace("top_k", "topk"), "topk"),
        (format!("{SMALL}[moe.router]\npolcy = \"top_k\"\n"), "polcy"),
        (format!("{SMALL}[moe.balance]\ncoeficient = 1\n"), "coeficient"),
    ] {
        let error = parse(&text).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn moe_layers_are_all_every_second_or_a_list() {
    let experts = |text: &str| -> Vec<usize> {
        let config = parse(&format!("{SMALL}{text}\n")).unwrap();
        config.validate().unwrap();
        (0..4)
            .map(|layer| match config.layer_ffn(layer).unwrap() {
                LayerFfn::Moe { experts, .. } => experts,
                LayerFfn::Dense { d_dense } => {
                    assert_eq!(d_dense, 40);
                    0
                }
            })
            .collect()
    };
    assert_eq!(experts("layers = \"all\""), [8, 8, 8, 8]);
    assert_eq!(experts("layers = { every = 2 }"), [0, 8, 0, 8]);
    assert_eq!(experts("every = 2"), [0, 8, 0, 8]);
    assert_eq!(experts("layers = [4, 0, 8, 16]"), [4, 0, 8, 16]);
}

#[test]
fn impossible_values_are_refused_with_the_key_and_what_was_expected() {
    let moe = |config: &mut ModelConfig, change: fn(&mut mixtura_nn::MoeConfig)| change(config.moe.as_mut().unwrap());
    let error = refused("moe.top_k", |c| moe(c, |m| m.top_k = 9));
    assert_eq!(error.to_string(), "moe.top_k = 9: expected 1 to 8, the number of experts of layer 0");
    refused("moe.top_k", |c| moe(c, |m| m.top_k = 0));
    refused("moe.top_k", |c| moe(c, |m| m.layers = mixtura_nn::MoeLayers::Counts(vec![8, 8, 1, 8])));
    refused("heads", |c| c.heads = 3);
    refused("kv_heads", |c| c.kv_heads = Some(3));
    refused("head_dim", |c| c.head_dim = Some(7));
    refused("vocab", |c| c.vocab = 0);
    refused("context", |c| c.context = 0);
    refused("rope_theta", |c| c.rope_theta = f64::NAN);
    refused("moe.experts", |c| moe(c, |m| m.experts = 0));
    refused("moe.d_expert", |c| moe(c, |m| m.d_expert = 0.into()));
    refused("moe.d_expert", |c| moe(c, |m| m.d_expert = mixtura_nn::PerLayer::Each(vec![8, 8])));
    refused("moe.layers", |c| moe(c, |m| m.layers = mixtura_nn::MoeLayers::Counts(vec![8, 8])));
    refused("moe.layers", |c| moe(c, |m| m.layers = mixtura_nn::MoeLayers::Counts(vec![0; 4])));
    refused("moe.every", |c| {
        moe(c, |m| (m.layers, m.every) = (mixtura_nn::MoeLayers::Counts(vec![8; 4]), Some(2)));
    });
    refused("moe.layers.every", |c| moe(c, |m| m.every = Some(0)));
    refused("moe.shared_gate", |c| moe(c, |m| m.shared_gate = true));
    refused("moe.router.capacity_factor", |c| moe(c, |m| m.router.capacity_factor = -1.0));
    refused("moe.balance.coefficient", |c| moe(c, |m| m.balance.coefficient = f64::INFINITY));
    refused("d_dense", |c| {
        c.d_dense = None;
        moe(c, |m| m.every = Some(2));
    });
    refused("d_dense", |c| (c.moe, c.d_dense) = (None, None));
}

#[test]
fn the_presets_have_the_published_numbers_of_parameters() {
    for (config, total, active) in
        [(olmoe_1b_7b(), 6_919_161_856, 1_282_017_280), (mixtral_8x7b(), 46_702_792_704, 12_879_925_248)]
    {
        config.validate().unwrap();
        let ParameterCounts { total: found, active: found_active, .. } = config.parameter_counts().unwrap();
        assert_eq!((found, found_active), (total, active));
    }
}
