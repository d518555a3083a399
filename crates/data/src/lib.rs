//! Tokenizers, corpora, the propositions world, and resumable batches.
