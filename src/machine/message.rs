//! What a client of a machine and the nodes that serve it say to each other: commands, queries, and what comes of them, as bytes.
//!
//! Both sides know the machine, and neither knows which version of it the other one is. So what is asked says by which version it was
//! written, and is understood, or refused with words about versions; it is never guessed at:
//!
//! | message | bytes |
//! |---|---|
//! | command | format (1), machine, version that [reads it](StateMachine::command_version), the command as the log holds it |
//! | its reply | 0 where there is none yet, else 1 and the reply as a session keeps it |
//! | query | format (1), the last of the client's machines, its version, the query |
//! | its answer | the answer |
//!
//! All numbers are as [`encode`] writes them. Replies, queries and answers have no versions of their own: an enumeration of them
//! gets new variants at its end and nowhere else, and is otherwise left as it is.
//!
//! # Several machines
//!
//! A query of a [composition](super::Composed) is [`Either`](super::Either) of the base's or of the added machine's, which is one byte in front. Compositions grow
//! from the inside out. So the query of a client that does not have the last machines yet is one of the base, and gets the bytes
//! in front that it lacks; they are taken off the answer.

use std::fmt;

use serde::{Serialize, de::DeserializeOwned};

use super::encoding::decode_first;
use super::{DecodeError, StateMachine, decode, encode};
use crate::types::{MachineVersion, ReadableVersions};

/// The method of commands.
pub(crate) const WRITE: &str = "write";
/// The method of queries.
pub(crate) const READ: &str = "read";

/// How messages are laid out. Another layout gets another number.
const FORMAT: u8 = 1;
/// In front of what is asked of the base of a composition, and of what it answers: the number of the first variant.
const OF_BASE: u8 = 0;

/// What a node does not understand.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NotUnderstood {
    /// The caller is newer than this node, which may be upgraded before long.
    Newer(String),
    /// It fails again wherever it is sent.
    Faulty(String),
}

impl NotUnderstood {
    fn version(what: &str, wrote: MachineVersion, reads: Option<ReadableVersions>) -> Self {
        let Some(ReadableVersions { oldest, newest, .. }) = reads else {
            return Self::Newer(format!(
                "the {what} is of {wrote}, which this node does not have: upgrade this node"
            ));
        };
        let readable =
            if oldest == newest { format!("{oldest} only") } else { format!("{oldest} to {newest}") };
        let said = format!("the {what} is of {wrote}, and this node reads {readable}");
        match wrote.version > newest {
            true => Self::Newer(format!("{said}: upgrade this node")),
            false => Self::Faulty(format!("{said}: upgrade the caller")),
        }
    }

    fn content(what: &str, error: &impl fmt::Display) -> Self {
        Self::Faulty(format!("this is no {what} of the machine that this node serves: {error}"))
    }
}

/// What a message begins with, and the rest of it.
fn begin<'a>(what: &str, message: &'a [u8]) -> Result<(MachineVersion, &'a [u8]), NotUnderstood> {
    let begins = |error| NotUnderstood::content(what, &error);
    let (format, rest) = decode_first::<u8>(message).map_err(begins)?;
    if format != FORMAT {
        let layout = format!("it is laid out in way {format}, and this node reads {FORMAT} only");
        return Err(NotUnderstood::content(what, &layout));
    }
    let ((machine, version), rest) = decode_first(rest).map_err(begins)?;
    Ok((MachineVersion { machine, version }, rest))
}

fn message(of: MachineVersion, content: &impl Serialize) -> Result<Vec<u8>, DecodeError> {
    let mut message = encode(&(FORMAT, of.machine, of.version))?;
    message.append(&mut encode(content)?);
    Ok(message)
}

/// `command`, for whichever node leads.
///
/// # Errors
/// When it cannot be encoded.
pub(crate) fn write_command<M: StateMachine>(command: &M::Command) -> Result<Vec<u8>, DecodeError> {
    message(M::wrote(command), &M::content(command))
}

/// The command in `message`.
///
/// # Errors
/// See [`NotUnderstood`].
pub(crate) fn read_command<M: StateMachine>(message: &[u8]) -> Result<M::Command, NotUnderstood> {
    let (wrote, content) = begin("command", message)?;
    let reads = M::MACHINES.iter().find(|reads| reads.machine == wrote.machine).copied();
    if !reads.is_some_and(|reads| reads.contains(wrote.version)) {
        return Err(NotUnderstood::version("command", wrote, reads));
    }
    M::decode_of(wrote, content).map_err(|error| NotUnderstood::content("command", &error))
}

/// What a command is answered, `None` where it is not applied yet.
///
/// # Errors
/// When it cannot be encoded.
pub(crate) fn write_reply<M: StateMachine>(reply: Option<&M::Reply>) -> Result<Vec<u8>, DecodeError> {
    let mut message = vec![u8::from(reply.is_some())];
    if let Some(reply) = reply {
        message.append(&mut encode(&M::reply_content(reply))?);
    }
    Ok(message)
}

