//! Decoding: new tokens of one sequence or of many go through the model, each behind what the cache of its sequence holds.
//!
//! However a sequence is cut into calls and whatever else is in a call, its rows get the bits of a forward pass over the whole sequence: no
//! row of any operation depends on the rows computed with it. Where one does (soft layers, which carry a past of their own; routers whose
//! tokens compete in evaluation too), the sequences of a call go through the model one after the other.
//!
//! Legend: T new tokens of all sequences, sequence after sequence, V vocabulary.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;
use mixtura_ops::{embedding_of, team, tensor_like};

use crate::block::{Block, Feedforward};
use crate::context::ForwardContext;
use crate::decoder::{Decoder, DecoderOutput};
use crate::error::ForwardError;
use crate::kv_cache::KvCache;
use crate::layer_routing::LayerRouting;
use crate::soft::SoftPast;

/// Up to here a pass is some hundred parallel parts of microseconds, for which threads are kept awake.
const FEW_ROWS: usize = 16;

/// New tokens of one sequence.
#[derive(Debug)]
pub struct NewTokens<'a> {
    /// The ids, in order.
    pub ids: &'a [u32],
    /// What came before; the new tokens are added to it.
    pub cache: &'a mut KvCache,
    /// Which of them need logits.
    pub project: Project,
}

/// Which new tokens of a sequence go through the output projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Project {
    /// None: more of the prompt is to come.
    None,
    /// The last one.
    Last,
    /// All of them.
    All,
}

/// What decoding new tokens of one sequence gives.
#[derive(Debug, Clone)]
pub struct DecodeOutput {
    /// Logits, `[T, V]` of all new tokens or `[1, V]` of the last.
    pub logits: Tensor<2>,
    /// By MoE layer, in order.
    pub routing: Vec<LayerRouting>,
}

/// What decoding new tokens of many sequences gives.
#[derive(Debug, Clone)]
pub struct BatchOutput {
    /// Logits of the tokens that need them, sequence after sequence.
    pub logits: Tensor<2>,
    /// How the new tokens were routed, all together or sequence by sequence.
    pub routing: Vec<RoutedRows>,
}

/// How some of the new tokens were routed.
#[derive(Debug, Clone)]
pub struct RoutedRows {
    /// Their places among the T new tokens.
    pub rows: Range<usize>,
    /// By MoE layer, in order.
    pub layers: Vec<LayerRouting>,
}

impl Decoder {
    /// An empty cache for up to `capacity` tokens (at most the context).
    pub fn cache(&self, capacity: usize) -> KvCache {
        let capacity = capacity.min(self.config().context);
        let layers = self.layers.iter().map(|block| mixtura_ops::KvCache::new(&block.attention.spec(1, 1)));
        let page_bytes = |block: &Block| mixtura_ops::KvCache::page_bytes(&block.attention.spec(1, 1)) as u64;
        let page_bytes = self.layers.iter().map(page_bytes).sum();
        let soft_kind = self.config().moe.as_ref().and_then(|moe| moe.soft).map(|soft| (soft, self.config().d_model));
        let soft = vec![SoftPast::default(); self.layers.len()];
        KvCache { layers: layers.collect(), soft, soft_kind, tokens: 0, capacity, page_bytes }
    }

    /// Gives a cache of this model room for `capacity` tokens (at most the context, at least what it holds).
    pub fn resize_cache(&self, cache: &mut KvCache, capacity: usize) {
        cache.capacity = capacity.min(self.config().context).max(cache.tokens);
    }

    /// Appends `ids` to the sequence in `cache` and gives the logits of all of them. Needs a model without autodiff.
    ///
    /// # Errors
    /// If an id is not in the vocabulary, the cache has no room or is another model's, a layer looks at later tokens, or a router refuses.
    pub fn decode(
        &self,
        ids: &[u32],
        cache: &mut KvCache,
        context: &ForwardContext,
    ) -> Result<DecodeOutput, ForwardError> {
        self.decode_one(NewTokens { ids, cache, project: Project::All }, context)
    }

