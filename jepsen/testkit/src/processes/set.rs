//! The set workload: every write has a key of its own, so what must be there afterwards is plain.
//!
//! An acknowledged write must be on every node, where its acknowledgement said, once. A write whose outcome
//! is unknown may be there or not. A write that was refused must not be there, and neither must anything
//! that nobody wrote. Nodes that have applied the same entry must agree in everything.
//!
//! Pure: no IO, no clock. The tests at the end show it failing on bad histories.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One write as its caller saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Which of the concurrent callers.
    pub caller: u32,
    /// Never used before.
    pub key: String,
    /// What was to be written.
    pub value: String,
    /// Milliseconds since the run began.
    pub started_ms: u64,
    /// Milliseconds since the run began.
    pub ended_ms: u64,
    /// What came of it.
    pub outcome: Outcome,
}

/// What the caller was told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Outcome {
    /// Acknowledged, at this place in the log.
    Acknowledged {
        /// By whom.
        node_id: u64,
        /// The term of the entry.
        term: u64,
        /// Its index.
        index: u64,
    },
    /// It may have been applied, or may be later.
    Unknown {
        /// As it was told.
        error: String,
    },
    /// It was not applied, and never will be.
    Refused {
        /// As it was told.
        error: String,
    },
}

/// What one node holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// Which one.
    pub node_id: u64,
    /// Index up to which it has applied.
    pub applied: u64,
    /// Of its state at that index.
    pub state_hash: u64,
    /// What it holds.
    pub items: BTreeMap<String, Item>,
}

/// One key on one node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// What the key holds.
    pub value: String,
    /// Index of the entry that wrote it.
    pub index: u64,
    /// How often the key was written.
    pub writes: u64,
}

/// What is wrong; nothing is, if all lists are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Writes that were acknowledged.
    pub acknowledged: usize,
    /// Writes whose outcome is unknown.
    pub unknown: usize,
    /// Writes that were refused.
    pub refused: usize,
    /// Acknowledged, and not there.
    pub lost: Vec<String>,
    /// There, but with another value or in another place than acknowledged.
    pub altered: Vec<String>,
    /// There, although nobody wrote it, or although its writer was told that it is not.
    pub invented: Vec<String>,
    /// Applied more than once.
    pub repeated: Vec<String>,
    /// Nodes that do not agree.
    pub diverged: Vec<String>,
}

impl Findings {
    /// Whether the history and the readings fit together.
    pub fn is_valid(&self) -> bool {
        [&self.lost, &self.altered, &self.invented, &self.repeated, &self.diverged]
            .into_iter()
            .all(Vec::is_empty)
    }
}

/// Holds what the nodes have against what the callers were told.
pub fn check(attempts: &[Attempt], readings: &[Reading]) -> Findings {
    let mut findings = Findings::default();
    for attempt in attempts {
        match attempt.outcome {
            Outcome::Acknowledged { .. } => findings.acknowledged += 1,
            Outcome::Unknown { .. } => findings.unknown += 1,
            Outcome::Refused { .. } => findings.refused += 1,
        }
    }
    let written: BTreeMap<_, _> = attempts.iter().map(|attempt| (attempt.key.as_str(), attempt)).collect();
    for reading in readings {
        check_reading(attempts, &written, reading, &mut findings);
    }
    for pair in readings.windows(2) {
        let (a, b) = (&pair[0], &pair[1]);
        if a.applied != b.applied {
            let text =
                format!("node {} has applied {}, node {} {}", a.node_id, a.applied, b.node_id, b.applied);
            findings.diverged.push(text);
        } else if a.state_hash != b.state_hash || a.items != b.items {
            findings.diverged.push(format!(
                "nodes {} and {} differ at index {}: state hashes {:016x} and {:016x}, {} and {} keys",
                a.node_id,
                b.node_id,
                a.applied,
                a.state_hash,
                b.state_hash,
                a.items.len(),
                b.items.len()
            ));
        }
    }
    findings
}

