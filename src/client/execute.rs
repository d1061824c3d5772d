//! The attempts of one operation, from the first to its outcome.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::attempt::{Kind, Way};
use super::endpoint::Endpoint;
use super::error::{ClientError, UnconfirmedAnswer};
use super::frame::{self, Frame, Payload};
use super::judge::{Failure, failed};
use super::operation::{Next, Operation, read_kind};
use super::options::{CallOptions, WriteOptions};
use super::preference::ReadPreference;
use super::router::Router;
use super::sessions::{Place, Sessions};
use crate::call::Header;
use crate::proto::v1;
use crate::proto::v1::answer::Content as Answered;
use crate::reason::Reason;
use crate::types::{self, AckLevel, HistoryEpoch};

/// What is called, with what, and how.
#[derive(Debug)]
pub(crate) struct Ask<P> {
    pub(crate) method: &'static str,
    pub(crate) payload: P,
    pub(crate) options: CallOptions,
}

impl<P: Payload> Ask<P> {
    /// Of a write, how it is acknowledged.
    fn write_options(&self) -> Option<&WriteOptions> {
        match &self.options {
            CallOptions::Write(options) => Some(options),
            CallOptions::Read(_) => None,
        }
    }

    /// For one attempt: in its `place` in a session if it is a write of one, with `left` of the operation's time.
    fn frame(&self, place: Option<&Place>, left: Duration) -> Frame {
        match &self.options {
            CallOptions::Write(options) => {
                Frame::write(self.method, &self.payload, &attempt_options(options, place, left))
            }
            CallOptions::Read(read) => Frame::read(self.method, &self.payload, *read),
        }
    }
}

/// How one attempt of a write is carried out.
fn attempt_options(options: &WriteOptions, place: Option<&Place>, left: Duration) -> types::WriteOptions {
    types::WriteOptions {
        slot: place.map(Place::slot),
        ack: options.ack,
        // The server is to give up first: its answer says where the write stands, our deadline does not.
        ack_timeout: options.ack_timeout.min(left / 10 * 9),
        history: match options.history {
            HistoryEpoch::UNKNOWN => place.map_or(HistoryEpoch::UNKNOWN, Place::history),
            history => history,
        },
    }
}

/// Carries out `ask`, on the node at `chosen` only if that is set. `decode` makes of a header and a payload what was asked for,
/// or nothing where they are no answer to that.
pub(crate) async fn execute<T, P: Payload>(
    router: &Arc<Router>,
    sessions: &Sessions,
    ask: &Ask<P>,
    decode: impl Fn(Header, Bytes) -> Option<T>,
    chosen: Option<&Endpoint>,
    preference: Option<&ReadPreference>,
) -> Result<T, ClientError> {
    refuse(router, ask)?;
    let started = Instant::now();
    let under_way = router.metrics.start(ask.method, started);
    let mut operation = Operation::new(router, kind(ask, preference), preference, started);
    operation.chosen = chosen.map(|endpoint| router.at(endpoint));
    if let CallOptions::Read(read) = &ask.options {
        operation.replicas = router.config.replica_reads.most_lag(read.level);
    }
    let outcome = operation.run(sessions, ask, &decode).await;
    under_way.finish(outcome.is_ok());
    outcome
}

/// Carries out the write `ask` in `place`, in which it may have been tried before: then it is `undecided`, and is so
/// again unless it is certain that nothing was applied, neither by this attempt nor before.
pub(crate) async fn execute_in<T, P: Payload>(
    router: &Arc<Router>,
    place: &Place,
    ask: &Ask<P>,
    decode: impl Fn(Header, Bytes) -> Option<T>,
    undecided: &mut bool,
) -> Result<T, ClientError> {
    refuse(router, ask)?;
    let started = Instant::now();
    let under_way = router.metrics.start(ask.method, started);
    let mut operation = Operation::new(router, Kind::Write, None, started);
    operation.in_session = true;
    operation.undecided = *undecided;
    let outcome = loop {
        // Whoever gives up while an attempt is under way leaves it undecided.
        let before = std::mem::replace(undecided, true);
        let attempted = operation.attempt(ask, &decode, Some(place)).await;
        *undecided = before || operation.undecided;
        match attempted {
            Ok(Ok(response)) => break Ok(response),
            Ok(Err(Next::Again)) => {}
            // Nothing was applied, and nothing can be any more.
            Ok(Err(Next::InNewSession)) => break Err(operation.session_gone(place)),
            Err(error) => break Err(error),
        }
    };
    // What has been applied once has been, whatever comes of asking for it again.
    *undecided |= match &outcome {
        Ok(_) => true,
        Err(error) => error.maybe_applied(),
    };
    under_way.finish(outcome.is_ok());
    outcome
}

/// Whether `error`, of a write with these options, says that the session of its `place` is no more. The history that a caller
/// names is not the session's, which goes on when that one is another.
pub(super) fn session_is_gone(place: &Place, options: &WriteOptions, error: &ClientError) -> bool {
    match error.reason() {
        Reason::SessionExpired => true,
        Reason::OtherHistory => [HistoryEpoch::UNKNOWN, place.history()].contains(&options.history),
        _ => false,
    }
}

