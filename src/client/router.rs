//! Who is where, and who leads: the client's picture of the cluster.
//!
//! The picture has three sources. A *claim* is a node's `Admin.Status`: it carries a term, and the highest
//! term wins. A *hint* comes with a refusal ("ask node 2"): it has no term and may be out of date, so it is
//! followed but never announced. Either may name an address at which the node is not reached from here: an address that the
//! user has not given is believed only once it has answered a probe, and meanwhile those that were given are asked,
//! one of which may be the same node. An *answer* is proof that a node leads. A lost connection, or a refusal
//! without a hint, removes the leader from the picture; probes of all nodes then look for the new one.
//!
//! Members also tell which replicas follow them. Those are given reads only, and none of what follows is theirs: see
//! [`replicas`](super::replicas).
//!
//! An address may come to belong to a node of another cluster. So what a node says counts only if it names the cluster that the
//! others name, and an address that was learnt is forgotten once the leader does not list it any more.
//!
//! Reading the picture costs an atomic load per operation; changing it copies it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::KnownLeader;
use super::config::ClientConfig;
use super::connection::Cluster;
use super::contact::ContactNote;
use super::endpoint::Endpoint;
use super::link::Link;
use super::metrics::{Metrics, NodeMetrics};
use super::node::Node;
use super::picture::{Leader, Picture};
use super::preference::{Candidate, ReadPreference};
use crate::call::decode_leader;
use crate::proto::v1;
use crate::report::NodeReport;
use crate::runtime;
use crate::types;

/// How long a node may take to answer a probe.
const PROBE_TIMEOUT: Duration = Duration::from_millis(500);
/// Shortest time between two probes of a node.
const PROBE_INTERVAL: Duration = Duration::from_millis(10);

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Router {
    pub(crate) config: Arc<ClientConfig>,
    pub(crate) metrics: Metrics,
    picture: ArcSwap<Picture>,
    /// Held while a new picture is made.
    change: Mutex<()>,
    rotation: AtomicUsize,
    /// Notified when a leader is known for certain.
    pub(crate) leader_found: Notify,
    /// Whether the task that asks after everybody's health has been started.
    watching_health: AtomicBool,
    /// Whether any node answers.
    pub(crate) contact: ContactNote,
    /// Who leads, as a node has said last, whether or not it is reached.
    named: Mutex<Option<types::Leader>>,
    /// The name of the cluster, once a node has told it.
    cluster: Mutex<Option<String>>,
}

/// What a hint is good for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Hint {
    /// There is somebody new to ask.
    Followed,
    /// It names nobody, or the node that gave it.
    Useless,
    /// It names a node that is not reached: which, where, and why.
    Unreached(String),
}

impl Router {
    pub(crate) fn new(endpoints: Vec<Endpoint>, config: ClientConfig) -> Self {
        let config = Arc::new(config);
        let links =
            endpoints.into_iter().map(|endpoint| Arc::new(Link::new(endpoint, true, &config))).collect();
        Self {
            picture: ArcSwap::from_pointee(Picture { links, ..Picture::default() }),
            config,
            change: Mutex::new(()),
            rotation: AtomicUsize::new(0),
            leader_found: Notify::new(),
            watching_health: AtomicBool::new(false),
            contact: ContactNote::new(),
            named: Mutex::new(None),
            cluster: Mutex::new(None),
            metrics: Metrics::new(),
        }
    }

    /// The link to the leader, if one is known.
    pub(crate) fn leader(&self) -> Option<Arc<Link>> {
        self.picture.load().leader.as_ref().map(|leader| leader.link.clone())
    }

    /// The link to the leader, or to the next candidate when none is known.
    pub(crate) fn leader_or_next(&self) -> Arc<Link> {
        let picture = self.picture.load();
        match &picture.leader {
            Some(leader) => leader.link.clone(),
            None => self.next_of(&picture),
        }
    }

