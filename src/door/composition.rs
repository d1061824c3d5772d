//! Several guests behind one door: those of a [composition](Composed) of machines, method by method.
//!
//! `Composed<Kv, Jobs, 1>` is the guest of `Composed<KvMachine, Queue, 1>`. Its methods are those of both, told apart by their names:
//! a port with two of one name is not made. Which machine a command is for follows from the method. Sessions, levels and limits are one
//! for all.

use bytes::Bytes;

use super::guest::{Call, CallOf, Guest};
use super::methods::Method;
use super::rights::grants::Touch;
use crate::call::Rejected;
use crate::machine::{Composed, Either, StateMachine};
use crate::types::LogId;

/// Most methods of all guests of a node.
const MOST_METHODS: usize = 256;

impl<A: Guest, B: Guest, const NUMBER: u16> Composed<A, B, NUMBER>
where
    B::Machine: Default,
{
    const ALL: [Method; MOST_METHODS] = {
        let (base, added) = (A::METHODS, B::METHODS);
        assert!(base.len() + added.len() <= MOST_METHODS, "a node has at most 256 methods");
        let mut all = [Method::read(""); MOST_METHODS];
        let mut at = 0;
        while at < base.len() {
            all[at] = base[at];
            at += 1;
        }
        while at < base.len() + added.len() {
            all[at] = added[at - base.len()];
            at += 1;
        }
        all
    };

    const ALL_METHODS: &'static [Method; MOST_METHODS] = &Self::ALL;
}

impl<A: Guest, B: Guest, const NUMBER: u16> Guest for Composed<A, B, NUMBER>
where
    B::Machine: Default,
{
    type Machine = Composed<A::Machine, B::Machine, NUMBER>;
    type Request = Either<A::Request, B::Request>;
    type Response = Either<A::Response, B::Response>;
    type Asked = Either<A::Asked, B::Asked>;

    const METHODS: &'static [Method] = Self::ALL_METHODS.split_at(A::METHODS.len() + B::METHODS.len()).0;

    fn parse(method: usize, payload: Bytes) -> Result<Self::Request, Rejected> {
        match method.checked_sub(A::METHODS.len()) {
            None => A::parse(method, payload).map(Either::Base),
            Some(method) => B::parse(method, payload).map(Either::Added),
        }
    }

    fn touches(method: usize, request: &Self::Request, touch: &mut Touch<'_>) {
        match request {
            Either::Base(request) => A::touches(method, request, touch),
            Either::Added(request) => B::touches(method.saturating_sub(A::METHODS.len()), request, touch),
        }
    }

    fn encode(response: Self::Response) -> Bytes {
        match response {
            Either::Base(response) => A::encode(response),
            Either::Added(response) => B::encode(response),
        }
    }

    fn expected_bytes(request: &Self::Request) -> usize {
        match request {
            Either::Base(request) => A::expected_bytes(request),
            Either::Added(request) => B::expected_bytes(request),
        }
    }

    fn call(request: Self::Request) -> Result<(CallOf<Self>, Self::Asked), Rejected> {
        Ok(match request {
            Either::Base(request) => {
                let (call, asked) = A::call(request)?;
                (in_either(call, Either::Base, Either::Base), Either::Base(asked))
            }
            Either::Added(request) => {
                let (call, asked) = B::call(request)?;
                (in_either(call, Either::Added, Either::Added), Either::Added(asked))
            }
        })
    }

    fn written(
        asked: Self::Asked,
        at: LogId,
        reply: Option<<Self::Machine as StateMachine>::Reply>,
    ) -> Result<Self::Response, Rejected> {
        // A reply is decoded as that of the machine that the command was for.
        match (asked, reply) {
            (Either::Base(asked), None) => A::written(asked, at, None).map(Either::Base),
            (Either::Base(asked), Some(Either::Base(reply))) => {
                A::written(asked, at, Some(reply)).map(Either::Base)
            }
            (Either::Added(asked), None) => B::written(asked, at, None).map(Either::Added),
            (Either::Added(asked), Some(Either::Added(reply))) => {
                B::written(asked, at, Some(reply)).map(Either::Added)
            }
            _ => Err(Rejected::unexpected(true)),
        }
    }

    fn answered(
        asked: Self::Asked,
        answer: <Self::Machine as StateMachine>::Answer,
    ) -> Result<Self::Response, Rejected> {
        match (asked, answer) {
            (Either::Base(asked), Either::Base(answer)) => A::answered(asked, answer).map(Either::Base),
            (Either::Added(asked), Either::Added(answer)) => B::answered(asked, answer).map(Either::Added),
            _ => Err(Rejected::unexpected(false)),
        }
    }

    fn response_bytes(response: &Self::Response) -> usize {
        match response {
            Either::Base(response) => A::response_bytes(response),
            Either::Added(response) => B::response_bytes(response),
        }
    }

    fn tells_times(asked: &Self::Asked) -> bool {
        match asked {
            Either::Base(asked) => A::tells_times(asked),
            Either::Added(asked) => B::tells_times(asked),
        }
    }

    fn tell_reply_times(reply: &mut <Self::Machine as StateMachine>::Reply, time_at: &dyn Fn(u64) -> u64) {
        match reply {
            Either::Base(reply) => A::tell_reply_times(reply, time_at),
            Either::Added(reply) => B::tell_reply_times(reply, time_at),
        }
    }

    fn tell_answer_times(answer: &mut <Self::Machine as StateMachine>::Answer, time_at: &dyn Fn(u64) -> u64) {
        match answer {
            Either::Base(answer) => A::tell_answer_times(answer, time_at),
            Either::Added(answer) => B::tell_answer_times(answer, time_at),
        }
    }
}

/// The call of one machine as that of several.
fn in_either<C, Q, D, R>(
    call: Call<C, Q>,
    command: impl FnOnce(C) -> D,
    query: impl FnOnce(Q) -> R,
) -> Call<D, R> {
    match call {
        Call::Write(write) => Call::Write(command(write)),
        Call::Read(read) => Call::Read(query(read)),
    }
}
