//! Workloads for the machine that `quorate serve` serves.

mod clients;
mod lifetimes;
mod registers;

pub use clients::Clients;
pub use lifetimes::{get, put};
pub use registers::{Callers, Registers, Way};
