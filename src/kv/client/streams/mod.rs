//! Answers that come in pieces: [ranges](range()) of any size, and [watches](watch()).
//!
//! Both are calls of their own beside the pipeline, over a second connection to the node: a reader that is slow
//! stops its own stream and nothing else. What waits for such a reader is one message and one HTTP/2 window.

use crate::client::frame::MAX_RESPONSE_MESSAGE_BYTES;
use crate::client::link::Link;
use crate::client::token::NodeChannel;
use crate::proto::v1::kv_client::KvClient;

pub use range::RangeStream;
pub(super) use range::range;
pub use watch::Watch;
pub(super) use watch::{present, watch};

mod range;
mod watch;

fn kv(link: &Link) -> KvClient<NodeChannel> {
    KvClient::new(link.node.side_channel()).max_decoding_message_size(MAX_RESPONSE_MESSAGE_BYTES)
}
