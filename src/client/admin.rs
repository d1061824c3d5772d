//! Operating the cluster through the client: members, leadership, snapshots.
//!
//! What the leader must do is sent to whoever leads, found first by asking for its status: so a node that cannot be
//! reached costs no attempt. A change is sent once. When its answer is lost the caller is told so, and may repeat it:
//! the server completes what was begun.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout_at};
use tonic::{Code, Response, Status};

use super::Client;
use super::attempt::{backoff, describe, is_unconnected};
use super::endpoint::Endpoint;
use super::error::ClientError;
use super::judge;
use super::link::Link;
use super::member_change::{MemberChange, send};
use super::node::NoStatus;
use super::router::Hint;
use super::token::NodeChannel;
use crate::call::{decode_leader, decode_position};
use crate::proto::details;
use crate::proto::v1::{self, admin_client::AdminClient};
use crate::reason::Reason;
use crate::report::{MemberList, NodeReport};
use crate::types::{Leader, LogId, NodeId};

/// How long a node may take to say whether it leads.
const ASK_TIMEOUT: Duration = Duration::from_secs(1);

/// The longest that nodes wait for a learner to catch up, however long it was given.
const MOST_CATCH_UP: Duration = Duration::from_secs(24 * 60 * 60);

/// A setting of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeSetting {
    /// Its name in the configuration file.
    pub name: String,
    /// Its present value.
    pub value: String,
    /// Whether it can change while the node runs; else it takes effect when the node is started.
    pub changeable: bool,
}

/// An open session.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SessionInfo {
    /// Its id.
    pub session: u64,
    /// `host:port` of the connection that opened it; empty if that is not known.
    pub opener: String,
    /// When it was opened, in milliseconds since the Unix epoch.
    pub opened_ms: u64,
    /// When it was last used.
    pub used_ms: u64,
    /// From when on it is closed, unless it is used.
    pub expires_ms: u64,
    /// What its kept answers take.
    pub bytes: u64,
    /// Writes that were answered, and of whose answers its client has not said yet that it has them.
    pub unsettled: u64,
}

/// Some of the open sessions.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SessionPage {
    /// In the order of their ids.
    pub sessions: Vec<SessionInfo>,
    /// Where to go on; `None` when that is all.
    pub next_after: Option<u64>,
}

impl MemberChange {
    /// How long it may rightly take beside what every operation takes.
    fn catch_up(&self) -> Duration {
        match self {
            Self::Add { promote: true, catch_up, .. }
            | Self::Promote { catch_up, .. }
            | Self::Replace { catch_up, .. } => (*catch_up).min(MOST_CATCH_UP),
            Self::Add { .. } | Self::Demote { .. } | Self::Remove { .. } | Self::Update { .. } => {
                Duration::ZERO
            }
        }
    }
}

/// What a call does to the cluster: what is unknown when its answer does not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// Nothing that its caller has to know of.
    None,
    /// It may be made although nobody has said so.
    Change,
}

/// What a node that was asked says of the lead.
enum Standing {
    Leads,
    /// Another does, and is asked next.
    Elsewhere,
    /// None that could be asked next.
    Unknown(String),
    /// There was too little time left for an answer.
    NotAsked,
    /// This client is told nothing there.
    Unwelcome(v1::Failure),
}

/// Why a call has neither an answer nor an error.
enum Again {
    /// The node does not lead.
    NotLeader(v1::Failure),
    /// There is no connection, so nothing was sent.
    NotSent(Arc<str>),
}

