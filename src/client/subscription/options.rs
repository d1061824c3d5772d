//! What a subscription can be told.

use std::time::Duration;

use super::super::error::ClientError;
use super::super::preference::ReadPreference;
use crate::proto::replication::{Compression, Filter, SubscribeRequest};
use crate::reason::Reason;
use crate::types::Bookmark;

/// Where to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum FollowFrom {
    /// With the first entry that there ever was.
    Beginning,
    /// After this position: the last that the follower has.
    After(Bookmark),
    /// With what is written from now on.
    #[default]
    Now,
}

/// Which entries are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub struct EntryFilter {
    /// Those of this tenant.
    pub tenant: String,
    /// And of this collection of it, if one is named.
    pub collection: Option<String>,
}

impl EntryFilter {
    /// What happens to a tenant.
    pub fn tenant(tenant: impl Into<String>) -> Self {
        Self { tenant: tenant.into(), collection: None }
    }

    /// What happens to a collection of a tenant.
    pub fn collection(tenant: impl Into<String>, collection: impl Into<String>) -> Self {
        Self { tenant: tenant.into(), collection: Some(collection.into()) }
    }

    pub(super) fn encode(&self) -> Filter {
        Filter { tenant_id: self.tenant.clone(), collection: self.collection.clone().unwrap_or_default() }
    }
}

/// How batches of entries travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum EntryCompression {
    /// As they are.
    #[default]
    None,
    /// Compressed with zstd where that makes them smaller.
    Zstd,
}

/// What a [`Subscription`](super::Subscription) is to bring, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscribeOptions {
    /// Where to begin. Default: with what is written from now on.
    pub from: FollowFrom,
    /// Which entries are wanted: those that any of these names. Default none: all. Only a machine that tells events can be
    /// filtered.
    pub filters: Vec<EntryFilter>,
    /// Bytes that the node may send before they are acknowledged. 0: there is no such window. Default 4 MiB.
    pub window_bytes: u64,
    /// Whether several entries travel in one message. Default true.
    pub batched: bool,
    /// How batches travel. Default: as they are.
    pub compression: EntryCompression,
    /// How often the node says that it is there when it sends nothing else. One of which nothing comes for three times as long is
    /// left. From 10 ms to an hour; default 5 s.
    pub heartbeat: Duration,
    /// What the node calls this follower where it lists them. Default empty: it has no name.
    pub id: String,
    /// Whether the follower is told the state as of a newer position where no node has what comes next; see [`SnapshotPart`](super::SnapshotPart). Default no: then
    /// the subscription ends with [`ClientError::Compacted`].
    pub accept_snapshot: bool,
    /// Whether events also tell the value that their key had before, as far back as the node has it. Default no.
    pub previous: bool,
    /// Where this follower answers reads itself, as `host:port`, if it does: the node that is followed tells its clients. Default: nowhere.
    pub serves: Option<String>,
    /// Which node is asked first. Default: the client's preference.
    pub preference: Option<ReadPreference>,
}

impl Default for SubscribeOptions {
    fn default() -> Self {
        Self {
            from: FollowFrom::default(),
            filters: Vec::new(),
            window_bytes: 4 * 1024 * 1024,
            batched: true,
            compression: EntryCompression::default(),
            heartbeat: Duration::from_secs(5),
            id: String::new(),
            accept_snapshot: false,
            previous: false,
            serves: None,
            preference: None,
        }
    }
}

impl SubscribeOptions {
    /// Everything since the beginning, unless more is said.
    pub fn from_beginning() -> Self {
        Self { from: FollowFrom::Beginning, ..Self::default() }
    }

    /// What comes after a position.
    pub fn after(position: impl Into<Bookmark>) -> Self {
        Self { from: FollowFrom::After(position.into()), ..Self::default() }
    }

    /// What is written from now on.
    pub fn from_now() -> Self {
        Self::default()
    }

    /// The first message of every stream, but for the position.
    ///
    /// # Errors
    /// What is out of its range.
    pub(super) fn opening(&self) -> Result<SubscribeRequest, ClientError> {
        const HEARTBEATS: std::ops::RangeInclusive<Duration> =
            Duration::from_millis(10)..=Duration::from_secs(3600);
        if !HEARTBEATS.contains(&self.heartbeat) {
            let message = "the heartbeat of a subscription must be from 10 ms to an hour".to_owned();
            return Err(ClientError::Rejected { reason: Reason::Invalid, message });
        }
        let compression = match self.compression {
            EntryCompression::None => Compression::None,
            EntryCompression::Zstd => Compression::Zstd,
        };
        Ok(SubscribeRequest {
            filters: self.filters.iter().map(EntryFilter::encode).collect(),
            window_bytes: self.window_bytes,
            batched: self.batched,
            compression: compression.into(),
            heartbeat_ms: u32::try_from(self.heartbeat.as_millis()).unwrap_or(u32::MAX),
            id: self.id.clone(),
            accept_snapshot: self.accept_snapshot,
            resumable: self.accept_snapshot,
            previous: self.previous,
            serves: self.serves.clone().unwrap_or_default(),
            ..SubscribeRequest::default()
        })
    }
}
