//! A follower that speaks frames, written by `docs/FORMAT.md`.

use std::net::SocketAddr;

use quorate::testkit::proto::replication::{
    AppliedCommand, Entity, SnapshotMark, WalEntryProto, WalOperation,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::DEADLINE;

/// What a follower says.
#[derive(Debug, Clone, Serialize)]
pub(super) enum Said {
    Subscribe(Subscribe),
    Ack { seq: u64 },
    Alive,
    Authenticate { magic: [u8; 8], version: u32, token: String },
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Subscribe {
    pub(super) magic: [u8; 8],
    pub(super) version: u32,
    pub(super) from_seq: u64,
    pub(super) history: u64,
    pub(super) from_now: bool,
    pub(super) accept_snapshot: bool,
    pub(super) batched: bool,
    pub(super) compressed: bool,
    pub(super) window_bytes: u64,
    pub(super) heartbeat_ms: u32,
    pub(super) id: String,
    pub(super) filters: Vec<(String, String)>,
}

impl Default for Subscribe {
    fn default() -> Self {
        Self {
            magic: *b"QFRAMES\0",
            version: 1,
            from_seq: 0,
            history: 0,
            from_now: false,
            accept_snapshot: false,
            batched: false,
            compressed: false,
            window_bytes: 0,
            heartbeat_ms: 0,
            id: String::new(),
            filters: Vec::new(),
        }
    }
}

#[derive(Debug, Deserialize)]
pub(super) enum Told {
    Begin(Begin),
    Entries(Batch),
    StateBegin { seq: u64, term: u64, time_ms: u64, elapsed_ms: u64 },
    StatePart(Batch),
    StateEnd { seq: u64, items: u64, crc32: u32 },
    Heartbeat(Heartbeat),
    End(End),
}

#[derive(Debug, Clone, Deserialize)]
pub(super) struct Begin {
    pub(super) magic: [u8; 8],
    pub(super) version: u32,
    pub(super) history: u64,
    pub(super) sync: Sync,
    pub(super) seq: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum Sync {
    Partial,
    Full,
}

#[derive(Debug, Deserialize)]
pub(super) struct Batch {
    pub(super) compression: Compression,
    pub(super) count: u32,
    pub(super) raw_bytes: u64,
    pub(super) entries: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(super) enum Compression {
    None,
    Zstd,
}

#[derive(Debug, Clone, Copy, Deserialize)]
pub(super) struct Heartbeat {
    pub(super) upto_seq: u64,
    pub(super) applied_seq: u64,
    pub(super) committed_seq: u64,
    pub(super) upto_time_ms: u64,
    pub(super) applied_time_ms: u64,
    pub(super) applied_elapsed_ms: u64,
    pub(super) lag_operations: u64,
    pub(super) lag_ms: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct End {
    pub(super) reason: u32,
    pub(super) name: String,
    pub(super) message: String,
    pub(super) first_seq: u64,
    pub(super) leader: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct Entry {
    pub(super) seq: u64,
    pub(super) term: u64,
    pub(super) time_ms: u64,
    pub(super) elapsed_ms: u64,
    pub(super) more: bool,
    pub(super) change: Change,
}

#[derive(Debug, Deserialize)]
pub(super) enum Change {
    None,
    Insert(Changed),
    Update(Changed),
    Delete(Changed),
    Expire(Changed),
    Command { machine: u32, version: u32, command: Vec<u8> },
}

#[derive(Debug, Deserialize)]
pub(super) struct Changed {
    pub(super) tenant: String,
    pub(super) collection: String,
    pub(super) key: Vec<u8>,
    pub(super) value: Vec<u8>,
    pub(super) create_seq: u64,
    pub(super) previous_seq: u64,
    pub(super) version: u64,
    pub(super) expires_ms: u64,
    pub(super) deadline_elapsed_ms: u64,
    pub(super) machine: u32,
}

impl Batch {
    /// The entries before compression.
    pub(super) fn raw(&self) -> Vec<u8> {
        let raw = match self.compression {
            Compression::None => self.entries.clone(),
            Compression::Zstd => zstd::bulk::decompress(&self.entries, self.raw_bytes as usize).unwrap(),
        };
        assert_eq!(raw.len() as u64, self.raw_bytes);
        raw
    }
}

/// The entries in `raw`, as gRPC tells them.
pub(super) fn entries(raw: &[u8], count: u32, is_state: bool) -> Vec<WalEntryProto> {
    let mut at = 0;
    let entry = |_| {
        let decoded = bincode::serde::decode_from_slice(&raw[at..], bincode::config::legacy());
        let (entry, read): (Entry, usize) = decoded.unwrap();
        at += read;
        told(entry, is_state)
    };
    let entries = (0..count).map(entry).collect();
    assert_eq!(at, raw.len());
    entries
}

pub(super) fn told(entry: Entry, is_state: bool) -> WalEntryProto {
    let Entry { seq, term, time_ms, elapsed_ms, more, change } = entry;
    let snapshot = if is_state { SnapshotMark::SnapshotItem } else { SnapshotMark::NotOfASnapshot };
    let snapshot = snapshot.into();
    let told = WalEntryProto { seq, term, time_ms, elapsed_ms, more, snapshot, ..Default::default() };
    let (operation, changed) = match change {
        Change::None => panic!("nothing is never told"),
        Change::Insert(changed) => (WalOperation::Insert, changed),
        Change::Update(changed) => (WalOperation::Update, changed),
        Change::Delete(changed) => (WalOperation::Delete, changed),
        Change::Expire(changed) => (WalOperation::Expire, changed),
        Change::Command { machine, version, command } => {
            let command = Some(AppliedCommand { machine, version, command: command.into() });
            return WalEntryProto { operation: WalOperation::Command.into(), command, ..told };
        }
    };
    let Changed { tenant, collection, create_seq, previous_seq, version, .. } = changed;
    let entity = Entity {
        collection,
        key: changed.key.into(),
        value: changed.value.into(),
        create_seq,
        previous_seq,
        version,
        expires_ms: changed.expires_ms,
        deadline_elapsed_ms: changed.deadline_elapsed_ms,
        machine: changed.machine,
        ..Default::default()
    };
    WalEntryProto { operation: operation.into(), tenant_id: tenant, entity: Some(entity), ..told }
}

pub(super) fn frame(said: &Said) -> Vec<u8> {
    let message = bincode::serde::encode_to_vec(said, bincode::config::legacy()).unwrap();
    let length = u32::try_from(message.len() + 4).unwrap();
    [&length.to_le_bytes()[..], &crc32fast::hash(&message).to_le_bytes(), &message].concat()
}

/// A connection to a node, and what has come on it.
pub(super) struct Follower {
    pub(super) stream: TcpStream,
    /// Bytes of frames that were not acknowledged.
    pub(super) unacked: u64,
    pub(super) compressed: usize,
}

impl Follower {
    pub(super) async fn connect(address: SocketAddr) -> Self {
        Self { stream: TcpStream::connect(address).await.unwrap(), unacked: 0, compressed: 0 }
    }

    /// One that is told where it begins.
    pub(super) async fn begin(address: SocketAddr, first: Subscribe) -> (Self, Begin) {
        let mut follower = Self::connect(address).await;
        follower.say(&Said::Subscribe(first)).await;
        let Some(Told::Begin(begin)) = follower.told().await else { panic!("it begins with another frame") };
        assert_eq!((begin.magic, begin.version), (*b"QFRAMES\0", 1));
        assert!(begin.history != 0);
        (follower, begin)
    }

    pub(super) async fn say(&mut self, said: &Said) {
        self.stream.write_all(&frame(said)).await.unwrap();
    }

    /// The next frame; none where the connection ends.
    pub(super) async fn told(&mut self) -> Option<Told> {
        let mut length = [0; 4];
        let read = timeout(DEADLINE, self.stream.read_exact(&mut length)).await.expect("it is told nothing");
        read.ok()?;
        let mut frame = vec![0; u32::from_le_bytes(length) as usize];
        timeout(DEADLINE, self.stream.read_exact(&mut frame)).await.unwrap().unwrap();
        let (checksum, message) = frame.split_at(4);
        assert_eq!(checksum, crc32fast::hash(message).to_le_bytes());
        let decoded = bincode::serde::decode_from_slice(message, bincode::config::legacy());
        let (told, read): (Told, usize) = decoded.unwrap();
        assert_eq!(read, message.len());
        if !matches!(told, Told::Heartbeat(_) | Told::Begin(_)) {
            self.unacked += 4 + frame.len() as u64;
        }
        Some(told)
    }

    /// The next entries; none from a heartbeat.
    pub(super) async fn entries(&mut self) -> Vec<WalEntryProto> {
        match self.told().await.expect("a stream of what is applied does not end by itself") {
            Told::Entries(batch) => {
                self.compressed += usize::from(batch.compression == Compression::Zstd);
                entries(&batch.raw(), batch.count, false)
            }
            Told::Heartbeat(_) => Vec::new(),
            other => panic!("{other:?}"),
        }
    }

    /// Entries up to position `upto`, the last of it included.
    pub(super) async fn upto(&mut self, upto: u64) -> Vec<WalEntryProto> {
        let mut all = Vec::new();
        while !all.last().is_some_and(|last: &WalEntryProto| last.seq >= upto && !last.more) {
            all.extend(self.entries().await);
        }
        all
    }

    pub(super) async fn heartbeat(&mut self) -> Heartbeat {
        loop {
            if let Told::Heartbeat(heartbeat) = self.told().await.expect("a heartbeat comes") {
                return heartbeat;
            }
        }
    }

    /// Why the stream ends; after that nothing comes.
    pub(super) async fn end(&mut self) -> End {
        loop {
            if let Told::End(end) = self.told().await.expect("it is told why nothing more comes") {
                assert!(self.told().await.is_none());
                return end;
            }
        }
    }
}
