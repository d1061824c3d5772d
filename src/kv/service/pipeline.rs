//! `Kv.Pipeline`: requests and responses of this guest alone, each as a message of its kind.

use super::{Kv, KvMethod};
use crate::call::{Options, encode_write};
use crate::door::Guest as _;
use crate::door::failure;
use crate::door::pipeline::{Done, PipelineFraming, PipelineRequestKind, RequestOutcome, Weight};
use crate::door::relay::{self, RelayedCall};
use crate::kv::codec::{self, RequestMessage, ResponseMessage};
use crate::proto::v1::answer::Content as Answered;
use crate::proto::v1::call::Content;
use crate::proto::v1::{
    Answer, Call, Failure, PipelineRequest, PipelineResponse, TaggedRequest, TaggedResponse,
};

/// See the module's documentation.
pub(super) enum KvFraming {}

/// Which of the guest's methods `message` is for; none for one about sessions.
pub(super) fn method(message: &RequestMessage) -> Option<usize> {
    let method = match message {
        RequestMessage::Put(_) => KvMethod::Put,
        RequestMessage::Get(_) => KvMethod::Get,
        RequestMessage::Delete(_) => KvMethod::Delete,
        RequestMessage::DeleteRange(_) => KvMethod::DeleteRange,
        RequestMessage::Range(_) => KvMethod::Range,
        RequestMessage::Txn(_) => KvMethod::Txn,
        RequestMessage::OpenSession(_) | RequestMessage::CloseSession(_) => return None,
    };
    Some(method as usize)
}

impl PipelineFraming for KvFraming {
    type Guest = Kv;
    type Requests = PipelineRequest;
    type Request = TaggedRequest;
    type Response = TaggedResponse;
    type Responses = PipelineResponse;
    type Made = ();

    fn requests(message: PipelineRequest) -> Vec<TaggedRequest> {
        message.requests
    }

    fn weigh(request: &TaggedRequest) -> (Weight, ()) {
        let Some(message) = &request.request else { return (Weight { permits: 1, expected: 0 }, ()) };
        let permits = method(message).map_or(1, |method| Kv::METHODS[method].permits);
        (Weight { permits, expected: Kv::expected_bytes(message) }, ())
    }

    fn open(request: TaggedRequest, (): ()) -> (u64, Result<PipelineRequestKind<Kv>, Failure>) {
        let TaggedRequest { tag, request } = request;
        let ask = request.map(|message| match message {
            RequestMessage::OpenSession(open) => PipelineRequestKind::OpenSession(open),
            RequestMessage::CloseSession(close) => PipelineRequestKind::CloseSession(close),
            mut message => {
                let method = method(&message).expect("invariant: it is not about sessions");
                let options = codec::take_options(&mut message);
                PipelineRequestKind::Guest { method, request: Ok(message), options }
            }
        });
        (tag, ask.ok_or_else(failure::unknown_request))
    }

    fn relayed(request: &TaggedRequest) -> Option<RelayedCall> {
        let message = request.request.as_ref()?;
        if method(message).is_some_and(|method| !Kv::METHODS[method].changes) {
            return None;
        }
        let (method, call) = match message.clone() {
            RequestMessage::OpenSession(open) => (None, about_session(Content::OpenSession(open))),
            RequestMessage::CloseSession(close) => (None, about_session(Content::CloseSession(close))),
            mut message => {
                let method = method(&message)?;
                // What makes no sense is refused here.
                let Ok(Options::Write(options)) = codec::take_options(&mut message) else { return None };
                let options = encode_write(&options);
                (
                    Some(method),
                    relay::write(Kv::METHODS[method].name, codec::request_payload(&message), options),
                )
            }
        };
        Some(RelayedCall { tag: request.tag, method, call })
    }

    fn response(tag: u64, outcome: RequestOutcome<Kv>) -> TaggedResponse {
        let response = match outcome {
            Ok(Done::Guest(header, mut message)) => {
                codec::set_header(&mut message, header);
                message
            }
            Ok(Done::Relayed(method, answer)) => relayed_response(method, answer)
                .unwrap_or_else(|| ResponseMessage::Failure(relay::unexpected())),
            Ok(Done::Opened(opened)) => ResponseMessage::OpenSession(opened),
            Ok(Done::Closed(closed)) => ResponseMessage::CloseSession(closed),
            Err(failure) => ResponseMessage::Failure(failure),
        };
        TaggedResponse { tag, response: Some(response) }
    }

    fn encoded_bytes(_: &TaggedResponse) -> usize {
        // This guest says how much it is.
        0
    }

    fn responses(responses: Vec<TaggedResponse>) -> PipelineResponse {
        PipelineResponse { responses }
    }
}

/// What another node has answered to a call of the method with this number, or about a session.
fn relayed_response(method: Option<usize>, answer: Answer) -> Option<ResponseMessage> {
    Some(match (answer.content?, method) {
        (Answered::Payload(payload), Some(method)) => {
            let mut message = codec::parse_response(*KvMethod::ALL.get(method)?, payload)?;
            codec::set_header(&mut message, answer.header.unwrap_or_default());
            message
        }
        (Answered::OpenSession(opened), None) => ResponseMessage::OpenSession(opened),
        (Answered::CloseSession(closed), None) => ResponseMessage::CloseSession(closed),
        _ => return None,
    })
}

fn about_session(content: Content) -> Call {
    Call { content: Some(content), ..Call::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::door::Method;

    #[test]
    fn methods_stand_in_the_order_of_their_numbers() {
        let names = KvMethod::ALL.map(KvMethod::name);
        assert!(Kv::METHODS.iter().map(|method: &Method| method.name).zip(names).all(|(a, b)| a == b));
        let writes = KvMethod::ALL.map(KvMethod::is_write);
        assert!(Kv::METHODS.iter().zip(writes).all(|(method, write)| method.changes == write));
    }
}