fn check_reading(
    attempts: &[Attempt],
    written: &BTreeMap<&str, &Attempt>,
    reading: &Reading,
    findings: &mut Findings,
) {
    let node_id = reading.node_id;
    for attempt in attempts {
        if let Outcome::Acknowledged { term, index, .. } = attempt.outcome
            && !reading.items.contains_key(&attempt.key)
        {
            findings
                .lost
                .push(format!("{}, acknowledged at {term}:{index}: not on node {node_id}", attempt.key));
        }
    }
    for (key, item) in &reading.items {
        let Some(attempt) = written.get(key.as_str()) else {
            findings.invented.push(format!("{key} on node {node_id}: nobody wrote it"));
            continue;
        };
        match &attempt.outcome {
            Outcome::Refused { error } => {
                findings.invented.push(format!("{key} on node {node_id}: its writer was told \"{error}\""));
            }
            Outcome::Acknowledged { index, .. } if *index != item.index => findings
                .altered
                .push(format!("{key} on node {node_id}: acknowledged at {index}, written at {}", item.index)),
            Outcome::Acknowledged { .. } | Outcome::Unknown { .. } => {}
        }
        if item.value != attempt.value {
            findings.altered.push(format!(
                "{key} on node {node_id}: \"{}\" was written, \"{}\" is there",
                attempt.value, item.value
            ));
        }
        if item.writes != 1 {
            findings.repeated.push(format!("{key} on node {node_id}: written {} times", item.writes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempt(key: &str, outcome: Outcome) -> Attempt {
        let value = format!("value of {key}");
        Attempt { caller: 0, key: key.to_owned(), value, started_ms: 0, ended_ms: 1, outcome }
    }

    fn acknowledged(index: u64) -> Outcome {
        Outcome::Acknowledged { node_id: 1, term: 1, index }
    }

    /// Two acknowledged writes, two unknown ones of which one took effect, one refused.
    fn history() -> Vec<Attempt> {
        vec![
            attempt("a", acknowledged(5)),
            attempt("b", acknowledged(6)),
            attempt("u", Outcome::Unknown { error: "connection lost".to_owned() }),
            attempt("v", Outcome::Unknown { error: "connection lost".to_owned() }),
            attempt("r", Outcome::Refused { error: "not the leader".to_owned() }),
        ]
    }

    fn readings() -> Vec<Reading> {
        let item =
            |key: &str, index| (key.to_owned(), Item { value: format!("value of {key}"), index, writes: 1 });
        let items = BTreeMap::from([item("a", 5), item("b", 6), item("u", 7)]);
        (1..=3).map(|node_id| Reading { node_id, applied: 9, state_hash: 77, items: items.clone() }).collect()
    }

    /// What the checker finds after `spoil` was done to what node 2 holds.
    fn spoilt(spoil: impl FnOnce(&mut Reading)) -> Findings {
        let mut readings = readings();
        spoil(&mut readings[1]);
        // Otherwise every sample would be found by divergence already.
        readings.drain(2..);
        readings.drain(..1);
        check(&history(), &readings)
    }

    #[test]
    fn a_good_history_is_valid() {
        let findings = check(&history(), &readings());
        assert!(findings.is_valid(), "{findings:?}");
        assert_eq!((findings.acknowledged, findings.unknown, findings.refused), (2, 2, 1));
    }

    #[test]
    fn a_lost_acknowledged_write_is_found() {
        let findings = spoilt(|reading| drop(reading.items.remove("b")));
        assert_eq!(findings.lost, ["b, acknowledged at 1:6: not on node 2"]);
        assert!(!findings.is_valid());
        // An unknown one may be missing.
        assert!(spoilt(|reading| drop(reading.items.remove("u"))).is_valid());
    }

    #[test]
    fn a_phantom_is_found() {
        let phantom = Item { value: "x".to_owned(), index: 8, writes: 1 };
        let findings = spoilt(|reading| drop(reading.items.insert("z".to_owned(), phantom)));
        assert_eq!(findings.invented, ["z on node 2: nobody wrote it"]);
        let refused = Item { value: "value of r".to_owned(), index: 8, writes: 1 };
        let findings = spoilt(|reading| drop(reading.items.insert("r".to_owned(), refused)));
        assert_eq!(findings.invented, ["r on node 2: its writer was told \"not the leader\""]);
        assert!(!findings.is_valid());
    }

    #[test]
    fn another_value_or_place_is_found() {
        let change = |change: fn(&mut Item)| spoilt(|reading| change(reading.items.get_mut("a").unwrap()));
        let findings = change(|item| item.value = "value of b".to_owned());
        assert_eq!(findings.altered, ["a on node 2: \"value of a\" was written, \"value of b\" is there"]);
        let findings = change(|item| item.index = 4);
        assert_eq!(findings.altered, ["a on node 2: acknowledged at 5, written at 4"]);
        assert!(!findings.is_valid());
        let findings = change(|item| item.writes = 2);
        assert_eq!(findings.repeated, ["a on node 2: written 2 times"]);
        assert!(!findings.is_valid());
    }

    #[test]
    fn nodes_that_differ_are_found() {
        let diverged = |spoil: fn(&mut Reading)| {
            let mut readings = readings();
            spoil(&mut readings[2]);
            let findings = check(&history(), &readings);
            assert!(!findings.is_valid());
            findings.diverged.join("; ")
        };
        assert!(diverged(|reading| reading.state_hash = 78).starts_with("nodes 2 and 3 differ at index 9"));
        assert_eq!(diverged(|reading| reading.applied = 8), "node 2 has applied 9, node 3 8");
        assert!(diverged(|reading| drop(reading.items.remove("u"))).contains("3 and 2 keys"));
    }
}
