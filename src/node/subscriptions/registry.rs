//! Who follows this node, and how far they are.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Unit;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use super::files::KeptSnapshots;
use super::kept_states::KeptStates;
use crate::door::failure::failure;
use crate::node::families::{EncodeResult, Families};
use crate::node::operated::OperatedNode;
use crate::proto::v1::Failure;
use crate::reason::Reason;
use crate::report::ReplicaReport;
use crate::types::PeerStanding;

/// States that are sent at a time: each keeps alive what is replaced meanwhile.
const MAX_SNAPSHOTS: usize = 8;
/// Replicas that clients are told of at most.
const MAX_TOLD_REPLICAS: usize = 64;
/// Who has more than this ahead is catching up, as for members.
const SYNCING_OPERATIONS: u64 = 1_000;

/// The followers of one node. Clones are of the same list.
#[derive(Debug, Clone)]
pub(crate) struct Subscribers(Arc<FollowerList>);

#[derive(Debug)]
struct FollowerList {
    open: Mutex<BTreeMap<u64, Arc<ListedFollower>>>,
    next: AtomicU64,
    sent_bytes: AtomicU64,
    gauge: Gauge,
    snapshots: Arc<Semaphore>,
    snapshot_gauge: Gauge,
    kept_snapshots: Arc<KeptSnapshots>,
    kept_states: KeptStates,
}

impl Default for Subscribers {
    fn default() -> Self {
        Self(Arc::new(FollowerList {
            open: Mutex::default(),
            next: AtomicU64::new(1),
            sent_bytes: AtomicU64::new(0),
            gauge: Gauge::default(),
            snapshots: Arc::new(Semaphore::new(MAX_SNAPSHOTS)),
            snapshot_gauge: Gauge::default(),
            kept_snapshots: Arc::default(),
            kept_states: KeptStates::default(),
        }))
    }
}

/// Where a follower comes from.
#[derive(Debug, Clone, Copy)]
pub(super) struct FollowerCaller {
    /// What carries the stream.
    pub(super) transport: &'static str,
    pub(super) address: Option<SocketAddr>,
}

/// One that follows.
#[derive(Debug)]
struct ListedFollower {
    name: String,
    caller: FollowerCaller,
    filters: Vec<String>,
    /// Where it answers reads, if it has said so.
    serves: OnceLock<String>,
    since: Instant,
    now: Mutex<FollowerAt>,
}

/// How far a follower is.
#[derive(Debug, Clone, Copy)]
pub(super) struct FollowerAt {
    /// Everything up to here that is wanted was sent.
    pub(super) sent: u64,
    /// The follower has everything up to here, as it says, or as is believed of one that says nothing.
    pub(super) position: u64,
    /// Log time there.
    pub(super) time_ms: u64,
    pub(super) sent_bytes: u64,
    pub(super) operations: u64,
    /// When it was last heard, or took something.
    pub(super) heard: Instant,
    /// Since when it does not have everything.
    pub(super) behind: Option<Instant>,
    pub(super) in_snapshot: bool,
}

/// A follower as pages show it.
#[derive(Debug, Clone)]
pub(crate) struct FollowerReport {
    pub(crate) number: u64,
    pub(crate) name: String,
    pub(crate) transport: &'static str,
    pub(crate) address: Option<SocketAddr>,
    pub(crate) filters: Vec<String>,
    pub(crate) serves: Option<String>,
    pub(crate) connected: Duration,
    pub(crate) standing: PeerStanding,
    pub(crate) sent: u64,
    pub(crate) position: u64,
    pub(crate) sent_bytes: u64,
    pub(crate) operations: u64,
    pub(crate) heard: Duration,
    pub(crate) lag_operations: u64,
    pub(crate) lag: Duration,
    pub(crate) in_snapshot: bool,
}

/// What a node has applied, to compare followers with.
#[derive(Debug, Clone, Copy)]
struct Present {
    index: u64,
    time_ms: u64,
    lagging_after: Duration,
}

impl Present {
    fn of<N: OperatedNode>(node: &N) -> Self {
        /// As for members by default.
        const LAGGING_AFTER: Duration = Duration::from_secs(1);
        let (at, clock) = node.applied_clock();
        let index = at.map_or(0, |at| at.index);
        Self { index, time_ms: clock.log_time_ms(), lagging_after: LAGGING_AFTER }
    }
}

impl ListedFollower {
    fn report(&self, number: u64, present: Present) -> FollowerReport {
        let now = *self.now.lock().unwrap_or_else(PoisonError::into_inner);
        let lag_operations = present.index.saturating_sub(now.position);
        // For no longer than it is behind, and for no longer than what it lacks is old.
        let age = Duration::from_millis(present.time_ms.saturating_sub(now.time_ms));
        let behind = now.behind.map_or(Duration::ZERO, |since| since.elapsed());
        let lag = if lag_operations == 0 { Duration::ZERO } else { behind.min(age) };
        let standing = match lag_operations {
            _ if now.in_snapshot => PeerStanding::Syncing,
            lag if lag > SYNCING_OPERATIONS => PeerStanding::Syncing,
            _ if lag > present.lagging_after => PeerStanding::Lagging,
            _ => PeerStanding::Connected,
        };
        FollowerReport {
            number,
            name: self.name.clone(),
            transport: self.caller.transport,
            address: self.caller.address,
            filters: self.filters.clone(),
            serves: self.serves.get().cloned(),
            connected: self.since.elapsed(),
            standing,
            sent: now.sent,
            position: now.position,
            sent_bytes: now.sent_bytes,
            operations: now.operations,
            heard: now.heard.elapsed(),
            lag_operations,
            lag,
            in_snapshot: now.in_snapshot,
        }
    }
}

