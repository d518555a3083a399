//! Many sequences through one model: prompts in chunks, then a token at a time, all in one forward pass.
//!
//! A pass takes the next token of every sequence that is under way, and with what is left of its rows (a chunk of) the prompts that
//! wait, in the order they came. Cut and mixed as may be, a sequence gets the bits that it gets alone ([`Decoder::decode_batch`]), and its
//! draws are a function of its seed and position, so nothing that is said here depends on who else is served.
//!
//! Legend: V vocabulary.

use std::collections::{BTreeMap, VecDeque};

use burn::tensor::Tensor;
use mixtura_nn::{Decoder, ForwardContext, ForwardError, KvCache, LayerRouting, NewTokens, Project};
use mixtura_ops::{Numerics, with_slice};

use crate::available::{Available, gib};
use crate::sampling::{Sampling, SamplingError, ScoredToken, top_log_probabilities};

/// Rows of a forward pass at most, unless more sequences than that are under way.
pub const CHUNK: usize = 512;

/// A text to be continued.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Its ids; at least one.
    pub prompt: Vec<u32>,
    /// Tokens to add at most.
    pub max_tokens: usize,
    /// The ids that end a text.
    pub ends: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// How many of the likeliest tokens to tell of at each position.
    pub likeliest: usize,
    /// Whether to tell how every token was routed.
    pub routing: bool,
}

impl Request {
    /// The likeliest continuation, up to `max_tokens` tokens.
    pub fn greedy(prompt: Vec<u32>, max_tokens: usize, ends: &[u32]) -> Self {
        let ends = ends.to_vec();
        Self { prompt, max_tokens, ends, sampling: Sampling::GREEDY, likeliest: 0, routing: false }
    }
}

/// Why a continuation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model gave this id, which ends a text.
    End(u32),
    /// [`Request::max_tokens`] were added.
    MaxTokens,
    /// The model's context is full.
    Context,
}

/// What a step gives for one sequence.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// How tokens that went through the model were routed, by token, in order; where the request asks for it.
    Routed(Vec<TokenRouting>),
    /// A token was added.
    Token {
        /// The token, with its probability under the model.
        token: ScoredToken,
        /// The likeliest tokens there, as many as were asked for.
        likeliest: Vec<ScoredToken>,
    },
    /// No token will follow. The sequence is gone from the engine.
    Finished(Finish),
}

/// How one token was routed.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenRouting {
    /// The token.
    pub id: u32,
    /// Its place in the sequence.
    pub position: usize,
    /// By MoE layer, in order.
    pub layers: Vec<TokenChoices>,
}

/// The experts of one token in one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenChoices {
    /// Index of the layer.
    pub layer: usize,
    /// In choice order; fewer than the router's choices where a capacity dropped some.
    pub experts: Vec<u32>,
    /// Their combine weights.
    pub weights: Vec<f32>,
}

/// The name of a sequence in its engine; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(u64);

/// A request that cannot be taken.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RequestError {
    /// There is nothing to continue.
    #[error("the prompt is empty: a model continues at least one token")]
    Empty,
    /// The prompt does not fit.
    #[error("the prompt has {tokens} tokens, the model's context holds {context}")]
    TooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// What the model can hold.
        context: usize,
    },
    /// An id that the model does not know.
    #[error("token id {id} at position {position} of the prompt is outside the vocabulary of {vocab}")]
    TokenId {
        /// The id.
        id: u32,
        /// Its place.
        position: usize,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// The options of sampling are not possible.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The keys and values of the sequence would not fit beside those of the others.
    #[error(
        "{} of keys and values ({tokens} tokens) for this sequence and {} promised to others do not fit: {bound} leaves {}; \
         fewer or shorter sequences at a time would",
        gib(*.needed), gib(*.promised), gib(*.left)
    )]
    Memory {
        /// Bytes for this sequence.
        needed: u64,
        /// Its tokens at most.
        tokens: usize,
        /// Bytes that sequences under way may still take.
        promised: u64,
        /// Bytes there are.
        left: u64,
        /// Who says so.
        bound: String,
    },
}

