//! How a follower begins: where it asks to, or with the state as of a newer position.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio::time::timeout;

use super::entry::EntryAt;
use super::failures;
use super::kept_states::{KeptStates, StateParts, UnsentState};
use super::registry::{FollowerCaller, FollowerPlace, Subscribers};
use super::rest::StateItems;
use super::stream::{LookAtNode, NodeClocks, Sending, drained};
use super::transport::{FollowerEncoding, FollowerLine, PartMark, StateMark, SyncKind};
use super::wishes::{StartAt, Wishes};
use crate::address::Address;
use crate::door::failure::invalid;
use crate::door::rights::Principal;
use crate::door::streams::WatchPlace;
use crate::engine::{FollowError, HeldState, NodeState};
use crate::error::ReadError;
use crate::feed::{FeedContent, FeedCursor, FeedRecord};
use crate::machine::{AppliedEvent, StateMachine};
use crate::node::operated::{OperatedNode, ViewOf};
use crate::proto::v1::Failure;
use crate::reason::Reason;
use crate::runtime::offload;
use crate::types::{Bookmark, LogId};

/// A follower says within this time where to begin.
pub(in crate::node) const FIRST_PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of a state that are looked at in one piece.
const STATE_PAGE_BYTES: usize = 192 * 1024;
/// How long a follower that comes back to its state waits for a place to be sent it: that of its stream of before may be given back late.
const PLACE_PATIENCE: Duration = Duration::from_secs(1);
/// Pieces that are a part, which a follower that comes back goes on behind.
const PART_PAGES: usize = 4;

/// Where a follower begins.
enum Begun<N: OperatedNode> {
    At(FeedCursor),
    /// With this state. What follows was found before anything of it is sent.
    With(Box<StateToSend<N>>, FeedCursor, OwnedSemaphorePermit),
}

/// A state that is to be sent, all of it or what is behind a part.
struct StateToSend<N: OperatedNode> {
    state: HeldState<ViewOf<N>>,
    parts: StateParts,
    /// The part that the follower has, and where the machine goes on behind it.
    behind: Option<(u64, Vec<u8>)>,
}

/// Has clients told of a replica that says it is reached at `client`, if it may say so: clients go there, and show their credentials.
fn tell_of(client: String, principal: &Principal, place: &FollowerPlace) {
    match principal.answers_reads() {
        true => place.serves_at(client),
        false => tracing::info!(
            replica = client,
            "clients are not told of a replica whose credential has not the role replica"
        ),
    }
}

/// Sends to one follower until it has had enough.
///
/// # Errors
/// Why nothing more is sent.
pub(in crate::node) async fn serve<N: OperatedNode, E: FollowerEncoding>(
    node: N,
    subscribers: Subscribers,
    mut line: FollowerLine<E>,
    _place: WatchPlace,
) -> Result<(), Failure> {
    let FollowerLine { requests, outlet, draining, principal, .. } = &mut line;
    let drains = draining.clone();
    let prepare = async {
        let first = timeout(FIRST_PATIENCE, requests.next()).await;
        let first = first.map_err(|_| failures::says_nothing(FIRST_PATIENCE))?;
        let first = first.ok_or_else(|| invalid("the follower did not say where to begin"))??;
        let wishes = Wishes::parse(first, <N::Machine as StateMachine>::TELLS_EVENTS)?;
        wishes.choice.permit(principal)?;
        if let Some(resumed) = resumed::<N>(&node, &subscribers, &wishes, drains).await? {
            return Ok((Arc::new(wishes), resumed));
        }
        let begun = match begin(&node, &wishes).await? {
            Ok(cursor) => Begun::At(cursor),
            Err(first) if wishes.accept_snapshot => with_state::<N>(&node, &subscribers, first).await?,
            Err(error) => return Err(failures::of_follow(error)),
        };
        Ok((Arc::new(wishes), begun))
    };
    let (wishes, begun) = tokio::select! {
        biased;
        () = drained(draining) => return Err(failures::draining()),
        () = outlet.gone() => return Ok(()),
        prepared = prepare => prepared?,
    };
    let from = match (wishes.start, &begun) {
        (StartAt::After(after), _) => after.index,
        (StartAt::Now(_), Begun::At(cursor) | Begun::With(_, cursor, _)) => {
            cursor.next_position().saturating_sub(1)
        }
    };
    let caller = FollowerCaller { transport: E::TRANSPORT, address: line.caller.address() };
    let place = subscribers.enter(wishes.id.clone(), caller, wishes.choice.shown(), from);
    if let Some(client) = wishes.serves.clone().filter(|client| is_told(client, caller.address)) {
        tell_of(client, &line.principal, &place);
    }
    let state = node.watch();
    let look: LookAtNode = Box::new(move || {
        let (applied, clock) = node.applied_clock();
        let applied = applied.map_or(0, |applied| applied.index);
        let committed = node.state().committed.map_or(0, |committed| committed.index);
        NodeClocks { applied, committed: committed.max(applied), clock }
    });
    let kept = subscribers.kept_states().clone();
    let start = |cursor| Sending::new(look, line, wishes.clone(), (place, cursor), from);
    let send = async {
        let begun = match begun {
            Begun::At(cursor) => {
                let mut sending = start(cursor);
                sending.begin(SyncKind::Partial, from).await?.then_some(sending)
            }
            Begun::With(to_send, cursor, _permit) => send_or_keep(start(cursor), *to_send, &kept).await?,
        };
        let Some(mut sending) = begun else { return Ok(()) };
        if matches!(wishes.start, StartAt::Now(_)) && !sending.heartbeat().await? {
            return Ok(());
        }
        sending.tail().await
    };
    tokio::select! {
        biased;
        failure = diverged(state) => Err(failure),
        ended = send => ended,
    }
}

