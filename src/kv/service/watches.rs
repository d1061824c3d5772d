//! `Kv.Watch`: what happens to ranges of keys, from a revision on.
//!
//! A watch is a position in the feed of what was applied, on whichever node it is asked: what every node has applied is the same. It
//! reads when it is [marked](super::dispatch) and its client can be sent something, a page at a time, and keeps nothing meanwhile: a
//! client that does not read costs its place and no more, and goes on where it was when it reads again, or learns that the feed does
//! not reach back that far any more.
//!
//! The events of one revision come in one message. Only when they alone are more than a message takes, as when one command
//! removes thousands of keys, are they told in pieces; where to go on after a break stays the same until the last piece.
//!
//! The protocol, with a figure: `docs/design/watching.md`.

use std::time::Duration;

use futures::stream;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::dispatch::{Dispatch, RegisteredWatch};
use super::message::{ToldUpTo, WatchMessage};
use super::progress::{CallerWatches, WatchAsked};
use super::wishes::WatchWishes;
use super::{KvNode, failure};
use crate::door::Answerer;
use crate::door::failure::stopped;
use crate::door::metrics::{OpenCall, StreamCall};
use crate::door::streams::{Responses, WatchPlace};
use crate::engine::NodeState;
use crate::error::ReadError;
use crate::feed::{FeedCursor, FeedError};
use crate::proto::v1::{self, Failure};
use crate::types::{Bookmark, HistoryEpoch, ReadLevel, ReadOptions, Role};

/// About as many bytes of what was applied are looked at for one message.
const PAGE_BYTES: usize = 256 * 1024;

/// Starts to watch what `request` asks for.
///
/// # Errors
/// The failure to answer instead.
pub(super) async fn watch<N: KvNode>(
    node: N,
    by: Answerer,
    draining: watch::Receiver<bool>,
    (dispatch, askable): (Dispatch, CallerWatches),
    request: v1::WatchRequest,
    place: Result<WatchPlace, Failure>,
    call: StreamCall,
) -> Result<Responses<v1::WatchResponse>, Failure> {
    let prepare = async {
        let place = place?;
        let from = Bookmark { index: request.from_revision, history: HistoryEpoch(request.history) };
        let (watch_id, wishes) = (request.watch_id, WatchWishes::of(request)?);
        let cursor = cursor(&node, from).await?;
        let history = cursor.history();
        let registered = dispatch.register(&node, history, wishes);
        let registered =
            registered.map_err(|error| failure::of_feed(error, cursor.next_position(), history))?;
        Ok((cursor, registered, askable.register(watch_id, history), place))
    };
    let ((cursor, registered, asked, place), open) = call.open(prepare.await)?;
    let (state, told) = (node.watch(), ToldUpTo { next: cursor.next_position(), events: 0 });
    // What has been applied by now is in the first message, and need not have been compared.
    let until = match cursor.applied_next() {
        u64::MAX => registered.joined(),
        applied_next => registered.joined().max(applied_next),
    };
    let watching = ServedWatch {
        node,
        by,
        draining,
        state,
        cursor,
        registered,
        asked,
        told,
        until,
        last_message: None,
        open: Some(open),
        _place: place,
    };
    Ok(Box::pin(stream::unfold(Some(watching), |watching| async {
        let mut watching = watching?;
        match watching.next().await {
            Ok(message) => Some((Ok(message), Some(watching))),
            Err(failure) => {
                watching.ended(&Err(failure.clone()));
                Some((Err(failure.into()), None))
            }
        }
    })))
}

