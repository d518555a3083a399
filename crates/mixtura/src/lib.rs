//! Mixtura, the Mixture-of-Experts toolkit for Rust: the library facade.
