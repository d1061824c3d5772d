//! A composition against its machines, each alone.

use proptest::prelude::*;

use super::*;
use crate::machine::{Recording, decode, encode};
use crate::types::{LogId, SnapshotMachines};

/// Remembers the numbers that it was given, and is due when the largest of them is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Numbers<const VERSION: u32>(Vec<u64>);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Command {
    Push(u64),
    Pop,
    Due,
}

impl<const VERSION: u32> StateMachine for Numbers<VERSION> {
    type Command = Command;
    type Reply = Option<u64>;
    type Query = usize;
    type Answer = Option<u64>;
    type View = Vec<u64>;

    const VERSION: u32 = VERSION;

    fn apply(&mut self, _: &ApplyContext, command: Command) -> Option<u64> {
        match command {
            Command::Push(number) => self.0.push(number),
            Command::Pop => return self.0.pop(),
            Command::Due => {
                let due = self.next_wake_ms();
                self.0.retain(|number| Some(*number) != due);
            }
        }
        None
    }

    fn view(&self) -> Vec<u64> {
        self.0.clone()
    }

    fn query(view: &Vec<u64>, at: usize) -> Option<u64> {
        view.get(at).copied()
    }

    fn write_snapshot(view: &Vec<u64>, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&encode(view).map_err(io::Error::other)?)
    }

    fn read_snapshot(version: u32, input: &mut dyn Read) -> io::Result<Self> {
        assert!(version <= VERSION);
        let mut all = Vec::new();
        input.read_to_end(&mut all)?;
        decode(&all).map(Self).map_err(io::Error::other)
    }

    fn state_bytes(&self) -> Option<u64> {
        Some(8 * self.0.len() as u64)
    }

    fn most_growth_bytes(command: &Command) -> u64 {
        if matches!(command, Command::Push(_)) { 8 } else { 0 }
    }

    fn next_wake_ms(&self) -> Option<u64> {
        self.0.iter().max().copied()
    }

    fn wake() -> Option<Command> {
        Some(Command::Due)
    }
}

type One = Numbers<0>;
type Two = Numbers<3>;
type Three = Numbers<1>;
type Pair = Composed<One, Two, 2>;
type All = Composed<Pair, Three, 7>;
type AllCommand = Either<Either<Command, Command>, Command>;

fn first(command: Command) -> AllCommand {
    Either::Base(Either::Base(command))
}

fn second(command: Command) -> AllCommand {
    Either::Base(Either::Added(command))
}

fn third(command: Command) -> AllCommand {
    Either::Added(command)
}

fn context(index: u64) -> ApplyContext {
    ApplyContext { log_id: LogId::new(1, index), elapsed_ms: index, time_ms: index }
}

fn snapshot<M: StateMachine>(machine: &M) -> Vec<u8> {
    let mut out = Vec::new();
    M::write_snapshot(&machine.view(), &mut out).unwrap();
    out
}

fn restored<M: StateMachine>(parts: &[MachineVersion], mut snapshot: &[u8]) -> M {
    let mut parts = SnapshotParts::new(parts, &mut snapshot);
    let machine = M::read_parts(&mut parts).unwrap();
    assert!(parts.are_read() && snapshot.is_empty());
    machine
}

fn of(machine: u16, version: u32) -> MachineVersion {
    MachineVersion { machine, version }
}

#[test]
fn each_machine_has_its_number_and_its_versions() {
    let reads = |machine, newest| ReadableVersions { machine, oldest: 0, newest };
    assert_eq!(One::MACHINES, [reads(0, 0)]);
    assert_eq!(All::MACHINES, [reads(0, 0), reads(2, 3), reads(7, 1)]);
    for (command, wrote) in
        [(first(Command::Pop), of(0, 0)), (second(Command::Pop), of(2, 3)), (third(Command::Pop), of(7, 1))]
    {
        assert_eq!(All::wrote(&command), wrote);
        let encoded = encode(&All::content(&command)).unwrap();
        assert_eq!(encoded, encode(&Command::Pop).unwrap(), "as if it were alone");
        assert_eq!(All::decode_of(wrote, &encoded).unwrap(), command);
        assert_eq!(All::wake_of(wrote.machine).map(|wake| All::wrote(&wake)), Some(wrote));
        let reply = match command {
            Either::Base(Either::Base(_)) => Either::Base(Either::Base(Some(5))),
            Either::Base(Either::Added(_)) => Either::Base(Either::Added(Some(5))),
            Either::Added(_) => Either::Added(Some(5)),
        };
        let encoded = encode(&All::reply_content(&reply)).unwrap();
        assert_eq!(encoded, encode(&Some(5_u64)).unwrap(), "a session that was answered before has it so");
        assert_eq!(All::decode_reply(wrote.machine, &encoded).unwrap(), reply);
    }
    assert_ne!(All::HASH_VERSION, Pair::HASH_VERSION);
    assert_ne!(Pair::HASH_VERSION, One::HASH_VERSION);
}

