//! What a machine tells of what a command does to its state, for those who follow it.

use bytes::Bytes;

/// What happened to a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EventOperation {
    /// It was not there before.
    Insert = 1,
    /// It had another value before, or the same.
    Update = 2,
    /// It was removed by a command.
    Delete = 3,
    /// It was removed because its time had come.
    Expire = 4,
}

impl EventOperation {
    /// The operation with this number, if there is one.
    pub(crate) fn of(number: u8) -> Option<Self> {
        [Self::Insert, Self::Update, Self::Delete, Self::Expire]
            .into_iter()
            .find(|operation| *operation as u8 == number)
    }
}

/// One change, while it is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewEvent<'a> {
    /// What happened.
    pub operation: EventOperation,
    /// Whose key it is, for those who follow one tenant. Empty for a machine that has no tenants.
    pub tenant: &'a str,
    /// The collection of the tenant, for those who follow one collection. Empty for a machine that has none.
    pub collection: &'a str,
    /// The key.
    pub key: &'a [u8],
    /// The value that it has now; empty if it is gone.
    pub value: &'a [u8],
    /// Index of the entry that created the key; 0 if it is not known.
    pub created: u64,
    /// Index of the entry that wrote it last before, 0 if there is none.
    pub previous: u64,
    /// Writes of the key since it was created.
    pub version: u64,
    /// When it is due, in [elapsed time](super::ApplyContext::elapsed_ms); `None` for never.
    pub deadline_ms: Option<u64>,
}

/// What events are told to.
pub trait EventSink {
    /// This has happened, after what was told before.
    fn event(&mut self, event: NewEvent<'_>) {
        self.event_of(0, event);
    }

    /// The same, to the machine with this number in a [composition](super::Composed).
    fn event_of(&mut self, machine: u16, event: NewEvent<'_>);
}

/// Tells nobody.
impl EventSink for () {
    fn event_of(&mut self, _: u16, _: NewEvent<'_>) {}
}

/// Tells what happens to the machine with a number, which does not know it.
pub(super) struct NumberedEvents<'a> {
    pub(super) machine: u16,
    pub(super) events: &'a mut dyn EventSink,
}

impl EventSink for NumberedEvents<'_> {
    fn event_of(&mut self, _: u16, event: NewEvent<'_>) {
        self.events.event_of(self.machine, event);
    }
}

/// One change that was applied, as those who follow receive it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppliedEvent {
    /// The machine that it happened to, by its number in a [composition](super::Composed); 0 for one that is alone.
    pub machine: u16,
    /// What happened.
    pub operation: EventOperation,
    /// Whose key it is, in UTF-8.
    pub tenant: Bytes,
    /// The collection, in UTF-8.
    pub collection: Bytes,
    /// The key.
    pub key: Bytes,
    /// The value that it has now; empty if it is gone.
    pub value: Bytes,
    /// See [`NewEvent::created`].
    pub created: u64,
    /// See [`NewEvent::previous`].
    pub previous: u64,
    /// See [`NewEvent::version`].
    pub version: u64,
    /// See [`NewEvent::deadline_ms`].
    pub deadline_ms: Option<u64>,
}

impl AppliedEvent {
    /// Tells it once more. What it was told as was valid, so a name that is no text is told as an empty one.
    pub(crate) fn tell(&self, events: &mut dyn EventSink) {
        let event = NewEvent {
            operation: self.operation,
            tenant: std::str::from_utf8(&self.tenant).unwrap_or_default(),
            collection: std::str::from_utf8(&self.collection).unwrap_or_default(),
            key: &self.key,
            value: &self.value,
            created: self.created,
            previous: self.previous,
            version: self.version,
            deadline_ms: self.deadline_ms,
        };
        events.event_of(self.machine, event);
    }
}