    /// The link to the node that `preference` chooses, past the one that has just failed if any other is left. `replicas` says
    /// how far behind a replica may be that answers, if any may.
    pub(crate) fn choose(
        &self,
        preference: &ReadPreference,
        failed: Option<&Endpoint>,
        replicas: Option<Duration>,
    ) -> Arc<Link> {
        let picture = self.picture.load();
        let leader = picture.leader.as_ref().map(|leader| &leader.link.node.endpoint);
        let links = picture.readers(replicas);
        let candidates: Vec<_> = links
            .iter()
            .map(|&link| {
                let node = &link.node;
                Candidate {
                    endpoint: &node.endpoint,
                    leads: leader == Some(&node.endpoint),
                    healthy: node.is_healthy() && failed != Some(&node.endpoint),
                    in_flight: link.in_flight(),
                    round_trip: node.round_trip(),
                }
            })
            .collect();
        let turn = self.rotation.fetch_add(1, Ordering::Relaxed);
        let chosen = preference.choose(&candidates, turn as u64);
        links[chosen.expect("invariant: there is at least one endpoint")].clone()
    }

    /// Whether another node than `endpoint` is healthy, and none of the replicas that were learnt of, so that it could be asked instead.
    pub(crate) fn has_healthy_other_than(&self, endpoint: &Endpoint) -> bool {
        let picture = self.picture.load();
        picture.own().any(|link| link.node.endpoint != *endpoint && link.node.is_healthy())
    }

    /// Whether another node than `endpoint` is healthy and has answered lately.
    pub(crate) fn has_reached_other_than(&self, endpoint: &Endpoint) -> bool {
        let is_reached = |node: &Node| node.is_reached() && node.is_healthy();
        let picture = self.picture.load();
        picture.own().any(|link| link.node.endpoint != *endpoint && is_reached(&link.node))
    }

    /// The link to a node for which `wanted` holds, a healthy one if there is any.
    pub(crate) fn find(&self, wanted: impl Fn(&Node) -> bool) -> Option<Arc<Link>> {
        let picture = self.picture.load();
        let fit = || picture.own().filter(|link| wanted(&link.node));
        fit().find(|link| link.node.is_healthy()).or_else(|| fit().next()).cloned()
    }

    fn next_of(&self, picture: &Picture) -> Arc<Link> {
        let links = &picture.links;
        let turn = self.rotation.fetch_add(1, Ordering::Relaxed);
        let in_turn = || (0..links.len()).map(|step| &links[turn.wrapping_add(step) % links.len()]);
        let is_member = |link: &&Arc<Link>| !link.node.replica.is_replica();
        let may_answer = |link: &&Arc<Link>| !link.node.is_down() && link.node.is_usable();
        let is_ours = |link: &&Arc<Link>| !link.node.is_down() && !link.node.is_stranger();
        let members = || in_turn().filter(is_member);
        let link = members().find(may_answer).or_else(|| members().find(is_ours));
        // A replica that the user has given says who leads.
        let link = link.or_else(|| in_turn().find(|link| !link.node.replica.is_announced()));
        link.expect("invariant: configured endpoints are never forgotten, and there is at least one").clone()
    }

    /// The link to `endpoint`, made if need be.
    pub(crate) fn at(&self, endpoint: &Endpoint) -> Arc<Link> {
        if let Some(link) = self.picture.load().find(endpoint) {
            return link.clone();
        }
        self.change(|picture| picture.learn(endpoint.clone(), &self.config))
    }

    /// What is known of each node, those given by the user first.
    pub(crate) fn node_metrics(&self) -> Vec<NodeMetrics> {
        self.picture.load().links.iter().map(|link| link.metrics()).collect()
    }

    /// Replicas that may answer reads at present.
    pub(crate) fn replicas(&self) -> Vec<Endpoint> {
        self.picture.load().replicas().map(|node| node.endpoint.clone()).collect()
    }

