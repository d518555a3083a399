//! What decoding keeps of one sequence, so that a new token costs the work of one token.

use mixtura_routing::soft::config::SoftConfig;

use crate::soft::{SoftLayer, SoftPast};

/// Keys and values of one sequence, layer by layer, and what soft layers remember of it.
#[derive(Debug, Clone)]
pub struct KvCache {
    pub(crate) layers: Vec<mixtura_ops::KvCache>,
    pub(crate) soft: Vec<SoftPast>,
    /// The soft layers' kind and the model's width; `None` without any.
    pub(crate) soft_kind: Option<(SoftConfig, usize)>,
    pub(crate) tokens: usize,
    pub(crate) capacity: usize,
    /// What a page of every layer takes together.
    pub(crate) page_bytes: u64,
}

impl KvCache {
    /// Tokens held.
    pub fn len(&self) -> usize {
        self.tokens
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.tokens == 0
    }

    /// Most tokens it can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Memory that its keys and values take.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.bytes() as u64).sum()
    }

    /// Memory that its keys and values will take when it is full.
    pub fn bytes_when_full(&self) -> u64 {
        self.capacity.div_ceil(mixtura_ops::KEY_BLOCK) as u64 * self.page_bytes
    }

    /// Forgets everything after the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        self.tokens = self.tokens.min(tokens);
        self.layers.iter_mut().for_each(|layer| layer.truncate(tokens));
        if let Some((config, d)) = self.soft_kind {
            self.soft.iter_mut().for_each(|past| SoftLayer::truncate(&config, past, tokens, d));
        }
    }
}
