//! What `mixtura route explain --policy NAME` prints: for every policy and published system what it does, its rules, its shapes,
//! where it comes from, where implementations disagree, and its [`Recipe`].

use super::recipe::Recipe;
use crate::config::{BalanceConfig, DropOrder, Policy, RouterConfig};
use crate::names::nearest;
use crate::soft::config::SoftConfig;
use serde::Serialize;
use serde_json::{Map, Value};

/// One entry of the manual.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// The name to ask for.
    pub name: &'static str,
    /// What it does, in a sentence or two.
    pub does: &'static str,
    /// Ties, weights, gradient, noise, drops, causality.
    pub rules: &'static str,
    /// Inputs beside the logits, and sizes.
    pub shapes: &'static str,
    /// Paper section and reference implementation.
    pub source: &'static str,
    /// Where implementations differ, and what this project does.
    pub disagree: &'static str,
    /// Cost beside the scorer.
    pub cost: &'static str,
    /// The keys of `[model.moe]` that the name stands for.
    pub recipe: Recipe,
}

/// The entry called `name`, or the most similar names.
pub fn find(name: &str) -> Result<Explanation, ExplainError> {
    let name = name.trim().to_lowercase().replace(['-', ' '], "_");
    let entries = all();
    if let Some(entry) = entries.iter().find(|e| e.name == name) {
        return Ok(entry.clone());
    }
    let known = entries.iter().map(|e| e.name).collect::<Vec<_>>().join(", ");
    let nearest = nearest(&name, entries.iter().map(|e| e.name)).map(str::to_string);
    Err(ExplainError { nearest, name, known })
}

/// No such policy.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("unknown policy {name}{}; known: {known}", nearest.as_ref().map_or(String::new(), |n| format!(", nearest is {n}")))]
pub struct ExplainError {
    /// What was asked for.
    pub name: String,
    /// The most similar name.
    pub nearest: Option<String>,
    /// All names.
    pub known: String,
}

impl Explanation {
    /// What a layer with this entry's policy refuses, each as a typed [`crate::RoutingError`]; `None` for soft routers, which select
    /// nothing.
    pub fn refuses(&self) -> Option<String> {
        let config = self.recipe.router.as_ref()?;
        let policy = match config.policy {
            Policy::Switch | Policy::SampledTop1 | Policy::Base => "k other than 1",
            Policy::SampledSecond => "k other than 2",
            Policy::Gshard { .. } => "k other than 2, a threshold that is not > 0",
            Policy::SparseMixer { .. } => "k other than 2, eps < 0",
            Policy::GroupLimited { .. } => {
                "groups that do not divide E, keep outside 1..=groups, kept groups of fewer than k experts"
            }
            Policy::NoisyTopK => "k = 1 with a softmax over the selected, training without raw_noise_te",
            Policy::TopP { .. } => "a mass outside (0, 1], gates that are no softmax",
            Policy::Relu => "an activation other than relu",
            Policy::ExpertChoiceCapped { .. } => "cap = 0",
            Policy::Batchwise => "evaluation without thresholds_e",
            Policy::Hash => "no given_tk, an expert beyond E, an expert twice in a token's list",
            _ => "",
        };
        let similarity = matches!(config.drop_order, DropOrder::Similarity | DropOrder::SimilarityRedirect);
        let parts = [
            "scores that are not finite, k outside 1..=E, lengths that do not fit T and E, a capacity of 0",
            policy,
            if similarity { "no x_td" } else { "" },
        ];
        Some(parts.into_iter().filter(|p| !p.is_empty()).collect::<Vec<_>>().join("; "))
    }
}

impl std::fmt::Display for Explanation {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        writeln!(f, "{}\n", self.name)?;
        let parts = [
            ("does", self.does),
            ("rules", self.rules),
            ("shapes", self.shapes),
            ("cost", self.cost),
            ("source", self.source),
            ("disagree", self.disagree),
        ];
        for (title, text) in parts {
            writeln!(f, "{title:9} {text}")?;
        }
        if let Some(refused) = self.refuses() {
            writeln!(f, "{:9} {refused}", "refuses")?;
        }
        writeln!(f, "{:9} {}", "recipe", self.keys().join("; "))
    }
}

