//! Between protocol messages and what the engine takes and gives. Pure functions: defaults and limits
//! on the way in, headers on the way out.

use std::time::Duration;

use tokio::sync::watch;

use crate::engine::{
    Acknowledged, ClosedSession, CurrentHistory, DEFAULT_ACK_TIMEOUT, NodeState, OpenedSession, ReadOutcome,
    SessionList, WriteOptions,
};
use crate::error::{ReadError, WriteError};
use crate::machine::kv::{Item, KvAnswer, KvCommand, KvQuery, KvReply, RangeAnswer, RangeQuery};
use crate::machine::sessions::{SessionInfo, WINDOW, granted_ttl_ms};
use crate::proto::v1;
use crate::proto::v1::tagged_request::Request;
use crate::proto::v1::tagged_response::Response;
use crate::types::{AckLevel, HistoryEpoch, LogId, NodeId, ReadLevel, ReadOptions, SessionSlot};

use super::failure;
use super::node::KvNode;
use super::told;
use super::txn::{self, AskedKeys};

/// Stands in for an empty tenant or collection.
pub(super) const DEFAULT_NAME: &str = "default";

/// Most items of one range answer, whatever the request allows: the answer is put together in one go.
pub(super) const MAX_RANGE_ITEMS: usize = 10_000;

/// Most bytes of keys and values in one range answer, each item counted with 64 bytes more: what surrounds them must fit
/// the same message.
pub(super) const MAX_RANGE_BYTES: usize = super::MAX_ANSWER_BYTES - 64 * 1024;

/// Longest time that a write may ask to wait for the slowest voter.
const MAX_ACK_TIMEOUT: Duration = Duration::from_secs(60);

/// What is counted and timed: every call of the services but pipelines, whose requests count one by one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Put,
    Get,
    Delete,
    Range,
    DeleteRange,
    Txn,
    OpenSession,
    CloseSession,
    RangeStream,
    Watch,
    Status,
    MemberList,
    AddMember,
    PromoteMember,
    DemoteMember,
    RemoveMember,
    ReplaceMember,
    UpdateMember,
    TransferLeader,
    Snapshot,
    Configure,
    ListSessions,
}

impl Method {
    pub(super) const ALL: [Self; 22] = [
        Self::Put,
        Self::Get,
        Self::Delete,
        Self::Range,
        Self::DeleteRange,
        Self::Txn,
        Self::OpenSession,
        Self::CloseSession,
        Self::RangeStream,
        Self::Watch,
        Self::Status,
        Self::MemberList,
        Self::AddMember,
        Self::PromoteMember,
        Self::DemoteMember,
        Self::RemoveMember,
        Self::ReplaceMember,
        Self::UpdateMember,
        Self::TransferLeader,
        Self::Snapshot,
        Self::Configure,
        Self::ListSessions,
    ];

    /// Whether it changes anything that its caller would have to look for when its answer does not come.
    pub(super) fn changes(self) -> bool {
        match self {
            Self::Put
            | Self::Delete
            | Self::DeleteRange
            | Self::Txn
            | Self::OpenSession
            | Self::CloseSession
            | Self::AddMember
            | Self::PromoteMember
            | Self::DemoteMember
            | Self::RemoveMember
            | Self::ReplaceMember
            | Self::UpdateMember
            | Self::TransferLeader
            | Self::Configure => true,
            Self::Get
            | Self::Range
            | Self::RangeStream
            | Self::Watch
            | Self::Status
            | Self::MemberList
            | Self::ListSessions
            | Self::Snapshot => false,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Put => "put",
            Self::Get => "get",
            Self::Delete => "delete",
            Self::Range => "range",
            Self::DeleteRange => "delete_range",
            Self::Txn => "txn",
            Self::OpenSession => "open_session",
            Self::CloseSession => "close_session",
            Self::RangeStream => "range_stream",
            Self::Watch => "watch",
            Self::Status => "status",
            Self::MemberList => "member_list",
            Self::AddMember => "add_member",
            Self::PromoteMember => "promote_member",
            Self::DemoteMember => "demote_member",
            Self::RemoveMember => "remove_member",
            Self::ReplaceMember => "replace_member",
            Self::UpdateMember => "update_member",
            Self::TransferLeader => "transfer_leader",
            Self::Snapshot => "snapshot",
            Self::Configure => "configure",
            Self::ListSessions => "list_sessions",
        }
    }
}

