//! How requests and responses are written on a pipeline's stream.

use prost::Message;

use super::answers::RequestOutcome;
use crate::call::{Options, Rejected};
use crate::door::guest::Guest;
use crate::door::relay::RelayedCall;
use crate::proto::v1::{self, Failure};

/// How requests and responses are written on a stream.
pub(crate) trait PipelineFraming: Send + Sync + 'static {
    type Guest: Guest;
    /// A message of requests.
    type Requests: Send + 'static;
    /// One of them. Until its turn comes it stays as it was sent.
    type Request: Message + Default + Clone;
    /// One response.
    type Response: Send + Unpin;
    /// A message of responses.
    type Responses: Send + 'static;
    /// What is made of a request to weigh it. By default nothing.
    type Made: Default + Send;

    fn requests(message: Self::Requests) -> Vec<Self::Request>;

    /// What `request` may take, and what was made of it to know that. Most are weighed without making anything of them.
    fn weigh(request: &Self::Request) -> (Weight, Self::Made);

    /// The tag of `request`, and what it asks for; a refusal of one that is empty or of a kind that is not known. What was
    /// `made` of it before need not be made again.
    fn open(
        request: Self::Request,
        made: Self::Made,
    ) -> (u64, Result<PipelineRequestKind<Self::Guest>, Failure>);

    /// `request` as it is passed on to the node that carries it out; none of a read, which is answered here, and of what makes no sense.
    fn relayed(request: &Self::Request) -> Option<RelayedCall>;

    fn response(tag: u64, outcome: RequestOutcome<Self::Guest>) -> Self::Response;

    /// What a guest has encoded of `response`, which may be more than it said.
    fn encoded_bytes(response: &Self::Response) -> usize;

    fn responses(responses: Vec<Self::Response>) -> Self::Responses;
}

/// What a request may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Weight {
    /// As how many requests in flight it counts.
    pub(crate) permits: u32,
    /// Bytes to be set aside for its answer.
    pub(crate) expected: usize,
}

/// What is asked for on a pipeline.
pub(crate) enum PipelineRequestKind<G: Guest> {
    /// A call of the guest, the method being the number of its place among the guest's.
    Guest {
        method: usize,
        request: Result<G::Request, Rejected>,
        options: Result<Options, Rejected>,
    },
    OpenSession(v1::OpenSessionRequest),
    CloseSession(v1::CloseSessionRequest),
}
