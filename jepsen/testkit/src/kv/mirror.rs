//! A program that keeps a copy of a collection by the client library, and holds what it is told against what it has.
//!
//! Every change says what it replaces: the position and the version of the write before, and the value that the key had. So one that is
//! left out, told twice, or told of an attempt that was not applied does not fit. Where no node has what comes next it takes the state
//! that it is sent instead.

use std::collections::BTreeMap;
use std::time::Duration;

use quorate::Bookmark;
use quorate::client::{
    EntryFilter, FollowedChange, FollowedEntry, FollowedOperation, Reason, SnapshotPart, SubscribeOptions,
};
use quorate::kv::client::{Client, ClientError};
use rand::{RngExt, rngs::SmallRng};

use super::clients::is_for_the_weather;
use super::writes::{COLLECTION, TENANT};

/// How long it waits after an attempt in vain.
const PAUSE: Duration = Duration::from_millis(50);

/// What is known of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
struct MirroredKey {
    value: Vec<u8>,
    written: u64,
    version: u64,
}

/// What a copy has come to.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    keys: BTreeMap<Vec<u8>, MirroredKey>,
    /// A state of which not all is there.
    unfinished: Option<BTreeMap<Vec<u8>, MirroredKey>>,
    /// Entries of a position of which more come.
    pending: Vec<FollowedEntry>,
    /// All of this was taken in.
    position: Bookmark,
    pub(super) changes: u64,
    pub(super) states: u64,
    /// Changes of which the value before was told, and was right.
    pub(super) previous: u64,
    /// How often it has begun again by itself.
    pub(super) subscriptions: u64,
    pub(super) violations: Vec<String>,
}

impl Mirror {
    /// Follows until the key `last` is written.
    pub(super) async fn follow(mut self, client: Client, mut rng: SmallRng, last: &str) -> Self {
        loop {
            let mut options = SubscribeOptions::after(self.position);
            options.filters = vec![EntryFilter::collection(TENANT, COLLECTION)];
            (options.accept_snapshot, options.previous) = (true, true);
            options.batched = rng.random_bool(0.5);
            options.window_bytes = if rng.random_bool(0.5) { 64 * 1024 } else { 0 };
            options.heartbeat = Duration::from_secs(1);
            self.subscriptions += 1;
            match self.subscribe(client.clone(), options, &mut rng, last).await {
                Ok(true) => return self,
                Ok(false) => {}
                Err(error) => {
                    self.judge(&error);
                    tokio::time::sleep(PAUSE).await;
                }
            }
            // What is not whole comes again.
            self.pending.clear();
            self.unfinished = None;
        }
    }

    /// Whether `last` is written; not, if it has had enough of this subscription.
    async fn subscribe(
        &mut self,
        client: Client,
        options: SubscribeOptions,
        rng: &mut SmallRng,
        last: &str,
    ) -> Result<bool, ClientError> {
        use futures::StreamExt as _;
        let mut subscription = client.subscribe(options).await?;
        while let Some(entry) = subscription.next().await {
            let entry = entry?;
            let history = subscription.position().history;
            if let Err(violation) = self.take(entry, history) {
                self.violations.push(violation);
            }
            if self.keys.contains_key(last.as_bytes()) {
                return Ok(true);
            }
            if rng.random_bool(0.02) {
                return Ok(false);
            }
        }
        Ok(false)
    }

    fn judge(&mut self, error: &ClientError) {
        let is_lost = [Reason::OtherHistory, Reason::Ahead].contains(&error.reason());
        if is_lost || !is_for_the_weather(error) {
            self.violations.push(format!("a subscription after {:?} ends with {error}", self.position));
        }
    }

    fn take(&mut self, entry: FollowedEntry, history: quorate::HistoryEpoch) -> Result<(), String> {
        let seq = entry.seq;
        match entry.snapshot {
            SnapshotPart::Begin => {
                self.unfinished = Some(BTreeMap::new());
                self.pending.clear();
                return Ok(());
            }
            SnapshotPart::Item => {
                let Some(unfinished) = &mut self.unfinished else {
                    return Err(format!("an item of a state at {seq} that has not begun"));
                };
                let FollowedChange::Event { key, value, previous_seq, version, .. } = entry.change else {
                    return Err(format!("an item of a state that is none: {entry:?}"));
                };
                let known = MirroredKey { value: value.to_vec(), written: previous_seq, version };
                return match unfinished.insert(key.to_vec(), known) {
                    None => Ok(()),
                    Some(_) => Err(format!("{key:?} is told twice in the state at {seq}")),
                };
            }
            SnapshotPart::End => {
                let unfinished = self.unfinished.take();
                self.keys = unfinished.ok_or_else(|| format!("a state at {seq} ends that has not begun"))?;
                self.states += 1;
                self.position = Bookmark { index: seq, history };
                return Ok(());
            }
            _ => {}
        }
        // A state that broke off is void where what comes next can be told after all.
        self.unfinished = None;
        if seq <= self.position.index {
            return Err(format!("{seq} is told after everything up to {:?} was", self.position));
        }
        let more = entry.more;
        self.pending.push(entry);
        if more {
            return Ok(());
        }
        self.position = Bookmark { index: seq, history };
        for entry in std::mem::take(&mut self.pending) {
            self.apply(entry)?;
        }
        Ok(())
    }

    fn apply(&mut self, entry: FollowedEntry) -> Result<(), String> {
        let FollowedChange::Event {
            operation,
            key,
            value,
            previous_seq,
            version,
            previous_value,
            previous_unknown,
            ..
        } = &entry.change
        else {
            return Err(format!("it is told of {entry:?}, which is no change of a key"));
        };
        let before = self.keys.remove(&key[..]);
        let expected = match operation {
            FollowedOperation::Insert => None,
            FollowedOperation::Update => Some((*previous_seq, version.saturating_sub(1))),
            _ => Some((*previous_seq, *version)),
        };
        if before.as_ref().map(|before| (before.written, before.version)) != expected {
            return Err(format!("it is told {entry:?}, where it has {before:?}"));
        }
        let held = before.map(|before| before.value);
        match (previous_value, previous_unknown) {
            (Some(told), false) if held.as_deref() == Some(&told[..]) => self.previous += 1,
            (None, false) if held.is_none() => {}
            (None, true) if held.is_some() => {}
            _ => return Err(format!("it is told {entry:?}, where the key held {held:?}")),
        }
        if operation.has_value() {
            let known = MirroredKey { value: value.to_vec(), written: entry.seq, version: *version };
            self.keys.insert(key.to_vec(), known);
        }
        self.changes += 1;
        Ok(())
    }

    /// Keys that were written at these positions must be there as they were written.
    pub(super) fn hold_against(&mut self, all: &BTreeMap<String, u64>) {
        for (key, revision) in all {
            let written = self.keys.get(key.as_bytes()).map(|known| known.written);
            if written != Some(*revision) {
                let what = format!("{key} was written at {revision}, and a copy has it from {written:?}");
                self.violations.push(what);
            }
        }
    }
}
