//! How modules make their parameters: by name, for a role, on first use, each from its own random streams.

use std::cell::RefCell;
use std::rc::Rc;

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Shape, Tensor, TensorData};

use crate::init::Init;
use crate::role::{Role, Roles};

/// Where a module under construction stands: the seed, the device and the path of the module in the model. All builders of a
/// model note the roles of its parameters in one place.
#[derive(Debug, Clone)]
pub struct Builder<'a> {
    seed: u64,
    device: &'a Device,
    path: String,
    roles: Rc<RefCell<Roles>>,
}

impl<'a> Builder<'a> {
    /// The root of a model.
    pub fn new(seed: u64, device: &'a Device) -> Self {
        Self { seed, device, path: String::new(), roles: Rc::default() }
    }

    /// The same, one level down.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Self { path, roles: self.roles.clone(), ..*self }
    }

    /// The parameter `name` of this module. It is drawn when first read, so a model that is loaded draws nothing.
    pub fn parameter<const D: usize>(&self, name: &str, role: Role, shape: [usize; D], init: Init) -> Param<Tensor<D>> {
        self.make(name, role, shape, init, true)
    }

    /// As [`parameter`](Self::parameter), but never given a gradient.
    pub fn constant<const D: usize>(&self, name: &str, role: Role, shape: [usize; D], init: Init) -> Param<Tensor<D>> {
        self.make(name, role, shape, init, false)
    }

    /// The roles of all that was made here and below, by path from here.
    pub fn roles(&self) -> Roles {
        self.roles.borrow().under(&self.path)
    }

    fn make<const D: usize>(
        &self,
        name: &str,
        role: Role,
        shape: [usize; D],
        init: Init,
        learned: bool,
    ) -> Param<Tensor<D>> {
        let name = self.at(name).path;
        self.roles.replace_with(|roles| std::mem::take(roles).with_role(name.clone(), role));
        let seed = self.seed;
        // Experts are matrices of their own; anything smaller is one.
        let matrices = if D == 3 { shape[0] } else { 1 };
        let len = shape.iter().product::<usize>() / matrices.max(1);
        Param::uninitialized(
            ParamId::new(),
            move |device, tracked| {
                let values = init.draw(seed, &name, matrices, len);
                let tensor = Tensor::from_data(TensorData::new(values, shape), device);
                if tracked { tensor.require_grad() } else { tensor }
            },
            self.device.clone(),
            learned,
            Shape::from(shape),
        )
    }
}