/// What the engine is asked to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Call {
    Write(KvCommand, WriteOptions),
    Read(KvQuery, ReadOptions),
    OpenSession { ttl_ms: u64 },
    CloseSession { session: u64, history: HistoryEpoch },
}

pub(super) fn method(request: &Request) -> Method {
    match request {
        Request::Put(_) => Method::Put,
        Request::Get(_) => Method::Get,
        Request::Delete(_) => Method::Delete,
        Request::Range(_) => Method::Range,
        Request::DeleteRange(_) => Method::DeleteRange,
        Request::Txn(_) => Method::Txn,
        Request::OpenSession(_) => Method::OpenSession,
        Request::CloseSession(_) => Method::CloseSession,
    }
}

/// The call that `request` asks for, within the limits.
///
/// # Errors
/// The failure to answer instead.
pub(super) fn decode(request: Request) -> Result<Call, v1::Failure> {
    let call = match request {
        Request::Put(v1::PutRequest { tenant, collection, key, value, ttl_ms, options }) => {
            let (tenant, collection) = (name(tenant), name(collection));
            let command = match ttl_ms {
                0 => KvCommand::Put { tenant, collection, key, value },
                _ => KvCommand::PutExpiring { tenant, collection, key, value, ttl_ms },
            };
            Call::Write(command, write_options(options)?)
        }
        Request::Delete(v1::DeleteRequest { tenant, collection, key, options }) => Call::Write(
            KvCommand::Delete { tenant: name(tenant), collection: name(collection), key },
            write_options(options)?,
        ),
        Request::Get(v1::GetRequest { tenant, collection, key, level, freshness }) => Call::Read(
            KvQuery::Get { tenant: name(tenant), collection: name(collection), key },
            read_options(level, freshness)?,
        ),
        Request::Range(v1::RangeRequest { at: Some(_), .. }) => {
            return Err(failure::invalid("only a RangeStream can go on with the state of an earlier one"));
        }
        Request::Range(request) => {
            let options = read_options(request.level, request.freshness)?;
            Call::Read(KvQuery::Range(range_query(request)), options)
        }
        Request::OpenSession(v1::OpenSessionRequest { ttl_ms }) => Call::OpenSession { ttl_ms },
        Request::CloseSession(v1::CloseSessionRequest { session, history }) => {
            Call::CloseSession { session, history: HistoryEpoch(history) }
        }
        Request::DeleteRange(request) => {
            let v1::DeleteRangeRequest { tenant, collection, start, end, limit, options } = request;
            let (tenant, collection) = (name(tenant), name(collection));
            let command = KvCommand::DeleteRange { tenant, collection, start, end, limit };
            Call::Write(command, write_options(options)?)
        }
        Request::Txn(mut request) => {
            let options = write_options(request.options.take())?;
            Call::Write(KvCommand::Txn(txn::decode(request)?), options)
        }
    };
    match &call {
        Call::Write(command, _) => command.check()?,
        Call::Read(query, _) => query.check()?,
        Call::OpenSession { .. } | Call::CloseSession { .. } => {}
    }
    Ok(call)
}

pub(super) fn range_query(request: v1::RangeRequest) -> RangeQuery {
    let v1::RangeRequest { tenant, collection, start, end, limit, .. } = request;
    let limit = match usize::try_from(limit) {
        Ok(limit @ 1..=MAX_RANGE_ITEMS) => limit,
        _ => MAX_RANGE_ITEMS,
    };
    let (tenant, collection, max_bytes) = (name(tenant), name(collection), MAX_RANGE_BYTES);
    RangeQuery { tenant, collection, start, end, limit, max_bytes }
}

pub(super) fn name(name: String) -> String {
    if name.is_empty() { DEFAULT_NAME.to_owned() } else { name }
}

pub(super) fn read_options(level: i32, freshness: Option<v1::Freshness>) -> Result<ReadOptions, v1::Failure> {
    let v1::Freshness { max_lag_ms, after_index, history } = freshness.unwrap_or_default();
    let level = match v1::ReadLevel::try_from(level) {
        Ok(v1::ReadLevel::Linearizable) => ReadLevel::Linearizable,
        Ok(v1::ReadLevel::Lease) => ReadLevel::Lease,
        Ok(v1::ReadLevel::Bounded) => ReadLevel::Bounded { max_lag_ms },
        Ok(v1::ReadLevel::Local) => ReadLevel::Local,
        // Never answer more weakly than was asked for.
        Err(_) => return Err(failure::invalid("this node does not know the read level asked for")),
    };
    Ok(ReadOptions { level, after_index, history: HistoryEpoch(history) })
}

