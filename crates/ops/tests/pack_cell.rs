//! A cell never serves a pack of other values than the weight's, whatever is done to the weight.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::optim::{GradientsParams, SgdConfig};
use burn::tensor::{Device, Tensor};
use mixtura_ops::{
    Activation, AdamWParams, DispatchPlan, Numerics, PackCell, PackRoom, Precision, adamw_step, expert_ffn, into_vec,
    linear, linear_tied, rms_norm, with_slice, with_slice_mut,
};

fn numbers(rows: usize, columns: usize, device: &Device) -> Tensor<2> {
    let values: Vec<f32> = (0..rows * columns).map(|i| ((i * 37 + 11) % 19) as f32 / 8.0 - 1.0).collect();
    mixtura_ops::tensor_from_vec(values, [rows, columns], device)
}

/// What the cell says, against what a new cell says.
fn check_fresh(x: &Tensor<2>, w: &Tensor<2>, cell: &PackCell) {
    let with = |cell: &PackCell| into_vec(linear(x.clone(), w.clone(), cell, Numerics::default()));
    assert_eq!(with(cell), with(&PackCell::new()));
}

#[test]
fn a_weight_changed_in_place_is_packed_anew() {
    let device = Device::default();
    let (x, mut w, cell) = (numbers(3, 8, &device), numbers(8, 5, &device), PackCell::new());
    check_fresh(&x, &w, &cell);
    for round in 0..3 {
        w = with_slice_mut(w, |w| w[round] += 1.0);
        check_fresh(&x, &w, &cell);
    }
}

#[test]
fn a_weight_changed_in_place_after_clear_is_packed_anew_without_a_copy() {
    let device = Device::default();
    let (x, w, cell) = (numbers(3, 8, &device), numbers(8, 5, &device), PackCell::new());
    check_fresh(&x, &w, &cell);
    let bytes = cell.bytes();
    assert!(bytes > 0);
    let before = with_slice(&w, |w| w.as_ptr() as usize);
    cell.clear();
    let w = with_slice_mut(w, |w| w[0] += 1.0);
    assert_eq!(before, with_slice(&w, |w| w.as_ptr() as usize), "the weight was copied");
    check_fresh(&x, &w, &cell);
    assert_eq!(cell.bytes(), bytes, "the memory of the old pack was not reused");
}

#[test]
fn another_weight_shape_or_precision_is_packed_anew() {
    let device = Device::default();
    let (x, w, cell) = (numbers(3, 8, &device), numbers(8, 8, &device), PackCell::new());
    check_fresh(&x, &w, &cell);
    check_fresh(&x, &(w.clone() * 2.0), &cell);
    check_fresh(&x, &w.clone().transpose(), &cell);
    // The same buffer as another matrix.
    check_fresh(&numbers(3, 16, &device), &w.clone().reshape([16, 4]), &cell);
    check_fresh(&x, &w, &cell);
    let bf16 = |cell: &PackCell| into_vec(linear(x.clone(), w.clone() / 3.0, cell, Numerics::new(Precision::Bf16)));
    assert_eq!(bf16(&cell), bf16(&PackCell::new()));
    let tied = |cell: &PackCell| into_vec(linear_tied(x.clone(), w.clone(), cell, Numerics::default()));
    assert_eq!(tied(&cell), tied(&PackCell::new()));
}

#[test]
fn a_pack_is_made_once_while_the_weight_stays() {
    let device = Device::default();
    let (x, w, cell) = (numbers(3, 8, &device), numbers(8, 5, &device), PackCell::new());
    let forward = || into_vec(linear(x.clone(), w.clone(), &cell, Numerics::default()));
    forward();
    let bytes = cell.bytes();
    forward();
    assert_eq!(cell.bytes(), bytes);
    // Backward adds the transpose, and the next step reuses both.
    let device = device.autodiff();
    let (x, w) = (numbers(3, 8, &device).require_grad(), Tensor::from_inner(w).require_grad());
    linear(x.clone(), w.clone(), &cell, Numerics::default()).sum().backward();
    let both = cell.bytes();
    assert!(both > bytes);
    linear(x, w, &cell, Numerics::default()).sum().backward();
    assert_eq!(cell.bytes(), both);
}

