//! Fault injection.
fn main() {}
