//! What a watch wants to be told.

use bytes::Bytes;

use super::super::api::Scope;
use super::super::calls;
use super::super::machine::{KvQuery, RangeQuery};
use crate::call::Rejected;
use crate::machine::{AppliedEvent, EventOperation};
use crate::proto::v1;

/// Most ranges of one watch.
pub(super) const MAX_WATCH_RANGES: usize = 64;

/// Kinds of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EventKinds(u8);

impl EventKinds {
    /// Those in `kinds`; all if there are none.
    fn of(kinds: &[i32]) -> Result<Self, Rejected> {
        let mut all = 0;
        for kind in kinds {
            let kind = v1::event::Kind::try_from(*kind)
                .map_err(|_| Rejected::invalid("an event has no kind with that number"))?;
            all |= bit(kind);
        }
        Ok(Self(if kinds.is_empty() { u8::MAX } else { all }))
    }

    /// Whether `operation` is among them.
    pub(super) fn has(self, operation: EventOperation) -> bool {
        let kind = match operation {
            EventOperation::Insert | EventOperation::Update => v1::event::Kind::Put,
            EventOperation::Delete => v1::event::Kind::Delete,
            EventOperation::Expire => v1::event::Kind::Expire,
        };
        self.0 & bit(kind) != 0
    }
}

fn bit(kind: v1::event::Kind) -> u8 {
    match kind {
        v1::event::Kind::Put => 1,
        v1::event::Kind::Delete => 2,
        v1::event::Kind::Expire => 4,
    }
}

/// Ranges of keys of one collection, and kinds of what happens to them.
#[derive(Debug, Clone)]
pub(super) struct WatchWishes {
    pub(super) tenant: Bytes,
    pub(super) collection: Bytes,
    /// From the first key, inclusive, to the second, exclusive; an empty second is the end of the collection.
    pub(super) ranges: Vec<(Bytes, Bytes)>,
    pub(super) kinds: EventKinds,
    /// Whether events are told with what their keys were before.
    pub(super) previous: bool,
}

impl WatchWishes {
    /// What `request` asks for.
    ///
    /// # Errors
    /// When a name or a key is none, or there are too many ranges.
    pub(super) fn of(request: v1::WatchRequest) -> Result<Self, Rejected> {
        let v1::WatchRequest { tenant, collection, start, end, ranges, kinds, previous, .. } = request;
        let kinds = EventKinds::of(&kinds)?;
        let (tenant, collection) = calls::names(Scope { tenant, collection });
        let ranges: Vec<_> = match &ranges[..] {
            [] => vec![(start, end)],
            _ if !start.is_empty() || !end.is_empty() => {
                return Err(Rejected::invalid("a watch has one range or several, and not both"));
            }
            ranges if ranges.len() > MAX_WATCH_RANGES => {
                return Err(Rejected::invalid(format!("a watch has at most {MAX_WATCH_RANGES} ranges")));
            }
            ranges => ranges.iter().map(|range| (range.start.clone(), range.end.clone())).collect(),
        };
        for (start, end) in &ranges {
            let (tenant, collection) = (tenant.clone(), collection.clone());
            let (start, end) = (start.clone(), end.clone());
            let (limit, max_bytes) = (0, 0);
            KvQuery::Range(RangeQuery { tenant, collection, start, end, limit, max_bytes }).check()?;
        }
        // What is kept for long keeps no message alive that it came in.
        let own = |bytes: &Bytes| Bytes::copy_from_slice(bytes);
        let ranges = ranges.iter().map(|(start, end)| (own(start), own(end))).collect();
        Ok(Self { tenant: tenant.into(), collection: collection.into(), ranges, kinds, previous })
    }

    /// Whether `event` is to be told.
    pub(super) fn want(&self, event: &AppliedEvent) -> bool {
        let is_inside =
            |(start, end): &(Bytes, Bytes)| *start <= event.key && (end.is_empty() || event.key < *end);
        event.collection == self.collection
            && event.tenant == self.tenant
            && self.kinds.has(event.operation)
            && self.ranges.iter().any(is_inside)
    }
}
