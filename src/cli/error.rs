//! How a command fails: what is printed, the hint below it, and the exit code.

use std::error::Error;
use std::io;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::Subject;
use super::cluster::ClusterCommandError;
use super::serve::ServeCommandError;
use crate::error::StorageError;
use crate::kv::client::{ClientError, ConfigError};
use crate::reason::{EXIT_OK, Reason};
use crate::shown::Shown;
use crate::types::{Bookmark, NodeId};

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
    #[error("key not found: {}", Shown(.key))]
    NotFound {
        /// The key.
        key: String,
    },
    /// None of the sessions that were to be closed is open.
    #[error("{nothing}")]
    SessionNotOpen {
        /// Which that were, as a sentence without its end.
        nothing: String,
    },
    /// A put had a condition, and it does not hold.
    #[error("{} was not set: {}", Shown(.key), found(.current_revision))]
    ConditionFailed {
        /// The key.
        key: String,
        /// Revision of its last put; `None` when it does not exist.
        current_revision: Option<u64>,
    },
    /// A write is committed and applied, and not every voter has confirmed it; what came of it is known.
    #[error("{}", unconfirmed(.error, .nothing))]
    Unconfirmed {
        /// What says which voters.
        error: ClientError,
        /// What came of the write, for programs.
        result: Map<String, Value>,
        /// Why it has changed nothing, if it has not.
        nothing: Option<Box<CliError>>,
    },
    /// Arguments that do not go together, or a text that cannot be read as what it should be.
    #[error("{0}")]
    Usage(String),
    /// Not every node is healthy.
    #[error("{}", unhealthy(*.nodes, *.unready, *.silent, *.leader))]
    Unhealthy {
        /// How many were asked.
        nodes: usize,
        /// How many of them answer and are not ready.
        unready: usize,
        /// How many of them do not answer.
        silent: usize,
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
    /// What was to be changed is changed, and the result cannot be written.
    #[error("{done}, but the result cannot be written to standard output: {source}")]
    Unprinted {
        /// What has been done, as a sentence without its end.
        done: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// How far a subscription was printed cannot be stored.
    #[error("everything up to {position} was printed, and that cannot be stored: {source}")]
    State {
        /// Where to go on.
        position: Bookmark,
        /// What cannot be done with the file.
        source: Box<StorageError>,
    },
    /// The result cannot be shown as JSON.
    #[error("cannot write JSON: {0}")]
    Json(#[source] serde_json::Error),
    /// No node answered.
    #[error("none of the nodes answers")]
    NoNodeAnswers,
    /// The lead was handed over, and another node than the one that was asked for has it now.
    #[error("node {leader} leads, not node {wanted}: an election had another outcome than was asked for")]
    OtherLeads {
        /// Who was to lead.
        wanted: NodeId,
        /// Who leads.
        leader: NodeId,
    },
    /// Every operation of a measurement failed.
    #[error("no operation succeeded: {why}")]
    NothingMeasured {
        /// The last error, or that there was none.
        why: String,
        /// Its reason.
        reason: Reason,
        /// Whether it left a write undecided.
        maybe_applied: bool,
    },
    /// What was tested is not as it should be, as was printed.
    #[error("{0}")]
    TestFailed(String),
    /// Running one or more nodes failed.
    #[error(transparent)]
    Node(Box<dyn Error + Send + Sync>),
}

fn unhealthy(nodes: usize, unready: usize, silent: usize, leader: bool) -> String {
    let of = |count: usize, what: &str| {
        let verb = if count == 1 {
            what.replace("do not", "does not").replace("are", "is")
        } else {
            what.to_owned()
        };
        (count > 0).then(|| format!("{count} of {nodes} nodes {verb}"))
    };
    let leads = (!leader).then(|| "no leader is known".to_owned());
    let parts = [of(silent, "do not answer"), of(unready, "are not ready"), leads];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", and ")
}

fn unconfirmed(error: &ClientError, nothing: &Option<Box<CliError>>) -> String {
    match nothing {
        Some(nothing) => format!("{nothing}; not every voter has confirmed that: {error}"),
        None => error.to_string(),
    }
}

fn found(current_revision: &Option<u64>) -> String {
    match current_revision {
        Some(revision) => format!("its last put was at revision {revision}"),
        None => "it does not exist".to_owned(),
    }
}

/// Whether a node failed because of what it was given.
fn is_invalid_input(error: &(dyn Error + Send + Sync + 'static)) -> bool {
    error.downcast_ref().is_some_and(ServeCommandError::is_invalid_input)
        || error.downcast_ref().is_some_and(ClusterCommandError::is_invalid_input)
}

impl CliError {
    /// Wraps what a command that runs nodes returns.
    pub(super) fn node(error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::Node(error.into())
    }

    /// Which of the reasons that all interfaces share.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Unconfirmed { nothing: Some(nothing), .. } => nothing.reason(),
            Self::Client(error) | Self::Unconfirmed { error, nothing: None, .. } => error.reason(),
            Self::NothingMeasured { reason, .. } => *reason,
            Self::NoNodeAnswers => Reason::Unreachable,
            Self::Config(_) | Self::Usage(_) | Self::Input { .. } => Reason::Invalid,
            Self::NotFound { .. } | Self::SessionNotOpen { .. } => Reason::NotFound,
            Self::ConditionFailed { .. } => Reason::ConditionFailed,
            Self::OtherLeads { .. } => Reason::Membership,
            Self::Unhealthy { leader: false, .. } => Reason::NoQuorum,
            // They may have stopped, or not be reached from here: nobody knows, and others do answer.
            Self::Unhealthy { leader: true, silent: 1.., .. } => Reason::Unspecified,
            Self::Unhealthy { leader: true, .. } => Reason::Behind,
            Self::Node(error) if is_invalid_input(&**error) => Reason::Invalid,
            Self::Node(_) => Reason::Stopped,
            Self::Signals(_)
            | Self::Output(_)
            | Self::Unprinted { .. }
            | Self::State { .. }
            | Self::TestFailed(_)
            | Self::Json(_) => Reason::Unspecified,
        }
    }

    /// Whether a write may have taken effect, or may still do so.
    pub fn maybe_applied(&self) -> bool {
        match self {
            Self::Client(error) => error.maybe_applied(),
            Self::NothingMeasured { maybe_applied, .. } => *maybe_applied,
            Self::Unprinted { .. } => true,
            Self::Unconfirmed { nothing, .. } => nothing.is_none(),
            Self::Config(_)
            | Self::NotFound { .. }
            | Self::SessionNotOpen { .. }
            | Self::ConditionFailed { .. }
            | Self::Usage(_)
            | Self::Unhealthy { .. }
            | Self::Signals(_)
            | Self::Input { .. }
            | Self::Output(_)
            | Self::State { .. }
            | Self::Json(_)
            | Self::NoNodeAnswers
            | Self::OtherLeads { .. }
            | Self::TestFailed(_)
            | Self::Node(_) => false,
        }
    }

    /// The exit code of the process.
    pub fn exit_code(&self) -> u8 {
        if self.is_broken_pipe() { EXIT_OK } else { self.reason().exit_code(self.maybe_applied()) }
    }

    /// Whether the reader of standard output has gone away, as `head` does: no reason to complain.
    pub fn is_broken_pipe(&self) -> bool {
        let written = if let Self::Output(error) | Self::Unprinted { source: error, .. } = self {
            Some(error)
        } else {
            None
        };
        written.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    }

    /// What came of a write all the same, where that is known.
    pub(super) fn result(&self) -> Option<&Map<String, Value>> {
        if let Self::Unconfirmed { result, .. } = self { Some(result) } else { None }
    }

    /// Who leads, where the failure itself says so.
    pub(super) fn leader(&self) -> Option<NodeId> {
        if let Self::OtherLeads { leader, .. } = self { Some(*leader) } else { None }
    }

    /// What the user can do about it, of a command that was about `subject`.
    pub(super) fn hint(&self, subject: Subject) -> Option<&'static str> {
        match self {
            Self::Client(error) => client_hint(error, subject),
            Self::NothingMeasured { reason, .. } => reason_hint(*reason, subject),
            Self::NoNodeAnswers => reason_hint(Reason::Unreachable, subject),
            Self::Config(ConfigError::NoEndpoints | ConfigError::Endpoint { .. }) => {
                Some("give the nodes' client addresses: --endpoints host:port,host:port")
            }
            Self::Unconfirmed { nothing: Some(nothing), .. } => nothing.hint(subject),
            Self::Unconfirmed { nothing: None, .. } => Some(
                "nothing has to be written again; `quorate status` shows which nodes are behind, and --ack-timeout allows them more time",
            ),
            Self::SessionNotOpen { .. } => Some("`quorate session list` shows those that are"),
            Self::NotFound { .. } => Some("`quorate range --prefix PREFIX` lists the keys that exist"),
            Self::Unhealthy { .. } => {
                Some("`quorate status` shows roles and positions; the log of a node says why it is not ready")
            }
            Self::OtherLeads { .. } => Some("`quorate status` shows how far each node is; try again"),
            Self::Config(_)
            | Self::ConditionFailed { .. }
            | Self::Usage(_)
            | Self::Signals(_)
            | Self::Input { .. }
            | Self::Output(_)
            | Self::Unprinted { .. }
            | Self::State { .. }
            | Self::Json(_)
            | Self::TestFailed(_)
            | Self::Node(_) => None,
        }
    }
}