#[test]
fn experts_changed_in_place_are_packed_anew_with_and_without_a_backward_pass() {
    let device = Device::default();
    let plan = Arc::new(DispatchPlan::new(3, vec![0, 1, 3], vec![0, 1, 2], vec![0, 1, 2, 3], vec![0, 1, 2]));
    let cell = PackCell::new();
    let mut weights = [numbers(2, 8 * 10, &device).reshape([2, 8, 10]), numbers(2, 5 * 8, &device).reshape([2, 5, 8])];
    for round in 0..6 {
        let run = |cell: &PackCell| {
            // Odd rounds train, even ones do not: transposes come, go stale, and come again.
            let device = if round % 2 == 1 { device.clone().autodiff() } else { device.clone() };
            let own =
                |w: &Tensor<3>| if device.is_autodiff() { w.clone().autodiff().require_grad() } else { w.clone() };
            let (gate_up, down, ones) = (own(&weights[0]), own(&weights[1]), Tensor::<1>::ones([3], &device));
            let (x, numerics) = (numbers(3, 8, &device), Numerics::new(Precision::Bf16));
            let x = if device.is_autodiff() { x.require_grad() } else { x };
            let y = expert_ffn(x.clone(), gate_up, down, ones, &plan, Activation::SwiGlu, cell, numerics);
            let values = into_vec(y.clone());
            let dx = device.is_autodiff().then(|| x.grad(&y.sum().backward()).map(into_vec));
            (values, dx)
        };
        assert_eq!(run(&cell), run(&PackCell::new()), "round {round}");
        cell.clear();
        weights = weights.map(|w| with_slice_mut(w, |w| w[3 * round] += 1.0));
    }
}

/// Three sets of experts one after the other, forward and backward: the values and all gradients.
fn stack(cells: &[PackCell; 3], numerics: Numerics, scale: f32) -> Vec<Vec<f32>> {
    let device = Device::default().autodiff();
    let plan = Arc::new(DispatchPlan::new(3, vec![0, 1, 3], vec![0, 1, 2], vec![0, 1, 2, 3], vec![0, 1, 2]));
    let x = numbers(3, 8, &device).require_grad();
    let weight = |rows, columns, shape: [usize; 3]| {
        (numbers(rows, columns, &device).mul_scalar(scale).reshape(shape)).detach().require_grad()
    };
    let layers: Vec<_> = cells.iter().map(|_| [weight(2, 8 * 10, [2, 8, 10]), weight(2, 5 * 8, [2, 5, 8])]).collect();
    let mut y = x.clone();
    for ([gate_up, down], cell) in layers.iter().zip(cells) {
        let ones = Tensor::<1>::ones([3], &device);
        y = expert_ffn(y, gate_up.clone(), down.clone(), ones, &plan, Activation::SwiGlu, cell, numerics);
    }
    let mut values = vec![into_vec(y.clone())];
    let gradients = y.sum().backward();
    values.push(into_vec(x.grad(&gradients).expect("x takes part")));
    values.extend(layers.iter().flatten().map(|w| into_vec(w.grad(&gradients).expect("every weight takes part"))));
    values
}

