//! What it takes to test a replicated state machine.
//!
//! - [`simulation`]: whole clusters in one process, on virtual time, from one seed, for any machine. Faults are drawn from the
//!   seed, and so is the order of everything that happens: a seed that fails fails again.
//! - [`kv`] and [`bank`]: workloads with what must be true of them, for the machine that `quorate serve` serves and for one
//!   that is not it. A program with another machine writes a workload of its own: a [`simulation::Subject`].
//! - [`Sum`]: the smallest machine that tells whether everything was applied once. It can be made to err.
//! - [`processes`]: clusters of real processes, callers and checkers.
//! - [`disk`]: directories whose disk fails, forgets or is small.
//!
//! It panics where something is wrong: it is called by tests.

#![allow(clippy::disallowed_methods, clippy::unwrap_used)] // the simulated world itself runs on plain tokio

pub mod bank;
pub mod kv;
pub mod processes;
pub mod simulation;
mod sum;

pub use quorate_disk as disk;
pub use sum::Sum;
