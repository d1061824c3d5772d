//! What a version of a machine wrote, to be read by those that come after it: the test kit for changing a machine.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{ApplyContext, DecodeError, SnapshotParts, StateMachine, decode, encode};
use crate::types::{LogId, MachineVersion, SnapshotMachines, UnsupportedVersion, check_version};

/// Commands and a snapshot as one version of a machine wrote them, and the hash of the state that they give.
///
/// Make one whenever a version of a machine is released, keep its [bytes](Self::to_bytes) beside the tests for good, and have the tests
/// [check](Self::check) all of them. `docs/EMBEDDING.md` says what that finds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recording {
    commands: Vec<(MachineVersion, Vec<u8>)>,
    machines: SnapshotMachines,
    snapshot: Vec<u8>,
    hash_version: u32,
    hash: u64,
}

/// What a recording shows of a machine that was changed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum RecordingError {
    /// The file is no recording.
    File(DecodeError),
    /// A version is read no more. Clusters that may still have it in their logs or snapshots cannot be upgraded to this build.
    Unsupported(UnsupportedVersion),
    /// A command is not read. The first has number 0.
    Command(usize, DecodeError),
    /// A command is encoded to other bytes than it was, and is said to be what the same version wrote: builds of then would read
    /// something else.
    EncodedOtherwise(usize),
    /// The commands give another state than they did, or the snapshot is read as another state.
    Hash {
        /// What was recorded.
        recorded: u64,
        /// Of the state after the commands.
        of_commands: u64,
        /// Of the state in the snapshot.
        of_snapshot: u64,
    },
    /// The snapshot is not read.
    Snapshot(String),
}

impl std::error::Error for RecordingError {}

impl fmt::Display for RecordingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(error) => write!(f, "this is no recording: {error}"),
            Self::Unsupported(unsupported) => unsupported.fmt(f),
            Self::Command(number, error) => write!(f, "command {number} is not read: {error}"),
            Self::EncodedOtherwise(number) => write!(
                f,
                "command {number} is encoded to other bytes than it was, under the same version: raise what `command_version` says of it"
            ),
            Self::Hash { recorded, of_commands, of_snapshot } => write!(
                f,
                "the state had the hash {recorded:016x}; the same commands now give {of_commands:016x}, and the snapshot {of_snapshot:016x}"
            ),
            Self::Snapshot(error) => write!(f, "the snapshot is not read: {error}"),
        }
    }
}

/// The context of the command with this number: of entries that follow each other, a second apart.
fn context(number: usize) -> ApplyContext {
    let index = number as u64;
    ApplyContext { log_id: LogId::new(1, index), elapsed_ms: index * 1_000, time_ms: index * 1_000 }
}

impl Recording {
    /// What `machine`, in its initial state, writes of `commands`.
    ///
    /// # Errors
    /// When a command cannot be encoded.
    pub fn of<M: StateMachine>(
        mut machine: M,
        commands: impl IntoIterator<Item = M::Command>,
    ) -> Result<Self, DecodeError> {
        let mut recorded = Vec::new();
        for (number, command) in commands.into_iter().enumerate() {
            recorded.push((M::wrote(&command), encode(&M::content(&command))?));
            machine.apply(&context(number), command);
        }
        let view = machine.view();
        let mut snapshot = Vec::new();
        M::write_snapshot(&view, &mut snapshot).map_err(DecodeError::new)?;
        let newest = M::MACHINES.iter();
        let parts = newest.map(|reads| MachineVersion { machine: reads.machine, version: reads.newest });
        let machines = SnapshotMachines { parts: parts.collect(), agreed: Vec::new() };
        let (hash_version, hash) = (M::HASH_VERSION, M::state_hash(&view));
        Ok(Self { commands: recorded, machines, snapshot, hash_version, hash })
    }

    /// For a file.
    pub fn to_bytes(&self) -> Vec<u8> {
        encode(self).expect("invariant: numbers and bytes are encodable")
    }

