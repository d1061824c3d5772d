//! What those who watch are told.

use super::reply::Item;

/// What happened to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EventKind {
    /// It was set.
    Put,
    /// It was removed.
    Delete,
    /// It was removed because its time to live was over.
    Expire,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    /// What happened.
    pub kind: EventKind,
    /// The revision at which it did. Changes of one transaction share it.
    pub revision: u64,
    /// The key, and what it holds now; only the key when it is gone.
    pub item: Item,
}