impl Explanation {
    /// The recipe as keys of `[model.moe]`, those that have their usual value left out.
    fn keys(&self) -> Vec<String> {
        let Recipe { top_k, shared_experts, residual, relative_widths, zero_computation, router, balance, soft } =
            &self.recipe;
        let mut keys = Vec::new();
        let mut key = |name: &str, value: Value| keys.push(format!("{name} = {}", inline(&value)));
        top_k.iter().for_each(|&k| key("top_k", k.into()));
        if *shared_experts > 0 {
            key("shared_experts", (*shared_experts).into());
        }
        residual.iter().for_each(|residual| key("residual", json(residual)));
        zero_computation.iter().for_each(|zero| key("zero_computation", json(zero)));
        soft.iter().for_each(|soft: &SoftConfig| key("soft", json(soft)));
        let mut differing = |table: &str, own: Value, usual: Value| {
            for (name, value) in own.as_object().into_iter().flatten().filter(|(k, v)| usual.get(*k) != Some(v)) {
                key(&format!("{table}.{name}"), value.clone());
            }
        };
        router.iter().for_each(|router| differing("router", json(router), json(&RouterConfig::default())));
        balance.iter().for_each(|balance| differing("balance", json(balance), json(&BalanceConfig::default())));
        if let Some([first, last]) = relative_widths {
            keys.push(format!("d_expert_each from {first} to {last} times d_expert in equal steps"));
        }
        if keys.is_empty() {
            keys.push("the usual router and balance".to_string());
        }
        keys
    }
}

fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Object(Map::new()))
}

/// A JSON value as inline TOML.
fn inline(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let fields: Vec<String> = map.iter().map(|(k, v)| format!("{k} = {}", inline(v))).collect();
            format!("{{ {} }}", fields.join(", "))
        }
        other => other.to_string(),
    }
}

