//! What becomes of a node whose machine panics, or takes its time, where nothing is written meanwhile. Tests only.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::lone;
use crate::engine::Engine;
use crate::error::FatalError;
use crate::machine::{ApplyContext, Composed, Either, StateMachine};
use crate::types::{AckLevel, ReadLevel, WriteOptions};

const PATIENCE: Duration = Duration::from_secs(30);

/// A machine that keeps nothing of what it is told.
#[derive(Clone, Default)]
struct Unruly(Arc<Ways>);

#[derive(Default)]
struct Ways {
    view_panics: AtomicBool,
    hash_panics: AtomicBool,
    /// A snapshot is not written before this is dropped at its other end.
    writing: Mutex<Option<Receiver<()>>>,
}

impl StateMachine for Unruly {
    type Command = Vec<u8>;
    type Reply = ();
    type Query = ();
    type Answer = ();
    type View = Arc<Ways>;

    fn apply(&mut self, _: &ApplyContext, _: Vec<u8>) {}

    fn view(&self) -> Arc<Ways> {
        assert!(!self.0.view_panics.load(SeqCst), "no view today");
        self.0.clone()
    }

    fn query(_: &Arc<Ways>, (): ()) {}

    fn write_snapshot(view: &Arc<Ways>, _: &mut dyn Write) -> io::Result<()> {
        let held = view.writing.lock().unwrap().take();
        held.into_iter().for_each(|held| held.recv().unwrap_or_default());
        Ok(())
    }

    fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
        Ok(Self::default())
    }

    fn state_hash(view: &Arc<Ways>) -> u64 {
        assert!(!view.hash_panics.load(SeqCst), "no hash today");
        1
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

#[tokio::test]
async fn a_view_that_panics_ends_an_idle_node() {
    let machine = Unruly::default();
    let engine = lone::engine_of(false, machine.clone()).await;
    assert!(engine.ready(PATIENCE).await);
    within(engine.write(vec![1])).await.unwrap();
    machine.0.view_panics.store(true, SeqCst);
    let reader = engine.clone();
    // It is not answered: a task of the node has failed.
    crate::runtime::spawn(async move { reader.read((), ReadLevel::Linearizable).await });
    let mut state = engine.watch();
    let fatal = within(state.wait_for(|state| state.fatal.is_some())).await.unwrap().fatal.clone();
    match fatal {
        Some(FatalError::Task { name: "consensus-apply", failure }) => {
            assert!(failure.contains("no view today"), "{failure}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_hash_that_panics_ends_no_node() {
    let machine = Unruly::default();
    machine.0.hash_panics.store(true, SeqCst);
    let engine = lone::engine_of(false, machine).await;
    assert!(engine.ready(PATIENCE).await);
    engine.write(vec![1]).await.unwrap();
    // By then it has been looked at, and looked at again.
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!(engine.state().fatal, None);
    engine.write(vec![1]).await.unwrap();
    engine.read((), ReadLevel::Linearizable).await.unwrap();
}

/// What cannot be encoded.
#[derive(Clone)]
struct Unwritable;

impl Serialize for Unwritable {
    fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom("not today"))
    }
}

impl<'de> Deserialize<'de> for Unwritable {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Ok(Self)
    }
}

/// A machine that is due for ever, because its wake-up is refused.
#[derive(Clone, Default)]
struct Overdue;

impl StateMachine for Overdue {
    type Command = Unwritable;
    type Reply = ();
    type Query = ();
    type Answer = ();
    type View = ();

    fn apply(&mut self, _: &ApplyContext, _: Unwritable) {}
    fn view(&self) {}
    fn query((): &(), (): ()) {}

    fn write_snapshot((): &(), _: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
        Ok(Self)
    }

    fn next_wake_ms(&self) -> Option<u64> {
        Some(0)
    }

    fn wake() -> Option<Unwritable> {
        Some(Unwritable)
    }
}

/// A machine that is to be woken once.
#[derive(Clone, Default)]
struct Timely {
    woken: bool,
}

impl StateMachine for Timely {
    type Command = ();
    type Reply = ();
    type Query = ();
    type Answer = bool;
    type View = bool;

    fn apply(&mut self, _: &ApplyContext, (): ()) {
        self.woken = true;
    }

    fn view(&self) -> bool {
        self.woken
    }

    fn query(woken: &bool, (): ()) -> bool {
        *woken
    }

    fn write_snapshot(_: &bool, _: &mut dyn Write) -> io::Result<()> {
        Ok(())
    }

    fn read_snapshot(_: u32, _: &mut dyn Read) -> io::Result<Self> {
        Ok(Self::default())
    }

    fn next_wake_ms(&self) -> Option<u64> {
        (!self.woken).then_some(5_000)
    }

    fn wake() -> Option<()> {
        Some(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_machine_whose_wake_up_is_refused_holds_up_no_other() {
    let engine = lone::engine_of(false, Composed::<Timely, Overdue, 1>::default()).await;
    assert!(engine.ready(PATIENCE).await);
    let clock = |engine: &Engine<_>| engine.inner.core.published().progress().clock.elapsed_ms;
    within(async {
        while engine.read(Either::Base(()), ReadLevel::Local).await.unwrap().answer.base() != Some(true) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    let woken_at = clock(&engine);
    within(async {
        while clock(&engine) <= woken_at {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
}

/// Applies wait for a snapshot, with more commits behind them than the consensus library queues by default: the core goes on
/// committing, and so it goes on telling the others that it leads.
#[tokio::test(flavor = "multi_thread")]
async fn the_core_goes_on_while_entries_wait_for_a_snapshot() {
    const COMMITS: u64 = 1200;
    let machine = Unruly::default();
    let engine = lone::engine_with(machine.clone(), Some(64 << 20)).await;
    assert!(engine.ready(PATIENCE).await);
    let (done, held) = channel();
    *machine.0.writing.lock().unwrap() = Some(held);
    within(engine.write(vec![1])).await.unwrap();
    engine.inner.core.snapshot().await;
    within(async {
        while machine.0.writing.lock().unwrap().is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    // As much as may be applied meanwhile: what is written after that waits.
    let mut last = 0;
    for _ in 0..8 {
        last = within(engine.write(vec![0; 512 * 1024])).await.unwrap().log_id.index;
    }
    for _ in 0..COMMITS {
        // Answered when it is on disk, which commits it: this node is alone.
        let to_leader = WriteOptions { ack: AckLevel::Leader, ..WriteOptions::default() };
        within(engine.write_with(vec![1], to_leader)).await.unwrap();
    }
    within(async {
        while engine.inner.core.metrics().committed.is_none_or(|at| at.index < last + COMMITS) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    let applied = engine.inner.core.published().progress().log_id.map(|at| at.index);
    assert_eq!(applied, Some(last), "what waits is not applied");
    drop(done);
    within(engine.write(vec![1])).await.unwrap();
    engine.shutdown().await;
}
