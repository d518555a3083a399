//! Experts whose weights are held in bf16 in precision f32, against the same with the weights widened.
use super::*;
use crate::bf16;
use crate::pack::{Columns, Elements, Source};

/// One expert's matrix at a time, `[rows, columns]` each.
fn by_row(bits: &[u16], size: usize) -> Vec<&[u16]> {
    bits.chunks(size).collect()
}

impl Case {
    /// The same case with weights that are bf16s, and their bits.
    fn rounded(mut self) -> (Case, Vec<u16>, Vec<u16>) {
        let [gate_up, down] = [&mut self.gate_up, &mut self.down].map(|weights| {
            let bits: Vec<u16> = weights.iter().map(|&x| bf16::from_f32(x)).collect();
            weights.iter_mut().for_each(|x| *x = bf16::round(*x));
            bits
        });
        (self, gate_up, down)
    }

    fn weights_held_in_bf16(&self, isa: Isa, gate_up: &[u16], down: &[u16]) -> ExpertWeights {
        let Case { d, f, activation, .. } = *self;
        let (experts, columns) = (self.plan.experts, activation.first_columns(f));
        let order = if activation.is_gated() { Columns::GateUp } else { Columns::Plain };
        let (gate_up, down) = (by_row(gate_up, d * columns), by_row(down, f * d));
        let pack = |k: usize, n: usize, order: Columns, slices: &[&[u16]]| {
            let source = Source::ByRow(Elements::Bf16(slices));
            PackedB::from_stored(isa, Precision::F32, experts, k, n, order, source)
        };
        let (gate_up, down) = (pack(d, columns, order, &gate_up), pack(f, d, Columns::Plain, &down));
        assert!(gate_up.holds_bf16() && down.holds_bf16());
        ExpertWeights::from_packed(activation, gate_up, down)
    }
}

#[test]
fn experts_held_in_bf16_answer_in_f32_as_those_with_the_weights_widened() {
    for case in cases() {
        let (case, gate_up, down) = case.rounded();
        let expected = case.reference(Precision::F32).y;
        for isa in isas() {
            let weights = case.weights_held_in_bf16(isa, &gate_up, &down);
            // One thread takes whole rows through both products, several share the columns of few.
            for (threads, y) in pools(|| {
                let mut y = vec![7.0; expected.len()];
                expert_ffn_forward(isa, &case.x, &weights, &case.plan.dispatch(), &case.weight, &mut y, None);
                y
            })
            .into_iter()
            .enumerate()
            {
                let Case { d, f, activation, .. } = case;
                let what = format!("{isa} T{} d{d} f{f} {activation}, {} threads", case.plan.tokens, threads + 1);
                assert_same_bits(&what, &y, &expected);
            }
        }
    }
}

#[test]
#[should_panic(expected = "serve no training")]
fn what_is_held_in_bf16_for_f32_saves_nothing_for_a_backward_pass() {
    let (case, gate_up, down) = Case::new(Plan::lopsided(3, 2, 1), 4, 4, Activation::SwiGlu).rounded();
    let weights = case.weights_held_in_bf16(Isa::Scalar, &gate_up, &down);
    let (mut y, mut saved) = (vec![0.0; case.x.len()], ExpertSaved::new());
    let dispatch = case.plan.dispatch();
    expert_ffn_forward(Isa::Scalar, &case.x, &weights, &dispatch, &case.weight, &mut y, Some(&mut saved));
}

#[test]
#[should_panic(
    expected = "[2, 4, 8] plain columns held in f32 for f32 and [2, 4, 4] plain columns held in f32 for f32 are not the two"
)]
fn packs_that_do_not_fit_each_other_are_refused_with_the_shapes() {
    let pack = |k: usize, n: usize| {
        PackedB::pack(Isa::Scalar, Precision::F32, 2, k, n, MatView::row_major(&vec![0.0; 2 * k * n], k, n))
    };
    ExpertWeights::from_packed(Activation::SwiGlu, pack(4, 8), pack(4, 4));
}
