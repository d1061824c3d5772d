//! Any machine behind the door, with nothing written for it: see [`MachineGuest`].

use std::convert::Infallible;
use std::fmt;
use std::marker::PhantomData;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use super::guest::{Call, CallOf, Guest};
use super::methods::Method;
use crate::call::Rejected;
use crate::machine::message::{self, NotUnderstood};
use crate::machine::{DecodeError, StateMachine};
use crate::reason::Reason;
use crate::types::LogId;

/// The guest of a machine whose commands, queries, replies and answers go over the network as they are encoded for the log.
///
/// Its methods are `write` and `read`; the other side is [`client::MachineClient`](crate::client::MachineClient). A caller of another
/// version of the machine is understood, or refused with words that say whom to upgrade. A machine with a vocabulary of its own
/// for its callers, in JSON say, or with limits on what they ask for, has a [`Guest`] of its own.
///
/// ```no_run
/// # use quorate::server::{MachineGuest, Server};
/// # use quorate::StateMachine;
/// # async fn bind<Jobs: StateMachine<Query = String, Answer = String>>() -> Result<(), Box<dyn std::error::Error>> {
/// let server = Server::<MachineGuest<Jobs>>::bind("127.0.0.1:7801").await?;
/// # Ok(())
/// # }
/// ```
pub struct MachineGuest<M> {
    /// There is none: it is a name for functions.
    never: Infallible,
    machine: PhantomData<fn() -> M>,
}

impl<M> fmt::Debug for MachineGuest<M> {
    fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.never {}
    }
}

/// Where `write` stands among the methods; the other one is `read`.
const WRITE: usize = 0;

impl<M> Guest for MachineGuest<M>
where
    M: StateMachine<Query: Clone + DeserializeOwned, Answer: Serialize>,
{
    type Machine = M;
    type Request = (usize, Bytes);
    type Response = Bytes;
    /// How many machines the caller lacks that this node has.
    type Asked = usize;

    const METHODS: &'static [Method] = &[Method::write(message::WRITE), Method::read(message::READ)];

    fn parse(method: usize, payload: Bytes) -> Result<Self::Request, Rejected> {
        Ok((method, payload))
    }

    fn call((method, payload): Self::Request) -> Result<(CallOf<Self>, usize), Rejected> {
        if method == WRITE {
            let command = message::read_command::<M>(&payload).map_err(refused)?;
            return Ok((Call::Write(command), 0));
        }
        let (query, lacks) = message::read_query::<M>(&payload).map_err(refused)?;
        Ok((Call::Read(query), lacks))
    }

    fn written(_: usize, _: LogId, reply: Option<M::Reply>) -> Result<Bytes, Rejected> {
        let message = message::write_reply::<M>(reply.as_ref());
        message.map(Bytes::from).map_err(|error| unsaid("reply", true, &error))
    }

    fn answered(lacks: usize, answer: M::Answer) -> Result<Bytes, Rejected> {
        let message = message::write_answer::<M>(&answer, lacks);
        message.map(Bytes::from).map_err(|error| unsaid("answer", false, &error))
    }

    fn encode(response: Bytes) -> Bytes {
        response
    }

    fn response_bytes(response: &Bytes) -> usize {
        response.len()
    }
}

fn refused(error: NotUnderstood) -> Rejected {
    match error {
        // Its callers ask again, here and elsewhere, until their time is over.
        NotUnderstood::Newer(words) => Rejected::new(Reason::VersionNotAgreed, words),
        NotUnderstood::Faulty(words) => Rejected::invalid(words),
    }
}

fn unsaid(what: &str, maybe_applied: bool, error: &DecodeError) -> Rejected {
    let words = format!("the machine's {what} cannot be encoded: {error}");
    Rejected { maybe_applied, ..Rejected::new(Reason::Unspecified, words) }
}
