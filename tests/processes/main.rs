//! Real `quorate serve` processes, real sockets, real disks: what the simulation cannot show.
//!
//! Every test has its own directory and ports, waits for conditions under a deadline, and leaves no process
//! behind, however it ends: dropping the cluster kills and reaps, and the kernel does so if this process
//! itself is killed.

#![allow(clippy::unwrap_used)] // a test file: clippy exempts only the functions marked as tests

mod anew;
mod catch_up;
mod client;
mod clocks;
mod cluster_command;
mod corruption;
mod crash;
mod disk;
mod errors;
mod followed;
mod half_made;
mod isolation;
mod membership;
mod memory;
mod own_store;
mod past_due;
mod power;
mod power_followed;
mod refusals;
mod replicas;
mod restart;
mod sessions;
mod silent;
mod start;
mod strangers;
mod support;
mod transfer;
mod trust;
mod visibility;
