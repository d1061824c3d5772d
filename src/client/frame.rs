//! Calls and answers as bytes: what the task of a connection sees of them.
//!
//! All calls to a node go through one task, and so do all answers, so it does as little as can be. A caller writes its call
//! itself, once for each attempt and straight from what is asked for; the task adds the tag and the length. Of an answer the task
//! finds out whose it is, and hands over the bytes that it came in, which its caller reads.
//!
//! ```text
//!  caller                 task                              wire
//!  Frame ───────────────▶ tag + Frame, in one message ────▶ PipelineCalls
//!  Answer ◀── its bytes ─ by tag ◀───────────────────────── PipelineAnswers
//! ```

use bytes::{Buf, BufMut, Bytes};
use prost::Message;
use prost::encoding::{
    self, DecodeContext, WireType, decode_key, decode_varint, encode_key, encode_varint, skip_field,
};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::{Request, Status, Streaming};

use super::token::NodeChannel;
use crate::call;
use crate::proto::v1;
use crate::types::{ReadOptions, WriteOptions};

/// The numbers of the fields in `proto/pipeline.proto` that are written and read here.
mod field {
    pub(super) const CALLS: u32 = 1;
    pub(super) const ANSWERS: u32 = 1;
    /// Of calls and of answers.
    pub(super) const TAG: u32 = 1;
    pub(super) const CALL_PAYLOAD: u32 = 2;
    pub(super) const METHOD: u32 = 5;
    pub(super) const WRITE: u32 = 6;
    pub(super) const LEVEL: u32 = 7;
    pub(super) const FRESHNESS: u32 = 8;
    /// All that an answer may hold; it holds one of them.
    pub(super) const ANSWER_CONTENT: std::ops::RangeInclusive<u32> = 3..=6;
}

/// Largest message accepted from a server.
pub(crate) const MAX_RESPONSE_MESSAGE_BYTES: usize = 64 * 1024 * 1024;

/// Room for how a call is carried out, and what stands between the parts of a call.
const OPTIONS_BYTES: usize = 96;

/// A request that can be written.
pub(crate) trait Payload: Send + Sync {
    /// How many bytes it takes.
    fn size_bytes(&self) -> usize;

    /// Writes so many bytes.
    fn write(&self, to: &mut Vec<u8>);
}

impl Payload for Bytes {
    fn size_bytes(&self) -> usize {
        self.len()
    }

    fn write(&self, to: &mut Vec<u8>) {
        to.extend_from_slice(self);
    }
}

/// A call, all but its tag.
#[derive(Debug)]
pub(crate) struct Frame(Vec<u8>);

impl Frame {
    /// Of a call that is not made often.
    pub(crate) fn of(call: &v1::Call) -> Self {
        debug_assert_eq!(call.tag, 0, "a tag is given to it later");
        Self(call.encode_to_vec())
    }

    /// A write.
    pub(crate) fn write(method: &str, payload: &impl Payload, options: &WriteOptions) -> Self {
        let mut frame = Self::to(method, payload);
        if let Some(options) = call::encode_write(options) {
            encoding::message::encode(field::WRITE, &options, &mut frame.0);
        }
        frame
    }

    /// A read.
    pub(crate) fn read(method: &str, payload: &impl Payload, options: ReadOptions) -> Self {
        let mut frame = Self::to(method, payload);
        let (level, freshness) = call::encode_read(options);
        if level != 0 {
            encoding::int32::encode(field::LEVEL, &level, &mut frame.0);
        }
        if let Some(freshness) = freshness {
            encoding::message::encode(field::FRESHNESS, &freshness, &mut frame.0);
        }
        frame
    }

    fn to(method: &str, payload: &impl Payload) -> Self {
        let size_bytes = payload.size_bytes();
        let mut frame = Vec::with_capacity(OPTIONS_BYTES + method.len() + size_bytes);
        encode_key(field::METHOD, WireType::LengthDelimited, &mut frame);
        encode_varint(method.len() as u64, &mut frame);
        frame.extend_from_slice(method.as_bytes());
        encode_key(field::CALL_PAYLOAD, WireType::LengthDelimited, &mut frame);
        encode_varint(size_bytes as u64, &mut frame);
        let begin = frame.len();
        payload.write(&mut frame);
        assert_eq!(frame.len() - begin, size_bytes, "invariant: a payload is as long as it says");
        Self(frame)
    }