impl Subscribers {
    fn open(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<ListedFollower>>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.open().len()
    }

    /// What counts streams that are open.
    pub(super) fn gauge(&self) -> &Gauge {
        &self.0.gauge
    }

    /// What counts snapshots that are sent as files.
    pub(super) fn snapshot_gauge(&self) -> &Gauge {
        &self.0.snapshot_gauge
    }

    /// Those that are kept for followers.
    pub(super) fn kept_snapshots(&self) -> &Arc<KeptSnapshots> {
        &self.0.kept_snapshots
    }

    /// States that broke off.
    pub(super) fn kept_states(&self) -> &KeptStates {
        &self.0.kept_states
    }

    /// All of them, as far as `node` is.
    pub(crate) fn reports<N: OperatedNode>(&self, node: &N) -> Vec<FollowerReport> {
        let present = Present::of(node);
        self.open().iter().map(|(number, followed)| followed.report(*number, present)).collect()
    }

    /// Those that answer reads. One that has come back stands in the list twice until its old stream is noticed to be dead:
    /// the newest counts.
    pub(crate) fn replicas<N: OperatedNode>(&self, node: &N) -> Vec<ReplicaReport> {
        self.told(Present::of(node))
    }

    fn told(&self, present: Present) -> Vec<ReplicaReport> {
        let mut told: Vec<ReplicaReport> = Vec::new();
        let open = self.open();
        for (number, followed) in open.iter().rev() {
            let Some(serves) = followed.serves.get() else { continue };
            if told.iter().any(|other| other.client == *serves) {
                continue;
            }
            let report = followed.report(*number, present);
            told.push(ReplicaReport {
                client: serves.clone(),
                id: report.name,
                partial: !report.filters.is_empty(),
                lag_entries: report.lag_operations,
                lag: Some(report.lag),
                ..ReplicaReport::default()
            });
            if told.len() == MAX_TOLD_REPLICAS {
                break;
            }
        }
        told
    }

    /// One more, from position `from` on.
    pub(super) fn enter(
        &self,
        name: String,
        caller: FollowerCaller,
        filters: Vec<String>,
        from: u64,
    ) -> FollowerPlace {
        let now = Instant::now();
        let at = FollowerAt {
            sent: from,
            position: from,
            time_ms: 0,
            sent_bytes: 0,
            operations: 0,
            heard: now,
            behind: None,
            in_snapshot: false,
        };
        let followed = Arc::new(ListedFollower {
            name,
            caller,
            filters,
            serves: OnceLock::new(),
            since: now,
            now: Mutex::new(at),
        });
        let number = self.0.next.fetch_add(1, Relaxed);
        self.open().insert(number, followed.clone());
        FollowerPlace { list: self.clone(), number, followed }
    }

    /// The place of one that is sent a state.
    ///
    /// # Errors
    /// When all are taken.
    pub(super) fn snapshot_place(&self) -> Result<OwnedSemaphorePermit, Failure> {
        self.0.snapshots.clone().try_acquire_owned().map_err(|_| all_taken())
    }

    /// The same, once there is one, if that is within `patience`.
    ///
    /// # Errors
    /// When all are taken for so long.
    pub(super) async fn snapshot_place_within(
        &self,
        patience: Duration,
    ) -> Result<OwnedSemaphorePermit, Failure> {
        let place = timeout(patience, self.0.snapshots.clone().acquire_owned()).await;
        place.ok().and_then(Result::ok).ok_or_else(all_taken)
    }
}

fn all_taken() -> Failure {
    let message = format!(
        "this node sends its state to {MAX_SNAPSHOTS} followers already; try again, or at another node"
    );
    failure(Reason::LimitReached, message, false, None)
}

/// A follower's place in the list, for as long as its stream is open.
#[derive(Debug)]
pub(super) struct FollowerPlace {
    list: Subscribers,
    number: u64,
    followed: Arc<ListedFollower>,
}

impl FollowerPlace {
    /// It answers reads at `client`, which clients are told.
    pub(super) fn serves_at(&self, client: String) {
        // Said once, at its beginning.
        let _ = self.followed.serves.set(client);
    }

