//! The cases of section 0 and of the routers most models use: shared fixture, ties, edges, capacity formulas, noisy top-k,
//! Switch, Mixtral, dropless rows, OLMoE.

use super::GoldenError;
use super::case::{Case, Matrix, rows_json};
use crate::activation::{sigmoid, softmax_rows};
use crate::capacity::LIBRARY_FORMULAS;
use crate::config::{Activation, BalanceConfig, BalanceLoss, BalanceScope, Noise, Normalize, RouterConfig};
use crate::losses::{
    AuxiliaryOptions, LoadEstimate, ThresholdGradient, auxiliary, cv_squared, cv_squared_backward, cv_squared_bessel,
    importance,
};
use crate::reference::combine::{combine, scaling_experts};
use crate::rng::StepContext;
use crate::route::{RouteShape, Routed, RouterInput, route};
use crate::select::{arg_max, order_descending, top_k};
use serde_json::{Map, Value, json};

type Found = Result<Value, GoldenError>;

/// The shared logits, with their softmax and log-sum-exp.
pub(super) struct Logits {
    pub z: Matrix,
    pub p: Matrix,
    pub lse: Vec<f64>,
}

impl Logits {
    pub(super) fn of(case: &Case, name: &str) -> Result<Self, GoldenError> {
        let z = case.matrix(name)?;
        if z.cols == 0 {
            return Err(case.shape(name, "at least one token and one expert", "none"));
        }
        if let Some(bad) = z.data.iter().position(|v| !v.is_finite()) {
            return Err(case.shape(name, "finite numbers", &z.data[bad].to_string()));
        }
        let mut p = Matrix::new(z.rows, z.cols, vec![0.0; z.data.len()]);
        let mut lse = vec![0.0; z.rows];
        softmax_rows(&z.data, z.cols, &mut p.data, &mut lse);
        Ok(Self { z, p, lse })
    }

    pub(super) fn shape(&self, top_k: usize) -> RouteShape {
        RouteShape { tokens: self.z.rows, experts: self.z.cols, top_k }
    }

    /// Routes in f64, evaluation mode unless `step` says otherwise.
    pub(super) fn route(
        &self,
        case: &Case,
        k: usize,
        config: &RouterConfig,
        capacity: Option<usize>,
    ) -> Result<Routed<f64>, GoldenError> {
        let input = RouterInput { capacity, ..RouterInput::new(&self.z.data) };
        case.routing(route(&input, self.shape(k), config, &StepContext::evaluation()))
    }
}

/// The fixture's tokens and the scale of each expert `x -> s x`.
pub(super) struct Tokens {
    pub x: Matrix,
    pub scale: Vec<f64>,
}

impl Tokens {
    pub(super) fn of(case: &Case, shape: RouteShape) -> Result<Self, GoldenError> {
        let x = case.matrix("X")?;
        if x.rows != shape.tokens {
            return Err(case.shape("X", &format!("{} tokens", shape.tokens), &format!("{} tokens", x.rows)));
        }
        Ok(Self { scale: case.numbers_sized("expert_scale", shape.experts)?, x })
    }

    /// The layer's output for a routing, experts being scalings.
    pub(super) fn output(&self, routed: &Routed<f64>) -> Matrix {
        let y = combine(&self.x.data, self.x.cols, &routed.assignment, &routed.weight_n, scaling_experts(&self.scale));
        Matrix::new(self.x.rows, self.x.cols, y)
    }
}

pub(super) fn fixture(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let shape = logits.shape(2);
    let two = logits.route(case, 2, &RouterConfig::default(), None)?;
    Tokens::of(case, shape)?;
    Ok(json!({
        "P": logits.p.json(),
        "top1": top_k(&logits.z.data, shape.experts, 1),
        "top2": rows_json(&two.choices.experts, 2),
        "lse": logits.lse,
    }))
}

pub(super) fn ties(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let two = logits.route(case, 2, &RouterConfig::default(), None)?;
    Ok(json!({
        "argmax": (0..logits.z.rows).map(|t| arg_max(logits.z.row(t))).collect::<Vec<_>>(),
        "top2": rows_json(&two.choices.experts, 2),
        "order_desc": order_descending(&case.numbers("priority")?),
    }))
}

pub(super) fn edge(case: &Case) -> Found {
    // No tokens: an empty output and every loss 0, by definition.
    if case.matrix("Z")?.rows == 0 {
        return Ok(json!({ "P": [], "aux": 0.0, "z_loss": 0.0 }));
    }
    let logits = Logits::of(case, "Z")?;
    let config = RouterConfig::switch();
    let routed = logits.route(case, 1, &config, None)?;
    let aux = losses(case, &logits, &routed, BalanceLoss::Switch)?;
    Ok(json!({ "P": logits.p.json(), "aux": aux.balance, "z_loss": aux.z }))
}

