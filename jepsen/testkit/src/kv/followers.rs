//! Those who follow what is applied, from node to node, and hold what they are told against what they know.
//!
//! A follower keeps a state of its own from nothing but what it is told. Every event says what it replaces, so one that is left out, told
//! twice or told of an attempt that was not applied does not fit. Where a node does not go back far enough, the follower takes the node's state instead,
//! and goes on after it. In the end its state must be that of the nodes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quorate::kv::machine::{KvMachine, KvView};
use quorate::{
    AppliedEvent, Bookmark, Engine, EventOperation, EventSink, FeedContent, FeedCursor, FeedError,
    FollowError, NewEvent, ReadLevel, StateMachine,
};
use rand::{RngExt, SeedableRng, rngs::SmallRng};
use tokio::time::timeout;

use crate::simulation::Engines;

/// Tenant, collection and key.
type Address = (Vec<u8>, Vec<u8>, Vec<u8>);

/// What is known of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    value: Vec<u8>,
    created: u64,
    written: u64,
    version: u64,
    deadline_ms: Option<u64>,
}

/// A state, as it was told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct FollowedState(BTreeMap<Address, Known>);

/// How long one waits for something to happen before it looks elsewhere.
const PATIENCE: Duration = Duration::from_millis(400);

/// What a follower has come to.
#[derive(Debug, Default)]
pub(super) struct Followed {
    state: FollowedState,
    position: Bookmark,
    /// Events that it was told.
    pub(super) events: u64,
    /// States that it took because what lay between was gone.
    pub(super) states: u64,
    /// How often it has moved.
    pub(super) moves: u64,
    /// What does not fit.
    pub(super) violation: Option<String>,
}

impl EventSink for FollowedState {
    fn event_of(&mut self, _: u16, event: NewEvent<'_>) {
        let known = Known {
            value: event.value.to_vec(),
            created: event.created,
            written: event.previous,
            version: event.version,
            deadline_ms: event.deadline_ms,
        };
        self.0.insert((event.tenant.into(), event.collection.into(), event.key.to_vec()), known);
    }
}

impl FollowedState {
    /// What `view` holds.
    fn of(view: &KvView) -> Self {
        let (mut state, mut after) = (Self::default(), Some(Vec::new()));
        while let Some(last) = after {
            after = KvMachine::tell_state(view, &last, 200, &mut state);
        }
        state
    }

    /// Takes in what happened at `index`, which must fit what is known.
    fn take_in(&mut self, index: u64, event: &AppliedEvent) -> Result<(), String> {
        let address = (event.tenant.to_vec(), event.collection.to_vec(), event.key.to_vec());
        let before = self.0.get(&address);
        let fits = match event.operation {
            EventOperation::Insert => before.is_none() && event.version == 1 && event.created == index,
            EventOperation::Update => before.is_some_and(|before| {
                before.written == event.previous
                    && before.version + 1 == event.version
                    && before.created == event.created
            }),
            EventOperation::Delete => before.is_some_and(|before| before.written == event.previous),
            EventOperation::Expire => {
                before.is_some_and(|before| before.written == event.previous && before.deadline_ms.is_some())
            }
        };
        if !fits {
            return Err(format!("at {index} a follower is told {event:?}, where it knows {before:?}"));
        }
        match event.operation {
            EventOperation::Insert | EventOperation::Update => {
                let known = Known {
                    value: event.value.to_vec(),
                    created: event.created,
                    written: index,
                    version: event.version,
                    deadline_ms: event.deadline_ms,
                };
                self.0.insert(address, known);
            }
            EventOperation::Delete | EventOperation::Expire => {
                self.0.remove(&address);
            }
        }
        Ok(())
    }
}

