//! What the command at hand has changed, for those who follow.

use super::composite::CompositeKey;
use super::items::Items;
use super::key;
use super::record::{ItemRecord, RecordHeader};
use crate::machine::{AppliedEvent, EventOperation, EventSink, NewEvent};

/// One change of an item.
#[derive(Debug, Clone)]
pub(super) struct MadeChange {
    pub(super) operation: EventOperation,
    pub(super) key: CompositeKey,
    /// As it is now; as it was last if it is gone.
    pub(super) record: ItemRecord,
    /// Revision of the write before; 0 if there is none.
    pub(super) previous: u64,
}

impl MadeChange {
    /// A key was written.
    pub(super) fn put(key: CompositeKey, record: ItemRecord, previous: Option<u64>) -> Self {
        let operation = if previous.is_some() { EventOperation::Update } else { EventOperation::Insert };
        Self { operation, key, record, previous: previous.unwrap_or(0) }
    }

    /// A key was removed, by a command or because it was due.
    pub(super) fn removed(operation: EventOperation, key: CompositeKey, record: ItemRecord) -> Self {
        let previous = record.mod_revision();
        Self { operation, key, record, previous }
    }

    /// Tells it.
    pub(super) fn tell(&self, events: &mut dyn EventSink) {
        let is_there = matches!(self.operation, EventOperation::Insert | EventOperation::Update);
        let deadline = if is_there { self.record.expires_ms() } else { 0 };
        let value = if is_there { self.record.value() } else { &[] };
        tell(events, self.operation, &self.key, (&self.record, value), (self.previous, deadline));
    }
}

fn tell(
    events: &mut dyn EventSink,
    operation: EventOperation,
    composite: &[u8],
    (record, value): (&ItemRecord, &[u8]),
    (previous, deadline_ms): (u64, u64),
) {
    let (tenant, collection, key) = key::parts(composite);
    events.event(NewEvent {
        operation,
        tenant,
        collection,
        key,
        value,
        created: record.create_revision(),
        previous,
        version: record.version(),
        deadline_ms: (deadline_ms != 0).then_some(deadline_ms),
    });
}

/// See [`StateMachine::tell_state`](crate::machine::StateMachine::tell_state).
pub(super) fn tell_state(
    items: &Items,
    after: &[u8],
    max_bytes: usize,
    events: &mut dyn EventSink,
) -> Option<Vec<u8>> {
    let (mut bytes, mut last) = (0, None);
    for (key, record) in items.after(after) {
        if bytes >= max_bytes {
            return last;
        }
        bytes += key.len() + record.as_bytes().len();
        let told = (record.mod_revision(), record.expires_ms());
        tell(events, EventOperation::Insert, key, (record, record.value()), told);
        last = Some(key.to_vec());
    }
    None
}

/// See [`StateMachine::take_event`](crate::machine::StateMachine::take_event).
pub(super) fn take_event(items: &mut Items, index: u64, event: &AppliedEvent) -> Result<(), String> {
    let name = |name| std::str::from_utf8(name).map_err(|_| "a name that is no text".to_owned());
    let (tenant, collection) = (name(&event.tenant)?, name(&event.collection)?);
    key::check(tenant, collection, &event.key).map_err(|rejection| rejection.to_string())?;
    key::check_value(&event.value).map_err(|rejection| rejection.to_string())?;
    let composite = key::composite(tenant, collection, &event.key);
    let before = items.record(&composite).map(|record| (record.mod_revision(), record.version()));
    let is_there = matches!(event.operation, EventOperation::Insert | EventOperation::Update);
    let fits = match event.operation {
        EventOperation::Insert => before.is_none(),
        EventOperation::Update => before == Some((event.previous, event.version.wrapping_sub(1))),
        EventOperation::Delete | EventOperation::Expire => before == Some((event.previous, event.version)),
    };
    if !fits {
        let known = match before {
            Some((at, version)) => format!("was written last at {at}, in version {version}"),
            None => "is not there".to_owned(),
        };
        let what = match event.operation {
            EventOperation::Insert => "an insert",
            EventOperation::Update => "an update",
            EventOperation::Delete => "a delete",
            EventOperation::Expire => "an expiry",
        };
        return Err(format!("{what} of a key that {known} here"));
    }
    if before.is_some() {
        items.remove(&composite);
    }
    if is_there {
        // An item of a state was written before the position that the state is told at.
        let is_new = event.operation == EventOperation::Insert && event.created != index;
        let mod_revision = if is_new { event.previous } else { index };
        let header = RecordHeader {
            create_revision: event.created,
            mod_revision,
            version: event.version,
            expires_ms: event.deadline_ms.unwrap_or(0),
        };
        items.restore(composite, ItemRecord::new(header, &event.value));
    }
    Ok(())
}
