//! Workloads for the machine that `quorate serve` serves.

mod clients;
mod followers;
mod lifetimes;
mod mirror;
mod registers;
mod writes;

pub(crate) use clients::is_for_the_weather;
pub use clients::{Calling, Clients};
pub use lifetimes::{get, put};
pub use registers::{Callers, Registers, Way};
