//! Every ISA x precision x shape against the reference, bit for bit.
use super::*;
use crate::pack::{Columns, Elements, Source};
use crate::testing::{PRECISIONS, assert_same_bits, isas, numbers, order_of, pools};

/// (rows, K, N): nothing is a multiple of anything, then the tile sizes and one more or less, then blocks of K.
const SHAPES: [(usize, usize, usize); 16] = [
    (1, 1, 1),
    (1, 7, 33),
    (2, 64, 32),
    (3, 33, 31),
    (5, 96, 40),
    (13, 45, 70),
    (14, 32, 64),
    (15, 31, 65),
    (16, 65, 96),
    (17, 100, 17),
    (29, 20, 129),
    (33, 512, 33),
    (129, 513, 34),
    (131, 70, 100),
    (5, K_BLOCK, 40),
    (15, K_BLOCK + 1, 33),
];

fn check_matmul(isa: Isa, precision: Precision, (m, k, n): (usize, usize, usize), transposed: bool, accum: Accum) {
    let (a, b) = (numbers(1, m * k), numbers(2, k * n));
    let view = if transposed { MatView::transposed(&b, n, k) } else { MatView::row_major(&b, k, n) };
    let mut expected = numbers(3, m * n);
    let mut got = expected.clone();
    matmul_reference(order_of(isa, precision), &a, view, m, k, n, &mut expected, accum);
    let packed = PackedB::pack(isa, precision, 1, k, n, view);
    matmul(isa, &a, m, &packed, &mut got, accum);
    let what = format!("{isa} {precision} [{m}, {k}] x [{k}, {n}] transposed {transposed} {accum:?}");
    assert_same_bits(&what, &got, &expected);
}

#[test]
fn matmul_has_the_bits_of_its_reference() {
    for isa in isas() {
        for precision in PRECISIONS {
            for shape in SHAPES {
                for accum in [Accum::Replace, Accum::Add] {
                    check_matmul(isa, precision, shape, false, accum);
                    check_matmul(isa, precision, shape, true, accum);
                }
            }
        }
    }
}

#[test]
fn every_height_of_a_tile_has_the_bits_of_its_reference() {
    // AVX-512 has tiles of 1 to 14 rows, AVX2 of 1 to 6, the exact order there of 1 to 3: all of them, and two tiles of unequal height.
    let (k, n) = (70, 40);
    let b = numbers(2, k * n);
    let view = MatView::row_major(&b, k, n);
    for m in 1..=15 {
        let a = numbers(m as u64, m * k);
        let expected = PRECISIONS.map(|precision| {
            let mut c = numbers(3, m * n);
            matmul_reference(precision, &a, view, m, k, n, &mut c, Accum::Add);
            (precision, c)
        });
        for (isa, precision) in isas().into_iter().flat_map(|isa| PRECISIONS.map(|precision| (isa, precision))) {
            let mut got = numbers(3, m * n);
            matmul(isa, &a, m, &PackedB::pack(isa, precision, 1, k, n, view), &mut got, Accum::Add);
            let (_, expected) = expected.iter().find(|(order, _)| *order == order_of(isa, precision)).unwrap();
            assert_same_bits(&format!("{isa} {precision} {m} rows"), &got, expected);
        }
    }
}

#[test]
fn matmul_tn_has_the_bits_of_its_reference() {
    for isa in isas() {
        for precision in PRECISIONS {
            for (t, m, n) in SHAPES.into_iter().chain([(600, 20, 40), (1030, 7, 33)]) {
                for accum in [Accum::Replace, Accum::Add] {
                    let (a, b) = (numbers(1, t * m), numbers(2, t * n));
                    let mut expected = numbers(3, m * n);
                    let mut got = expected.clone();
                    matmul_tn_reference(order_of(isa, precision), &a, &b, t, m, n, &mut expected, accum);
                    matmul_tn(isa, precision, &a, &b, t, m, n, &mut got, accum);
                    assert_same_bits(&format!("{isa} {precision} tn {t} {m} {n} {accum:?}"), &got, &expected);
                }
            }
        }
    }
}

/// Empty experts, one row, lopsided.
const LOADS: [&[u32]; 4] = [&[0, 0, 0, 0], &[0, 1, 1, 2, 40], &[0, 0, 131, 131, 140, 140], &[0, 300]];

#[test]
fn grouped_products_have_the_bits_of_their_references() {
    let (k, n) = (50, 70);
    for isa in isas() {
        for precision in PRECISIONS {
            for offsets in LOADS {
                let (experts, rows) = (offsets.len() - 1, offsets[offsets.len() - 1] as usize);
                let (a, b, wide) = (numbers(1, rows * k), numbers(2, experts * k * n), numbers(3, rows * n));
                let view = MatView::row_major(&b, k, n);
                let (mut expected, mut got) = (vec![9.0; rows * n], vec![9.0; rows * n]);
                let order = order_of(isa, precision);
                grouped_matmul_reference(order, &a, offsets, view, k, n, &mut expected, Accum::Replace);
                let packed = PackedB::pack(isa, precision, experts, k, n, view);
                grouped_matmul(isa, &a, offsets, &packed, &mut got, Accum::Replace);
                assert_same_bits(&format!("{isa} {precision} grouped {offsets:?}"), &got, &expected);

                let (mut expected, mut got) = (vec![9.0; experts * k * n], vec![9.0; experts * k * n]);
                grouped_matmul_tn_reference(order, &a, &wide, offsets, k, n, &mut expected, Accum::Replace);
                grouped_matmul_tn(isa, precision, &a, &wide, offsets, k, n, &mut got, Accum::Replace);
                assert_same_bits(&format!("{isa} {precision} grouped tn {offsets:?}"), &got, &expected);
            }
        }
    }
}

