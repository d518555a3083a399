//! The fused expert pass against its twin bit for bit, and the twin's gradients against finite differences.
use super::*;
use crate::kernel::K_BLOCK;
use crate::testing::{PRECISIONS, assert_same_bits, isas, numbers, order_of, pools};

mod rows;
mod held_in_bf16;

struct Plan {
    tokens: usize,
    experts: usize,
    row_offsets: Vec<u32>,
    token_of_row: Vec<u32>,
    token_offsets: Vec<u32>,
    row_of_choice: Vec<u32>,
}

impl Plan {
    /// `choices[t]`: the experts of token t in choice order.
    fn new(experts: usize, choices: &[Vec<usize>]) -> Plan {
        let mut pairs: Vec<(usize, usize, usize)> = Vec::new();
        for (token, experts) in choices.iter().enumerate() {
            pairs.extend(experts.iter().enumerate().map(|(choice, &expert)| (expert, token, choice)));
        }
        pairs.sort();
        let row_offsets = (0..=experts).map(|e| pairs.iter().filter(|p| p.0 < e).count() as u32).collect();
        let mut token_offsets = vec![0u32];
        let mut row_of_choice = Vec::new();
        for (token, experts) in choices.iter().enumerate() {
            for choice in 0..experts.len() {
                row_of_choice.push(pairs.iter().position(|p| p.1 == token && p.2 == choice).unwrap() as u32);
            }
            token_offsets.push(row_of_choice.len() as u32);
        }
        let token_of_row = pairs.iter().map(|p| p.1 as u32).collect();
        Plan { tokens: choices.len(), experts, row_offsets, token_of_row, token_offsets, row_of_choice }
    }

    /// k experts for each token, expert 1 never chosen, expert 0 by far the most.
    fn lopsided(tokens: usize, experts: usize, k: usize) -> Plan {
        let choose = |token: usize| {
            let mut chosen = Vec::new();
            let mut next = if token.is_multiple_of(3) { token / 3 % experts } else { 0 };
            while chosen.len() < k {
                if next != 1 && !chosen.contains(&next) {
                    chosen.push(next);
                }
                next = (next + 1) % experts;
            }
            if token.is_multiple_of(2) {
                chosen.reverse();
            }
            if token % 17 == 5 { Vec::new() } else { chosen }
        };
        Plan::new(experts, &(0..tokens).map(choose).collect::<Vec<_>>())
    }

    fn dispatch(&self) -> Dispatch<'_> {
        Dispatch {
            tokens: self.tokens,
            row_offsets: &self.row_offsets,
            token_of_row: &self.token_of_row,
            token_offsets: &self.token_offsets,
            row_of_choice: &self.row_of_choice,
        }
    }
}

/// One set of inputs, and all outputs of a forward and backward pass.
struct Case {
    plan: Plan,
    d: usize,
    f: usize,
    activation: Activation,
    x: Vec<f32>,
    dy: Vec<f32>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
    weight: Vec<f32>,
}

struct Outputs {
    y: Vec<f32>,
    dx: Vec<f32>,
    dgate_up: Vec<f32>,
    ddown: Vec<f32>,
    dweight: Vec<f32>,
}

impl Case {
    fn new(plan: Plan, d: usize, f: usize, activation: Activation) -> Case {
        let (tokens, experts, rows) = (plan.tokens, plan.experts, plan.token_of_row.len());
        let scaled =
            |seed: u64, len: usize, scale: f32| numbers(seed, len).iter().map(|x| x * scale).collect::<Vec<f32>>();
        Case {
            d,
            f,
            activation,
            x: numbers(1, tokens * d),
            dy: numbers(2, tokens * d),
            gate_up: scaled(3, experts * d * activation.first_columns(f), 2.0 / (d as f32).sqrt()),
            down: scaled(4, experts * f * d, 1.0 / (f as f32).sqrt()),
            weight: numbers(5, rows),
            plan,
        }
    }

    fn empty_outputs(&self) -> Outputs {
        let zeros = |len: usize| vec![7.0; len];
        Outputs {
            y: zeros(self.x.len()),
            dx: zeros(self.x.len()),
            dgate_up: zeros(self.gate_up.len()),
            ddown: zeros(self.down.len()),
            dweight: zeros(self.weight.len()),
        }
    }

    fn reference(&self, precision: Precision) -> Outputs {
        let mut out = self.empty_outputs();
        let Case { d, f, activation, .. } = *self;
        let dispatch = self.plan.dispatch();
        let pre = expert_ffn_forward_reference(
            precision,
            &self.x,
            d,
            f,
            activation,
            &self.gate_up,
            &self.down,
            &dispatch,
            &self.weight,
            &mut out.y,
        );
        expert_ffn_backward_reference(
            precision,
            &self.dy,
            &self.x,
            d,
            f,
            activation,
            &self.gate_up,
            &self.down,
            &dispatch,
            &self.weight,
            &pre,
            &mut out.dx,
            &mut out.dgate_up,
            &mut out.ddown,
            &mut out.dweight,
        );
        out
    }

