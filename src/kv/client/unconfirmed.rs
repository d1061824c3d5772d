//! What came of writes that not every voter has confirmed: [`ClientError::AckTimeout`] holds it, and this makes the reply of it that
//! the call would have returned. There is none for any other error, nor where the error is that of another call.

use super::super::api::{
    ConditionalPut, DeleteRangeReply, DeleteReply, Method, PutReply, Response, TxnReply, TxnResult,
};
use super::{ClientError, codec};

impl Response {
    /// What [`Client::execute`](super::Client::execute) would have returned instead of `error`, if not every voter has confirmed the write.
    pub fn unconfirmed(error: &ClientError) -> Option<Self> {
        let answer = error.unconfirmed()?;
        let method = Method::ALL.into_iter().find(|method| method.name() == answer.method)?;
        codec::decode_response(answer.header.clone(), codec::parse_response(method, answer.payload.clone())?)
    }
}

macro_rules! unconfirmed {
    ($($reply:ident: $kind:ident),*) => {$(
        impl $reply {
            /// What the call would have returned instead of `error`, if not every voter has confirmed the write.
            pub fn unconfirmed(error: &ClientError) -> Option<Self> {
                match Response::unconfirmed(error)? {
                    Response::$kind(reply) => Some(reply),
                    _ => None,
                }
            }
        }
    )*};
}

unconfirmed!(PutReply: Put, DeleteReply: Delete, DeleteRangeReply: DeleteRange, TxnReply: Txn);

impl ConditionalPut {
    /// What the call would have returned instead of `error`, if not every voter has confirmed the write.
    pub fn unconfirmed(error: &ClientError) -> Option<Self> {
        TxnReply::unconfirmed(error).map(Self::of)
    }

    /// Of the transaction that it is.
    pub(super) fn of(reply: TxnReply) -> Self {
        let (mut create_revision, mut version, mut current) = (0, 0, None);
        for result in reply.results {
            match result {
                TxnResult::Get(item) => current = item,
                TxnResult::Put { create_revision: created, version: puts } => {
                    (create_revision, version) = (created, puts);
                }
                _ => {}
            }
        }
        let TxnReply { header, revision, succeeded, .. } = reply;
        Self { header, succeeded, revision, create_revision, version, current }
    }
}
