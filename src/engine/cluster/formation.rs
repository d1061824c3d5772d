//! How a cluster comes into being, once.
//!
//! The founder with the smallest id waits until every other one answers, in one round, and says which data
//! directory it holds. Only then does it write the founding membership, incarnations included, as the first
//! entry of its log; the others receive it like any entry. From then on a member that comes back with another
//! data directory is recognised by all that hold that entry, and nothing is committed without a quorum that
//! does.
//!
//! Founders must begin with the same state: the first one tells the others the hash of its own, and one that has another
//! refuses. The founding membership holds that hash, and the versions of the machine that all founders read. Whoever begins with it
//! later, from an empty log, is held to it. A state that was [restored](crate::engine::Engine::restore) nobody else has: the founders take a
//! snapshot at once and cut it off the log, and who joins is sent that.
//!
//! Only one founder writes, because two that met the others at different times might write different
//! memberships under the same position.
//!
//! A node that is started to join forms nothing and writes nothing: it answers who it is and waits until a leader
//! has added it (`membership`) and sends it the log.
//!
//! A founder that is to form a cluster alone has nobody to ask. It listens for a moment before it writes: members of a
//! cluster that has grown from it, before its disk was wiped, call it all the time and expect the old directory.
//! While one of them bears that out it goes on listening, until what it knows is committed and this node is fenced.
//! One that could not reach it in time is only refused when it calls later, and both logs say so: by then this node is
//! the member of another cluster. So `--single` is best left out again once others have been added.
//!
//! A founder that is told by a peer that the cluster already knows it with another directory stops: its
//! disk was wiped, and with it the log and vote it had promised to keep. So does a wiped first founder: it
//! must speak to all others before it may write, and meets one that knows it.
//!
//! The protocol, with a figure: `docs/design/identity.md`.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::engine::stop::fatal::Fatal;
use crate::error::FatalError;
use crate::machine::StateMachine;
use crate::raft::core::Core;
use crate::raft::network::handshake::OwnHandshake;
use crate::raft::network::wire;
use crate::raft::network::{DialError, IdentifyRequest, Refusal, Transport};
use crate::types::{Founding, InitialState, MachineVersion, Member, NodeId, ReadableVersions};

/// Pause between two rounds of calls.
const PAUSE: Duration = Duration::from_millis(50);
/// How long one call may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a founder that has nobody to ask listens before it writes: twice the longest pause that a leader makes
/// between two calls.
const LISTEN: Duration = Duration::from_secs(1);
/// Rounds between two messages about who is missing: every five seconds or so.
const ROUNDS_PER_MESSAGE: u32 = 100;

/// What a node waits for that belongs to no cluster yet.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Forming {
    /// All founders must answer at the same time, and these have not, by the last round.
    Founders {
        /// Their peer addresses, and why each counts as missing.
        missing: BTreeMap<NodeId, (String, String)>,
    },
    /// All founders answer. The one with the smallest id writes the founding membership.
    FirstFounder {
        /// That one.
        node_id: NodeId,
    },
    /// It is to be added to a cluster.
    ToBeAdded,
}

impl Forming {
    /// Before anybody was asked.
    pub(in crate::engine) fn first(own: NodeId, founders: &BTreeMap<NodeId, String>) -> Self {
        let others = founders.iter().filter(|(id, _)| **id != own);
        let missing: BTreeMap<_, _> =
            others.map(|(id, address)| (*id, (address.clone(), "not asked yet".to_owned()))).collect();
        Self::of_founders(missing, founders)
    }

    fn of_founders(missing: BTreeMap<NodeId, (String, String)>, founders: &BTreeMap<NodeId, String>) -> Self {
        match (missing.is_empty(), founders.keys().next()) {
            (true, Some(node_id)) => Self::FirstFounder { node_id: *node_id },
            _ => Self::Founders { missing },
        }
    }
}

impl fmt::Display for Forming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Founders { missing } => {
                f.write_str("the cluster forms once all founders answer; missing:")?;
                for (place, (node_id, (address, why))) in missing.iter().enumerate() {
                    let separator = if place == 0 { "" } else { "," };
                    write!(f, "{separator} node {node_id} at {address} ({why})")?;
                }
                Ok(())
            }
            Self::FirstFounder { node_id } => {
                write!(f, "all founders answer; node {node_id} writes the founding membership")
            }
            Self::ToBeAdded => f.write_str(
                "this node waits to be added to a cluster by `quorate member add` or `quorate member replace`",
            ),
        }
    }
}

/// A founder as it presents itself.
struct Founder {
    member: Member,
    /// What its machine begins with, if it says so.
    state: Option<InitialState>,
    /// What its build reads.
    reads: Vec<ReadableVersions>,
}