    fn kernels(&self, isa: Isa, precision: Precision) -> Outputs {
        let mut out = self.empty_outputs();
        let dispatch = self.plan.dispatch();
        let Case { d, f, activation, .. } = *self;
        let (experts, mut spare) = (self.plan.experts, Vec::new());
        let (gate_up, down) = (&self.gate_up, &self.down);
        let weights = ExpertWeights::pack(&mut spare, isa, precision, experts, d, f, activation, gate_up, down);
        let transposes = ExpertTransposes::pack(&mut spare, isa, precision, experts, d, f, activation, gate_up, down);
        let mut saved = ExpertSaved::new();
        expert_ffn_forward(isa, &self.x, &weights, &dispatch, &self.weight, &mut out.y, Some(&mut saved));
        let mut unsaved = vec![7.0; out.y.len()];
        expert_ffn_forward(isa, &self.x, &weights, &dispatch, &self.weight, &mut unsaved, None);
        assert_same_bits("y with and without saving", &unsaved, &out.y);
        expert_ffn_backward(
            isa,
            &self.dy,
            &self.x,
            &transposes,
            &dispatch,
            &self.weight,
            &saved,
            &mut out.dx,
            &mut out.dgate_up,
            &mut out.ddown,
            &mut out.dweight,
        );
        out
    }
}

fn assert_same_outputs(what: &str, got: &Outputs, expected: &Outputs) {
    assert_same_bits(&format!("{what} y"), &got.y, &expected.y);
    assert_same_bits(&format!("{what} dweight"), &got.dweight, &expected.dweight);
    assert_same_bits(&format!("{what} dx"), &got.dx, &expected.dx);
    assert_same_bits(&format!("{what} ddown"), &got.ddown, &expected.ddown);
    assert_same_bits(&format!("{what} dgate_up"), &got.dgate_up, &expected.dgate_up);
}

fn cases() -> Vec<Case> {
    vec![
        Case::new(Plan::lopsided(1, 4, 2), 32, 32, Activation::SwiGlu),
        Case::new(Plan::lopsided(5, 3, 1), 7, 5, Activation::SwiGlu),
        Case::new(Plan::lopsided(40, 6, 3), 33, 17, Activation::SwiGlu),
        Case::new(Plan::lopsided(70, 5, 2), 64, 48, Activation::Gelu),
        Case::new(Plan::lopsided(23, 4, 2), 50, 70, Activation::Relu),
        Case::new(Plan::lopsided(300, 3, 1), 40, 100, Activation::SwiGlu),
        Case::new(Plan::lopsided(5, 3, 2), K_BLOCK + 8, 20, Activation::SwiGlu),
        Case::new(Plan::lopsided(4, 3, 1), 12, K_BLOCK + 20, Activation::Relu),
    ]
}

#[test]
fn the_expert_pass_has_the_bits_of_its_twin_on_every_isa() {
    for case in cases() {
        let references = PRECISIONS.map(|precision| (precision, case.reference(precision)));
        for precision in PRECISIONS {
            for isa in isas() {
                let order = order_of(isa, precision);
                let expected = &references.iter().find(|(precision, _)| *precision == order).unwrap().1;
                let what =
                    format!("{isa} {precision} T{} d{} f{} {}", case.plan.tokens, case.d, case.f, case.activation);
                assert_same_outputs(&what, &case.kernels(isa, precision), expected);
            }
        }
    }
}