/// Where to begin: at `from`, or after the present position of the cluster if that is 0.
async fn cursor<N: KvNode>(node: &N, from: Bookmark) -> Result<FeedCursor, Failure> {
    node.may_be_watched()?;
    check_beginning(node, from).await?;
    let next = match from.index {
        // Known before the caller is answered, who may write next and wait for that. This node's own position would not
        // do: one that is catching up is far behind, and would tell what is long past.
        0 => node.present().await? + 1,
        index => index,
    };
    let cursor = node.feed_from(next);
    let known = cursor.history();
    match from.history.differs_from(known) {
        false => Ok(cursor),
        true => Err(ReadError::OtherHistory { given: from.history, known }.into()),
    }
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

/// A watch between two messages.
struct ServedWatch<N> {
    node: N,
    by: Answerer,
    draining: watch::Receiver<bool>,
    state: watch::Receiver<NodeState>,
    cursor: FeedCursor,
    registered: RegisteredWatch,
    asked: WatchAsked,
    /// What its client has been sent.
    told: ToldUpTo,
    /// Everything below this position it has to look at. What comes then concerns it only if it is marked.
    until: u64,
    last_message: Option<Instant>,
    open: Option<OpenCall>,
    _place: WatchPlace,
}

impl<N: KvNode> ServedWatch<N> {
    /// The next message.
    async fn next(&mut self) -> Result<v1::WatchResponse, Failure> {
        loop {
            self.check_state()?;
            self.look_at_mark();
            let is_over = self.registered.is_over();
            let mut message = WatchMessage::default();
            if self.told.next < self.until || is_over {
                message = self.read().await?;
                if is_over && message.events.is_empty() && self.told.next >= self.until {
                    // Whatever has ended it, nobody would say that there is more.
                    return Err(self.stopped());
                }
            }
            let interval = self.registered.progress_interval();
            let is_due = self.last_message.is_none_or(|at| at.elapsed() >= interval)
                || self.asked.below().is_some_and(|below| below <= self.told.next);
            if !message.events.is_empty() || is_due {
                self.last_message = Some(Instant::now());
                return Ok(self.response(message));
            }
            if self.told.next < self.until {
                tokio::task::yield_now().await;
            } else {
                self.wait(interval).await?;
            }
        }
    }

    /// Finds out what to look at.
    fn look_at_mark(&mut self) {
        // Before the mark: what is below was marked by then.
        let position = self.registered.position();
        let is_done = self.told.next >= self.until;
        match self.registered.take_mark() {
            Some((first, until)) => {
                if is_done {
                    // What is before the first is compared, and does not concern it.
                    self.told.go_on_at(first.min(until));
                }
                self.until = self.until.max(until);
            }
            None if is_done => self.told.go_on_at(position),
            None => {}
        }
    }

    /// The next page, and what of it is for this watch.
    async fn read(&mut self) -> Result<WatchMessage, Failure> {
        self.cursor.move_to(self.told.next);
        match self.cursor.page(PAGE_BYTES).await {
            Ok(page) => {
                let (node, wishes) = (&self.node, self.registered.wishes());
                let time_at = |elapsed_ms| node.log_time_at(elapsed_ms);
                let looked_up = wishes.previous.then(|| self.cursor.previous_values());
                Ok(WatchMessage::of(wishes, page, looked_up, &mut self.told, time_at).await)
            }
            Err(FeedError::Stopped) => Err(self.stopped()),
            Err(error) => Err(failure::of_feed(error, self.told.next, self.cursor.history())),
        }
    }

    fn response(&self, message: WatchMessage) -> v1::WatchResponse {
        // What was told may be ahead of what the state of the node shows.
        let applied = self.state.borrow().applied.max(message.last);
        self.asked.told(self.told.next);
        v1::WatchResponse {
            header: Some(self.by.header(applied)),
            more: self.told.events > 0,
            next_revision: self.told.next,
            events: message.events,
        }
    }

    fn check_state(&self) -> Result<(), Failure> {
        let is_draining = *self.draining.borrow();
        let (role, diverged) = {
            let state = self.state.borrow();
            (state.role, state.diverged.clone())
        };
        match diverged {
            Some(divergence) => Err(ReadError::Diverged { divergence }.into()),
            None if is_draining || role == Role::Stopped => Err(self.stopped()),
            None => Ok(()),
        }
    }

    fn stopped(&self) -> Failure {
        let fatal = self.state.borrow().fatal.as_ref().map(ToString::to_string);
        stopped(fatal.unwrap_or_else(|| "the node is shutting down".to_owned()))
    }

    /// Waits until there may be something to tell.
    async fn wait(&mut self, interval: Duration) -> Result<(), Failure> {
        let due = self.last_message.unwrap_or_else(Instant::now) + interval;
        let below = self.asked.below();
        tokio::select! {
            biased;
            // An error means that the server is gone.
            _ = self.draining.wait_for(|draining| *draining) => {
                Err(stopped("the node is shutting down".to_owned()))
            }
            () = self.registered.marked() => Ok(()),
            () = self.asked.changed() => Ok(()),
            () = self.registered.compared(below.unwrap_or_default()), if below.is_some() => Ok(()),
            () = sleep_until(due) => Ok(()),
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
