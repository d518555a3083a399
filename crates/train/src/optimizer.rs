//! AdamW over a model's named parameters: one fused pass per parameter, after clipping by the global norm.
//!
//! Per element, with `g` the clipped gradient: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
//! `p -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay p)`; `decay` is 0 for norms and routers. A parameter without
//! a gradient in a step (an expert layer that the loss did not reach) keeps its value and moments.
//!
//! The norm is a sum over parameters in their order, each in fixed blocks, so neither threads nor the ISA change it.

use burn::tensor::Tensor;
use mixtura_kernels::adamw::{AdamWParams, adamw_step};
use mixtura_kernels::grad_norm::grad_norm_squared;
use mixtura_nn::{NamedParameters, ParameterInfo};
use mixtura_ops::{Isa, with_slice, with_slice_mut};
use rayon::prelude::*;

use crate::config::OptimizerConfig;

/// First and second moment of one parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    /// Dotted name of the parameter.
    pub name: String,
    /// Mean of gradients.
    pub m: Vec<f32>,
    /// Mean of squared gradients.
    pub v: Vec<f32>,
}

/// The optimizer's state.
#[derive(Debug, Clone)]
pub struct AdamW {
    config: OptimizerConfig,
    isa: Isa,
    /// Updates made so far.
    pub updates: u64,
    /// In parameter order.
    pub moments: Vec<Moments>,
}

/// The gradients of one optimizer step, in parameter order.
#[derive(Debug, Default)]
pub struct Accumulated {
    gradients: Vec<Option<Tensor<1>>>,
}

impl Accumulated {
    /// Adds the gradients of a micro-batch; the order of the calls is the order of the sum.
    pub fn add(&mut self, gradients: Vec<Option<Tensor<1>>>) {
        if self.gradients.is_empty() {
            self.gradients = gradients;
            return;
        }
        for (sum, new) in self.gradients.iter_mut().zip(gradients) {
            *sum = match (sum.take(), new) {
                (Some(sum), Some(new)) => {
                    let sum = with_slice(&new, |new| with_slice_mut(sum, |sum| add_to(sum, new)));
                    mixtura_ops::recycle(new);
                    Some(sum)
                }
                (sum, new) => sum.or(new),
            };
        }
    }

    /// Lends each gradient in parameter order; parameters without one are skipped.
    pub fn for_each(&self, mut f: impl FnMut(usize, &[f32])) {
        for (index, gradient) in self.gradients.iter().enumerate() {
            if let Some(gradient) = gradient {
                with_slice(gradient, |values| f(index, values));
            }
        }
    }

    /// The global norm.
    pub fn norm(&self, isa: Isa) -> f64 {
        let mut sum = 0.0;
        self.for_each(|_, values| sum += grad_norm_squared(isa, values));
        sum.sqrt()
    }
}

/// Elements are independent: the threads share the memory traffic and change no bit.
fn add_to(sum: &mut [f32], new: &[f32]) {
    const CHUNK: usize = 1 << 14;
    let chunks = sum.par_chunks_mut(CHUNK).zip(new.par_chunks(CHUNK));
    chunks.for_each(|(sum, new)| sum.iter_mut().zip(new).for_each(|(s, n)| *s += n));
}

impl Drop for Accumulated {
    /// The next step's gradients are written where these were: four bytes per parameter that need not be mapped and zeroed anew.
    fn drop(&mut self) {
        self.gradients.drain(..).flatten().for_each(mixtura_ops::recycle);
    }
}

impl AdamW {
    /// Zero moments for these parameters.
    pub fn new(config: &OptimizerConfig, isa: Isa, infos: &[ParameterInfo]) -> Self {
        let zero = |info: &ParameterInfo| Moments {
            name: info.name.clone(),
            m: vec![0.0; info.len()],
            v: vec![0.0; info.len()],
        };
        Self { config: config.clone(), isa, updates: 0, moments: infos.iter().map(zero).collect() }
    }

    /// Updates the model in place. `norm` is the gradients' global norm.
    pub fn step<M: NamedParameters>(&mut self, model: &mut M, gradients: &Accumulated, norm: f64, lr: f64) {
        self.updates += 1;
        let config = &self.config;
        let scale = if config.clip > 0.0 && norm > config.clip { config.clip / norm } else { 1.0 };
        let correction = |beta: f64| 1.0 - beta.powi(self.updates.min(i32::MAX as u64) as i32);
        let mut params = AdamWParams {
            lr: lr as f32,
            beta1: config.beta1 as f32,
            beta2: config.beta2 as f32,
            eps: config.eps as f32,
            weight_decay: 0.0,
            bias_correction1: correction(config.beta1) as f32,
            bias_correction2: correction(config.beta2) as f32,
            grad_scale: scale as f32,
        };
        model.for_each_parameter_mut(|index, info, values| {
            let Some(Some(gradient)) = gradients.gradients.get(index) else { return };
            params.weight_decay = if info.decays() { config.weight_decay as f32 } else { 0.0 };
            let Moments { m, v, .. } = &mut self.moments[index];
            with_slice(gradient, |gradient| adamw_step(self.isa, &params, values, gradient, m, v));
        });
    }
}
