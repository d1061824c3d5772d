//! Single questions about what was applied.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::time::{Instant, timeout_at};

use super::super::Client;
use super::super::attempt::Kind;
use super::super::endpoint::Endpoint;
use super::super::error::ClientError;
use super::super::following::{earliest, is_about_history};
use super::super::judge::{Case, Failure, Verdict, failed, in_time, in_words, judge};
use super::super::link::Link;
use super::super::operation::Operation;
use super::options::EntryFilter;
use super::{FollowedEntry, replication};
use crate::proto::replication::{EntriesRequest, EntriesResponse, StatusRequest, StatusResponse};
use crate::reason::Reason;
use crate::types::{Bookmark, HistoryEpoch, NodeId};

/// Some of the entries after a position.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct EntriesPage {
    /// In order.
    pub entries: Vec<FollowedEntry>,
    /// Everything up to here that was asked for is in `entries`: what to ask after next.
    pub upto: Bookmark,
    /// Whether there is more.
    pub more: bool,
}

/// What a node can send to followers.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct ReplicationStatus {
    /// The node.
    pub node_id: NodeId,
    /// `leader`, `follower`, `candidate` or `learner`; `replica` if it is no member.
    pub role: String,
    /// Whether it has a leader and is not behind it for long.
    pub healthy: bool,
    /// The first position that it can send.
    pub first_seq: u64,
    /// The last position that it has applied, and the history that positions belong to.
    pub current: Bookmark,
    /// What the cluster has committed, as far as it knows.
    pub committed_seq: u64,
    /// The cluster's clock at `current`, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// `host:port` of the leader's client port, if one is known.
    pub leader: Option<String>,
    /// How many follow this node at present.
    pub subscribers: u32,
}

impl ReplicationStatus {
    fn decode(message: StatusResponse) -> Self {
        let history = HistoryEpoch(message.history);
        Self {
            node_id: message.node_id,
            role: message.role,
            healthy: message.healthy,
            first_seq: message.first_seq,
            current: Bookmark { index: message.current_seq, history },
            committed_seq: message.committed_seq,
            time_ms: message.time_ms,
            leader: Some(message.leader).filter(|leader| !leader.is_empty()),
            subscribers: message.subscribers,
        }
    }
}

impl Client {
    /// The entries after a position, of `limit` positions at most (0: 1 000) and 3 MiB. Where one node does not have them any more
    /// the others are asked.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::Compacted`] when no node has what comes next.
    pub async fn entries_after(
        &self,
        after: impl Into<Bookmark>,
        limit: u32,
        filters: &[EntryFilter],
    ) -> Result<EntriesPage, ClientError> {
        let after: Bookmark = after.into();
        let request = EntriesRequest {
            after_seq: after.index,
            limit,
            history: after.history.0,
            filters: filters.iter().map(EntryFilter::encode).collect(),
        };
        let preference = self.preference.as_ref();
        let mut operation = Operation::new(&self.router, Kind::Anywhere, preference, Instant::now());
        let mut refusals: BTreeMap<Endpoint, ClientError> = BTreeMap::new();
        self.router.watch_health();
        loop {
            let unasked =
                || self.router.find(|node| !refusals.contains_key(&node.endpoint) && node.is_usable());
            let link = if refusals.is_empty() {
                operation.link()
            } else {
                unasked().unwrap_or_else(|| operation.link())
            };
            let failure = match look(&link, request.clone(), operation.patience_ends(Instant::now())).await {
                Ok(answer) => return page(&link, after, answer),
                Err(failure) => failure,
            };
            let case = Case { kind: Kind::Anywhere, in_session: false, undecided: false };
            match judge(case, &link.node.endpoint, &failure) {
                Verdict::Return(error) if is_about_history(&error) => {
                    refusals.insert(link.node.endpoint.clone(), error);
                }
                _ if refusals.is_empty() => {
                    operation.after(&link, failure).await?;
                    continue;
                }
                // The others have said what there is.
                _ => drop(refusals.insert(link.node.endpoint.clone(), unanswered(&link, &failure))),
            }
            if self.router.find(|node| !refusals.contains_key(&node.endpoint) && node.is_usable()).is_none() {
                let refused = refusals.values().filter(|error| is_about_history(error));
                return Err(earliest(refused).expect("invariant: one has refused").clone());
            }
        }
    }

