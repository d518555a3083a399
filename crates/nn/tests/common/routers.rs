//! The routers that every kind of test runs through.

use mixtura_routing::{Activation, DropOrder, Noise, Normalize, Policy, RouterConfig, Scorer, SecondChoice};

/// Every policy, scorer, activation, noise and drop order at least once, for four experts: (name, experts per token, configuration).
pub fn routers() -> Vec<(&'static str, usize, RouterConfig)> {
    let plain = RouterConfig::default;
    let policy = |policy| RouterConfig { policy, ..RouterConfig::default() };
    let scorer = |scorer| RouterConfig { scorer, ..RouterConfig::default() };
    let drops =
        |drop_order| RouterConfig { drop_order, capacity_factor: 0.7, capacity_min: 1, ..RouterConfig::default() };
    let activation = |activation| RouterConfig { activation, ..RouterConfig::default() };
    vec![
        ("mixtral", 2, plain()),
        ("olmoe", 2, RouterConfig { normalize: Normalize::Never, ..plain() }),
        ("softmax over the selected", 2, activation(Activation::SoftmaxSelected)),
        ("switch", 1, RouterConfig::switch()),
        (
            "sigmoid in groups",
            2,
            RouterConfig {
                policy: Policy::GroupLimited { groups: 2, keep: 1 },
                weight_scale: 2.5,
                ..activation(Activation::Sigmoid)
            },
        ),
        ("square root of softplus", 2, activation(Activation::SqrtSoftplus)),
        ("noisy top-k", 2, RouterConfig::noisy_top_k()),
        ("normal noise", 2, RouterConfig { noise: Noise::Normal { scale: 1.0 }, ..plain() }),
        ("jitter", 2, RouterConfig { noise: Noise::Jitter { eps: 0.1 }, ..plain() }),
        ("gshard", 2, policy(Policy::Gshard { second: SecondChoice::Paper })),
        ("sampled top-1", 1, RouterConfig { normalize: Normalize::Never, ..policy(Policy::SampledTop1) }),
        ("sampled second", 2, policy(Policy::SampledSecond)),
        ("top-p", 2, policy(Policy::TopP { mass: 0.6 })),
        ("relu", 2, RouterConfig { policy: Policy::Relu, normalize: Normalize::Never, ..activation(Activation::Relu) }),
        ("expert choice", 2, RouterConfig { normalize: Normalize::Never, ..policy(Policy::ExpertChoice) }),
        (
            "capped expert choice",
            2,
            RouterConfig { normalize: Normalize::Never, ..policy(Policy::ExpertChoiceCapped { cap: 3 }) },
        ),
        ("batchwise", 2, policy(Policy::Batchwise)),
        ("hash", 2, policy(Policy::Hash)),
        (
            "base",
            1,
            RouterConfig { normalize: Normalize::Never, policy: Policy::Base, ..activation(Activation::Sigmoid) },
        ),
        (
            "sinkhorn",
            2,
            RouterConfig { normalize: Normalize::Never, policy: Policy::Sinkhorn, ..activation(Activation::Sigmoid) },
        ),
        (
            "hierarchical",
            4,
            RouterConfig {
                policy: Policy::Hierarchical { groups: 2, keep: 2 },
                ..activation(Activation::SoftmaxSelected)
            },
        ),
        // With eps 1 every logit takes part; a smaller one adds jumps that the choices do not show.
        ("sparse mixer", 2, policy(Policy::SparseMixer { eps: 1.0 })),
        ("cosine", 2, scorer(Scorer::Cosine)),
        ("mlp", 2, scorer(Scorer::Mlp)),
        ("fuzzy", 2, scorer(Scorer::Fuzzy)),
        ("token-major capacity", 2, drops(DropOrder::TokenMajor)),
        ("choice-major capacity", 2, drops(DropOrder::ChoiceMajor)),
        ("random token selection", 2, drops(DropOrder::Random)),
        ("drop by score", 2, drops(DropOrder::Score)),
        ("batch priority", 2, drops(DropOrder::BatchPriority)),
        ("batch priority by sum", 2, drops(DropOrder::BatchPrioritySum)),
        ("similarity", 2, drops(DropOrder::Similarity)),
        ("similarity with redirection", 2, drops(DropOrder::SimilarityRedirect)),
    ]
}
