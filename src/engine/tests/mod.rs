//! Tests of the handle as a whole, and the node in memory that the engine's tests start.

pub(super) mod lone;
mod unruly;
