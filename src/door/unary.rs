//! Calls that are answered one by one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::bodies::{self, Built};
use super::guest::{Call, Guest, guarded_async};
use super::methods::{CLOSE_SESSION, MethodId, OPEN_SESSION};
use super::pipeline::{base_bytes, client_address};
use super::relay::{self, Relay, unexpected};
use super::rights::Principal;
use super::{Door, ServedNode, failure, permitted};
use crate::call::{Options, Rejected, encode_write};
use crate::incoming::Caller;
use crate::proto::v1::answer::Content as Answered;
use crate::proto::v1::call::Content;
use crate::proto::v1::{self, Failure};
use crate::types::HistoryEpoch;

/// The answer to a write is given however little room there is, if it is no larger.
const SMALL_ANSWER_BYTES: usize = 16 * 1024;

/// What the answer to a request about a session counts as until it is encoded.
const SESSION_ANSWER_BYTES: usize = 256;

/// An answer, and what counts for it until it is encoded.
pub(crate) type CountedAnswer<T> = (T, Option<Built>);

impl<N> Door<N> {
    /// Whether `request` is granted to `principal`.
    ///
    /// # Errors
    /// The failure to answer instead. It is counted.
    pub(crate) fn permit<G: Guest>(
        &self,
        method: MethodId,
        request: &G::Request,
        principal: &Principal,
    ) -> Result<(), Failure> {
        let permitted = permitted::request::<G>(principal, method.0, request);
        if permitted.is_err() {
            self.metrics.observe(method, Instant::now(), &permitted);
        }
        permitted
    }

    /// Answers `request`, to be carried out as `options` say: with what heads the answer, and the response.
    ///
    /// # Errors
    /// The failure to answer instead. Either is counted.
    pub(crate) async fn call<G>(
        &self,
        method: MethodId,
        request: G::Request,
        options: Result<Options, Rejected>,
        caller: Option<Arc<Caller>>,
    ) -> Result<CountedAnswer<(v1::Header, G::Response)>, Failure>
    where
        G: Guest,
        N: ServedNode<Machine = G::Machine>,
    {
        let started = Instant::now();
        let changes = self.metrics.methods().get(method).changes;
        let outcome = guarded_async(changes, self.outcome::<G>(request, options, caller.as_deref())).await;
        let outcome = outcome.unwrap_or_else(Err);
        self.metrics.observe(method, started, &outcome);
        let (header, response) = outcome?;
        let bytes = base_bytes::<G>() + G::response_bytes(&response);
        Ok(((header, response), caller.map(|caller| Built::new(caller, bytes))))
    }

    /// What is answered. It is not read before its connection has room for it.
    async fn outcome<G>(
        &self,
        request: G::Request,
        options: Result<Options, Rejected>,
        caller: Option<&Caller>,
    ) -> Result<(v1::Header, G::Response), Failure>
    where
        G: Guest,
        N: ServedNode<Machine = G::Machine>,
    {
        let bound = self.limits.unsent_bytes;
        let has_room = || caller.is_none_or(|caller| caller.has_room(bound));
        let options = options?;
        let (call, asked) = G::call(request)?;
        match (call, options) {
            (Call::Write(command), Options::Write(options)) => {
                let outcome = self.node.write(command, options).await;
                let clock = |elapsed_ms| self.node.log_time_at(elapsed_ms);
                let answer = self.by.written::<G>(asked, outcome, Some(&clock))?;
                match has_room() || G::response_bytes(&answer.1) <= SMALL_ANSWER_BYTES {
                    true => Ok(answer),
                    false => Err(failure::no_room_for_answer(bound)),
                }
            }
            (Call::Read(query), Options::Read(options)) => loop {
                let outcome = self.node.read(query.clone(), options).await;
                match caller {
                    Some(caller) if !has_room() => {
                        // What was read is let go, and read again.
                        drop(outcome);
                        bodies::room(caller, &self.limits).await;
                    }
                    _ => {
                        let clock = |elapsed_ms| self.node.log_time_at(elapsed_ms);
                        return self.by.answered::<G>(asked, outcome, &clock);
                    }
                }
            },
            _ => Err(failure::mixed_up()),
        }
    }
}

