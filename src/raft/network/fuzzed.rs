//! What a peer may send, from any bytes: see [`crate::fuzzing`].

use prost::Message;

use super::admission::{self, KnownCluster, OwnSide, Wish};
use super::plausible::{self, Bearings};
use super::wire;
use crate::machine::StateMachine;
use crate::proto::peer::{self as proto, append_response, request, response};
use crate::raft::type_config;
use crate::types::{Incarnation, LogId};

/// Whose message it is taken for.
const FROM: u64 = 2;

/// A request, decoded and examined as before the core hears of it.
pub(crate) fn request<M: StateMachine>(bytes: &[u8]) {
    let Ok(proto::Request { body: Some(body), .. }) = proto::Request::decode(bytes) else { return };
    let bearings = bearings();
    match body {
        request::Body::Hello(hello) => handshake(&hello),
        request::Body::Append(append) => self::append::<M>(append, &bearings),
        request::Body::Vote(vote) | request::Body::PreVote(vote) => {
            let Ok(vote) = wire::from_vote_request(FROM, vote) else { return };
            let last = vote.last_log_id.as_ref().map(type_config::from_log_id);
            let _ = bearings.candidate(vote.vote.leader_id.term, last);
        }
        request::Body::TransferLeader(transfer) => {
            let _ = wire::from_transfer(FROM, transfer);
        }
        request::Body::Announce(announce) => {
            let _ = wire::from_announce(announce);
        }
        request::Body::Compare(compare) => {
            let _ = wire::from_compare::<M>(compare);
        }
        request::Body::Snapshot(_) | request::Body::ReadIndex(_) | request::Body::Forward(_) => {}
    }
}

/// An append. What passes says the same after it was sent on.
fn append<M: StateMachine>(append: proto::AppendRequest, bearings: &Bearings) {
    let Ok(append) = wire::from_append(FROM, append) else { return };
    if bearings.append(&append).is_err() {
        return;
    }
    for entry in &append.entries {
        if let openraft::EntryPayload::Normal(command) = &entry.payload {
            let _ = plausible::command::<M>(&command.bytes);
        }
    }
    let sent = wire::append(append.clone());
    let again = wire::from_append(FROM, sent).expect("invariant: what was taken can be sent");
    assert_eq!(again.entries.len(), append.entries.len());
    assert_eq!((again.vote, again.prev_log_id), (append.vote, append.prev_log_id));
}

/// A handshake, with a node that has a cluster and with one that has none.
fn handshake(hello: &proto::Hello) {
    let own = OwnSide { cluster: "c", node_id: 1, incarnation: Incarnation(10) };
    let members = [(1, Incarnation(10)), (FROM, Incarnation(20))].into();
    let known = KnownCluster { members, at: Some(LogId::new(1, 1)), ..KnownCluster::default() };
    for wish in [Wish::Exchange, Wish::Identity, Wish::Founding] {
        let _ = admission::check(own, &KnownCluster::default(), hello, wish);
        if admission::check(own, &known, hello, wish).is_ok() {
            assert_eq!(hello.cluster, "c", "only a caller that knows the cluster's name is admitted");
        }
    }
}

/// An answer.
pub(crate) fn response(bytes: &[u8]) {
    let Ok(proto::Response { body: Some(body), .. }) = proto::Response::decode(bytes) else { return };
    match body {
        response::Body::Append(append) => {
            let terms = match &append.outcome {
                Some(append_response::Outcome::HigherVote(vote)) => Some(vote.term),
                _ => None,
            };
            let _ = wire::from_append_response(append);
            let _ = terms.map(|term| bearings().term(term));
        }
        response::Body::Vote(vote) => {
            let _ = wire::from_vote_response(vote);
        }
        response::Body::Compare(compare) => {
            let _ = wire::from_compare_response(compare);
        }
        _ => {}
    }
}

fn bearings() -> Bearings {
    let committed = Some(LogId::new(3, 100));
    Bearings { term: 3, is_empty: false, committed, memberships: Vec::new() }
}
