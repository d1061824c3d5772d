//! Callers of real processes, and what they are held against.

pub mod observe;
pub mod set;
mod writers;

pub use writers::Writers;