impl<N: ServedNode> Door<N> {
    /// What passes on the changes that come to this door, if anything does.
    pub(crate) fn relay(&self) -> Option<Arc<dyn Relay>> {
        self.node.relay().filter(|_| !self.is_relayed)
    }

    /// The answer to the write `method` of guest `G` that is passed on `to` another node, as what `decode` finds in it.
    ///
    /// # Errors
    /// The failure to answer instead. Either is counted.
    pub(crate) async fn relayed<G: Guest, T>(
        &self,
        to: Arc<dyn Relay>,
        method: MethodId,
        (payload, options): (Bytes, Result<Options, Rejected>),
        within: Option<Duration>,
        caller: Option<Arc<Caller>>,
        decode: impl FnOnce(v1::Header, Bytes) -> Option<T>,
    ) -> Result<CountedAnswer<T>, Failure> {
        let started = Instant::now();
        let outcome = async {
            let Options::Write(options) = options? else { return Err(failure::mixed_up()) };
            let call = relay::write(G::METHODS[method.0].name, payload, encode_write(&options));
            let answer = to.relay(call, within).await?;
            let Some(Answered::Payload(payload)) = answer.content else { return Err(unexpected()) };
            let bytes = payload.len();
            let decoded = decode(answer.header.unwrap_or_default(), payload).ok_or_else(unexpected)?;
            Ok((decoded, bytes))
        }
        .await;
        self.metrics.observe(method, started, &outcome);
        let (answer, bytes) = outcome?;
        Ok((answer, caller.map(|caller| Built::new(caller, base_bytes::<G>() + bytes))))
    }

    /// Opens a session in the name of `caller`.
    ///
    /// # Errors
    /// The failure to answer instead. Either is counted.
    pub(crate) async fn open_session(
        &self,
        request: v1::OpenSessionRequest,
        caller: Option<Arc<Caller>>,
    ) -> Result<CountedAnswer<v1::OpenSessionResponse>, Failure> {
        let started = Instant::now();
        let v1::OpenSessionRequest { ttl_ms } = request;
        let outcome = match self.relay() {
            Some(relay) => {
                let call = about_session(Content::OpenSession(request));
                relay.relay(call, None).await.and_then(|answer| match answer.content {
                    Some(Answered::OpenSession(opened)) => Ok(opened),
                    _ => Err(unexpected()),
                })
            }
            None => {
                let opened = self.node.open_session(&client_address(caller.as_deref()), ttl_ms).await;
                opened.map(|opened| self.by.opened(ttl_ms, opened)).map_err(Failure::from)
            }
        };
        self.metrics.observe(self.metrics.methods().id(OPEN_SESSION.name), started, &outcome);
        Ok((outcome?, caller.map(|caller| Built::new(caller, SESSION_ANSWER_BYTES))))
    }

    /// Closes a session, as `caller` asks.
    ///
    /// # Errors
    /// The failure to answer instead. Either is counted.
    pub(crate) async fn close_session(
        &self,
        request: v1::CloseSessionRequest,
        caller: Option<Arc<Caller>>,
    ) -> Result<CountedAnswer<v1::CloseSessionResponse>, Failure> {
        let started = Instant::now();
        let v1::CloseSessionRequest { session, history } = request;
        let outcome = match self.relay() {
            Some(relay) => {
                let call = about_session(Content::CloseSession(request));
                relay.relay(call, None).await.and_then(|answer| match answer.content {
                    Some(Answered::CloseSession(closed)) => Ok(closed),
                    _ => Err(unexpected()),
                })
            }
            None => {
                let closed = self.node.close_session(session, HistoryEpoch(history)).await;
                closed.map(|closed| self.by.closed(closed)).map_err(Failure::from)
            }
        };
        self.metrics.observe(self.metrics.methods().id(CLOSE_SESSION.name), started, &outcome);
        Ok((outcome?, caller.map(|caller| Built::new(caller, SESSION_ANSWER_BYTES))))
    }
}

/// A call about a session.
fn about_session(content: Content) -> v1::Call {
    v1::Call { content: Some(content), ..v1::Call::default() }
}