    pub(super) fn size_bytes(&self) -> usize {
        self.0.len()
    }
}

/// What is answered to a call; nothing where the bytes are no answer.
pub(crate) fn read(answer: Bytes) -> Option<v1::Answer> {
    v1::Answer::decode(answer).ok()
}

/// Calls with their tags: one message.
pub(super) type Calls = Vec<(u64, Frame)>;
/// Answers by their tags, those without content left out: one message.
pub(super) type Answers = Vec<(u64, Bytes)>;

/// Opens a pipeline on which `calls` are sent; of others, if it `relays` them.
pub(super) async fn open(
    channel: NodeChannel,
    calls: impl futures::Stream<Item = Calls> + Send + 'static,
    relays: bool,
) -> Result<Streaming<Answers>, Status> {
    let mut grpc = tonic::client::Grpc::new(channel).max_decoding_message_size(MAX_RESPONSE_MESSAGE_BYTES);
    grpc.ready().await.map_err(|error| Status::from_error(error.into()))?;
    let path = PathAndQuery::from_static("/quorate.v1.Pipeline/Run");
    let mut request = Request::new(calls);
    if relays {
        request.metadata_mut().insert(call::RELAYED, MetadataValue::from_static("1"));
    }
    Ok(grpc.streaming(request, path, Frames).await?.into_inner())
}

/// See the module's documentation.
struct Frames;