fn write_options(options: Option<v1::WriteOptions>) -> Result<WriteOptions, v1::Failure> {
    let Some(options) = options else { return Ok(WriteOptions::default()) };
    let ack = match v1::AckLevel::try_from(options.ack) {
        Ok(v1::AckLevel::Quorum) => AckLevel::Quorum,
        Ok(v1::AckLevel::All) => AckLevel::All,
        Ok(v1::AckLevel::Leader) => AckLevel::Leader,
        // Never promise less than was asked for.
        Err(_) => {
            return Err(failure::invalid("this node does not know the acknowledgement level asked for"));
        }
    };
    let v1::WriteOptions { session, sequence, first_unanswered, .. } = options;
    let slot = match (session, sequence) {
        (0, 0) => None,
        (0, _) | (_, 0) => {
            return Err(failure::invalid("a session and a sequence belong together, each from 1"));
        }
        // 0: nothing was answered yet.
        _ if ack == AckLevel::Leader => {
            return Err(failure::invalid(
                "a write of a session cannot be acknowledged at level leader; choose another level, or no session",
            ));
        }
        _ => Some(SessionSlot { session, sequence, first_unanswered: first_unanswered.max(1) }),
    };
    let ack_timeout = match options.ack_timeout_ms {
        0 => DEFAULT_ACK_TIMEOUT,
        ack_timeout_ms => Duration::from_millis(ack_timeout_ms).min(MAX_ACK_TIMEOUT),
    };
    Ok(WriteOptions { slot, ack, ack_timeout, history: HistoryEpoch(options.history) })
}

/// What of a write is needed to answer it.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) method: Method,
    /// Of a transaction.
    keys: Option<Box<AskedKeys>>,
}

impl Asked {
    pub(super) fn new(method: Method, command: &KvCommand) -> Self {
        let keys = match command {
            KvCommand::Txn(txn) => Some(Box::new(txn::asked_keys(txn))),
            _ => None,
        };
        Self { method, keys }
    }
}

/// The response to a write, or its failure.
pub(super) fn written(
    by: &Answerer,
    asked: Asked,
    outcome: Result<Acknowledged<KvReply>, WriteError>,
) -> Result<Response, v1::Failure> {
    let outcome = outcome.map_err(|error| by.failure(error));
    let Acknowledged { log_id, reply, ack, held_by, repeated } = outcome?;
    let header = Some(v1::Header {
        node_id: by.node_id,
        position: Some(by.position(log_id)),
        ack: wire_ack(ack).into(),
        held_by,
        repeated_write: repeated,
    });
    let Some(reply) = reply else { return Ok(unapplied(asked.method, header, log_id.index)) };
    match reply {
        KvReply::Put { revision, create_revision, version } => {
            Ok(Response::Put(v1::PutResponse { header, revision, create_revision, version }))
        }
        KvReply::Deleted { existed, .. } => {
            Ok(Response::Delete(v1::DeleteResponse { header, deleted: existed }))
        }
        KvReply::DeletedRange { deleted, more, .. } => {
            Ok(Response::DeleteRange(v1::DeleteRangeResponse { header, deleted, more }))
        }
        KvReply::Txn { revision, succeeded, results } => {
            let keys = asked.keys.map(|keys| *keys).unwrap_or_default();
            let results = txn::results(revision, succeeded, results, keys);
            Ok(Response::Txn(v1::TxnResponse { header, revision, succeeded, results }))
        }
        KvReply::Rejected(rejection) => Err(rejection.into()),
        _ => Err(failure::unexpected(true)),
    }
}

/// The response to a write that is acknowledged before it is applied: where it stands, and nothing else.
fn unapplied(method: Method, header: Option<v1::Header>, revision: u64) -> Response {
    match method {
        Method::Delete => Response::Delete(v1::DeleteResponse { header, ..Default::default() }),
        Method::DeleteRange => {
            Response::DeleteRange(v1::DeleteRangeResponse { header, ..Default::default() })
        }
        Method::Txn => Response::Txn(v1::TxnResponse { header, revision, ..Default::default() }),
        _ => Response::Put(v1::PutResponse { header, revision, ..Default::default() }),
    }
}

