//! The table of which routers are causal and batch-invariant, by random trials.

use mixtura_routing::causality::{Verdict, probes};

#[test]
fn the_causality_table_holds() {
    let expected = [
        ("token_choice_dropless", true, true),
        ("switch_top1_capacity_position", true, false),
        ("top2_capacity_k_major", false, false),
        ("top2_capacity_token_major", true, false),
        ("top1_capacity_bpr", false, false),
        ("expert_choice", false, false),
        ("soft_moe", false, false),
        ("relu_routing", true, true),
        ("smear", false, false),
        ("lory_own_first", false, false),
        ("lory_uniform_first", true, false),
        ("block_causal_soft", true, false),
        ("top2_capacity_random", false, false),
        ("top2_capacity_score", false, false),
        ("top1_capacity_similarity", false, false),
        ("batchwise", false, false),
        ("base", false, false),
        ("sinkhorn", false, false),
        ("top_p", true, true),
        ("group_limited", true, true),
        ("hierarchical", true, true),
    ];
    let probes = probes();
    assert_eq!(probes.len(), expected.len());
    for (probe, (name, causal, batch_invariant)) in probes.iter().zip(expected) {
        assert_eq!(probe.name, name);
        assert_eq!(probe.verdict(200), Verdict { causal, batch_invariant }, "{name}");
    }
}
