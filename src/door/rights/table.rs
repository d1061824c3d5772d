//! Which right each call needs: the one table. What is served and does not stand here does not compile, or is refused.

use axum::http::Method as HttpMethod;

use crate::proto::rpc::Rpc;

/// What a call needs of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum CallRight {
    /// Nothing: probes ask.
    Nothing,
    /// That anything is granted to it: a client finds the leader by such calls.
    Anything,
    /// To see how the node and the cluster are.
    Observe,
    /// To change how they are.
    Operate,
    /// To see settings, and to change them where it asks for that.
    Settings,
    /// A right to some part of the state. To which one, what is asked for decides.
    Data,
    /// To change some part of the state.
    Session,
}

/// The right that a call of a service of this program needs.
pub(crate) const fn of_rpc(rpc: Rpc) -> CallRight {
    match rpc {
        Rpc::KvPut
        | Rpc::KvGet
        | Rpc::KvDelete
        | Rpc::KvDeleteRange
        | Rpc::KvRange
        | Rpc::KvRangeStream
        | Rpc::KvTxn
        | Rpc::KvWatch
        | Rpc::KvWatchProgress
        | Rpc::KvPipeline
        | Rpc::PipelineRun
        | Rpc::ReplicationServiceSubscribe
        | Rpc::ReplicationServiceReadSnapshot
        | Rpc::ReplicationServiceGetEntriesAfter => CallRight::Data,
        Rpc::KvOpenSession | Rpc::KvCloseSession | Rpc::SessionsOpenSession | Rpc::SessionsCloseSession => {
            CallRight::Session
        }
        Rpc::AdminStatus | Rpc::AdminMemberList | Rpc::ReplicationServiceGetStatus => CallRight::Anything,
        Rpc::AdminConfigure => CallRight::Settings,
        Rpc::AdminAddMember
        | Rpc::AdminPromoteMember
        | Rpc::AdminDemoteMember
        | Rpc::AdminRemoveMember
        | Rpc::AdminReplaceMember
        | Rpc::AdminUpdateMember
        | Rpc::AdminTransferLeader
        | Rpc::AdminSnapshot
        // Whoever knows the number of a session can use it.
        | Rpc::AdminListSessions
        | Rpc::AdminCloseSession => CallRight::Operate,
    }
}

/// Whether the answer at `path` goes on for as long as its caller likes.
pub(crate) fn is_stream(path: &str) -> bool {
    Rpc::of_path(path).is_some_and(|rpc| {
        matches!(
            rpc,
            Rpc::KvRangeStream
                | Rpc::KvWatch
                | Rpc::KvPipeline
                | Rpc::PipelineRun
                | Rpc::ReplicationServiceSubscribe
                | Rpc::ReplicationServiceReadSnapshot
        )
    })
}

/// A page of the client port. The router is made of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Page {
    Livez,
    Readyz,
    Metrics,
    Stats,
    ReplicationStatus,
    ReplicationStats,
    ReplicationReplicas,
    ReplicationConfigure,
}

impl Page {
    /// All of them.
    pub(crate) const ALL: [Self; 8] = [
        Self::Livez,
        Self::Readyz,
        Self::Metrics,
        Self::Stats,
        Self::ReplicationStatus,
        Self::ReplicationStats,
        Self::ReplicationReplicas,
        Self::ReplicationConfigure,
    ];

    pub(crate) const fn path(self) -> &'static str {
        match self {
            Self::Livez => "/livez",
            Self::Readyz => "/readyz",
            Self::Metrics => "/metrics",
            Self::Stats => "/stats",
            Self::ReplicationStatus => "/replication/status",
            Self::ReplicationStats => "/replication/stats",
            Self::ReplicationReplicas => "/replication/replicas",
            Self::ReplicationConfigure => "/replication/configure",
        }
    }

    fn of_path(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|page| page.path() == path)
    }

    /// The right to ask for it by `method`. Whatever does not only look may change something.
    pub(crate) fn right(self, method: &HttpMethod) -> CallRight {
        let looks = [HttpMethod::GET, HttpMethod::HEAD].contains(method);
        match self {
            Self::Livez | Self::Readyz => CallRight::Nothing,
            Self::Metrics
            | Self::Stats
            | Self::ReplicationStatus
            | Self::ReplicationStats
            | Self::ReplicationReplicas
            | Self::ReplicationConfigure => match looks {
                true => CallRight::Observe,
                false => CallRight::Operate,
            },
        }
    }
}

/// What is served by others' services.
const HEALTH: [&str; 2] = ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"];
const REFLECTION: [&str; 2] = [
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// The right that a request by `method` at `path` needs; none where nothing is served.
pub(crate) fn of_request(method: &HttpMethod, path: &str) -> Option<CallRight> {
    if let Some(rpc) = Rpc::of_path(path) {
        return Some(of_rpc(rpc));
    }
    if let Some(page) = Page::of_path(path) {
        return Some(page.right(method));
    }
    match path {
        _ if HEALTH.contains(&path) => Some(CallRight::Nothing),
        _ if REFLECTION.contains(&path) => Some(CallRight::Observe),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_nothing_else_than_itself_is_never_asked_for_by_a_weaker_right() {
        for page in Page::ALL {
            let (get, post) = (page.right(&HttpMethod::GET), page.right(&HttpMethod::POST));
            assert_eq!(of_request(&HttpMethod::GET, page.path()), Some(get));
            assert_eq!(of_request(&HttpMethod::POST, page.path()), Some(post));
            match get {
                CallRight::Nothing => assert_eq!(post, CallRight::Nothing),
                _ => assert_eq!((get, post), (CallRight::Observe, CallRight::Operate), "{page:?}"),
            }
        }
        assert_eq!(of_request(&HttpMethod::DELETE, "/replication/configure"), Some(CallRight::Operate));
    }

    /// The table in `docs/SECURITY.md` is this one.
    #[test]
    fn the_documentation_says_which_right_each_call_takes() {
        let documentation = include_str!("../../../docs/SECURITY.md");
        let rows: Vec<_> = documentation
            .lines()
            .filter_map(|line| line.strip_prefix("| `/")?.strip_suffix(" |")?.split_once("` | "))
            .map(|(path, right)| (format!("/{path}"), right))
            .collect();
        let name = |right: CallRight| format!("{right:?}").to_lowercase();
        let pages = Page::ALL.map(|page| (page.path(), name(page.right(&HttpMethod::GET))));
        let calls = Rpc::ALL.iter().map(|rpc| (rpc.path(), name(of_rpc(*rpc))));
        let all: Vec<_> = pages.into_iter().chain(calls).collect();
        for (path, right) in &all {
            let told: Vec<_> =
                rows.iter().filter(|(told, _)| told == path).map(|(_, right)| *right).collect();
            assert_eq!(told, [right.as_str()], "{path}");
        }
        assert_eq!(rows.len(), all.len(), "it has rows for calls that there are not");
    }

    #[test]
    fn what_is_not_served_has_no_right() {
        for path in [
            "",
            "/",
            "/livez/",
            "/Livez",
            "/quorate.v1.Kv/Put/",
            "/quorate.v1.Kv/put",
            "/quorate.v1.Kv/",
            "/quorate.peer.v1.Peer/Identify",
            "/grpc.health.v1.Health/",
            "/replication/",
        ] {
            assert_eq!(of_request(&HttpMethod::POST, path), None, "{path}");
        }
        for rpc in Rpc::ALL {
            assert_eq!(Rpc::of_path(rpc.path()), Some(*rpc));
            assert_ne!(of_rpc(*rpc), CallRight::Nothing, "{rpc:?}");
        }
    }
}
