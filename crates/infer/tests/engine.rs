//! What an engine refuses before it takes anything, and what ends a sequence.

use burn::tensor::Device;
use mixtura_infer::{Engine, Event, Finish, Request, RequestError, Sampling};
use mixtura_nn::{Decoder, ModelConfig, MoeConfig};

fn model(context: usize) -> Decoder {
    let config = ModelConfig { vocab: 32, moe: Some(MoeConfig::new(4, 2, 24)), ..ModelConfig::new(16, 2, 2, context) };
    Decoder::new(&config, 7, &Device::default()).unwrap()
}

/// How a request ends, and the tokens it got.
fn ended(engine: &mut Engine, request: Request) -> (Finish, Vec<u32>) {
    engine.add(request).unwrap();
    let mut ids = Vec::new();
    while !engine.is_idle() {
        for (_, event) in engine.step().unwrap() {
            match event {
                Event::Token { token, .. } => ids.push(token.id),
                Event::Finished(finish) => return (finish, ids),
                Event::Routed(_) => panic!("nobody asked for routing"),
            }
        }
    }
    panic!("the engine is idle before the sequence ended")
}

#[test]
fn prompts_of_every_length_are_continued_or_refused() {
    let model = model(8);
    let mut engine = Engine::new(&model, Default::default());
    assert_eq!(engine.add(Request::greedy(vec![], 3, &[])), Err(RequestError::Empty));
    for length in 1..=8 {
        // The last token of the context still gives one more.
        let (finish, ids) = ended(&mut engine, Request::greedy(vec![5; length], 100, &[]));
        assert_eq!((finish, ids.len()), (Finish::Context, 9 - length), "{length}");
    }
    let refused = engine.add(Request::greedy(vec![5; 9], 1, &[]));
    assert_eq!(refused, Err(RequestError::TooLong { tokens: 9, context: 8 }));
    let refused = engine.add(Request::greedy(vec![5, 32], 1, &[]));
    assert_eq!(refused, Err(RequestError::TokenId { id: 32, position: 1, vocab: 32 }));
    let sampling = Sampling { repetition_penalty: -1.0, ..Sampling::GREEDY };
    let refused = engine.add(Request { sampling, ..Request::greedy(vec![5], 1, &[]) });
    assert!(matches!(refused, Err(RequestError::Sampling(_))), "{refused:?}");
    assert!(engine.is_idle());
}

#[test]
fn a_sequence_ends_where_it_was_told_to() {
    let model = model(16);
    let mut engine = Engine::new(&model, Default::default());
    assert_eq!(ended(&mut engine, Request::greedy(vec![3], 0, &[])), (Finish::MaxTokens, vec![]));
    let (finish, ids) = ended(&mut engine, Request::greedy(vec![3], 6, &[]));
    assert_eq!((finish, ids.len()), (Finish::MaxTokens, 6));
    // The first token that was not there before is taken for the end.
    let at = (1..6).find(|&at| !ids[..at].contains(&ids[at])).unwrap_or(0);
    let (finish, before) = ended(&mut engine, Request::greedy(vec![3], 6, &[ids[at]]));
    assert_eq!((finish, &before[..]), (Finish::End(ids[at]), &ids[..at]));
}

#[test]
fn keys_and_values_that_do_not_fit_are_refused_with_the_sum() {
    // 16 KiB a token, a quarter of a terabyte in all.
    let context = 1 << 24;
    let config = ModelConfig { vocab: 32, d_dense: Some(8), ..ModelConfig::new(256, 8, 2, context) };
    let model = Decoder::new(&config, 7, &Device::default()).unwrap();
    let mut engine = Engine::new(&model, Default::default());
    let refused = engine.add(Request::greedy(vec![5], usize::MAX, &[])).unwrap_err();
    assert!(matches!(refused, RequestError::Memory { promised: 0, .. }), "{refused:?}");
    let words = refused.to_string();
    assert!(words.starts_with("256.0 GiB of keys and values (16777216 tokens)"), "{words}");
    // What there is room for is taken as ever.
    assert_eq!(ended(&mut engine, Request::greedy(vec![5], 2, &[])).0, Finish::MaxTokens);
}
