//! What a guest brings: see [`Guest`].
//!
//! The core replicates a machine and serves it without knowing which. A guest brings what only it knows: its machine, its methods, how
//! the bytes of a request become a command or a query, and how a reply or an answer becomes the bytes of a response.
//!
//! Two services come with every guest ([`services`](super::services)): `quorate.v1.Pipeline` carries many calls on one stream, each a tag, options,
//! the name of a method and the guest's own bytes; `quorate.v1.Sessions` opens and closes sessions. So a guest needs no service of its
//! own. A guest of this crate may have one besides, for generic gRPC clients, and adds it to the port by itself.
//!
//! What the log stores is no part of a guest's vocabulary: requests get new fields, stored commands never change. Between the two stands a
//! file of the guest, such as `kv/calls.rs`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use futures::FutureExt;

use super::failure;
use super::methods::Method;
use super::rights::grants::{DataRight, Touch, Touched};
use crate::call::Rejected;
use crate::machine::StateMachine;
use crate::proto::v1::Failure;
use crate::types::LogId;

/// What `work` of a guest makes. If it panics the request that it was done for fails, and nothing else: the task may be that
/// of the whole node, and is that of other callers.
///
/// # Errors
/// The failure to answer after a panic.
pub(crate) fn guarded<T>(maybe_applied: bool, work: impl FnOnce() -> T) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| failure::panicked(&*panic, maybe_applied))
}

/// The same for work that waits.
///
/// # Errors
/// The failure to answer after a panic.
pub(crate) async fn guarded_async<T>(
    maybe_applied: bool,
    work: impl Future<Output = T>,
) -> Result<T, Failure> {
    let done = AssertUnwindSafe(work).catch_unwind().await;
    done.map_err(|panic| failure::panicked(&*panic, maybe_applied))
}

/// What a machine is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call<C, Q> {
    /// To be replicated and applied.
    Write(C),
    /// To be answered from a state.
    Read(Q),
}

/// The call that a guest makes of a request.
pub type CallOf<G> =
    Call<<<G as Guest>::Machine as StateMachine>::Command, <<G as Guest>::Machine as StateMachine>::Query>;

/// A served machine: what its requests ask for, and how they are answered.
///
/// How a call is carried out (sessions, levels, deadlines), what its answer is headed by, what it may take and how it is
/// counted is the door's.
pub trait Guest: Send + Sync + 'static {
    /// What is replicated.
    type Machine: StateMachine<Query: Clone>;
    /// A request as it arrives.
    type Request: Send + 'static;
    /// A response before it is encoded. One that waits for its client to read should share its memory with the state.
    type Response: Send + 'static;
    /// What of a request is needed to answer it.
    type Asked: Send + 'static;

    /// What can be called. The names are those of the metrics, each once; a port with two of a name, or one of the
    /// operators' names, is not made.
    const METHODS: &'static [Method];

    /// The request in `payload`, which came for the method with this number. No more is made of it than its length warrants.
    /// A slice of the payload of a write keeps the whole message alive that it came in: copy what is to last.
    ///
    /// # Errors
    /// When it is none, or the method is not called in this way.
    fn parse(method: usize, payload: Bytes) -> Result<Self::Request, Rejected>;

    /// Tells `touch` each part of the state that `request`, for the method with this number, touches, and with which right. The
    /// request is carried out or passed on only for callers to whom all of that is granted.
    ///
    /// A part that is left out is open to every caller to whom any part is granted. By default a request touches everything.
    fn touches(method: usize, request: &Self::Request, touch: &mut Touch<'_>) {
        let _ = request;
        let changes = Self::METHODS.get(method).is_none_or(|method| method.changes);
        touch(if changes { DataRight::Write } else { DataRight::Read }, Touched::Everything);
    }

    /// `response` as the payload of an answer.
    fn encode(response: Self::Response) -> Bytes;

    /// The most bytes that the answer to `request` may have, where that is much and the request, a write, cannot be made
    /// again for want of room. Asked for methods that are [weighed](Method::weighed).
    fn expected_bytes(request: &Self::Request) -> usize {
        let _ = request;
        0
    }

    /// The call that `request` asks for, within the machine's limits.
    ///
    /// # Errors
    /// What is wrong with it.
    fn call(request: Self::Request) -> Result<(CallOf<Self>, Self::Asked), Rejected>
    where
        Self: Sized;

    /// The response to a write that stands at `at`. There is no `reply` where it is acknowledged before it is applied.
    ///
    /// # Errors
    /// What the machine has rejected: callers are told that nothing was applied.
    fn written(
        asked: Self::Asked,
        at: LogId,
        reply: Option<<Self::Machine as StateMachine>::Reply>,
    ) -> Result<Self::Response, Rejected>;

    /// The response to a read.
    ///
    /// # Errors
    /// What the machine has rejected.
    fn answered(
        asked: Self::Asked,
        answer: <Self::Machine as StateMachine>::Answer,
    ) -> Result<Self::Response, Rejected>;

    /// Roughly what `response` takes in memory beyond what every one does, and no less than in a message.
    fn response_bytes(response: &Self::Response) -> usize;

    /// Whether replies to what was asked hold points in elapsed time that clients are to see as times of day.
    fn tells_times(asked: &Self::Asked) -> bool {
        let _ = asked;
        false
    }

    /// Maps points in elapsed time to times of day by `time_at`, in a reply that [tells times](Self::tells_times).
    fn tell_reply_times(reply: &mut <Self::Machine as StateMachine>::Reply, time_at: &dyn Fn(u64) -> u64) {
        let _ = (reply, time_at);
    }

    /// The same in an answer.
    fn tell_answer_times(answer: &mut <Self::Machine as StateMachine>::Answer, time_at: &dyn Fn(u64) -> u64) {
        let _ = (answer, time_at);
    }
}