#[test]
fn layers_that_share_a_room_have_the_same_bits_and_hold_one_layers_packs() {
    for precision in [Precision::F32, Precision::Bf16] {
        let (numerics, room) = (Numerics::new(precision), PackRoom::default());
        let (kept, sharing): ([PackCell; 3], [PackCell; 3]) = Default::default();
        sharing.iter().for_each(|cell| cell.share(&room));
        for scale in [1.0, 0.5, 2.0] {
            assert_eq!(stack(&sharing, numerics, scale), stack(&kept, numerics, scale));
        }
        // As it lies and transposed, three layers: six times what is used at a time.
        let of_all: usize = kept.iter().map(PackCell::bytes).sum();
        assert!(sharing.iter().all(|cell| cell.bytes() == 0));
        assert!(room.bytes() > 0 && room.bytes() <= of_all / 3, "{} of {of_all} bytes", room.bytes());
        // Back to keeping: what is packed now stays.
        sharing[0].keep();
        stack(&sharing, numerics, 1.0);
        assert_eq!((sharing[0].bytes(), sharing[1].bytes()), (kept[0].bytes(), 0));
        sharing[0].share(&room);
        assert_eq!(sharing[0].bytes(), 0);
    }
}

/// Two linear layers with a norm between, as a user of Burn writes them.
#[derive(Module, Debug)]
struct Net {
    up: Param<Tensor<2>>,
    down: Param<Tensor<2>>,
    gamma: Param<Tensor<1>>,
    #[module(skip)]
    cells: [PackCell; 2],
}

impl Net {
    fn new(device: &Device) -> Self {
        Self {
            up: Param::from_tensor(numbers(6, 9, device)),
            down: Param::from_tensor(numbers(9, 2, device)),
            gamma: Param::from_tensor(Tensor::ones([9], device)),
            cells: Default::default(),
        }
    }

    fn loss(&self, x: Tensor<2>) -> Tensor<1> {
        let numerics = Numerics::default();
        let hidden = linear(x, self.up.val(), &self.cells[0], numerics);
        let hidden = rms_norm(hidden, self.gamma.val(), 1e-5, numerics);
        (linear(hidden, self.down.val(), &self.cells[1], numerics) - 1.0).square().mean()
    }
}

#[test]
fn a_module_trains_with_an_optimizer_of_burn() {
    let device = Device::default().autodiff();
    let (mut net, x) = (Net::new(&device), numbers(4, 6, &device));
    let mut optimizer = SgdConfig::new().init();
    let first = net.loss(x.clone()).into_scalar::<f32>();
    for _ in 0..40 {
        let gradients = GradientsParams::from_grads(net.loss(x.clone()).backward(), &net);
        net = optimizer.step(0.05, net, gradients);
    }
    let last = net.loss(x.clone()).into_scalar::<f32>();
    assert!(last < 0.2 * first, "the loss went from {first} to {last}");
    // What it computes now is what the same weights compute with empty cells.
    let fresh = Net { cells: Default::default(), ..net.clone() };
    assert_eq!(fresh.loss(x).into_scalar::<f32>(), last);
}

#[test]
fn adamw_updates_a_parameter_in_place_and_keeps_it_a_leaf() {
    let device = Device::default().autodiff();
    let (mut net, x) = (Net::new(&device), numbers(4, 6, &device));
    let (mut m, mut v) = (vec![0.0; 54], vec![0.0; 54]);
    let first = net.loss(x.clone()).into_scalar::<f32>();
    for step in 1..=30 {
        let mut gradients = net.loss(x.clone()).backward();
        let gradient = net.up.val().grad_remove(&mut gradients).expect("up has a gradient");
        drop(gradients);
        net.cells[0].clear();
        let before = with_slice(&net.up.val(), |w| w.as_ptr() as usize);
        let hyper = AdamWParams::at_step(0.05, 0.9, 0.95, 1e-8, 0.0, step, 1.0);
        net.up = net.up.map(|w| adamw_step(w, &gradient, &mut m, &mut v, &hyper, Numerics::default()));
        assert_eq!(before, with_slice(&net.up.val(), |w| w.as_ptr() as usize), "step {step} copied the parameter");
        assert!(net.up.val().is_require_grad());
    }
    let last = net.loss(x.clone()).into_scalar::<f32>();
    assert!(last < 0.5 * first, "the loss went from {first} to {last}");
}
