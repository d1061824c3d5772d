//! A server for tests: answers what its script says, and can be killed as a process can.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tonic::{Request, Response, Status, Streaming};

use crate::proto::v1::admin_server::{Admin, AdminServer};
use crate::proto::v1::kv_server::{Kv, KvServer};
use crate::proto::v1::*;

/// What comes of one message.
pub(crate) enum Step {
    Answer(Vec<TaggedResponse>),
    BreakStream,
}

type Script = Box<dyn FnMut(Vec<TaggedRequest>) -> Step + Send>;

#[derive(Clone)]
struct Service {
    script: Arc<Mutex<Script>>,
    status: Arc<Mutex<Option<StatusResponse>>>,
    streams: Arc<AtomicUsize>,
    requests: Arc<AtomicUsize>,
}

/// A node on a runtime of its own, so that killing it closes its sockets at once.
pub(crate) struct Fake {
    pub(crate) address: SocketAddr,
    service: Service,
    runtime: Option<Runtime>,
}

impl Fake {
    pub(crate) fn start(script: impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), script)
    }

    pub(crate) fn start_at(
        address: SocketAddr,
        script: impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static,
    ) -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = std::net::TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let service = Service {
            script: Arc::new(Mutex::new(Box::new(script))),
            status: Arc::default(),
            streams: Arc::default(),
            requests: Arc::default(),
        };
        let serving = service.clone();
        drop(runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            tonic::transport::Server::builder()
                .add_service(KvServer::new(serving.clone()).max_decoding_message_size(64 * 1024 * 1024))
                .add_service(AdminServer::new(serving))
                .serve_with_incoming(
                    tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true)),
                )
                .await
                .unwrap();
        }));
        Self { address, service, runtime: Some(runtime) }
    }

    pub(crate) fn endpoint(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn set_script(&self, script: impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static) {
        *self.service.script.lock().unwrap() = Box::new(script);
    }

    /// Without this, the node does not implement `Admin`.
    pub(crate) fn set_status(&self, status: StatusResponse) {
        *self.service.status.lock().unwrap() = Some(status);
    }

    pub(crate) fn streams(&self) -> usize {
        self.service.streams.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> usize {
        self.service.requests.load(Ordering::SeqCst)
    }

    pub(crate) fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.kill();
    }
}

type Answers = Pin<Box<dyn Stream<Item = Result<PipelineResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Kv for Service {
    async fn pipeline(
        &self,
        request: Request<Streaming<PipelineRequest>>,
    ) -> Result<Response<Answers>, Status> {
        self.streams.fetch_add(1, Ordering::SeqCst);
        let service = self.clone();
        let answers = request.into_inner().map(move |message| {
            let requests = message?.requests;
            service.requests.fetch_add(requests.len(), Ordering::SeqCst);
            match (service.script.lock().unwrap())(requests) {
                Step::Answer(responses) => Ok(PipelineResponse { responses }),
                Step::BreakStream => Err(Status::aborted("the script says so")),
            }
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

#[tonic::async_trait]
impl Admin for Service {
    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        match &*self.status.lock().unwrap() {
            Some(status) => Ok(Response::new(status.clone())),
            None => Err(Status::unimplemented("no status was set")),
        }
    }
}

/// The answer that a leader gives: a put's revision is the length of its value, a get finds its own key.
pub(crate) fn served(request: &TaggedRequest) -> TaggedResponse {
    use tagged_request::Request as Ask;
    use tagged_response::Response as Reply;
    let reply = match request.request.as_ref().unwrap() {
        Ask::Put(put) => Reply::Put(PutResponse { revision: put.value.len() as u64, ..Default::default() }),
        Ask::Get(get) => {
            let item = Item { key: get.key.clone(), value: get.key.clone(), ..Default::default() };
            Reply::Get(GetResponse { item: Some(item), ..Default::default() })
        }
        Ask::Delete(_) => Reply::Delete(DeleteResponse { deleted: true, ..Default::default() }),
        Ask::Range(range) => Reply::Range(RangeResponse { next: range.start.clone(), ..Default::default() }),
        other => panic!("{other:?}"),
    };
    TaggedResponse { tag: request.tag, response: Some(reply) }
}

pub(crate) fn refused(request: &TaggedRequest, failure: &Failure) -> TaggedResponse {
    TaggedResponse { tag: request.tag, response: Some(tagged_response::Response::Failure(failure.clone())) }
}

pub(crate) fn not_leader(hint: Option<(u64, String)>) -> Failure {
    Failure {
        code: tonic::Code::FailedPrecondition.into(),
        reason: Reason::NotLeader.into(),
        message: "this node is not the leader".to_owned(),
        maybe_applied: false,
        leader: hint.map(|(node_id, client)| LeaderHint { node_id, client }),
        ..Default::default()
    }
}

/// Answers everything.
pub(crate) fn leader(requests: Vec<TaggedRequest>) -> Step {
    Step::Answer(requests.iter().map(served).collect())
}

/// Refuses everything in the same way.
pub(crate) fn refusing(failure: Failure) -> impl FnMut(Vec<TaggedRequest>) -> Step + Send + 'static {
    move |requests| Step::Answer(requests.iter().map(|request| refused(request, &failure)).collect())
}

/// Accepts everything, answers nothing.
pub(crate) fn silent(_: Vec<TaggedRequest>) -> Step {
    Step::Answer(vec![])
}
