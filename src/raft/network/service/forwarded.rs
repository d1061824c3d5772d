//! Calls that members pass on to this node, on one connection.
//!
//! A call is begun at most once, however often it arrives and in whatever order: a write without a session has nothing else
//! that would keep it from being applied twice. One that cannot be told any more from one that was seen counts as seen; its
//! caller hears nothing, and takes its outcome for unknown.
//!
//! # Bounds
//!
//! On one connection [`MOST_CALLS`] are under way in each [`CallRoom`](calls::room::CallRoom), on all together [`MOST_CALLS_OF_ALL`]: who a
//! caller says that it is does not matter to the second, and members do not prove who they are. A call counts, and so do the bytes that
//! its [`Desk`] counts for it, until the connection has its answer; a large one until the connection has passed that on.

use std::sync::Arc;
use std::time::Duration;

use futures::future::{BoxFuture, ready};
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::proto::peer::{ForwardRequest, Response, response};
use crate::raft::network::calls::room::{Level, Rooms, TakenRoom};
use crate::raft::network::calls::{self, CallDone, CallError, LeaderCall, MOST_CALLS, MOST_CALLS_OF_ALL};
use crate::raft::network::wire::Malformed;
use crate::runtime;
use crate::types::Incarnation;

/// An answer of at least so many bytes counts until its connection has passed it on: it might lie there for long beside others.
const LARGE_ANSWER_BYTES: usize = 64 * 1024;

/// What a node does for members that pass calls on to it.
pub(crate) trait Desk: Send + Sync {
    /// Does `call`, for a caller that waits for `patience` yet, if this node leads; else says who does. Passes nothing on.
    /// What it has begun may go on when this is dropped.
    fn carry_out(&self, call: LeaderCall, patience: Duration) -> BoxFuture<'static, CallOutcome>;
}

/// What has come of a call.
#[derive(Debug)]
pub(crate) struct CallOutcome {
    /// What its caller is told.
    pub(crate) outcome: Result<CallDone, CallError>,
    /// What counts for that until it is sent; nothing where nothing was begun.
    pub(crate) taken: Option<TakenRoom>,
}

impl From<CallError> for CallOutcome {
    /// Nothing was begun.
    fn from(refusal: CallError) -> Self {
        Self { outcome: Err(refusal), taken: None }
    }
}

/// What a node knows of a caller at present.
#[derive(Debug, Clone, Copy)]
pub(super) struct CallerStanding {
    /// The node leads. What another one knows of the members may be old, and it does nothing in any case.
    pub(super) is_told_by_leader: bool,
    /// The data directory of the member with the caller's id, if there is one.
    pub(super) directory: Option<Incarnation>,
}

/// Numbers of calls that have arrived.
#[derive(Debug, Default)]
struct SeenNumbers {
    newest: u64,
    /// Which of the last [`Self::REACH`] numbers have: one bit for each, at its remainder. Made with the first of them.
    lately: Vec<u64>,
}

impl SeenNumbers {
    /// A call that is later by more counts as seen. Calls leave in the order of their numbers.
    const REACH: u64 = 65_536;
    const WORD_BITS: u64 = u64::BITS as u64;

    /// Notes a number; false if it was, or may have been, noted before.
    fn note(&mut self, id: u64) -> bool {
        if self.newest.checked_sub(id).is_some_and(|late_by| late_by >= Self::REACH) {
            return false;
        }
        if self.lately.is_empty() {
            self.lately = vec![0; (Self::REACH / Self::WORD_BITS) as usize];
        }
        let ahead_by = id.saturating_sub(self.newest);
        if ahead_by >= Self::REACH {
            self.lately.fill(0);
        } else {
            // Their places were those of numbers that are out of reach now.
            for by in 1..=ahead_by {
                let (word, bit) = Self::place(self.newest + by);
                self.lately[word] &= !bit;
            }
        }
        self.newest = self.newest.max(id);
        let (word, bit) = Self::place(id);
        let is_new = self.lately[word] & bit == 0;
        self.lately[word] |= bit;
        is_new
    }