/// Packed as a file holds it in bf16, and the same numbers in f32.
fn held_in_bf16(isa: Isa, experts: usize, k: usize, n: usize, b: &[f32]) -> (PackedB, Vec<f32>) {
    let bits: Vec<u16> = b.iter().map(|&x| crate::bf16::from_f32(x)).collect();
    let slices: Vec<&[u16]> = bits.chunks(k * n).collect();
    let source = Source::ByRow(Elements::Bf16(&slices));
    let packed = PackedB::from_stored(isa, Precision::F32, experts, k, n, Columns::Plain, source);
    assert!(packed.holds_bf16());
    (packed, bits.into_iter().map(crate::bf16::to_f32).collect())
}

#[test]
fn f32_products_with_weights_held_in_bf16_have_the_bits_of_those_with_the_weights_widened() {
    let heights = (1..=15).chain([33, 200]).flat_map(|m| [(m, 70, 40), (m, 75, 33)]);
    for (m, k, n) in SHAPES.into_iter().chain(heights).chain([(3, 2 * K_BLOCK + 7, 45)]) {
        let (a, b) = (numbers(1, m * k), numbers(2, k * n));
        for isa in isas() {
            let (packed, widened) = held_in_bf16(isa, 1, k, n, &b);
            for accum in [Accum::Replace, Accum::Add] {
                let mut expected = numbers(3, m * n);
                let mut got = expected.clone();
                let view = MatView::row_major(&widened, k, n);
                matmul_reference(Precision::F32, &a, view, m, k, n, &mut expected, accum);
                matmul(isa, &a, m, &packed, &mut got, accum);
                assert_same_bits(&format!("{isa} [{m}, {k}] x [{k}, {n}] {accum:?}"), &got, &expected);
            }
        }
    }
}

#[test]
fn grouped_products_with_weights_held_in_bf16_have_the_bits_of_those_with_the_weights_widened() {
    let (k, n) = (51, 70);
    for (isa, offsets) in isas().into_iter().flat_map(|isa| LOADS.map(|offsets| (isa, offsets))) {
        let (experts, rows) = (offsets.len() - 1, offsets[offsets.len() - 1] as usize);
        let (a, b) = (numbers(1, rows * k), numbers(2, experts * k * n));
        let (packed, widened) = held_in_bf16(isa, experts, k, n, &b);
        let (mut expected, mut got) = (vec![9.0; rows * n], vec![9.0; rows * n]);
        let view = MatView::row_major(&widened, k, n);
        grouped_matmul_reference(Precision::F32, &a, offsets, view, k, n, &mut expected, Accum::Replace);
        grouped_matmul(isa, &a, offsets, &packed, &mut got, Accum::Replace);
        assert_same_bits(&format!("{isa} {offsets:?}"), &got, &expected);
    }
}

#[test]
fn with_weights_held_in_bf16_f32_keeps_denormals_and_the_sign_of_zero() {
    let (m, n) = (2, 3);
    for k in [3, 4, 35] {
        // Sums of -0, which a zero more would turn into +0; and denormal operands, products and sums.
        let small = [vec![-1.0; n], vec![-1e-39; (k - 1) * n]].concat();
        let cases = [(vec![-1.0; m * k], vec![0.0; k * n], -0.0), (vec![1e-40; m * k], small, 1e-44)];
        for (a, b, start) in cases {
            for isa in isas() {
                let (packed, widened) = held_in_bf16(isa, 1, k, n, &b);
                let (mut expected, mut got) = (vec![start; m * n], vec![start; m * n]);
                let view = MatView::row_major(&widened, k, n);
                matmul_reference(Precision::F32, &a, view, m, k, n, &mut expected, Accum::Add);
                matmul(isa, &a, m, &packed, &mut got, Accum::Add);
                assert_same_bits(&format!("{isa} K {k} from {start:e}"), &got, &expected);
                assert!(expected.iter().all(|x| x.is_subnormal() || x.to_bits() == (-0f32).to_bits()));
            }
        }
    }
}