pub(super) fn capacity(case: &Case) -> Found {
    let rows = case.input("rows")?.as_array().cloned().unwrap_or_default();
    let mut table = Vec::new();
    for row in &rows {
        let values = case.numbers_of("rows", row)?;
        let whole = |i: usize| values.get(i).copied().filter(|v| *v >= 1.0 && v.fract() == 0.0 && *v <= 1e6);
        let ([Some(s), Some(e), Some(k)], Some(&cf)) = ([whole(0), whole(1), whole(3)], values.get(2)) else {
            return Err(case.shape(
                "rows",
                "[S, E, cf, k] with S, E, k whole and between 1 and 10^6",
                &row.to_string(),
            ));
        };
        let exact = crate::capacity::Fraction::from_decimal(cf);
        let exact = exact.ok_or_else(|| case.shape("rows", "a capacity factor between 0 and 1e6", &cf.to_string()))?;
        let mut object = Map::new();
        for (name, formula) in LIBRARY_FORMULAS {
            object.insert((*name).to_string(), json!(formula(s as u128, e as u128, exact, k as u128) as u64));
        }
        table.push(Value::Object(object));
    }
    Ok(json!({ "rows": table }))
}

pub(super) fn noisy_top_k(case: &Case) -> Found {
    let logits = Logits::of(case, "clean")?;
    let (tokens, experts) = (logits.z.rows, logits.z.cols);
    let raw = case.matrix_shaped("raw_noise", tokens, experts)?;
    let eps = case.matrix_shaped("eps", tokens, experts)?;
    let k = case.count("k")?;
    let config =
        RouterConfig { noise: Noise::Softplus { floor: case.number("noise_floor")? }, ..RouterConfig::noisy_top_k() };
    let input = RouterInput::new(&logits.z.data).with_raw_noise(&raw.data).with_noise(&eps.data);
    let step = StepContext::training(0, 0, 0);
    let routed = case.routing(route(&input, logits.shape(k), &config, &step))?;
    let floored = RouterConfig { noise: Noise::Softplus { floor: 1e-2 }, ..config.clone() };
    let floored = case.routing(route(&input, logits.shape(k), &floored, &step))?;
    let evaluated = case.routing(route(&input, logits.shape(k), &config, &StepContext::evaluation()))?;
    let tokens_x = Tokens::of(case, logits.shape(k))?;

    let estimate = |routed: &Routed<f64>| {
        let noise = routed.noise.as_ref()?;
        LoadEstimate::new(&logits.z.data, &noise.logits_te, &noise.sd_te, experts, k)
    };
    let no_threshold = || case.shape("k", &format!("fewer than {experts}"), &k.to_string());
    let load = estimate(&routed).ok_or_else(no_threshold)?;
    let load_floored = estimate(&floored).ok_or_else(no_threshold)?;
    let g = routed.combine_te();
    let imp = importance(&g, experts);
    let dload = cv_squared_backward(&load.load_e);
    let (mut dclean, dnoisy, mut dsd) = load.backward(&dload, ThresholdGradient::Flow);
    let (dclean_stopped, ..) = load.backward(&dload, ThresholdGradient::Stop);
    for at in 0..dclean.len() {
        dclean[at] += dnoisy[at];
        dsd[at] = (dsd[at] + dnoisy[at] * eps.data[at]) * sigmoid(raw.data[at]);
    }
    let noisy = routed.noise.as_ref().map(|n| n.logits_te.clone()).unwrap_or_default();
    Ok(json!({
        "H": rows_json(&noisy, experts),
        "G": rows_json(&g, experts),
        "P_in_topk": rows_json(&load.probability_te, experts),
        "importance": imp,
        "load": load.load_e,
        "hard_load": routed.assignment.demand,
        "cv2_importance": cv_squared(&imp),
        "cv2_load": cv_squared(&load.load_e),
        "cv2_importance_bessel": cv_squared_bessel(&imp),
        "cv2_load_bessel": cv_squared_bessel(&load.load_e),
        "dLload_dclean_full": rows_json(&dclean, experts),
        "dLload_draw_full": rows_json(&dsd, experts),
        "dLload_dclean_stopthr": rows_json(&dclean_stopped, experts),
        "y": tokens_x.output(&routed).json(),
        "G_eval": rows_json(&evaluated.combine_te(), experts),
        "load_with_floor_1e2": load_floored.load_e,
    }))
}