fn wire_ack(ack: AckLevel) -> v1::AckLevel {
    match ack {
        AckLevel::Quorum => v1::AckLevel::Quorum,
        AckLevel::All => v1::AckLevel::All,
        AckLevel::Leader => v1::AckLevel::Leader,
    }
}

/// The response to a request for a session, or its failure.
pub(super) fn opened(
    by: &Answerer,
    ttl_ms: u64,
    outcome: Result<OpenedSession, WriteError>,
) -> Result<Response, v1::Failure> {
    let OpenedSession { session, log_id } = outcome?;
    Ok(Response::OpenSession(v1::OpenSessionResponse {
        header: Some(by.header(Some(log_id))),
        session,
        ttl_ms: granted_ttl_ms(ttl_ms),
        window: WINDOW,
    }))
}

/// The response to a session's end, or its failure.
pub(super) fn closed(
    by: &Answerer,
    outcome: Result<ClosedSession, WriteError>,
) -> Result<Response, v1::Failure> {
    Ok(Response::CloseSession(closed_session(by, outcome?)))
}

pub(super) fn closed_session(by: &Answerer, closed: ClosedSession) -> v1::CloseSessionResponse {
    let ClosedSession { log_id, was_open } = closed;
    v1::CloseSessionResponse { header: Some(by.header(Some(log_id))), was_open }
}

/// Open sessions, their times as wall clocks show them.
pub(super) fn sessions(by: &Answerer, list: SessionList) -> v1::ListSessionsResponse {
    let SessionList { applied, clock, sessions, more } = list;
    let next_after = sessions.last().filter(|_| more).map_or(0, |last| last.session);
    let info = |info: SessionInfo| v1::SessionInfo {
        session: info.session,
        opener: info.opener,
        opened_ms: clock.log_time_at(info.opened_ms),
        used_ms: clock.log_time_at(info.used_ms),
        expires_ms: clock.log_time_at(info.expires_ms),
        bytes: info.bytes as u64,
        unsettled: info.unsettled as u64,
    };
    let sessions = sessions.into_iter().map(info).collect();
    v1::ListSessionsResponse { header: Some(by.header(applied)), sessions, next_after }
}

/// The response to the read of `key` or, when that is not set, of a range; or its failure.
pub(super) fn answered(
    by: &Answerer,
    key: Option<bytes::Bytes>,
    outcome: Result<ReadOutcome<KvAnswer>, ReadError>,
) -> Result<Response, v1::Failure> {
    let ReadOutcome { applied, answer } = outcome?;
    let header = Some(by.header(applied));
    match answer {
        KvAnswer::Item(found) => {
            let item = found.map(|found| item(key.unwrap_or_default(), found));
            Ok(Response::Get(v1::GetResponse { header, item }))
        }
        KvAnswer::Range(range) => Ok(Response::Range(self::range(header, range))),
        KvAnswer::Rejected(rejection) => Err(rejection.into()),
        _ => Err(failure::unexpected(false)),
    }
}

pub(super) fn range(header: Option<v1::Header>, range: RangeAnswer) -> v1::RangeResponse {
    let items = range.items.into_iter().map(|(key, found)| item(key, found)).collect();
    v1::RangeResponse { header, items, next: range.next.unwrap_or_default() }
}

/// The key that a get asks for: its response repeats it.
pub(super) fn asked_key(query: &KvQuery) -> Option<bytes::Bytes> {
    match query {
        KvQuery::Get { key, .. } => Some(key.clone()),
        _ => None,
    }
}

pub(super) fn item(key: bytes::Bytes, item: Item) -> v1::Item {
    let Item { value, create_revision, mod_revision, version, expires_ms } = item;
    v1::Item { key, value, create_revision, mod_revision, version, expires_ms }
}

/// Whose word an answer is: a node, the history that it holds, and what it knows besides.
#[derive(Debug, Clone)]
pub(super) struct Answerer {
    pub(super) node_id: NodeId,
    pub(super) history: CurrentHistory,
    state: watch::Receiver<NodeState>,
}