    fn place(id: u64) -> (usize, u64) {
        let at = id % Self::REACH;
        ((at / Self::WORD_BITS) as usize, 1 << (at % Self::WORD_BITS))
    }
}

/// The calls of one connection.
pub(super) struct Forwarded {
    desk: Arc<dyn Desk>,
    /// The caller's data directory, since it was first known as a member on this connection.
    caller: Option<Incarnation>,
    seen: SeenNumbers,
    under_way: FuturesUnordered<BoxFuture<'static, ForwardedAnswer>>,
    /// How many there are.
    own: Rooms<Level>,
    /// The same on all connections.
    all: Arc<Rooms<Level>>,
}

/// An answer, and what it takes up until it is sent.
pub(super) struct ForwardedAnswer {
    response: Response,
    taken: Option<TakenRoom>,
    _places: Option<[TakenRoom; 2]>,
}

impl ForwardedAnswer {
    /// Gives it to its connection, and waits until that has passed it on if it is large. False when nobody is there to take it.
    pub(super) async fn send(self, to: &mpsc::Sender<Response>) -> bool {
        let Self { response, taken, _places } = self;
        let is_large = taken.as_ref().is_some_and(|taken| taken.amount() >= LARGE_ANSWER_BYTES);
        to.send(response).await.is_ok() && (!is_large || to.reserve_many(to.max_capacity()).await.is_ok())
    }
}

impl Forwarded {
    /// Those of a caller that is known so, beside `all` others.
    pub(super) fn new(desk: Arc<dyn Desk>, standing: CallerStanding, all: Arc<Rooms<Level>>) -> Self {
        let (under_way, own) = (FuturesUnordered::new(), Rooms::default());
        Self { desk, caller: standing.directory, seen: SeenNumbers::default(), under_way, own, all }
    }

    /// Begins call `id`, unless it has arrived before. One that is too many is refused at once: it must not wait where reads
    /// would have to wait behind it. One that this build does not know is answered with what `refused` makes of it. One of a caller that
    /// is not the member any more that it was when it was let in is refused: connections outlive memberships.
    pub(super) fn begin(
        &mut self,
        id: u64,
        message: ForwardRequest,
        standing: CallerStanding,
        refused: impl FnOnce(Malformed) -> response::Body,
    ) {
        if !self.seen.note(id) {
            return;
        }
        let answer = move |carried: CallOutcome, places| {
            let body = Some(response::Body::Forward(calls::answer_to_wire(carried.outcome)));
            ForwardedAnswer { response: Response { id, body }, taken: carried.taken, _places: places }
        };
        let answered = match LeaderCall::from_wire(message) {
            Err(malformed) => {
                let response = Response { id, body: Some(refused(malformed)) };
                ready(ForwardedAnswer { response, taken: None, _places: None }).boxed()
            }
            Ok(_) if !self.is_of_member(standing) => ready(answer(not_a_member().into(), None)).boxed(),
            Ok((call, patience)) => match self.places(&call) {
                None => ready(answer(call.operation().too_many().into(), None)).boxed(),
                Some(places) => {
                    // On a task of its own: a command that takes long to decode holds up no reads, and one that panics no others.
                    let task = CarryingTask(runtime::spawn(self.desk.carry_out(call, patience)));
                    task.ended().map(move |carried| answer(carried, Some(places))).boxed()
                }
            },
        };
        self.under_way.push(answered);
    }

    /// A place for one more on this connection, and one on all.
    fn places(&self, call: &LeaderCall) -> Option<[TakenRoom; 2]> {
        let own = TakenRoom::of(1, self.own.of(call.room()), MOST_CALLS)?;
        let all = TakenRoom::of(1, self.all.of(call.room()), MOST_CALLS_OF_ALL)?;
        Some([own, all])
    }

