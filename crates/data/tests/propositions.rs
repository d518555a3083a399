//! The propositions world: the specified generator, truth against an independent evaluator, splits that are apart, answers that grade.

use std::collections::BTreeSet;

use mixtura_data::propositions::{
    Connective, Formula, Membership, Modality, Proposition, PropositionsConfig, SpecifiedItems, Split, Subject,
    Verdict, evaluation_items, generate, grade, parse_verdict, tokenize_item,
};
use mixtura_data::{Tokenizer, rng::SplitMix64};
use proptest::prelude::*;

/// The case of the published vectors that describes the generator.
fn golden() -> serde_json::Value {
    let file: serde_json::Value = serde_json::from_str(include_str!("../../../fixtures/golden.json")).unwrap();
    file["cases"].as_array().unwrap().iter().find(|case| case["id"] == "H2.logic_dataset").unwrap().clone()
}

fn specified(seed: u64) -> SpecifiedItems {
    let facts = [("Mercury", 0), ("Venus", 0), ("Earth", 1), ("Mars", 2)];
    SpecifiedItems::new(seed, facts.map(|(name, count)| (name.to_string(), count)).to_vec())
}

#[test]
fn the_specified_generator_gives_the_published_items() {
    let expected = &golden()["expected"];
    let items: Vec<_> = specified(1).take(8).collect();
    for (item, wanted) in items.iter().zip(expected["first8"].as_array().unwrap()) {
        assert_eq!(item.text, wanted["text"]);
        assert_eq!(item.connective.name(), wanted["connective"]);
        assert_eq!(item.modality.name(), wanted["modality"]);
        assert_eq!(item.body_truth, wanted["body_truth"]);
        assert_eq!(item.label.name(), wanted["label"]);
        assert_eq!(serde_json::json!(item.atoms), wanted["atoms"]);
    }
    assert_eq!(specified(1).distinct_bodies(), expected["distinct_bodies"]);
    for connective in Connective::ALL {
        let table = [(false, false), (false, true), (true, false), (true, true)].map(|(a, b)| connective.apply(a, b));
        assert_eq!(serde_json::json!(table), expected["truth_tables"][connective.name()]);
    }
}

#[test]
fn labels_are_as_unbalanced_as_published() {
    let expected = &golden()["expected"]["labels_in_1000"];
    let labels: Vec<Verdict> = specified(7).take(1000).map(|item| item.label).collect();
    for verdict in [Verdict::True, Verdict::False, Verdict::Undetermined] {
        assert_eq!(labels.iter().filter(|label| **label == verdict).count(), expected[verdict.name()]);
    }
}

#[test]
fn specified_sentences_are_sentences_of_our_world() {
    for item in specified(3).take(300) {
        let parsed = Proposition::parse(&item.text).unwrap();
        assert_eq!((parsed.body.truth(), parsed.verdict()), (item.body_truth, item.label));
        assert_eq!(parsed.text(), item.text);
    }
}

#[test]
fn the_canonical_item_is_false_for_the_reason_given() {
    let item = Proposition::canonical();
    assert_eq!(
        item.question(),
        "Is the following proposition true: \"Earth has exactly two natural satellites OR Mars has exactly one natural satellite.\""
    );
    assert_eq!(
        item.answer(),
        "\nEarth has one natural satellite, claimed two: false\nMars has two natural satellites, claimed one: false\n\
         false OR false is false\nVerdict: false."
    );
    assert!(Membership::of(&item).held_out_content, "the item shown at the end of training was never trained on");
}

/// Truth by another road: the sentence is read as text, atoms looked up in a table of sentences, connectives by set logic.
fn independent_truth(text: &str) -> bool {
    let body = text.trim_end_matches('.');
    let true_atoms: BTreeSet<String> = Subject::all()
        .map(|s| {
            let words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"];
            let unit = s.kind().unit[if s.count() == 1 { 0 } else { 1 }];
            format!("{} has exactly {} {unit}", s.name(), words[s.count() as usize])
        })
        .collect();
    value(body, &true_atoms) == 1
}

