//! Single answers: how far a node is, and some entries to look at.

use super::entry::SentEntry;
use super::failures;
use super::rest::Rest;
use super::wishes::Choice;
use crate::door::rights::Principal;
use crate::machine::StateMachine;
use crate::node::operated::OperatedNode;
use crate::proto::replication::{EntriesRequest, EntriesResponse, StatusResponse, WalEntryProto};
use crate::proto::v1::Failure;
use crate::types::{Bookmark, HistoryEpoch};

/// Most positions in an answer, where nothing is said and at all.
const DEFAULT_POSITIONS: u32 = 1_000;
const MAX_POSITIONS: u32 = 10_000;
/// Most bytes of entries in one; one entry may exceed it.
const ANSWER_BYTES: usize = 3 * 1024 * 1024;
/// Bytes that are looked at in one piece, and for one answer.
const PAGE_BYTES: usize = 512 * 1024;
const SCANNED_BYTES: usize = 64 * 1024 * 1024;
const MAX_PAGES: usize = SCANNED_BYTES / PAGE_BYTES;

/// How far `node` is, which has so many followers.
pub(super) fn status<N: OperatedNode>(node: &N, subscribers: usize) -> StatusResponse {
    let (state, reach, (applied, clock)) = (node.state(), node.feed_reach(), node.applied_clock());
    let index = applied.map_or(0, |applied| applied.index);
    StatusResponse {
        current_seq: index,
        healthy: state.is_ready(),
        first_seq: reach.first,
        history: node.current_history().epoch().0,
        committed_seq: state.committed.map_or(0, |committed| committed.index).max(index),
        node_id: state.node_id,
        // What a replica is among members counts for reads.
        role: if node.following().is_some() { "replica" } else { state.role.name() }.to_owned(),
        time_ms: if applied.is_some() { clock.log_time_ms() } else { 0 },
        leader: state.leader.map(|leader| leader.client).unwrap_or_default(),
        subscribers: u32::try_from(subscribers).unwrap_or(u32::MAX),
        present_seq: 0,
    }
}

/// The entries that `request` of `principal` asks for.
///
/// # Errors
/// The failure to answer instead.
pub(super) async fn entries_after<N: OperatedNode>(
    node: &N,
    principal: &Principal,
    request: EntriesRequest,
) -> Result<EntriesResponse, Failure> {
    let EntriesRequest { after_seq, limit, history, filters } = request;
    let choice = Choice::parse(filters, <N::Machine as StateMachine>::TELLS_EVENTS)?;
    choice.permit(principal)?;
    node.may_be_followed()?;
    let limit = if limit == 0 { DEFAULT_POSITIONS } else { limit.min(MAX_POSITIONS) };
    let after = Bookmark { index: after_seq, history: HistoryEpoch(history) };
    let mut cursor = node.follow(after).await.map_err(failures::of_follow)?;
    let history = cursor.history();
    let mut answer = EntriesAnswer { left: limit, ..EntriesAnswer::default() };
    let (mut upto, mut more) = (after_seq, true);
    for _ in 0..MAX_PAGES {
        let page = cursor.page(PAGE_BYTES).await.map_err(|error| failures::of_feed(error, history))?;
        let (next, is_last) = (page.next, page.is_last());
        let mut rest = Rest::default();
        rest.load(page.records, 0);
        let is_full = answer.take(&mut rest, &choice);
        if is_full {
            upto = rest.passed().map_or(upto, |(passed, _)| passed);
            break;
        }
        upto = upto.max(next.saturating_sub(1));
        if is_last {
            more = false;
            break;
        }
        tokio::task::yield_now().await;
    }
    let entries = answer.entries;
    Ok(EntriesResponse { entries, upto_seq: upto, more, history: history.0 })
}

/// An answer that is being made.
#[derive(Default)]
struct EntriesAnswer {
    entries: Vec<WalEntryProto>,
    bytes: usize,
    /// Where the entries of the position at hand begin: how many entries there are before, and bytes.
    begin: (usize, usize),
    /// Positions that it has room for.
    left: u32,
}

impl EntriesAnswer {
    /// Takes in what is wanted of `rest`. Whether it is full before there was nothing left; then `rest` has passed what is in it.
    fn take(&mut self, rest: &mut Rest, choice: &Choice) -> bool {
        let mut passed = rest.passed();
        let mut is_new = true;
        while rest.seek(choice) {
            if is_new {
                passed = rest.passed().or(passed);
                if self.left == 0 {
                    return true;
                }
                self.begin = (self.entries.len(), self.bytes);
                self.left -= 1;
            }
            let (at, content, more) = rest.found();
            let entry = SentEntry { at, content, more, history: None, is_item: false, before: None };
            let length = entry.batched_len();
            if self.bytes + length > ANSWER_BYTES && !self.entries.is_empty() {
                return self.cut(rest, passed);
            }
            self.entries.push(entry.message());
            self.bytes += length;
            is_new = !more;
            rest.take();
        }
        false
    }

    /// There is no room for the rest of a position. It waits for the next answer as a whole, unless it is alone.
    fn cut(&mut self, rest: &mut Rest, passed: Option<(u64, u64)>) -> bool {
        let (entries, bytes) = self.begin;
        if entries == 0 {
            // Its last entry says that there is more of it: whoever wants that subscribes.
            rest.skip();
        } else {
            self.entries.truncate(entries);
            self.bytes = bytes;
            rest.passed_only(passed);
        }
        true
    }
}
