//! Elections and hand-overs: requests for votes, the silence after a start, and the lead that a leader offers.

use std::sync::Mutex;
use std::time::Duration;

use openraft::raft::VoteRequest;
use tokio::time::Instant;

use super::PeerService;
use super::refusals::Unanswered;
use crate::machine::StateMachine;
use crate::proto::peer::{TransferLeaderRequest, VoteRequest as Asked, response};
use crate::raft::network::plausible;
use crate::raft::network::wire::{self, Malformed};
use crate::raft::type_config::{self, TypeConfig};
use crate::types::NodeId;

/// What a leader may rely on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct VoterPromise {
    /// For how long this node grants no vote from now on, unless the leader itself has asked for the election: before it
    /// was restarted it may have confirmed a leader, which relies on not being replaced meanwhile.
    pub silence: Duration,
    /// For how long after it has confirmed a leader it elects nobody else.
    pub lease: Duration,
}

/// When the leader was last heard.
#[derive(Debug, Default)]
pub(crate) struct LastHeard(Mutex<Option<Instant>>);

impl LastHeard {
    pub(super) fn now(&self) {
        *self.0.lock().expect("invariant: no panic under this lock") = Some(Instant::now());
    }

    /// How long ago that was.
    pub(crate) fn ago(&self) -> Option<Duration> {
        self.0.lock().expect("invariant: no panic under this lock").map(|at| at.elapsed())
    }

    /// Whether the leader was heard within `time`.
    pub(crate) fn within(&self, time: Duration) -> bool {
        self.ago().is_some_and(|ago| ago <= time)
    }
}

impl<M: StateMachine> PeerService<M> {
    pub(super) async fn vote_for(&self, from: NodeId, vote: Asked) -> Result<response::Body, Unanswered> {
        let vote = self.vote_request(wire::from_vote_request(from, vote)?)?;
        let vote = self.authorised(vote).await?;
        let response = self.raft.vote(vote).await.map_err(Unanswered::failed)?;
        Ok(response::Body::Vote(wire::vote_response(response)))
    }

    pub(super) async fn would_vote_for(
        &self,
        from: NodeId,
        vote: Asked,
    ) -> Result<response::Body, Unanswered> {
        let mut vote = self.vote_request(wire::from_vote_request(from, vote)?)?;
        vote.leadership_transfer = false;
        self.check_silence()?;
        let response = self.raft.pre_vote(vote).await.map_err(Unanswered::failed)?;
        Ok(response::Body::Vote(wire::vote_response(response)))
    }

    /// Takes note of a hand-over, and has this node stand if the lead is offered to it.
    pub(super) async fn take_lead(
        &self,
        from: NodeId,
        transfer: TransferLeaderRequest,
    ) -> Result<response::Body, Unanswered> {
        let wants_lead = transfer.wants_lead;
        let transfer = wire::from_transfer(from, transfer)?;
        let (vote, to) = (*transfer.from_leader(), *transfer.to_node_id());
        self.bearings().candidate(vote.leader_id.term, None)?;
        if let Some(last) = transfer.last_log_id() {
            plausible::position(type_config::from_log_id(last))?;
        }
        if vote == self.vote() {
            self.offers.note(vote, to, wants_lead);
        }
        if to == self.callee.node_id && self.agreement.is_outvoted() {
            let differs = "this node's state differs from the others': it is not to lead";
            return Err(Unanswered::Failed(differs.to_owned()));
        }
        let response = self.raft.handle_transfer_leader(transfer).await.map_err(Unanswered::failed)?;
        Ok(response::Body::TransferLeader(wire::transfer_response(response)))
    }

    fn vote_request(&self, request: VoteRequest<TypeConfig>) -> Result<VoteRequest<TypeConfig>, Malformed> {
        let last = request.last_log_id.as_ref().map(type_config::from_log_id);
        self.bearings().candidate(request.vote.leader_id.term, last)?;
        Ok(request)
    }

    /// Takes the mark of a hand-over off a request for a vote whose sender was not asked to stand by this node's leader.
    /// It is the leader's word that lets a voter break its promise to that leader.
    async fn authorised(
        &self,
        mut request: VoteRequest<TypeConfig>,
    ) -> Result<VoteRequest<TypeConfig>, Unanswered> {
        if request.leadership_transfer {
            request.leadership_transfer = self.offers.authorise(request.vote, || self.vote()).await;
        }
        if !request.leadership_transfer {
            self.check_silence()?;
        }
        Ok(request)
    }

    fn check_silence(&self) -> Result<(), Unanswered> {
        match Instant::now() >= self.silent_until {
            true => Ok(()),
            false => {
                let silent = "this node was restarted a moment ago; a leader may still rely on it";
                Err(Unanswered::Failed(silent.to_owned()))
            }
        }
    }
}
