//! The client of a machine that its nodes serve as [`MachineGuest`](crate::server::MachineGuest): commands and queries, as the machine has them.

use std::fmt;
use std::marker::PhantomData;
use std::ops::Deref;

use bytes::Bytes;
use serde::{Serialize, de::DeserializeOwned};

use super::config::ClientConfig;
use super::endpoint::ConfigError;
use super::error::{ClientError, UnconfirmedAnswer};
use super::once::Once;
use super::options::WriteOptions;
use super::preference::ReadPreference;
use super::{Answer, Client};
use crate::call::Header;
use crate::machine::{DecodeError, StateMachine, message};
use crate::reason::Reason;
use crate::types::{AckLevel, ReadOptions};

/// A handle on a cluster that serves the machine `M` as it is. Cheap to clone; all clones share their connections.
///
/// It can all that a [`Client`] can: ask for the status, operate the cluster, give back its session.
///
/// A client and a node need not be of the same version of the machine. A command goes on its way with the version that it
/// needs; a node that does not read that yet refuses it, and the client asks again until its time is over, as it does while the members have not
/// agreed on that version ([`Reason::VersionNotAgreed`]). Which machine the nodes serve is for the program to know: nodes take the
/// commands of another one for their own where the bytes allow it.
pub struct MachineClient<M> {
    client: Client,
    machine: PhantomData<fn() -> M>,
}

/// What was answered to a command.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Written<R> {
    /// Who answered, and where in the log the command stands.
    pub header: Header,
    /// What the machine replied.
    pub reply: R,
}

/// What was answered to a query.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Answered<A> {
    /// Who answered, from which state.
    pub header: Header,
    /// What the machine answered.
    pub answer: A,
}

/// A place for one command in the client's session: see [`Once`].
pub struct MachineOnce<M> {
    once: Once,
    machine: PhantomData<fn() -> M>,
}

impl<M> Clone for MachineClient<M> {
    fn clone(&self) -> Self {
        Self::from(self.client.clone())
    }
}

impl<M> fmt::Debug for MachineClient<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.client.fmt(f)
    }
}

impl<M> fmt::Debug for MachineOnce<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.once.fmt(f)
    }
}

/// The same connections and the same session, for this machine: nodes that serve several guests have a client for each.
impl<M> From<Client> for MachineClient<M> {
    fn from(client: Client) -> Self {
        Self { client, machine: PhantomData }
    }
}

impl<M> Deref for MachineClient<M> {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl<M> MachineClient<M> {
    /// A client of the cluster that the nodes at `endpoints` belong to, as [`Client::new`] makes it.
    ///
    /// # Errors
    /// As [`Client::new`].
    pub fn new<I>(endpoints: I, config: ClientConfig) -> Result<Self, ConfigError>
    where
        I: IntoIterator,
        I::Item: AsRef<str>,
    {
        Client::new(endpoints, config).map(Self::from)
    }

    /// The same client, with its connections and its session, whose reads go where `preference` says.
    #[must_use]
    pub fn preferring(&self, preference: ReadPreference) -> Self {
        Self::from(self.client.preferring(preference))
    }
}

impl<M: StateMachine> MachineClient<M> {
    /// Writes: returns once `command` is committed by a quorum and applied. However often it is sent on the way, it is applied at most once.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::maybe_applied`] says whether it may have been applied all the same.
    pub async fn write(&self, command: M::Command) -> Result<Written<M::Reply>, ClientError> {
        self.write_with(command, AckLevel::default()).await.and_then(Written::applied)
    }

    /// The same, acknowledged as `options` say: [`WriteOptions`] or an [`AckLevel`]. At [`AckLevel::Leader`] there is a reply
    /// only if there was one by then.
    ///
    /// # Errors
    /// See [`ClientError`]; [`ClientError::AckTimeout`] when not every voter holds it in time, of which
    /// [`unconfirmed`](Self::unconfirmed) makes what was replied.
    pub async fn write_with(
        &self,
        command: M::Command,
        options: impl Into<WriteOptions>,
    ) -> Result<Written<Option<M::Reply>>, ClientError> {
        let (machine, payload) = encoded::<M>(&command)?;
        let answered = self.client.write(message::WRITE, payload, options).await;
        written::<M>(machine, answered.map_err(|error| error.answering(|answer| answer.machine = machine))?)
    }

