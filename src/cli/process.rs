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

/// Threads of a node beside the runtime's own workers: the log, sled, and work that blocks.
const NODE_THREADS: usize = 8;
/// Address space that a node needs to start, in bytes.
const NODE_ADDRESS_BYTES: u64 = 256 * 1024 * 1024;

/// Why the process cannot begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The process may use too little address space.
    #[error(
        "this process may use {allowed} bytes of address space (ulimit -v), and a node needs at least {NODE_ADDRESS_BYTES}, and room for its state beside that: allow more"
    )]
    AddressSpace {
        /// How much it may use.
        allowed: u64,
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

/// Starts the runtime that everything runs in, in a process that is a node or one that asks some.
///
/// # Errors
/// See [`StartError`].
pub fn start(node: bool) -> Result<Runtime, StartError> {
    let workers = thread::available_parallelism().map_or(1, usize::from);
    if node {
        check_address_space(getrlimit(Resource::As).current)?;
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
    built.map_err(|source| StartError::Runtime { source })
}

fn check_address_space(allowed: Option<u64>) -> Result<(), StartError> {
    match allowed {
        Some(allowed) if allowed < NODE_ADDRESS_BYTES => Err(StartError::AddressSpace { allowed }),
        _ => Ok(()),
    }
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
        assert!(check_address_space(None).is_ok() && check_address_space(Some(NODE_ADDRESS_BYTES)).is_ok());
        let refused = check_address_space(Some(NODE_ADDRESS_BYTES - 1)).unwrap_err().to_string();
        assert!(refused.contains("268435455") && refused.contains("ulimit -v"), "{refused}");
        assert_eq!(runtime.block_on(async { 7 }), 7);
        let refused =
            StartError::Threads { threads: 9, source: io::ErrorKind::WouldBlock.into() }.to_string();
        assert!(refused.contains("9 threads") && refused.contains("ulimit -v"), "{refused}");
    }
}
