//! A machine of one's own, tested by itself: what it does, and that a later version reads what an earlier one wrote.

use quorate::{ApplyContext, LogId, Recording, StateMachine};

use crate::jobs::{Command, Jobs};

/// What entry `index` knows of the world, one second after the one before.
fn context(index: u64) -> ApplyContext {
    ApplyContext { log_id: LogId::new(1, index), elapsed_ms: index * 1_000, time_ms: 0 }
}

fn take(worker: &str, lease_ms: u64) -> Command {
    Command::Take { worker: worker.to_owned(), lease_ms }
}

#[test]
fn a_lease_ends_when_its_time_is_over() {
    let mut jobs = Jobs::<2>::default();
    jobs.apply(&context(1), Command::Push("wash".to_owned()));
    let taken = jobs.apply(&context(2), take("ann", 5_000));
    assert_eq!((taken, jobs.next_wake_ms()), (Some((1, "wash".to_owned())), Some(7_000)));
    jobs.apply(&context(6), Command::Expire);
    assert_eq!(jobs.apply(&context(6), take("bob", 5_000)), None, "a second is left");
    jobs.apply(&context(7), Command::Expire);
    assert_eq!(jobs.next_wake_ms(), None);
    assert_eq!(jobs.apply(&context(8), take("bob", 5_000)), Some((1, "wash".to_owned())));
}

/// Kept for good: the bytes of what version 1 wrote.
const VERSION_1: &[u8] = include_bytes!("version-1.recording");

/// Some of each command that version 1 has.
fn commands() -> Vec<Command> {
    let done = Command::Done { number: 1, worker: "ann".to_owned() };
    let push = |what: &str| Command::Push(what.to_owned());
    vec![push("wash"), push("dry"), take("ann", 60_000), done, take("bob", 1), Command::Expire]
}

#[test]
fn later_versions_read_what_version_1_wrote() {
    if std::env::var_os("WRITE_RECORDING").is_some() {
        let recording = Recording::of(Jobs::<1>::default(), commands()).unwrap();
        std::fs::write("tests/examples/version-1.recording", recording.to_bytes()).unwrap();
    }
    let recording = Recording::from_bytes(VERSION_1).unwrap();
    recording.check(Jobs::<1>::default()).unwrap();
    recording.check(Jobs::<2>::default()).unwrap();
}
