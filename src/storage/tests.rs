//! In which order files become durable.

#[cfg(all(target_os = "linux", feature = "sled"))]
mod script;
#[cfg(all(target_os = "linux", feature = "sled"))]
mod syncs;
