//! `replication.ReplicationService`: what is applied, for everybody who follows, from any node.
//!
//! - [`begin`]: where a follower begins, with or without a state before;
//! - [`stream`]: the task that sends to one follower; [`credit`]: how much it may send; [`rest`]: what is left of a page;
//! - [`wire`]: entries as messages; [`wishes`]: what a follower asks for; [`failures`]: why it is told nothing more;
//! - [`looks`]: single answers; [`files`]: the whole state as a file;
//! - [`registry`]: who follows, for pages and metrics.
//!
//! # Promises
//!
//! - Entries come in the order of their positions, from the position that was asked for on, none left out and none twice.
//! - A follower that does not read costs its place and some hundred kilobytes, which count as unsent answers of its connection. It
//!   holds up nobody. It loses its stream after minutes.
//! - Nothing is kept for a follower that has gone.
//!
//! The protocol, with a figure: `docs/design/subscribe.md`.

mod begin;
mod credit;
mod failures;
mod files;
mod looks;
mod registry;
mod rest;
mod stream;
mod wire;
mod wishes;

use std::sync::Arc;
use std::time::Instant;

use futures::TryStreamExt as _;
use prost::Message as _;
use tonic::{Request, Response, Status, Streaming};

use self::files::WantedFile;
pub(super) use self::registry::{FollowerReport, SubscriberCollector, Subscribers};
use self::stream::{FollowerLine, drained, one_by_one};
use super::operated::OperatedNode;
use crate::door::bodies::{self, Built};
use crate::door::failure::invalid;
use crate::door::metrics::StreamCall;
use crate::door::services::counted;
use crate::door::streams::{Responses, WatchPlace, stream};
use crate::door::{Door, Method};
use crate::incoming::Caller;
use crate::proto::replication::replication_service_server::ReplicationService;
use crate::proto::replication::{
    EntriesRequest, EntriesResponse, SnapshotPiece, SnapshotRequest, StatusRequest, StatusResponse,
    SubscribeRequest, WalEntryProto,
};
use crate::proto::v1::Failure;
use crate::runtime;

/// The service's name.
pub(super) const NAME: &str = "replication.ReplicationService";
/// The path at which followers say more after their first message.
pub(super) const SUBSCRIBE_PATH: &str = "/replication.ReplicationService/Subscribe";

const SUBSCRIBE: Method = Method::read("subscribe");
const GET_STATUS: Method = Method::read("get_status");
const READ_SNAPSHOT: Method = Method::read("read_snapshot");
const GET_ENTRIES_AFTER: Method = Method::read("get_entries_after");

/// What can be called.
pub(super) const METHODS: [Method; 4] = [SUBSCRIBE, GET_STATUS, READ_SNAPSHOT, GET_ENTRIES_AFTER];

/// The largest command of all there may be, and what surrounds it.
pub(super) const MAX_ENTRY_BYTES: usize = 32 * 1024 * 1024;

/// The service, over whatever node it is given.
pub(super) struct SubscriptionService<N> {
    pub(super) door: Door<N>,
    pub(super) subscribers: Subscribers,
}

impl<N: OperatedNode> SubscriptionService<N> {
    fn observe<T>(&self, method: Method, started: Instant, outcome: &Result<T, Failure>) {
        let metrics = &self.door.metrics;
        metrics.observe(metrics.methods().id(method.name), started, outcome);
    }
}

fn caller_of<T>(request: &Request<T>) -> Result<Arc<Caller>, Failure> {
    let caller = request.extensions().get::<Arc<Caller>>().cloned();
    caller.ok_or_else(|| invalid("the connection of this call is not known"))
}

#[tonic::async_trait]
impl<N: OperatedNode> ReplicationService for SubscriptionService<N> {
    async fn subscribe(
        &self,
        request: Request<Streaming<SubscribeRequest>>,
    ) -> Result<Response<Responses<WalEntryProto>>, Status> {
        let Door { node, metrics, limits, draining, .. } = self.door.clone();
        let method = metrics.methods().id(SUBSCRIBE.name);
        let call = StreamCall::new(metrics, method, self.subscribers.gauge());
        let place = caller_of(&request).and_then(|caller| WatchPlace::take(&caller, limits.watches));
        let (place, open) = call.open(place)?;
        // Nothing is waited for before the caller is answered: some say where to begin only then.
        let (outlet, chunks) = stream();
        let (outlet, caller) = (Arc::new(outlet), place.caller().clone());
        let line =
            FollowerLine { requests: request.into_inner(), outlet: outlet.clone(), caller, limits, draining };
        let subscribers = self.subscribers.clone();
        runtime::spawn(async move {
            let outcome = begin::serve(node, subscribers, line, place).await;
            open.ended(&outcome);
            match outcome {
                Ok(()) => outlet.complete(),
                Err(failure) => outlet.fail(failure),
            }
        });
        Ok(Response::new(one_by_one(chunks)))
    }

    async fn read_snapshot(
        &self,
        request: Request<SnapshotRequest>,
    ) -> Result<Response<Responses<SnapshotPiece>>, Status> {
        let Door { node, metrics, limits, mut draining, .. } = self.door.clone();
        let method = metrics.methods().id(READ_SNAPSHOT.name);
        let call = StreamCall::new(metrics, method, self.subscribers.snapshot_gauge());
        let place = caller_of(&request)
            .and_then(|caller| Ok((caller, node.may_be_followed()?, self.subscribers.snapshot_place()?)));
        let ((caller, (), place), open) = call.open(place)?;
        let (outlet, pieces) = stream();
        let subscribers = self.subscribers.clone();
        runtime::spawn(async move {
            let sending = async {
                let wanted = WantedFile::parse(request.into_inner())?;
                let line = (&outlet, &caller, &*limits);
                files::send(&node, &subscribers, wanted, line).await
            };
            let outcome = tokio::select! {
                biased;
                () = drained(&mut draining) => Err(failures::draining()),
                () = outlet.gone() => Ok(()),
                outcome = sending => outcome,
            };
            drop(place);
            open.ended(&outcome);
            match outcome {
                Ok(()) => outlet.complete(),
                Err(failure) => outlet.fail(failure),
            }
        });
        Ok(Response::new(Box::pin(pieces.map_ok(|(piece, _built)| piece))))
    }

    async fn get_status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let (started, node) = (Instant::now(), &self.door.node);
        let present = match request.into_inner().present {
            true => node.present().await.map_err(Failure::from),
            false => Ok(0),
        };
        self.observe(GET_STATUS, started, &present.as_ref().map(drop).map_err(Clone::clone));
        let status = looks::status(node, self.subscribers.count());
        Ok(Response::new(StatusResponse { present_seq: present?, ..status }))
    }

    async fn get_entries_after(
        &self,
        request: Request<EntriesRequest>,
    ) -> Result<Response<EntriesResponse>, Status> {
        let started = Instant::now();
        let answer = async {
            let caller = caller_of(&request)?;
            bodies::room(&caller, &self.door.limits).await;
            let answer = looks::entries_after(&self.door.node, request.into_inner()).await?;
            let bytes = answer.encoded_len() + answer.entries.len() * size_of::<WalEntryProto>();
            Ok((answer, Built::new(caller, bytes)))
        };
        let outcome = answer.await;
        self.observe(GET_ENTRIES_AFTER, started, &outcome);
        let (answer, built) = outcome?;
        Ok(counted(answer, Some(built)))
    }
}