pub(super) fn switch(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let experts = logits.z.cols;
    let routed = logits.route(case, 1, &RouterConfig::switch(), Some(case.count("C")?))?;
    let tokens = Tokens::of(case, logits.shape(1))?;
    let y = tokens.output(&routed);
    let with_residual: Vec<f64> = y.data.iter().zip(&tokens.x.data).map(|(y, x)| y + x).collect();
    let aux = losses(case, &logits, &routed, BalanceLoss::Switch)?;
    let jitter = case.matrix_shaped("jitter", tokens.x.rows, tokens.x.cols)?;
    let gate = case.matrix("Wr")?;
    if gate.rows != tokens.x.cols {
        return Err(case.shape("Wr", &format!("{} rows", tokens.x.cols), &format!("{} rows", gate.rows)));
    }
    let jittered = tokens.x.data.iter().zip(&jitter.data).map(|(x, j)| x * j).collect();
    let jittered = Matrix::new(tokens.x.rows, tokens.x.cols, jittered);
    let tokens_f = logits.z.rows as f64;
    let f: Vec<f64> = routed.assignment.demand.iter().map(|&c| f64::from(c) / tokens_f).collect();
    let mean: Vec<f64> = importance(&logits.p.data, experts).iter().map(|p| p / tokens_f).collect();
    Ok(json!({
        "combine": rows_json(&routed.combine_te(), experts),
        "dropped": routed.assignment.dropped.iter().map(|d| d.token).collect::<Vec<_>>(),
        "y": y.json(),
        "y_with_residual": rows_json(&with_residual, tokens.x.cols),
        "f": f,
        "P": mean,
        "aux": aux.balance,
        "daux_dZ": rows_json(&aux.dlogits_te, experts),
        "logits_jittered": jittered.times(&gate).json(),
        "logits_clean": tokens.x.times(&gate).json(),
    }))
}

pub(super) fn mixtral(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let k = case.count("k")?;
    let config = RouterConfig { activation: Activation::SoftmaxSelected, ..RouterConfig::default() };
    let routed = logits.route(case, k, &config, None)?;
    let tokens = Tokens::of(case, logits.shape(k))?;
    let balance = losses(case, &logits, &routed, BalanceLoss::Switch)?.balance;
    Ok(json!({
        "topk": rows_json(&routed.choices.experts, k),
        "weights": rows_json(&routed.weight_of_pair, k),
        "combine": rows_json(&routed.combine_te(), logits.z.cols),
        "y": tokens.output(&routed).json(),
        "hf_balance": balance * k as f64,
        "k_normalised_balance": balance,
    }))
}

pub(super) fn dropless(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let (k, block) = (case.count("k")?, case.count("block")?);
    if block == 0 {
        return Err(case.shape("block", "at least 1", "0"));
    }
    let routed = logits.route(case, k, &RouterConfig::default(), None)?;
    let a = &routed.assignment;
    let pair_of_row = |row: usize| a.token_of_row[row] as usize * k + a.choice_of_row[row] as usize;
    let padded: Vec<usize> = a.load().iter().map(|&n| (n as usize).next_multiple_of(block)).collect();
    let padded_bins = running_sum(&padded);
    let mut padded_row = vec![0; a.rows()];
    for e in 0..a.experts {
        let start = padded_bins[e] - padded[e];
        for (i, row) in a.rows_of_expert(e).enumerate() {
            padded_row[pair_of_row(row)] = start + i;
        }
    }
    Ok(json!({
        "pair_expert": routed.choices.experts,
        "sorted_pairs": (0..a.rows()).map(pair_of_row).collect::<Vec<_>>(),
        "tokens_per_expert": a.load(),
        "bins": a.row_offsets[1..],
        "padded_tokens_per_expert": padded,
        "padded_bins": padded_bins,
        "padded_row_of_pair": padded_row,
        "total_rows": padded_bins.last(),
    }))
}

pub(super) fn olmoe(case: &Case) -> Found {
    let logits = Logits::of(case, "Z")?;
    let k = case.count("k")?;
    let config = RouterConfig { normalize: Normalize::Never, ..RouterConfig::default() };
    let routed = logits.route(case, k, &config, None)?;
    let aux = losses(case, &logits, &routed, BalanceLoss::Switch)?;
    // OLMoE's published coefficients; they are part of the case's question, not of its numbers.
    Ok(json!({
        "lbl": 0.01 * aux.balance,
        "zloss": 0.001 * aux.z,
        "y": Tokens::of(case, logits.shape(k))?.output(&routed).json(),
    }))
}

/// Balance and z-loss with coefficient 1 and 0, so `dlogits_te` is the balance loss's own gradient.
pub(super) fn losses(
    case: &Case,
    logits: &Logits,
    routed: &Routed<f64>,
    loss: BalanceLoss,
) -> Result<crate::losses::Auxiliary<f64>, GoldenError> {
    let scope = BalanceScope::Micro;
    let config = BalanceConfig { loss, coefficient: 1.0, scope, z_loss: 0.0, ..BalanceConfig::default() };
    let input = RouterInput::new(&logits.z.data);
    case.routing(auxiliary(&input, routed, &config, AuxiliaryOptions::default()))
}

fn running_sum(counts: &[usize]) -> Vec<usize> {
    let mut total = 0;
    let step = |&n: &usize| {
        total += n;
        total
    };
    counts.iter().map(step).collect()
}
