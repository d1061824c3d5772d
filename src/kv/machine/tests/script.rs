//! The key-value machine in scripts: `tests/golden/scripts/kv`.

use std::fmt::Write as _;

use goldenscript::{Context, Runner};

use super::*;
use crate::golden::{Told, scripts};

/// Each change is at the next revision. All keys are of one collection.
#[derive(goldenscript::Command)]
enum Step {
    /// Writes a key.
    Put {
        key: String,
        value: String,
        #[arg(key, optional)]
        ttl_ms: u64,
    },
    /// Writes a key that is still at a revision, or that does not exist, which is revision 0; else reads it.
    PutIf {
        key: String,
        value: String,
        #[arg(key)]
        mod_revision: u64,
    },
    /// Writes, removes and writes again, at one revision.
    Swap {
        one: String,
        other: String,
    },
    Del(String),
    DelRange {
        start: String,
        end: String,
        #[arg(key, optional)]
        limit: u32,
    },
    /// The leader has what is due removed.
    Expire,
    /// Elapsed time goes on to this.
    Clock(u64),
    Get(String),
    Range {
        start: String,
        end: String,
        #[arg(key = "limit", optional)]
        limit: Option<usize>,
    },
    /// What was told of a revision and those after it.
    Events(#[arg(key = "from")] u64),
    /// A snapshot is written, and read by another machine, which goes on.
    Restore,
}

#[derive(Default)]
struct Node {
    machine: KvMachine,
    revision: u64,
    elapsed_ms: u64,
    /// What was told, with revisions.
    told: Vec<(u64, AppliedEvent)>,
}

const TENANT: &str = "t";
const COLLECTION: &str = "c";

fn text(bytes: &Bytes) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn item(found: Option<&Item>) -> String {
    let Some(Item { value, create_revision, mod_revision, version, expires_ms }) = found else {
        return "none".to_owned();
    };
    let due = if *expires_ms == 0 { String::new() } else { format!(", due at {expires_ms}") };
    format!("\"{}\", created {create_revision}, modified {mod_revision}, version {version}{due}", text(value))
}

fn range_of(answer: &RangeAnswer) -> String {
    let mut told = String::new();
    for (key, found) in &answer.items {
        let _ = writeln!(told, "{}: {}", text(key), item(Some(found)));
    }
    if let Some(next) = &answer.next {
        let _ = writeln!(told, "more, from {}", text(next));
    }
    if told.is_empty() { "none".to_owned() } else { told }
}

impl Node {
    fn apply(&mut self, command: KvCommand) -> String {
        self.revision += 1;
        let (reply, told) = apply_told(&mut self.machine, &at(self.revision, self.elapsed_ms), command);
        self.told.extend(told.into_iter().map(|event| (self.revision, event)));
        self.machine.state.items.assert_consistent();
        match reply {
            KvReply::Put { revision, create_revision, version } => {
                format!("revision {revision}: created {create_revision}, version {version}")
            }
            KvReply::Deleted { revision, existed } => format!("revision {revision}: existed: {existed}"),
            KvReply::Rejected(why) => format!("revision {}: rejected: {why}", self.revision),
            KvReply::DeletedRange { revision, deleted, more } => {
                format!("revision {revision}: {deleted} removed, more: {more}")
            }
            KvReply::Expired { revision, removed } => format!("revision {revision}: {removed} removed"),
            KvReply::Txn { revision, succeeded, results } => {
                let results: Vec<_> = results.iter().map(result).collect();
                format!("revision {revision}: held: {succeeded}; {}", results.join("; "))
            }
        }
    }

    fn query(&self, query: KvQuery) -> String {
        match KvMachine::query(&self.machine.view(), query) {
            KvAnswer::Item(found) => item(found.as_ref()),
            KvAnswer::Range(answer) => range_of(&answer),
            KvAnswer::Rejected(why) => format!("rejected: {why}"),
        }
    }