    fn is_of_member(&mut self, standing: CallerStanding) -> bool {
        self.caller = self.caller.or(standing.directory);
        !standing.is_told_by_leader || (standing.directory.is_some() && standing.directory == self.caller)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.under_way.is_empty()
    }

    /// The next answer, in whatever order; none while nothing is under way.
    pub(super) async fn next(&mut self) -> Option<ForwardedAnswer> {
        self.under_way.next().await
    }
}

/// A call that is being carried out, and is given up with its connection.
struct CarryingTask(JoinHandle<CallOutcome>);

impl CarryingTask {
    async fn ended(mut self) -> CallOutcome {
        (&mut self.0).await.unwrap_or_else(|_| {
            let message = "carrying it out came to no end".to_owned();
            CallError::Other { message, maybe_applied: true }.into()
        })
    }
}

impl Drop for CarryingTask {
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

    use bytes::Bytes;

    use super::*;
    use crate::proto::peer::forward_request::{
        self,
        AckLevel::{All, Quorum},
    };
    use crate::proto::peer::{call_failure, forward_response};
    use crate::raft::network::calls::room::CallRoom;
    use crate::types::{HistoryEpoch, Leader, LogId};

    const MEMBER: CallerStanding =
        CallerStanding { is_told_by_leader: true, directory: Some(Incarnation(7)) };

    /// Counts what it is asked to do, ends what is to be handed to node 1, panics at node 2, and has a large reply for node 3.
    #[derive(Default)]
    struct Counting {
        begun: AtomicUsize,
        open: Arc<()>,
        bytes: Level,
    }

