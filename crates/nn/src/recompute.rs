//! Recomputing activations, which others call activation checkpointing (it has nothing to do with the checkpoints of a run): a layer
//! keeps its input and its routing, and computes everything else again in the backward pass.
//!
//! ```text
//! forward    x -> layer without autodiff -> y, routing           kept: x, what the router decided
//! backward   dy -> layer again on a graph of its own, with the kept decision -> dx, gradients of the layer's parameters
//! ```
//!
//! Routing is kept, not recomputed: the second pass takes choices, drops, weights and drawn noise from the first, so that both
//! are the same function whatever a router draws. Logits are computed again, since gradients go through them. Every operation
//! gives the same bits each time, so losses and gradients are those of training with every activation kept, bit for bit.
//!
//! The memory of a layer's activations is then held for one layer at a time. The price is one more forward pass.

use std::sync::{Arc, Mutex, PoisonError};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};
use mixtura_ops::{
    GradientSlot, PackCell, host_function, host_function_2, into_vec, lend_gradient, tensor_like, with_slice,
};

use crate::block::{Block, Feedforward};
use crate::context::ForwardContext;
use crate::error::ForwardError;
use crate::ffn::Experts;
use crate::layer_routing::LayerRouting;

/// Room for the activations of one layer's networks, for the layers to take turns with: of the routed experts (or the dense
/// network), of those of other widths, and of the shared ones. What is beyond eight keeps a room of its own.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rooms([PackCell; 8]);

impl Rooms {
    fn enter(&self, block: &Block) {
        block.networks().into_iter().zip(&self.0).for_each(|(network, room)| room.move_room_to(network.cell()));
    }

    fn leave(&self, block: &Block) {
        block.networks().into_iter().zip(&self.0).for_each(|(network, room)| network.cell().move_room_to(room));
    }
}

impl Block {
    /// As [`Block::forward`], keeping only `x_td` and the routing. Of what is pushed to `routing`, the logits and the losses have a
    /// graph, the weights do not.
    pub(crate) fn forward_recomputed(
        &self,
        x_td: Tensor<2>,
        layer: usize,
        context: &ForwardContext,
        rooms: &Rooms,
        routing: &mut Vec<LayerRouting>,
    ) -> Result<Tensor<2>, ForwardError> {
        let untracked = self.valid();
        let input_td = x_td.clone().inner();
        let previous = routing.last().cloned();
        let previous_untracked = previous.clone().map(without_graph);
        let mut seen: Vec<_> = previous_untracked.iter().cloned().collect();
        let y_td = untracked.forward(input_td.clone(), layer, context, &mut seen)?;
        let own = (seen.len() > usize::from(previous.is_some())).then(|| seen.pop()).flatten();
        let shape = y_td.dims();

        let mut lend = LendGradients { x_td, slots: Vec::new() };
        self.visit(&mut lend);
        let LendGradients { x_td, slots } = lend;
        let slopes = Arc::new(Mutex::new(Slopes::default()));
        let again = Again {
            block: untracked,
            input_td,
            previous: previous_untracked,
            layer,
            context: ForwardContext { kept: own.as_ref().map(|own| own.routed.clone()), ..context.clone() },
            slots,
            slopes: slopes.clone(),
            rooms: rooms.clone(),
        };
        let y_td = match previous {
            None => host_function(x_td, into_vec(y_td), shape, move |dy| again.backward(dy).0),
            Some(previous) => {
                host_function_2(x_td, previous.logits_te, into_vec(y_td), shape, move |dy| again.backward(dy))
            }
        };
        if let Some(mut own) = own {
            (own.logits_te, own.losses.total) = beside(&y_td, &own, slopes);
            routing.push(own);
        }
        Ok(y_td)
    }

    /// The networks whose activations are the bulk of a layer's.
    fn networks(&self) -> Vec<&Experts> {
        match &self.ffn {
            Feedforward::Mlp(network) => vec![network],
            Feedforward::Moe(moe) => {
                std::iter::once(&moe.experts).chain(&moe.other_widths).chain(&moe.shared).collect()
            }
            Feedforward::Soft(soft) => soft.networks(),
        }
    }
}

/// The same values. What waits in a graph for the backward pass must not hold on to the graph.
fn without_graph(mut routing: LayerRouting) -> LayerRouting {
    routing.logits_te = routing.logits_te.inner();
    routing.weight_n = routing.weight_n.inner();
    routing.losses.total = routing.losses.total.inner();
    routing
}

