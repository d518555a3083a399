//! What is generated is what was trained and evaluated: for every policy and system that decodes, in every precision, from f32 and from bf16
//! files, a sealed model has the bits of the model with parameters, and a sequence has its bits alone, in any batch, in any chunks, on any
//! number of threads.

use burn::tensor::Device;
use mixtura_checkpoint::{Family, SaveOptions, StoredType, load_model, load_sealed, save_model};
use mixtura_infer::{Engine, Event, Request, Sampling, StepError};
use mixtura_nn::{Decoder, ForwardContext, ForwardError, ModelConfig};
use mixtura_ops::{Numerics, Precision, into_vec};
use mixtura_routing::Recipe;
use tempfile::TempDir;

const VOCAB: usize = 37;
const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::Bf16Native];

/// A model of the recipe `name`: shared keys, widths that fill no panel, more experts than its tokens visit.
fn config(name: &str, more: &str) -> ModelConfig {
    let recipe = Recipe::named(name).unwrap();
    let written = |keys: &str| {
        let text = format!(
            "vocab = {VOCAB}\nd_model = 24\nlayers = 3\nheads = 4\nkv_heads = 2\ncontext = 40\ninit_std = 0.3\n{more}\n\
             [moe]\nexperts = 32\nd_expert = 20\nrecipe = \"{name}\"\n{keys}\n"
        );
        let config: ModelConfig = toml::from_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        config.validate().map(|()| config).map_err(|error| format!("{error}\n{text}"))
    };
    match recipe.soft {
        None => written(&format!("top_k = {}", recipe.top_k.unwrap_or(2))).unwrap(),
        // Kinds that look at later tokens have a forward pass too.
        Some(soft) => written("")
            .or_else(|_| written(&format!("soft = {{ kind = \"{}\", allow_future = true }}", soft.kind())))
            .unwrap(),
    }
}

/// A model in a directory.
fn saved(config: &ModelConfig, stored: StoredType) -> TempDir {
    let place = tempfile::tempdir().unwrap();
    let decoder = Decoder::new(config, 5, &Device::default()).unwrap();
    let options = SaveOptions { stored, ..SaveOptions::default() };
    save_model(&place.path().join("m"), &decoder, Family::Mixtura, &options).unwrap();
    place
}

fn ids(n: usize, seed: u32) -> Vec<u32> {
    (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 97_003) >> 7) % VOCAB as u32).collect()
}

fn bits(values: Vec<f32>) -> Vec<u32> {
    values.into_iter().map(f32::to_bits).collect()
}

fn logits(model: &Decoder, ids: &[u32], numerics: Numerics) -> Vec<u32> {
    bits(into_vec(model.logits(ids, 1, ids.len(), &ForwardContext::evaluation(numerics)).unwrap().0))
}

/// The prompts of a test: of every length around a chunk, two of them with a common beginning.
fn requests() -> Vec<Request> {
    let drawn = Sampling { temperature: 0.9, top_p: 0.95, seed: 3, ..Sampling::GREEDY };
    let prompts = [ids(1, 1), ids(7, 2), ids(19, 3), ids(3, 4), [ids(7, 2), ids(4, 5)].concat(), ids(30, 6)];
    let request = |(i, prompt): (usize, Vec<u32>)| {
        let sampling = if i % 2 == 0 { Sampling::GREEDY } else { drawn };
        Request { sampling, likeliest: 2, routing: true, ..Request::greedy(prompt, 9 - i, &[0]) }
    };
    prompts.into_iter().enumerate().map(request).collect()
}

/// What each request gave, log probabilities and routing included.
fn run(mut engine: Engine, requests: &[Request]) -> Result<Vec<Vec<Event>>, StepError> {
    let mut taken = Vec::new();
    let mut events = vec![Vec::new(); requests.len()];
    // The last comes when the others are under way.
    let (last, first) = requests.split_last().unwrap();
    for request in first {
        taken.push(engine.add(request.clone())?);
    }
    let mut steps = 0;
    while !engine.is_idle() || taken.len() < requests.len() {
        if steps == 2.min(first.len()) {
            taken.push(engine.add(last.clone())?);
        }
        for (id, event) in engine.step()? {
            let own = &mut events[taken.iter().position(|&one| one == id).unwrap()];
            match (own.last_mut(), event) {
                // Chunks tell of their tokens in pieces.
                (Some(Event::Routed(before)), Event::Routed(more)) => before.extend(more),
                (_, event) => own.push(event),
            }
        }
        steps += 1;
    }
    Ok(events)
}

fn alone(model: &Decoder, numerics: Numerics) -> Result<Vec<Vec<Event>>, StepError> {
    requests()
        .iter()
        .map(|request| Ok(run(Engine::new(model, numerics), std::slice::from_ref(request))?.remove(0)))
        .collect()
}

