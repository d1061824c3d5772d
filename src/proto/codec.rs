//! Messages on the wire, in no more memory than they deserve.
//!
//! A message is limited in bytes, but an empty request takes two of them there and two hundred once it is decoded: eight
//! megabytes become most of a gigabyte. So before a message with a list is decoded its fields are counted.

use std::any::TypeId;
use std::marker::PhantomData;

use bytes::{Buf as _, Bytes};
use prost::Message;
use prost::encoding::{WireType, decode_key, decode_varint};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Code, Status};
use tonic_prost::ProstDecoder;

use super::v1::{ConfigureRequest, Failure, PipelineCalls, PipelineRequest, Reason, TxnRequest};

/// Most fields of one message, some fifty megabytes once decoded: sixteen for each request of a full pipeline.
const MAX_FIELDS: usize = 16 * 16_384;

/// protobuf, with a limit on the number of fields of requests.
#[derive(Debug)]
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BoundedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = SizedEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        SizedEncoder(PhantomData)
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(ProstDecoder::default())
    }
}

/// Makes room for a whole message at once. A buffer that grows while it is written to is copied each time.
#[derive(Debug)]
pub struct SizedEncoder<T>(PhantomData<T>);

impl<T: Message> Encoder for SizedEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, message: T, buf: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buf.reserve(message.encoded_len());
        // `encode` would find out the length again, which for nested messages is most of the work.
        message.encode_raw(buf);
        Ok(())
    }
}

/// See [`BoundedCodec`].
#[derive(Debug)]
pub struct BoundedDecoder<U>(ProstDecoder<U>);

impl<U: Message + Default + 'static> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buf: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let depth = depth_of_lists(TypeId::of::<U>());
        if depth > 0 && count_fields(buf.chunk(), depth, MAX_FIELDS) > MAX_FIELDS {
            return Err(too_many_fields());
        }
        self.0.decode(buf)
    }
}

/// The message in `bytes`, with the same limit.
///
/// # Errors
/// What is wrong with it.
pub fn bounded<M: Message + Default + 'static>(bytes: Bytes) -> Result<M, String> {
    let depth = depth_of_lists(TypeId::of::<M>());
    if depth > 0 && count_fields(&bytes, depth, MAX_FIELDS) > MAX_FIELDS {
        return Err(format!("it has more than {MAX_FIELDS} fields"));
    }
    M::decode(bytes).map_err(|error| error.to_string())
}

fn too_many_fields() -> Status {
    let (code, reason) = (Code::InvalidArgument, Reason::TooLarge);
    let message = format!("a message has more than {MAX_FIELDS} fields");
    let failure =
        Failure { code: code.into(), reason: reason.into(), message: message.clone(), ..Default::default() };
    Status::with_details(code, message, super::details::of_failure(&failure))
}

/// How many levels of a message hold lists; 0 for messages without, and for answers.
fn depth_of_lists(message: TypeId) -> u32 {
    match message {
        // Requests, which one it is, and the parts of a transaction.
        id if id == TypeId::of::<PipelineRequest>() => 3,
        // Calls, and what each of them says. Its payload is read by itself.
        id if id == TypeId::of::<PipelineCalls>() => 2,
        id if id == TypeId::of::<TxnRequest>() || id == TypeId::of::<ConfigureRequest>() => 1,
        _ => 0,
    }
}

/// Fields in `message`, those of its parts included, `depth` levels down. Stops soon after `enough`, and at what is no
/// protobuf, which the decoder then finds too.
fn count_fields(mut message: &[u8], depth: u32, enough: usize) -> usize {
    let mut count = 0;
    while count <= enough && message.has_remaining() {
        let Ok((_, wire_type)) = decode_key(&mut message) else { break };
        count += 1;
        let length = match wire_type {
            WireType::Varint => decode_varint(&mut message).map(|_| 0),
            WireType::LengthDelimited => decode_varint(&mut message),
            WireType::SixtyFourBit => Ok(8),
            WireType::ThirtyTwoBit => Ok(4),
            // What is between them counts as if it were here.
            WireType::StartGroup | WireType::EndGroup => Ok(0),
        };
        let Some(part) = length.ok().and_then(|length| message.get(..usize::try_from(length).ok()?)) else {
            break;
        };
        if wire_type == WireType::LengthDelimited && depth > 1 {
            count += count_fields(part, depth - 1, enough - enough.min(count));
        }
        message.advance(part.len());
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::v1::{PutRequest, TaggedRequest, TxnOperation, tagged_request::Request};

    fn count(message: &impl Message, depth: u32) -> usize {
        count_fields(&message.encode_to_vec(), depth, usize::MAX)
    }

    #[test]
    fn every_level_counts() {
        // Bytes that look like a message are not taken for one.
        let put = PutRequest { key: "k".into(), value: vec![10, 0, 10, 0].into(), ..Default::default() };
        let put = TaggedRequest { tag: 7, request: Some(Request::Put(put)) };
        assert_eq!(count(&PipelineRequest { requests: vec![put] }, 3), 1 + 2 + 2);
        let txn = TxnRequest { success: vec![TxnOperation::default(); 100], ..Default::default() };
        assert_eq!(count(&txn, 1), 100);
        let tagged = TaggedRequest { tag: 7, request: Some(Request::Txn(txn)) };
        assert_eq!(count(&PipelineRequest { requests: vec![tagged; 2] }, 3), 2 * (1 + 2 + 100));
    }

    #[test]
    fn four_million_empty_requests_are_found_without_looking_at_all_of_them() {
        let bytes = [10, 0].repeat(4 << 20);
        let found = count_fields(&bytes, 3, MAX_FIELDS);
        assert!(found > MAX_FIELDS && found < MAX_FIELDS + 10, "{found}");
    }

    #[test]
    fn what_is_no_message_is_left_to_the_decoder() {
        for garbage in [&[255u8; 20][..], &[10, 200, 1, 1], &[8], &[11, 12, 13]] {
            assert!(count_fields(garbage, 3, MAX_FIELDS) <= garbage.len());
        }
    }
}
