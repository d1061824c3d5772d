//! One node as the client sees it: what is known of it.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tonic::transport::Channel;

use super::attempt::describe;
use super::config::ClientConfig;
use super::connector::Connector;
use super::endpoint::Endpoint;
use super::replicas::KnownReplica;
use super::token::{NodeChannel, Token};
use crate::proto::details;
use crate::proto::v1::{self, admin_client::AdminClient};
use crate::report::NodeReport;
use crate::shown::Shown;
use crate::trust::client::ClientTls;
use crate::types::NodeId;

/// HTTP/2 window of one stream: far more than a round trip's worth of answers.
const STREAM_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// HTTP/2 window of the whole connection.
const CONNECTION_WINDOW_BYTES: u32 = 32 * 1024 * 1024;
/// HTTP/2 window of a watch or a range stream. Whoever does not read it holds up to this much, and no more.
const SIDE_STREAM_WINDOW_BYTES: u32 = 1024 * 1024;
/// HTTP/2 window of the connection of watches and range streams: so large that only their own windows stop
/// them, and one that is not read does not stop the others.
const SIDE_CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024 * 1024;
/// Largest HTTP/2 frame the server may send: a message of many answers needs few frames.
const FRAME_BYTES: u32 = 1024 * 1024;
/// The same of watches and range streams, the smallest there is. A connection counts as alive while frames come: on a slow line a large one
/// takes longer than a sign of life may.
const SIDE_FRAME_BYTES: u32 = 16 * 1024;
/// How long the answer to a ping may take there, behind all that is on its way. That a node is gone is found by probes before that.
const SIDE_KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long an address that only other nodes have told, and that was tried in vain, is not tried again on their word.
const MISSED_FOR: Duration = Duration::from_secs(3);

const UNTRIED: u8 = 0;
const UP: u8 = 1;
const DOWN: u8 = 2;

/// What is known of a node. Shared by the router, the connection task and the probes.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) endpoint: Endpoint,
    /// Given by the user, hence never forgotten.
    pub(crate) configured: bool,
    pub(super) replica: KnownReplica,
    transport: tonic::transport::Endpoint,
    connector: Connector,
    tls: Option<ClientTls>,
    token: Option<Token>,
    keep_alive_timeout: Duration,
    channel: OnceLock<Channel>,
    /// For watches and range streams, which may stand still: apart from the pipeline, so that it never waits for them.
    side_channel: OnceLock<Channel>,
    /// [`UNTRIED`], [`UP`] or [`DOWN`].
    health: AtomicU8,
    last_failure: Mutex<Option<Arc<str>>>,
    /// Whether it has answered anything since it last failed to.
    reached: AtomicBool,
    /// Whether it has ever answered anything.
    answered: AtomicBool,
    /// Whether it took no requests when it was last connected to.
    refusing: AtomicBool,
    /// Whether it is a node of another cluster, as it said last.
    stranger: AtomicBool,
    /// Whether it was asked in vain, when that was last.
    missed: Mutex<Option<Instant>>,
    /// Whether another node says that it leads, and it has not been reached since.
    pub(crate) hinted: AtomicBool,
    /// Notified when a probe of it has ended.
    pub(crate) probed: Notify,
    /// Whether it answered the last question about itself, and said that it was ready.
    ready: AtomicBool,
    round_trip: RoundTrip,
    pub(super) attempts: AtomicU64,
    pub(super) failures: AtomicU64,
    /// Notified when a probe has reached the node although it counts as down.
    pub(crate) revived: Notify,
    /// Its id once it has told; 0 before.
    node_id: AtomicU64,
    /// Whether a probe of it is under way.
    pub(crate) asking: AtomicBool,
}

