//! Keys and values of earlier tokens, in pages: a cache grows without moving what it holds, and gives back what it no longer needs.
//!
//! A page is the packed panels of [`KEY_BLOCK`] tokens, keys of all kv heads first, then values: one block of the online softmax, so that
//! the inner loops never look for the next page.

use super::attend::KeyBlock;
use super::pack::{PANEL, Sizes};
use super::{AttentionSpec, KEY_BLOCK};
use crate::aligned::AlignedVec;

/// Panels of a page.
const PANELS: usize = KEY_BLOCK / PANEL;

/// Keys and values of one sequence, one layer.
#[derive(Clone, Debug)]
pub struct KvCache {
    kv_heads: usize,
    head_dim: usize,
    len: usize,
    pages: Vec<AlignedVec<f32>>,
}

impl KvCache {
    /// An empty cache for the heads of `spec`.
    pub fn new(spec: &AttentionSpec) -> KvCache {
        KvCache { kv_heads: spec.kv_heads, head_dim: spec.head_dim, len: 0, pages: Vec::new() }
    }

    /// What a page takes, the memory of 128 tokens of one layer: a cache of n tokens holds `n.div_ceil(128)` of them.
    pub fn page_bytes(spec: &AttentionSpec) -> usize {
        KvCache::new(spec).page_len() * size_of::<f32>()
    }

    /// Tokens held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Forgets every token, and frees the memory.
    pub fn clear(&mut self) {
        self.truncate(0);
    }

    /// Forgets the tokens from `len` on, and frees the pages that held no others.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        self.pages.truncate(self.len.div_ceil(KEY_BLOCK));
    }

    /// Bytes of the pages held.
    pub fn bytes(&self) -> usize {
        self.pages.iter().map(AlignedVec::bytes).sum()
    }

    /// Panics with the shapes if this is not a cache of a layer like `spec`.
    pub(super) fn check(&self, name: &str, spec: &AttentionSpec) {
        assert!(
            self.kv_heads == spec.kv_heads && self.head_dim == spec.head_dim,
            "{name}: a cache of {} heads of {}, the layer has {} of {}",
            self.kv_heads,
            self.head_dim,
            spec.kv_heads,
            spec.head_dim
        );
    }

    /// Counts `new` tokens more; returns the pages they lie in, to be filled in.
    pub(super) fn grow(&mut self, new: usize) -> &mut [AlignedVec<f32>] {
        let first = self.len / KEY_BLOCK;
        self.len += new;
        let page_len = self.page_len();
        self.pages.resize_with(self.len.div_ceil(KEY_BLOCK), || AlignedVec::zeroed(page_len));
        &mut self.pages[first..]
    }

    /// The keys and values of every page.
    pub(super) fn blocks(&self) -> Vec<KeyBlock<'_>> {
        let keys = self.keys_len();
        let halves = self.pages.iter().map(|page| page.split_at(keys));
        halves.map(|(k_across, v_rows)| KeyBlock { k_across, v_rows }).collect()
    }

    /// Values in the keys of a page.
    fn keys_len(&self) -> usize {
        PANELS * self.kv_heads * Sizes::new(self.head_dim).across
    }

    fn page_len(&self) -> usize {
        self.keys_len() + PANELS * self.kv_heads * Sizes::new(self.head_dim).rows
    }
}