#[test]
fn a_snapshot_of_before_leaves_what_was_added_in_its_initial_state() {
    let mut one = One::default();
    one.apply(&context(0), Command::Push(9));
    let all: All = restored(&[], &snapshot(&one));
    assert_eq!(all, Composed::new(Composed::new(one.clone(), Two::default()), Three::default()));
    let pair = Pair::new(one, Numbers(vec![1, 2]));
    let all: All = restored(&[of(0, 0), of(2, 1)], &snapshot(&pair));
    assert_eq!(all, Composed::new(pair, Three::default()));
}

#[test]
fn a_part_that_is_cut_short_or_in_another_place_is_not_read() {
    let pair = Pair::new(Numbers(vec![u64::MAX; 10_000]), Numbers(vec![1, 2]));
    let whole = snapshot(&pair);
    let parts = [of(0, 0), of(2, 3)];
    assert_eq!(restored::<Pair>(&parts, &whole), pair);
    for length in [0, 3, 4, 5, 70_000, whole.len() - 5, whole.len() - 1] {
        let mut input = &whole[..length];
        assert!(Pair::read_parts(&mut SnapshotParts::new(&parts, &mut input)).is_err(), "{length} bytes");
    }
    let mut input = whole.as_slice();
    assert!(Pair::read_parts(&mut SnapshotParts::new(&[of(2, 3), of(0, 0)], &mut input)).is_err());
    let newer = SnapshotMachines { parts: vec![of(0, 0), of(2, 3), of(8, 0)], agreed: vec![] };
    let refused = newer.check(Pair::MACHINES).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "written by version 0 of machine 8, which this build does not have: upgrade this node"
    );
}

#[test]
fn each_says_when_it_is_due() {
    let due = |all: &All| {
        let mut wakes = Wakes::default();
        all.wakes(&mut wakes);
        wakes.iter().map(|(place, at_ms)| (All::MACHINES[place].machine, at_ms)).collect::<Vec<_>>()
    };
    let mut all = All::default();
    assert_eq!(due(&all), []);
    all.added.0.push(50);
    assert_eq!(due(&all), [(7, 50)]);
    all.base.added.0.push(40);
    all.base.base.0.push(45);
    assert_eq!(due(&all), [(0, 45), (2, 40), (7, 50)]);
    assert_eq!(all.next_wake_ms(), Some(40));
    all.apply(&context(1), All::wake_of(2).unwrap());
    assert_eq!(due(&all), [(0, 45), (7, 50)]);
}

#[test]
fn a_machine_that_its_cluster_was_founded_without_begins_in_its_default_state() {
    let begun = || All::new(Pair::new(Numbers(vec![1]), Numbers(vec![2])), Numbers(vec![3]));
    let mut all = begun();
    all.begins_with(&|_| true);
    assert_eq!(all, begun());
    all.begins_with(&|number| number == 0 || number == 2);
    assert_eq!((all.base.added.0, all.added.0), (vec![2], vec![]));
}

#[test]
fn a_recording_of_a_machine_alone_is_read_by_a_composition() {
    let commands = [Command::Push(1), Command::Push(2), Command::Pop];
    let alone = Recording::of(One::default(), commands.clone()).unwrap();
    assert_eq!(alone.check(Pair::default()), Ok(()));
    let pair = Recording::of(Pair::default(), commands.map(Either::Added)).unwrap();
    assert_eq!(pair.check(All::default()), Ok(()));
    assert!(pair.check(One::default()).is_err(), "it does not have the second");
}

fn commands() -> impl Strategy<Value = Vec<AllCommand>> {
    let command = prop_oneof![
        4 => any::<u64>().prop_map(Command::Push),
        1 => Just(Command::Pop),
        1 => Just(Command::Due)
    ];
    let command = (0..3_u8, command).prop_map(|(machine, command)| match machine {
        0 => first(command),
        1 => second(command),
        _ => third(command),
    });
    prop::collection::vec(command, 0..60)
}

proptest! {
    /// Whatever the order: each machine is as if it were alone, also after a snapshot in the middle.
    #[test]
    fn machines_do_not_see_each_other(commands in commands(), cut in 0..60_usize) {
        let mut all = All::default();
        let (mut one, mut two, mut three) = (One::default(), Two::default(), Three::default());
        let parts = [of(0, 0), of(2, 3), of(7, 1)];
        for (index, command) in (0..).zip(commands) {
            if index == cut as u64 {
                all = restored(&parts, &snapshot(&all));
            }
            let context = context(index);
            let reply = all.apply(&context, command.clone());
            let (alone, of_all) = match (command, reply) {
                (Either::Base(Either::Base(command)), Either::Base(Either::Base(reply))) => (one.apply(&context, command), reply),
                (Either::Base(Either::Added(command)), Either::Base(Either::Added(reply))) => (two.apply(&context, command), reply),
                (Either::Added(command), Either::Added(reply)) => (three.apply(&context, command), reply),
                other => panic!("{other:?}"),
            };
            prop_assert_eq!(alone, of_all);
        }
        prop_assert_eq!(all.state_bytes().unwrap(), 8 * (one.0.len() + two.0.len() + three.0.len()) as u64);
        let again: All = restored(&parts, &snapshot(&all));
        prop_assert_eq!(All::state_hash(&again.view()), All::state_hash(&all.view()));
        prop_assert_eq!(&all, &again);
        prop_assert_eq!(all, Composed::new(Composed::new(one, two), three));
    }
}