impl Node {
    pub(super) fn new(endpoint: Endpoint, configured: bool, config: &ClientConfig) -> Self {
        let transport = tonic::transport::Endpoint::from_shared(format!("http://{endpoint}"))
            .expect("invariant: Endpoint::parse accepts nothing that is not an authority")
            .tcp_nodelay(true)
            .connect_timeout(config.connect_timeout)
            .http2_keep_alive_interval(config.keep_alive_interval)
            .keep_alive_timeout(config.keep_alive_timeout)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES);
        Self {
            endpoint,
            configured,
            replica: KnownReplica::default(),
            transport,
            connector: config.connector.clone(),
            tls: config.tls.clone(),
            token: config.token.clone(),
            keep_alive_timeout: config.keep_alive_timeout,
            channel: OnceLock::new(),
            side_channel: OnceLock::new(),
            health: AtomicU8::new(UNTRIED),
            last_failure: Mutex::new(None),
            reached: AtomicBool::new(false),
            answered: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            stranger: AtomicBool::new(false),
            missed: Mutex::new(None),
            hinted: AtomicBool::new(false),
            probed: Notify::new(),
            // Until it says otherwise: a client that has just been made must not wait for probes.
            ready: AtomicBool::new(true),
            round_trip: RoundTrip::default(),
            attempts: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            revived: Notify::new(),
            node_id: AtomicU64::new(0),
            asking: AtomicBool::new(false),
        }
    }

    /// The same of one that a member has told of as a replica.
    pub(super) fn announced(endpoint: Endpoint, config: &ClientConfig) -> Self {
        Self { replica: KnownReplica::announced(), ..Self::new(endpoint, false, config) }
    }

    /// The transport to this node; connects when it is used, and again after a break.
    pub(crate) fn channel(&self) -> NodeChannel {
        let connect = || self.connector.connect_lazy(&self.transport, self.tls.as_ref());
        NodeChannel::new(self.channel.get_or_init(connect).clone(), self.token.clone())
    }

    /// The same for calls whose answers may not be read for a while.
    pub(crate) fn side_channel(&self) -> NodeChannel {
        let connect = || {
            let patience = self.keep_alive_timeout.max(SIDE_KEEP_ALIVE_TIMEOUT);
            let transport = self
                .transport
                .clone()
                .initial_stream_window_size(SIDE_STREAM_WINDOW_BYTES)
                .initial_connection_window_size(SIDE_CONNECTION_WINDOW_BYTES)
                .max_frame_size(SIDE_FRAME_BYTES)
                .keep_alive_timeout(patience);
            self.connector.connect_lazy(&transport, self.tls.as_ref())
        };
        NodeChannel::new(self.side_channel.get_or_init(connect).clone(), self.token.clone())
    }

    /// Whether it can be reached and is ready, as far as is known.
    pub(crate) fn is_healthy(&self) -> bool {
        !self.is_down() && self.ready.load(Ordering::Relaxed) && self.is_usable()
    }

    /// Whether requests may be sent to it: the user has named its address, or it has answered there. An address that
    /// only other nodes have told may lead nowhere from here, and is tried with a probe first.
    pub(crate) fn is_usable(&self) -> bool {
        (self.configured || self.is_reached()) && !self.is_stranger()
    }

    /// Whether it is a node of another cluster, as it said last.
    pub(crate) fn is_stranger(&self) -> bool {
        self.stranger.load(Ordering::Relaxed)
    }

    /// It belongs to this cluster, as it says, or to the one with another name.
    pub(crate) fn note_cluster(&self, other: Option<&str>) {
        if let Some(name) = other {
            self.note_unready(format!("a node of the cluster \"{}\" answers there", Shown(name)).into());
        }
        self.stranger.store(other.is_some(), Ordering::Relaxed);
    }

    /// Whether it has answered, and has not failed to since.
    pub(crate) fn is_reached(&self) -> bool {
        self.reached.load(Ordering::Relaxed)
    }

    /// Whether it was asked in vain a short while ago.
    pub(crate) fn was_missed(&self) -> bool {
        let missed = self.missed.lock().unwrap_or_else(PoisonError::into_inner);
        missed.is_some_and(|at| at.elapsed() < MISSED_FOR)
    }

    /// Whether anything was ever heard from it.
    pub(crate) fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// It has answered.
    pub(crate) fn note_reached(&self) {
        self.answered.store(true, Ordering::Relaxed);
        if !self.reached.swap(true, Ordering::Relaxed) {
            *self.missed.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// It was asked in vain.
    pub(crate) fn note_missed(&self, why: Arc<str>) {
        *self.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        *self.missed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        self.reached.store(false, Ordering::Relaxed);
    }

    /// A call beside the pipeline was not answered: other nodes are preferred until a probe is.
    pub(crate) fn note_unready(&self, why: Arc<str>) {
        self.note_missed(why);
        self.ready.store(false, Ordering::Relaxed);
    }

    pub(crate) fn round_trip(&self) -> Option<Duration> {
        self.round_trip.average()
    }

    pub(super) fn last_round_trip(&self) -> Option<Duration> {
        self.round_trip.last()
    }

    /// Counts `attempt`, and whether it brought an answer.
    pub(crate) async fn counted<T, E>(&self, attempt: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        self.attempts.fetch_add(1, Ordering::Relaxed);
        let outcome = attempt.await;
        if outcome.is_err() {
            self.failures.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    pub(crate) fn is_down(&self) -> bool {
        self.health.load(Ordering::Relaxed) == DOWN
    }

    pub(crate) fn set_untried(&self) {
        self.health.store(UNTRIED, Ordering::Relaxed);
    }

    pub(crate) fn set_up(&self) {
        self.note_reached();
        self.health.store(UP, Ordering::Relaxed);
    }

    pub(crate) fn set_down(&self, why: Arc<str>) {
        self.note_missed(why);
        self.health.store(DOWN, Ordering::Relaxed);
    }

    /// It answers, and takes no requests at present.
    pub(crate) fn set_refusing(&self, why: Arc<str>) {
        self.note_refusal(why);
        self.set_untried();
        self.refusing.store(true, Ordering::Relaxed);
    }

    /// It has answered that it takes no requests at present.
    fn note_refusal(&self, why: Arc<str>) {
        self.note_reached();
        *self.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        self.ready.store(false, Ordering::Relaxed);
    }

    /// Why it could not be reached the last time.
    pub(crate) fn last_failure(&self) -> String {
        let failure = self.last_failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.as_deref().unwrap_or("no answer").to_owned()
    }

    /// Whether it was ever asked in vain.
    pub(crate) fn has_failed(&self) -> bool {
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    pub(crate) fn node_id(&self) -> Option<NodeId> {
        Some(self.node_id.load(Ordering::Relaxed)).filter(|node_id| *node_id != 0)
    }

    /// Asks the node what it knows of itself and its cluster. Its health is known better afterwards.
    pub(crate) async fn status(&self, patience: Duration) -> Result<NodeReport, NoStatus> {
        let mut admin = AdminClient::new(self.channel());
        let asked = Instant::now();
        match timeout(patience, admin.status(v1::StatusRequest {})).await {
            Ok(Ok(answer)) => {
                let status = NodeReport::decode(answer.into_inner());
                self.node_id.store(status.node_id, Ordering::Relaxed);
                self.replica.heard(&status);
                self.round_trip.measured(asked.elapsed());
                self.ready.store(status.ready, Ordering::Relaxed);
                self.note_reached();
                if self.refusing.swap(false, Ordering::Relaxed) || self.is_down() {
                    self.revived.notify_one();
                }
                Ok(status)
            }
            Ok(Err(status)) => {
                if let Some(failure) = details::failure(status.details()) {
                    self.note_refusal(failure.message.as_str().into());
                    return Err(NoStatus::Refused(failure));
                }
                let why = describe(&status);
                // One that answers, if only that it does not know the question, is there.
                match status.code() {
                    tonic::Code::Unimplemented => {
                        self.ready.store(true, Ordering::Relaxed);
                        self.note_reached();
                    }
                    _ => self.note_unready(why.clone()),
                }
                Err(NoStatus::Unanswered(why))
            }
            Err(_) => {
                let why: Arc<str> = format!("no answer within {} ms", patience.as_millis()).into();
                self.note_unready(why.clone());
                Err(NoStatus::Unanswered(why))
            }
        }
    }
}

/// Why a node has not told its status.
#[derive(Debug)]
pub(crate) enum NoStatus {
    /// It answers, and says why not.
    Refused(v1::Failure),
    /// No node answers there, or not in time.
    Unanswered(Arc<str>),
}

/// The average of round trips, the newer the weightier.
#[derive(Debug, Default)]
struct RoundTrip {
    last_us: AtomicU64,
    average_us: AtomicU64,
    samples: AtomicU64,
}

impl RoundTrip {
    /// A new sample counts as one part in this many.
    const WEIGHT: u64 = 4;

    /// The first round trip includes connecting, so the second one takes its place.
    fn measured(&self, sample: Duration) {
        let sample_us = u64::try_from(sample.as_micros()).unwrap_or(u64::MAX).max(1);
        let average_us = match self.samples.fetch_add(1, Ordering::Relaxed) {
            0 | 1 => sample_us,
            _ => {
                let average_us = self.average_us.load(Ordering::Relaxed);
                average_us - average_us / Self::WEIGHT + sample_us / Self::WEIGHT
            }
        };
        self.average_us.store(average_us, Ordering::Relaxed);
        self.last_us.store(sample_us, Ordering::Relaxed);
    }

    fn last(&self) -> Option<Duration> {
        Some(self.last_us.load(Ordering::Relaxed)).filter(|us| *us != 0).map(Duration::from_micros)
    }

    fn average(&self) -> Option<Duration> {
        Some(self.average_us.load(Ordering::Relaxed)).filter(|us| *us != 0).map(Duration::from_micros)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_round_trip_does_not_count_once_there_is_another() {
        let round_trip = RoundTrip::default();
        assert_eq!((round_trip.average(), round_trip.last()), (None, None));
        let measured = [900, 100, 100, 500].map(|ms| {
            round_trip.measured(Duration::from_millis(ms));
            round_trip.average().unwrap().as_millis()
        });
        assert_eq!(measured, [900, 100, 100, 200]);
        assert_eq!(round_trip.last(), Some(Duration::from_millis(500)));
    }
}