/// The newest version of each of this node's machines that all `founders` read, where there is any to agree on.
fn founded_versions(own: &[ReadableVersions], founders: &BTreeMap<NodeId, Founder>) -> Vec<MachineVersion> {
    let agreed = own.iter().filter_map(|own| {
        let reads =
            |founder: &Founder| founder.reads.iter().find(|reads| reads.machine == own.machine).copied();
        let all: Option<Vec<_>> = founders.values().map(reads).collect();
        let all = all?;
        let version = all.iter().map(|reads| reads.newest).fold(own.newest, u32::min);
        let is_read = all.iter().all(|reads| reads.contains(version)) && own.contains(version);
        is_read.then_some(MachineVersion { machine: own.machine, version })
    });
    agreed.filter(|version| *version != MachineVersion::FIRST).collect()
}

/// A founder's part in forming its cluster.
pub(in crate::engine) struct Formation<M: StateMachine> {
    pub(in crate::engine) core: Core<M>,
    pub(in crate::engine) transport: Arc<dyn Transport>,
    pub(in crate::engine) handshake: OwnHandshake,
    /// This node as a member.
    pub(in crate::engine) own: Member,
    /// What its machine begins with.
    pub(in crate::engine) initial_state: Option<InitialState>,
    /// All founders with their peer addresses.
    pub(in crate::engine) founders: BTreeMap<NodeId, String>,
    /// It forms no cluster, but waits to be added to one.
    pub(in crate::engine) joins: bool,
    /// Where to say what is waited for.
    pub(in crate::engine) forming: watch::Sender<Option<Forming>>,
    /// Where to say that this node must not go on.
    pub(in crate::engine) fatal: Fatal,
    /// When a member last bore out that this node had another disk.
    pub(in crate::engine) doubts: watch::Receiver<Option<Instant>>,
}

impl<M: StateMachine> Formation<M> {
    /// Returns once this node belongs to a cluster.
    pub(in crate::engine) async fn run(self) {
        match self.joins {
            true => self.wait_to_be_added().await,
            false => self.found().await,
        }
        self.forming.send_replace(None);
    }

