//! The `mixtura` command.
fn main() {}