#[test]
fn every_system_generates_alone_as_in_any_batch_and_as_it_was_evaluated() {
    let mut decoded = 0;
    for name in Recipe::names() {
        for (stored, precision) in [
            (StoredType::F32, Precision::F32),
            (StoredType::Bf16, Precision::F32),
            (StoredType::Bf16, Precision::Bf16),
            (StoredType::F32, Precision::Bf16Native),
        ] {
            let place = saved(&config(name, ""), stored);
            let dir = place.path().join("m");
            let numerics = Numerics::new(precision);
            let trained = load_model(&dir, &Device::default()).unwrap().decoder;
            let sealed = load_sealed(&dir, numerics).unwrap().decoder;
            let what = format!("{name}, {precision} of {stored:?}");
            for n in [1, 11, 40] {
                assert_eq!(
                    logits(&sealed, &ids(n, 9), numerics),
                    logits(&trained, &ids(n, 9), numerics),
                    "{what}, {n}"
                );
            }
            let expected = match alone(&trained, numerics) {
                Err(StepError::Forward(ForwardError::Future { .. })) => {
                    let refused = alone(&sealed, numerics);
                    assert!(
                        matches!(refused, Err(StepError::Forward(ForwardError::Future { .. }))),
                        "{what}: {refused:?}"
                    );
                    continue;
                }
                other => other.unwrap(),
            };
            decoded += 1;
            assert_eq!(alone(&sealed, numerics).unwrap(), expected, "{what}, sealed");
            for chunk in [1, 3, 512] {
                let engine = Engine::new(&sealed, numerics).with_chunk(chunk);
                assert_eq!(run(engine, &requests()).unwrap(), expected, "{what}, together in chunks of {chunk}");
            }
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let found = pool.install(|| run(Engine::new(&sealed, numerics), &requests()).unwrap());
                assert_eq!(found, expected, "{what}, {threads} threads");
            }
        }
    }
    assert!(decoded > 4 * 20, "{decoded} combinations decoded");
}

/// A causal router's decoded tokens are those of the forward pass over the whole text.
#[test]
fn greedy_text_is_what_the_whole_forward_pass_says() {
    for (name, more) in [
        ("top_k", ""),
        ("top_k", "tied = true\nqk_norm = \"full\""),
        ("top_k", "qk_norm = \"per_head\"\nactivation = \"gelu\""),
        ("hash", ""),
        ("moe_plus_plus", "d_dense = 28"),
        ("hmoe", ""),
    ] {
        for stored in [StoredType::F32, StoredType::Bf16] {
            let place = saved(&config(name, more), stored);
            for precision in PRECISIONS {
                let numerics = Numerics::new(precision);
                let model = load_sealed(&place.path().join("m"), numerics).unwrap().decoder;
                let prompt = ids(6, 4);
                let request = Request::greedy(prompt.clone(), 20, &[]);
                let events = run(Engine::new(&model, numerics).with_chunk(4), &[request]).unwrap().remove(0);
                let new: Vec<(u32, u64)> = events
                    .iter()
                    .filter_map(|event| match event {
                        Event::Token { token, .. } => Some((token.id, token.log_probability.to_bits())),
                        _ => None,
                    })
                    .collect();
                let text: Vec<u32> = prompt.iter().copied().chain(new.iter().map(|one| one.0)).collect();
                let context = ForwardContext::evaluation(numerics);
                let whole = into_vec(model.logits(&text, 1, text.len(), &context).unwrap().0);
                for (i, &(id, log_probability)) in new.iter().enumerate() {
                    let row = &whole[(prompt.len() - 1 + i) * VOCAB..][..VOCAB];
                    let best = mixtura_infer::top_log_probabilities(row, 1).unwrap()[0];
                    let found = (best.id, best.log_probability.to_bits());
                    assert_eq!(found, (id, log_probability), "{name} {more}, {precision} of {stored:?}, token {i}");
                }
                assert_eq!(new.len(), 20);
            }
        }
    }
}

/// Kept keys and values change nothing.
#[test]
fn a_turn_that_goes_on_from_kept_keys_has_the_bits_of_one_from_the_start() {
    let place = saved(&config("top_k", ""), StoredType::Bf16);
    let numerics = Numerics::default();
    let model = load_sealed(&place.path().join("m"), numerics).unwrap().decoder;
    let mut engine = Engine::new(&model, numerics).keeping(2);
    let tokens_of = |engine: &mut Engine, prompt: &[u32]| {
        let id = engine.add(Request { likeliest: 3, ..Request::greedy(prompt.to_vec(), 5, &[]) }).unwrap();
        let mut events = Vec::new();
        while !engine.is_idle() {
            events.extend(engine.step().unwrap().into_iter().map(|(of, event)| {
                assert_eq!(of, id);
                event
            }));
        }
        events
    };
    let mut text = ids(5, 1);
    for turn in 0..4 {
        let kept = tokens_of(&mut engine, &text);
        assert_eq!(kept, tokens_of(&mut Engine::new(&model, numerics), &text), "turn {turn}");
        text.extend(kept.iter().filter_map(|event| match event {
            Event::Token { token, .. } => Some(token.id),
            _ => None,
        }));
        // Another conversation in between, and one that parts from the first in its middle.
        tokens_of(&mut engine, &ids(3, 8));
        text.push(7);
        let mut other = text[..text.len() / 2].to_vec();
        other.push(1);
        assert_eq!(tokens_of(&mut engine, &other), tokens_of(&mut Engine::new(&model, numerics), &other));
    }
}

/// A model is held once, in the number type of its file.
#[test]
fn weights_are_held_once_in_the_type_of_the_file() {
    // Widths that fill their panels.
    let mut wide = ModelConfig { vocab: 640, d_model: 256, ..config("top_k", "") };
    wide.moe = Some(mixtura_nn::MoeConfig::new(8, 2, 96));
    let parameters = wide.parameter_counts().unwrap().total;
    for (stored, width) in [(StoredType::F32, 4), (StoredType::Bf16, 2)] {
        let place = saved(&wide, stored);
        let model = load_sealed(&place.path().join("m"), Numerics::default()).unwrap().decoder;
        let held = model.weight_bytes();
        assert!(held as f64 <= 1.1 * (width * parameters) as f64, "{held} bytes of {parameters} {stored:?}");
    }
}