/// Work that gave nothing. The engine's sequences are lost.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StepError {
    /// A request was refused.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// The forward pass failed.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The logits are none that a token could be chosen by.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
}

/// A model and the sequences that it continues.
///
/// ```
/// use burn::tensor::Device;
/// use mixtura_infer::{Engine, Event, Request};
/// use mixtura_nn::{Decoder, ModelConfig, MoeConfig};
///
/// let config = ModelConfig { vocab: 32, moe: Some(MoeConfig::new(4, 2, 24)), ..ModelConfig::new(16, 2, 2, 8) };
/// let model = Decoder::new(&config, 7, &Device::default()).unwrap();
/// let mut engine = Engine::new(&model, Default::default());
/// let first = engine.add(Request::greedy(vec![1, 2, 3], 4, &[])).unwrap();
/// let second = engine.add(Request::greedy(vec![9], 2, &[])).unwrap();
/// let mut tokens = 0;
/// while !engine.is_idle() {
///     for (sequence, event) in engine.step().unwrap() {
///         assert!(sequence == first || sequence == second);
///         tokens += usize::from(matches!(event, Event::Token { .. }));
///     }
/// }
/// assert_eq!(tokens, 4 + 2);
/// ```
#[derive(Debug)]
pub struct Engine<'m> {
    model: &'m Decoder,
    context: ForwardContext,
    chunk: usize,
    next_id: u64,
    /// In the order they came.
    sequences: BTreeMap<SequenceId, Sequence>,
    /// Ids that went through the model, with their keys and values: sequences that ended, the last one last.
    pasts: VecDeque<(Vec<u32>, KvCache)>,
    /// How many of them are kept.
    keep: usize,
}

#[derive(Debug)]
struct Sequence {
    request: Request,
    cache: KvCache,
    /// Prompt and what was added.
    ids: Vec<u32>,
}

impl Sequence {
    /// How many ids have not been through the model.
    fn waiting(&self) -> usize {
        self.ids.len() - self.cache.len()
    }

    fn added(&self) -> usize {
        self.ids.len() - self.request.prompt.len()
    }
}

impl<'m> Engine<'m> {
    /// An engine without sequences. The model must be one without autodiff.
    pub fn new(model: &'m Decoder, numerics: Numerics) -> Self {
        let context = ForwardContext::evaluation(numerics);
        // Where tokens of one pass depend on each other, a prompt goes through in one piece, as it does in evaluation.
        let chunk = if model.rows_are_independent() { CHUNK } else { usize::MAX };
        Self { model, context, chunk, next_id: 0, sequences: BTreeMap::new(), pasts: VecDeque::new(), keep: 0 }
    }

    /// Takes `rows` rows to a pass at most instead of [`CHUNK`]. Changes no bit.
    ///
    /// # Panics
    /// If `rows` is 0.
    pub fn with_chunk(mut self, rows: usize) -> Self {
        assert!(rows > 0, "a pass has at least one row");
        self.chunk = if self.model.rows_are_independent() { rows } else { usize::MAX };
        self
    }

    /// Keeps the keys and values of the last `sequences` sequences that ended: a prompt that begins as one of them is computed from where
    /// they part, as the next turn of a conversation. Changes no bit.
    pub fn keeping(mut self, sequences: usize) -> Self {
        self.keep = if self.model.rows_are_independent() { sequences } else { 0 };
        self
    }

    /// Takes a request, if its prompt can be continued and its keys and values will fit into memory.
    pub fn add(&mut self, request: Request) -> Result<SequenceId, RequestError> {
        request.sampling.validate()?;
        let (context, vocab) = (self.model.config().context, self.model.config().vocab);
        let tokens = request.prompt.len();
        if tokens == 0 {
            return Err(RequestError::Empty);
        }
        if tokens > context {
            return Err(RequestError::TooLong { tokens, context });
        }
        if let Some(position) = request.prompt.iter().position(|&id| id as usize >= vocab) {
            return Err(RequestError::TokenId { id: request.prompt[position], position, vocab });
        }
        let cache = self.cache_for(&request);
        self.check_memory(&cache)?;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let ids = request.prompt.clone();
        self.sequences.insert(id, Sequence { request, cache, ids });
        Ok(id)
    }

