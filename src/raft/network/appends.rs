//! Appends to one peer: many under way at a time, their answers in order.
//!
//! What the core is told here it believes. An acceptance moves what is committed, its lease and its read indexes; a
//! conflict below what a peer has accepted means to it that the peer has lost its disk. So answers are checked against
//! what was asked, and one that is lost or out of order ends the stream.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{Stream, StreamExt};
use openraft::raft::{AppendEntriesRequest, StreamAppendError, StreamAppendResult};
use tokio::time::{Instant, Sleep};

use super::client::{APPEND_IDLE, PeerClient, RpcError, broken, send, unreachable};
use super::wire::{self, Malformed};
use crate::proto::peer::{Response, request, response};
use crate::raft::type_config::{self, LogId, TypeConfig};

/// Appends sent to a peer and not yet answered, per connection.
const APPENDS_IN_FLIGHT: usize = 32;
/// How long a peer may keep the log from being purged before it is sent a snapshot instead.
const PURGE_PATIENCE: Duration = Duration::from_secs(10);

/// An append sent and not yet answered.
#[derive(Debug, Clone, Copy)]
struct UnansweredAppend {
    id: u64,
    previous: Option<LogId>,
    last: Option<LogId>,
}

/// Appends on their way out and their results on the way back, in the order of the requests.
pub(super) struct AppendStream<'s, S> {
    client: &'s mut PeerClient,
    input: Option<S>,
    unanswered: VecDeque<UnansweredAppend>,
    /// Since when the peer has kept the log from being purged.
    behind_since: Option<Instant>,
    idle: Pin<Box<Sleep>>,
    ended: bool,
}

type AppendItem = Result<StreamAppendResult<TypeConfig>, RpcError>;

impl<'s, S> AppendStream<'s, S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
{
    /// Sends what `input` yields, over the open connection of `client`.
    pub(super) fn new(client: &'s mut PeerClient, input: S) -> Self {
        Self {
            client,
            input: Some(input),
            unanswered: VecDeque::new(),
            behind_since: None,
            idle: Box::pin(tokio::time::sleep(APPEND_IDLE)),
            ended: false,
        }
    }

    /// Sends what the core has ready, as far as the window allows.
    fn send_ready(&mut self, cx: &mut Context<'_>) -> Result<(), RpcError> {
        while self.unanswered.len() < APPENDS_IN_FLIGHT {
            let Some(input) = &mut self.input else { return Ok(()) };
            match input.poll_next_unpin(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(None) => self.input = None,
                Poll::Ready(Some(append)) => {
                    let previous = append.prev_log_id;
                    let last = append.entries.last().map(|entry| entry.log_id).or(previous);
                    let request = self.client.request(request::Body::Append(wire::append(append)));
                    if self.unanswered.is_empty() {
                        self.restart_idle();
                    }
                    self.unanswered.push_back(UnansweredAppend { id: request.id, previous, last });
                    let connection =
                        self.client.connection.as_ref().ok_or_else(|| broken("not connected"))?;
                    send(connection, request)?;
                }
            }
        }
        Ok(())
    }

    fn restart_idle(&mut self) {
        self.idle.as_mut().reset(Instant::now() + APPEND_IDLE);
    }