    /// What came of a write that ended with `error`, if that says that [not every voter](ClientError::AckTimeout) has confirmed it.
    /// `None` for any other error, and where it is not known.
    pub fn unconfirmed(error: &ClientError) -> Option<Written<M::Reply>> {
        let UnconfirmedAnswer { method, header, payload, machine } = error.unconfirmed()?;
        let reply =
            message::read_reply::<M>(*machine, payload).ok().filter(|_| *method == message::WRITE)??;
        Some(Written { header: header.clone(), reply })
    }

    /// Reads: asks the machine, where level and preference say. `read` is a [`ReadLevel`](crate::ReadLevel), or
    /// [`ReadOptions`] such as [`Header::then_read`] makes.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn read(
        &self,
        query: M::Query,
        read: impl Into<ReadOptions>,
    ) -> Result<Answered<M::Answer>, ClientError>
    where
        M: StateMachine<Query: Serialize, Answer: DeserializeOwned>,
    {
        let payload = message::write_query::<M>(&query).map_err(unencodable)?;
        let Answer { header, payload } = self.client.read(message::READ, payload, read).await?;
        match message::read_answer::<M>(&payload) {
            Ok(answer) => Ok(Answered { header, answer }),
            Err(error) => Err(unreadable(&header, "answer", false, &error)),
        }
    }

    /// A place for one command, which may be asked for as often as it takes. Opens a session if there is none.
    ///
    /// # Errors
    /// See [`ClientError`]; nothing was written.
    pub async fn once(&self) -> Result<MachineOnce<M>, ClientError> {
        self.client.once().await.map(|once| MachineOnce { once, machine: PhantomData })
    }
}

impl<M: StateMachine> MachineOnce<M> {
    /// Writes `command`, which must be the same every time. However often it is called, the command is applied at most
    /// once, and every call that succeeds returns what that once returned.
    ///
    /// # Errors
    /// See [`ClientError`]. Unless the error [is final](ClientError::is_final) the call may be repeated.
    pub async fn write(&mut self, command: &M::Command) -> Result<Written<M::Reply>, ClientError> {
        let (machine, payload) = encoded::<M>(command)?;
        let answer = self.once.write(message::WRITE, payload, AckLevel::default()).await?;
        written::<M>(machine, answer).and_then(Written::applied)
    }
}

impl<R> Written<Option<R>> {
    /// Of a write that waits for its reply.
    fn applied(self) -> Result<Written<R>, ClientError> {
        let Self { header, reply } = self;
        match reply {
            Some(reply) => Ok(Written { header, reply }),
            None => Err(unreadable(&header, "reply", true, &DecodeError::new("there is none"))),
        }
    }
}

/// The number of the machine that `command` is for, and the message.
fn encoded<M: StateMachine>(command: &M::Command) -> Result<(u16, Bytes), ClientError> {
    let message = message::write_command::<M>(command).map_err(unencodable)?;
    Ok((M::wrote(command).machine, message.into()))
}

fn written<M: StateMachine>(
    machine: u16,
    Answer { header, payload }: Answer,
) -> Result<Written<Option<M::Reply>>, ClientError> {
    match message::read_reply::<M>(machine, &payload) {
        Ok(reply) => Ok(Written { header, reply }),
        Err(error) => Err(unreadable(&header, "reply", true, &error)),
    }
}

fn unencodable(error: DecodeError) -> ClientError {
    ClientError::Rejected { reason: Reason::Invalid, message: format!("it cannot be encoded: {error}") }
}

fn unreadable(header: &Header, what: &str, maybe_applied: bool, error: &DecodeError) -> ClientError {
    let message = format!("its {what} is none of the machine that this program knows: {error}");
    ClientError::Unreadable { node_id: header.node_id, message, maybe_applied }
}