/// The reply in `message`, to a command of `machine`.
///
/// # Errors
/// When it is none.
pub(crate) fn read_reply<M: StateMachine>(
    machine: u16,
    message: &[u8],
) -> Result<Option<M::Reply>, DecodeError> {
    match message.split_first() {
        Some((0, [])) => Ok(None),
        Some((1, reply)) => M::decode_reply(machine, reply).map(Some),
        _ => Err(DecodeError::new("it does not begin as one does")),
    }
}

/// The last of a build's machines, and what it is at.
fn last<M: StateMachine>() -> MachineVersion {
    let last = M::MACHINES.last().expect("invariant: a build has a machine");
    MachineVersion { machine: last.machine, version: last.newest }
}

/// `query`, for any node.
///
/// # Errors
/// When it cannot be encoded.
pub(crate) fn write_query<M>(query: &M::Query) -> Result<Vec<u8>, DecodeError>
where
    M: StateMachine<Query: Serialize>,
{
    message(last::<M>(), query)
}

/// The query in `message`, and how many machines this build has that its caller does not.
///
/// # Errors
/// See [`NotUnderstood`].
pub(crate) fn read_query<M>(message: &[u8]) -> Result<(M::Query, usize), NotUnderstood>
where
    M: StateMachine<Query: DeserializeOwned>,
{
    let (wrote, content) = begin("query", message)?;
    let Some(at) = M::MACHINES.iter().position(|reads| reads.machine == wrote.machine) else {
        return Err(NotUnderstood::version("query", wrote, None));
    };
    let lacks = M::MACHINES.len() - 1 - at;
    let query = match lacks {
        0 => decode(content),
        _ => decode(&[vec![OF_BASE; lacks].as_slice(), content].concat()),
    };
    let reads = M::MACHINES[at];
    match query {
        Ok(query) => Ok((query, lacks)),
        Err(_) if !reads.contains(wrote.version) => Err(NotUnderstood::version("query", wrote, Some(reads))),
        Err(error) => Err(NotUnderstood::content("query", &error)),
    }
}

/// What a query is answered whose caller lacks so many machines.
///
/// # Errors
/// When it cannot be encoded, or is no answer of those that the caller has.
pub(crate) fn write_answer<M>(answer: &M::Answer, lacks: usize) -> Result<Vec<u8>, DecodeError>
where
    M: StateMachine<Answer: Serialize>,
{
    let mut message = encode(answer)?;
    match message.get(..lacks) {
        Some(front) if front.iter().all(|byte| *byte == OF_BASE) => {
            message.drain(..lacks);
            Ok(message)
        }
        _ => Err(DecodeError::new("it is of a machine that was not asked")),
    }
}