impl Codec for Frames {
    type Encode = Calls;
    type Decode = Answers;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Frames {
    type Item = Calls;
    type Error = Status;

    fn encode(&mut self, calls: Calls, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        // Key and length of a call, key and tag: more than they take, so that there is one allocation.
        const BESIDE_BYTES: usize = 1 + 5 + 1 + 10;
        buf.reserve(calls.iter().map(|(_, frame)| frame.size_bytes() + BESIDE_BYTES).sum());
        write_calls(&calls, buf);
        Ok(())
    }
}

fn write_calls(calls: &Calls, buf: &mut impl BufMut) {
    for (tag, Frame(frame)) in calls {
        let tag_bytes = encoding::uint64::encoded_len(field::TAG, tag);
        encode_key(field::CALLS, WireType::LengthDelimited, buf);
        encode_varint((tag_bytes + frame.len()) as u64, buf);
        encoding::uint64::encode(field::TAG, tag, buf);
        buf.put_slice(frame);
    }
}

impl Decoder for Frames {
    type Item = Answers;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<Answers>, Status> {
        let message = buf.copy_to_bytes(buf.remaining());
        split(message)
            .map(Some)
            .ok_or_else(|| Status::internal("what the server sent is no message of answers"))
    }
}

/// The answers in `message`; nothing when it is none.
fn split(mut message: Bytes) -> Option<Answers> {
    let mut answers = Vec::new();
    while message.has_remaining() {
        match decode_key(&mut message).ok()? {
            (field::ANSWERS, WireType::LengthDelimited) => {
                let length = length(&mut message)?;
                let answer = message.split_to(length);
                answers.extend(tag_of(&answer)?.map(|tag| (tag, answer)));
            }
            (number, wire_type) => {
                skip_field(wire_type, number, &mut message, DecodeContext::default()).ok()?
            }
        }
    }
    Some(answers)
}

/// Whose answer this is, and nobody's if there is nothing in it; nothing at all when it is no answer.
fn tag_of(mut answer: &[u8]) -> Option<Option<u64>> {
    let (mut tag, mut has_content) = (0, false);
    while answer.has_remaining() {
        match decode_key(&mut answer).ok()? {
            (field::TAG, WireType::Varint) => tag = decode_varint(&mut answer).ok()?,
            (number, WireType::LengthDelimited) => {
                has_content |= field::ANSWER_CONTENT.contains(&number);
                let length = length(&mut answer)?;
                answer.advance(length);
            }
            (number, wire_type) => {
                skip_field(wire_type, number, &mut answer, DecodeContext::default()).ok()?
            }
        }
    }
    Some(has_content.then_some(tag))
}

/// The length of what follows in `buf`, if it is there.
fn length(buf: &mut impl Buf) -> Option<usize> {
    let length = usize::try_from(decode_varint(buf).ok()?).ok()?;
    (length <= buf.remaining()).then_some(length)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::proto::v1::answer::Content as Answered;
    use crate::proto::v1::call::Content;
    use crate::types::{AckLevel, HistoryEpoch, ReadLevel, SessionSlot};

    /// What `frame` is as a message.
    fn call(frame: &Frame) -> v1::Call {
        v1::Call::decode(&*frame.0).unwrap()
    }

    #[test]
    fn a_frame_is_the_call_that_prost_would_write() {
        let payload = Bytes::from(vec![7; 300]);
        let slot = Some(SessionSlot { session: 5, sequence: 7, first_unanswered: 6 });
        let all = WriteOptions {
            slot,
            ack: AckLevel::All,
            ack_timeout: Duration::from_secs(3),
            history: HistoryEpoch(u64::MAX),
        };
        for options in [WriteOptions::default(), WriteOptions { slot, ..WriteOptions::default() }, all] {
            let expected = v1::Call {
                content: Some(Content::Payload(payload.clone())),
                method: "put".to_owned(),
                write: call::encode_write(&options),
                ..Default::default()
            };
            let frame = Frame::write("put", &payload, &options);
            assert_eq!(call(&frame), expected);
            assert!(frame.size_bytes() <= OPTIONS_BYTES + "put".len() + payload.len(), "one allocation");
        }
        let read = ReadOptions::from(ReadLevel::Bounded { max_lag_ms: 7 }).after("9@b".parse().unwrap());
        for options in [ReadOptions::from(ReadLevel::Linearizable), ReadLevel::Local.into(), read] {
            let (level, freshness) = call::encode_read(options);
            let content = Some(Content::Payload(Bytes::new()));
            let method = "get".to_owned();
            let expected = v1::Call { content, method, level, freshness, ..Default::default() };
            assert_eq!(call(&Frame::read("get", &Bytes::new(), options)), expected);
        }
    }

    #[test]
    fn a_message_holds_the_calls_with_their_tags() {
        let open = v1::Call {
            content: Some(Content::OpenSession(v1::OpenSessionRequest { ttl_ms: 9 })),
            ..Default::default()
        };
        let write = || Frame::write("put", &Bytes::from("payload"), &WriteOptions::default());
        let mut written = Vec::new();
        write_calls(&vec![(u64::MAX, write()), (1, Frame::of(&open))], &mut written);
        let calls = vec![v1::Call { tag: u64::MAX, ..call(&write()) }, v1::Call { tag: 1, ..open }];
        assert_eq!(v1::PipelineCalls::decode(&*written).unwrap(), v1::PipelineCalls { calls });
    }

    #[test]
    fn answers_are_told_apart_by_their_tags_and_empty_ones_left_out() {
        let header = Some(v1::Header { node_id: 3, held_by: vec![1, 2], ..Default::default() });
        let answer = |tag, content| v1::Answer { tag, header: header.clone(), content };
        let failure = v1::Failure { message: "x".to_owned(), ..Default::default() };
        let sent = vec![
            answer(1 << 20, Some(Answered::Payload(Bytes::new()))),
            answer(7, None),
            answer(0, Some(Answered::Failure(failure))),
            answer(u64::MAX, Some(Answered::CloseSession(v1::CloseSessionResponse::default()))),
        ];
        let mut message = v1::PipelineAnswers { answers: sent.clone() }.encode_to_vec();
        // A field that a later version may add.
        encoding::string::encode(99, &"later".to_owned(), &mut message);
        let received = split(message.into()).unwrap();
        let expected = [&sent[0], &sent[2], &sent[3]];
        assert_eq!(received.len(), expected.len());
        for ((tag, bytes), expected) in received.into_iter().zip(expected) {
            assert_eq!((tag, read(bytes).as_ref()), (expected.tag, Some(expected)));
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let whole = v1::PipelineAnswers {
            answers: vec![v1::Answer {
                tag: 1 << 20,
                header: None,
                content: Some(Answered::Payload("payload".into())),
            }],
        };
        let whole = whole.encode_to_vec();
        for cut in 1..whole.len() {
            assert!(split(Bytes::copy_from_slice(&whole[..cut])).is_none(), "{cut}");
        }
        for garbage in [&[255u8; 20][..], &[10, 200, 1, 1], &[8], &[10, 2, 8], &[10, 3, 26, 9, 0]] {
            assert!(split(Bytes::copy_from_slice(garbage)).is_none(), "{garbage:?}");
        }
    }
}
