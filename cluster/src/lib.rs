//! Real `quorate serve` processes on this machine, started and tormented from one place.
//!
//! [`ClusterSpec`] says what to run: which binary, how many nodes, where, on which ports. [`Cluster`]
//! runs it, and each [`Node`] can be stopped in order, killed, paused, resumed and started again.
//! `quorate cluster`, the tests on real processes and the fault-injection suite all use this crate,
//! so what a user sees and what is tested start in the same way.
//!
//! What it promises:
//!
//! - **No orphans.** Dropping a [`Cluster`] kills and reaps all that it started, also while a panic
//!   unwinds. On Linux the kernel does the same when this process is itself killed.
//! - **No surprises on disk.** A directory belongs to one running cluster at a time (`cluster.lock`), and
//!   one that was made for other nodes or addresses is refused (`cluster.json`), never adapted.
//! - **Nothing is lost from sight.** Standard output and error of every run of node N are appended to
//!   `node-N/output.log`; its data are beside it in `node-N/data`. `cluster.json` always holds the
//!   current process ids, so that `kill -9` needs no search.
//!
//! What it deliberately does not do: it does not link the engine, speak gRPC, or know who leads. It
//! starts processes and asks `/readyz`. Everything blocks, under a deadline that the caller gives; an
//! asynchronous caller moves the call off its executor.

mod cluster;
mod error;
mod http;
mod node;
mod ports;
mod record;
mod spawn;
mod spec;
mod stderr;

pub use cluster::Cluster;
pub use error::ClusterError;
pub use node::{Exit, Node};
pub use record::NodeRecord;
pub use spec::{ClusterSpec, MAX_NODES};
pub use stderr::Stderr;