impl Client {
    /// Who belongs to the cluster, according to its leader.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn members(&self) -> Result<MemberList, ClientError> {
        let call = |mut admin: AdminClient<NodeChannel>| async move {
            admin.member_list(v1::MemberListRequest {}).await
        };
        let (list, _) = self.on_leader(Duration::ZERO, Effect::None, call).await?;
        Ok(MemberList::decode(list))
    }

    /// Makes `change`, and returns the membership after it.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::maybe_applied`] says whether the change may have been made, all or half.
    /// Repeating it completes it; what is already as it is to be, the absence of who is removed included, stays so.
    pub async fn change_members(&self, change: MemberChange) -> Result<MemberList, ClientError> {
        let (deadline, extra) = (self.deadline(), change.catch_up());
        // The node is told how long it is waited for: it proposes nothing after that, if it has not before, and says so.
        let left = || (deadline + extra).saturating_duration_since(Instant::now());
        let call = |admin: AdminClient<NodeChannel>| send(admin, change.clone(), left());
        let (changed, leader) = self.on_leader_by(deadline, extra, Effect::Change, call).await?;
        Ok(MemberList { leader, ..MemberList::decode_changed(changed) })
    }

    /// Hands the lead to `to`, or to whoever is furthest ahead, and returns who leads then.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn transfer_leader(&self, to: Option<NodeId>) -> Result<NodeId, ClientError> {
        let request = v1::TransferLeaderRequest { to_node: to.unwrap_or(0) };
        let call = |mut admin: AdminClient<NodeChannel>| async move {
            let answer = admin.transfer_leader(request).await?.into_inner();
            told("who leads now", true, answer.leader.filter(|leader| leader.node_id != 0))
        };
        let (leader, before) = self.on_leader(Duration::ZERO, Effect::Change, call).await?;
        let leader = decode_leader(leader);
        if before.map(|before| before.node_id) != Some(leader.node_id)
            && let Some(link) = self.router.leader()
        {
            self.router.lost_leader(&link.node.endpoint);
        }
        self.router.note_named(Some(&leader));
        Ok(leader.node_id)
    }

    /// The open sessions with ids above `after`, at most `limit`, or as many as the server gives at a time if that is 0.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn list_sessions(&self, after: u64, limit: u32) -> Result<SessionPage, ClientError> {
        self.list_sessions_by(self.deadline(), after, limit).await
    }

    /// When what begins now is over.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.router.config.timeout
    }

    /// [`list_sessions`](Self::list_sessions), of which several share the time of one operation.
    pub(crate) async fn list_sessions_by(
        &self,
        deadline: Instant,
        after: u64,
        limit: u32,
    ) -> Result<SessionPage, ClientError> {
        let request = v1::ListSessionsRequest { after, limit };
        let call = |mut admin: AdminClient<NodeChannel>| async move { admin.list_sessions(request).await };
        let (list, _) = self.on_leader_by(deadline, Duration::ZERO, Effect::None, call).await?;
        let info = |info: v1::SessionInfo| {
            let v1::SessionInfo { session, opener, opened_ms, used_ms, expires_ms, bytes, unsettled } = info;
            SessionInfo { session, opener, opened_ms, used_ms, expires_ms, bytes, unsettled }
        };
        let next_after = Some(list.next_after).filter(|after| *after != 0);
        Ok(SessionPage { sessions: list.sessions.into_iter().map(info).collect(), next_after })
    }

    /// Closes a session, whoever opened it. Tells whether it was open.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn close_session(&self, session: u64) -> Result<bool, ClientError> {
        let request = v1::CloseSessionRequest { session, ..Default::default() };
        let call = |mut admin: AdminClient<NodeChannel>| async move { admin.close_session(request).await };
        let (closed, _) = self.on_leader(Duration::ZERO, Effect::Change, call).await?;
        Ok(closed.was_open)
    }

    /// Takes a snapshot on the node at `endpoint`, or on the leader, and returns what it covers.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn take_snapshot(&self, endpoint: Option<&Endpoint>) -> Result<LogId, ClientError> {
        let call = |mut admin: AdminClient<NodeChannel>| async move {
            let answer = admin.snapshot(v1::SnapshotRequest {}).await?.into_inner();
            told("what the snapshot covers", false, answer.position)
        };
        Ok(decode_position(self.on_node(endpoint, Effect::None, call).await?))
    }

    /// Changes settings of the node at `endpoint`, or of the leader, all or none, and returns all that it has, with their
    /// values after that. With no `settings` it changes nothing.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn configure(
        &self,
        endpoint: Option<&Endpoint>,
        settings: &[(String, String)],
    ) -> Result<Vec<NodeSetting>, ClientError> {
        let setting = |(name, value): &(String, String)| v1::Setting {
            name: name.clone(),
            value: value.clone(),
            ..Default::default()
        };
        let request = v1::ConfigureRequest { settings: settings.iter().map(setting).collect() };
        let call = |mut admin: AdminClient<NodeChannel>| {
            let request = request.clone();
            async move { admin.configure(request).await }
        };
        let effect = if settings.is_empty() { Effect::None } else { Effect::Change };
        let answer = self.on_node(endpoint, effect, call).await?;
        let setting = |v1::Setting { name, value, changeable }| NodeSetting { name, value, changeable };
        Ok(answer.settings.into_iter().map(setting).collect())
    }

    /// Calls the node at `endpoint`, or whoever leads, within the client's timeout.
    async fn on_node<T, F>(
        &self,
        endpoint: Option<&Endpoint>,
        effect: Effect,
        call: impl Fn(AdminClient<NodeChannel>) -> F,
    ) -> Result<T, ClientError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let Some(endpoint) = endpoint else {
            return Ok(self.on_leader(Duration::ZERO, effect, call).await?.0);
        };
        let link = self.router.at(endpoint);
        let (config, deadline) = (&self.router.config, self.deadline());
        let unreached = |why: Arc<str>| ClientError::Unavailable {
            tried: vec![(link.node.endpoint.clone(), why.to_string())],
        };
        // Asked first whether it is there: so nothing has been sent to a port at which nobody answers.
        let mut met = None;
        for attempt in 0.. {
            let left = deadline.saturating_duration_since(Instant::now());
            match link.node.status(left.min(config.connect_timeout + ASK_TIMEOUT)).await {
                Ok(status) => {
                    self.router.heard(&link.node, &status);
                    break;
                }
                // It is the same at the next attempt.
                Err(NoStatus::Refused(failure)) if judge::is_unwelcome(&failure) => {
                    return Err(refused(&link, failure));
                }
                Err(NoStatus::Refused(failure)) => met = Some(format!("{endpoint}: {}", failure.message)),
                // What was met before tells more than what it does not answer in next to no time.
                Err(NoStatus::Unanswered(_)) if met.is_some() => {}
                Err(NoStatus::Unanswered(why)) => return Err(unreached(why)),
            }
            let pause = backoff(config.retry_backoff_min, config.retry_backoff_max, attempt);
            sleep_until(deadline.min(Instant::now() + pause)).await;
            if Instant::now() >= deadline {
                return Err(self.out_of_time(met));
            }
        }
        let answered = timeout_at(deadline, call(AdminClient::new(link.node.channel()))).await;
        self.judge(&link, effect, config.timeout, answered.map_err(|_| ()))?.map_err(|again| match again {
            Again::NotLeader(failure) => refused(&link, failure),
            Again::NotSent(why) => unreached(why),
        })
    }

    fn out_of_time(&self, last: Option<String>) -> ClientError {
        ClientError::DeadlineExceeded { timeout: self.router.config.timeout, maybe_applied: false, last }
    }

    /// Calls whoever leads, within the client's timeout and `extra`. Returns the answer, and who gave it.
    async fn on_leader<T, F>(
        &self,
        extra: Duration,
        effect: Effect,
        call: impl Fn(AdminClient<NodeChannel>) -> F,
    ) -> Result<(T, Option<Leader>), ClientError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.on_leader_by(self.deadline(), extra, effect, call).await
    }

    /// The same, of a call that shares its time with others.
    async fn on_leader_by<T, F>(
        &self,
        deadline: Instant,
        extra: Duration,
        effect: Effect,
        call: impl Fn(AdminClient<NodeChannel>) -> F,
    ) -> Result<(T, Option<Leader>), ClientError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let (router, config) = (&self.router, &self.router.config);
        let begun = Instant::now();
        let mut last = None;
        for attempt in 0.. {
            let link = router.leader_or_next();
            match self.leads(&link, deadline).await {
                Standing::Leads => {
                    let answered = timeout_at(deadline + extra, call(AdminClient::new(link.node.channel())));
                    let patience = config.timeout + extra;
                    match self.judge(&link, effect, patience, answered.await.map_err(|_| ()))? {
                        Ok(answer) => {
                            let client = || link.node.endpoint.to_string();
                            let led = |node_id| Leader { node_id, client: client() };
                            return Ok((answer, link.node.node_id().map(led)));
                        }
                        Err(Again::NotSent(why)) => {
                            link.node.set_down(why.clone());
                            router.lost_leader(&link.node.endpoint);
                            router.hunt();
                            last = Some(format!("{}: {why}", link.node.endpoint));
                        }
                        Err(Again::NotLeader(failure)) => {
                            let hint = failure.leader.map(decode_leader);
                            let unreached = self.follow(&link.node.endpoint, hint.as_ref(), deadline).await;
                            last = unreached.or(Some(failure.message));
                        }
                    }
                }
                // What was met before tells more than that.
                Standing::Elsewhere | Standing::NotAsked => {}
                Standing::Unknown(why) => last = Some(why),
                Standing::Unwelcome(failure) => return Err(refused(&link, failure)),
            }
            if let Some(tried) = router.all_down()
                && begun.elapsed() >= config.unavailable_after
            {
                return Err(ClientError::Unavailable { tried });
            }
            let pause = backoff(config.retry_backoff_min, config.retry_backoff_max, attempt);
            sleep_until(deadline.min(Instant::now() + pause)).await;
            if Instant::now() >= deadline {
                break;
            }
        }
        match router.all_down().or_else(|| router.unheard()) {
            Some(tried) => Err(ClientError::Unavailable { tried }),
            None => Err(self.out_of_time(last)),
        }
    }

    /// What the node says of the lead. Learns from that.
    async fn leads(&self, link: &Link, deadline: Instant) -> Standing {
        let left = deadline.saturating_duration_since(Instant::now());
        // Whoever has answered once is not called unreachable for what it does not answer in next to no time.
        if left < ASK_TIMEOUT && link.node.has_answered() {
            return match timeout_at(deadline, link.node.status(ASK_TIMEOUT)).await {
                Ok(answer) => self.weigh(link, answer, deadline).await,
                Err(_) => Standing::NotAsked,
            };
        }
        let answer = link.node.status(ASK_TIMEOUT.min(left)).await;
        self.weigh(link, answer, deadline).await
    }

    async fn weigh(&self, link: &Link, answer: Result<NodeReport, NoStatus>, deadline: Instant) -> Standing {
        let (router, endpoint) = (&self.router, &link.node.endpoint);
        match answer {
            Ok(status) => {
                link.node.set_up();
                router.heard(&link.node, &status);
                if status.leads() {
                    return Standing::Leads;
                }
                router.lost_leader(endpoint);
                if status.leader.is_none() {
                    router.hunt();
                    return Standing::Unknown(format!("{endpoint}: node {} knows no leader", status.node_id));
                }
                match self.follow(endpoint, status.leader.as_ref(), deadline).await {
                    Some(unreached) => Standing::Unknown(unreached),
                    None => Standing::Elsewhere,
                }
            }
            Err(failed) => {
                router.lost_leader(endpoint);
                let why = match failed {
                    NoStatus::Refused(failure) if judge::is_unwelcome(&failure) => {
                        return Standing::Unwelcome(failure);
                    }
                    // It is there: whoever has time left waits for it.
                    NoStatus::Refused(failure) => failure.message.as_str().into(),
                    NoStatus::Unanswered(why) => {
                        link.node.set_down(why.clone());
                        why
                    }
                };
                router.hunt();
                Standing::Unknown(format!("{endpoint}: {why}"))
            }
        }
    }

    /// Goes on at the leader that the node at `from` has named, or looks for another. Returns which one is not reached.
    async fn follow(&self, from: &Endpoint, hint: Option<&Leader>, deadline: Instant) -> Option<String> {
        let router = &self.router;
        let hinted = match hint {
            Some(hint) => timeout_at(deadline, router.hinted(from, hint)).await.unwrap_or(Hint::Useless),
            None => Hint::Useless,
        };
        if hinted == Hint::Followed {
            return None;
        }
        router.lost_leader(from);
        router.hunt();
        match hinted {
            Hint::Unreached(which) => Some(which),
            Hint::Useless | Hint::Followed => None,
        }
    }

    /// What came of a call that had `patience`: an answer, a refusal to be followed elsewhere, or an error.
    fn judge<T>(
        &self,
        link: &Link,
        effect: Effect,
        patience: Duration,
        answered: Result<Result<Response<T>, Status>, ()>,
    ) -> Result<Result<T, Again>, ClientError> {
        let undecided = effect == Effect::Change;
        let unanswered = || ClientError::DeadlineExceeded {
            timeout: patience,
            maybe_applied: undecided,
            last: Some(format!("{}: no answer in time", link.node.endpoint)),
        };
        let status = match answered {
            Ok(Ok(answer)) => return Ok(Ok(answer.into_inner())),
            Ok(Err(status)) => status,
            Err(()) => return Err(unanswered()),
        };
        let failure = details::failure(status.details());
        if let Some(failure) = &failure {
            self.router.note_failure(failure);
        }
        match failure {
            Some(failure) if failure.reason() == Reason::NotLeader => Ok(Err(Again::NotLeader(failure))),
            Some(failure) => Err(refused(link, failure)),
            // Nobody that knows our failures has answered: the connection broke, or the server is an older one.
            None if is_unconnected(&status) => Ok(Err(Again::NotSent(describe(&status)))),
            None if status.code() == Code::Unimplemented => {
                let message = "the node does not know this call: it is of an older version".to_owned();
                Err(failed(link, Reason::Unspecified, message, false))
            }
            // The transport looks after the time that a node is given, too.
            None if matches!(status.code(), Code::Cancelled | Code::DeadlineExceeded) => Err(unanswered()),
            None => {
                let message = format!("the connection was lost: {}", describe(&status));
                Err(failed(link, Reason::Interrupted, message, undecided))
            }
        }
    }
}

/// What an answer must tell. One without it is none.
fn told<T>(what: &str, maybe_applied: bool, field: Option<T>) -> Result<Response<T>, Status> {
    let absent = || {
        let message = format!("the node has answered without {what}: it is of another version, or no node");
        let failure = v1::Failure { message: message.clone(), maybe_applied, ..Default::default() };
        Status::with_details(Code::Unknown, message, details::of_failure(&failure))
    };
    field.map(Response::new).ok_or_else(absent)
}

fn failed(link: &Link, reason: Reason, message: String, maybe_applied: bool) -> ClientError {
    ClientError::Failed { endpoint: link.node.endpoint.clone(), reason, message, maybe_applied }
}

fn refused(link: &Link, failure: v1::Failure) -> ClientError {
    failed(link, failure.reason(), failure.message, failure.maybe_applied)
}