fn client_hint(error: &ClientError, subject: Subject) -> Option<&'static str> {
    if let ClientError::AckTimeout { .. } = error {
        return Some(
            "the node does not tell whether a condition held, or what was removed: read the keys to find out. `quorate status` shows which nodes are behind",
        );
    }
    if !error.maybe_applied() {
        return reason_hint(error.reason(), subject);
    }
    match subject {
        Subject::Write => Some("read the key to find out whether the write took effect before you repeat it"),
        Subject::Members => {
            Some("`quorate member list` shows what has become of it; repeating the command completes it")
        }
        Subject::Lead => Some("`quorate status` shows who leads now"),
        Subject::Sessions => {
            Some("`quorate session list` shows which are open now; closing one again does no harm")
        }
        Subject::Settings => Some("`quorate configure` shows the settings as they are now"),
        Subject::Read | Subject::Node | Subject::Process => None,
    }
}

fn reason_hint(reason: Reason, subject: Subject) -> Option<&'static str> {
    match reason {
        Reason::Unreachable => Some(
            "is the cluster running? `quorate cluster` starts a local one; --endpoints says where another one is",
        ),
        Reason::DeadlineExceeded | Reason::NoQuorum => {
            Some("`quorate status` shows whether a majority of the nodes is up; --timeout allows more time")
        }
        Reason::NotLeader => {
            Some("`quorate status` shows who leads, and whether a majority of the nodes is up")
        }
        Reason::DiskFull => Some(
            "make room on the disks that `quorate health` calls full: writes are taken again by themselves, and reads go on meanwhile",
        ),
        Reason::DiskStalled => Some(
            "try again: the disk may recover, or another node take the lead; `quorate health` shows which nodes take no writes",
        ),
        Reason::QuotaExceeded => Some(
            "remove keys, or raise the quota (`quorate configure state_quota_bytes=BYTES`); reads and deletions go on meanwhile",
        ),
        Reason::Ahead => Some(
            "give a revision that a write to this cluster has printed; `quorate status` shows how far the cluster is",
        ),
        Reason::OtherHistory => {
            Some("is this the cluster that the position came from? --endpoints says which is asked")
        }
        Reason::Behind if subject == Subject::Read => {
            Some("--prefer leader asks the node that is furthest ahead; --timeout allows more time")
        }
        Reason::NotFound if matches!(subject, Subject::Read | Subject::Write) => {
            Some("`quorate range --prefix PREFIX` lists the keys that exist")
        }
        Reason::Overloaded | Reason::LimitReached | Reason::WindowExceeded | Reason::TooManySessions => {
            Some("nothing was done: try again after a pause")
        }
        Reason::Unauthenticated => Some(
            "give a token: --token-file FILE, or QUORATE_TOKEN_FILE or QUORATE_TOKEN in the environment; `quorate token show` says what is in one",
        ),
        Reason::PermissionDenied => {
            Some("ask for a token to which it is granted; `quorate token show` says what is granted by one")
        }
        Reason::VersionNotAgreed => Some("upgrade all members, and bring back those that are down"),
        Reason::Diverged => Some("ask another node with --endpoints, and look at the log of this one"),
        Reason::Unspecified
        | Reason::TooLarge
        | Reason::Interrupted
        | Reason::Stopped
        | Reason::Lagged
        | Reason::Invalid
        | Reason::SessionExpired
        | Reason::AckTimeout
        | Reason::Behind
        | Reason::Compacted
        | Reason::Membership
        | Reason::AnswerForgotten
        | Reason::Undecodable
        | Reason::NotFound
        | Reason::ConditionFailed => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::OpenError;
    use crate::reason::{EXIT_ERROR, EXIT_INVALID, EXIT_NOT_FOUND, EXIT_UNKNOWN, EXIT_UNREACHABLE};

    fn failed(reason: Reason, maybe_applied: bool) -> CliError {
        let endpoint = crate::kv::client::Endpoint::parse("n1:1").unwrap();
        CliError::Client(ClientError::Failed { endpoint, reason, message: "m".to_owned(), maybe_applied })
    }

    fn unprinted(kind: io::ErrorKind) -> CliError {
        CliError::Unprinted { done: "the write was applied", source: kind.into() }
    }

    #[test]
    fn what_is_done_is_not_called_undone_because_it_cannot_be_printed() {
        let error = unprinted(io::ErrorKind::StorageFull);
        assert!(
            error.maybe_applied() && error.to_string().starts_with("the write was applied, but"),
            "{error}"
        );
    }

    #[test]
    fn exit_codes() {
        let rejected = ClientError::Rejected { reason: Reason::Invalid, message: String::new() };
        let expired = |maybe_applied| ClientError::DeadlineExceeded {
            timeout: std::time::Duration::from_secs(1),
            maybe_applied,
            last: None,
        };
        for (error, code) in [
            (CliError::Client(ClientError::Unavailable { tried: vec![] }), EXIT_UNREACHABLE),
            (CliError::Client(rejected), EXIT_INVALID),
            (CliError::Client(expired(true)), EXIT_UNKNOWN),
            (CliError::Client(expired(false)), EXIT_ERROR),
            (failed(Reason::Interrupted, true), EXIT_UNKNOWN),
            (failed(Reason::Invalid, true), EXIT_UNKNOWN),
            (failed(Reason::Membership, false), EXIT_ERROR),
            (failed(Reason::NotFound, false), EXIT_NOT_FOUND),
            (CliError::Config(ConfigError::NoEndpoints), EXIT_INVALID),
            (CliError::NotFound { key: "k".to_owned() }, EXIT_NOT_FOUND),
            (CliError::ConditionFailed { key: "k".to_owned(), current_revision: None }, EXIT_NOT_FOUND),
            (CliError::OtherLeads { wanted: 3, leader: 2 }, EXIT_ERROR),
            (CliError::NoNodeAnswers, EXIT_UNREACHABLE),
            (CliError::Output(io::ErrorKind::BrokenPipe.into()), EXIT_OK),
            (CliError::Output(io::ErrorKind::StorageFull.into()), EXIT_ERROR),
            (unprinted(io::ErrorKind::StorageFull), EXIT_UNKNOWN),
            (unprinted(io::ErrorKind::BrokenPipe), EXIT_OK),
            (CliError::node(ServeCommandError::from(OpenError::Config("x".to_owned()))), EXIT_INVALID),
            (CliError::node(ServeCommandError::from(OpenError::Core("x".to_owned()))), EXIT_ERROR),
        ] {
            assert_eq!(error.exit_code(), code, "{error:?}");
        }
    }

    /// Nobody is told to read a key after a snapshot, or that a read may have been applied.
    #[test]
    fn a_hint_fits_what_the_command_is_about() {
        for subject in [Subject::Read, Subject::Node, Subject::Process] {
            assert_eq!(failed(Reason::Interrupted, true).hint(subject), None);
        }
        let hint = |subject| failed(Reason::Interrupted, true).hint(subject).unwrap();
        assert!(hint(Subject::Write).contains("read the key"));
        assert!(hint(Subject::Members).contains("member list"));
        assert!(hint(Subject::Lead).contains("who leads"));
        assert!(hint(Subject::Settings).contains("quorate configure"));
        let behind = failed(Reason::Ahead, false);
        assert!(!behind.hint(Subject::Read).unwrap().contains("majority"));
    }

    #[test]
    fn long_texts_are_not_repeated() {
        let key = "k".repeat(100_000);
        for error in [
            CliError::NotFound { key: key.clone() },
            CliError::ConditionFailed { key, current_revision: None },
        ] {
            let message = error.to_string();
            assert!(message.contains("(100000 bytes)") && message.len() < 200, "{message}");
        }
    }
}