    /// Changes what is known of it.
    pub(super) fn update(&self, change: impl FnOnce(&mut FollowerAt)) {
        change(&mut self.followed.now.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// It was sent so much.
    pub(super) fn sent(&self, operations: u64, bytes: usize) {
        let bytes = bytes as u64;
        self.list.0.sent_bytes.fetch_add(bytes, Relaxed);
        self.update(|at| {
            at.operations += operations;
            at.sent_bytes += bytes;
        });
    }
}

impl Drop for FollowerPlace {
    fn drop(&mut self) {
        self.list.open().remove(&self.number);
    }
}

/// Metrics of all followers together: one of each would be too many.
pub(crate) struct SubscriberCollector<N> {
    pub(crate) node: N,
    pub(crate) subscribers: Subscribers,
}

impl<N> fmt::Debug for SubscriberCollector<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SubscriberCollector")
    }
}

impl<N: OperatedNode> Collector for SubscriberCollector<N> {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> EncodeResult {
        let (mut families, reports) = (Families(encoder), self.subscribers.reports(&self.node));
        families.gauge("quorate_subscribers_open", "Followers of this node", None, reports.len() as u64)?;
        let most = reports.iter().map(|report| report.lag_operations).max().unwrap_or_default();
        let help = "Operations that the follower lacks that is most behind";
        families.gauge("quorate_subscribers_lag_operations", help, None, most)?;
        let most = reports.iter().map(|report| report.lag).max().unwrap_or_default();
        let help = "For how long the follower is behind that is most so";
        families.gauge("quorate_subscribers_lag", help, Some(Unit::Seconds), most.as_secs_f64())?;
        let help = "Bytes of entries sent to followers, as messages";
        families.counter("quorate_subscribers_sent_bytes", help, self.subscribers.0.sent_bytes.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_follower_is_behind_for_no_longer_than_what_it_lacks_is_old() {
        let list = Subscribers::default();
        let caller = FollowerCaller { transport: "grpc", address: None };
        let place = list.enter("a".to_owned(), caller, Vec::new(), 100);
        let report = |index, time_ms| {
            let present = Present { index, time_ms, lagging_after: Duration::from_secs(1) };
            place.followed.report(place.number, present)
        };
        assert_eq!((report(100, 5).standing, report(100, 5).lag), (PeerStanding::Connected, Duration::ZERO));
        place.update(|at| (at.behind, at.time_ms) = (Some(Instant::now()), 10_000));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(report(105, 12_000).lag, Duration::from_secs(2));
        assert_eq!(report(105, 12_000).standing, PeerStanding::Lagging);
        assert_eq!(report(105, 60_000).lag, Duration::from_secs(5));
        assert_eq!(report(105, 10_500).standing, PeerStanding::Connected);
        assert_eq!(report(9_000, 10_500).standing, PeerStanding::Syncing);
        assert_eq!((list.count(), report(105, 1).lag_operations), (1, 5));
        drop(place);
        assert_eq!(list.count(), 0);
    }

    #[tokio::test]
    async fn clients_are_told_of_those_that_answer_reads_and_of_each_once() {
        let list = Subscribers::default();
        let enter = |name: &str, filters: &[&str]| {
            let filters = filters.iter().map(ToString::to_string).collect();
            list.enter(name.to_owned(), FollowerCaller { transport: "grpc", address: None }, filters, 0)
        };
        let (_plain, part) = (enter("plain", &[]), enter("part", &["t"]));
        part.serves_at("a:1".to_owned());
        let (old, new) = (enter("old", &[]), enter("new", &[]));
        old.serves_at("b:1".to_owned());
        new.serves_at("b:1".to_owned());
        let told = || {
            let told = list.told(Present { index: 7, time_ms: 0, lagging_after: Duration::ZERO });
            let told = told.into_iter().map(|replica| (replica.id, replica.partial, replica.lag_entries));
            told.collect::<Vec<_>>()
        };
        assert_eq!(told(), [("new".to_owned(), false, 7), ("part".to_owned(), true, 7)]);
        drop(new);
        assert_eq!(told()[0].0, "old");
        let many: Vec<_> = (0..100)
            .map(|number| {
                let place = enter("", &[]);
                place.serves_at(format!("c:{number}"));
                place
            })
            .collect();
        assert_eq!((told().len(), many.len()), (MAX_TOLD_REPLICAS, 100));
    }

    #[test]
    fn states_are_sent_to_few_at_a_time() {
        let list = Subscribers::default();
        let places: Vec<_> = (0..MAX_SNAPSHOTS).map(|_| list.snapshot_place().unwrap()).collect();
        assert_eq!(list.snapshot_place().unwrap_err().reason(), Reason::LimitReached);
        drop(places);
        drop(list.snapshot_place().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn a_place_is_waited_for_no_longer_than_it_may_take() {
        let (list, patience) = (Subscribers::default(), Duration::from_secs(1));
        let mut places: Vec<_> = (0..MAX_SNAPSHOTS).map(|_| list.snapshot_place().unwrap()).collect();
        let refused = list.snapshot_place_within(patience).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::LimitReached);
        let given_back = async {
            tokio::time::sleep(patience / 2).await;
            places.pop();
        };
        let (place, ()) = tokio::join!(list.snapshot_place_within(patience), given_back);
        let _place = place.unwrap();
        assert_eq!(list.snapshot_place().unwrap_err().reason(), Reason::LimitReached);
    }
}
