//! How a command fails: what is printed, the hint below it, and the exit code.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use super::cluster::ClusterCommandError;
use super::serve::ServeError;
use crate::client::{ClientError, ConfigError};
use crate::reason::{EXIT_ERROR, EXIT_INVALID, EXIT_NOT_FOUND, EXIT_OK, EXIT_UNREACHABLE, Reason};

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// The operation failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The arguments do not make a client.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The key does not exist.
    #[error("key not found: {key}")]
    NotFound {
        /// The key.
        key: String,
    },
    /// None of the sessions that were to be closed is open.
    #[error("not open: {asked}")]
    SessionNotOpen {
        /// Which that were.
        asked: String,
    },
    /// A put had a condition, and it does not hold.
    #[error("{key} was not set: {}", found(.current_revision))]
    ConditionFailed {
        /// The key.
        key: String,
        /// Revision of its last put; `None` when it does not exist.
        current_revision: Option<u64>,
    },
    /// Arguments that do not go together, or a text that cannot be read as what it should be.
    #[error("{0}")]
    Usage(String),
    /// Not every node is healthy.
    #[error("{unhealthy} of {nodes} nodes are not healthy{}", if *.leader { "" } else { ", and nobody leads" })]
    Unhealthy {
        /// How many were asked.
        nodes: usize,
        /// How many of them do not answer, or are not ready.
        unhealthy: usize,
        /// Whether a leader is known.
        leader: bool,
    },
    /// Signals cannot be caught.
    #[error("cannot listen for signals: {0}")]
    Signals(#[source] io::Error),
    /// What should be read cannot be.
    #[error("cannot read {}: {source}", path.display())]
    Input {
        /// The file, or `-` for standard input.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The result cannot be written.
    #[error("cannot write to standard output: {0}")]
    Output(#[source] io::Error),
    /// The result cannot be shown as JSON.
    #[error("cannot write JSON: {0}")]
    Json(#[source] serde_json::Error),
    /// No node answered.
    #[error("none of the nodes answers")]
    NoNodeAnswers,
    /// Every operation of a measurement failed.
    #[error("no operation succeeded; the last error was: {last}")]
    NothingMeasured {
        /// The last error.
        last: String,
        /// Whether it was that no endpoint can be connected to.
        unreachable: bool,
    },
    /// Running one or more nodes failed.
    #[error(transparent)]
    Node(Box<dyn Error + Send + Sync>),
}

fn found(current_revision: &Option<u64>) -> String {
    match current_revision {
        Some(revision) => format!("its last put was at revision {revision}"),
        None => "it does not exist".to_owned(),
    }
}

/// Whether a node failed because of what it was given.
fn is_invalid_input(error: &(dyn Error + Send + Sync + 'static)) -> bool {
    error.downcast_ref().is_some_and(ServeError::is_invalid_input)
        || error.downcast_ref().is_some_and(ClusterCommandError::is_invalid_input)
}

impl CliError {
    /// Wraps what a command that runs nodes returns.
    pub(super) fn node(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Node(error.into())
    }

    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Client(ClientError::Unavailable { .. })
            | Self::NoNodeAnswers
            | Self::NothingMeasured { unreachable: true, .. } => EXIT_UNREACHABLE,
            Self::Client(ClientError::Rejected { .. })
            | Self::Config(_)
            | Self::Usage(_)
            | Self::Input { .. } => EXIT_INVALID,
            Self::Node(error) if is_invalid_input(&**error) => EXIT_INVALID,
            Self::Node(_) => EXIT_ERROR,
            Self::Output(_) if self.is_broken_pipe() => EXIT_OK,
            Self::SessionNotOpen { .. } => EXIT_NOT_FOUND,
            Self::Client(_)
            | Self::NotFound { .. }
            | Self::ConditionFailed { .. }
            | Self::Unhealthy { .. }
            | Self::Signals(_)
            | Self::Output(_)
            | Self::Json(_)
            | Self::NothingMeasured { .. } => EXIT_ERROR,
        }
    }

    /// Whether the reader of standard output has gone away, as `head` does: no reason to complain.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Client(error) => client_hint(error),
            Self::NoNodeAnswers | Self::NothingMeasured { unreachable: true, .. } => Some(UNREACHABLE_HINT),
            Self::Config(ConfigError::NoEndpoints | ConfigError::Endpoint { .. }) => {
                Some("give the nodes' client addresses: --endpoints host:port,host:port")
            }
            Self::SessionNotOpen { .. } => Some("`quorate session list` shows those that are"),
            Self::NotFound { .. } => Some("`quorate range --prefix PREFIX` lists the keys that exist"),
            Self::Unhealthy { .. } => {
                Some("`quorate status` shows roles and positions; the log of a node says why it is not ready")
            }
            Self::Config(_)
            | Self::ConditionFailed { .. }
            | Self::Usage(_)
            | Self::Signals(_)
            | Self::Input { .. }
            | Self::Output(_)
            | Self::Json(_)
            | Self::NothingMeasured { .. }
            | Self::Node(_) => None,
        }
    }
}

const UNREACHABLE_HINT: &str =
    "is the cluster running? `quorate cluster` starts a local one; --endpoints says where another one is";

fn client_hint(error: &ClientError) -> Option<&'static str> {
    if let ClientError::Failed { reason: Reason::Membership, maybe_applied: true, .. } = error {
        return Some("`quorate member list` shows what has become of it; repeating the command completes it");
    }
    if let ClientError::AckTimeout { .. } = error {
        return Some("the write is done; `quorate status` shows which nodes are behind");
    }
    if error.maybe_applied() {
        return Some("read the key to find out whether the write took effect before you repeat it");
    }
    match error {
        ClientError::Unavailable { .. } => Some(UNREACHABLE_HINT),
        ClientError::DeadlineExceeded { .. } => {
            Some("`quorate status` shows whether a majority of the nodes is up; --timeout allows more time")
        }
        ClientError::Failed { reason: Reason::DiskFull, .. } => {
            Some("make room on the disk: writes are accepted again by themselves")
        }
        ClientError::Rejected { .. }
        | ClientError::Failed { .. }
        | ClientError::AckTimeout { .. }
        | ClientError::Compacted { .. } => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::OpenError;

    #[test]
    fn exit_codes() {
        let rejected = ClientError::Rejected { reason: Reason::Invalid, message: String::new() };
        for (error, code) in [
            (CliError::Client(ClientError::Unavailable { tried: vec![] }), EXIT_UNREACHABLE),
            (CliError::Client(rejected), EXIT_INVALID),
            (CliError::Config(ConfigError::NoEndpoints), EXIT_INVALID),
            (CliError::NotFound { key: "k".to_owned() }, EXIT_ERROR),
            (CliError::Output(io::ErrorKind::BrokenPipe.into()), EXIT_OK),
            (CliError::Output(io::ErrorKind::StorageFull.into()), EXIT_ERROR),
            (CliError::node(ServeError::from(OpenError::Config("x".to_owned()))), EXIT_INVALID),
            (CliError::node(ServeError::from(OpenError::Core("x".to_owned()))), EXIT_ERROR),
        ] {
            assert_eq!(error.exit_code(), code, "{error:?}");
        }
    }
}