    fn events(&self, from: u64) -> String {
        let events = self.told.iter().filter(|(revision, _)| *revision >= from);
        events.fold(String::new(), |mut told, (revision, event)| {
            let what = match event.operation {
                EventOperation::Insert | EventOperation::Update => {
                    item(item_after(event, *revision).as_ref())
                }
                EventOperation::Delete => "deleted".to_owned(),
                EventOperation::Expire => "expired".to_owned(),
            };
            let _ = writeln!(told, "{revision} {}: {what}", text(&event.key));
            told
        })
    }

    fn txn(&mut self, compares: Vec<Compare>, then: Vec<TxnOp>, otherwise: Vec<TxnOp>) -> String {
        self.apply(KvCommand::Txn(KvTxn { tenant: TENANT.to_owned(), compares, then, otherwise }))
    }
}

fn result(result: &TxnResult) -> String {
    match result {
        TxnResult::Item(found) => item(found.as_ref()),
        TxnResult::Range(answer) => range_of(answer),
        TxnResult::Put { create_revision, version } => {
            format!("created {create_revision}, version {version}")
        }
        TxnResult::Deleted { existed } => format!("existed: {existed}"),
        TxnResult::DeletedRange { deleted } => format!("{deleted} removed"),
    }
}

impl Runner for Node {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        let collection = || COLLECTION.to_owned();
        Ok(match step {
            Step::Put { key, value, ttl_ms: 0 } => {
                self.apply(put(TENANT, COLLECTION, key.as_bytes(), value.as_bytes()))
            }
            Step::Put { key, value, ttl_ms } => {
                self.apply(put_expiring(COLLECTION, key.as_bytes(), value.as_bytes(), *ttl_ms))
            }
            Step::PutIf { key, value, mod_revision } => {
                let condition = Condition::ModRevision(Comparison::Equal, *mod_revision);
                let compare = Compare { collection: collection(), key: bytes(key), condition };
                let then =
                    TxnOp::Put { collection: collection(), key: bytes(key), value: bytes(value), ttl_ms: 0 };
                self.txn(
                    vec![compare],
                    vec![then],
                    vec![TxnOp::Get { collection: collection(), key: bytes(key) }],
                )
            }
            Step::Swap { one, other } => {
                let write = |key: &str, value: &str| TxnOp::Put {
                    collection: collection(),
                    key: bytes(key),
                    value: bytes(value),
                    ttl_ms: 0,
                };
                let remove = TxnOp::Delete { collection: collection(), key: bytes(one) };
                let read = TxnOp::Get { collection: collection(), key: bytes(one) };
                self.txn(
                    vec![],
                    vec![write(one, other), remove, read, write(one, "again"), write(other, one)],
                    vec![],
                )
            }
            Step::Del(key) => self.apply(delete(TENANT, COLLECTION, key.as_bytes())),
            Step::DelRange { start, end, limit } => self.apply(KvCommand::DeleteRange {
                tenant: TENANT.to_owned(),
                collection: collection(),
                start: bytes(start),
                end: bytes(end),
                limit: *limit,
            }),
            Step::Expire => self.apply(KvCommand::Expire),
            Step::Clock(elapsed_ms) => {
                self.elapsed_ms = *elapsed_ms;
                String::new()
            }
            Step::Get(key) => self.query(KvQuery::Get {
                tenant: TENANT.to_owned(),
                collection: collection(),
                key: bytes(key),
            }),
            Step::Range { start, end, limit } => self.query(KvQuery::Range(RangeQuery {
                tenant: TENANT.to_owned(),
                collection: collection(),
                start: bytes(start),
                end: bytes(end),
                limit: limit.unwrap_or(usize::MAX),
                max_bytes: usize::MAX,
            })),
            Step::Events(from) => self.events(*from),
            Step::Restore => {
                let mut written = Vec::new();
                KvMachine::write_snapshot(&self.machine.view(), &mut written)?;
                let mut restored = KvMachine::read_snapshot(0, &mut &written[..])?;
                restored.replaces(&self.machine);
                let same = restored.running_hash() == self.machine.running_hash();
                self.machine = restored;
                format!("the same state: {same}")
            }
        })
    }
}

#[test]
fn scripts_of_keys() {
    scripts("kv", Node::default);
}
