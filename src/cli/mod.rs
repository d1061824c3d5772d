//! The commands of the `quorate` program, one file each.

pub mod cluster;
