use std::io::{Read, Write};

use super::*;
use crate::machine::sessions::MIN_TTL_MS;
use crate::raft::clock::Reading;
use crate::storage::MemorySnapshots;
use crate::types::SessionSlot;

/// Answers with as many bytes as it is asked for.
#[derive(Debug, Default)]
struct Talkative;

impl StateMachine for Talkative {
    type Command = usize;
    type Reply = Bytes;
    type Query = ();
    type Answer = ();
    type View = ();

    fn apply(&mut self, _: &ApplyContext, bytes: usize) -> Bytes {
        vec![0; bytes].into()
    }

    fn view(&self) {}

    fn query((): &(), (): ()) {}

    fn write_snapshot((): &(), _: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
        Ok(Self)
    }
}

fn entry(index: u64, command: Bytes) -> io::Result<EntryResponder<TypeConfig>> {
    let payload = types::Payload::Command(command);
    let entry = types::Entry { log_id: types::LogId::new(1, index), payload };
    Ok((type_config::entry(entry).unwrap(), None))
}

#[test]
fn what_becomes_of_sessions_is_counted_as_it_is_applied() {
    /// More than the answers of one session may take.
    const HUGE: usize = 40 * 1024 * 1024;
    let mut applier = Applier::recover(1, Talkative, Arc::new(MemorySnapshots::default()), None).unwrap();
    let at = |counted_ms| Reading { wall_ms: 7_000, term: 1, counted_ms };
    let write = |session, counted_ms, bytes: usize| {
        let slot = SessionSlot { session, sequence: 1, first_unanswered: 1 };
        envelope::seal::<Talkative>(at(counted_ms), &bytes, Some(slot)).unwrap()
    };
    let commands = [
        envelope::seal_open_session(at(0), 1, MIN_TTL_MS, ""),
        envelope::seal_open_session(at(0), 2, MIN_TTL_MS, ""),
        envelope::seal_open_session(at(0), 3, MIN_TTL_MS, ""),
        envelope::seal_close_session(at(0), 1),
        write(2, 0, HUGE),
        write(3, MIN_TTL_MS + 1, 1),
    ];
    let mut batch = (1..).zip(commands).map(|(index, command)| entry(index, command));
    applier.apply_batch(&mut batch).unwrap();
    applier.apply_batch(&mut batch).unwrap();
    let activity = applier.activity();
    let totals = &activity.sessions;
    let totals = [&totals.opened, &totals.closed, &totals.evicted, &totals.expired];
    assert_eq!(totals.map(|total| total.load(Relaxed)), [3, 1, 1, 1]);
    assert_eq!(activity.expired_sessions.load(Relaxed), 1);
    assert_eq!(applier.sessions.len(), 0);
}