#[test]
fn bf16_native_is_close_to_bf16() {
    for case in cases() {
        let expected = case.reference(Precision::Bf16);
        for isa in isas() {
            let got = case.kernels(isa, Precision::Bf16Native);
            for (x, y) in [
                (&got.y, &expected.y),
                (&got.dx, &expected.dx),
                (&got.dgate_up, &expected.dgate_up),
                (&got.ddown, &expected.ddown),
            ] {
                let size = y.iter().fold(0f32, |most, y| most.max(y.abs()));
                let error = x.iter().zip(y).fold(0f32, |most, (x, y)| most.max((x - y).abs()));
                assert!(error <= 1e-2 * size, "{isa}: off by {error} of {size}");
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let case = Case::new(Plan::lopsided(333, 5, 2), 45, 40, Activation::SwiGlu);
    for precision in PRECISIONS {
        let isa = *isas().last().unwrap();
        let results = pools(|| case.kernels(isa, precision));
        for other in &results[1..] {
            assert_same_outputs(&format!("{precision}"), other, &results[0]);
        }
    }
}

#[test]
fn a_token_alone_has_the_bits_it_has_in_a_batch() {
    let case = Case::new(Plan::lopsided(150, 5, 2), 45, 40, Activation::SwiGlu);
    for isa in isas() {
        for precision in PRECISIONS {
            let together = case.kernels(isa, precision);
            for token in [0, 1, 77, 149] {
                let rows = case.plan.token_offsets[token] as usize..case.plan.token_offsets[token + 1] as usize;
                let rows: Vec<usize> = case.plan.row_of_choice[rows].iter().map(|&row| row as usize).collect();
                let expert_of =
                    |row: usize| case.plan.row_offsets.partition_point(|&offset| offset as usize <= row) - 1;
                let plan = Plan::new(case.plan.experts, &[rows.iter().map(|&row| expert_of(row)).collect()]);
                let weight = {
                    let mut weight = vec![0.0; rows.len()];
                    for (choice, &row) in rows.iter().enumerate() {
                        weight[plan.row_of_choice[choice] as usize] = case.weight[row];
                    }
                    weight
                };
                let span = token * case.d..(token + 1) * case.d;
                let (x, dy) = (case.x[span.clone()].to_vec(), case.dy[span.clone()].to_vec());
                let (gate_up, down) = (case.gate_up.clone(), case.down.clone());
                let alone = Case { plan, x, dy, gate_up, down, weight, ..case }.kernels(isa, precision);
                assert_same_bits(&format!("{isa} {precision} y of token {token}"), &alone.y, &together.y[span.clone()]);
                assert_same_bits(&format!("{isa} {precision} dx of token {token}"), &alone.dx, &together.dx[span]);
            }
        }
    }
}

/// The error function by its power series, which converges everywhere; the arguments of these tests are below 4.
fn erf(x: f64) -> f64 {
    let (mut term, mut sum) = (x, x);
    for n in 1..100 {
        term *= -x * x / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    2.0 / std::f64::consts::PI.sqrt() * sum
}

/// The loss <dy, y> in f64, from nothing but the formula.
fn loss_f64(case: &Case) -> f64 {
    let Case { d, f, activation, .. } = *case;
    let columns = activation.first_columns(f);
    let mut loss = 0.0;
    for expert in 0..case.plan.experts {
        for row in case.plan.row_offsets[expert] as usize..case.plan.row_offsets[expert + 1] as usize {
            let token = case.plan.token_of_row[row] as usize;
            let pre: Vec<f64> = (0..columns)
                .map(|column| {
                    let weight = |i: usize| f64::from(case.gate_up[(expert * d + i) * columns + column]);
                    (0..d).map(|i| f64::from(case.x[token * d + i]) * weight(i)).sum()
                })
                .collect();
            for j in 0..f {
                let g = pre[j];
                let h = match activation {
                    Activation::SwiGlu => g / (1.0 + (-g).exp()) * pre[f + j],
                    Activation::Relu => g.max(0.0),
                    Activation::Gelu => 0.5 * g * (1.0 + erf(g / std::f64::consts::SQRT_2)),
                };
                for i in 0..d {
                    loss += f64::from(case.dy[token * d + i])
                        * f64::from(case.weight[row])
                        * h
                        * f64::from(case.down[(expert * f + j) * d + i]);
                }
            }
        }
    }
    loss
}

#[test]
fn the_twins_gradients_agree_with_finite_differences() {
    for activation in [Activation::SwiGlu, Activation::Gelu, Activation::Relu] {
        let case = Case::new(Plan::lopsided(9, 4, 2), 6, 5, activation);
        let gradients = case.reference(Precision::F32);
        let step = 2f32.powi(-10);
        let check = |name: &str, gradient: &[f32], nudge: &dyn Fn(&mut Case, usize, f32)| {
            for at in (0..gradient.len()).step_by(gradient.len().div_ceil(40)) {
                let moved = |by: f32| {
                    let mut other = Case::new(Plan::lopsided(9, 4, 2), 6, 5, activation);
                    nudge(&mut other, at, by);
                    loss_f64(&other)
                };
                // Central difference of the exact f64 loss; 2^-10 moves f32 inputs by an exactly known amount up to rounding.
                let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
                let error = (slope - f64::from(gradient[at])).abs();
                assert!(error < 2e-4, "{activation} {name}[{at}]: {} against {slope}", gradient[at]);
            }
        };
        check("dx", &gradients.dx, &|case, at, by| case.x[at] += by);
        check("dgate_up", &gradients.dgate_up, &|case, at, by| case.gate_up[at] += by);
        check("ddown", &gradients.ddown, &|case, at, by| case.down[at] += by);
        check("dweight", &gradients.dweight, &|case, at, by| case.weight[at] += by);
        let y: f64 = case.dy.iter().zip(&gradients.y).map(|(dy, y)| f64::from(*dy) * f64::from(*y)).sum();
        assert!((y - loss_f64(&case)).abs() < 1e-4);
    }
}