/// Slopes of the objective in what a layer gives besides its output.
#[derive(Debug, Default)]
struct Slopes {
    /// In the router's logits, which the next layer's router may look at; empty for none.
    logits_te: Vec<f32>,
    /// In the auxiliary loss.
    total: f32,
}

/// Logits and auxiliary loss as descendants of the layer's output, so that their slopes are known when the backward pass comes to
/// the layer itself.
fn beside(y_td: &Tensor<2>, own: &LayerRouting, slopes: Arc<Mutex<Slopes>>) -> (Tensor<2>, Tensor<1>) {
    let of_logits = slopes.clone();
    let [outputs, logits] = [y_td, &own.logits_te].map(|tensor| tensor.dims().iter().product());
    let value = |logits: &[f32]| logits.to_vec();
    let logits_te =
        host_function(y_td.clone(), with_slice(&own.logits_te, value), own.logits_te.dims(), move |dlogits| {
            if dlogits.iter().any(|d| *d != 0.0) {
                of_logits.lock().unwrap_or_else(PoisonError::into_inner).logits_te = dlogits.to_vec();
            }
            vec![0.0; outputs]
        });
    let total = host_function(logits_te.clone(), with_slice(&own.losses.total, value), [1], move |dtotal| {
        slopes.lock().unwrap_or_else(PoisonError::into_inner).total = dtotal[0];
        vec![0.0; logits]
    });
    (logits_te, total)
}

/// All that a second pass through a layer needs.
struct Again {
    block: Block,
    input_td: Tensor<2>,
    /// What the MoE layer before decided.
    previous: Option<LayerRouting>,
    layer: usize,
    context: ForwardContext,
    slots: Vec<GradientSlot>,
    slopes: Arc<Mutex<Slopes>>,
    rooms: Rooms,
}

impl Again {
    /// The gradients of the layer's input and of the previous layer's logits; those of its parameters go to their slots.
    fn backward(self, dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let Self { block, input_td, previous, layer, context, slots, slopes, rooms } = self;
        let block = block.train();
        rooms.enter(&block);
        let dy_td = tensor_like(dy.to_vec(), input_td.dims(), &input_td);
        let x_td = input_td.autodiff().require_grad();
        let previous = previous
            .map(|previous| LayerRouting { logits_te: previous.logits_te.autodiff().require_grad(), ..previous });
        let mut routing: Vec<_> = previous.iter().cloned().collect();
        let y_td = block.forward(x_td.clone(), layer, &context, &mut routing);
        let y_td = y_td.unwrap_or_else(|error| panic!("layer {layer} went well the first time: {error}"));
        let mut objective = (y_td * dy_td).sum();
        let slopes = std::mem::take(&mut *slopes.lock().unwrap_or_else(PoisonError::into_inner));
        if let Some(own) = routing.pop().filter(|_| routing.len() == usize::from(previous.is_some())) {
            // In this order: see `Decoder::loss`.
            objective = own.losses.total.mul_scalar(slopes.total) + objective;
            if !slopes.logits_te.is_empty() {
                let slope_te = tensor_like(slopes.logits_te, own.logits_te.dims(), &own.logits_te);
                objective = (own.logits_te * slope_te).sum() + objective;
            }
        }
        let mut gradients = objective.backward();
        block.visit(&mut FillSlots { gradients: &mut gradients, slots: slots.iter() });
        rooms.leave(&block);
        let dx = into_vec(x_td.grad_remove(&mut gradients).expect("a layer's output depends on its input"));
        let dprevious = previous.map_or_else(Vec::new, |previous| {
            let gradient = previous.logits_te.grad_remove(&mut gradients);
            gradient.map_or_else(|| vec![0.0; previous.logits_te.dims().iter().product()], into_vec)
        });
        (dx, dprevious)
    }
}

/// Passes the input by every trained parameter, in the order of the walk.
struct LendGradients {
    x_td: Tensor<2>,
    slots: Vec<GradientSlot>,
}

impl ModuleVisitor for LendGradients {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        if value.is_require_grad() {
            let slot = GradientSlot::default();
            self.x_td = lend_gradient(self.x_td.clone(), &value, &slot);
            self.slots.push(slot);
        }
    }
}

/// The same walk over the layer that was computed again.
struct FillSlots<'a> {
    gradients: &'a mut Gradients,
    slots: std::slice::Iter<'a, GradientSlot>,
}

impl ModuleVisitor for FillSlots<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        if !value.is_require_grad() {
            return;
        }
        let slot = self.slots.next().expect("the same parameters are trained in both passes");
        if let Some(gradient) = value.grad_remove(self.gradients) {
            slot.fill(gradient);
        }
    }
}