/// Follows until it is stopped, or something does not fit.
pub(super) async fn follow(seed: u64, engines: Engines<KvMachine>, stop: Arc<AtomicBool>) -> Followed {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut followed = Followed::default();
    while !stop.load(Ordering::Relaxed) && followed.violation.is_none() {
        tokio::time::sleep(Duration::from_millis(rng.random_range(1..100))).await;
        let engine = {
            let engines = engines.lock().unwrap();
            let nth = rng.random_range(0..engines.len().max(1));
            engines.values().nth(nth).cloned()
        };
        let Some(engine) = engine else { continue };
        let pages = rng.random_range(1..40);
        let page_bytes = [0, 300, 1 << 20][rng.random_range(0..3)];
        if let Err(violation) = followed.at(&engine, pages, page_bytes).await {
            followed.violation = Some(violation);
        }
        followed.moves += 1;
    }
    followed
}

impl Followed {
    /// Takes so many pages from one node, unless it has no more.
    async fn at(&mut self, engine: &Engine<KvMachine>, pages: u32, page_bytes: usize) -> Result<(), String> {
        let mut cursor = match timeout(PATIENCE, engine.follow(self.position)).await {
            Ok(Ok(cursor)) => cursor,
            Ok(Err(FollowError::Compacted { .. })) => return self.take_state(engine).await,
            // Its state is not that far, or it has stopped: another one may be better.
            Ok(Err(_)) | Err(_) => return Ok(()),
        };
        for _ in 0..pages {
            if timeout(PATIENCE, cursor.changed()).await.is_err() {
                return Ok(());
            }
            match self.page(&mut cursor, page_bytes).await? {
                None => {}
                Some(FeedError::Compacted { .. }) => return self.take_state(engine).await,
                Some(FeedError::Stopped) => return Ok(()),
                Some(error) => return Err(format!("a follower at {:?} is told: {error}", self.position)),
            }
        }
        Ok(())
    }

    /// Takes in one page, unless there is an error.
    async fn page(
        &mut self,
        cursor: &mut FeedCursor,
        page_bytes: usize,
    ) -> Result<Option<FeedError>, String> {
        let page = match cursor.page(page_bytes).await {
            Ok(page) => page,
            Err(error) => return Ok(Some(error)),
        };
        for record in &page.records {
            let index = record.log_id.index;
            if index <= self.position.index {
                return Err(format!("a follower at {:?} is told of {index} again", self.position));
            }
            let FeedContent::Events(events) = &record.content else {
                return Err(format!("a follower is told {record:?} of a machine that tells events"));
            };
            for event in events {
                self.state.take_in(index, event)?;
                self.events += 1;
            }
            self.position = Bookmark { index, history: cursor.history() };
        }
        let last = page.next.saturating_sub(1);
        if last < self.position.index {
            return Err(format!("a follower at {:?} is told to go back to {last}", self.position));
        }
        self.position = Bookmark { index: last, history: cursor.history() };
        Ok(None)
    }

    /// Takes the state of a node instead of what led to it.
    async fn take_state(&mut self, engine: &Engine<KvMachine>) -> Result<(), String> {
        let Ok(Ok((Some(upto), view))) = timeout(PATIENCE, engine.view(ReadLevel::Local)).await else {
            return Ok(());
        };
        // A node that is behind has nothing that is new.
        if upto.index > self.position.index {
            self.state = FollowedState::of(&view);
            self.position = Bookmark { index: upto.index, history: engine.history() };
            self.states += 1;
        }
        Ok(())
    }

    /// Follows `engine` to its end, and holds the state against its state.
    pub(super) async fn hold_against(&mut self, engine: &Engine<KvMachine>) {
        for _ in 0..200 {
            let (upto, view) = engine.view(ReadLevel::Local).await.unwrap();
            if upto.map(|upto| upto.index) == Some(self.position.index) {
                assert!(self.state == FollowedState::of(&view), "a follower has come to another state");
                return;
            }
            self.at(engine, 1, 1 << 20).await.unwrap();
        }
        panic!("a follower does not come to the state of a node at rest");
    }
}
