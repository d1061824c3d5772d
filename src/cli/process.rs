//! Starting the asynchronous runtime, on a system that may have too little to give.
//!
//! The runtime panics when it gets no thread. So threads are asked for here first, as many as a node needs at its start:
//! where there is too little memory for them, or too few are allowed, the process says so and ends.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Barrier};
use std::thread;

use rustix::process::{Resource, getrlimit};
use tokio::runtime::{Builder, Runtime};
use tokio::signal::unix::{SignalKind, signal};

use crate::engine::MIN_ADDRESS_SPACE_BYTES;

/// Threads of a node beside the runtime's own workers: the log, sled, and work that blocks.
const NODE_THREADS: usize = 8;
/// What threads, and what is mapped once the node is open, take beside what is mapped at the start of the process.
const THREADS_BYTES: u64 = 96 * 1024 * 1024;

/// Why the process cannot begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The process may use too little address space.
    #[error(
        "this process may use {allowed} bytes of {what}, and a node needs at least {needed}, and room for its state beside that: allow more, or unlimited. Memory is better limited by a control group (systemd's MemoryMax, a container's limit), which counts what is used and not what is reserved"
    )]
    AddressSpace {
        /// What is limited, and by what.
        what: &'static str,
        /// How much it may use.
        allowed: u64,
        /// How much it needs.
        needed: u64,
    },
    /// The system has no threads to give.
    #[error(
        "cannot start {threads} threads: {source}. Allow this process more memory (ulimit -v, the container's limit) or more threads (ulimit -u)"
    )]
    Threads {
        /// How many are needed.
        threads: usize,
        /// What the system said.
        source: io::Error,
    },
    /// The runtime cannot be built.
    #[error(
        "cannot start the asynchronous runtime: {source}. Allow this process more open files (ulimit -n) or more memory (ulimit -v)"
    )]
    Runtime {
        /// What the system said.
        source: io::Error,
    },
}

impl StartError {
    /// Whether a limit that somebody set is to blame: the exit code tells.
    pub fn is_invalid_input(&self) -> bool {
        matches!(self, Self::AddressSpace { .. })
    }
}

/// Starts the runtime that everything runs in, in a process that is a node or one that asks some.
///
/// # Errors
/// See [`StartError`].
pub(super) fn start(node: bool) -> Result<Runtime, StartError> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    if node {
        let mapped = mapped_bytes();
        check_address_space("address space (ulimit -v)", getrlimit(Resource::As).current, mapped)?;
        check_address_space("data (ulimit -d)", getrlimit(Resource::Data).current, mapped)?;
        check_threads(workers + NODE_THREADS)?;
    } else {
        check_threads(workers)?;
    }
    let build = || Builder::new_multi_thread().worker_threads(workers).enable_all().build();
    // Somebody may have been faster, or the limit is that near. The report of the panic would tell nobody more.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let built = catch_unwind(AssertUnwindSafe(build));
    std::panic::set_hook(hook);
    let built = built.unwrap_or_else(|_| Err(io::ErrorKind::OutOfMemory.into()));
    let runtime = built.map_err(|source| StartError::Runtime { source })?;
    if node {
        survive_file_limit(&runtime).map_err(|source| StartError::Runtime { source })?;
    }
    Ok(runtime)
}

/// A write beyond a limit on the size of files (`ulimit -f`) fails from now on, as one to a full disk does. Without this the
/// signal ends the process, before it can say a word.
fn survive_file_limit(runtime: &Runtime) -> io::Result<()> {
    let _inside = runtime.enter();
    // What handles it stays when this is dropped.
    signal(SignalKind::from_raw(libc::SIGXFSZ)).map(drop)
}

fn check_address_space(what: &'static str, allowed: Option<u64>, mapped: u64) -> Result<(), StartError> {
    // Just above a limit of 1 GiB the allocator has reserved nearly all of it, and threads would get nothing.
    let needed = MIN_ADDRESS_SPACE_BYTES.max(mapped + THREADS_BYTES);
    match allowed {
        Some(allowed) if allowed < needed => Err(StartError::AddressSpace { what, allowed, needed }),
        _ => Ok(()),
    }
}

/// Address space that this process has taken so far; 0 where the system does not tell.
fn mapped_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    kib.map_or(0, |kib: u64| kib.saturating_mul(1024))
}

/// Has so many threads at the same time, for a moment.
fn check_threads(threads: usize) -> Result<(), StartError> {
    let barrier = Arc::new(Barrier::new(threads + 1));
    let mut started = Vec::with_capacity(threads);
    for _ in 0..threads {
        let barrier = barrier.clone();
        let waits = move || {
            barrier.wait();
        };
        match thread::Builder::new().spawn(waits) {
            Ok(thread) => started.push(thread),
            // Those that wait go with the process, which ends now.
            Err(source) => return Err(StartError::Threads { threads, source }),
        }
    }
    barrier.wait();
    for thread in started {
        // It has done nothing but wait.
        let _ = thread.join();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_with_threads_gives_a_runtime() {
        let runtime = start(false).unwrap();
        let check = |allowed, mapped| check_address_space("address space (ulimit -v)", allowed, mapped);
        let needed = MIN_ADDRESS_SPACE_BYTES;
        assert!(check(None, 0).is_ok() && check(Some(needed), 0).is_ok());
        let refused = check(Some(needed - 1), 0).unwrap_err();
        assert!(refused.is_invalid_input());
        let refused = refused.to_string();
        assert!(refused.contains(&(needed - 1).to_string()), "{refused}");
        assert!(refused.contains(&needed.to_string()) && refused.contains("ulimit -v"), "{refused}");
        assert!(refused.contains("control group"), "{refused}");
        let reserved = 1 << 30;
        assert!(check(Some(reserved + THREADS_BYTES - 1), reserved).is_err(), "nothing is left for threads");
        assert!(check(Some(reserved + THREADS_BYTES), reserved).is_ok());
        assert!(mapped_bytes() > 1 << 20);
        assert_eq!(runtime.block_on(async { 7 }), 7);
        let refused =
            StartError::Threads { threads: 9, source: io::ErrorKind::WouldBlock.into() }.to_string();
        assert!(refused.contains("9 threads") && refused.contains("ulimit -v"), "{refused}");
    }
}