/// The answer in `message`.
///
/// # Errors
/// When it is none.
pub(crate) fn read_answer<M>(message: &[u8]) -> Result<M::Answer, DecodeError>
where
    M: StateMachine<Answer: DeserializeOwned>,
{
    decode(message)
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};

    use serde::Deserialize;

    use super::super::{ApplyContext, Composed, Either};
    use super::*;

    /// Counts, in several builds: the first ones cannot multiply, the last ones read nothing of the first.
    #[derive(Debug, Clone, Default, PartialEq, Eq)]
    struct Count<const BUILD: u32>(u64);

    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    enum Change {
        Add(u64),
        Multiply(u64),
    }

    #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
    enum Ask {
        Sum,
        Digits,
    }

    impl<const BUILD: u32> StateMachine for Count<BUILD> {
        type Command = Change;
        type Reply = u64;
        type Query = Ask;
        type Answer = String;
        type View = u64;

        const VERSION: u32 = BUILD;
        const OLDEST_VERSION: u32 = if BUILD < 5 { 0 } else { 5 };

        fn command_version(command: &Change) -> u32 {
            match command {
                Change::Add(_) => Self::OLDEST_VERSION,
                Change::Multiply(_) => Self::OLDEST_VERSION.max(1),
            }
        }

        fn apply(&mut self, _: &ApplyContext, command: Change) -> u64 {
            match command {
                Change::Add(number) => self.0 += number,
                Change::Multiply(number) => self.0 *= number,
            }
            self.0
        }

        fn view(&self) -> u64 {
            self.0
        }

        fn query(view: &u64, _: Ask) -> String {
            view.to_string()
        }

        fn write_snapshot(_: &u64, _: &mut dyn Write) -> io::Result<()> {
            Ok(())
        }

        fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
            Ok(Self::default())
        }
    }

    type Two = Composed<Count<1>, Count<0>, 3>;
    type Three = Composed<Two, Count<0>, 7>;

    fn newer(said: &str) -> NotUnderstood {
        NotUnderstood::Newer(said.to_owned())
    }

    #[test]
    fn what_a_machine_says_is_understood_on_the_other_side() {
        for command in [Change::Add(300), Change::Multiply(7)] {
            let message = write_command::<Count<1>>(&command).unwrap();
            assert_eq!(read_command::<Count<1>>(&message), Ok(command));
        }
        for reply in [None, Some(0), Some(300)] {
            let message = write_reply::<Count<1>>(reply.as_ref()).unwrap();
            assert_eq!(read_reply::<Count<1>>(0, &message), Ok(reply));
        }
        let message = write_query::<Count<1>>(&Ask::Digits).unwrap();
        assert_eq!(read_query::<Count<1>>(&message), Ok((Ask::Digits, 0)));
        let message = write_answer::<Count<1>>(&"17".to_owned(), 0).unwrap();
        assert_eq!(read_answer::<Count<1>>(&message).unwrap(), "17");
        for message in [&[][..], &[2], &[0, 1], &[1], &[1, 5, 5]] {
            assert!(read_reply::<Count<1>>(0, message).is_err(), "{message:?}");
        }
    }

    #[test]
    fn a_caller_of_another_version_is_understood_or_told_who_is_to_be_upgraded() {
        let add = write_command::<Count<1>>(&Change::Add(3)).unwrap();
        assert_eq!(read_command::<Count<0>>(&add), Ok(Change::Add(3)), "the first version has it, too");
        let multiply = write_command::<Count<1>>(&Change::Multiply(3)).unwrap();
        let said =
            "the command is of version 1 of the machine, and this node reads 0 only: upgrade this node";
        assert_eq!(read_command::<Count<0>>(&multiply), Err(newer(said)));
        let said =
            "the command is of version 0 of the machine, and this node reads 5 to 6: upgrade the caller";
        assert_eq!(read_command::<Count<6>>(&add), Err(NotUnderstood::Faulty(said.to_owned())));

        let query = write_query::<Count<1>>(&Ask::Sum).unwrap();
        assert_eq!(read_query::<Count<0>>(&query), Ok((Ask::Sum, 0)), "it is one of before");
        let mut later = query.clone();
        *later.last_mut().unwrap() = 2;
        let said = "the query is of version 1 of the machine, and this node reads 0 only: upgrade this node";
        assert_eq!(read_query::<Count<0>>(&later), Err(newer(said)));
        assert!(matches!(read_query::<Count<1>>(&later), Err(NotUnderstood::Faulty(_))), "none has it");
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in [&[][..], &[1], &[1, 0, 0], &[1, 0, 0, 9], &[1, 0, 0, 0, 3, 3]] {
            assert!(matches!(read_command::<Count<1>>(bytes), Err(NotUnderstood::Faulty(_))), "{bytes:?}");
            let query = read_query::<Count<1>>(bytes);
            assert!(matches!(query, Err(NotUnderstood::Faulty(_))), "{bytes:?}");
        }
        let said = "this is no command of the machine that this node serves: it is laid out in way 2, and this node reads 1 only";
        assert_eq!(read_command::<Count<1>>(&[2, 0, 0, 0, 3]), Err(NotUnderstood::Faulty(said.to_owned())));
    }

    #[test]
    fn machines_of_one_log_are_called_one_like_the_other() {
        let added = || Either::Base(Either::Added(Change::Add(4)));
        let message = write_command::<Three>(&added()).unwrap();
        assert_eq!(read_command::<Three>(&message), Ok(added()));
        let reply = write_reply::<Three>(Some(&Either::Base(Either::Added(9)))).unwrap();
        assert_eq!(read_reply::<Three>(3, &reply).unwrap(), Some(Either::Base(Either::Added(9))));
        let said =
            "the command is of version 0 of machine 3, which this node does not have: upgrade this node";
        assert_eq!(read_command::<Count<1>>(&message), Err(newer(said)));
    }

    #[test]
    fn a_caller_that_lacks_machines_goes_on_with_those_it_has() {
        let message = write_command::<Count<1>>(&Change::Add(4)).unwrap();
        assert_eq!(read_command::<Three>(&message), Ok(Either::Base(Either::Base(Change::Add(4)))));
        let alone = write_query::<Count<1>>(&Ask::Digits).unwrap();
        assert_eq!(read_query::<Three>(&alone), Ok((Either::Base(Either::Base(Ask::Digits)), 2)));
        let both = write_query::<Two>(&Either::Added(Ask::Digits)).unwrap();
        assert_eq!(read_query::<Three>(&both), Ok((Either::Base(Either::Added(Ask::Digits)), 1)));
        let answer = Either::Base(Either::Added("8".to_owned()));
        let message = write_answer::<Three>(&answer, 1).unwrap();
        assert_eq!(read_answer::<Two>(&message).unwrap(), Either::Added("8".to_owned()));
        assert!(write_answer::<Three>(&answer, 2).is_err(), "the first machine was not asked");
        assert!(write_answer::<Three>(&answer, 99).is_err());
        let later = write_query::<Three>(&Either::Added(Ask::Sum)).unwrap();
        assert!(matches!(read_query::<Two>(&later), Err(NotUnderstood::Newer(_))));
    }
}
