//! What a fake server tells followers: what its script says.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt, stream};
use prost::Message;
use tokio::sync::broadcast;
use tonic::{Code, Request, Response, Status, Streaming};

use super::fake::failure;
use crate::client::FollowedEntry;
use crate::proto::replication::replication_service_server::ReplicationService;
use crate::proto::replication::{
    AppliedCommand, Batch, Compression, Entity, EntriesRequest, EntriesResponse, Heartbeat, StatusRequest,
    StatusResponse, SubscribeRequest, WalEntryProto, WalOperation,
};
use crate::proto::v1::{Failure, Reason};

pub(crate) type Sent = Vec<Result<WalEntryProto, Status>>;
type EntryStream = Pin<Box<dyn Stream<Item = Result<WalEntryProto, Status>> + Send>>;
type Looked = Result<EntriesResponse, Status>;

/// A follower that is being served: it stays open after what the script says, unless that ends with an error.
#[derive(Clone)]
pub(crate) struct Replica {
    /// What each stream is sent, in their order; nothing once it is empty.
    streams: Arc<Mutex<VecDeque<Sent>>>,
    /// The first message of each stream.
    opened: Arc<Mutex<Vec<SubscribeRequest>>>,
    /// All the later ones.
    acks: Arc<Mutex<Vec<SubscribeRequest>>>,
    /// What open streams are sent later.
    pushed: broadcast::Sender<WalEntryProto>,
    looks: Arc<Mutex<Vec<(EntriesRequest, Looked)>>>,
    looked: Arc<Mutex<Vec<EntriesRequest>>>,
}

impl Default for Replica {
    fn default() -> Self {
        Self {
            streams: Arc::default(),
            opened: Arc::default(),
            acks: Arc::default(),
            pushed: broadcast::channel(64).0,
            looks: Arc::default(),
            looked: Arc::default(),
        }
    }
}

impl Replica {
    pub(crate) fn set(&self, streams: impl IntoIterator<Item = Sent>) {
        *self.streams.lock().unwrap() = streams.into_iter().collect();
    }

    /// What was asked for, stream by stream.
    pub(crate) fn opened(&self) -> Vec<SubscribeRequest> {
        self.opened.lock().unwrap().clone()
    }

    /// After which position each stream was to begin.
    pub(crate) fn begun(&self) -> Vec<u64> {
        self.opened().iter().map(|request| request.from_seq).collect()
    }

    /// What was acknowledged, on all streams.
    pub(crate) fn acks(&self) -> Vec<u64> {
        self.acks.lock().unwrap().iter().map(|request| request.ack_seq).collect()
    }

    /// Sends this to the streams that are open.
    pub(crate) fn push(&self, message: WalEntryProto) {
        self.pushed.send(message).expect("a stream is open");
    }

    /// What is answered to those who ask for the entries after a position; nothing fits a limit here.
    pub(crate) fn set_looks(&self, looks: impl IntoIterator<Item = (u64, Looked)>) {
        let ask = |after_seq| EntriesRequest { after_seq, ..EntriesRequest::default() };
        *self.looks.lock().unwrap() = looks.into_iter().map(|(after, looked)| (ask(after), looked)).collect();
    }

    pub(crate) fn looked(&self) -> Vec<EntriesRequest> {
        self.looked.lock().unwrap().clone()
    }
}