/// Whether clients are told that a follower that comes from `from` answers reads at `client`: what is a loopback address on another
/// host leads clients to themselves.
fn is_told(client: &str, from: Option<SocketAddr>) -> bool {
    let is_loopback = Address::parse(client)
        .is_some_and(|address| address.ip.map_or(address.host == "localhost", |ip| ip.is_loopback()));
    !is_loopback || from.is_none_or(|from| from.ip().to_canonical().is_loopback())
}

/// Waits until what this node has applied is known to be wrong.
async fn diverged(mut state: watch::Receiver<NodeState>) -> Failure {
    let found = state.wait_for(|state| state.diverged.is_some()).await;
    match found.ok().and_then(|state| state.diverged.clone()) {
        Some(divergence) => ReadError::Diverged { divergence }.into(),
        // The node is gone, which the feed tells.
        None => std::future::pending().await,
    }
}

/// A cursor where `wishes` begin, or why there is none although the position is one of this cluster.
///
/// # Errors
/// When it is none, or nobody knows.
async fn begin<N: OperatedNode>(
    node: &N,
    wishes: &Wishes,
) -> Result<Result<FeedCursor, FollowError>, Failure> {
    node.may_be_followed()?;
    match wishes.start {
        StartAt::After(after) => match node.follow(after).await {
            Err(FollowError::Position(error)) => Err(error.into()),
            begun => Ok(begun),
        },
        StartAt::Now(given) => {
            let cursor = node.follow_from_now().await.map_err(failures::of_follow)?;
            match given.differs_from(cursor.history()) {
                true => Err(ReadError::OtherHistory { given, known: cursor.history() }.into()),
                false => Ok(Ok(cursor)),
            }
        }
    }
}

/// The present state instead of what is gone, which is `error`.
async fn with_state<N: OperatedNode>(
    node: &N,
    subscribers: &Subscribers,
    error: FollowError,
) -> Result<Begun<N>, Failure> {
    if !<N::Machine as StateMachine>::TELLS_STATE {
        return Err(failures::of_follow(error));
    }
    let permit = subscribers.snapshot_place()?;
    let state = node.held_state().await?;
    let at = Bookmark { index: state.at().index, history: state.history() };
    let cursor = node.follow(at).await.map_err(failures::of_follow)?;
    let to_send = StateToSend { state, parts: StateParts::new(), behind: None };
    Ok(Begun::With(Box::new(to_send), cursor, permit))
}

/// The state of which the follower has a part, if this node still has it.
///
/// # Errors
/// When it may not be followed, or all places are taken.
async fn resumed<N: OperatedNode>(
    node: &N,
    subscribers: &Subscribers,
    wishes: &Wishes,
    draining: watch::Receiver<bool>,
) -> Result<Option<Begun<N>>, Failure> {
    node.may_be_followed()?;
    let Some((id, part)) = wishes.state else { return Ok(None) };
    // Before the place: this ends the stream of before, which may have it.
    let kept = subscribers.kept_states();
    let Some((unsent, after)) = kept.take::<ViewOf<N>>(id, part).await else { return Ok(None) };
    let (of, known) = (unsent.state.history(), node.current_history().epoch());
    if !wishes.goes_on_with_state_of(&unsent.wishes) || !wishes.start.is_in(of) || of.differs_from(known) {
        return Ok(None);
    }
    let permit = match subscribers.snapshot_place_within(PLACE_PATIENCE).await {
        Ok(permit) => permit,
        Err(failure) => {
            kept.keep(unsent, draining);
            return Err(failure);
        }
    };
    let UnsentState { state, cursor, parts, .. } = unsent;
    let behind = Some((part, after));
    Ok(Some(Begun::With(Box::new(StateToSend { state, parts, behind }), cursor, permit)))
}

/// Whether a state was not sent because its follower has gone, and not for what it is.
fn is_broken_off(sent: &Result<bool, Failure>) -> bool {
    match sent {
        Ok(is_there) => !is_there,
        Err(failure) => ![Reason::Stopped, Reason::Lagged, Reason::Invalid].contains(&failure.reason()),
    }
}