    /// From such a file.
    ///
    /// # Errors
    /// [`RecordingError::File`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RecordingError> {
        decode(bytes).map_err(RecordingError::File)
    }

    /// Has a machine that may have been changed read all of it, from the `initial` state that the recording began with.
    ///
    /// # Errors
    /// The first thing that is not as it was.
    pub fn check<M: StateMachine>(&self, mut initial: M) -> Result<(), RecordingError> {
        for (number, (wrote, encoded)) in self.commands.iter().enumerate() {
            check_version(*wrote, M::MACHINES).map_err(RecordingError::Unsupported)?;
            let failed = |error| RecordingError::Command(number, error);
            let command = M::decode_of(*wrote, encoded).map_err(failed)?;
            if M::wrote(&command) == *wrote && encode(&M::content(&command)).map_err(failed)? != *encoded {
                return Err(RecordingError::EncodedOtherwise(number));
            }
            initial.apply(&context(number), command);
        }
        self.machines.check(M::MACHINES).map_err(RecordingError::Unsupported)?;
        let mut input = self.snapshot.as_slice();
        let restored = M::read_parts(&mut SnapshotParts::new(&self.machines.parts, &mut input));
        let restored = restored.map_err(|error| RecordingError::Snapshot(error.to_string()))?;
        let [of_commands, of_snapshot] = [&initial, &restored].map(|machine| M::state_hash(&machine.view()));
        // Hashes of another way are not comparable; those of now are.
        let recorded = if self.hash_version == M::HASH_VERSION { self.hash } else { of_commands };
        match of_commands == recorded && of_snapshot == recorded {
            true => Ok(()),
            false => Err(RecordingError::Hash { recorded: self.hash, of_commands, of_snapshot }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};

    use super::*;

    /// A list of numbers, in four builds: as it was, changed as it should be, and changed in two wrong ways.
    #[derive(Debug, Clone, Default)]
    struct List<const BUILD: u8>(Vec<u64>);

    const FIRST: u8 = 0;
    const RIGHT: u8 = 1;
    const IN_THE_MIDDLE: u8 = 2;
    const SAME_VERSION: u8 = 3;

    #[derive(Debug, Clone, Serialize, Deserialize)]
    enum First {
        Push(u64),
        Clear,
    }

    /// With a repetition, and something else in the middle.
    #[derive(Debug, Clone, Serialize, Deserialize)]
    enum Later {
        Push { number: u64, times: u64 },
        Reverse,
        Clear,
    }

    impl<const BUILD: u8> StateMachine for List<BUILD> {
        type Command = Later;
        type Reply = ();
        type Query = ();
        type Answer = ();
        type View = Vec<u64>;

        const VERSION: u32 = (BUILD == RIGHT) as u32;

        fn content(command: &Later) -> impl Serialize + '_ {
            #[derive(Serialize)]
            #[serde(untagged)]
            enum Either<'a> {
                First(First),
                Later(&'a Later),
            }
            match (BUILD, command) {
                (FIRST, Later::Push { number, .. }) => Either::First(First::Push(*number)),
                (FIRST, Later::Clear) => Either::First(First::Clear),
                _ => Either::Later(command),
            }
        }

        fn decode_command(version: u32, encoded: &[u8]) -> Result<Later, DecodeError> {
            match (BUILD, version) {
                (FIRST, _) | (RIGHT | SAME_VERSION, 0) => Ok(match decode(encoded)? {
                    First::Push(number) => Later::Push { number, times: 1 },
                    First::Clear => Later::Clear,
                }),
                _ => decode(encoded),
            }
        }

        fn apply(&mut self, _: &ApplyContext, command: Later) {
            match command {
                Later::Push { number, times } => (0..times).for_each(|_| self.0.push(number)),
                Later::Reverse => self.0.reverse(),
                Later::Clear => self.0.clear(),
            }
        }

        fn view(&self) -> Vec<u64> {
            self.0.clone()
        }

        fn query(_: &Vec<u64>, (): ()) {}

        fn write_snapshot(view: &Vec<u64>, out: &mut dyn Write) -> io::Result<()> {
            out.write_all(&encode(view).map_err(io::Error::other)?)
        }

        fn read_snapshot(_: u32, input: &mut dyn Read) -> io::Result<Self> {
            let mut all = Vec::new();
            input.read_to_end(&mut all)?;
            decode(&all).map(Self).map_err(io::Error::other)
        }
    }

    fn pushes() -> Vec<Later> {
        let push = |number| Later::Push { number, times: 1 };
        vec![push(1), Later::Clear, push(7), push(9)]
    }

    #[test]
    fn a_recording_tells_right_changes_from_wrong_ones() {
        let first = Recording::of(List::<FIRST>::default(), pushes()).unwrap();
        let first = Recording::from_bytes(&first.to_bytes()).unwrap();
        assert_eq!(first.check(List::<FIRST>::default()), Ok(()));
        assert_eq!(first.check(List::<RIGHT>::default()), Ok(()));
        let wrong = first.check(List::<IN_THE_MIDDLE>::default()).unwrap_err();
        assert!(matches!(wrong, RecordingError::Command(..) | RecordingError::Hash { .. }), "{wrong}");
        let wrong = first.check(List::<SAME_VERSION>::default()).unwrap_err();
        assert_eq!(wrong, RecordingError::EncodedOtherwise(0), "{wrong}");
        let later = Recording::of(List::<RIGHT>::default(), pushes()).unwrap();
        assert_eq!(later.check(List::<RIGHT>::default()), Ok(()));
        let wrong = later.check(List::<FIRST>::default()).unwrap_err();
        assert!(matches!(wrong, RecordingError::Unsupported(_)), "{wrong}");
        let other = List::<FIRST>(vec![5]);
        assert!(matches!(first.check(other), Ok(()) | Err(RecordingError::Hash { .. })));
        assert!(matches!(Recording::from_bytes(b"no"), Err(RecordingError::File(_))));
    }
}