/// Every entry: policies first, then published systems, then soft routers.
pub fn all() -> Vec<Explanation> {
    let entry = |name, does, rules, shapes, cost, source, disagree| Explanation {
        name,
        does,
        rules,
        shapes,
        source,
        disagree,
        cost,
        recipe: Recipe::named(name).unwrap_or_else(|| panic!("{name} has no recipe")),
    };
    const LOGITS: &str = "logits [T, E] f32; gives T k pairs";
    const TOP_K: &str = "O(T E min(k, log E))";
    vec![
        entry(
            "top_k",
            "Every token goes to the k experts with the largest scores.",
            "Ties to the lower expert. Weights: activation at the chosen experts, divided by their sum unless normalize = false or k = 1 (a single weight divided by itself is 1 and teaches the gate nothing); with softmax and normalize only the chosen logits get gradient. Dropless unless capacity_factor > 0. Causal and independent of the batch when dropless.",
            LOGITS,
            TOP_K,
            "Shazeer et al. 2017 section 2.1; mistral-inference moe.py; OLMoE.",
            "Whether softmax comes before (OLMoE) or after (GPT-OSS) selection only matters without normalisation.",
        ),
        entry(
            "switch",
            "Top-1, weighted by its raw probability so that the gate learns even with k = 1.",
            "Weight p_e, never normalised; gradient to every logit through the softmax. Capacity by position; a dropped token keeps its residual only. Balance loss E sum f P with f before capacity.",
            "k = 1",
            TOP_K,
            "Fedus et al. 2021 section 2; mesh_tensorflow moe.py _switch_gating; flaxformer routing.py.",
            "Jitter 1e-2 on the router's input (mesh) or none (flaxformer); Hugging Face Mixtral jitters the experts' input too, which is a defect.",
        ),
        entry(
            "noisy_top_k",
            "Top-k of logits plus learned normal noise; softmax over the chosen.",
            "Noise x W_noise through softplus, training only. Importance and load losses (CV^2, population variance); the load is the probability of selection under fresh noise, gradient through the threshold included. k >= 2.",
            "raw_noise_te [T, E]",
            TOP_K,
            "Shazeer et al. 2017 appendix A; tensor2tensor expert_utils.py.",
            "Noise floor 0 (paper) or 1e-2 (T2T); PyTorch ports use Bessel's variance and one (davidmrau) compares probabilities with logits.",
        ),
        entry(
            "group_limited",
            "Top-k among the experts of the token's best groups (nodes).",
            "Group score: sum of its two best biased scores (one best without bias). Other groups are minus infinity. Weights come from the unbiased scores. Bias b moves by u sign(mean load - load) after each step.",
            "bias_e [E] optional; groups divide E",
            TOP_K,
            "DeepSeek-V3 section 2.1.2; deepseek-ai inference/model.py.",
            "Masking with 0 (Hugging Face, early official code) selects masked experts when biased scores are negative; here -inf. The paper's group score is top K/M, the code's top 2; here 2.",
        ),
        entry(
            "hierarchical",
            "Two levels: the best groups by a primary gate, then the best experts inside each by a secondary one.",
            "top_k = keep times the experts per chosen group. Weight: softmax over the token's groups times softmax over its experts of the group, so a token's weights sum to 1. Noise on both levels in training. Importance sums the products; the load of a group's experts is estimated on the tokens that reached the group, times the primary load. At least two choices on each level. Causal when dropless.",
            "logits [T, E + groups], the groups' last; groups divide E",
            "O(T (E + groups))",
            "Shazeer et al. 2017 appendix B; mesh_tensorflow moe.py MoE2D.",
            "Mesh gives the inner gate importance 1 for the first group and 0.5 for the second; here both groups route alike. The z-loss of two levels is this project's: that over the groups plus the mean of those within.",
        ),
        entry(
            "gshard",
            "Top-2 with a second choice that is skipped at random when its gate is small.",
            "Normalised before dropping. Two passes: first choices in token order, then second ones; not causal when capacity binds. Skips only in training.",
            "k = 2",
            TOP_K,
            "Lepikhin et al. 2020 algorithm 1; lingvo gshard_layers.py; mesh_tensorflow moe.py.",
            "Keep probability min(1, 2 g2), skipped choices hold their place (paper); min(1, g2 / 0.2), they do not (mesh, also at evaluation); never skipped, normalised after dropping (lingvo, DeepSpeed).",
        ),
        entry(
            "st_moe",
            "GShard top-2 in the Mesh form, with the z-loss.",
            "Second choice kept with probability min(1, g2 / 0.2) in training. z-loss: mean squared log-sum-exp of clean logits, coefficient 1e-3.",
            "k = 2",
            TOP_K,
            "Zoph et al. 2022 section 3; flaxformer st_moe_base.gin; lucidrains st-moe-pytorch.",
            "z coefficient 1e-3 (paper), 1e-4 (flaxformer); random skipping in evaluation too (mesh, lucidrains).",
        ),
        entry(
            "sampled_top1",
            "Top-1 of logits plus Gumbel noise, weighted by the clean probability.",
            "Training only; evaluation takes the plain maximum.",
            "k = 1",
            TOP_K,
            "DeepSpeed sharded_moe.py top1gating, noisy_gate_policy RSample.",
            "DeepSpeed combines it with random token selection, also at evaluation; here training only.",
        ),
        entry(
            "sampled_second",
            "Top-1 plus a second expert sampled with Gumbel noise among the others.",
            "Normalised after dropping: a single survivor has weight 1 and no gradient. Choice-major queue. Sampling in training only.",
            "k = 2",
            TOP_K,
            "DeepSpeed sharded_moe.py top2gating.",
            "DeepSpeed samples at evaluation as well and adds the noise in place to the caller's logits.",
        ),
        entry(
            "top_p",
            "The smallest set of experts whose probabilities reach a given mass; k varies by token.",
            "Largest first, ties to the lower expert, at least one. Causal.",
            "gives 1 to E pairs per token",
            "O(T E log E)",
            "Wang et al. 2024 (HMoE) section 3; Huang et al. 2024.",
            "HMoE prints its entropy term with the sign that increases entropy; here -sum P log P.",
        ),
        entry(
            "relu",
            "Every expert with a positive logit, weighted by that logit.",
            "No softmax, no normalisation; a token may have no expert. L1 with load weights and a controller that steers sparsity to 1 - k/E. Causal.",
            "gives 0 to E pairs per token",
            "O(T E log E)",
            "Wang et al. 2024 (ReMoE) sections 3-4; thu-ml/ReMoE router.py.",
            "The paper averages the penalty over layers, the code sums; at the target the paper leaves lambda, the code divides. Here mean and unchanged.",
        ),
        entry(
            "expert_choice",
            "Every expert takes its T k / E best tokens.",
            "Perfect load, no loss needed. Weights raw probabilities. NOT causal: not for decoders. Floor, at least 1.",
            "gives E floor(T k / E) pairs",
            "O(T E), and O(log T) for every pair",
            "Zhou et al. 2022 section 3; flaxformer ExpertsChooseMaskedRouter; vmoe.",
            "Rounding when k T / E is no integer: ceil or round there, floor here.",
        ),
        entry(
            "expert_choice_capped",
            "Expert Choice with at most `cap` experts per token.",
            "Entropy-regularised assignment by KL-Dykstra, lambda 1e-3, 100 iterations, then a greedy repair, because the paper's setting need not have converged. The plan decides indices only.",
            "gives at most E floor(T k / E) pairs",
            "100 passes over T E, then O(T) for every pick that the repair moves: 1 s at T4096 E64 k8",
            "Zhou et al. 2022 section 3.3.",
            "The paper does not say what happens when 100 iterations are not enough.",
        ),
        entry(
            "batchwise",
            "Expert choice in training, learned thresholds in evaluation; weights renormalised.",
            "A token may have no expert. Not causal in training. The threshold loss trains thresholds only.",
            "thresholds_e [E] in evaluation",
            "O(T E) in training, O(T E log E) in evaluation",
            "Shazeer et al. 2017 appendix F.",
            "The paper is silent on gradients into the gate from the threshold loss: none here.",
        ),
        entry(
            "hash",
            "A fixed table from token id to expert.",
            "Weight 1, no gate, no gradient, causal. The balanced table puts the most frequent ids first into the lightest expert.",
            "given_tk [T, k] from policy::hash::lookup",
            "O(T k)",
            "Roller et al. 2021; lingvo HashGatingOnLogits.",
            "A modulo table inherits the skew of token frequencies.",
        ),
        entry(
            "base",
            "Exactly T/E tokens per expert, maximising total affinity.",
            "Training only; evaluation is greedy, not balanced. Weight sigmoid(logit), output w E(x) + (1 - w) x. Not causal.",
            "k = 1",
            "T augmenting paths, each O(E^2) to O(E^3) and O(T) for the experts it changes: 0.2 s at T4096 E64",
            "Lewis et al. 2021; fairseq base_layer.py.",
            "fairseq uses an auction; the assignment here is exact.",
        ),
        entry(
            "sinkhorn",
            "Top-k of a transport plan with equal rows and equal columns.",
            "Training only, a constant for the gradient; weights from the activation. A balance loss beside it is meaningless. Not causal in training.",
            LOGITS,
            "about ten passes over T E, at most 1000",
            "Clark et al. 2022; Megatron moe_utils.py.",
            "Megatron exponentiates logits directly (overflow above 88 in f32); here on logarithms.",
        ),
        entry(
            "sparse_mixer",
            "Two maxima in turn, each weighted by a softmax over the logits close to it.",
            "eps matters in evaluation too. The weights do not sum to 1, often to nearly 2.",
            "k = 2",
            TOP_K,
            "Liu et al. 2023; Phi-3.5-MoE modeling_phimoe.py.",
            "The published training estimator samples; here training is deterministic.",
        ),
        entry(
            "mixtral",
            "Top-2 of 8 with softmax over the two.",
            "Dropless, no noise.",
            LOGITS,
            TOP_K,
            "Jiang et al. 2024 section 2; mistral-inference moe.py.",
            "Hugging Face's balance loss is 2 at balance for k = 2 and pools layers; ours is 1.",
        ),
        entry(
            "olmoe",
            "Top-8 of 64, raw softmax weights.",
            "Dropless. Balance 0.01, z-loss 0.001.",
            LOGITS,
            TOP_K,
            "Muennighoff et al. 2024; allenai/OLMoE config.",
            "None known.",
        ),
        entry(
            "deepseek_moe",
            "Many small experts, raw softmax weights, beside shared experts.",
            "Expert-level and device-level balance losses.",
            LOGITS,
            TOP_K,
            "Dai et al. 2024 equations 3-17.",
            "norm_topk_prob is false in the release; the device loss is absent from most ports.",
        ),
        entry(
            "v_moe",
            "Top-k of noisy probabilities, raw weights, batch-prioritised queue.",
            "Noise standard deviation 1/E in training. Priority by the largest weight; not causal.",
            LOGITS,
            "O(T E + T log T)",
            "Riquelme et al. 2021 sections 2-4; google-research/vmoe routing.py.",
            "Capacity: ceil and a multiple of 4 in code, round in the paper; priority by maximum (code) or sum (paper). V-MoE's load loss compares every expert with the k-th noisy logit; here, as in Shazeer's, an expert is left out of its own threshold.",
        ),
        entry(
            "tutel",
            "Top-k normalised before dropping, choice-major queue, optional batch priority.",
            "Dynamic capacity is the largest load.",
            LOGITS,
            TOP_K,
            "Hwang et al. 2022; microsoft/Tutel fast_dispatch.py.",
            "With batch priority Tutel computes its dynamic capacity from the wrong row; its load loss mixes probabilities with logits.",
        ),
        entry(
            "rts",
            "Drop order \"random\": a full expert keeps random tokens instead of early ones.",
            "Training only; in evaluation position order. Not causal.",
            LOGITS,
            "O(T k) beside the selection",
            "Kim et al. 2021; DeepSpeed use_rts.",
            "DeepSpeed draws at evaluation too.",
        ),
        entry(
            "sats",
            "Drop order \"similarity\": a full expert keeps confident tokens unlike those it keeps already.",
            "SATS-D drops the rest; \"similarity_redirect\" (SATS-R) offers them to their next experts with room.",
            "x_td [T, d]",
            "O(n C d) per full expert with n candidates; redirecting adds O(E log E) per dropped pair",
            "A design of this project.",
            "None: there is one implementation.",
        ),
        entry(
            "moe_plus_plus",
            "Experts without a network beside the others: zero, copy, and constant (a1 x + a2 v, [a1, a2] = softmax(Wc x)).",
            "`[model.moe.zero_computation]`; they come after the networks in the order constant, copy, zero. Raw top-2 weights (normalize = false). Gating residual: the previous MoE layer's logits times a learned matrix are added. Balance loss sum eta f P with eta = 1 or tau, coefficient beta. Capacity in training: gamma tau k T / (tau N + Z) slots for networks, gamma k T / (tau N + Z) for the others. Their rows never enter the expert kernel.",
            "logits [T, N + Z]; constant experts: mix [d, 2 C], value [C, d]",
            "O(T E) and O(T d) for the rows",
            "Jin et al. 2024 section 3; SkyworkAI/MoE-plus-plus.",
            "The code has a two-layer gate, removes the zero experts' weight and divides the rest by its sum (renorm_after_zero = true), and scales the input by k. The paper writes capacities for T selections; k T are made.",
        ),
        entry(
            "hmoe",
            "Experts of different hidden widths; wide ones pay for their parameters.",
            "`d_expert_each` in [model.moe]; experts of one width run as one block. balance.loss = \"parameter_penalty\": E sum f P h / mean(h); balance.entropy: -sum P log P.",
            "a width per expert",
            "that of the policy",
            "Wang et al. 2024 (HMoE) sections 2-3.",
            "The paper's penalty has raw widths and its entropy term the sign that increases entropy; here widths over their mean, and entropy falls.",
        ),
        entry(
            "residual_moe",
            "A dense network for every token beside the experts: y = c0 MoE(x) + c1 MLP(x).",
            "`residual = \"coefficient\"` in [model.moe]: c = softmax(x Wc + b); `\"sum\"`: both 1. The dense network is the shared expert.",
            "Wc [d, 2], b [2]",
            "2 T d",
            "Rajbhandari et al. 2022 (DeepSpeed-MoE) section 4; deepspeed/moe/layer.py.",
            "The paper's text says a plain sum, the code a learned coefficient.",
        ),
        entry(
            "soft_moe",
            "Slots are mixtures of all tokens; every token mixes all slots' results.",
            "Fully differentiable, no drops. NOT causal.",
            "phi [d, slots], scale; x [T, d] of one sequence",
            "6 T slots d",
            "Puigcerver et al. 2023 algorithm 1; vmoe soft_moe/router.py.",
            "lucidrains normalises the slots' tokens; the paper and this crate mix them raw.",
        ),
        entry(
            "smear",
            "One merged expert per sequence.",
            "Weights softmax of the mean. NOT causal.",
            "router [d, E]",
            "E parameters per sequence",
            "Muqeeth et al. 2023; r-three/smear.",
            "None known.",
        ),
        entry(
            "lory",
            "One merged expert per segment, weighted by the previous segment.",
            "First segment uniform: causal. With its own mean (paper) it leaks within the segment.",
            "router [d, E], segment length",
            "E parameters per segment",
            "Zhong et al. 2024 section 3.",
            "Stop-gradient hides the gradient, not the value.",
        ),
        entry(
            "mixture_of_tokens",
            "Every expert computes one mixture of the tokens at one position of g sequences.",
            "Causal, but a sequence depends on the others in its group.",
            "controller [d, E], x [g, d]",
            "2 g E d",
            "Antoniak et al. 2023; llm-random continuous_moe.py.",
            "None known.",
        ),
        entry(
            "block_causal_soft",
            "Soft MoE whose slots see earlier blocks only.",
            "Strictly causal; block 0 gives 0, so it is paired with a dense FFN.",
            "phi [d, slots], block length",
            "4 T slots d + slots expert rows per block",
            "A design of this project.",
            "None: there is one implementation.",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recipe_is_valid_and_every_entry_prints() {
        for entry in all() {
            if let Some(router) = &entry.recipe.router {
                let (k, zero) = (entry.recipe.top_k.unwrap_or(2), entry.recipe.zero_computation);
                router.validate_training(64, k, zero.as_ref()).unwrap_or_else(|e| panic!("{}: {e}", entry.name));
            }
            assert!(entry.to_string().lines().count() >= 8);
            for part in [entry.does, entry.rules, entry.shapes, entry.cost, entry.source, entry.disagree] {
                assert!(!part.is_empty(), "{} lacks a part", entry.name);
            }
            assert_eq!(entry.refuses().is_some(), entry.recipe.router.is_some(), "{}", entry.name);
        }
        let sorted = |mut names: Vec<&'static str>| {
            names.sort_unstable();
            names
        };
        assert_eq!(sorted(all().iter().map(|entry| entry.name).collect()), sorted(Recipe::names().collect()));
    }

    #[test]
    fn an_unknown_policy_names_the_nearest() {
        assert_eq!(find("Top-K").unwrap().name, "top_k");
        assert!(find("gshart").unwrap_err().to_string().contains("nearest is gshard"));
    }
}
