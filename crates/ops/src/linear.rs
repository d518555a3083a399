//! `y_tn = x_tk w_kn`, the projection without bias that a transformer block is made of; tied, `y_tn = x_tk w_nk^T`.
//!
//! Axes: `t` rows (tokens), `k` inputs, `n` outputs. Weights are `[in, out]`, as Burn keeps them; a tied weight (the embedding
//! table, used as the output projection) is `[out, in]`.
//!
//! Forward packs `w` once per change of the weight (see [`PackCell`]); backward packs its transpose likewise and computes
//! `dx = dy w^T` and `dw = x^T dy` (tied: `dy^T x`), the latter summed over rows in order.

use std::sync::Arc;

use burn::backend::Dispatch;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use mixtura_kernels::gemm::{Accum, matmul, matmul_tn};

use crate::buffers::{buffer, give_back};
use crate::fused::{self, FlexOp, Fused, slice, tensor_of};
use crate::sealed::{self, InferenceOp, Sealed, SealedWeight};
use crate::{Numerics, PackCell};

/// `x_tk w_kn`, without bias.
///
/// `cell` belongs to `w_kn`: it keeps the packed copy of the weight between calls, and notices when the weight changes.
///
/// # Shapes
/// `[T, K]` and `[K, N]` give `[T, N]`.
///
/// # Panics
/// If the inner sizes differ.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::{Numerics, PackCell, linear};
/// let device = Device::default();
/// let x_tk = Tensor::<2>::from_data([[1.0, 2.0]], &device);
/// let w_kn = Tensor::<2>::from_data([[1.0, 0.0, 3.0], [0.0, 1.0, 4.0]], &device);
/// let y_tn = linear(x_tk, w_kn, &PackCell::new(), Numerics::default());
/// assert_eq!(y_tn.into_data().try_to_vec::<f32>().unwrap(), [1.0, 2.0, 11.0]);
/// ```
pub fn linear(x_tk: Tensor<2>, w_kn: Tensor<2>, cell: &PackCell, numerics: Numerics) -> Tensor<2> {
    let ([t, k], [wk, n]) = (x_tk.dims(), w_kn.dims());
    assert_eq!(k, wk, "linear: x is [{t}, {k}], w is [{wk}, {n}]");
    if let Some(weight) = cell.sealed() {
        return sealed_product(x_tk, weight, [k, n], numerics);
    }
    let x = x_tk.into_dispatch();
    if !fused::is_fused(&x) {
        return linear_portable(Tensor::from_dispatch(x), w_kn);
    }
    let op = Linear { tied: false, cell: cell.clone(), numerics };
    Tensor::from_dispatch(Dispatch::two(x, w_kn.into_dispatch(), op))
}

/// [`linear`] in plain Burn operations, on any device: the reference, and the implementation away from Flex.
pub fn linear_portable(x_tk: Tensor<2>, w_kn: Tensor<2>) -> Tensor<2> {
    x_tk.matmul(w_kn)
}

/// `x_tk w_nk^T`: [`linear`] with a weight stored `[out, in]`, such as an embedding table used as the output projection.
///
/// # Shapes
/// `[T, K]` and `[N, K]` give `[T, N]`.
///
/// # Panics
/// If the inner sizes differ.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use mixtura_ops::{Numerics, PackCell, linear_tied};
/// let device = Device::default();
/// let x_tk = Tensor::<2>::from_data([[1.0, 2.0]], &device);
/// let w_nk = Tensor::<2>::from_data([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0]], &device);
/// let y_tn = linear_tied(x_tk, w_nk, &PackCell::new(), Numerics::default());
/// assert_eq!(y_tn.into_data().try_to_vec::<f32>().unwrap(), [1.0, 2.0, 11.0]);
/// ```
pub fn linear_tied(x_tk: Tensor<2>, w_nk: Tensor<2>, cell: &PackCell, numerics: Numerics) -> Tensor<2> {
    let ([t, k], [n, wk]) = (x_tk.dims(), w_nk.dims());
    assert_eq!(k, wk, "linear_tied: x is [{t}, {k}], w is [{n}, {wk}]");
    if let Some(weight) = cell.sealed() {
        return sealed_product(x_tk, weight, [k, n], numerics);
    }
    let x = x_tk.into_dispatch();
    if !fused::is_fused(&x) {
        return linear_tied_portable(Tensor::from_dispatch(x), w_nk);
    }
    let op = Linear { tied: true, cell: cell.clone(), numerics };
    Tensor::from_dispatch(Dispatch::two(x, w_nk.into_dispatch(), op))
}