    async fn found(&self) {
        let writes = self.founders.keys().next() == Some(&self.handshake.node_id);
        if self.founders.len() == 1 && !self.core.is_initialized().await {
            listen(&self.doubts).await;
        }
        let mut round = 0;
        while !self.core.is_initialized().await {
            let report = round % ROUNDS_PER_MESSAGE == ROUNDS_PER_MESSAGE - 1;
            let founders = self.meet_all(report).await;
            if let Some(founders) = founders
                && writes
                // It may have been told that its disk was wiped.
                && self.fatal.reason().is_none()
            {
                let count = founders.len();
                let members = self.agree(founders);
                match self.core.initialize(members).await {
                    Ok(()) => tracing::info!(members = count, "the cluster has formed"),
                    Err(error) => tracing::error!(%error, "the cluster cannot form"),
                }
                return;
            }
            round += 1;
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn wait_to_be_added(&self) {
        let (node_id, peer) = (self.handshake.node_id, &self.own.peer);
        let mut changes = self.core.changes();
        let mut message_at = Instant::now();
        while !self.core.is_initialized().await {
            if Instant::now() >= message_at {
                message_at = Instant::now() + PAUSE * ROUNDS_PER_MESSAGE;
                tracing::info!(
                    "waiting to be added to a cluster: `quorate member add {node_id} --peer {peer}`, or, where node {node_id} is a member that lost its data, `quorate member replace {node_id} --peer {peer}`"
                );
            }
            // A core that is gone says that it belongs to a cluster. An error: it is time for another message.
            let _ = tokio::time::timeout_at(message_at, changes.changed()).await;
        }
        tracing::info!("a cluster has taken this node in");
    }

    /// The founding members, with what they agree on in the record of this one.
    fn agree(&self, founders: BTreeMap<NodeId, Founder>) -> BTreeMap<NodeId, Member> {
        let versions = founded_versions(M::MACHINES, &founders);
        // A founder of a build that does not say what it begins with could not be held to it either.
        let all_say = founders.values().all(|founder| founder.state.is_some());
        let founding = self.initial_state.filter(|_| all_say).map(|state| Founding { state, versions });
        let mut members: BTreeMap<_, _> =
            founders.into_iter().map(|(node_id, founder)| (node_id, founder.member)).collect();
        if let Some(own) = members.get_mut(&self.handshake.node_id) {
            own.founding = founding;
        }
        members
    }

    /// All founders as they present themselves now, or nothing if one does not answer. Answers of earlier
    /// rounds do not count: a founder may have been given another disk since.
    async fn meet_all(&self, report: bool) -> Option<BTreeMap<NodeId, Founder>> {
        let own =
            Founder { member: self.own.clone(), state: self.initial_state, reads: M::MACHINES.to_vec() };
        let mut members = BTreeMap::from([(self.handshake.node_id, own)]);
        let mut missing = BTreeMap::new();
        let others = self.founders.iter().filter(|(id, _)| **id != self.handshake.node_id);
        let answers =
            others.map(async |(node_id, address)| (*node_id, address, self.meet(*node_id, address).await));
        for (node_id, address, answer) in futures::future::join_all(answers).await {
            match answer {
                Ok(founder) => {
                    members.insert(node_id, founder);
                }
                Err(error) => {
                    if report {
                        tracing::info!(node = node_id, %address, %error, "waiting for a founding member");
                    }
                    missing.insert(node_id, (address.clone(), error.to_string()));
                }
            }
        }
        let all = missing.is_empty();
        let forming = Some(Forming::of_founders(missing, &self.founders));
        self.forming.send_if_modified(|before| {
            let changed = *before != forming;
            *before = forming;
            changed
        });
        all.then_some(members)
    }

    /// A founder as it presents itself, if it is reached where it says that it is: the membership tells everybody to look for it there.
    async fn meet(&self, node_id: NodeId, address: &str) -> Result<Founder, DialError> {
        let found = self.identify(node_id, address).await?;
        if found.member.peer == address {
            return Ok(found);
        }
        let unreached = |why: String| {
            DialError::Unreachable(format!("it advertises {}, and there: {why}", found.member.peer))
        };
        match self.identify(node_id, &found.member.peer).await {
            Ok(there) if there.member.incarnation == found.member.incarnation => Ok(found),
            Ok(_) => Err(unreached("a node with another data directory answers".to_owned())),
            Err(DialError::Unreachable(why)) => Err(unreached(why)),
            Err(DialError::Refused(refusal)) => Err(unreached(refusal.to_string())),
        }
    }

    async fn identify(&self, node_id: NodeId, address: &str) -> Result<Founder, DialError> {
        let request = IdentifyRequest {
            hello: Some(self.handshake.towards(node_id, None)),
            founders: self.founders.clone().into_iter().collect(),
            state: self.initial_state.as_ref().map(wire::initial_state),
        };
        let call = self.transport.identify(address.to_owned(), request);
        let response = tokio::time::timeout(CALL_TIMEOUT, call)
            .await
            .unwrap_or_else(|_| Err(DialError::no_answer_within(CALL_TIMEOUT)))
            .inspect_err(|error| match error {
                DialError::Refused(refusal @ Refusal::CallerFenced { .. }) => {
                    (self.handshake.refused)(refusal)
                }
                DialError::Refused(Refusal::UnknownPeer { node_id, .. }) => {
                    let error = FatalError::NotAMember { node_id: *node_id, address: address.to_owned() };
                    self.fatal.report(error);
                }
                _ => {}
            })?;
        let malformed = |error: wire::Malformed| DialError::Refused(Refusal::Malformed(error.to_string()));
        let member = Member {
            peer: response.peer_address,
            client: response.client_address,
            incarnation: wire::incarnation(&response.incarnation).map_err(malformed)?,
            ..Member::default()
        };
        if !member.fits() || response.node_id != node_id {
            return Err(malformed(wire::Malformed("an address is too long, or another node answers")));
        }
        let state = response.state.map(wire::from_initial_state);
        if state.is_none() && self.initial_state.is_some_and(|own| own.is_restored) {
            let silent = "it does not say what its state begins with, and a restored state must be the same on all founders: it belongs to a cluster already, or its build does not tell";
            return Err(malformed(wire::Malformed(silent)));
        }
        Ok(Founder { member, state, reads: wire::from_readable_versions(&response.machines) })
    }
}

/// Waits until no member has borne out for a while that this node had another disk. A member that has just lost its leader knows
/// it, and not yet that it is committed; the next leader will.
async fn listen(doubts: &watch::Receiver<Option<Instant>>) {
    let mut quiet_since = Instant::now();
    while quiet_since.elapsed() < LISTEN {
        tokio::time::sleep_until(quiet_since + LISTEN).await;
        quiet_since = doubts.borrow().map_or(quiet_since, |doubt| doubt.max(quiet_since));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime;

    #[tokio::test(start_paused = true)]
    async fn a_founder_that_is_alone_does_not_begin_while_a_member_knows_another_disk() {
        let (tell, doubts) = watch::channel(None);
        let listening = runtime::spawn(async move { listen(&doubts).await });
        for _ in 0..20 {
            tokio::time::sleep(LISTEN / 2).await;
            tell.send_replace(Some(Instant::now()));
        }
        let last = Instant::now();
        assert!(!listening.is_finished());
        listening.await.unwrap();
        assert_eq!(last.elapsed(), LISTEN);
    }
}
