//! Calls that members pass on to this node, on one connection.
//!
//! A call is begun at most once, however often it arrives and in whatever order: a write without a session has nothing else
//! that would keep it from being applied twice. One that cannot be told any more from one that was seen counts as seen; its
//! caller hears nothing, and takes its outcome for unknown.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, ready};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::task::JoinHandle;

use crate::proto::peer::{ForwardRequest, Response, response};
use crate::raft::network::calls::{self, Call, CallError, Done, MOST_CALLS};
use crate::raft::network::wire::Malformed;
use crate::runtime;
use crate::types::Incarnation;

/// What a node does for members that pass calls on to it.
pub(crate) trait Desk: Send + Sync {
    /// Does `call`, for a caller that waits for `patience` yet, if this node leads; else says who does. Passes nothing on.
    /// What it has begun may go on when this is dropped.
    fn carry_out(&self, call: Call, patience: Duration) -> BoxFuture<'static, Result<Done, CallError>>;
}

/// What a node knows of a caller at present.
#[derive(Debug, Clone, Copy)]
pub(super) struct Standing {
    /// The node leads. What another one knows of the members may be old, and it does nothing in any case.
    pub(super) is_told_by_leader: bool,
    /// The data directory of the member with the caller's id, if there is one.
    pub(super) directory: Option<Incarnation>,
}

/// Numbers of calls that have arrived.
#[derive(Debug, Default)]
struct Seen {
    newest: u64,
    /// Those among the last [`Self::REACH`] numbers.
    lately: BTreeSet<u64>,
}

impl Seen {
    /// A call that is later by more counts as seen. Calls leave in the order of their numbers.
    const REACH: u64 = 65_536;

    /// Notes a number; false if it was, or may have been, noted before.
    fn note(&mut self, id: u64) -> bool {
        let is_late = |id: u64, newest: u64| newest.checked_sub(id).is_some_and(|by| by >= Self::REACH);
        if is_late(id, self.newest) {
            return false;
        }
        self.newest = self.newest.max(id);
        while self.lately.first().is_some_and(|first| is_late(*first, self.newest)) {
            self.lately.pop_first();
        }
        self.lately.insert(id)
    }
}

/// The calls of one connection.
pub(super) struct Forwarded {
    desk: Arc<dyn Desk>,
    /// The caller's data directory, since it was first known as a member on this connection.
    caller: Option<Incarnation>,
    seen: Seen,
    under_way: FuturesUnordered<BoxFuture<'static, Response>>,
}

impl Forwarded {
    pub(super) fn new(desk: Arc<dyn Desk>, standing: Standing) -> Self {
        Self { desk, caller: standing.directory, seen: Seen::default(), under_way: FuturesUnordered::new() }
    }

    /// Begins call `id`, unless it has arrived before. One that is too many is refused at once: it must not wait where reads
    /// would have to wait behind it. One that this build does not know is answered with what `refused` makes of it. One of a caller that
    /// is not the member any more that it was when it was let in is refused: connections outlive memberships.
    pub(super) fn begin(
        &mut self,
        id: u64,
        message: ForwardRequest,
        standing: Standing,
        refused: impl FnOnce(Malformed) -> response::Body,
    ) {
        if !self.seen.note(id) {
            return;
        }
        let answer = match Call::from_wire(message) {
            Err(malformed) => ready(refused(malformed)).boxed(),
            Ok(_) if !self.is_of_member(standing) => ready(answer(Err(not_a_member()))).boxed(),
            Ok((call, _)) if self.under_way.len() >= MOST_CALLS => {
                ready(answer(Err(call.refused_as_too_many()))).boxed()
            }
            Ok((call, patience)) => {
                // On a task of its own: a command that takes long to decode holds up no reads, and one that panics no others.
                let task = Task(runtime::spawn(self.desk.carry_out(call, patience)));
                task.ended().map(answer).boxed()
            }
        };
        self.under_way.push(answer.map(move |body| Response { id, body: Some(body) }).boxed());
    }