    /// As [`decode`](Self::decode), projecting the last token only.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_last(
        &self,
        ids: &[u32],
        cache: &mut KvCache,
        context: &ForwardContext,
    ) -> Result<DecodeOutput, ForwardError> {
        self.decode_one(NewTokens { ids, cache, project: Project::Last }, context)
    }

    fn decode_one(&self, new: NewTokens, context: &ForwardContext) -> Result<DecodeOutput, ForwardError> {
        let BatchOutput { logits, mut routing } = self.decode_batch(&mut [new], context)?;
        Ok(DecodeOutput { logits, routing: routing.pop().map_or_else(Vec::new, |all| all.layers) })
    }

    /// Appends new tokens to many sequences at once. On an error the caches are to be thrown away: layers before the one that failed
    /// have taken the tokens in.
    ///
    /// # Errors
    /// As [`decode`](Self::decode).
    pub fn decode_batch(&self, batch: &mut [NewTokens], context: &ForwardContext) -> Result<BatchOutput, ForwardError> {
        batch.iter().try_for_each(|new| self.check_new(new))?;
        let rows: usize = batch.iter().map(|new| new.ids.len()).sum();
        if rows <= FEW_ROWS {
            team(|| self.decode_checked(batch, context))
        } else {
            self.decode_checked(batch, context)
        }
    }

    fn decode_checked(&self, batch: &mut [NewTokens], context: &ForwardContext) -> Result<BatchOutput, ForwardError> {
        if batch.len() == 1 || self.rows_are_independent() {
            return self.decode_together(batch, context);
        }
        let (mut logits, mut routing, mut first) = (Vec::new(), Vec::new(), 0);
        for new in batch {
            let tokens = new.ids.len();
            let alone = self.decode_together(std::slice::from_mut(new), context)?;
            if alone.logits.dims()[0] > 0 {
                logits.push(alone.logits);
            }
            routing.extend(alone.routing.into_iter().map(|own| RoutedRows { rows: first..first + tokens, ..own }));
            first += tokens;
        }
        let logits = match logits.is_empty() {
            true => tensor_like(Vec::new(), [0, self.config().vocab], &self.norm.weight.val()),
            false => Tensor::cat(logits, 0),
        };
        Ok(BatchOutput { logits, routing })
    }

    /// Whether a token of one sequence gets the same bits whatever other sequences are computed with it.
    pub fn rows_are_independent(&self) -> bool {
        self.layers.iter().all(|block| match &block.ffn {
            Feedforward::Mlp(_) => true,
            Feedforward::Moe(moe) => moe.router.is_per_token(),
            Feedforward::Soft(_) => false,
        })
    }

    fn check_new(&self, new: &NewTokens) -> Result<(), ForwardError> {
        let NewTokens { ids, cache, .. } = new;
        self.check(ids, 1, ids.len())?;
        if cache.layers.len() != self.layers.len() {
            let layers = |n| format!("{n} layers");
            return Err(ForwardError::Cache { found: layers(cache.layers.len()), expected: layers(self.layers.len()) });
        }
        let leaking = |(layer, block): (usize, &Block)| match &block.ffn {
            Feedforward::Soft(soft) => soft.config().leak().map(|_| (layer, soft.config().kind())),
            Feedforward::Mlp(_) | Feedforward::Moe(_) => None,
        };
        if let Some((layer, kind)) = self.layers.iter().enumerate().find_map(leaking) {
            return Err(ForwardError::Future { layer, kind });
        }
        let found = cache.tokens + ids.len();
        if found > cache.capacity {
            return Err(ForwardError::TooLong { found, context: cache.capacity });
        }
        Ok(())
    }

    /// All sequences as the rows of one pass: one sequence, or layers without a past.
    fn decode_together(&self, batch: &mut [NewTokens], context: &ForwardContext) -> Result<BatchOutput, ForwardError> {
        let DecoderOutput { hidden_td, routing } = self.decode_hidden(batch, context)?;
        let (mut wanted, mut first) = (Vec::new(), 0);
        for new in &mut *batch {
            let rows = first..first + new.ids.len();
            first = rows.end;
            match new.project {
                Project::None => {}
                Project::Last => wanted.push(rows.end.saturating_sub(1).max(rows.start)..rows.end),
                Project::All => wanted.push(rows),
            }
        }
        let logits = if wanted.is_empty() {
            tensor_like(Vec::new(), [0, self.config().vocab], &hidden_td)
        } else {
            self.project(chosen(hidden_td, &wanted), context.numerics)
        };
        Ok(BatchOutput { logits, routing: vec![RoutedRows { rows: 0..first, layers: routing }] })
    }

    fn decode_hidden(&self, batch: &mut [NewTokens], context: &ForwardContext) -> Result<DecoderOutput, ForwardError> {
        let ids: Arc<[u32]> = batch.iter().flat_map(|new| new.ids).copied().collect();
        let new: Vec<usize> = batch.iter().map(|new| new.ids.len()).collect();
        let context = ForwardContext { ids: Some(ids.clone()), kept: None, ..context.clone() };
        let mut x_td = embedding_of(self.embed.weight.val(), ids, &self.embed.cell);
        let mut routing = Vec::new();
        for (layer, block) in self.layers.iter().enumerate() {
            let normed_td = block.attention_norm.forward(x_td.clone(), context.numerics);
            let mut caches: Vec<_> = batch.iter_mut().map(|new| &mut new.cache.layers[layer]).collect();
            x_td = x_td + block.attention.decode(normed_td, &new, &mut caches, context.numerics);
            let past = match &mut *batch {
                [alone] => Some(&mut alone.cache.soft[layer]),
                _ => None,
            };
            x_td = block.feed(x_td, layer, &context, past, &mut routing)?;
        }
        batch.iter_mut().for_each(|new| new.cache.tokens += new.ids.len());
        Ok(DecoderOutput { hidden_td: self.norm.forward(x_td, context.numerics), routing })
    }
}

/// Some rows of a tensor, in order.
fn chosen(x_td: Tensor<2>, wanted: &[Range<usize>]) -> Tensor<2> {
    let [tokens, d] = x_td.dims();
    match wanted {
        [all] if *all == (0..tokens) => x_td,
        ranges => Tensor::cat(ranges.iter().map(|r| x_td.clone().slice([r.clone(), 0..d])).collect(), 0),
    }
}