    /// Room for a request, with what is kept of a sequence that began as its prompt does.
    fn cache_for(&mut self, request: &Request) -> KvCache {
        let room = request.prompt.len().saturating_add(request.max_tokens);
        // The last id of a prompt always goes through the model: its logits are wanted.
        let most = request.prompt.len() - 1;
        let common = |ids: &[u32]| ids.iter().zip(&request.prompt[..most]).take_while(|(a, b)| a == b).count();
        let best = (0..self.pasts.len()).max_by_key(|&at| common(&self.pasts[at].0));
        match best.map(|at| (at, common(&self.pasts[at].0))) {
            Some((at, shared)) if shared > 0 && !request.routing => {
                let (_, mut cache) = self.pasts.remove(at).expect("it was just found");
                cache.truncate(shared);
                self.model.resize_cache(&mut cache, room);
                cache
            }
            _ => self.model.cache(room),
        }
    }

    fn check_memory(&self, new: &KvCache) -> Result<(), RequestError> {
        let needed = new.bytes_when_full();
        let left_of = |s: &Sequence| s.cache.bytes_when_full().saturating_sub(s.cache.bytes());
        let promised: u64 = self.sequences.values().map(left_of).sum();
        // What is small beside any machine is not worth reading files for.
        const SMALL: u64 = 64 << 20;
        if needed + promised <= SMALL {
            return Ok(());
        }
        match Available::now() {
            Some(Available { bytes: left, bound }) if needed + promised > left => {
                Err(RequestError::Memory { needed, tokens: new.capacity(), promised, left, bound })
            }
            _ => Ok(()),
        }
    }

    /// Ends a sequence; whether there was one.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        let Some(Sequence { cache, mut ids, .. }) = self.sequences.remove(&id) else { return false };
        ids.truncate(cache.len());
        self.pasts.push_back((ids, cache));
        while self.pasts.len() > self.keep {
            self.pasts.pop_front();
        }
        true
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Sequences under way.
    pub fn len(&self) -> usize {
        self.sequences.len()
    }

    /// The same as [`is_idle`](Self::is_idle).
    pub fn is_empty(&self) -> bool {
        self.is_idle()
    }

    /// One forward pass, and what it gave, sequence by sequence in the order they came.
    ///
    /// # Errors
    /// Those of a forward pass, and logits without a finite one. All sequences are dropped then.
    pub fn step(&mut self) -> Result<Vec<(SequenceId, Event)>, StepError> {
        let result = self.pass();
        if result.is_err() {
            // Some layers have the tokens of the pass that failed, others have not.
            self.sequences.clear();
        }
        result
    }

    fn pass(&mut self) -> Result<Vec<(SequenceId, Event)>, StepError> {
        let mut events = self.finish_at_once();
        let shares = self.shares();
        if shares.is_empty() {
            return Ok(events);
        }
        let mut batch = Vec::with_capacity(shares.len());
        let taking = self.sequences.iter_mut().filter_map(|(id, sequence)| Some((sequence, *shares.get(id)?)));
        for (sequence, rows) in taking {
            let (done, waiting) = (sequence.cache.len(), sequence.waiting());
            let project = if rows == waiting { Project::Last } else { Project::None };
            batch.push(NewTokens { ids: &sequence.ids[done..done + rows], cache: &mut sequence.cache, project });
        }
        let out = self.model.decode_batch(&mut batch, &self.context)?;
        drop(batch);
        let (mut row, mut logits_row) = (0, 0);
        for (&id, &rows) in &shares {
            let sequence = self.sequences.get_mut(&id).expect("it took part");
            if sequence.request.routing {
                let routed = token_routing(&out.routing, row..row + rows, sequence);
                events.push((id, Event::Routed(routed)));
            }
            row += rows;
            if sequence.waiting() == 0 {
                let logits = out.logits.clone().narrow(0, logits_row, 1);
                logits_row += 1;
                choose(sequence, &logits, id, &mut events)?;
            }
        }
        self.drop_finished(&events);
        Ok(events)
    }