impl Answerer {
    pub(super) fn of<N: KvNode>(node: &N) -> Self {
        Self { node_id: node.state().node_id, history: node.current_history(), state: node.watch() }
    }

    /// `failure`, with who leads if that is known.
    pub(super) fn told(&self, mut failure: v1::Failure) -> v1::Failure {
        told::name_leader(&mut failure, &self.state.borrow());
        failure
    }

    pub(super) fn header(&self, log_id: Option<LogId>) -> v1::Header {
        let position = log_id.map(|log_id| self.position(log_id));
        v1::Header { node_id: self.node_id, position, ..Default::default() }
    }

    pub(super) fn position(&self, log_id: LogId) -> v1::Position {
        v1::Position { history: self.history.epoch().0, ..position(log_id) }
    }

    /// What is answered to a write that failed: it may stand somewhere nevertheless.
    fn failure(&self, error: WriteError) -> v1::Failure {
        let mut failure = v1::Failure::from(error);
        if let Some(position) = &mut failure.position {
            position.history = self.history.epoch().0;
        }
        failure
    }
}

/// A position, of which history is not said yet.
pub(super) fn position(log_id: LogId) -> v1::Position {
    v1::Position { term: log_id.term, index: log_id.index, history: 0 }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::proto::v1::Reason;

    #[test]
    fn empty_names_mean_default() {
        let request = v1::DeleteRequest { collection: "c".into(), key: "k".into(), ..Default::default() };
        let expected =
            KvCommand::Delete { tenant: "default".into(), collection: "c".into(), key: "k".into() };
        assert_eq!(decode(Request::Delete(request)).unwrap(), Call::Write(expected, WriteOptions::default()));
    }

    #[test]
    fn limits_are_checked_at_the_door() {
        let put = |key: &[u8], value: usize| {
            let request = v1::PutRequest {
                key: Bytes::copy_from_slice(key),
                value: vec![0; value].into(),
                ..Default::default()
            };
            decode(Request::Put(request)).map(|_| ()).map_err(|failure| failure.reason())
        };
        assert_eq!(put(b"k", 1024 * 1024), Ok(()));
        assert_eq!(put(b"k", 1024 * 1024 + 1), Err(Reason::TooLarge));
        assert_eq!(put(b"", 0), Err(Reason::Invalid));
        let get = v1::GetRequest { key: "k".into(), level: 99, ..Default::default() };
        assert_eq!(decode(Request::Get(get)).unwrap_err().reason(), Reason::Invalid);
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        let decoded = |options| {
            let request = v1::DeleteRequest { key: "k".into(), options: Some(options), ..Default::default() };
            match decode(Request::Delete(request)) {
                Ok(Call::Write(_, options)) => Ok(options),
                Ok(other) => panic!("{other:?}"),
                Err(failure) => Err(failure.reason()),
            }
        };
        let slot = |session, sequence| v1::WriteOptions { session, sequence, ..Default::default() };
        assert_eq!(decoded(slot(0, 0)), Ok(WriteOptions::default()));
        let expected = SessionSlot { session: 5, sequence: 7, first_unanswered: 1 };
        assert_eq!(decoded(slot(5, 7)).unwrap().slot, Some(expected));
        assert_eq!(decoded(slot(0, 7)), Err(Reason::Invalid));
        assert_eq!(decoded(slot(5, 0)), Err(Reason::Invalid));
        assert_eq!(decoded(v1::WriteOptions { ack: 99, ..Default::default() }), Err(Reason::Invalid));
        let all = v1::WriteOptions { ack: 1, ack_timeout_ms: u64::MAX, ..Default::default() };
        let decoded = decoded(all).unwrap();
        assert_eq!((decoded.ack, decoded.ack_timeout), (AckLevel::All, MAX_ACK_TIMEOUT));
    }

    #[test]
    fn a_range_is_bounded_by_the_server() {
        for (asked, expected) in [(0, MAX_RANGE_ITEMS), (7, 7), (u32::MAX, MAX_RANGE_ITEMS)] {
            let request = v1::RangeRequest { limit: asked, ..Default::default() };
            let Ok(Call::Read(KvQuery::Range(query), options)) = decode(Request::Range(request)) else {
                panic!("not a range")
            };
            assert_eq!(options.level, ReadLevel::Linearizable);
            assert_eq!((query.limit, query.max_bytes), (expected, MAX_RANGE_BYTES));
        }
    }
}