/// Sends a state; `None` if the follower has gone. What was not sent then is kept for it, if it may come back.
async fn send_or_keep<N: OperatedNode, E: FollowerEncoding>(
    mut sending: Sending<E>,
    mut to_send: StateToSend<N>,
    kept: &KeptStates,
) -> Result<Option<Sending<E>>, Failure> {
    // Dropped last: by then it is kept, if it is.
    let open = kept.open(to_send.parts.id);
    let sent = tokio::select! {
        biased;
        sent = send_state::<N, E>(&mut sending, &mut to_send) => sent,
        () = open.left() => Ok(false),
    };
    if sending.wishes.resumable && is_broken_off(&sent) {
        let StateToSend { state, parts, .. } = to_send;
        let wishes = sending.wishes.clone();
        let (cursor, draining) = sending.into_rest();
        kept.keep(UnsentState { state, cursor, parts, wishes }, draining);
        return sent.map(|_| None);
    }
    Ok(sent?.then_some(sending))
}

/// Sends `state`, and says where it begins and ends; false if the follower has gone.
async fn send_state<N: OperatedNode, E: FollowerEncoding>(
    sending: &mut Sending<E>,
    to_send: &mut StateToSend<N>,
) -> Result<bool, Failure> {
    if !sending.begin(SyncKind::Full, to_send.state.at().index).await? {
        return Ok(false);
    }
    let mut pinned = to_send.state.pinned.clone();
    tokio::select! {
        // First, or a state whose follower always has room would never be looked at.
        biased;
        () = pinned.too_much() => Err(failures::too_much_replaced(pinned.most_bytes())),
        sent = send_items::<N, E>(sending, to_send) => sent,
    }
}

async fn send_items<N: OperatedNode, E: FollowerEncoding>(
    sending: &mut Sending<E>,
    StateToSend { state, parts, behind }: &mut StateToSend<N>,
) -> Result<bool, Failure> {
    let (at, clock) = (state.at(), state.clock());
    let (time_ms, elapsed_ms) = (clock.log_time_ms(), clock.elapsed_ms);
    let mark = EntryAt { seq: at.index, term: at.term, time_ms, elapsed_ms };
    let id = parts.id;
    let (is_there, from) = match behind.take() {
        Some((part, after)) => (sending.part(mark, PartMark { begins: true, id, part }).await?, after),
        None => (sending.mark(mark, StateMark::Begin).await?, Vec::new()),
    };
    if !is_there {
        return Ok(false);
    }
    let (mut after, mut pages) = (Some(from), 0);
    while let Some(from) = after {
        if !sending.room().await? {
            return Ok(false);
        }
        sending.hear_what_came()?;
        let (view, wishes) = (state.clone(), sending.wishes.clone());
        let (events, next) = offload(move || page::<N>(&view, &wishes, &from)).await;
        after = next;
        if !events.is_empty() {
            let log_id = LogId::new(at.term, at.index);
            let content = FeedContent::Events(events);
            sending.load_state(FeedRecord { log_id, time_ms, elapsed_ms, content });
        }
        if !sending.send_rest().await? || (sending.is_overdue() && !sending.heartbeat().await?) {
            return Ok(false);
        }
        pages += 1;
        if let Some(after) = after.as_ref().filter(|_| sending.wishes.resumable && pages % PART_PAGES == 0) {
            let part = parts.add(after);
            if !sending.part(mark, PartMark { begins: false, id, part }).await? {
                return Ok(false);
            }
        }
    }
    sending.mark(mark, StateMark::End).await
}

/// StateItems of `state` after `from` that are wanted, and what to give as `from` for the rest.
fn page<N: OperatedNode>(
    state: &HeldState<ViewOf<N>>,
    wishes: &Wishes,
    from: &[u8],
) -> (Vec<AppliedEvent>, Option<Vec<u8>>) {
    let mut items = StateItems::new(&wishes.choice, STATE_PAGE_BYTES);
    let next = N::Machine::tell_state(state.view(), from, STATE_PAGE_BYTES, &mut items);
    (items.into_events(), next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loopback_address_of_another_host_is_kept_from_clients() {
        let from = |address: &str| Some(format!("{address}:5").parse().unwrap());
        for (client, address, told) in [
            ("127.0.0.1:7811", from("127.0.0.1"), true),
            ("127.0.0.1:7811", from("[::ffff:127.0.0.1]"), true),
            ("127.0.0.1:7811", from("10.0.0.9"), false),
            ("localhost:7811", from("10.0.0.9"), false),
            ("[::1]:7811", from("[fd00::1]"), false),
            ("10.0.0.9:7811", from("10.0.0.9"), true),
            ("replica-1:7811", from("10.0.0.9"), true),
            ("127.0.0.1:7811", None, true),
        ] {
            assert_eq!(is_told(client, address), told, "{client} from {address:?}");
        }
    }
}
