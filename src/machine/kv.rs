//! The key-value machine.
