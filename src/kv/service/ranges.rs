//! `Kv.RangeStream`: ranges of any size, from one point in time.
//!
//! A range is read from one view, which stays what it was, by a task that hands over one page after the other. However
//! long that takes, it goes on while its client reads. One that takes nothing for a while loses its stream, because a
//! view keeps alive what has been overwritten since. So does one, however fast, whose view keeps alive more than the node has
//! memory for ([`Pinned`]). Whoever comes back soon goes on with the same view ([`Moments`]).

use std::sync::Arc;

use tokio::sync::OwnedSemaphorePermit;

use super::moments::{MAX_LONG_RANGES, Moments};
use super::{KvNode, failure};
use crate::call::{self, Rejected, decode_position};
use crate::door::Answerer;
use crate::door::metrics::StreamCall;
use crate::door::streams::{Outlet, Responses, stream};
use crate::engine::Pinned;
use crate::incoming::{Caller, Held};
use crate::kv::machine::{KvAnswer, KvMachine, KvQuery, KvView, RangeQuery};
use crate::kv::{calls, codec};
use crate::machine::StateMachine as _;
use crate::proto::v1::{self, Failure};
use crate::runtime;
use crate::types::{HistoryEpoch, LogId, ReadLevel, ReadOptions};

/// Most items in one page.
const PAGE_ITEMS: usize = 1_000;
/// Most bytes of keys and values in one page; one item may exceed it. Small, so that a slow link has one soon.
const PAGE_BYTES: usize = 256 * 1024;
/// Long ranges that are served on one connection at a time: nobody takes all of them.
pub(super) const MAX_CONNECTION_LONG_RANGES: usize = MAX_LONG_RANGES / 2;

/// A long range's place among those of its connection.
pub(super) struct RangePlace(Arc<Caller>);

impl RangePlace {
    /// One more on the connection of `caller`.
    ///
    /// # Errors
    /// The failure to answer instead, when there are as many as there may be.
    pub(super) fn take(caller: &Arc<Caller>) -> Result<Self, Failure> {
        match caller.try_take(Held::LongRanges, 1, MAX_CONNECTION_LONG_RANGES) {
            true => Ok(Self(caller.clone())),
            false => Err(failure::too_many_ranges()),
        }
    }
}

impl Drop for RangePlace {
    fn drop(&mut self) {
        self.0.give_back(Held::LongRanges, 1);
    }
}

/// Starts to send the range that `request` asks for, from one point in time.
///
/// # Errors
/// The failure to answer instead.
pub(super) async fn range<N: KvNode>(
    node: N,
    by: Answerer,
    moments: Arc<Moments>,
    own: Result<RangePlace, Failure>,
    request: v1::RangeRequest,
    call: StreamCall,
) -> Result<Responses<v1::RangeResponse>, Failure> {
    let (range, open) = call.open(LongRange::prepare(&node, &moments, own, request).await)?;
    let (outlet, responses) = stream();
    runtime::spawn(async move {
        let (at, mut pinned) = (range.applied, range.pinned.clone());
        let sent = tokio::select! {
            // First, or a range whose reader always has room would never be looked at.
            biased;
            () = pinned.too_much() => None,
            sent = range.send(&node, &by, &outlet) => Some(sent),
        };
        if let (None, Some(at)) = (&sent, at) {
            moments.forget(at);
        }
        let was_let_go = sent.is_none();
        let ended = sent.unwrap_or_else(|| Err(failure::too_much_pinned(pinned.most_bytes())));
        let was_one_page = matches!(ended, Ok(true));
        open.ended(&ended.as_ref().map(|_| ()).map_err(Clone::clone));
        match ended {
            Ok(_) => outlet.complete(),
            Err(failure) => outlet.fail(failure),
        }
        // Whoever may come back needs the state, and neither the stream nor the node.
        drop((outlet, node, by));
        match at.filter(|_| !was_let_go) {
            Some(at) if was_one_page => moments.end(at),
            Some(at) => moments.leave(at, pinned).await,
            None => {}
        }
    });
    Ok(responses)
}

/// A range that is read from one state.
struct LongRange {
    applied: Option<LogId>,
    view: KvView,
    pinned: Pinned,
    query: RangeQuery,
    /// Items to be sent.
    left: usize,
    _places: (OwnedSemaphorePermit, RangePlace),
}

impl LongRange {
    async fn prepare<N: KvNode>(
        node: &N,
        moments: &Moments,
        own: Result<RangePlace, Failure>,
        request: v1::RangeRequest,
    ) -> Result<Self, Failure> {
        let places = (moments.place()?, own?);
        let again = request.at;
        let options = call::decode_read(request.level, request.freshness).map_err(Failure::from)?;
        let left = match request.limit {
            0 => usize::MAX,
            limit => limit as usize,
        };
        let (scope, range) = codec::decode_range(request);
        let query = RangeQuery { max_bytes: PAGE_BYTES, ..calls::range_query(scope, range) };
        KvQuery::Range(query.clone()).check().map_err(Rejected::from)?;
        let (applied, view, pinned) = match again {
            None => {
                let (applied, view, pinned) = node.pinned_view(options).await?;
                if let Some(at) = applied {
                    moments.begin(at, &view, &pinned);
                }
                (applied, view, pinned)
            }
            Some(position) => {
                let at = decode_position(position);
                // Whether this node may answer at all, and of this history.
                let history = HistoryEpoch(position.history);
                node.view(ReadOptions { level: ReadLevel::Local, after_index: at.index, history }).await?;
                let (view, pinned) = moments.again(at)?;
                (Some(at), view, pinned)
            }
        };
        Ok(Self { applied, view, pinned, query, left, _places: places })
    }

    /// Sends it all, unless the client goes. Whether that was one page, of which a reader has all or nothing: what was sent of
    /// others may be lost on the way.
    async fn send<N: KvNode>(
        self,
        node: &N,
        by: &Answerer,
        outlet: &Outlet<v1::RangeResponse>,
    ) -> Result<bool, Failure> {
        let Self { applied, view, mut query, mut left, _places, .. } = self;
        let mut pages = 0;
        loop {
            query.limit = left.min(PAGE_ITEMS);
            let mut answer = match KvMachine::query(&view, KvQuery::Range(query.clone())) {
                KvAnswer::Range(answer) => answer,
                other => {
                    unreachable!("invariant: a range that was checked is answered with items, not {other:?}")
                }
            };
            answer.map_expiry(|expires_ms| node.log_time_at(expires_ms));
            left -= answer.items.len();
            pages += 1;
            let next = answer.next.clone();
            let header = Some(by.header(applied));
            let page = codec::encode_range_reply(calls::range(answer));
            if !outlet.send(v1::RangeResponse { header, ..page }).await? {
                return Ok(false);
            }
            match next {
                Some(next) if left > 0 => query.start = next,
                _ => return Ok(pages == 1),
            }
        }
    }
}
