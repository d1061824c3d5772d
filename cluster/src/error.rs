//! Why a local cluster or one of its nodes could not do what it was asked.

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

/// What helps where the file system is full.
fn room_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull => {
            "; its file system is full: make room there, or choose another --data-dir"
        }
        _ => "",
    }
}

/// Every message says what to do, where something can be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// The number of nodes cannot be run.
    #[error("cannot run {nodes} nodes: choose 1 to {max}, and an odd number to get the most out of them")]
    Nodes {
        /// The number asked for.
        nodes: u64,
        /// The most that are supported.
        max: u64,
    },
    /// The ports do not fit below 65536, or client and peer ports overlap.
    #[error(
        "{nodes} nodes from client port {client_port}{} and peer port {peer_port} do not fit: the ranges must not overlap, nor pass 65535",
        frames_port.map(|port| format!(", frames port {port}")).unwrap_or_default()
    )]
    PortRanges {
        /// The number of nodes.
        nodes: u64,
        /// First client port.
        client_port: u16,
        /// First peer port.
        peer_port: u16,
        /// First port for followers without gRPC, if there are any.
        frames_port: Option<u16>,
    },
    /// No run of free ports was found.
    #[error("no {ports} consecutive free ports found between {from} and {to}")]
    NoFreePorts {
        /// How many were needed.
        ports: u16,
        /// Where the search began.
        from: u16,
        /// Where it ended.
        to: u16,
    },
    /// Something already listens where a node should.
    #[error(
        "cannot listen on {address} ({source}): stop the process that uses it (`ss -ltnp 'sport = :{port}'` names it), or choose other ports with --client-port, --peer-port and --frames"
    )]
    PortInUse {
        /// The address.
        address: String,
        /// Its port.
        port: u16,
        /// What the operating system said.
        source: io::Error,
    },
    /// A running cluster uses the directory.
    #[error(
        "{} is in use by a running cluster{}: stop that one first, or choose another --data-dir",
        data_dir.display(),
        pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
    )]
    InUse {
        /// The directory.
        data_dir: PathBuf,
        /// The process that runs the cluster, if it could be read.
        pid: Option<u32>,
    },
    /// The directory was made for another number of nodes.
    #[error(
        "{} holds a cluster of {found} nodes, not {expected}: start with --nodes {found}, or choose another --data-dir",
        data_dir.display()
    )]
    NodeCount {
        /// The directory.
        data_dir: PathBuf,
        /// Nodes found.
        found: u64,
        /// Nodes asked for.
        expected: u64,
    },
    /// The directory was made with other addresses. Members know each other by them.
    #[error(
        "{} holds a cluster whose node {node_id} is known to the others at {found}, not {expected}: start with the ports it was made with, or choose another --data-dir",
        data_dir.display()
    )]
    Addresses {
        /// The directory.
        data_dir: PathBuf,
        /// The first node whose address differs.
        node_id: u64,
        /// The recorded address.
        found: String,
        /// The address asked for.
        expected: String,
    },
    /// `cluster.json` cannot be understood.
    #[error(
        "{} is not a record of a cluster: {source}; restore it, or move it aside if you know that nodes and ports are the same as before",
        path.display()
    )]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Reading, writing, starting or signalling failed.
    #[error("{operation} {}: {source}{}", path.display(), room_hint(.source))]
    Io {
        /// What was attempted, such as `cannot write`.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A signal could not be delivered.
    #[error("cannot signal node {node_id} (process {pid}): {source}")]
    Signal {
        /// The node.
        node_id: u64,
        /// Its process.
        pid: u32,
        /// What the operating system said.
        source: io::Error,
    },
    /// The node has no process to act upon.
    #[error("node {node_id} is not running")]
    NotRunning {
        /// The node.
        node_id: u64,
    },
    /// The node already has a process.
    #[error("node {node_id} is already running as process {pid}")]
    AlreadyRunning {
        /// The node.
        node_id: u64,
        /// Its process.
        pid: u32,
    },
    /// The process ended while something else was expected of it.
    #[error("node {node_id} (process {pid}) ended with {status}; the end of {}:\n{tail}", log.display())]
    Exited {
        /// The node.
        node_id: u64,
        /// Its process.
        pid: u32,
        /// How it ended.
        status: ExitStatus,
        /// Where its output is.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// The node did not become ready in time.
    #[error(
        "node {node_id} was not ready after {waited_ms} ms ({last}); the end of {}:\n{tail}",
        log.display()
    )]
    NotReady {
        /// The node.
        node_id: u64,
        /// How long was waited.
        waited_ms: u128,
        /// The last answer to `/readyz`, or why there was none.
        last: String,
        /// Where its output is.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// The process did not end in time. It is still running.
    #[error("node {node_id} (process {pid}) did not stop within {waited_ms} ms; see {}", log.display())]
    StillRunning {
        /// The node.
        node_id: u64,
        /// Its process.
        pid: u32,
        /// How long was waited.
        waited_ms: u128,
        /// Where its output is.
        log: PathBuf,
    },
}

impl ClusterError {
    /// For `map_err`: an IO error with what was attempted on which path.
    pub(crate) fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { operation, path, source }
    }
}