    /// The answer to the oldest unanswered append.
    ///
    /// The peer answers in order. An answer that overtook another one therefore means that a message was
    /// lost, and what the peer made of the later ones cannot be reported to the core: it takes a conflict
    /// below what has matched for a follower that lost its disk.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Result<(UnansweredAppend, Response), RpcError>> {
        let front = *self.unanswered.front().expect("invariant: asked only while something is unanswered");
        loop {
            let Some(connection) = &mut self.client.connection else {
                return Poll::Ready(Err(broken("not connected")));
            };
            match connection.responses.poll_recv(cx) {
                Poll::Ready(None) => return Poll::Ready(Err(broken("connection closed"))),
                Poll::Ready(Some(response)) if response.id == front.id => {
                    self.unanswered.pop_front();
                    self.restart_idle();
                    return Poll::Ready(Ok((front, response)));
                }
                Poll::Ready(Some(response)) if response.id > front.id => {
                    return Poll::Ready(Err(broken("an earlier message was lost")));
                }
                // The answer to a request of an earlier stream, or delivered twice.
                Poll::Ready(Some(_)) => {}
                Poll::Pending => {
                    std::task::ready!(self.idle.as_mut().poll(cx));
                    return Poll::Ready(Err(unreachable(format!(
                        "no answer within {} s",
                        APPEND_IDLE.as_secs()
                    ))));
                }
            }
        }
    }

    /// Whether the core may be told of `result`: it believes what it hears.
    fn check(
        &mut self,
        asked: UnansweredAppend,
        result: &StreamAppendResult<TypeConfig>,
    ) -> Result<(), RpcError> {
        match result {
            Ok(last) if *last == asked.last => {
                self.client.accepted = asked.last.max(self.client.accepted);
                if let Some(last) = &asked.last {
                    let positions = &self.client.clients.durable_positions;
                    positions.note(self.client.holder(), type_config::from_log_id(last));
                    let before = asked.previous.map_or(0, |previous| previous.index + 1);
                    let entries = (last.index + 1).saturating_sub(before);
                    if entries > 0 {
                        let fitness = &self.client.clients.fitness;
                        fitness.update(self.client.node_id, |peer| peer.accepted_entries += entries);
                    }
                }
                self.check_purge(asked.last)
            }
            Err(StreamAppendError::Conflict(at)) if Some(*at) == asked.previous => {
                if asked.previous <= self.client.accepted {
                    let node_id = self.client.node_id;
                    tracing::error!(node_id, conflict = %at, "a peer no longer has entries that it had accepted");
                    return Err(unreachable("the peer has lost entries that it had accepted"));
                }
                Ok(())
            }
            Err(StreamAppendError::HigherVote(_)) => Ok(()),
            Ok(_) | Err(StreamAppendError::Conflict(_)) => {
                Err(Malformed("an answer to something else").into())
            }
        }
    }

    /// Gives a peer up that has been keeping the log from being purged for too long.
    fn check_purge(&mut self, accepted: Option<LogId>) -> Result<(), RpcError> {
        let purge = self.client.clients.purge.load(Ordering::Relaxed);
        if accepted.map_or(0, |accepted| accepted.index) >= purge {
            self.behind_since = None;
            return Ok(());
        }
        let since = *self.behind_since.get_or_insert_with(Instant::now);
        match since.elapsed() < PURGE_PATIENCE {
            true => Ok(()),
            false => Err(unreachable("the peer is too far behind for the log; a snapshot follows")),
        }
    }

    fn poll_item(&mut self, cx: &mut Context<'_>) -> Poll<Option<AppendItem>> {
        loop {
            if let Err(error) = self.send_ready(cx) {
                return Poll::Ready(Some(Err(error)));
            }
            if self.unanswered.is_empty() {
                return if self.input.is_none() { Poll::Ready(None) } else { Poll::Pending };
            }
            let item = match std::task::ready!(self.poll_answer(cx)) {
                Ok((asked, response)) => match self.judge(asked, response) {
                    // The core takes an acceptance for the answer to every request that ends at the same entry, and
                    // believes that the peer followed this leader when the last of them was sent: its lease and its
                    // read indexes rest on that. So it is told once the last of them is answered.
                    Ok(Ok(_)) if self.unanswered.iter().any(|later| later.last == asked.last) => continue,
                    item => item,
                },
                Err(error) => Err(error),
            };
            return Poll::Ready(Some(item));
        }
    }

    fn judge(&mut self, asked: UnansweredAppend, response: Response) -> AppendItem {
        match response.body {
            Some(response::Body::Append(response)) => {
                let client = &self.client;
                client.clients.fitness.note(client.holder(), &response);
                let result = client.clients.believe_appended(wire::from_append_response(response)?)?;
                self.check(asked, &result)?;
                Ok(result)
            }
            Some(response::Body::Failure(reason)) => Err(unreachable(reason)),
            _ => Err(Malformed("not the answer to an append").into()),
        }
    }
}

impl<S> Stream for AppendStream<'_, S>
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
{
    type Item = AppendItem;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<AppendItem>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        let item = std::task::ready!(this.poll_item(cx));
        match &item {
            Some(Err(_)) => {
                // Whatever is still under way belongs to a connection that failed.
                this.client.connection = None;
                this.ended = true;
            }
            None | Some(Ok(Err(StreamAppendError::Conflict(_) | StreamAppendError::HigherVote(_)))) => {
                this.ended = true;
            }
            Some(Ok(Ok(_))) => {}
        }
        Poll::Ready(item)
    }
}
