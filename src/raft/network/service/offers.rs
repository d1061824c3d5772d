//! Hand-overs of the lead that were announced.
//!
//! A leader that hands over tells every voter whom it has asked to stand (Raft thesis, §3.10). That word is what lets a voter
//! elect somebody before its promise to the leader has run out (§4.2.3). A candidate says as well that it was asked
//! to; on its own that counts for nothing, since anybody can say so.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::raft::activity::{Activity, Succession};
use crate::raft::type_config::Vote;
use crate::types::NodeId;

/// How long a request for a vote waits for the leader's word, which may be on its way: the leader tells everybody at
/// once. Without it the voter answers as it would anybody.
const PATIENCE: Duration = Duration::from_millis(100);
/// Candidates of one hand-over that are remembered: a leader asks one voter after the other.
const CANDIDATES: usize = 64;

/// What the leader of the present term has announced.
#[derive(Debug, Clone, Default)]
struct Offer {
    /// The leader's vote.
    from: Option<Vote>,
    /// Whom it has asked to stand.
    to: BTreeMap<NodeId, Succession>,
}

/// Hand-overs that were announced to this node, or by it.
#[derive(Debug)]
pub(crate) struct Offers {
    newest: watch::Sender<Offer>,
    activity: Arc<Activity>,
}

impl Offers {
    pub(super) fn new(activity: Arc<Activity>) -> Self {
        Self { newest: watch::Sender::new(Offer::default()), activity }
    }

    /// The leader that has this vote asks `to` to stand, because that node `wants_lead` or for another reason.
    pub(crate) fn note(&self, from: Vote, to: NodeId, wants_lead: bool) {
        let why = if wants_lead { Succession::Preference } else { Succession::Transfer };
        self.activity.offered(from.leader_id.term, to, why);
        self.newest.send_modify(|offer| {
            if offer.from != Some(from) {
                *offer = Offer { from: Some(from), to: BTreeMap::new() };
            }
            if offer.to.len() < CANDIDATES {
                offer.to.insert(to, why);
            }
        });
    }

    /// Whether the leader that `current`, this node's own vote, is for has asked the sender of `candidate` to stand. Waits
    /// for its word for a moment.
    pub(super) async fn authorise(&self, candidate: Vote, current: impl Fn() -> Vote) -> bool {
        let mut newest = self.newest.subscribe();
        let authorised = newest.wait_for(|offer| {
            offer.from.is_some_and(|from| {
                from == current()
                    && from.committed
                    && from.leader_id.term.checked_add(1) == Some(candidate.leader_id.term)
                    && offer.to.contains_key(&candidate.leader_id.voted_for)
            })
        });
        tokio::time::timeout(PATIENCE, authorised).await.is_ok_and(|offer| offer.is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::raft::type_config::vote;
    use crate::types;

    fn of(term: u64, node_id: NodeId, committed: bool) -> Vote {
        vote(types::Vote { term, node_id, committed })
    }

    #[tokio::test(start_paused = true)]
    async fn a_transfer_is_believed_only_from_the_leader_of_the_term() {
        let offers = Offers::new(Arc::default());
        let leader = of(5, 1, true);
        let asked = async |candidate, current: Vote| offers.authorise(candidate, || current).await;
        assert!(!asked(of(6, 2, false), leader).await, "nobody said so");
        offers.note(leader, 2, false);
        assert!(asked(of(6, 2, false), leader).await);
        assert!(!asked(of(6, 3, false), leader).await, "another node was asked");
        assert!(!asked(of(7, 2, false), leader).await, "not the next term");
        assert!(!asked(of(u64::MAX, 2, false), leader).await);
        assert!(!asked(of(6, 2, false), of(6, 3, true)).await, "there is a newer leader");
        offers.note(of(6, 3, true), 1, false);
        assert!(!asked(of(6, 2, false), leader).await, "another leader's word has come since");
    }

    #[tokio::test(start_paused = true)]
    async fn the_leaders_word_may_come_after_the_candidates() {
        let offers = Offers::new(Arc::default());
        let leader = of(5, 1, true);
        let (asked, ()) = tokio::join!(offers.authorise(of(6, 2, false), || leader), async {
            tokio::time::sleep(PATIENCE / 2).await;
            offers.note(leader, 2, true);
        });
        assert!(asked);
    }
}
