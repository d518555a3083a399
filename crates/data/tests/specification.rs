//! The propositions, the deficit scheduler and the generator of this crate against those by which `mixtura route check` judges golden
//! vectors. Neither crate uses the other, so each has its own; here they must agree item by item.

use mixtura_data::propositions::SpecifiedItems;
use mixtura_data::rng::SplitMix64;
use mixtura_data::{Mixing, Scheduler};
use mixtura_routing::reference::{dispersion, propositions};

#[test]
fn generators_give_the_same_draws() {
    for seed in [0, 1, 7, u64::MAX] {
        let (mut ours, mut judge) = (SplitMix64::new(seed), propositions::SplitMix64(seed));
        assert!((0..1000).all(|_| ours.next_u64() == judge.next_u64()));
    }
}

#[test]
fn specified_items_are_those_of_the_golden_vectors() {
    let facts = [("Mercury", 0), ("Venus", 0), ("Earth", 1), ("Mars", 2), ("Pluto", 5)];
    let facts: Vec<(String, u32)> = facts.map(|(name, count)| (name.to_string(), count)).to_vec();
    for seed in 0..20 {
        let ours = SpecifiedItems::new(seed, facts.clone());
        assert_eq!(ours.distinct_bodies(), propositions::distinct_bodies(&facts));
        let mut judge = propositions::SplitMix64(seed);
        for item in ours.take(300) {
            let expected = propositions::draw(&mut judge, &facts);
            assert_eq!(item.text, expected.text);
            assert_eq!(item.body_truth, expected.body_truth, "{}", item.text);
            assert_eq!(item.connective as usize, expected.connective as usize, "{}", item.text);
            assert_eq!(item.modality as usize, expected.modality as usize, "{}", item.text);
            assert_eq!(format!("{:?}", item.label).to_lowercase(), expected.label, "{}", item.text);
            for ((name, count, truth), atom) in item.atoms.iter().zip(&expected.atoms) {
                assert_eq!((name, *count, *truth), (&facts[atom.subject].0, atom.count, atom.truth), "{}", item.text);
            }
        }
    }
}

#[test]
fn a_dispersed_epoch_is_that_of_the_golden_vectors() {
    for sizes in [vec![6, 3, 2, 1], vec![1, 1, 3, 5], vec![40, 1, 3, 8, 40, 1], vec![1], vec![7, 7, 7]] {
        for batch in 1..6 {
            let shares: Vec<u64> = sizes.iter().map(|size| *size as u64).collect();
            let mut scheduler = Scheduler::new(Mixing::Dispersed, 0, &shares);
            for expected in dispersion::deficit_batches(&sizes, batch) {
                let ours: Vec<u32> = scheduler.next_batch(expected.len()).into_iter().map(|s| s as u32).collect();
                assert_eq!(ours, expected, "sizes {sizes:?}, batches of {batch}");
            }
        }
    }
}