#[tonic::async_trait]
impl ReplicationService for Replica {
    async fn subscribe(
        &self,
        request: Request<Streaming<SubscribeRequest>>,
    ) -> Result<Response<EntryStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.ok_or_else(|| Status::invalid_argument("no message"))?;
        // Before the script is asked: what is pushed from now on is for this stream.
        let pushed = self.pushed.subscribe();
        self.opened.lock().unwrap().push(first);
        let acks = self.acks.clone();
        drop(crate::runtime::spawn(async move {
            while let Ok(Some(ack)) = requests.message().await {
                acks.lock().unwrap().push(ack);
            }
        }));
        let sent = self.streams.lock().unwrap().pop_front().unwrap_or_default();
        if let [Err(status)] = &sent[..] {
            return Err(status.clone());
        }
        let later = stream::unfold(pushed, |mut pushed| async move {
            let message = pushed.recv().await.ok()?;
            Some((Ok(message), pushed))
        });
        Ok(Response::new(Box::pin(stream::iter(sent).chain(later))))
    }

    async fn get_status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(StatusResponse {
            current_seq: 9,
            healthy: true,
            first_seq: 3,
            history: 0xabc,
            node_id: 2,
            role: "follower".to_owned(),
            ..StatusResponse::default()
        }))
    }

    async fn get_entries_after(
        &self,
        request: Request<EntriesRequest>,
    ) -> Result<Response<EntriesResponse>, Status> {
        let request = request.into_inner();
        self.looked.lock().unwrap().push(request.clone());
        let looks = self.looks.lock().unwrap();
        let found = looks.iter().find(|(asked, _)| asked.after_seq == request.after_seq);
        let (_, looked) = found.ok_or_else(|| Status::from(failure(Reason::Invalid, false)))?;
        looked.clone().map(Response::new)
    }
}

/// An insertion into a collection that is called so.
pub(crate) fn entry_of(collection: &str, seq: u64, more: bool) -> WalEntryProto {
    let entity = Entity {
        collection: collection.to_owned(),
        key: format!("k{seq}").into(),
        value: "v".into(),
        create_seq: seq,
        version: 1,
        ..Entity::default()
    };
    WalEntryProto {
        seq,
        operation: WalOperation::Insert.into(),
        tenant_id: "default".to_owned(),
        entity: Some(entity),
        time_ms: 1_767_225_600_000,
        term: 3,
        more,
        ..WalEntryProto::default()
    }
}

pub(crate) fn entry(seq: u64) -> WalEntryProto {
    entry_of("default", seq, false)
}

pub(crate) fn beat(upto_seq: u64) -> WalEntryProto {
    let heartbeat = Heartbeat { upto_seq, applied_seq: upto_seq, ..Heartbeat::default() };
    WalEntryProto { history: 0xabc, heartbeat: Some(heartbeat), ..WalEntryProto::default() }
}

pub(crate) fn batch(mut entries: Vec<WalEntryProto>, compression: Compression) -> WalEntryProto {
    entries[0].history = 0xabc;
    let count = u32::try_from(entries.len()).unwrap();
    let raw = crate::proto::replication::Entries { entries }.encode_to_vec();
    let raw_bytes = raw.len() as u64;
    let entries = match compression {
        Compression::None => raw,
        Compression::Zstd => zstd::bulk::compress(&raw, 3).unwrap(),
    };
    let batch = Batch { compression: compression.into(), count, entries: entries.into(), raw_bytes };
    WalEntryProto { batch: Some(batch), ..WalEntryProto::default() }
}

pub(crate) fn broken() -> Status {
    Status::unavailable("the script says so")
}

pub(crate) fn because(reason: Reason, first_revision: u64) -> Status {
    let (code, message) = (Code::OutOfRange.into(), "it says why".to_owned());
    Status::from(Failure { first_revision, code, message, ..failure(reason, false) })
}

pub(crate) fn removal(seq: u64) -> WalEntryProto {
    WalEntryProto { operation: WalOperation::Delete.into(), ..entry(seq) }
}

pub(crate) fn command(seq: u64, command: &'static [u8]) -> WalEntryProto {
    let command = AppliedCommand { machine: 1, version: 2, command: command.into() };
    let operation = WalOperation::Command.into();
    WalEntryProto { operation, entity: None, command: Some(command), ..entry(seq) }
}

/// As a client has it.
pub(crate) fn followed(message: WalEntryProto) -> FollowedEntry {
    FollowedEntry::decode(message).unwrap()
}