    fn is_of_member(&mut self, standing: Standing) -> bool {
        self.caller = self.caller.or(standing.directory);
        !standing.is_told_by_leader || (standing.directory.is_some() && standing.directory == self.caller)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    /// The next answer, in whatever order; none while nothing is under way.
    pub(super) async fn next(&mut self) -> Option<Response> {
        self.under_way.next().await
    }
}

/// A call that is being carried out, and is given up with its connection.
struct Task(JoinHandle<Result<Done, CallError>>);

impl Task {
    async fn ended(mut self) -> Result<Done, CallError> {
        (&mut self.0).await.unwrap_or_else(|_| {
            let message = "carrying it out came to no end".to_owned();
            Err(CallError::Other { message, maybe_applied: true })
        })
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn not_a_member() -> CallError {
    CallError::Other {
        message: "whoever asks is not the member any more that it was when it connected".to_owned(),
        maybe_applied: false,
    }
}

fn answer(outcome: Result<Done, CallError>) -> response::Body {
    response::Body::Forward(calls::answer_to_wire(outcome))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use super::*;
    use crate::error::WriteError;
    use crate::proto::peer::forward_request;
    use crate::proto::peer::{call_failure, forward_response};
    use crate::types::Leader;

    const MEMBER: Standing = Standing { is_told_by_leader: true, directory: Some(Incarnation(7)) };

    /// Counts what it is asked to do, ends what is to be handed to node 1, and panics at node 2.
    #[derive(Default)]
    struct Counting(AtomicUsize, Arc<()>);

    impl Desk for Counting {
        fn carry_out(&self, call: Call, _: Duration) -> BoxFuture<'static, Result<Done, CallError>> {
            self.0.fetch_add(1, Relaxed);
            match call {
                Call::TransferLeader { to: Some(1) } => {
                    ready(Ok(Done::Leads(Leader { node_id: 1, client: String::new() }))).boxed()
                }
                Call::TransferLeader { to: Some(2) } => {
                    futures::future::lazy(|_| -> Result<Done, CallError> {
                        panic!("only a broken machine does this")
                    })
                    .boxed()
                }
                _ => {
                    let open = self.1.clone();
                    async move {
                        let _open = open;
                        std::future::pending::<Result<Done, CallError>>().await
                    }
                    .boxed()
                }
            }
        }
    }

    fn to(node_id: u64) -> ForwardRequest {
        let transfer = forward_request::TransferLeader { to: Some(node_id) };
        let call = Some(forward_request::Call::TransferLeader(transfer));
        ForwardRequest { patience_ms: 1, call }
    }

    fn write() -> ForwardRequest {
        let write = forward_request::Write::default();
        ForwardRequest { patience_ms: 1, call: Some(forward_request::Call::Write(write)) }
    }

    fn refused(malformed: Malformed) -> response::Body {
        response::Body::Failure(malformed.to_string())
    }

    fn of_connection() -> (Arc<Counting>, Forwarded) {
        let desk = Arc::new(Counting::default());
        (desk.clone(), Forwarded::new(desk, MEMBER))
    }

    #[test]
    fn a_number_is_noted_once_in_whatever_order() {
        let mut seen = Seen::default();
        for id in [3, 1, 9, 2] {
            assert!(seen.note(id), "{id}");
        }
        for id in [9, 3, 1, 2] {
            assert!(!seen.note(id), "{id}");
        }
        assert!(seen.note(9 + Seen::REACH));
        assert!(!seen.note(9) && !seen.note(4), "too late to tell");
        assert!(seen.note(10));
        assert!(seen.lately.len() == 2, "what is out of reach is forgotten: {:?}", seen.lately);
        assert!(seen.note(u64::MAX) && !seen.note(u64::MAX));
    }

    #[tokio::test]
    async fn a_call_that_arrives_twice_is_begun_once_and_answered_once() {
        let (desk, mut calls) = of_connection();
        for id in [7, 7, 6, 7, 6] {
            calls.begin(id, to(1), MEMBER, refused);
        }
        assert_eq!(desk.0.load(Relaxed), 2);
        let mut answered = vec![calls.next().await.unwrap().id, calls.next().await.unwrap().id];
        answered.sort_unstable();
        assert_eq!(answered, [6, 7]);
        assert!(calls.next().await.is_none());
    }

    #[tokio::test]
    async fn a_call_that_is_not_understood_is_not_begun() {
        let (desk, mut calls) = of_connection();
        calls.begin(1, ForwardRequest { patience_ms: 1, call: None }, MEMBER, refused);
        let Some(response::Body::Failure(_)) = calls.next().await.unwrap().body else { panic!("a failure") };
        assert!(calls.is_empty() && desk.0.load(Relaxed) == 0);
    }

    #[tokio::test]
    async fn more_calls_than_there_may_be_are_refused_at_once_and_later_ones_are_taken_again() {
        let (desk, mut calls) = of_connection();
        let most = u64::try_from(MOST_CALLS).unwrap();
        for id in 1..most {
            calls.begin(id, to(9), MEMBER, refused);
        }
        calls.begin(most, to(1), MEMBER, refused);
        calls.begin(most + 1, write(), MEMBER, refused);
        assert_eq!(desk.0.load(Relaxed), MOST_CALLS);
        let (first, second) = (calls.next().await.unwrap(), calls.next().await.unwrap());
        let told = if first.id == most { second } else { first };
        let Some(response::Body::Forward(answer)) = told.body else { panic!("{told:?}") };
        let Some(forward_response::Outcome::Failed(failure)) = answer.outcome else { panic!("{answer:?}") };
        assert!(!failure.maybe_applied);
        let Some(call_failure::Of::Write(why)) = failure.of else { panic!("{failure:?}") };
        assert_eq!(format!("{:?}", why.why), "Some(Overloaded(Nothing))");
        assert_eq!(failure.message, WriteError::Overloaded.to_string());
        calls.begin(most + 2, to(1), MEMBER, refused);
        assert_eq!(calls.next().await.unwrap().id, most + 2);
    }

    #[tokio::test]
    async fn a_caller_that_is_not_the_member_any_more_that_it_was_is_not_listened_to() {
        let removed = Standing { directory: None, ..MEMBER };
        let replaced = Standing { directory: Some(Incarnation(8)), ..MEMBER };
        let (desk, mut calls) = of_connection();
        for (id, standing) in [(1, removed), (2, replaced)] {
            calls.begin(id, to(1), standing, refused);
            let Some(response::Body::Forward(answer)) = calls.next().await.unwrap().body else {
                panic!("an answer")
            };
            let Some(forward_response::Outcome::Failed(failure)) = answer.outcome else {
                panic!("{answer:?}")
            };
            assert!(!failure.maybe_applied && desk.0.load(Relaxed) == 0, "{failure:?}");
        }
        // Who does not lead may know less of the members than the caller, and says itself that it does nothing.
        calls.begin(3, to(1), Standing { is_told_by_leader: false, ..removed }, refused);
        // It was let in as one that is about to be a member.
        let mut early = Forwarded::new(desk.clone(), removed);
        early.begin(1, to(1), MEMBER, refused);
        early.begin(2, to(1), replaced, refused);
        assert_eq!(desk.0.load(Relaxed), 2);
    }

    #[tokio::test]
    async fn a_call_that_panics_ends_by_itself_and_one_that_hangs_with_its_connection() {
        let (desk, mut calls) = of_connection();
        calls.begin(1, to(9), MEMBER, refused);
        calls.begin(2, to(2), MEMBER, refused);
        let told = calls.next().await.unwrap();
        let Some(response::Body::Forward(answer)) = told.body else { panic!("{told:?}") };
        let Some(forward_response::Outcome::Failed(failure)) = answer.outcome else { panic!("{answer:?}") };
        assert!(told.id == 2 && failure.maybe_applied, "{failure:?}");
        calls.begin(3, to(1), MEMBER, refused);
        assert_eq!(calls.next().await.unwrap().id, 3, "others go on");
        assert_eq!(Arc::strong_count(&desk.1), 2);
        drop(calls);
        while Arc::strong_count(&desk.1) > 1 {
            tokio::task::yield_now().await;
        }
    }
}
