//! Activation checkpointing: a layer keeps its input and its routing, and computes everything else again in the backward pass.
//!
//! ```text
//! forward    x -> layer without autodiff -> y, routing           kept: x, what the router decided
//! backward   dy -> layer again on a graph of its own, with the kept decision -> dx, gradients of the layer's parameters
//! ```
//!
//! Routing is kept, not recomputed: the second pass takes choices, drops, weights and drawn noise from the first, so that both
//! are the same function whatever a router draws. Logits are computed again, since gradients go through them. Every operation
//! gives the same bits each time, so losses and gradients are those of training without checkpointing, bit for bit.
//!
//! The memory of a layer's activations is then held for one layer at a time. The price is one more forward pass.

use std::sync::{Arc, Mutex, PoisonError};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};
use mixtura_ops::{GradientSlot, PackCell, host_function, into_vec, lend_gradient, tensor_from_vec, with_slice};

use crate::context::ForwardContext;
use crate::decoder::{Block, Feedforward};
use crate::error::ForwardError;
use crate::ffn::Experts;
use crate::router::LayerRouting;

/// Room for the activations of one layer's networks, for the layers to take turns with: of the routed experts (or the dense
/// network), and of the shared ones.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rooms([PackCell; 2]);

impl Rooms {
    fn enter(&self, block: &Block) {
        block.networks().into_iter().zip(&self.0).for_each(|(network, room)| room.move_room_to(network.cell()));
    }

    fn leave(&self, block: &Block) {
        block.networks().into_iter().zip(&self.0).for_each(|(network, room)| network.cell().move_room_to(room));
    }
}

impl Block {
    /// As [`Block::forward`], keeping only `x_td` and the routing. What is pushed to `routing` has no graph, but for the losses.
    pub(crate) fn forward_checkpointed(
        &self,
        x_td: Tensor<2>,
        layer: usize,
        context: &ForwardContext,
        rooms: &Rooms,
        routing: &mut Vec<LayerRouting>,
    ) -> Result<Tensor<2>, ForwardError> {
        let untracked = self.valid();
        let input_td = x_td.clone().inner();
        let mut own = Vec::new();
        let y_td = untracked.forward(input_td.clone(), layer, context, &mut own)?;
        let shape = y_td.dims();

        let mut lend = LendGradients { x_td, slots: Vec::new() };
        self.visit(&mut lend);
        let LendGradients { x_td, slots } = lend;
        let auxiliary = Arc::new(Mutex::new(0.0));
        let again = Again {
            block: untracked,
            input_td,
            layer,
            context: ForwardContext { kept: own.first().map(|own| own.routed.clone()), ..context.clone() },
            slots,
            auxiliary: auxiliary.clone(),
            rooms: rooms.clone(),
        };
        let y_td = host_function(x_td, into_vec(y_td), shape, move |dy| again.backward(dy));
        for mut own in own {
            own.losses.total = after(&y_td, &own.losses.total, auxiliary.clone());
            routing.push(own);
        }
        Ok(y_td)
    }

    /// The networks whose activations are the bulk of a layer's.
    fn networks(&self) -> Vec<&Experts> {
        match &self.ffn {
            Feedforward::Mlp(network) => vec![network],
            Feedforward::Moe(moe) => std::iter::once(&moe.experts).chain(&moe.shared).collect(),
            Feedforward::Soft(soft) => soft.networks(),
        }
    }
}

/// The auxiliary loss as a child of the layer's output, so that its slope is known when the layer is computed again.
fn after(y_td: &Tensor<2>, total: &Tensor<1>, slope: Arc<Mutex<f32>>) -> Tensor<1> {
    let values = y_td.dims().iter().product();
    host_function(y_td.clone(), with_slice(total, |total| total.to_vec()), [1], move |dtotal| {
        *slope.lock().unwrap_or_else(PoisonError::into_inner) = dtotal[0];
        vec![0.0; values]
    })
}

/// All that a second pass through a layer needs.
struct Again {
    block: Block,
    input_td: Tensor<2>,
    layer: usize,
    context: ForwardContext,
    slots: Vec<GradientSlot>,
    /// Slope of the objective in the layer's auxiliary loss.
    auxiliary: Arc<Mutex<f32>>,
    rooms: Rooms,
}

impl Again {
    /// The gradient of the layer's input; those of its parameters go to their slots.
    fn backward(self, dy: &[f32]) -> Vec<f32> {
        let Self { block, input_td, layer, context, slots, auxiliary, rooms } = self;
        let block = block.train();
        rooms.enter(&block);
        let dy_td = tensor_from_vec(dy.to_vec(), input_td.dims(), &input_td.device());
        let x_td = input_td.autodiff().require_grad();
        let mut routing = Vec::new();
        let y_td = block.forward(x_td.clone(), layer, &context, &mut routing);
        let y_td = y_td.unwrap_or_else(|error| panic!("layer {layer} went well the first time: {error}"));
        let mut objective = (y_td * dy_td).sum();
        let slope = *auxiliary.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = routing.pop() {
            // In this order: see `Decoder::loss`.
            objective = own.losses.total.mul_scalar(slope) + objective;
        }
        let mut gradients = objective.backward();
        block.visit(&mut FillSlots { gradients: &mut gradients, slots: slots.iter() });
        rooms.leave(&block);
        into_vec(x_td.grad_remove(&mut gradients).expect("a layer's output depends on its input"))
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