fn value(body: &str, true_atoms: &BTreeSet<String>) -> u8 {
    // The top-level separators of a sentence are those outside all parentheses.
    let split = |separator: &str| -> Option<(String, String)> {
        let mut depth = 0;
        for (i, c) in body.char_indices() {
            match c {
                '(' => depth += 1,
                ')' => depth -= 1,
                _ if depth == 0 && body[i..].starts_with(separator) => {
                    return Some((body[..i].into(), body[i + separator.len()..].into()));
                }
                _ => {}
            }
        }
        None
    };
    let operand = |text: &str| match text.strip_prefix('(').and_then(|t| t.strip_suffix(')')) {
        Some(inner) => value(inner, true_atoms),
        None => u8::from(true_atoms.contains(text)),
    };
    if let Some((a, b)) = split(", then ") {
        return 1 - operand(a.strip_prefix("if ").unwrap()) * (1 - operand(&b));
    }
    if let Some((a, b)) = split(" nor ") {
        return (1 - operand(a.strip_prefix("neither ").unwrap())) * (1 - operand(&b));
    }
    if let Some((a, b)) = split(" or ") {
        let (a, b) = (operand(a.strip_prefix("either ").unwrap()), operand(b.strip_suffix(", but not both").unwrap()));
        return (a + b) % 2;
    }
    if let Some((a, b)) = split(" if and only if ") {
        return (operand(&a) + operand(&b) + 1) % 2;
    }
    if let Some((a, b)) = split(" AND ") {
        return operand(&a) * operand(&b);
    }
    if let Some((a, b)) = split(" OR ") {
        return operand(&a).max(operand(&b));
    }
    u8::from(true_atoms.contains(body))
}

fn any_item(seed: u64, index: u64) -> Proposition {
    let split = [Split::Train, Split::Iid, Split::Form, Split::Content][SplitMix64::new(seed).below(4)];
    generate(seed, split, &[1, 2, 3], &[1, 2, 3], &Modality::ALL, index)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn truth_agrees_with_an_independent_evaluator(seed: u64, index in 0..1000u64) {
        let item = any_item(seed, index);
        prop_assert_eq!(item.body.truth(), independent_truth(&(item.body.text() + ".")));
    }

    #[test]
    fn text_and_question_are_read_back(seed: u64, index in 0..1000u64) {
        let item = any_item(seed, index);
        prop_assert_eq!(&Proposition::parse(&item.text()).unwrap(), &item);
        prop_assert_eq!(&Proposition::parse(&item.question()).unwrap(), &item);
    }

    #[test]
    fn the_right_answer_is_graded_right_and_no_other(seed: u64, index in 0..1000u64) {
        let item = any_item(seed, index);
        let answer = item.answer();
        let right = grade(&item, &(item.question() + &answer));
        prop_assert!(right.verdict_right && right.reasoning_right && right.lines_right == right.lines);
        prop_assert_eq!(parse_verdict(&answer), Some(item.verdict()));
        let wrong = answer.replacen("true", "false", 1);
        if wrong != answer {
            let graded = grade(&item, &wrong);
            prop_assert!(!graded.reasoning_right && graded.lines_right < graded.lines);
        }
        let cut = answer.rfind("\nVerdict").unwrap();
        prop_assert_eq!(grade(&item, &answer[..cut]).verdict, None);
    }

    #[test]
    fn any_text_is_parsed_or_refused(text in ".{0,200}") {
        let _ = Proposition::parse(&text);
    }
}

#[test]
fn truth_is_a_coin_flip_under_every_connective_and_depth() {
    for depth in 1..=3 {
        for connective in Connective::ALL {
            let items = (0..3000).map(|i| generate(5, Split::Train, &[depth], &[1, 2, 3], &Modality::ALL, i));
            let truths: Vec<bool> = items
                .filter(|item| matches!(&item.body, Formula::Node(c, ..) if *c == connective))
                .map(|item| item.body.truth())
                .collect();
            let share = truths.iter().filter(|t| **t).count() as f64 / truths.len() as f64;
            assert!((share - 0.5).abs() < 0.1, "{connective:?} at depth {depth}: {share} of {} are true", truths.len());
        }
    }
}

