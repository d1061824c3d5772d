//! The services that every guest has: `quorate.v1.Pipeline`, where its calls travel as a method and the bytes of a request, and
//! `quorate.v1.Sessions`.

use std::marker::PhantomData;
use std::pin::Pin;

use bytes::Bytes;
use futures::Stream;
use tonic::server::NamedService;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

use super::bodies::Built;
use super::failure;
use super::guest::{Guest, guarded};
use super::pipeline::{self, Done, PipelineFraming, PipelineRequestKind, RequestOutcome, Weight};
use super::relay::{self, RelayedCall};
use super::{Door, MAX_ANSWER_BYTES, MAX_MESSAGE_BYTES, ServedNode, permitted};
use crate::call::{self, Options, Rejected};
use crate::proto::v1::answer::Content as Answered;
use crate::proto::v1::call::Content;
use crate::proto::v1::pipeline_server::{Pipeline, PipelineServer};
use crate::proto::v1::sessions_server::{Sessions, SessionsServer};
use crate::proto::v1::{self, Answer, Call, Failure, PipelineAnswers, PipelineCalls};
use crate::reason::Reason;

/// The names of these services.
pub(crate) const NAMES: [&str; 2] = ["quorate.v1.Sessions", "quorate.v1.Pipeline"];

/// The path of the pipeline.
pub(crate) const PIPELINE: &str = "/quorate.v1.Pipeline/Run";

/// Adds these services to `routes`.
pub(crate) fn add<G, N>(door: &Door<N>, routes: Routes) -> Routes
where
    G: Guest,
    N: ServedNode<Machine = G::Machine>,
{
    let pipeline = PipelineService::<G, N> { door: door.clone(), guest: PhantomData };
    let pipeline = PipelineServer::new(pipeline)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES);
    debug_assert_eq!(NAMES[1], <PipelineServer<PipelineService<G, N>> as NamedService>::NAME);
    routes.add_service(SessionsServer::new(SessionsService { door: door.clone() })).add_service(pipeline)
}

/// An answer that counts for its connection until it is encoded.
pub(crate) fn counted<T>(answer: T, built: Option<Built>) -> Response<T> {
    let mut response = Response::new(answer);
    if let Some(built) = built {
        response.extensions_mut().insert(built);
    }
    response
}

struct SessionsService<N> {
    door: Door<N>,
}

#[tonic::async_trait]
impl<N: ServedNode> Sessions for SessionsService<N> {
    async fn open_session(
        &self,
        request: Request<v1::OpenSessionRequest>,
    ) -> Result<Response<v1::OpenSessionResponse>, Status> {
        let caller = request.extensions().get().cloned();
        let (opened, built) = self.door.open_session(request.into_inner(), caller).await?;
        Ok(counted(opened, built))
    }

    async fn close_session(
        &self,
        request: Request<v1::CloseSessionRequest>,
    ) -> Result<Response<v1::CloseSessionResponse>, Status> {
        let caller = request.extensions().get().cloned();
        let (closed, built) = self.door.close_session(request.into_inner(), caller).await?;
        Ok(counted(closed, built))
    }
}

type AnswerStream = Pin<Box<dyn Stream<Item = Result<PipelineAnswers, Status>> + Send>>;

struct PipelineService<G, N> {
    door: Door<N>,
    guest: PhantomData<fn() -> G>,
}

#[tonic::async_trait]
impl<G, N> Pipeline for PipelineService<G, N>
where
    G: Guest,
    N: ServedNode<Machine = G::Machine>,
{
    async fn run(
        &self,
        request: Request<Streaming<PipelineCalls>>,
    ) -> Result<Response<AnswerStream>, Status> {
        let caller = request.extensions().get().cloned();
        let principal = permitted::caller(request.extensions());
        let door = Door { is_relayed: relay::is_relayed(request.metadata()), ..self.door.clone() };
        let outgoing = pipeline::start::<CallsByName<G>, _, _>(door, caller, principal, request.into_inner());
        Ok(Response::new(Box::pin(outgoing)))
    }
}

/// Calls by the names of their methods, whatever the guest.
struct CallsByName<G>(PhantomData<fn() -> G>);

/// What was found out about a call to weigh it: its method, and of those that are weighed the request.
struct Made<G: Guest> {
    method: Option<usize>,
    request: Option<Result<G::Request, Rejected>>,
}

impl<G: Guest> Default for Made<G> {
    fn default() -> Self {
        Self { method: None, request: None }
    }
}

/// The guest's method called `name`.
fn method<G: Guest>(name: &str) -> Option<usize> {
    G::METHODS.iter().position(|method| method.name == name)
}

