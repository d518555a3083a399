//! The load and z-losses of two-level routing (Shazeer et al. 2017, appendix B).
//!
//! `Load_H[i, j] = Load_p[i] Load_i(X_i)[j] / |X_i|`, X_i the tokens that reached group i. The first factor gives the primary
//! gate its gradient. A level whose every choice is taken has probability 1 and no gradient, as in the flat estimator.

use super::Auxiliary;
use super::cv::{cv_squared, cv_squared_backward};
use super::load::{LoadEstimate, ThresholdGradient};
use crate::activation::{log_sum_exp, sigmoid, softmax};
use crate::policy::hierarchical::Levels;
use crate::real::Real;
use crate::route::{NoiseDraw, Routed, RouterInput};

/// One gate's logits within the rows of all: which tokens, and which columns.
struct Part {
    tokens: Vec<usize>,
    columns: std::ops::Range<usize>,
    estimate: Option<LoadEstimate>,
}

impl Part {
    fn new<S: Real>(
        tokens: Vec<usize>,
        columns: std::ops::Range<usize>,
        k: usize,
        width: usize,
        clean: &[S],
        noise: &NoiseDraw<S>,
    ) -> Self {
        let gather = |values: &[S]| -> Vec<S> {
            let row = |t: usize| values[t * width + columns.start..t * width + columns.end].to_vec();
            tokens.iter().flat_map(|&t| row(t)).collect()
        };
        let (clean, noisy, sd) = (gather(clean), gather(&noise.logits_te), gather(&noise.sd_te));
        let estimate = LoadEstimate::new(&clean, &noisy, &sd, columns.len(), k);
        Self { tokens, columns, estimate }
    }

    /// Sum over the part's tokens of the probability of being selected; all of them where everything is.
    fn load(&self) -> Vec<f64> {
        let all = || vec![self.tokens.len() as f64; self.columns.len()];
        self.estimate.as_ref().map_or_else(all, |estimate| estimate.load_e.clone())
    }

    /// Adds the gradient for the logits and for `x W_noise`.
    fn backward<S: Real>(
        &self,
        dload: &[f64],
        width: usize,
        noise: &NoiseDraw<S>,
        raw: Option<&[S]>,
        out: &mut Auxiliary<S>,
    ) {
        let Some(estimate) = &self.estimate else { return };
        let (dclean, dnoisy, dsd) = estimate.backward(dload, ThresholdGradient::Flow);
        let cells = self.tokens.iter().flat_map(|&t| self.columns.clone().map(move |c| t * width + c));
        for (from, at) in cells.enumerate() {
            out.dlogits_te[at] += S::of(dclean[from] + dnoisy[from]);
            if let (Some(draw), Some(raw)) = (&mut out.draw_noise_te, raw) {
                let dsd = dsd[from] + dnoisy[from] * noise.eps_te[at].f64();
                draw[at] += S::of(dsd * sigmoid(raw[at].f64()));
            }
        }
    }
}

/// CV^2 of the two-level load over all experts; without noise that of the hard load, which has no gradient.
pub(super) fn load_loss<S: Real>(
    levels: Levels,
    input: &RouterInput<S>,
    routed: &Routed<S>,
    coefficient: f64,
    out: &mut Auxiliary<S>,
) -> f64 {
    let hard = || cv_squared(&routed.assignment.demand.iter().map(|&c| f64::from(c)).collect::<Vec<_>>());
    let Some(noise) = &routed.noise else { return hard() };
    let (experts, width, b) = (levels.experts(), levels.width(), levels.per_group);
    let real: Vec<usize> = (0..routed.shape.tokens).filter(|&t| input.real_t.is_none_or(|real| real[t])).collect();
    let reached = |i: usize| -> Vec<usize> {
        let in_group = |&e: &u32| e as usize / b == i;
        real.iter().copied().filter(|&t| routed.choices.of_token(t).iter().any(in_group)).collect()
    };
    let part = |tokens, columns, k| Part::new(tokens, columns, k, width, input.logits_te, noise);
    let primary = part(real.clone(), experts..width, levels.keep);
    let groups: Vec<Part> = (0..levels.groups).map(|i| part(reached(i), i * b..(i + 1) * b, levels.inner)).collect();
    let primary_load = primary.load();
    let inner_load: Vec<Vec<f64>> = groups.iter().map(Part::load).collect();
    let share = |i: usize| 1.0 / (groups[i].tokens.len() as f64).max(1.0);
    let load: Vec<f64> = (0..experts).map(|e| primary_load[e / b] * inner_load[e / b][e % b] * share(e / b)).collect();
    let value = cv_squared(&load);
    if coefficient != 0.0 {
        let dload: Vec<f64> = cv_squared_backward(&load).iter().map(|d| d * coefficient).collect();
        let of_group = |i: usize| dload[i * b..(i + 1) * b].iter();
        let dprimary: Vec<f64> = (0..levels.groups)
            .map(|i| of_group(i).zip(&inner_load[i]).map(|(d, load)| d * load).sum::<f64>() * share(i))
            .collect();
        primary.backward(&dprimary, width, noise, input.raw_noise_te, out);
        for (i, group) in groups.iter().enumerate() {
            let dinner: Vec<f64> = of_group(i).map(|d| d * primary_load[i] * share(i)).collect();
            group.backward(&dinner, width, noise, input.raw_noise_te, out);
        }
    }
    value
}

/// Mean over tokens of the squared log-sum-exp over the groups plus the mean of those within the groups.
pub(super) fn z_loss<S: Real>(
    levels: Levels,
    input: &RouterInput<S>,
    routed: &Routed<S>,
    coefficient: f64,
    dlogits_ts: &mut [S],
) -> f64 {
    let real: Vec<usize> = (0..routed.shape.tokens).filter(|&t| input.real_t.is_none_or(|real| real[t])).collect();
    let (experts, width) = (levels.experts(), levels.width());
    let counted = real.len().max(1) as f64;
    let mut value = 0.0;
    for &t in &real {
        value += routed.lse_t[t].f64().powi(2);
        if coefficient == 0.0 {
            continue;
        }
        let row = &input.logits_te[t * width..(t + 1) * width];
        let (dsecondary, dprimary) = dlogits_ts[t * width..(t + 1) * width].split_at_mut(experts);
        let add = |logits: &[S], dlogits: &mut [S], factor: f64| {
            let mut probs = vec![S::ZERO; logits.len()];
            softmax(logits, &mut probs);
            let factor = S::of(2.0 * factor / counted) * log_sum_exp(logits);
            dlogits.iter_mut().zip(probs).for_each(|(dz, p)| *dz += factor * p);
        };
        let (secondary, primary) = levels.split(row);
        add(primary, dprimary, coefficient);
        let inner = secondary.chunks_exact(levels.per_group).zip(dsecondary.chunks_exact_mut(levels.per_group));
        inner.for_each(|(logits, dlogits)| add(logits, dlogits, coefficient / levels.groups as f64));
    }
    value / counted
}
