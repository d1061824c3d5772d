//! One node as the client sees it: what is known of it, and the way to its connection task.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout, timeout_at};
use tonic::transport::Channel;

use super::config::{ClientConfig, Endpoint};
use super::connection::{AttemptError, Call, Connection, Outcome, describe};
use super::request::Kind;
use super::router::Router;
use crate::proto::v1::{self, admin_client::AdminClient, tagged_request};
use crate::runtime;
use crate::types::NodeId;

/// HTTP/2 window of one stream: far more than a round trip's worth of answers.
const STREAM_WINDOW_BYTES: u32 = 16 * 1024 * 1024;
/// HTTP/2 window of the whole connection.
const CONNECTION_WINDOW_BYTES: u32 = 32 * 1024 * 1024;
/// Largest HTTP/2 frame the server may send: a message of many answers needs few frames.
const FRAME_BYTES: u32 = 1024 * 1024;

const UNTRIED: u8 = 0;
const UP: u8 = 1;
const DOWN: u8 = 2;

/// What is known of a node. Shared by the router, the connection task and the probes.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) endpoint: Endpoint,
    /// Given by the user, hence never forgotten.
    pub(super) configured: bool,
    transport: tonic::transport::Endpoint,
    channel: OnceLock<Channel>,
    /// [`UNTRIED`], [`UP`] or [`DOWN`].
    health: AtomicU8,
    last_failure: Mutex<Option<Arc<str>>>,
    /// Its id once it has told; 0 before.
    node_id: AtomicU64,
    /// Whether a probe of it is under way.
    pub(super) asking: AtomicBool,
}

impl Node {
    fn new(endpoint: Endpoint, configured: bool, config: &ClientConfig) -> Self {
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
            transport,
            channel: OnceLock::new(),
            health: AtomicU8::new(UNTRIED),
            last_failure: Mutex::new(None),
            node_id: AtomicU64::new(0),
            asking: AtomicBool::new(false),
        }
    }

    /// The transport to this node; connects when it is used, and again after a break.
    pub(super) fn channel(&self) -> Channel {
        self.channel.get_or_init(|| self.transport.connect_lazy()).clone()
    }

    pub(super) fn is_down(&self) -> bool {
        self.health.load(Ordering::Relaxed) == DOWN
    }

    pub(super) fn set_untried(&self) {
        self.health.store(UNTRIED, Ordering::Relaxed);
    }

    pub(super) fn set_up(&self) {
        self.health.store(UP, Ordering::Relaxed);
    }

    pub(super) fn set_down(&self, why: Arc<str>) {
        *self.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        self.health.store(DOWN, Ordering::Relaxed);
    }

    /// Why it could not be reached the last time.
    pub(super) fn last_failure(&self) -> String {
        let failure = self.last_failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.as_deref().unwrap_or("not tried").to_owned()
    }

    pub(super) fn node_id(&self) -> Option<NodeId> {
        Some(self.node_id.load(Ordering::Relaxed)).filter(|node_id| *node_id != 0)
    }

    /// Asks the node what it knows of itself and its cluster.
    pub(super) async fn status(&self, patience: Duration) -> Result<v1::StatusResponse, Arc<str>> {
        let mut admin = AdminClient::new(self.channel());
        match timeout(patience, admin.status(v1::StatusRequest {})).await {
            Ok(Ok(answer)) => {
                let status = answer.into_inner();
                self.node_id.store(status.node_id, Ordering::Relaxed);
                Ok(status)
            }
            Ok(Err(status)) => Err(describe(&status)),
            Err(_) => Err(format!("no answer within {} ms", patience.as_millis()).into()),
        }
    }
}

/// The callers' end of a node's connection task. The task ends when its link is dropped.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) node: Arc<Node>,
    calls: mpsc::Sender<Call>,
    /// The other end, until the first call starts the task.
    unstarted: Mutex<Option<mpsc::Receiver<Call>>>,
    started: AtomicBool,
}

impl Link {
    pub(super) fn new(endpoint: Endpoint, configured: bool, config: &ClientConfig) -> Self {
        let (calls, queue) = mpsc::channel(config.queue_requests);
        Self {
            node: Arc::new(Node::new(endpoint, configured, config)),
            calls,
            unstarted: Mutex::new(Some(queue)),
            started: AtomicBool::new(false),
        }
    }

    /// Makes one attempt. Answers by `expires`, give or take one sweep of the connection task.
    pub(super) async fn call(
        &self,
        router: &Arc<Router>,
        request: tagged_request::Request,
        kind: Kind,
        expires: Instant,
    ) -> Outcome {
        if !self.started.load(Ordering::Acquire) {
            self.start(router);
        }
        let (reply, answer) = oneshot::channel();
        let call = Call { request, kind, expires, reply };
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

    #[cold]
    fn start(&self, router: &Arc<Router>) {
        let unstarted = self.unstarted.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(queue) = unstarted {
            let connection = Connection::new(self.node.clone(), queue, router);
            drop(runtime::spawn(connection.run()));
        }
        self.started.store(true, Ordering::Release);
    }
}