    impl Desk for Counting {
        fn carry_out(&self, call: LeaderCall, _: Duration) -> BoxFuture<'static, CallOutcome> {
            self.begun.fetch_add(1, Relaxed);
            match call {
                LeaderCall::TransferLeader { to: Some(1) } => {
                    let outcome = Ok(CallDone::Leads(Leader { node_id: 1, client: String::new() }));
                    ready(CallOutcome { outcome, taken: None }).boxed()
                }
                LeaderCall::TransferLeader { to: Some(2) } => {
                    futures::future::lazy(|_| -> CallOutcome { panic!("only a broken machine does this") })
                        .boxed()
                }
                LeaderCall::TransferLeader { to: Some(3) } => {
                    let outcome = Ok(CallDone::Written {
                        log_id: LogId::new(1, 2),
                        reply: Some(Bytes::from(vec![0; LARGE_ANSWER_BYTES])),
                        held_by: Vec::new(),
                        repeated: false,
                        history: HistoryEpoch::UNKNOWN,
                    });
                    let taken = TakenRoom::of(LARGE_ANSWER_BYTES, &self.bytes, LARGE_ANSWER_BYTES);
                    ready(CallOutcome { outcome, taken }).boxed()
                }
                _ => {
                    let open = self.open.clone();
                    async move {
                        let _open = open;
                        std::future::pending::<CallOutcome>().await
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

    fn write(ack: forward_request::AckLevel) -> ForwardRequest {
        let write = forward_request::Write { ack: ack.into(), ..forward_request::Write::default() };
        ForwardRequest { patience_ms: 1, call: Some(forward_request::Call::Write(write)) }
    }

    fn refused(malformed: Malformed) -> response::Body {
        response::Body::Failure(malformed.to_string())
    }

    fn of_connection() -> (Arc<Counting>, Forwarded) {
        let desk = Arc::new(Counting::default());
        (desk.clone(), Forwarded::new(desk, MEMBER, Arc::default()))
    }

    async fn next(calls: &mut Forwarded) -> Response {
        calls.next().await.unwrap().response
    }

    fn failure(told: Response) -> call_failure::Of {
        let Some(response::Body::Forward(answer)) = told.body else { panic!("{told:?}") };
        let Some(forward_response::Outcome::Failed(failure)) = answer.outcome else { panic!("{answer:?}") };
        assert!(!failure.maybe_applied);
        failure.of.unwrap()
    }

    #[test]
    fn a_number_is_noted_once_in_whatever_order() {
        let mut seen = SeenNumbers::default();
        for id in [3, 1, 9, 2] {
            assert!(seen.note(id), "{id}");
        }
        for id in [9, 3, 1, 2] {
            assert!(!seen.note(id), "{id}");
        }
        assert!(seen.note(9 + SeenNumbers::REACH));
        assert!(!seen.note(9) && !seen.note(4), "too late to tell");
        assert!(seen.note(10));
        let noted: u32 = seen.lately.iter().map(|word| word.count_ones()).sum();
        assert_eq!(noted, 2, "what is out of reach is forgotten");
        assert!(seen.note(u64::MAX) && !seen.note(u64::MAX));
    }

    #[tokio::test]
    async fn a_call_that_arrives_twice_is_begun_once_and_answered_once() {
        let (desk, mut calls) = of_connection();
        for id in [7, 7, 6, 7, 6] {
            calls.begin(id, to(1), MEMBER, refused);
        }
        assert_eq!(desk.begun.load(Relaxed), 2);
        let mut answered = vec![next(&mut calls).await.id, next(&mut calls).await.id];
        answered.sort_unstable();
        assert_eq!(answered, [6, 7]);
        assert!(calls.next().await.is_none());
    }

    #[tokio::test]
    async fn a_call_that_is_not_understood_is_not_begun() {
        let (desk, mut calls) = of_connection();
        calls.begin(1, ForwardRequest { patience_ms: 1, call: None }, MEMBER, refused);
        let Some(response::Body::Failure(_)) = next(&mut calls).await.body else { panic!("a failure") };
        assert!(calls.is_empty() && desk.begun.load(Relaxed) == 0);
    }

    #[tokio::test]
    async fn more_calls_than_there_may_be_are_refused_at_once_and_later_ones_are_taken_again() {
        let (desk, mut calls) = of_connection();
        let most = u64::try_from(MOST_CALLS).unwrap();
        for id in 1..most {
            calls.begin(id, to(9), MEMBER, refused);
        }
        calls.begin(most, to(1), MEMBER, refused);
        calls.begin(most + 1, write(Quorum), MEMBER, refused);
        assert_eq!(desk.begun.load(Relaxed), MOST_CALLS);
        let (first, second) = (next(&mut calls).await, next(&mut calls).await);
        let call_failure::Of::Write(why) = failure(if first.id == most { second } else { first }) else {
            panic!("of a write")
        };
        assert_eq!(format!("{:?}", why.why), "Some(Overloaded(Nothing))");
        calls.begin(most + 2, to(1), MEMBER, refused);
        assert_eq!(next(&mut calls).await.id, most + 2);
        calls.begin(most + 3, to(9), MEMBER, refused);
        calls.begin(most + 4, to(9), MEMBER, refused);
        assert!(matches!(failure(next(&mut calls).await), call_failure::Of::Overloaded(_)));
    }

    #[tokio::test]
    async fn what_waits_for_a_voter_that_is_down_keeps_out_nothing_else() {
        let (desk, mut calls) = of_connection();
        let most = u64::try_from(MOST_CALLS).unwrap();
        for id in 1..=most {
            calls.begin(id, write(All), MEMBER, refused);
        }
        calls.begin(most + 1, write(All), MEMBER, refused);
        assert!(matches!(failure(next(&mut calls).await), call_failure::Of::Write(_)));
        calls.begin(most + 2, write(Quorum), MEMBER, refused);
        calls.begin(most + 3, to(1), MEMBER, refused);
        assert_eq!(next(&mut calls).await.id, most + 3);
        assert_eq!(desk.begun.load(Relaxed), MOST_CALLS + 2);
    }

    #[tokio::test]
    async fn a_caller_has_no_more_under_way_by_saying_that_it_is_many() {
        let (desk, all) = (Arc::new(Counting::default()), Arc::<Rooms<Level>>::default());
        let most = u64::try_from(MOST_CALLS).unwrap();
        let mut many: Vec<_> = (0..5).map(|_| Forwarded::new(desk.clone(), MEMBER, all.clone())).collect();
        for calls in &mut many {
            for id in 1..=most {
                calls.begin(id, to(9), MEMBER, refused);
            }
        }
        assert_eq!(desk.begun.load(Relaxed), MOST_CALLS_OF_ALL);
        assert_eq!(all.of(CallRoom::Quorum).load(Relaxed), MOST_CALLS_OF_ALL);
        let mut last = many.pop().unwrap();
        assert!(matches!(failure(next(&mut last).await), call_failure::Of::Overloaded(_)));
        drop(many);
        assert_eq!(all.of(CallRoom::Quorum).load(Relaxed), 0);
        last.begin(most + 1, to(9), MEMBER, refused);
        assert_eq!(desk.begun.load(Relaxed), MOST_CALLS_OF_ALL + 1);
    }

    #[tokio::test]
    async fn a_large_answer_counts_until_it_is_taken() {
        let (desk, mut calls) = of_connection();
        let (sender, mut receiver) = mpsc::channel(4);
        calls.begin(1, to(3), MEMBER, refused);
        let answer = calls.next().await.unwrap();
        let sending = runtime::spawn(async move { answer.send(&sender).await });
        while receiver.is_empty() {
            tokio::task::yield_now().await;
        }
        let own = || calls.own.of(CallRoom::Quorum).load(Relaxed);
        assert_eq!((desk.bytes.load(Relaxed), own()), (LARGE_ANSWER_BYTES, 1));
        assert_eq!(receiver.recv().await.unwrap().id, 1);
        assert!(sending.await.unwrap());
        assert_eq!((desk.bytes.load(Relaxed), own()), (0, 0));
    }

    #[tokio::test]
    async fn a_caller_that_is_not_the_member_any_more_that_it_was_is_not_listened_to() {
        let removed = CallerStanding { directory: None, ..MEMBER };
        let replaced = CallerStanding { directory: Some(Incarnation(8)), ..MEMBER };
        let (desk, mut calls) = of_connection();
        for (id, standing) in [(1, removed), (2, replaced)] {
            calls.begin(id, to(1), standing, refused);
            let Some(response::Body::Forward(answer)) = next(&mut calls).await.body else {
                panic!("an answer")
            };
            let Some(forward_response::Outcome::Failed(failure)) = answer.outcome else {
                panic!("{answer:?}")
            };
            assert!(!failure.maybe_applied && desk.begun.load(Relaxed) == 0, "{failure:?}");
        }
        // Who does not lead may know less of the members than the caller, and says itself that it does nothing.
        calls.begin(3, to(1), CallerStanding { is_told_by_leader: false, ..removed }, refused);
        // It was let in as one that is about to be a member.
        let mut early = Forwarded::new(desk.clone(), removed, Arc::default());
        early.begin(1, to(1), MEMBER, refused);
        early.begin(2, to(1), replaced, refused);
        assert_eq!(desk.begun.load(Relaxed), 2);
    }

    #[tokio::test]
    async fn a_call_that_panics_ends_by_itself_and_one_that_hangs_with_its_connection() {
        let (desk, mut calls) = of_connection();
        calls.begin(1, to(9), MEMBER, refused);
        calls.begin(2, to(2), MEMBER, refused);
        let told = next(&mut calls).await;
        let Some(response::Body::Forward(answer)) = told.body else { panic!("{told:?}") };
        let Some(forward_response::Outcome::Failed(failure)) = answer.outcome else { panic!("{answer:?}") };
        assert!(told.id == 2 && failure.maybe_applied, "{failure:?}");
        calls.begin(3, to(1), MEMBER, refused);
        assert_eq!(next(&mut calls).await.id, 3, "others go on");
        assert_eq!(Arc::strong_count(&desk.open), 2);
        drop(calls);
        while Arc::strong_count(&desk.open) > 1 {
            tokio::task::yield_now().await;
        }
    }
}
