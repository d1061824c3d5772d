//! Changes that come to a replica, passed on to whoever leads.
//!
//! Over connections of its own, so that what it is told and what it passes on do not wait for each other. Where the leader is it finds out as any
//! client does, from the sources that the replica follows at present.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use super::ReplicaConfig;
use crate::client::{Client, ClientConfig};
use crate::door::failure::failure;
use crate::door::relay::{Relay, RelayedOutcome};
use crate::proto::v1::{self, Failure};
use crate::reason::Reason;

/// For how long the leader is looked for and waited for. What a write asks for by itself, the time for which the slowest voter is waited for, comes on top.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest time that a write may ask for.
const LONGEST_ACK: Duration = Duration::from_secs(60);
/// Most calls on their way.
const MOST_CALLS: usize = 16_384;
/// Most bytes of them.
const MOST_BYTES: u32 = 64 * 1024 * 1024;
/// Largest call: what the largest command takes, with room for what surrounds it.
const MOST_CALL_BYTES: usize = 6 * 1024 * 1024;

/// See the [module](self).
pub(super) struct LeaderRelay {
    config: watch::Receiver<ReplicaConfig>,
    /// The client at present, and the sources that it was made with.
    client: Mutex<Option<(Vec<String>, Client)>>,
    calls: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    passed_on: AtomicU64,
}

impl LeaderRelay {
    /// Of a replica with this `config`.
    pub(super) fn new(config: watch::Receiver<ReplicaConfig>) -> Self {
        Self {
            config,
            client: Mutex::default(),
            calls: Arc::new(Semaphore::new(MOST_CALLS)),
            bytes: Arc::new(Semaphore::new(MOST_BYTES as usize)),
            passed_on: AtomicU64::new(0),
        }
    }

    /// Calls that were passed on since the replica was started.
    pub(super) fn passed_on(&self) -> u64 {
        self.passed_on.load(Ordering::Relaxed)
    }

    fn client(&self) -> Result<Client, Failure> {
        let (sources, tls, token) = {
            let config = self.config.borrow();
            (config.sources.clone(), config.tls.clone(), config.token.clone())
        };
        let mut current = self.client.lock().expect("invariant: no panic under this lock");
        if let Some((_, client)) = current.as_ref().filter(|(known, _)| *known == sources) {
            return Ok(client.clone());
        }
        let config = ClientConfig {
            relays: true,
            max_request_bytes: MOST_CALL_BYTES,
            tls,
            token,
            ..ClientConfig::default()
        };
        let refused = |error| failure(Reason::NotLeader, format!("{error}"), false, None);
        let client = Client::new(&sources, config).map_err(refused)?;
        *current = Some((sources, client.clone()));
        Ok(client)
    }

    async fn pass_on(&self, call: v1::Call, within: Option<Duration>) -> Result<v1::Answer, Failure> {
        let bytes = u32::try_from(prost::Message::encoded_len(&call)).unwrap_or(u32::MAX);
        let places = (self.calls.try_acquire(), self.bytes.try_acquire_many(bytes.min(MOST_BYTES)));
        let (Ok(_call), Ok(_bytes)) = places else {
            let message = format!(
                "this replica passes on {MOST_CALLS} calls and {MOST_BYTES} bytes of them at a time; send it again a little later, or to the leader"
            );
            return Err(failure(Reason::Overloaded, message, false, None));
        };
        let asked = call.write.as_ref().map_or(0, |write| write.ack_timeout_ms);
        let patience = PATIENCE + Duration::from_millis(asked).min(LONGEST_ACK);
        let expires = Instant::now() + within.map_or(patience, |within| within.min(patience));
        self.passed_on.fetch_add(1, Ordering::Relaxed);
        self.client()?.relay(&call, expires).await
    }
}

impl Relay for LeaderRelay {
    fn relay(self: Arc<Self>, call: v1::Call, within: Option<Duration>) -> RelayedOutcome {
        Box::pin(async move { self.pass_on(call, within).await })
    }
}
