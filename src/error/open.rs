//! Why a node could not be opened, and what is wrong with its data directory. Every message says what to do.

use std::io;
use std::path::PathBuf;

use crate::shown::Shown;
use crate::types::{NodeId, UnsupportedVersion};

/// Whether an IO error says that this process, or the system, has too many files open: it passes.
pub(crate) fn is_out_of_files(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

fn unreadable_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            "Give the user that this program runs as the right to read and write it"
        }
        _ if is_out_of_files(source) => "Allow this program more open files, and start again",
        _ => {
            "Start again; if that fails too, the disk is at fault: move the whole data directory aside and rebuild this node from its peers"
        }
    }
}

fn room_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull => "; its file system is full: make room there, and start again",
        _ => "",
    }
}

fn listen_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => "stop the process that uses it, or choose another address",
        io::ErrorKind::AddrNotAvailable => {
            "this machine has no such address: listen on one that it has, and advertise the one that others use"
        }
        io::ErrorKind::PermissionDenied => {
            "choose a port above 1023, or give the process the right to use this one"
        }
        _ => "it must be HOST:PORT with a host that this machine can resolve and that is its own",
    }
}

/// Why a node could not be opened. Every message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A setting is missing or contradicts another.
    #[error("invalid configuration: {0}")]
    Config(String),
    /// The peer or client address cannot be listened on.
    #[error("cannot listen on {}: {source}; {}", Shown(.address), listen_hint(.source))]
    Listen {
        /// The address asked for.
        address: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// What the data directory holds cannot be used.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The consensus core refused to start.
    #[error("the consensus core did not start: {0}")]
    Core(String),
}

/// Why the data directory cannot be used, or can no longer be trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// Reading or writing failed.
    #[error("{operation} {}: {source}{}", path.display(), room_hint(.source))]
    Io {
        /// What was attempted, such as `cannot write`.
        operation: &'static str,
        /// Where.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Reading failed while the data directory was opened. That is not corruption: nothing was changed since, and the
    /// next start may find everything.
    #[error(
        "{} cannot be read: {source}; the data is untouched. {}",
        path.display(),
        unreadable_hint(.source)
    )]
    Unreadable {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// Another process holds the directory.
    #[error("data directory {} is in use by another process; stop it first, or choose another --data-dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The directory belongs to another cluster.
    #[error(
        "data directory {} belongs to cluster \"{found}\", not \"{expected}\"; choose another --data-dir, or start with --cluster {found}",
        path.display()
    )]
    OtherCluster {
        /// The directory.
        path: PathBuf,
        /// The cluster it belongs to.
        found: String,
        /// The cluster asked for.
        expected: String,
    },
    /// The directory belongs to another node.
    #[error(
        "data directory {} belongs to node {found}, not node {expected}; choose another --data-dir, or start with --node-id {found}",
        path.display()
    )]
    OtherNode {
        /// The directory.
        path: PathBuf,
        /// The node it belongs to.
        found: NodeId,
        /// The node asked for.
        expected: NodeId,
    },
    /// A file holds something that was not written there.
    #[error(
        "{} is corrupt: {detail}. Move the whole data directory aside and rebuild this node from its peers",
        path.display()
    )]
    Corrupt {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong, and where in the file.
        detail: String,
    },
    /// A snapshot is whole, as its checksums show, but this program cannot read it: another version of it wrote the snapshot,
    /// or one with another state machine.
    #[error(
        "{} is whole, but this program cannot read what it holds: {detail}. The data is untouched: start the program that wrote it, or a newer version",
        path.display()
    )]
    Undecodable {
        /// The file.
        path: PathBuf,
        /// What the reader says.
        detail: String,
    },
    /// A snapshot is whole, and holds the state of a machine, or of a version of it, that this build does not read.
    #[error("{}: {source}. The data is untouched", path.display())]
    Machine {
        /// The file.
        path: PathBuf,
        /// Which, and what to do.
        source: UnsupportedVersion,
    },
    /// The directory was in use before, and what it held is gone.
    #[error(
        "{} is gone, but {} shows that this node had promised to keep it; restore the directory, or move all of it aside and rejoin as a new node",
        missing.display(),
        marker.display()
    )]
    Lost {
        /// What is missing.
        missing: PathBuf,
        /// The marker that says it was there.
        marker: PathBuf,
    },
    /// Written by a version that this one does not know.
    #[error("{} has format version {found}; this build reads up to {supported}. Use a newer quorate", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest this build understands.
        supported: u32,
    },
    /// The durability of sled's log could not be ensured on this system.
    #[error("sled's log is not power-safe here: {detail}; refusing to start")]
    NotPowerSafe {
        /// What the self-check found.
        detail: String,
    },
}