    /// The name of the cluster, once a node has told it.
    pub(crate) fn cluster(&self) -> Option<String> {
        self.cluster.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Endpoints given by the user, then those of members that were learnt.
    pub(crate) fn endpoints(&self, configured_only: bool) -> Vec<Endpoint> {
        let picture = self.picture.load();
        let nodes = picture.own().map(|link| &link.node);
        nodes.filter(|node| node.configured || !configured_only).map(|node| node.endpoint.clone()).collect()
    }

    /// Every endpoint with its last failure, if none of them can be reached.
    pub(crate) fn all_down(&self) -> Option<Vec<(Endpoint, String)>> {
        self.all_failures(Node::is_down)
    }

    /// Every endpoint with its last failure, if nothing was ever heard from any of them.
    pub(crate) fn unheard(&self) -> Option<Vec<(Endpoint, String)>> {
        self.all_failures(|node| !node.has_answered())
    }

    fn all_failures(&self, has_failed: impl Fn(&Node) -> bool) -> Option<Vec<(Endpoint, String)>> {
        let picture = self.picture.load();
        let nodes = picture.own().map(|link| &link.node);
        nodes.map(|node| has_failed(node).then(|| (node.endpoint.clone(), node.last_failure()))).collect()
    }

    /// Notes whom a node has named as the leader, or that it knows of none.
    pub(crate) fn note_named(&self, leader: Option<&types::Leader>) {
        let leader = leader.filter(|leader| leader.node_id != 0 && !leader.client.is_empty());
        *self.named.lock().unwrap_or_else(PoisonError::into_inner) = leader.cloned();
    }

    /// Notes what a refusal says of the leader; most say nothing.
    pub(crate) fn note_failure(&self, failure: &v1::Failure) {
        let names = failure.leader.as_ref().is_some_and(|hint| hint.node_id != 0);
        if names || failure.reason() == v1::Reason::NotLeader {
            self.note_named(failure.leader.clone().map(decode_leader).as_ref());
        }
    }

    /// Who leads: by the picture, or else the one that was named last.
    pub(crate) fn known_leader(&self) -> Option<KnownLeader> {
        let named = self.named.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(link) = self.leader() {
            let client = link.node.endpoint.clone();
            let named = named.filter(|named| named.client == client.as_str()).map(|named| named.node_id);
            return Some(KnownLeader { node_id: link.node.node_id().or(named), client });
        }
        let named = named?;
        let client = Endpoint::parse(&named.client).ok()?;
        Some(KnownLeader { node_id: Some(named.node_id), client })
    }

    /// Asks all nodes who leads, and waits until one is known, but no longer than `patience`.
    pub(crate) async fn seek_leader(self: &Arc<Self>, patience: Duration) {
        let found = self.leader_found.notified();
        tokio::pin!(found);
        found.as_mut().enable();
        self.hunt();
        if !self.has_leader() {
            // Whether one is found in time or not, what is known by then is told.
            let _ = timeout(patience, found).await;
        }
    }

    /// Whether a leader is known.
    pub(crate) fn has_leader(&self) -> bool {
        self.picture.load().leader.is_some()
    }

    /// Whether it is known for certain that a node other than this one leads.
    pub(crate) fn is_led_by_other_than(&self, endpoint: &Endpoint) -> bool {
        let picture = self.picture.load();
        let leader = picture.leader.as_ref();
        leader.is_some_and(|leader| leader.confirmed && leader.link.node.endpoint != *endpoint)
    }

    /// `link` has answered what only a leader answers.
    pub(crate) fn answered_as_leader(&self, link: &Arc<Link>) {
        if self.has_leader() {
            return;
        }
        self.change(|picture| {
            if picture.leader.is_none() {
                // The term is unknown, so a claim of a higher term than the last known one may overrule this.
                picture.leader = Some(Leader { link: link.clone(), confirmed: false });
                picture.lost = None;
            }
        });
        self.leader_found.notify_waiters();
    }

    /// `endpoint` leads no more, or cannot be reached.
    pub(crate) fn lost_leader(&self, endpoint: &Endpoint) {
        let leads = |picture: &Picture| {
            picture.leader.as_ref().is_some_and(|leader| leader.link.node.endpoint == *endpoint)
        };
        if leads(&self.picture.load()) {
            self.change(|picture| {
                if leads(picture) {
                    picture.leader = None;
                    picture.lost = Some(endpoint.clone());
                }
            });
        }
    }

    /// `from` has refused as a follower, and said who leads. Waits for a probe of an address that only other nodes have
    /// told; as long as that takes, the other nodes are asked who leads, too.
    pub(crate) async fn hinted(self: &Arc<Self>, from: &Endpoint, hint: &types::Leader) -> Hint {
        self.note_named(Some(hint));
        let known = self.picture.load().resolve(hint.node_id, &hint.client).cloned();
        let target = match known {
            Some(link) => link,
            None => match Endpoint::parse(&hint.client) {
                Ok(endpoint) => self.at(&endpoint),
                Err(_) => return Hint::Useless,
            },
        };
        if target.node.endpoint == *from {
            return Hint::Useless;
        }
        if !target.node.is_usable() && !target.node.was_missed() {
            self.seek(from, &target).await;
        }
        if self.is_led_by_other_than(from) {
            return Hint::Followed;
        }
        if !target.node.is_usable() || target.node.is_down() {
            let (endpoint, why) = (&target.node.endpoint, target.node.last_failure());
            let leads =
                format!("node {} leads, as {from} says, and is not reached at {endpoint}", hint.node_id);
            return Hint::Unreached(format!("{leads}: {why}"));
        }
        self.believe(Some(from), &target);
        Hint::Followed
    }

    /// Probes `target`, and meanwhile all others; until it has answered or failed to, or another leader is known.
    async fn seek(self: &Arc<Self>, from: &Endpoint, target: &Arc<Link>) {
        let (probed, found) = (target.node.probed.notified(), self.leader_found.notified());
        tokio::pin!(probed, found);
        probed.as_mut().enable();
        found.as_mut().enable();
        target.node.hinted.store(true, Ordering::Relaxed);
        self.hunt();
        // A probe that has ended a moment ago tells as much as another one.
        if target.node.is_usable() || target.node.was_missed() || self.is_led_by_other_than(from) {
            return;
        }
        tokio::select! {
            () = probed => {}
            () = found => {}
            () = sleep(PROBE_TIMEOUT) => {}
        }
    }

    /// `target` is said to lead; not more than that.
    fn believe(&self, from: Option<&Endpoint>, target: &Arc<Link>) {
        let is_news = |picture: &Picture| {
            let leader = picture.leader.as_ref();
            leader.is_none_or(|leader| from == Some(&leader.link.node.endpoint))
        };
        if is_news(&self.picture.load()) {
            self.change(|picture| {
                if is_news(picture) {
                    picture.leader = Some(Leader { link: target.clone(), confirmed: false });
                }
            });
        }
    }

    /// Takes in what `node` claims: members and leader.
    pub(crate) fn heard(self: &Arc<Self>, node: &Arc<Node>, status: &NodeReport) {
        let is_ours = self.is_ours(node, &status.cluster);
        node.note_cluster((!is_ours).then_some(&status.cluster));
        if !is_ours {
            return self.lost_leader(&node.endpoint);
        }
        if node.replica.is_announced() {
            // What it knows of the members, it has from them.
            return;
        }
        if status.term >= self.picture.load().term {
            self.note_named(status.leader.as_ref());
        }
        let (mut unproven, mut new) = (None, Vec::new());
        let found = self.change(|picture| {
            new = picture.take_in(status, &self.config, !node.replica.is_replica());
            self.weigh(picture, node, status, &mut unproven)
        });
        for node in new {
            self.ask(&node);
        }
        if found {
            self.leader_found.notify_waiters();
        }
        if let Some(node) = unproven {
            node.hinted.store(true, Ordering::Relaxed);
            self.ask(&node);
        }
    }

    /// Whether the cluster `name`, which `node` has named, is the one that this client is about: the one that was named first, as
    /// long as any node of it answers. After that it may have been made anew under another name.
    fn is_ours(&self, node: &Node, name: &str) -> bool {
        let mut known = self.cluster.lock().unwrap_or_else(PoisonError::into_inner);
        let is_known = known.as_ref().is_none_or(|known| known == name);
        let answers =
            |other: &Node| other.endpoint != node.endpoint && other.is_reached() && !other.is_stranger();
        if name.is_empty() || (!is_known && self.find(answers).is_some()) {
            return name.is_empty();
        }
        if node.replica.is_announced() {
            return is_known;
        }
        if !is_known || (known.is_none() && node.configured) {
            *known = Some(name.to_owned());
        }
        true
    }

    /// Whether the claim in `status` changes the leader. One that another node claims, and that has never answered at the
    /// address that this one tells, is left in `unproven`.
    fn weigh(
        &self,
        picture: &mut Picture,
        node: &Arc<Node>,
        status: &NodeReport,
        unproven: &mut Option<Arc<Node>>,
    ) -> bool {
        let own = status.leads();
        let link = if own {
            picture.find(&node.endpoint)
        } else {
            status.leader.as_ref().and_then(|hint| picture.resolve(hint.node_id, &hint.client))
        };
        let Some(link) = link.cloned() else { return false };
        let endpoint = &link.node.endpoint;
        let same = picture.leader.as_ref().is_some_and(|leader| leader.link.node.endpoint == *endpoint);
        let stale = if status.term == picture.term && !same {
            // There is one leader per term. Whoever believes the term's leader still leads may not know yet.
            match &picture.leader {
                // A hint may be out of date; who leads knows it.
                Some(leader) => leader.confirmed || !own,
                None => !own && picture.lost.as_ref() == Some(endpoint),
            }
        } else {
            status.term < picture.term
        };
        if stale || (!own && link.node.is_down()) {
            return false;
        }
        if !own && !link.node.is_usable() {
            *unproven = (!link.node.was_missed()).then(|| link.node.clone());
            return false;
        }
        picture.term = status.term;
        picture.lost = None;
        picture.leader = Some(Leader { link, confirmed: true });
        if own && !status.members.is_empty() {
            picture.forget_all_but(&status.members);
        }
        !same
    }

    /// From now on asks every node at intervals whether it is ready, and who leads.
    pub(crate) fn watch_health(self: &Arc<Self>) {
        if self.watching_health.swap(true, Ordering::AcqRel) {
            return;
        }
        let router = Arc::downgrade(self);
        let mut due = interval(self.config.health_interval);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        drop(runtime::spawn(async move {
            loop {
                due.tick().await;
                let Some(router) = router.upgrade() else { return };
                router.hunt();
            }
        }));
    }

    /// Probes every node for the leader, in the background. Cheap while probes are under way.
    pub(crate) fn hunt(self: &Arc<Self>) {
        for link in &self.picture.load().links {
            self.ask(&link.node);
        }
    }

    /// Probes one node, in the background, at most once at a time.
    pub(crate) fn ask(self: &Arc<Self>, node: &Arc<Node>) {
        if node.asking.swap(true, Ordering::AcqRel) {
            return;
        }
        let (router, node) = (Arc::downgrade(self), node.clone());
        drop(runtime::spawn(async move {
            let answer = node.status(PROBE_TIMEOUT).await;
            if let Some(router) = router.upgrade() {
                match answer {
                    Ok(status) => router.heard(&node, &status),
                    // It is there, and cannot say whether it leads.
                    Err(_)
                        if node.is_healthy() && node.is_reached() && node.hinted.load(Ordering::Relaxed) =>
                    {
                        router.believe(None, &router.at(&node.endpoint));
                        router.leader_found.notify_waiters();
                    }
                    Err(_) => {}
                }
                node.hinted.store(false, Ordering::Relaxed);
                router.note_contact();
            }
            node.probed.notify_waiters();
            sleep(PROBE_INTERVAL).await;
            node.asking.store(false, Ordering::Release);
        }));
    }

    /// Notes whether any node answers, once it is known of each.
    pub(crate) fn note_contact(&self) {
        let picture = self.picture.load();
        let nodes = || picture.own().map(|link| &link.node);
        if let Some(node) = nodes().find(|node| node.is_reached()) {
            if self.contact.heard(&node.endpoint) {
                tracing::info!(endpoint = %node.endpoint, "the cluster answers");
            }
        } else if nodes().all(|node| node.has_failed()) {
            let each = || nodes().map(|node| format!("{}: {}", node.endpoint, node.last_failure()));
            let why = || each().collect::<Vec<_>>().join(", ");
            if self.contact.lost(why) {
                tracing::warn!(why = why(), "no node of the cluster answers; trying again");
            }
        }
    }

    fn change<T>(&self, make: impl FnOnce(&mut Picture) -> T) -> T {
        let _one_at_a_time = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let mut picture = Picture::clone(&self.picture.load());
        let made = make(&mut picture);
        let leads = picture.leader.as_ref().map(|leader| &leader.link.node.endpoint);
        if let Some(leads) = leads.filter(|leads| picture.led.as_ref() != Some(leads))
            && picture.led.replace(leads.clone()).is_some()
        {
            self.metrics.fail_overs.fetch_add(1, Ordering::Relaxed);
        }
        self.picture.store(Arc::new(picture));
        made
    }
}

impl Cluster for Router {
    fn note_contact(&self) {
        Self::note_contact(self);
    }

    fn ask(self: Arc<Self>, node: &Arc<Node>) {
        Self::ask(&self, node);
    }

    fn hunt(self: Arc<Self>) {
        Self::hunt(&self);
    }

    fn watch_health(self: Arc<Self>) {
        Self::watch_health(&self);
    }

    fn lost_leader(&self, endpoint: &Endpoint) {
        Self::lost_leader(self, endpoint);
    }

    fn is_led_by_other_than(&self, endpoint: &Endpoint) -> bool {
        Self::is_led_by_other_than(self, endpoint)
    }

    fn has_reached_other_than(&self, endpoint: &Endpoint) -> bool {
        Self::has_reached_other_than(self, endpoint)
    }
}
