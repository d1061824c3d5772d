//! Followers that come by gRPC: `replication.ReplicationService`.

use std::sync::Arc;
use std::time::Instant;

use futures::{StreamExt as _, TryStreamExt as _, stream as streams};
use prost::Message as _;
use tonic::{Request, Response, Status, Streaming};

use super::begin;
use super::failures;
use super::files;
use super::looks;
use super::transport::{Chunk, FollowerLine};
use super::wire::ProtobufEncoding;
use super::{GET_ENTRIES_AFTER, GET_STATUS, READ_SNAPSHOT, SubscriptionService};
use crate::door::bodies::{self, Built};
use crate::door::failure::invalid;
use crate::door::metrics::StreamCall;
use crate::door::services::counted;
use crate::door::streams::{Responses, stream};
use crate::door::{DataRight, Door, Method, Touched, permitted};
use crate::incoming::Caller;
use crate::node::operated::OperatedNode;
use crate::proto::replication::replication_service_server::ReplicationService;
use crate::proto::replication::{
    EntriesRequest, EntriesResponse, SnapshotPiece, SnapshotRequest, StatusRequest, StatusResponse,
    SubscribeRequest, WalEntryProto,
};
use crate::proto::v1::Failure;
use crate::runtime;

/// The messages in `chunks`, one by one.
pub(super) fn one_by_one(chunks: Responses<Chunk<WalEntryProto>>) -> Responses<WalEntryProto> {
    let messages = chunks.map_ok(|Chunk { messages, built }| {
        streams::iter(messages).map(move |message| {
            let _counts = &built;
            Ok::<_, Status>(message)
        })
    });
    Box::pin(messages.try_flatten())
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
        let call = self.call();
        let place = caller_of(&request).and_then(|caller| self.place(&caller));
        let (place, open) = call.open(place)?;
        // Nothing is waited for before the caller is answered: some say where to begin only then.
        let (outlet, chunks) = stream();
        let (outlet, caller) = (Arc::new(outlet), place.caller().clone());
        let principal = permitted::caller(request.extensions());
        let requests = request.into_inner().map_err(|status| failures::unread(&status)).boxed();
        let Door { node, limits, draining, .. } = self.door.clone();
        let encoding = ProtobufEncoding;
        let line =
            FollowerLine { requests, outlet: outlet.clone(), encoding, caller, principal, limits, draining };
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
        let place = caller_of(&request).and_then(|caller| {
            // It holds sessions and what else machines keep beside what they tell.
            let principal = permitted::caller(request.extensions());
            permitted::part(&principal, DataRight::Subscribe, Touched::Everything)?;
            Ok((caller, node.may_be_followed()?, self.subscribers.snapshot_place()?))
        });
        let ((caller, (), place), open) = call.open(place)?;
        let (outlet, pieces) = stream();
        let subscribers = self.subscribers.clone();
        runtime::spawn(async move {
            let line = (&outlet, &caller, &*limits);
            let outcome = files::serve(&node, &subscribers, request.into_inner(), line, &mut draining).await;
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
            let principal = permitted::caller(request.extensions());
            let answer = looks::entries_after(&self.door.node, &principal, request.into_inner()).await?;
            let bytes = answer.encoded_len() + answer.entries.len() * size_of::<WalEntryProto>();
            Ok((answer, Built::new(caller, bytes)))
        };
        let outcome = answer.await;
        self.observe(GET_ENTRIES_AFTER, started, &outcome);
        let (answer, built) = outcome?;
        Ok(counted(answer, Some(built)))
    }
}