impl<G: Guest> PipelineFraming for CallsByName<G> {
    type Guest = G;
    type Requests = PipelineCalls;
    type Request = Call;
    type Response = Answer;
    type Responses = PipelineAnswers;
    type Made = Made<G>;

    fn requests(message: PipelineCalls) -> Vec<Call> {
        message.calls
    }

    fn weigh(call: &Call) -> (Weight, Made<G>) {
        /// All that a pipeline has.
        const MOST: u32 = pipeline::MAX_IN_FLIGHT as u32;
        let (Some(Content::Payload(payload)), Some(number)) = (&call.content, method::<G>(&call.method))
        else {
            return (Weight { permits: 1, expected: 0 }, Made::default());
        };
        let method = &G::METHODS[number];
        let request = method.is_weighed.then(|| parse::<G>(number, payload.clone()));
        let expected = match &request {
            Some(Ok(request)) => guarded(false, || G::expected_bytes(request)).unwrap_or_default(),
            Some(Err(_)) | None => 0,
        };
        let weight = Weight { permits: method.permits.clamp(1, MOST), expected };
        (weight, Made { method: Some(number), request })
    }

    fn open(call: Call, made: Made<G>) -> (u64, Result<PipelineRequestKind<G>, Failure>) {
        let Call { tag, content, method: name, write, level, freshness } = call;
        let ask = match content {
            Some(Content::Payload(payload)) => match made.method.or_else(|| method::<G>(&name)) {
                Some(method) => Ok(PipelineRequestKind::Guest {
                    method,
                    request: made.request.unwrap_or_else(|| parse::<G>(method, payload)),
                    options: options(G::METHODS[method].changes, write, level, freshness),
                }),
                None => Err(failure::unknown_method(&name)),
            },
            Some(Content::OpenSession(open)) => Ok(PipelineRequestKind::OpenSession(open)),
            Some(Content::CloseSession(close)) => Ok(PipelineRequestKind::CloseSession(close)),
            None => Err(failure::unknown_request()),
        };
        (tag, ask)
    }

    fn relayed(call: &Call) -> Option<RelayedCall> {
        let (method, content) = match call.content.as_ref()? {
            Content::Payload(payload) => {
                let method = method::<G>(&call.method).filter(|method| G::METHODS[*method].changes)?;
                // It may be on its way for long, and is a slice of its message.
                (Some(method), Content::Payload(Bytes::copy_from_slice(payload)))
            }
            content @ (Content::OpenSession(_) | Content::CloseSession(_)) => (None, content.clone()),
        };
        let passed_on = Call { tag: 0, content: Some(content), ..call.clone() };
        Some(RelayedCall { tag: call.tag, method, call: passed_on })
    }

    fn response(tag: u64, outcome: RequestOutcome<G>) -> Answer {
        let (header, content) = match outcome {
            Ok(Done::Relayed(_, answer)) => return Answer { tag, ..answer },
            Ok(Done::Guest(header, response)) => (Some(header), Answered::Payload(G::encode(response))),
            Ok(Done::Opened(opened)) => (None, Answered::OpenSession(opened)),
            Ok(Done::Closed(closed)) => (None, Answered::CloseSession(closed)),
            Err(failure) => (None, Answered::Failure(failure)),
        };
        Answer { tag, header, content: Some(content) }
    }

    fn encoded_bytes(answer: &Answer) -> usize {
        match &answer.content {
            Some(Answered::Payload(payload)) => payload.len(),
            _ => 0,
        }
    }

    fn responses(answers: Vec<Answer>) -> PipelineAnswers {
        PipelineAnswers { answers }
    }
}

/// The request in `payload`, if the guest finds one.
fn parse<G: Guest>(method: usize, payload: Bytes) -> Result<G::Request, Rejected> {
    let payload = match G::METHODS[method].changes {
        true => payload,
        // A read may wait for room with what it asks for, and its message may be many times that.
        false => Bytes::copy_from_slice(&payload),
    };
    guarded(false, || G::parse(method, payload))
        .unwrap_or_else(|failure| Err(Rejected::new(Reason::Unspecified, failure.message)))
}

fn options(
    changes: bool,
    write: Option<v1::WriteOptions>,
    level: i32,
    freshness: Option<v1::Freshness>,
) -> Result<Options, Rejected> {
    match changes {
        true if level != 0 || freshness.is_some() => {
            Err(Rejected::invalid("it is a write, and says how fresh a read must be"))
        }
        true => call::decode_write(write).map(Options::Write),
        false if write.is_some() => Err(Rejected::invalid("it is a read, and says how to write")),
        false => call::decode_read(level, freshness).map(Options::Read),
    }
}
