//! The deficit scheduler: what it promises, and two promises made for it elsewhere that it does not keep.

mod common;

use common::draws;
use mixtura_routing::reference::dispersion::deficit_batches;

/// Largest amounts by which a source was ahead of and behind its share, and the most of a source over `ceil(B size / N)`.
fn measure(sizes: &[usize], batch: usize) -> (f64, f64, usize) {
    let total: usize = sizes.iter().sum();
    let batches = deficit_batches(sizes, batch);
    let (mut ahead, mut behind, mut over) = (0.0f64, 0.0f64, 0);
    let mut drawn = vec![0usize; sizes.len()];
    for (n, &s) in batches.iter().flatten().enumerate() {
        drawn[s as usize] += 1;
        for (d, size) in drawn.iter().zip(sizes) {
            let difference = *d as f64 - (size * (n + 1)) as f64 / total as f64;
            ahead = ahead.max(difference);
            behind = behind.max(-difference);
        }
    }
    assert_eq!(drawn, sizes, "everything is drawn");
    for b in &batches {
        for (s, size) in sizes.iter().enumerate() {
            let held = b.iter().filter(|x| **x as usize == s).count();
            over = over.max(held.saturating_sub((batch * size).div_ceil(total)));
        }
    }
    (ahead, behind, over)
}

#[test]
fn no_source_is_ever_a_whole_draw_ahead_of_its_share() {
    for trial in 0..500u64 {
        let stream = draws(trial);
        let sizes: Vec<usize> = (0..2 + trial as usize % 8).map(|i| 1 + stream.bits(i, 0)[0] as usize % 40).collect();
        let batch = 1 + trial as usize % 6;
        let (ahead, _, _) = measure(&sizes, batch);
        assert!(ahead < 1.0, "{sizes:?}: {ahead}");
        let batches = deficit_batches(&sizes, batch);
        let (last, full) = batches.split_last().unwrap();
        assert!(full.iter().all(|b| b.len() == batch) && (1..=batch).contains(&last.len()));
    }
}

#[test]
fn a_source_may_fall_behind_by_more_than_one_and_a_batch_may_hold_one_too_many() {
    let (ahead, behind, _) = measure(&[1, 40, 3, 8, 40, 1, 1, 1, 40], 3);
    assert!(ahead < 1.0 && behind > 1.29, "{behind}");
    // Two of the third source in one batch of three, although three tenths of three round up to one.
    assert_eq!(deficit_batches(&[1, 1, 3, 5], 3)[2], [2, 3, 2]);
    assert_eq!(measure(&[1, 1, 3, 5], 3).2, 1);
}

#[test]
fn nothing_to_draw_gives_no_batches() {
    assert!(deficit_batches(&[], 4).is_empty() && deficit_batches(&[0, 0], 4).is_empty());
    assert_eq!(deficit_batches(&[2], 0), [[0], [0]], "a batch holds at least one");
}
