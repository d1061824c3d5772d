//! `Kv.Watch`: what happens to a range of keys, from a revision on.
//!
//! A watch reads the machine's history, on whichever node it is asked: every node has the same. It does so when its
//! client can be sent something, and keeps nothing meanwhile: a client that does not read costs its place and no more, and
//! goes on where it was when it reads again, or learns that the history does not reach back that far any more.
//!
//! All watches of a node look at the same states, taken for all of them and not too often ([`WatchedStates`]): while a state is looked
//! at, the machine has to copy what it changes.
//!
//! The events of one revision come in one message. Only when they alone are more than a message takes, as when one command
//! removes thousands of keys, are they told in pieces; where to go on after a break stays the same until the last piece.
//!
//! The protocol, with a figure: `docs/design/watching.md`.

use std::time::Duration;

use futures::stream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::{KvNode, failure};
use crate::call::Rejected;
use crate::door::Answerer;
use crate::door::failure::stopped;
use crate::door::metrics::{OpenCall, StreamCall};
use crate::door::streams::{Responses, WatchPlace};
use crate::engine::{NodeState, ReadOutcome};
use crate::kv::api::Scope;
use crate::kv::machine::{EventsAnswer, EventsQuery, KvAnswer, KvQuery};
use crate::kv::{calls, codec};
use crate::proto::v1::{self, Failure};
use crate::runtime;
use crate::types::{Bookmark, HistoryEpoch, LogId, ReadLevel, ReadOptions, Role};

/// Most events in one message; those of one revision are split only when they alone are more.
const MESSAGE_EVENTS: usize = 1_000;
/// Most bytes of keys and values in one message; one event may exceed it.
const MESSAGE_BYTES: usize = 1024 * 1024;
/// How often a watch on which nothing happens tells how far it is.
const PROGRESS: Duration = Duration::from_secs(5);
/// A new state is looked at this often at most: events that come closer together go into one message.
const PACE: Duration = Duration::from_millis(2);
/// The more watches look at it the less often: by so much for each of them, up to the slowest pace.
const PACE_BY_WATCH: Duration = Duration::from_micros(20);
const SLOWEST_PACE: Duration = Duration::from_millis(100);

/// The states that all watches of a node look at.
///
/// They are taken by a task of their own. A watch goes on only while its client takes what it is sent: if it had anything
/// that the others wait for, they would wait for that client.
#[derive(Debug, Clone, Default)]
pub(super) struct WatchedStates {
    last: watch::Sender<TakenState>,
}

/// The last state that was taken.
#[derive(Debug, Clone, Default)]
struct TakenState {
    at: Option<Instant>,
    /// Why there was none then.
    failure: Option<Failure>,
    /// Whether another one is being taken.
    taking: bool,
}

impl WatchedStates {
    /// Answers from a state that was taken after `since`, when that is not too soon after the last one.
    async fn read<N: KvNode>(
        &self,
        node: &N,
        query: KvQuery,
        mut since: Instant,
        watches: usize,
    ) -> Result<ReadOutcome<KvAnswer>, Failure> {
        let mut last = self.last.subscribe();
        loop {
            let TakenState { at, failure, taking } = last.borrow_and_update().clone();
            if at.is_some_and(|at| at >= since) {
                match failure {
                    Some(failure) => return Err(failure),
                    None => match read_last(node, query.clone()) {
                        Some(outcome) => return Ok(outcome),
                        // The node has let go of that state. Another one is taken in its turn.
                        None => since = Instant::now(),
                    },
                }
            }
            if !taking {
                self.take(node.clone(), watches);
            }
            // The sender is here.
            let _ = last.changed().await;
        }
    }

    /// Takes another state when it is time to, unless one is being taken.
    fn take<N: KvNode>(&self, node: N, watches: usize) {
        let mut begins = false;
        self.last.send_if_modified(|last| {
            begins = !std::mem::replace(&mut last.taking, true);
            false
        });
        if !begins {
            return;
        }
        let feed = self.clone();
        runtime::spawn(async move {
            let before = feed.last.borrow().at;
            if let Some(before) = before {
                let watches = u32::try_from(watches).unwrap_or(u32::MAX);
                sleep_until(before + PACE_BY_WATCH.saturating_mul(watches).clamp(PACE, SLOWEST_PACE)).await;
            }
            let now = Instant::now();
            let failure = node.view(ReadLevel::Local.into()).await.err().map(Failure::from);
            feed.last.send_replace(TakenState { at: Some(now), failure, taking: false });
        });
    }
}

/// With times as clients see them.
fn read_last<N: KvNode>(node: &N, query: KvQuery) -> Option<ReadOutcome<KvAnswer>> {
    let mut outcome = node.read_last(query)?;
    outcome.answer.map_expiry(|expires_ms| node.log_time_at(expires_ms));
    Some(outcome)
}

/// Starts to watch what `request` asks for.
///
/// # Errors
/// The failure to answer instead.
pub(super) async fn watch<N: KvNode>(
    node: N,
    by: Answerer,
    draining: watch::Receiver<bool>,
    feed: WatchedStates,
    request: v1::WatchRequest,
    place: Result<WatchPlace, Failure>,
    call: StreamCall,
) -> Result<Responses<v1::WatchResponse>, Failure> {
    let prepare = async {
        let place = place?;
        Ok((events_query(&node, request).await?, place))
    };
    let ((query, place), open) = call.open(prepare.await)?;
    let state = node.watch();
    let since = Instant::now();
    let watching =
        ServedWatch { node, by, draining, state, feed, since, query, told: None, open: Some(open), place };
    Ok(Box::pin(stream::unfold(Some(watching), |watching| async {
        let mut watching = watching?;
        match watching.next().await {
            Ok(message) => message.map(|message| (Ok(message), Some(watching))),
            Err(failure) => {
                watching.ended(&Err(failure.clone()));
                Some((Err(failure.into()), None))
            }
        }
    })))
}

