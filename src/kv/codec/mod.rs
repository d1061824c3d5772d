//! The vocabulary on the wire: the one place that knows both [`api`](super::api) and the messages of `proto/kv.proto`.
//!
//! The client encodes requests and decodes responses, the service does the opposite, and all four are here, side by side:
//! what one side can say the other understands. Nothing is judged here; what a message cannot mean at all is
//! [rejected](Rejected). How a call is made, and what its answer is headed by, is not the guest's: see [`call`](crate::call).

mod request;
mod response;
#[cfg(test)]
mod tests;
mod txn;

#[cfg(test)]
pub(crate) use request::set_options;
pub(crate) use request::{decode, decode_range, encode, encode_range, take_options};
#[cfg(test)]
pub(crate) use response::take_header;
pub(crate) use response::{
    decode_event, decode_range_reply, decode_response, encode_event, encode_range_reply, encode_response,
    set_header,
};

use bytes::Bytes;
use prost::Message;

use super::api::Method;
use super::machine::KvRejection;
use crate::call::Rejected;
use crate::proto::codec::bounded;
use crate::proto::v1;
use crate::reason::Reason;

impl From<KvRejection> for Rejected {
    fn from(rejection: KvRejection) -> Self {
        let reason = match rejection {
            KvRejection::ValueTooLong { .. }
            | KvRejection::TooManyCompares { .. }
            | KvRejection::TooManyOperations { .. }
            | KvRejection::TxnTooLong { .. }
            | KvRejection::ResultsTooLong
            | KvRejection::TooManyDeleted => Reason::TooLarge,
            KvRejection::EmptyName
            | KvRejection::NameTooLong { .. }
            | KvRejection::NameContainsNul
            | KvRejection::EmptyKey
            | KvRejection::KeyTooLong { .. }
            | KvRejection::NoTimeToLive => Reason::Invalid,
        };
        Self::new(reason, rejection.to_string())
    }
}

/// A request as a message of its kind.
pub(crate) type RequestMessage = v1::tagged_request::Request;
/// A response as a message of its kind.
pub(crate) type ResponseMessage = v1::tagged_response::Response;

/// How long `message` is as the payload of a call, without how it is to be carried out.
pub(crate) fn request_bytes(message: &RequestMessage) -> usize {
    match message {
        RequestMessage::Put(put) => put.encoded_len(),
        RequestMessage::Get(get) => get.encoded_len(),
        RequestMessage::Delete(delete) => delete.encoded_len(),
        RequestMessage::DeleteRange(delete) => delete.encoded_len(),
        RequestMessage::Range(range) => range.encoded_len(),
        RequestMessage::Txn(txn) => txn.encoded_len(),
        RequestMessage::OpenSession(open) => open.encoded_len(),
        RequestMessage::CloseSession(close) => close.encoded_len(),
    }
}

/// Writes `message` as that payload.
pub(crate) fn write_request(message: &RequestMessage, to: &mut Vec<u8>) {
    let written = match message {
        RequestMessage::Put(put) => put.encode(to),
        RequestMessage::Get(get) => get.encode(to),
        RequestMessage::Delete(delete) => delete.encode(to),
        RequestMessage::DeleteRange(delete) => delete.encode(to),
        RequestMessage::Range(range) => range.encode(to),
        RequestMessage::Txn(txn) => txn.encode(to),
        RequestMessage::OpenSession(open) => open.encode(to),
        RequestMessage::CloseSession(close) => close.encode(to),
    };
    written.expect("invariant: a vector has room for everything");
}

/// `message` as that payload.
pub(crate) fn request_payload(message: &RequestMessage) -> Bytes {
    let mut payload = Vec::with_capacity(request_bytes(message));
    write_request(message, &mut payload);
    payload.into()
}

/// The request of `method` in the payload of a call.
///
/// # Errors
/// When it is none.
pub(crate) fn parse(method: Method, payload: Bytes) -> Result<RequestMessage, Rejected> {
    let parsed = match method {
        Method::Put => bounded(payload).map(RequestMessage::Put),
        Method::Get => bounded(payload).map(RequestMessage::Get),
        Method::Delete => bounded(payload).map(RequestMessage::Delete),
        Method::DeleteRange => bounded(payload).map(RequestMessage::DeleteRange),
        Method::Range => bounded(payload).map(RequestMessage::Range),
        Method::Txn => bounded(payload).map(RequestMessage::Txn),
    };
    parsed.map_err(|error| Rejected::invalid(format!("the request cannot be read: {error}")))
}

/// `message` as the payload of an answer.
pub(crate) fn payload(message: ResponseMessage) -> Bytes {
    let payload = match message {
        ResponseMessage::Put(put) => put.encode_to_vec(),
        ResponseMessage::Get(get) => get.encode_to_vec(),
        ResponseMessage::Delete(delete) => delete.encode_to_vec(),
        ResponseMessage::DeleteRange(delete) => delete.encode_to_vec(),
        ResponseMessage::Range(range) => range.encode_to_vec(),
        ResponseMessage::Txn(txn) => txn.encode_to_vec(),
        ResponseMessage::OpenSession(opened) => opened.encode_to_vec(),
        ResponseMessage::CloseSession(closed) => closed.encode_to_vec(),
        ResponseMessage::Failure(failure) => failure.encode_to_vec(),
    };
    payload.into()
}

/// The response of `method` in the payload of an answer; `None` when it is none.
pub(crate) fn parse_response(method: Method, payload: Bytes) -> Option<ResponseMessage> {
    let parsed = match method {
        Method::Put => Message::decode(payload).map(ResponseMessage::Put),
        Method::Get => Message::decode(payload).map(ResponseMessage::Get),
        Method::Delete => Message::decode(payload).map(ResponseMessage::Delete),
        Method::DeleteRange => Message::decode(payload).map(ResponseMessage::DeleteRange),
        Method::Range => Message::decode(payload).map(ResponseMessage::Range),
        Method::Txn => Message::decode(payload).map(ResponseMessage::Txn),
    };
    parsed.ok()
}
