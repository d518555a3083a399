//! What packs hold: of files as of f32s, column by column.
use super::*;
use crate::testing::{PRECISIONS, assert_same_bits, isas, numbers};

/// (E, K, N): one of each, less than a panel and a block, whole ones, some more; more panels than a job takes.
const SHAPES: [(usize, usize, usize); 6] =
    [(1, 1, 2), (2, 33, 30), (3, 64, 32), (2, 47, 70), (1, 131, 98), (2, 40, 2 * 32 * 16 + 36)];

/// E matrices `[K, N]`, row-major: as f32s that are bf16s, as those, and the columns of both.
struct File {
    k: usize,
    n: usize,
    wide: Vec<f32>,
    bits: Vec<u16>,
    wide_columns: Vec<Vec<f32>>,
    bits_columns: Vec<Vec<u16>>,
}

impl File {
    fn new((experts, k, n): (usize, usize, usize)) -> File {
        let bits: Vec<u16> = numbers(7, experts * k * n).into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = bits.iter().map(|&x| bf16::to_f32(x)).collect();
        let column = |at: usize| (0..k).map(move |row| (at / n * k + row) * n + at % n);
        let wide_columns = (0..experts * n).map(|at| column(at).map(|at| wide[at]).collect()).collect();
        let bits_columns = (0..experts * n).map(|at| column(at).map(|at| bits[at]).collect()).collect();
        File { k, n, wide, bits, wide_columns, bits_columns }
    }

    /// `work` with every form of the file; `true` with those in bf16.
    fn sources(&self, mut work: impl FnMut(Source, bool)) {
        let size = self.k * self.n;
        let (wide, bits): (Vec<_>, Vec<_>) = (self.wide.chunks(size).collect(), self.bits.chunks(size).collect());
        work(Source::ByRow(Elements::F32(&wide)), false);
        work(Source::ByRow(Elements::Bf16(&bits)), true);
        let wide: Vec<&[f32]> = self.wide_columns.iter().map(Vec::as_slice).collect();
        let bits: Vec<&[u16]> = self.bits_columns.iter().map(Vec::as_slice).collect();
        work(Source::ByColumn(Elements::F32(&wide)), false);
        work(Source::ByColumn(Elements::Bf16(&bits)), true);
    }
}

fn packed(
    isa: Isa,
    precision: Precision,
    (experts, k, n): (usize, usize, usize),
    file: &File,
    columns: Columns,
) -> PackedB {
    let view = MatView::row_major(&file.wide, k, n);
    match columns {
        Columns::Plain => PackedB::pack(isa, precision, experts, k, n, view),
        Columns::GateUp => PackedB::pack_gate_up(isa, precision, experts, k, n / 2, view),
    }
}

#[test]
fn a_file_is_packed_as_its_numbers_in_f32_are() {
    for shape in SHAPES {
        let (file, (experts, k, n)) = (File::new(shape), shape);
        for (precision, columns) in PRECISIONS.into_iter().flat_map(|p| [(p, Columns::Plain), (p, Columns::GateUp)]) {
            // Packing from rows on the scalar path is the measure.
            let as_f32 = packed(Isa::Scalar, precision, shape, &file, columns);
            let as_bf16 = packed(Isa::Scalar, Precision::Bf16, shape, &file, columns);
            for isa in isas() {
                file.sources(|source, in_bf16| {
                    let what = format!("{isa} {precision} {shape:?} {columns:?}, source in bf16: {in_bf16}");
                    let got = PackedB::from_stored(isa, precision, experts, k, n, columns, source);
                    assert_eq!(got.holds_bf16(), in_bf16 || precision.is_bf16(), "{what}");
                    for expert in 0..experts {
                        if got.holds_bf16() {
                            assert!(got.expert::<u16>(expert) == as_bf16.expert::<u16>(expert), "{what}");
                        } else {
                            assert_same_bits(&what, got.expert(expert), as_f32.expert(expert));
                        }
                    }
                });
            }
        }
    }
}

#[test]
fn views_of_a_matrix_and_of_its_transpose_are_packed_alike_on_every_isa() {
    let (experts, k, n) = (2, 77, 91);
    let data = numbers(3, experts * k * n);
    let transpose: Vec<f32> =
        (0..experts * k * n).map(|at| data[at / (k * n) * k * n + at % k * n + at / k % n]).collect();
    // Every second number of every second row of something larger.
    let scattered: Vec<f32> = (0..4 * experts * k * n).map(|at| data[at / 4 / n * n + at / 2 % n]).collect();
    let views = [
        MatView::row_major(&data, k, n),
        MatView::transposed(&transpose, n, k),
        MatView { data: &scattered, row_stride: 4 * n, col_stride: 2, expert_stride: 4 * k * n },
    ];
    for precision in PRECISIONS {
        let expected = PackedB::pack(Isa::Scalar, precision, experts, k, n, views[0]);
        for (isa, (at, view)) in isas().into_iter().flat_map(|isa| views.into_iter().enumerate().map(move |v| (isa, v)))
        {
            let got = PackedB::pack(isa, precision, experts, k, n, view);
            for expert in 0..experts {
                if precision.is_bf16() {
                    assert!(got.expert::<u16>(expert) == expected.expert::<u16>(expert), "{isa} {precision} view {at}");
                } else {
                    assert_same_bits(&format!("{isa} view {at}"), got.expert(expert), expected.expert(expert));
                }
            }
        }
    }
}

#[test]
fn every_column_is_found_again() {
    for shape in SHAPES {
        let (file, (experts, k, n)) = (File::new(shape), shape);
        for (precision, columns) in PRECISIONS.into_iter().flat_map(|p| [(p, Columns::Plain), (p, Columns::GateUp)]) {
            file.sources(|source, _| {
                let packed = PackedB::from_stored(Isa::current(), precision, experts, k, n, columns, source);
                for at in 0..experts * n {
                    let mut column = vec![7.0; k];
                    packed.column(at / n, at % n, &mut column);
                    assert_same_bits(&format!("{precision} {columns:?} {at}"), &column, &file.wide_columns[at]);
                }
            });
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let shape = (3, 50, 200);
    let file = File::new(shape);
    let packs = crate::testing::pools(|| {
        let mut packs = Vec::new();
        file.sources(|source, _| {
            let pack = PackedB::from_stored(Isa::current(), Precision::Bf16, 3, 50, 200, Columns::GateUp, source);
            packs.extend((0..3).map(|expert| pack.expert::<u16>(expert).to_vec()));
        });
        packs
    });
    assert!(packs.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
#[should_panic(expected = "[1, 3, 2] takes 2 slices of 3 numbers, not 2, slice 1 of 4")]
fn a_column_of_another_length_is_refused_with_the_shapes() {
    let source = Source::ByColumn(Elements::Bf16(&[&[0; 3], &[0; 4]]));
    PackedB::from_stored(Isa::Scalar, Precision::F32, 1, 3, 2, Columns::Plain, source);
}

#[test]
#[should_panic(expected = "a pack held in bf16 for f32 takes no f32s")]
fn a_pack_that_would_round_is_not_packed_anew() {
    let source = Source::ByRow(Elements::Bf16(&[&[0; 6]]));
    let mut packed = PackedB::from_stored(Isa::Scalar, Precision::F32, 1, 3, 2, Columns::Plain, source);
    packed.repack(Isa::Scalar, MatView::row_major(&[0.1; 6], 3, 2));
}
