//! The vocabulary of the key-value guest: what is asked, and what is answered, in the words of those who ask.
//!
//! Clients make [requests](Request) and get [responses](Response); the service takes the same requests and makes the same
//! responses. What the log stores is [another matter](super::machine::KvCommand): it never changes, this may.

mod event;
mod reply;
mod request;
mod txn;

pub use event::{EventKind, PreviousItem, WatchEvent, WatchOptions};
pub use reply::{
    ConditionalPut, DeleteRangeReply, DeleteReply, GetReply, Item, PutReply, RangeReply, Response,
};
pub use request::{Method, Range, Request, Scope, WriteOptions, end_of_prefix};
pub use txn::{Compare, Comparison, NumberOf, Txn, TxnOp, TxnReply, TxnResult, ValueOf};

pub(super) use txn::{Act, CompareTarget};
