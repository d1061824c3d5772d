//! What a client can be told before it starts: its limits and its patience.

use std::time::Duration;

use super::connector::Connector;
use super::endpoint::ConfigError;
use super::preference::ReadPreference;
use super::replicas::ReplicaReads;
use super::token::Token;
use crate::trust::client::ClientTls;

/// The shortest time after which the cluster closes a session that is not used.
pub(crate) const SESSION_TTL_MIN: Duration = Duration::from_secs(10);
/// The longest.
pub(crate) const SESSION_TTL_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Limits and patience of a [`Client`](super::Client). [`ClientConfig::default`] suits a cluster in one region.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientConfig {
    /// How long an operation may take, all retries included. Default 10 s.
    pub timeout: Duration,
    /// How long a read that any node can answer may take at the first node before it goes to another one; each further
    /// attempt may take twice as long as the one before. So it is with the beginning of a range stream. Default 1 s. Writes, and
    /// reads that only the leader answers, have no such limit: they leave a node that is lost, or known to lead no more.
    pub attempt_timeout: Duration,
    /// Whether writes are numbered in a session, which the client opens by itself, so that each is applied at
    /// most once and can be repeated after any failure. Default true.
    pub exactly_once: bool,
    /// Whether a write goes without a session when the cluster has no room for another one. Such a write is sent once: if its
    /// outcome is not known it [may have been applied](super::ClientError::maybe_applied), and is not sent again. Default
    /// false: it waits for room.
    pub without_session_when_full: bool,
    /// A session that is not used for this long is closed by the cluster; a new one is opened when it is needed.
    /// Default 10 min; from 10 s to 24 h.
    pub session_ttl: Duration,
    /// Which node answers reads that any node can answer. Without one, linearizable reads go to the leader,
    /// where they are cheapest, and others as [`ReadPreference::Any`] says.
    pub read_preference: Option<ReadPreference>,
    /// Which reads replicas may answer, too: those of which the members tell, and that are reached from here. Default: those at the levels
    /// `local` and `bounded`.
    pub replica_reads: ReplicaReads,
    /// How often every known node is asked whether it is ready, and who leads. Default 2 s.
    pub health_interval: Duration,
    /// How long connecting to one node may take. Default 1 s.
    pub connect_timeout: Duration,
    /// An operation gives up as [`Unavailable`](super::ClientError::Unavailable) when no known endpoint
    /// accepts a connection and it is older than this. Default 2 s; zero means after one round.
    pub unavailable_after: Duration,
    /// A request to the leader that waits for longer than this makes the client ask the other nodes who
    /// leads. Default 500 ms.
    pub stall_after: Duration,
    /// Interval of the HTTP/2 pings that find a hung node or a dead network path. Default 1 s.
    pub keep_alive_interval: Duration,
    /// How long a ping may stay unanswered before the connection counts as broken. Default 1 s.
    pub keep_alive_timeout: Duration,
    /// First pause between retries; doubled every time, half of it random. Default 5 ms.
    pub retry_backoff_min: Duration,
    /// Longest pause between retries. Default 250 ms.
    pub retry_backoff_max: Duration,
    /// Requests queued per node before callers wait. Default 4 096.
    pub queue_requests: usize,
    /// Requests in flight per node before callers wait. Default 65 536.
    pub in_flight_requests: usize,
    /// Most requests in one message. Default 1 024.
    pub batch_requests: usize,
    /// A message is closed when its requests exceed this. Default 1 MiB.
    pub batch_bytes: usize,
    /// Largest request; a larger one is refused before it is sent, because the server would close the stream
    /// over it, and with it fail everybody else's requests. Default 3 MiB.
    pub max_request_bytes: usize,
    /// How connections are made. Default: over TCP.
    pub connector: Connector,
    /// TLS on them. Default: none; nodes that speak it refuse such clients, and say so.
    pub tls: Option<ClientTls>,
    /// What it shows of itself to the nodes, with every call. Default: nothing.
    pub token: Option<Token>,
    /// Whether it only passes on calls of others, which whoever takes them does not pass on again.
    pub(crate) relays: bool,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(10),
            attempt_timeout: Duration::from_secs(1),
            exactly_once: true,
            without_session_when_full: false,
            session_ttl: Duration::from_secs(600),
            read_preference: None,
            replica_reads: ReplicaReads::default(),
            health_interval: Duration::from_secs(2),
            connect_timeout: Duration::from_secs(1),
            unavailable_after: Duration::from_secs(2),
            stall_after: Duration::from_millis(500),
            keep_alive_interval: Duration::from_secs(1),
            keep_alive_timeout: Duration::from_secs(1),
            retry_backoff_min: Duration::from_millis(5),
            retry_backoff_max: Duration::from_millis(250),
            queue_requests: 4096,
            in_flight_requests: 65_536,
            batch_requests: 1024,
            batch_bytes: 1024 * 1024,
            max_request_bytes: 3 * 1024 * 1024,
            connector: Connector::default(),
            tls: None,
            token: None,
            relays: false,
        }
    }
}

