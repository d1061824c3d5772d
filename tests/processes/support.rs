//! What tests of processes share: the testkit's clusters, of the binary under test.

use std::net::TcpListener;

use quorate_cluster::ClusterSpec;
use tempfile::TempDir;

use quorate_testkit::processes;
pub(crate) use quorate_testkit::processes::{
    DEADLINE, Outcome, TestCluster, Unlisted, client, data_files, eventually, eventually_within, get, get_at,
    outcome, output, said,
};

/// The binary under test.
pub(crate) const QUORATE: &str = env!("CARGO_BIN_EXE_quorate");

/// A spec for three nodes in a directory of their own.
pub(crate) fn spec() -> (ClusterSpec, TempDir) {
    processes::spec(QUORATE)
}

/// Three nodes, ready, each started with `args` too.
pub(crate) fn start(args: &[&str]) -> TestCluster {
    TestCluster::start(QUORATE, args)
}

/// An address of this machine that nobody listened on a moment ago.
pub(crate) fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}
