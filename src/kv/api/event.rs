//! What those who watch are told.

use super::reply::Item;
use super::request::Range;
use crate::types::Bookmark;

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
    /// What the key held before; `None` if the watch did not [ask](WatchOptions::with_previous) for it.
    pub previous: Option<PreviousItem>,
}

/// What a key held before a change.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum PreviousItem {
    /// Nothing: it did not exist.
    Absent,
    /// This.
    Item(Item),
    /// Something that the node does not keep any more.
    Unknown,
}

/// What a watch is to tell, and from where on.
///
/// ```
/// use quorate::kv::client::{EventKind, Range, WatchOptions};
///
/// let options = WatchOptions::of(Range::prefix("user/"))
///     .and(Range::prefix("group/"))
///     .kinds([EventKind::Delete, EventKind::Expire]);
/// # let _ = options;
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct WatchOptions {
    /// Which keys: those in any of these ranges, of which there are 64 at most; their limits do not count. What is in more than one is told
    /// once. Default none: all keys of the collection.
    pub ranges: Vec<Range>,
    /// What happens to them. Default none: everything.
    pub kinds: Vec<EventKind>,
    /// The first revision of interest. Default: the next one, after every write that was acknowledged before.
    pub from: Option<Bookmark>,
    /// Whether events also tell what their keys held before, as far back as the node has it. Default no.
    pub previous: bool,
}

impl WatchOptions {
    /// What happens to the keys in `range`.
    pub fn of(range: Range) -> Self {
        Self { ranges: vec![range], ..Self::default() }
    }

    /// The same with the keys in another range.
    #[must_use]
    pub fn and(mut self, range: Range) -> Self {
        self.ranges.push(range);
        self
    }

    /// The same with nothing but these kinds.
    #[must_use]
    pub fn kinds(self, kinds: impl IntoIterator<Item = EventKind>) -> Self {
        Self { kinds: kinds.into_iter().collect(), ..self }
    }

    /// The same, and events also tell what their keys held before: see [`PreviousItem`].
    #[must_use]
    pub fn with_previous(self) -> Self {
        Self { previous: true, ..self }
    }

    /// The same from this revision on.
    #[must_use]
    pub fn from(self, from: impl Into<Bookmark>) -> Self {
        Self { from: Some(from.into()), ..self }
    }
}