/// Refuses a revision that is of another history, or that the cluster has not got to.
async fn check_beginning<N: KvNode>(node: &N, from: Bookmark) -> Result<(), Failure> {
    // What is watched from may be the next revision: that of the entry before it must be there.
    let before = Bookmark { index: from.index.saturating_sub(1), ..from };
    let applied = node.state().applied.map_or(0, |applied| applied.index);
    let level = if before.index <= applied { ReadLevel::Local } else { ReadLevel::Linearizable };
    node.view(ReadOptions::from(level).after(before)).await?;
    Ok(())
}

async fn events_query<N: KvNode>(node: &N, request: v1::WatchRequest) -> Result<EventsQuery, Failure> {
    let v1::WatchRequest { tenant, collection, start, end, from_revision, history } = request;
    let (tenant, collection) = calls::names(Scope { tenant, collection });
    let query = EventsQuery {
        tenant,
        collection,
        start,
        end,
        from_revision,
        limit: MESSAGE_EVENTS,
        max_bytes: MESSAGE_BYTES,
        split: Some(0),
    };
    KvQuery::Events(query.clone()).check().map_err(Rejected::from)?;
    check_beginning(node, Bookmark { index: from_revision, history: HistoryEpoch(history) }).await?;
    match from_revision {
        // Known before the caller is answered, who may write next and wait for that. This node's own position would not
        // do: one that is catching up is far behind, and would tell what is long past.
        0 => Ok(EventsQuery { from_revision: node.present().await? + 1, ..query }),
        _ => Ok(query),
    }
}

/// A watch between two messages.
struct ServedWatch<N> {
    node: N,
    by: Answerer,
    draining: watch::Receiver<bool>,
    state: watch::Receiver<NodeState>,
    feed: WatchedStates,
    /// There may be something new in a state that was taken after this.
    since: Instant,
    /// What to ask for next.
    query: EventsQuery,
    /// When something was last told.
    told: Option<Instant>,
    open: Option<OpenCall>,
    place: WatchPlace,
}

impl<N: KvNode> ServedWatch<N> {
    /// The next message; none when the node is gone.
    async fn next(&mut self) -> Result<Option<v1::WatchResponse>, Failure> {
        loop {
            self.check_state()?;
            let query = KvQuery::Events(self.query.clone());
            let watches = self.place.of_all();
            let outcome = self.feed.read(&self.node, query, self.since, watches).await?;
            let applied = outcome.applied;
            let mut answer = match outcome.answer {
                KvAnswer::Events(events) => events,
                KvAnswer::Compacted { first_revision } => {
                    return Err(failure::compacted(self.query.from_revision, first_revision));
                }
                other => unreachable!("invariant: events are answered with events, not {other:?}"),
            };
            if answer.complete {
                // What is applied beyond the last command, such as a new leader's first entry, changes nothing.
                let after = applied.map_or(0, |applied| applied.index + 1);
                answer.next_revision = answer.next_revision.max(after);
            }
            let complete = answer.complete;
            (self.query.from_revision, self.query.split) = (answer.next_revision, Some(answer.told));
            let (found, overdue) =
                (!answer.events.is_empty(), self.told.is_none_or(|at| at.elapsed() >= PROGRESS));
            if complete && found {
                // What else there is may have come meanwhile.
                self.since = Instant::now();
            }
            if found || overdue {
                self.told = Some(Instant::now());
                return Ok(Some(response(&self.by, applied, answer)));
            }
            if !complete {
                // The scan of the history is bounded; go on with it.
                tokio::task::yield_now().await;
                continue;
            }
            if !self.changed().await? {
                return Ok(None);
            }
            self.since = Instant::now();
        }
    }

    fn check_state(&mut self) -> Result<(), Failure> {
        // What has changed by now must be in the state that is looked at next. An error means that the node is gone.
        if self.state.has_changed().unwrap_or(true) {
            self.since = Instant::now();
        }
        let state = self.state.borrow_and_update();
        if state.role != Role::Stopped {
            return Ok(());
        }
        let fatal = state.fatal.as_ref().map(ToString::to_string);
        Err(stopped(fatal.unwrap_or_else(|| "the node is shutting down".to_owned())))
    }

    /// Waits until there may be something to tell. False when the node is gone.
    async fn changed(&mut self) -> Result<bool, Failure> {
        tokio::select! {
            biased;
            // An error means that the server is gone.
            _ = self.draining.wait_for(|draining| *draining) => {
                Err(stopped("the node is shutting down".to_owned()))
            }
            changed = self.state.changed() => Ok(changed.is_ok()),
            () = tokio::time::sleep(PROGRESS) => Ok(true),
        }
    }
}

impl<N> ServedWatch<N> {
    fn ended(&mut self, outcome: &Result<(), Failure>) {
        if let Some(open) = self.open.take() {
            open.ended(outcome);
        }
    }
}

impl<N> Drop for ServedWatch<N> {
    /// Its client has had enough, or the node is gone.
    fn drop(&mut self) {
        self.ended(&Ok(()));
    }
}

fn response(by: &Answerer, applied: Option<LogId>, answer: EventsAnswer) -> v1::WatchResponse {
    v1::WatchResponse {
        header: Some(by.header(applied)),
        more: answer.told > 0,
        next_revision: answer.next_revision,
        events: answer.events.into_iter().map(|event| codec::encode_event(calls::event(event))).collect(),
    }
}