/// [`linear_tied`] in plain Burn operations, on any device.
pub fn linear_tied_portable(x_tk: Tensor<2>, w_nk: Tensor<2>) -> Tensor<2> {
    x_tk.matmul(w_nk.transpose())
}

/// `x_tk` times a sealed `[K, N]`.
fn sealed_product(x_tk: Tensor<2>, weight: Arc<SealedWeight>, [k, n]: [usize; 2], numerics: Numerics) -> Tensor<2> {
    let packed = weight.matrix();
    assert_eq!([packed.k(), packed.n()], [k, n], "linear: the sealed weight's shape");
    sealed::check_precision("linear", packed, numerics);
    Tensor::from_dispatch(Dispatch::one(sealed::on_flex("linear", x_tk), Sealed(Product { weight, numerics })))
}

struct Product {
    weight: Arc<SealedWeight>,
    numerics: Numerics,
}

impl InferenceOp<1> for Product {
    fn run(self, [x]: [FlexTensor; 1]) -> FlexTensor {
        let ([t, _], packed) = (fused::dims(&x), self.weight.matrix());
        let mut y = buffer(t * packed.n());
        matmul(self.numerics.isa, slice(&x), t, packed, &mut y, Accum::Replace);
        tensor_of(y, [t, packed.n()])
    }
}

/// The non-tensor part of [`linear`] and [`linear_tied`].
pub(crate) struct Linear {
    tied: bool,
    cell: PackCell,
    numerics: Numerics,
}

impl Linear {
    /// `(k, n)` of a weight as this op uses it.
    fn sizes(&self, w: &FlexTensor) -> (usize, usize) {
        let [a, b] = fused::dims(w);
        if self.tied { (b, a) } else { (a, b) }
    }

    /// `a w`, or `a w^T`, from the packed weight.
    fn product(&self, a: &FlexTensor, w: &FlexTensor, transposed: bool) -> FlexTensor {
        let [t, _] = fused::dims(a);
        let as_is = self.tied == transposed;
        let packed =
            if as_is { self.cell.matrix(w, self.numerics) } else { self.cell.matrix_transposed(w, self.numerics) };
        let mut y = buffer(t * packed.n());
        matmul(self.numerics.isa, slice(a), t, &packed, &mut y, Accum::Replace);
        tensor_of(y, [t, packed.n()])
    }
}

/// What backward needs of [`Linear`].
pub(crate) struct Saved {
    op: Linear,
    x: FlexTensor,
    w: FlexTensor,
}

impl FlexOp<2> for Linear {
    type Saved = Saved;

    fn infer(self, [x, w]: [FlexTensor; 2]) -> FlexTensor {
        self.product(&x, &w, false)
    }

    fn forward(self, [x, w]: [FlexTensor; 2], _: [bool; 2]) -> (FlexTensor, Saved) {
        (self.product(&x, &w, false), Saved { op: self, x, w })
    }

    fn backward(Saved { op, x, w }: Saved, dy: &FlexTensor, wanted: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let dx = wanted[0].then(|| op.product(dy, &w, true));
        let dw = wanted[1].then(|| {
            let ([t, _], (k, n)) = (fused::dims(&x), op.sizes(&w));
            let (isa, precision) = (op.numerics.isa, op.numerics.precision);
            // [rows, columns] of dw as it lies in memory, and the operands in that order.
            let (rows, columns, left, right) = if op.tied { (n, k, dy, &x) } else { (k, n, &x, dy) };
            let mut dw = buffer(rows * columns);
            matmul_tn(isa, precision, slice(left), slice(right), t, rows, columns, &mut dw, Accum::Replace);
            tensor_of(dw, [rows, columns])
        });
        give_back(x);
        [dx, dw]
    }
}
