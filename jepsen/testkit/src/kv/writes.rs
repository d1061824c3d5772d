//! What callers were told of their writes, and whether a node has it so.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use quorate::kv::machine::{KvAnswer, KvMachine, KvQuery};
use quorate::{Engine, NodeId, ReadLevel};
use rand::{RngExt, rngs::SmallRng};

pub(super) const TENANT: &str = "t";
pub(super) const COLLECTION: &str = "c";
/// The key whose version counts the exactly-once writes.
pub(super) const COUNTER: &str = "counter";
/// Keys that are written once begin with it.
pub(super) const ONCE: &str = "once-";

/// The answers to writes. Values of one key rise.
#[derive(Debug, Default)]
pub(super) struct Writes {
    /// The greatest acknowledged value of each key.
    pub(super) acknowledged: BTreeMap<String, u64>,
    /// The greatest value that was tried.
    pub(super) tried: BTreeMap<String, u64>,
    /// Keys that were written once, and certainly not, as their writers were told.
    pub(super) refused: BTreeSet<String>,
    /// The same of values, of any key.
    pub(super) refused_values: BTreeSet<(String, u64)>,
    /// What was acknowledged last.
    pub(super) newest: Option<(String, u64)>,
    /// The versions that exactly-once writes were answered.
    pub(super) counted: BTreeSet<u64>,
}

impl Writes {
    pub(super) fn acknowledge(&mut self, key: &str, value: u64) {
        self.acknowledged.insert(key.to_owned(), value);
        self.newest = Some((key.to_owned(), value));
    }

    /// `key` certainly was not given `value`.
    pub(super) fn refuse(&mut self, key: String, value: u64) {
        if key.starts_with(ONCE) {
            self.refused.insert(key.clone());
        }
        self.refused_values.insert((key, value));
    }

    /// What a read may ask for, and the least that it must find: with the probability `newest` what was acknowledged last, which a
    /// node that is behind does not have.
    pub(super) fn known_key(&self, rng: &mut SmallRng, newest: f64) -> Option<(String, u64)> {
        if rng.random_bool(newest) {
            return self.newest.clone();
        }
        let count = self.acknowledged.len();
        let nth = (count > 0).then(|| rng.random_range(0..count))?;
        self.acknowledged.iter().nth(nth).map(|(key, value)| (key.clone(), *value))
    }

    /// Every acknowledged write must be there, none that certainly was not applied, and every counted one exactly once.
    pub(super) async fn hold_against(&self, node_id: NodeId, engine: &Engine<KvMachine>) {
        let item = async |key: &str| match engine.read(query(key), ReadLevel::Local).await.unwrap().answer {
            KvAnswer::Item(item) => item,
            other => panic!("{other:?}"),
        };
        let (applied, asked) =
            (item(COUNTER).await.map_or(0, |item| item.version), self.counted.len() as u64);
        assert_eq!(applied, asked, "node {node_id} has applied {applied} increments of {asked}");
        for (key, value) in &self.acknowledged {
            let Some(item) = item(key).await else {
                panic!("node {node_id} has lost {key}={value}, which was acknowledged");
            };
            let found = number(&item.value);
            let refused = self.refused_values.contains(&(key.clone(), found));
            assert!(!refused, "node {node_id} has {key}={found}, which certainly was not applied");
            assert!(found >= *value, "node {node_id} has {key}={found}, but {value} was acknowledged");
            let is_once = key.starts_with(ONCE);
            assert!(!is_once || item.version == 1, "node {node_id} has applied {key} {} times", item.version);
        }
        for key in &self.refused {
            assert!(item(key).await.is_none(), "node {node_id} has {key}, which certainly was not applied");
        }
    }
}

pub(super) fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(value).unwrap().parse().unwrap()
}

pub(super) fn query(key: &str) -> KvQuery {
    KvQuery::Get {
        tenant: TENANT.to_owned(),
        collection: COLLECTION.to_owned(),
        key: Bytes::from(key.to_owned()),
    }
}