/// Refuses what the server would, without sending it.
fn refuse(router: &Router, ask: &Ask<impl Payload>) -> Result<(), ClientError> {
    let (bytes, limit) = (ask.payload.size_bytes(), router.config.max_request_bytes);
    if bytes <= limit {
        return Ok(());
    }
    let message = format!("the request takes {bytes} bytes, more than the limit of {limit} bytes");
    Err(ClientError::Rejected { reason: Reason::TooLarge, message })
}

fn kind<P>(ask: &Ask<P>, preference: Option<&ReadPreference>) -> Kind {
    match &ask.options {
        CallOptions::Write(_) => Kind::Write,
        CallOptions::Read(read) => read_kind(read.level, preference),
    }
}

impl Operation<'_> {
    async fn run<T, P: Payload>(
        &mut self,
        sessions: &Sessions,
        ask: &Ask<P>,
        decode: &impl Fn(Header, Bytes) -> Option<T>,
    ) -> Result<T, ClientError> {
        let router = self.router;
        // At level leader nobody waits to hear what the session says.
        let at_leader = ask.write_options().is_some_and(|options| options.ack == AckLevel::Leader);
        self.in_session = self.kind == Kind::Write && router.config.exactly_once && !at_leader;
        let mut place = self.begin(sessions).await?;
        loop {
            let attempted = self.attempt(ask, decode, place.as_ref()).await.inspect_err(|error| {
                if let (Some(place), Some(options)) = (&place, ask.write_options())
                    && session_is_gone(place, options, error)
                {
                    sessions.forget(place.slot().session);
                }
            });
            match attempted? {
                Ok(response) => return Ok(response),
                Err(Next::Again) => {}
                Err(Next::InNewSession) => {
                    if let Some(gone) = place.take() {
                        sessions.forget(gone.slot().session);
                    }
                    place = self.begin(sessions).await?;
                }
            }
        }
    }

    /// One attempt, and whatever comes between a failed one and the next.
    async fn attempt<T, P: Payload>(
        &mut self,
        ask: &Ask<P>,
        decode: &impl Fn(Header, Bytes) -> Option<T>,
        place: Option<&Place>,
    ) -> Result<Result<T, Next>, ClientError> {
        let (router, now) = (self.router, Instant::now());
        let link = self.link();
        let expires = self.attempt_expires(now);
        let left = self.deadline.saturating_duration_since(now);
        let frame = ask.frame(place, left);
        let waits_for_all = ask.write_options().is_some_and(|options| options.ack == AckLevel::All);
        let way = Way { kind: self.kind, bound: self.chosen.is_some(), waits_for_all };
        let failure = match link.call(router, frame, way, expires).await.map(frame::read) {
            Err(error) => Failure::of_attempt(error),
            Ok(Some(v1::Answer { content: Some(Answered::Failure(failure)), .. })) => {
                Failure::Answered(failure)
            }
            Ok(Some(v1::Answer { header, content: Some(Answered::Payload(payload)), .. })) => {
                let Some(response) = decode(Header::decode(header), payload) else {
                    return Err(self.unexpected(&link));
                };
                // A linearizable read proves nothing: every node answers it.
                if self.kind == Kind::Write && self.chosen.is_none() {
                    router.answered_as_leader(&link);
                }
                return Ok(Ok(response));
            }
            Ok(_) => return Err(self.unexpected(&link)),
        };
        let called = |answer: &mut UnconfirmedAnswer| answer.method = ask.method;
        self.after(&link, failure).await.map(Err).map_err(|error| error.answering(called))
    }

    async fn begin(&mut self, sessions: &Sessions) -> Result<Option<Place>, ClientError> {
        if !self.in_session {
            return Ok(None);
        }
        match sessions.begin(self.router, self.deadline).await {
            Err(ClientError::Failed { reason: Reason::TooManySessions, .. })
                if self.router.config.without_session_when_full && !self.undecided =>
            {
                tracing::debug!("all sessions are in use: the write is sent once, without one");
                self.in_session = false;
                Ok(None)
            }
            begun => begun.map(Some),
        }
    }

    fn session_gone(&self, place: &Place) -> ClientError {
        let message = format!("session {} is gone; nothing was applied", place.slot().session);
        failed(&self.link().node.endpoint, Reason::SessionExpired, message, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call;

    #[test]
    fn the_server_gives_up_waiting_for_all_voters_before_the_client_does() {
        let all = WriteOptions::from(AckLevel::All);
        let sent = |left| call::encode_write(&attempt_options(&all, None, left)).unwrap().ack_timeout_ms;
        assert_eq!(sent(Duration::from_secs(10)), 5000);
        assert_eq!(sent(Duration::from_secs(1)), 900);
        assert_eq!(sent(Duration::ZERO), 1);
    }
}
