//! One tensor for several users, whose gradients add in one order.
//!
//! Addition is not associative: the gradient of a tensor with three users depends, in its last bit, on the order in which the
//! backward pass comes by them, and that order on the rest of the graph. A layer whose activations are recomputed
//! is part of another graph. A [`Fan`] gives every user a node of its own on a chain where no node has more than two.

use burn::tensor::Tensor;
use mixtura_ops::pass;

/// A tensor to be used any number of times.
pub(crate) struct Fan<const D: usize>(Tensor<D>);

impl<const D: usize> Fan<D> {
    pub fn new(x: Tensor<D>) -> Self {
        Self(x)
    }

    /// The tensor for one user, who may use it twice.
    pub fn take(&mut self) -> Tensor<D> {
        if !self.0.is_autodiff() {
            return self.0.clone();
        }
        let own = pass(self.0.clone());
        self.0 = pass(self.0.clone());
        own
    }
}