#[test]
fn bf16_native_is_close_to_the_exact_product_of_the_rounded_operands() {
    for isa in isas() {
        for (m, k, n) in SHAPES {
            let (a, b) = (numbers(1, m * k), numbers(2, k * n));
            let packed = PackedB::pack(isa, Precision::Bf16Native, 1, k, n, MatView::row_major(&b, k, n));
            let mut got = vec![0.0; m * n];
            matmul(isa, &a, m, &packed, &mut got, Accum::Replace);
            for row in 0..m {
                for column in 0..n {
                    let products = (0..k).map(|k| {
                        f64::from(crate::bf16::round(a[row * packed.k() + k]))
                            * f64::from(crate::bf16::round(b[k * n + column]))
                    });
                    let (sum, size) = products.fold((0.0, 0.0), |(sum, size), p: f64| (sum + p, size + p.abs()));
                    let error = (f64::from(got[row * n + column]) - sum).abs();
                    assert!(
                        error <= 1e-6 * size.max(1e-30),
                        "{isa} [{m}, {k}, {n}] at {row}, {column}: off by {error}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_row_alone_has_the_bits_it_has_in_a_batch() {
    let (m, k, n) = (37, 600, 45);
    let (a, b) = (numbers(1, m * k), numbers(2, k * n));
    for isa in isas() {
        for precision in PRECISIONS {
            let packed = PackedB::pack(isa, precision, 1, k, n, MatView::row_major(&b, k, n));
            let mut together = vec![0.0; m * n];
            matmul(isa, &a, m, &packed, &mut together, Accum::Replace);
            for row in 0..m {
                let mut alone = vec![0.0; n];
                matmul(isa, &a[row * k..(row + 1) * k], 1, &packed, &mut alone, Accum::Replace);
                assert_same_bits(&format!("{isa} {precision} row {row}"), &alone, &together[row * n..(row + 1) * n]);
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let (m, k, n) = (301, 90, 130);
    let (a, b, wide) = (numbers(1, m * k), numbers(2, k * n), numbers(3, m * n));
    for precision in PRECISIONS {
        let isa = *isas().last().unwrap();
        let results: Vec<(Vec<f32>, Vec<f32>)> = pools(|| {
            let packed = PackedB::pack(isa, precision, 1, k, n, MatView::row_major(&b, k, n));
            let (mut c, mut dw) = (vec![0.0; m * n], vec![0.0; k * n]);
            matmul(isa, &a, m, &packed, &mut c, Accum::Replace);
            matmul_tn(isa, precision, &a, &wide, m, k, n, &mut dw, Accum::Replace);
            (c, dw)
        });
        for (c, dw) in &results[1..] {
            assert_same_bits(&format!("{precision} c"), c, &results[0].0);
            assert_same_bits(&format!("{precision} dw"), dw, &results[0].1);
        }
    }
}

#[test]
fn denormals_are_flushed_alike_on_every_isa() {
    // Magnitudes around the smallest normal number: operands, products, chains and their sums all become denormal somewhere.
    let (m, k, n) = (11, 96, 64);
    let tiny = |seed: u64, len: usize| -> Vec<f32> {
        numbers(seed, len).iter().enumerate().map(|(i, x)| x * 2f32.powi(-58 - (i % 11) as i32)).collect()
    };
    let (mut a, mut b) = (tiny(1, m * k), tiny(2, k * n));
    a[3] = 1e-40;
    b[5] = -1e-39;
    let view = MatView::row_major(&b, k, n);
    for precision in [Precision::Bf16, Precision::Bf16Native] {
        for isa in isas() {
            let mut expected = vec![0.0; m * n];
            matmul_reference(order_of(isa, precision), &a, view, m, k, n, &mut expected, Accum::Replace);
            assert!(expected.contains(&0.0) && expected.iter().any(|&x| x != 0.0), "the case must straddle the edge");
            let packed = PackedB::pack(isa, precision, 1, k, n, view);
            let mut got = vec![0.0; m * n];
            matmul(isa, &a, m, &packed, &mut got, Accum::Replace);
            assert_same_bits(&format!("{isa} {precision} denormals"), &got, &expected);
        }
    }
}

#[test]
fn a_sum_that_starts_from_minus_zero_ends_as_the_padding_of_k_leaves_it() {
    // Three k of 32: the padding adds products of zeros, which turn -0 into +0; a reference that stopped at K would not.
    let (a, b) = ([0.0; 3], [0.0; 3]);
    for precision in [Precision::Bf16, Precision::Bf16Native] {
        for isa in isas() {
            let view = MatView::row_major(&b, 3, 1);
            let (mut expected, mut got) = ([-0.0; 1], [-0.0; 1]);
            matmul_reference(order_of(isa, precision), &a, view, 1, 3, 1, &mut expected, Accum::Add);
            matmul(isa, &a, 1, &PackedB::pack(isa, precision, 1, 3, 1, view), &mut got, Accum::Add);
            assert_same_bits(&format!("{isa} {precision}"), &got, &expected);
        }
    }
}

#[test]
#[should_panic(expected = "[2, 3] times [3, 4] needs 6 and 8")]
fn wrong_shapes_panic_with_the_shapes() {
    let packed = PackedB::pack(Isa::Scalar, Precision::F32, 1, 3, 4, MatView::row_major(&[0.0; 12], 3, 4));
    matmul(Isa::Scalar, &[0.0; 5], 2, &packed, &mut [0.0; 8], Accum::Replace);
}
