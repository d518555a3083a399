//! The three parts, put together, against the pass in one piece.
use super::*;

impl Case {
    /// Gather, experts and combine as three calls each way.
    fn in_parts(&self, isa: Isa, precision: Precision) -> Outputs {
        let mut out = self.empty_outputs();
        let dispatch = self.plan.dispatch();
        let (rows, d) = (dispatch.rows(), self.d);
        let (gate_up, down) = (&self.gate_up, &self.down);
        let Case { f, activation, .. } = *self;
        let (experts, mut spare) = (self.plan.experts, Vec::new());
        let weights = ExpertWeights::pack(&mut spare, isa, precision, experts, d, f, activation, gate_up, down);
        let transposes = ExpertTransposes::pack(&mut spare, isa, precision, experts, d, f, activation, gate_up, down);
        let mut saved = ExpertSaved::new();
        let (mut x_nd, mut rows_nd) = (vec![7.0; rows * d], vec![7.0; rows * d]);
        gather_rows(&self.x, d, dispatch.token_of_row, &mut x_nd);
        expert_rows_forward(isa, &x_nd, &weights, dispatch.row_offsets, &mut rows_nd, Some(&mut saved));
        let mut unsaved = vec![7.0; rows * d];
        expert_rows_forward(isa, &x_nd, &weights, dispatch.row_offsets, &mut unsaved, None);
        assert_same_bits("rows with and without saving", &unsaved, &rows_nd);
        combine_rows(isa, &rows_nd, d, &dispatch, Some(&self.weight), &mut out.y);

        let (mut dy_nd, mut dx_nd) = (vec![7.0; rows * d], vec![7.0; rows * d]);
        gather_rows(&self.dy, d, dispatch.token_of_row, &mut dy_nd);
        expert_rows_backward(
            isa,
            &dy_nd,
            &x_nd,
            &transposes,
            dispatch.row_offsets,
            &self.weight,
            &saved,
            &mut dx_nd,
            &mut out.dgate_up,
            &mut out.ddown,
            &mut out.dweight,
        );
        combine_rows(isa, &dx_nd, d, &dispatch, None, &mut out.dx);
        out
    }
}

#[test]
fn the_pass_in_parts_has_the_bits_of_the_pass_in_one_piece() {
    for case in cases() {
        for precision in [Precision::F32, Precision::Bf16, Precision::Bf16Native] {
            for isa in isas() {
                let what = format!("{isa} {precision} T{} d{} f{}", case.plan.tokens, case.d, case.f);
                assert_same_outputs(&what, &case.in_parts(isa, precision), &case.kernels(isa, precision));
            }
        }
    }
}