#[test]
fn splits_are_apart() {
    let config = PropositionsConfig { evaluation_items: 64, ..PropositionsConfig::default() };
    let train: Vec<Proposition> =
        (0..4000).map(|i| generate(0, Split::Train, &config.depths, &config.depths, &Modality::ALL, i)).collect();
    let texts: BTreeSet<String> = train.iter().map(|item| item.text()).collect();
    let forms: BTreeSet<(Option<Connective>, Modality)> =
        train.iter().map(|item| (root(item), item.modality)).collect();
    let pairs: BTreeSet<(Subject, Subject)> = train.iter().flat_map(pairs_of).collect();

    let evaluation = evaluation_items(&config, &Tokenizer::propositions()).unwrap();
    for split in Split::EVALUATION {
        let items: Vec<_> = evaluation.iter().filter(|e| e.split == split).collect();
        assert_eq!(items.len(), if split == Split::Depth { 64 } else { 128 }, "{split:?}");
        for e in items {
            let item = &e.item;
            assert!(!texts.contains(&item.text()), "{split:?}: {}", item.text());
            let new_form = !forms.contains(&(root(item), item.modality));
            let new_pair = pairs_of(item).iter().any(|pair| !pairs.contains(pair));
            // 4000 items show all 20 trained forms and all trained pairs, so that what is new here is new by construction.
            assert_eq!(new_form, split == Split::Form, "{split:?}: {}", item.text());
            assert_eq!(new_pair, split == Split::Content, "{split:?}: {}", item.text());
            assert_eq!(!config.depths.contains(&item.depth()), split == Split::Depth);
            assert_eq!(item.depth(), e.depth);
        }
    }
    // By construction as well: whatever the item, exactly one of the predicates can hold.
    for item in train.iter().chain(evaluation.iter().map(|e| &e.item)) {
        let all = [Split::Train, Split::Iid, Split::Form, Split::Content, Split::Depth];
        let member = Membership::of(item);
        let homes = all.iter().filter(|split| member.belongs(**split, item.depth(), &config.depths)).count();
        assert!(homes <= 1, "{}", item.text());
    }
}

fn root(item: &Proposition) -> Option<Connective> {
    match &item.body {
        Formula::Node(connective, ..) => Some(*connective),
        Formula::Atom(_) => None,
    }
}

fn pairs_of(item: &Proposition) -> Vec<(Subject, Subject)> {
    let mut subjects: Vec<Subject> = item.body.atoms().iter().map(|atom| atom.subject).collect();
    subjects.sort();
    let pair = |i: usize, j: usize| (subjects[i], subjects[j]);
    (0..subjects.len()).flat_map(|i| (i + 1..subjects.len()).map(move |j| (i, j))).map(|(i, j)| pair(i, j)).collect()
}

#[test]
fn subjects_of_an_item_differ() {
    for i in 0..500 {
        let item = any_item(i, i);
        let subjects: BTreeSet<Subject> = item.body.atoms().iter().map(|atom| atom.subject).collect();
        assert_eq!(subjects.len(), item.body.atoms().len(), "{}", item.text());
    }
}

#[test]
fn an_item_of_depth_two_fits_128_tokens() {
    let tokenizer = Tokenizer::propositions();
    for (depth, limit) in [(1, 64), (2, 128), (3, 256)] {
        let lengths: Vec<usize> = (0..1000)
            .map(|i| {
                let item = generate(1, Split::Train, &[depth], &[depth], &Modality::ALL, i);
                tokenize_item(&tokenizer, &item).unwrap().0.len()
            })
            .collect();
        let (mean, max) = (lengths.iter().sum::<usize>() / lengths.len(), lengths.iter().max().unwrap());
        println!("depth {depth}: {mean} tokens on average, {max} at most; vocabulary {}", tokenizer.vocab_size());
        assert!(*max < limit, "depth {depth}: {max}");
    }
}

#[test]
fn items_use_no_byte_fallback_but_parentheses() {
    let tokenizer = Tokenizer::propositions();
    for i in 0..500 {
        let item = any_item(i, 2 * i);
        for id in tokenize_item(&tokenizer, &item).unwrap().0 {
            let text = tokenizer.decode(&[id]);
            assert!(id >= 256 || ["(", ")", ".", "\n", "\""].contains(&text.as_str()), "{text:?} in {}", item.text());
        }
    }
}