    /// What the node at `endpoint` can send to followers. Asks once.
    ///
    /// # Errors
    /// [`ClientError::Unavailable`] when it does not answer in time; others see [`ClientError`].
    pub async fn replication_status(&self, endpoint: &Endpoint) -> Result<ReplicationStatus, ClientError> {
        self.ask_status(endpoint, StatusRequest::default()).await.map(ReplicationStatus::decode)
    }

    /// A position that includes every write acknowledged before this call, as a leader has confirmed it.
    ///
    /// # Errors
    /// That of the last node that was asked: none could say.
    pub(crate) async fn present(&self) -> Result<Bookmark, ClientError> {
        let mut last = ClientError::Unavailable { tried: Vec::new() };
        let usable = |endpoint: &Endpoint| self.router.at(endpoint).node.is_usable();
        let (first, then): (Vec<_>, Vec<_>) = self.endpoints().into_iter().partition(usable);
        for endpoint in first.into_iter().chain(then) {
            match self.ask_status(&endpoint, StatusRequest { present: true }).await {
                Ok(status) => {
                    let history = HistoryEpoch(status.history);
                    return Ok(Bookmark { index: status.present_seq, history });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    async fn ask_status(
        &self,
        endpoint: &Endpoint,
        request: StatusRequest,
    ) -> Result<StatusResponse, ClientError> {
        let config = &self.router.config;
        let expires = Instant::now() + config.timeout.min(config.connect_timeout + config.attempt_timeout);
        let link = self.router.at(endpoint);
        let mut client = replication(&link);
        let asking = timeout_at(expires, client.get_status(request));
        match link.node.counted(in_time(asking)).await {
            Ok(answer) => Ok(answer.into_inner()),
            Err(failure @ Failure::Attempt(_)) => {
                Err(ClientError::Unavailable { tried: vec![(endpoint.clone(), in_words(&failure))] })
            }
            Err(failure @ Failure::Answered(_)) => Err(unanswered(&link, &failure)),
        }
    }
}

async fn look(
    link: &Arc<Link>,
    request: EntriesRequest,
    expires: Instant,
) -> Result<EntriesResponse, Failure> {
    let mut client = replication(link);
    let asking = timeout_at(expires, client.get_entries_after(request));
    link.node.counted(in_time(asking)).await.map(tonic::Response::into_inner)
}

pub(super) fn unanswered(link: &Link, failure: &Failure) -> ClientError {
    let reason = failure.reason().unwrap_or(Reason::Interrupted);
    failed(&link.node.endpoint, reason, in_words(failure), false)
}

fn page(link: &Link, after: Bookmark, answer: EntriesResponse) -> Result<EntriesPage, ClientError> {
    let unusable = |why: String| {
        let message = format!("what the node answers cannot be used: {why}");
        failed(&link.node.endpoint, Reason::Interrupted, message, false)
    };
    let EntriesResponse { entries, upto_seq, more, history } = answer;
    let entries: Vec<_> =
        entries.into_iter().map(FollowedEntry::decode).collect::<Result<_, _>>().map_err(unusable)?;
    let grows = entries.is_sorted_by_key(|entry| entry.seq);
    // What exceeds an answer by itself is divided, and its position is not complete.
    let last = if more { upto_seq.saturating_add(1) } else { upto_seq };
    let is_within = |entry: &FollowedEntry| entry.seq > after.index && entry.seq <= last;
    let gets_on = upto_seq > after.index || !entries.is_empty() || !more;
    if !grows || !entries.iter().all(is_within) || upto_seq < after.index || !gets_on {
        return Err(unusable(format!(
            "entries after {} up to {upto_seq} that are not in order",
            after.index
        )));
    }
    let history = if history == 0 { after.history } else { HistoryEpoch(history) };
    Ok(EntriesPage { entries, upto: Bookmark { index: upto_seq, history }, more })
}
