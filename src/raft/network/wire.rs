//! Conversions between openraft's messages and ours.
//!
//! Whatever arrives is untrusted: a missing field is an error, never a default.

use std::collections::BTreeSet;

use openraft::raft::{
    AppendEntriesRequest, StreamAppendError, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};

use super::Refusal;
use super::leader_line::Announcement;
use super::plausible;
use crate::machine::{MOST_MACHINES, StateMachine};
use crate::proto::peer as proto;
use crate::raft::agreement::{Check, HashesTold, MOST_TOLD};
use crate::raft::read_index::NoReadIndex;
use crate::raft::type_config::{self, LogId, TypeConfig, Vote};
use crate::types::{
    self, Founding, Incarnation, InitialState, Intent, MachineVersion, Member, Membership, ReadableVersions,
};

/// A message that is not one of ours, or not complete.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed message: {0}")]
pub struct Malformed(pub &'static str);

/// The wire form of a log id.
pub(crate) fn log_id(log_id: &LogId) -> proto::LogId {
    let log_id = type_config::from_log_id(log_id);
    proto::LogId { term: log_id.term, index: log_id.index }
}

/// The wire form of a log id of ours.
pub(crate) fn plain_log_id(log_id: types::LogId) -> proto::LogId {
    proto::LogId { term: log_id.term, index: log_id.index }
}

fn from_log_id(log_id: proto::LogId) -> LogId {
    type_config::log_id(types::LogId::new(log_id.term, log_id.index))
}

/// The wire form of a vote.
pub(crate) fn vote(vote: &Vote) -> proto::Vote {
    let vote = type_config::from_vote(vote);
    proto::Vote { term: vote.term, node_id: vote.node_id, committed: vote.committed }
}

/// The vote in a message.
///
/// # Errors
/// When it is missing.
pub(crate) fn from_vote(vote: Option<proto::Vote>) -> Result<Vote, Malformed> {
    let vote = vote.ok_or(Malformed("vote is missing"))?;
    Ok(type_config::vote(types::Vote { term: vote.term, node_id: vote.node_id, committed: vote.committed }))
}

/// The incarnation written as 32 hexadecimal digits.
///
/// # Errors
/// When it is not.
pub(crate) fn incarnation(text: &str) -> Result<Incarnation, Malformed> {
    u128::from_str_radix(text, 16).map(Incarnation).map_err(|_| Malformed("incarnation is not a number"))
}

fn member(member: &Member) -> proto::Member {
    proto::Member {
        peer: member.peer.clone(),
        client: member.client.clone(),
        incarnation: member.incarnation.to_string(),
        intents: member.intents.iter().map(|(id, intent)| (*id, wire_intent(*intent).into())).collect(),
        founding: member.founding.as_ref().map(founding),
    }
}

fn founding(founding: &Founding) -> proto::Founding {
    let version = |version: &MachineVersion| proto::MachineVersion {
        machine: version.machine.into(),
        version: version.version,
    };
    let versions = founding.versions.iter().map(version).collect();
    proto::Founding { state: Some(initial_state(&founding.state)), versions }
}

fn from_founding(founding: proto::Founding) -> Result<Founding, Malformed> {
    let state = founding.state.ok_or(Malformed("the founders' initial state is missing"))?;
    if founding.versions.len() > MOST_MACHINES {
        return Err(Malformed("the founders have too many machines"));
    }
    let version = |version: proto::MachineVersion| match u16::try_from(version.machine) {
        Ok(machine) => Ok(MachineVersion { machine, version: version.version }),
        Err(_) => Err(Malformed("there is no machine of such a number")),
    };
    let versions = founding.versions.into_iter().map(version).collect::<Result<_, _>>()?;
    Ok(Founding { state: from_initial_state(state), versions })
}

/// The wire form of an initial state.
pub(crate) fn initial_state(state: &InitialState) -> proto::InitialState {
    let InitialState { hash_version, hash, is_restored } = *state;
    proto::InitialState { hash_version, hash, restored: is_restored }
}

/// The initial state in a message.
pub(crate) fn from_initial_state(state: proto::InitialState) -> InitialState {
    let proto::InitialState { hash_version, hash, restored } = state;
    InitialState { hash_version, hash, is_restored: restored }
}

fn wire_intent(intent: Intent) -> proto::Intent {
    match intent {
        Intent::Voter => proto::Intent::Voter,
        Intent::Learner => proto::Intent::Learner,
    }
}

fn from_member(member: proto::Member) -> Result<Member, Malformed> {
    let incarnation = incarnation(&member.incarnation)?;
    let intent = |(about, intent): (u64, i32)| match proto::Intent::try_from(intent) {
        Ok(proto::Intent::Voter) => Ok((about, Intent::Voter)),
        Ok(proto::Intent::Learner) => Ok((about, Intent::Learner)),
        Ok(proto::Intent::Unspecified) | Err(_) => Err(Malformed("an intent is unknown")),
    };
    let intents = member.intents.into_iter().map(intent).collect::<Result<_, _>>()?;
    let founding = member.founding.map(from_founding).transpose()?;
    Ok(Member { peer: member.peer, client: member.client, incarnation, intents, founding })
}

fn membership(membership: &Membership) -> proto::Membership {
    proto::Membership {
        voters: membership
            .voters
            .iter()
            .map(|set| proto::VoterSet { node_ids: set.iter().copied().collect() })
            .collect(),
        members: membership.members.iter().map(|(id, m)| (*id, member(m))).collect(),
    }
}

fn from_membership(membership: proto::Membership) -> Result<Membership, Malformed> {
    let set = |set: proto::VoterSet| {
        let count = set.node_ids.len();
        let ids: BTreeSet<types::NodeId> = set.node_ids.into_iter().collect();
        (ids.len() == count).then_some(ids).ok_or(Malformed("a voter is named twice"))
    };
    let voters = membership.voters.into_iter().map(set).collect::<Result<_, _>>()?;
    let members = membership
        .members
        .into_iter()
        .map(|(id, member)| Ok((id, from_member(member)?)))
        .collect::<Result<_, Malformed>>()?;
    let membership = Membership { voters, members };
    plausible::membership(&membership)?;
    Ok(membership)
}

fn entry(entry: type_config::Entry) -> proto::Entry {
    let entry = type_config::from_entry(entry);
    let payload = match entry.payload {
        types::Payload::Blank => None,
        types::Payload::Command(command) => Some(proto::entry::Payload::Command(command)),
        types::Payload::Membership(m) => Some(proto::entry::Payload::Membership(membership(&m))),
    };
    proto::Entry { term: entry.log_id.term, index: entry.log_id.index, payload }
}

fn from_entry(entry: proto::Entry) -> Result<type_config::Entry, Malformed> {
    let payload = match entry.payload {
        None => types::Payload::Blank,
        Some(proto::entry::Payload::Command(command)) => types::Payload::Command(command),
        Some(proto::entry::Payload::Membership(m)) => types::Payload::Membership(from_membership(m)?),
    };
    let log_id = types::LogId::new(entry.term, entry.index);
    type_config::entry(types::Entry { log_id, payload }).map_err(|_| Malformed("membership is inconsistent"))
}

/// The wire form of an append.
pub(crate) fn append(request: AppendEntriesRequest<TypeConfig>) -> proto::AppendRequest {
    proto::AppendRequest {
        vote: Some(vote(&request.vote)),
        previous: request.prev_log_id.as_ref().map(log_id),
        entries: request.entries.into_iter().map(entry).collect(),
        leader_commit: request.leader_commit.as_ref().map(log_id),
    }
}

/// The append in a message from the leader `from`.
///
/// # Errors
/// When it is incomplete, comes from somebody who does not lead, or its entries do not follow each other.
pub(crate) fn from_append(
    from: types::NodeId,
    request: proto::AppendRequest,
) -> Result<AppendEntriesRequest<TypeConfig>, Malformed> {
    let vote = from_leader(from, request.vote)?;
    let previous = request.previous.map(from_log_id);
    let entries = request.entries.into_iter().map(from_entry).collect::<Result<Vec<_>, _>>()?;
    let mut last = previous.as_ref().map(type_config::from_log_id);
    for entry in &entries {
        let log_id = type_config::from_log_id(&entry.log_id);
        let follows = match last {
            None => log_id.index == 0,
            Some(last) => last.index.checked_add(1) == Some(log_id.index) && last.term <= log_id.term,
        };
        if !follows || log_id.term > vote.leader_id.term {
            return Err(Malformed("entries do not follow each other"));
        }
        last = Some(log_id);
    }
    Ok(AppendEntriesRequest {
        vote,
        prev_log_id: previous,
        entries,
        leader_commit: request.leader_commit.map(from_log_id),
    })
}

/// The wire form of an append's outcome. `last` is the last position of the request.
pub(crate) fn append_response(
    result: openraft::raft::AppendEntriesResponse<TypeConfig>,
    previous: Option<LogId>,
    last: Option<LogId>,
) -> proto::AppendResponse {
    use proto::append_response::{Accepted, Outcome};
    let outcome = match result.into_stream_result(previous, last) {
        Ok(last) => Outcome::Accepted(Accepted { last: last.as_ref().map(log_id) }),
        Err(StreamAppendError::Conflict(at)) => Outcome::Conflict(log_id(&at)),
        Err(StreamAppendError::HigherVote(higher)) => Outcome::HigherVote(vote(&higher)),
    };
    proto::AppendResponse { outcome: Some(outcome), ..proto::AppendResponse::default() }
}

/// The outcome in a message.
///
/// # Errors
/// When it is missing.
pub(crate) fn from_append_response(
    response: proto::AppendResponse,
) -> Result<StreamAppendResult<TypeConfig>, Malformed> {
    use proto::append_response::Outcome;
    Ok(match response.outcome.ok_or(Malformed("outcome is missing"))? {
        Outcome::Accepted(accepted) => Ok(accepted.last.map(from_log_id)),
        Outcome::Conflict(at) => Err(StreamAppendError::Conflict(from_log_id(at))),
        Outcome::HigherVote(higher) => Err(StreamAppendError::HigherVote(from_vote(Some(higher))?)),
    })
}

/// The wire form of a request for a vote.
pub(crate) fn vote_request(request: VoteRequest<TypeConfig>) -> proto::VoteRequest {
    proto::VoteRequest {
        vote: Some(vote(&request.vote)),
        last_log: request.last_log_id.as_ref().map(log_id),
        leadership_transfer: request.leadership_transfer,
    }
}

/// The vote of the leader `from`.
///
/// # Errors
/// When it is missing, another node's, or that of a mere candidate.
pub(crate) fn from_leader(from: types::NodeId, vote: Option<proto::Vote>) -> Result<Vote, Malformed> {
    let vote = from_vote(vote)?;
    match vote.leader_id.voted_for == from && vote.committed {
        true => Ok(vote),
        false => Err(Malformed("the sender does not lead")),
    }
}

/// The request for a vote in a message from the candidate `from`.
///
/// # Errors
/// When it is incomplete, or asks for somebody else.
pub(crate) fn from_vote_request(
    from: types::NodeId,
    request: proto::VoteRequest,
) -> Result<VoteRequest<TypeConfig>, Malformed> {
    let vote = from_vote(request.vote)?;
    if vote.leader_id.voted_for != from || vote.committed {
        return Err(Malformed("the sender is not the candidate"));
    }
    let mut vote_request = VoteRequest::new(vote, request.last_log.map(from_log_id));
    vote_request.leadership_transfer = request.leadership_transfer;
    Ok(vote_request)
}

/// The wire form of the answer to a request for a vote.
pub(crate) fn vote_response(response: VoteResponse<TypeConfig>) -> proto::VoteResponse {
    proto::VoteResponse {
        vote: Some(vote(&response.vote)),
        last_log: response.last_log_id.as_ref().map(log_id),
        granted: response.vote_granted,
    }
}

/// The answer in a message.
///
/// # Errors
/// When it is incomplete.
pub(crate) fn from_vote_response(
    response: proto::VoteResponse,
) -> Result<VoteResponse<TypeConfig>, Malformed> {
    let last = response.last_log.map(from_log_id);
    Ok(VoteResponse::new(from_vote(response.vote)?, last, response.granted))
}

/// The wire form of a transfer of leadership, to a node that `wants_lead` or for another reason.
pub(crate) fn transfer(
    request: &TransferLeaderRequest<TypeConfig>,
    wants_lead: bool,
) -> proto::TransferLeaderRequest {
    proto::TransferLeaderRequest {
        from_leader: Some(vote(request.from_leader())),
        to_node: *request.to_node_id(),
        last_log: request.last_log_id().map(log_id),
        wants_lead,
    }
}

/// The transfer in a message from the leader `from`.
///
/// # Errors
/// When it is incomplete, or the sender does not lead.
pub(crate) fn from_transfer(
    from: types::NodeId,
    request: proto::TransferLeaderRequest,
) -> Result<TransferLeaderRequest<TypeConfig>, Malformed> {
    let last = request.last_log.map(from_log_id);
    Ok(TransferLeaderRequest::new(from_leader(from, request.from_leader)?, request.to_node, last))
}

/// The wire form of the answer to a transfer.
pub(crate) fn transfer_response(
    response: TransferLeaderResponse<TypeConfig>,
) -> proto::TransferLeaderResponse {
    proto::TransferLeaderResponse {
        accepted: response.is_ok(),
        reason: response.err().map(|error| error.to_string()).unwrap_or_default(),
    }
}

/// The wire form of an announcement.
pub(crate) fn announce(announcement: &Announcement) -> proto::AnnounceRequest {
    proto::AnnounceRequest {
        member: announcement.member.as_ref().map(member),
        wants_lead: announcement.wants_lead,
    }
}

/// The announcement in a message.
///
/// # Errors
/// When it is incomplete.
pub(crate) fn from_announce(request: proto::AnnounceRequest) -> Result<Announcement, Malformed> {
    let member = request.member.map(from_member).transpose()?;
    Ok(Announcement { member, wants_lead: request.wants_lead })
}

fn state_hashes(checks: &[Check]) -> Vec<proto::StateHash> {
    checks
        .iter()
        .map(|check| proto::StateHash { at: Some(plain_log_id(check.log_id)), hash: check.hash })
        .collect()
}

fn from_state_hashes(hashes: Vec<proto::StateHash>) -> Result<Vec<Check>, Malformed> {
    if hashes.len() > MOST_TOLD {
        return Err(Malformed("too many hashes"));
    }
    let check = |hash: proto::StateHash| {
        let at = hash.at.ok_or(Malformed("the position of a hash is missing"))?;
        let log_id = types::LogId::new(at.term, at.index);
        plausible::position(log_id)?;
        Ok(Check { log_id, hash: hash.hash })
    };
    hashes.into_iter().map(check).collect()
}

/// How the hashes of this node's states are computed.
fn scheme<M: StateMachine>() -> String {
    format!("{}/{}", env!("CARGO_PKG_VERSION"), M::HASH_VERSION)
}

/// The wire form of what a build reads. Nothing is sent of what every build reads that says nothing.
pub(crate) fn readable_versions(machines: &[ReadableVersions]) -> Vec<proto::ReadableVersions> {
    if machines == [ReadableVersions::FIRST] {
        return Vec::new();
    }
    let readable = |reads: &ReadableVersions| proto::ReadableVersions {
        machine: reads.machine.into(),
        oldest: reads.oldest,
        newest: reads.newest,
    };
    machines.iter().map(readable).collect()
}

/// What a build reads, in a message. Machines that cannot be are left out: nothing is agreed on them.
pub(crate) fn from_readable_versions(machines: &[proto::ReadableVersions]) -> Vec<ReadableVersions> {
    if machines.is_empty() {
        return vec![ReadableVersions::FIRST];
    }
    let readable = |reads: &proto::ReadableVersions| {
        let machine = u16::try_from(reads.machine).ok()?;
        Some(ReadableVersions { machine, oldest: reads.oldest, newest: reads.newest })
    };
    machines.iter().take(MOST_MACHINES).filter_map(readable).collect()
}

/// The wire form of this node's hashes.
pub(crate) fn compare<M: StateMachine>(checks: &[Check]) -> proto::CompareRequest {
    proto::CompareRequest { scheme: scheme::<M>(), hashes: state_hashes(checks) }
}

/// The hashes in a message; none if they cannot be compared with this node's.
///
/// # Errors
/// When they are too many, or stand nowhere.
pub(crate) fn from_compare<M: StateMachine>(
    request: proto::CompareRequest,
) -> Result<Option<Vec<Check>>, Malformed> {
    match request.scheme == scheme::<M>() {
        true => from_state_hashes(request.hashes).map(Some),
        false => Ok(None),
    }
}

/// The wire form of what members have said.
pub(crate) fn compare_response(told: &HashesTold) -> proto::CompareResponse {
    let member = |(node_id, checks): (&types::NodeId, &Vec<Check>)| proto::compare_response::Member {
        node_id: *node_id,
        hashes: state_hashes(checks),
    };
    proto::CompareResponse { members: told.iter().map(member).collect() }
}

/// What members have said, in a message.
///
/// # Errors
/// As [`from_compare`].
pub(crate) fn from_compare_response(response: proto::CompareResponse) -> Result<HashesTold, Malformed> {
    let member =
        |member: proto::compare_response::Member| Ok((member.node_id, from_state_hashes(member.hashes)?));
    response.members.into_iter().map(member).collect()
}

/// The wire form of the answer to a request for a read index.
pub(crate) fn read_index_response(outcome: Result<u64, NoReadIndex>) -> proto::ReadIndexResponse {
    use proto::read_index_response::Outcome;
    let outcome = match outcome {
        Ok(index) => Outcome::Index(index),
        Err(NoReadIndex::NotLeader(leader)) => Outcome::Leader(leader.map_or(0, |leader| leader.node_id)),
        Err(NoReadIndex::NoQuorum(reason) | NoReadIndex::Stopped(reason)) => Outcome::NoQuorum(reason),
    };
    proto::ReadIndexResponse { outcome: Some(outcome) }
}

/// The wire form of a refusal.
pub(crate) fn refusal(refusal: &Refusal) -> proto::Refusal {
    use proto::refusal::Reason;
    let mut known_incarnation = String::new();
    let mut membership_index = None;
    let reason = match refusal {
        Refusal::ProtocolVersion { .. } => Reason::ProtocolVersion,
        Refusal::OtherCluster { .. } => Reason::OtherCluster,
        Refusal::OtherNode { .. } => Reason::OtherNode,
        Refusal::CallerFenced { known, at, .. } => {
            known_incarnation = known.to_string();
            membership_index = *at;
            Reason::CallerFenced
        }
        Refusal::CalleeFenced => Reason::CalleeFenced,
        Refusal::UnknownPeer { at, .. } => {
            membership_index = *at;
            Reason::UnknownPeer
        }
        Refusal::NotJoining { .. } => Reason::NotJoining,
        Refusal::OtherState { .. } => Reason::OtherState,
        Refusal::OtherFounders { .. } => Reason::OtherFounders,
        Refusal::Malformed(_) | Refusal::Stopped(_) | Refusal::Stranger => Reason::Unspecified,
    };
    proto::Refusal { reason: reason.into(), detail: refusal.to_string(), known_incarnation, membership_index }
}

/// The refusal in a message. Only those the caller acts on keep their structure.
pub(crate) fn from_refusal(caller: types::NodeId, refusal: proto::Refusal) -> Refusal {
    use proto::refusal::Reason;
    let at = refusal.membership_index;
    match (refusal.reason(), incarnation(&refusal.known_incarnation)) {
        (Reason::CallerFenced, Ok(known)) => Refusal::CallerFenced { node_id: caller, known, at },
        (Reason::UnknownPeer, _) => Refusal::UnknownPeer { node_id: caller, at },
        (
            Reason::CallerFenced
            | Reason::Unspecified
            | Reason::ProtocolVersion
            | Reason::OtherCluster
            | Reason::OtherNode
            | Reason::CalleeFenced
            | Reason::NotJoining
            | Reason::OtherFounders
            | Reason::OtherState,
            _,
        ) => Refusal::Malformed(refusal.detail),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn a_membership_arrives_as_it_was_sent() {
        let intents = BTreeMap::from([(1, Intent::Learner), (2, Intent::Voter)]);
        let founding = Some(Founding {
            state: InitialState { hash_version: 3, hash: u64::MAX, is_restored: true },
            versions: vec![MachineVersion { machine: 4, version: 5 }],
        });
        let member = Member {
            peer: "p:1".into(),
            client: "c:1".into(),
            incarnation: Incarnation(7),
            intents,
            founding,
        };
        let sent = Membership { voters: vec![[1].into()], members: BTreeMap::from([(1, member.clone())]) };
        assert_eq!(from_membership(super::membership(&sent)).unwrap(), sent);
        let mut unknown = super::member(&member);
        unknown.intents.insert(3, 99);
        assert!(from_member(unknown).is_err(), "what this version does not know is not left out");
    }
}