impl ClientConfig {
    /// Refuses settings that cannot work.
    ///
    /// # Errors
    /// [`ConfigError::Setting`] names the first setting that is out of its range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        /// Servers take no more in one message.
        const MAX_BATCH_REQUESTS: usize = 16_384;
        const MAX_BATCH_BYTES: usize = 1024 * 1024;
        /// Deadlines are points in time, which cannot be as late as a duration is long.
        const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
        let positive = [
            ("timeout", self.timeout),
            ("attempt_timeout", self.attempt_timeout),
            ("health_interval", self.health_interval),
            ("connect_timeout", self.connect_timeout),
            ("stall_after", self.stall_after),
            ("keep_alive_interval", self.keep_alive_interval),
            ("keep_alive_timeout", self.keep_alive_timeout),
            ("retry_backoff_min", self.retry_backoff_min),
            ("retry_backoff_max", self.retry_backoff_max),
        ];
        for (setting, value) in positive {
            if value.is_zero() {
                return Err(ConfigError::Setting { setting, rule: "must be longer than zero" });
            }
            if value > LONGEST {
                return Err(ConfigError::Setting { setting, rule: "must be a year at most" });
            }
        }
        if self.retry_backoff_max < self.retry_backoff_min {
            return Err(ConfigError::Setting {
                setting: "retry_backoff_max",
                rule: "must not be shorter than retry_backoff_min",
            });
        }
        if !(SESSION_TTL_MIN..=SESSION_TTL_MAX).contains(&self.session_ttl) {
            let rule = "must be from 10 s to 24 h";
            return Err(ConfigError::Setting { setting: "session_ttl", rule });
        }
        if self.batch_requests > MAX_BATCH_REQUESTS {
            return Err(ConfigError::Setting { setting: "batch_requests", rule: "must be at most 16384" });
        }
        if self.batch_bytes > MAX_BATCH_BYTES {
            return Err(ConfigError::Setting { setting: "batch_bytes", rule: "must be at most 1 MiB" });
        }
        let counts = [
            ("queue_requests", self.queue_requests),
            ("in_flight_requests", self.in_flight_requests),
            ("batch_requests", self.batch_requests),
            ("batch_bytes", self.batch_bytes),
            ("max_request_bytes", self.max_request_bytes),
        ];
        for (setting, value) in counts {
            if value == 0 {
                return Err(ConfigError::Setting { setting, rule: "must be at least 1" });
            }
        }
        if self.in_flight_requests > super::in_flight::MAX_SLOTS {
            return Err(ConfigError::Setting {
                setting: "in_flight_requests",
                rule: "must be at most 1048576",
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_cannot_work_are_refused() {
        assert!(ClientConfig::default().validate().is_ok());
        let broken: [fn(&mut ClientConfig); 6] = [
            |config| config.timeout = Duration::ZERO,
            |config| config.retry_backoff_max = Duration::from_millis(1),
            |config| config.batch_requests = 0,
            |config| config.session_ttl = Duration::from_secs(9),
            |config| config.health_interval = Duration::ZERO,
            |config| config.in_flight_requests = usize::MAX,
        ];
        for break_it in broken {
            let mut config = ClientConfig::default();
            break_it(&mut config);
            assert!(matches!(config.validate(), Err(ConfigError::Setting { .. })));
        }
    }
}
