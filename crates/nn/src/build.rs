//! How modules make their parameters: by name, on first use, each from its own random streams.

use burn::module::{Param, ParamId};
use burn::tensor::{Device, Shape, Tensor, TensorData};

use crate::init::Init;

/// Where a module under construction stands: the seed, the device and the path of the module in the model.
#[derive(Debug, Clone)]
pub struct Builder<'a> {
    seed: u64,
    device: &'a Device,
    path: String,
}

impl<'a> Builder<'a> {
    /// The root of a model.
    pub fn new(seed: u64, device: &'a Device) -> Self {
        Self { seed, device, path: String::new() }
    }

    /// The device of the model.
    pub fn device(&self) -> &'a Device {
        self.device
    }

    /// The same, one level down.
    pub fn at(&self, name: impl std::fmt::Display) -> Self {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Self { seed: self.seed, device: self.device, path }
    }

    /// The parameter `name` of this module. It is drawn when first read, so a model that is loaded draws nothing.
    pub fn parameter<const D: usize>(&self, name: &str, shape: [usize; D], init: Init) -> Param<Tensor<D>> {
        self.make(name, shape, init, true)
    }

    /// As [`parameter`](Self::parameter), but never given a gradient.
    pub fn constant<const D: usize>(&self, name: &str, shape: [usize; D], init: Init) -> Param<Tensor<D>> {
        self.make(name, shape, init, false)
    }

    fn make<const D: usize>(&self, name: &str, shape: [usize; D], init: Init, learned: bool) -> Param<Tensor<D>> {
        let name = self.at(name).path;
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
