//! The way to a node's connection task.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::attempt::{AttemptError, Outcome, Way};
use super::config::ClientConfig;
use super::connection::{Call, Cluster, Connection};
use super::endpoint::Endpoint;
use super::frame::Frame;
use super::metrics::NodeMetrics;
use super::node::Node;
use crate::runtime;

/// The callers' end of a node's connection task. The task ends when its link is dropped.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) node: Arc<Node>,
    config: Arc<ClientConfig>,
    calls: mpsc::Sender<Call>,
    /// The other end, until the first call starts the task.
    unstarted: Mutex<Option<mpsc::Receiver<Call>>>,
    started: AtomicBool,
    in_flight: AtomicUsize,
}

/// Counts an attempt from here until it is dropped.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Link {
    pub(crate) fn new(endpoint: Endpoint, configured: bool, config: &Arc<ClientConfig>) -> Self {
        Self::to(Node::new(endpoint, configured, config), config)
    }

    pub(crate) fn to(node: Node, config: &Arc<ClientConfig>) -> Self {
        let (calls, queue) = mpsc::channel(config.queue_requests);
        Self {
            node: Arc::new(node),
            config: config.clone(),
            calls,
            unstarted: Mutex::new(Some(queue)),
            started: AtomicBool::new(false),
            in_flight: AtomicUsize::new(0),
        }
    }

    /// Makes one attempt. Answers by `expires`, give or take one sweep of the connection task. One that is bound to this
    /// node waits for it even if another could answer.
    pub(crate) async fn call<C: Cluster + 'static>(
        &self,
        cluster: &Arc<C>,
        frame: Frame,
        way: Way,
        expires: Instant,
    ) -> Outcome {
        if !self.started.load(Ordering::Acquire) {
            self.start(cluster);
        }
        let _counted = Counted::new(&self.in_flight);
        self.node.counted(self.ask(frame, way, expires)).await
    }

    async fn ask(&self, frame: Frame, way: Way, expires: Instant) -> Outcome {
        let (reply, answer) = oneshot::channel();
        let call = Call { frame, way, expires, reply };
        if let Err(refused) = self.calls.try_send(call) {
            match refused {
                mpsc::error::TrySendError::Full(call) => {
                    match timeout_at(expires, self.calls.send(call)).await {
                        Ok(Ok(())) => {}
                        Ok(Err(_)) => return Err(AttemptError::task_gone(false)),
                        Err(_) => return Err(AttemptError::Expired { sent: false }),
                    }
                }
                mpsc::error::TrySendError::Closed(_) => return Err(AttemptError::task_gone(false)),
            }
        }
        answer.await.unwrap_or_else(|_| Err(AttemptError::task_gone(true)))
    }

    pub(crate) fn metrics(&self) -> NodeMetrics {
        let node = &self.node;
        // Before `attempts`: what fails meanwhile must not make more failures than attempts.
        let failures = node.failures.load(Ordering::Relaxed);
        NodeMetrics {
            endpoint: node.endpoint.clone(),
            healthy: node.is_healthy(),
            in_flight: self.in_flight() as u64,
            round_trip: node.last_round_trip(),
            attempts: node.attempts.load(Ordering::Relaxed),
            failures,
        }
    }

    /// Attempts that wait for this node.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    #[cold]
    fn start<C: Cluster + 'static>(&self, cluster: &Arc<C>) {
        let unstarted = self.unstarted.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(queue) = unstarted {
            let cluster: Arc<dyn Cluster> = cluster.clone();
            let weak = Arc::downgrade(&cluster);
            let connection = Connection::new(self.node.clone(), queue, self.config.clone(), weak);
            drop(runtime::spawn(connection.run()));
            cluster.watch_health();
        }
        self.started.store(true, Ordering::Release);
    }
}