    /// Sequences that may not get another token before they get one: nothing was asked for, or there is no room.
    fn finish_at_once(&mut self) -> Vec<(SequenceId, Event)> {
        let mut events = Vec::new();
        for (&id, sequence) in &self.sequences {
            if sequence.request.max_tokens == 0 {
                events.push((id, Event::Finished(Finish::MaxTokens)));
            }
        }
        self.drop_finished(&events);
        events
    }

    fn drop_finished(&mut self, events: &[(SequenceId, Event)]) {
        for (id, event) in events {
            if let Event::Finished(_) = event {
                self.remove(*id);
            }
        }
    }

    /// How many rows of the next pass each sequence gets: one where one waits, then prompts in the order they came.
    fn shares(&self) -> BTreeMap<SequenceId, usize> {
        let waiting = |one: bool| {
            self.sequences.iter().filter(move |(_, s)| (s.waiting() == 1) == one).map(|(&id, s)| (id, s.waiting()))
        };
        let mut shares: BTreeMap<_, _> = waiting(true).collect();
        // Prompts go on even if as many sequences as a pass has rows are under way.
        let mut left = self.chunk.saturating_sub(shares.len()).max(1);
        for (id, tokens) in waiting(false) {
            let rows = tokens.min(left);
            if rows > 0 {
                shares.insert(id, rows);
            }
            left -= rows;
        }
        shares
    }
}

/// Chooses the next token of a sequence whose ids have all been through the model, and ends it where it ends.
fn choose(
    sequence: &mut Sequence,
    logits: &Tensor<2>,
    id: SequenceId,
    events: &mut Vec<(SequenceId, Event)>,
) -> Result<(), SamplingError> {
    let Sequence { request, ids, .. } = &*sequence;
    let position = sequence.added() as u64;
    let (token, likeliest) = with_slice(logits, |logits_v| {
        let token = request.sampling.next(logits_v, ids, position)?;
        let likeliest =
            if request.likeliest > 0 { top_log_probabilities(logits_v, request.likeliest)? } else { Vec::new() };
        Ok::<_, SamplingError>((token, likeliest))
    })?;
    if request.ends.contains(&token.id) {
        events.push((id, Event::Finished(Finish::End(token.id))));
        return Ok(());
    }
    events.push((id, Event::Token { token, likeliest }));
    sequence.ids.push(token.id);
    if sequence.added() == sequence.request.max_tokens {
        events.push((id, Event::Finished(Finish::MaxTokens)));
    } else if sequence.cache.len() == sequence.cache.capacity() {
        events.push((id, Event::Finished(Finish::Context)));
    }
    Ok(())
}

/// The routing of the rows of one sequence, which have just been through the model.
fn token_routing(
    routed: &[mixtura_nn::RoutedRows],
    rows: std::ops::Range<usize>,
    sequence: &Sequence,
) -> Vec<TokenRouting> {
    let first = sequence.cache.len() - rows.len();
    let part = routed.iter().find(|part| part.rows.start <= rows.start && rows.end <= part.rows.end);
    let part = part.expect("every row was routed");
    let choices = |layer: &LayerRouting, row: usize| {
        let (experts, weights) = layer.choices(row - part.rows.start);
        TokenChoices { layer: layer.layer, experts: experts.to_vec(), weights: weights.to_vec() }
    };
    rows.clone()
        .map(|row| {
            let position = first + row - rows.start;
            let layers = part.layers.iter().map(|layer| choices(layer, row)).collect();
            TokenRouting { id: sequence.ids[position], position, layers }
        })
        .collect()
}
