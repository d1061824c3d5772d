//! What every command that talks to a cluster is told: where it is, how to speak to it, and how to print.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clap::Args;

use super::{CliError, Format};
use crate::duration;
use crate::kv::client::{
    Client, ClientConfig, ClientTls, ConfigError, Endpoint, KnownLeader, SESSION_TTL_MAX, SESSION_TTL_MIN,
    TrustError,
};
use crate::reason::Reason;

/// Options of every command that talks to a cluster.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Client addresses of some nodes, comma-separated; the others are found through them
    #[arg(
        long,
        global = true,
        env = "QUORATE_ENDPOINTS",
        value_name = "HOST:PORT,...",
        value_delimiter = ',',
        value_parser = Endpoint::parse,
        default_value = "127.0.0.1:7801,127.0.0.1:7802,127.0.0.1:7803"
    )]
    pub endpoints: Vec<Endpoint>,
    /// How results are printed
    #[arg(short, long, global = true, env = "QUORATE_OUTPUT", value_enum, default_value_t = Format::Table)]
    pub output: Format,
    /// How long an operation may take, such as 10s, 500ms or 1h30m; at most a year
    #[arg(
        long,
        global = true,
        env = "QUORATE_TIMEOUT",
        value_name = "TIME",
        value_parser = duration::parse,
        allow_hyphen_values = true,
        default_value = "10s"
    )]
    pub timeout: Duration,
    /// PEM file with the authorities whose certificates are believed of nodes; with it TLS is spoken
    #[arg(long, global = true, env = "QUORATE_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// PEM file with the certificate that is shown to nodes, and its chain
    #[arg(long, global = true, env = "QUORATE_TLS_CERT", value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file with the key of that
    #[arg(long, global = true, env = "QUORATE_TLS_KEY", value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// The client of the command, once it has one: a failure tells what it has learnt.
    #[arg(skip)]
    client: Arc<OnceLock<Client>>,
}

impl Common {
    /// A client for a command that does one thing: it does not wait for a cluster that is not there.
    pub(super) fn client(&self) -> Result<Client, CliError> {
        self.client_with(|config| {
            config.unavailable_after = Duration::ZERO;
            // One write needs no place among those who stay; if its outcome is not known, it says so.
            config.without_session_when_full = true;
            // Long enough for every attempt, and if this process is killed its session is not kept for long.
            let max = config.session_ttl.max(self.timeout).min(SESSION_TTL_MAX);
            config.session_ttl = self.timeout.saturating_mul(2).clamp(SESSION_TTL_MIN, max);
        })
    }

    /// Runs a writing command with a client of its own, whose session is closed whatever comes of it.
    pub(super) async fn with_client(
        &self,
        command: impl AsyncFnOnce(&Client) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let client = self.client()?;
        let outcome = command(&client).await;
        client.close().await;
        outcome
    }

    /// TLS towards nodes, if it is asked for.
    pub(super) fn tls(&self) -> Result<Option<ClientTls>, ConfigError> {
        let refuse = |why: &str| Err(TrustError::Settings(why.to_owned()).into());
        match (&self.tls_ca, &self.tls_cert, &self.tls_key) {
            (None, None, None) => Ok(None),
            (Some(ca), None, None) => Ok(Some(ClientTls::with_ca(ca)?)),
            (Some(ca), Some(certificate), Some(key)) => {
                Ok(Some(ClientTls::with_certificate(ca, certificate, key)?))
            }
            (None, ..) => {
                refuse("--tls-cert and --tls-key are shown to nodes that are believed; give --tls-ca, too")
            }
            (Some(_), ..) => refuse("--tls-cert and --tls-key belong together; give both, or neither"),
        }
    }

    /// Who leads, to be told with a failure. A program is told even where that costs a question.
    pub(super) async fn leader(&self, error: &CliError) -> Option<KnownLeader> {
        const PATIENCE: Duration = Duration::from_secs(1);
        let client = self.client.get()?;
        match (self.output, error.reason()) {
            // It has been asked for all the time.
            (_, Reason::Unreachable | Reason::DeadlineExceeded | Reason::NoQuorum) | (Format::Table, _) => {
                client.known_leader()
            }
            (Format::Json, _) => client.find_leader(PATIENCE.min(self.timeout)).await,
        }
    }

    pub(super) fn client_with(&self, change: impl FnOnce(&mut ClientConfig)) -> Result<Client, CliError> {
        let mut config = ClientConfig { timeout: self.timeout, ..ClientConfig::default() };
        config.tls = self.tls()?;
        change(&mut config);
        let client = Client::new(self.endpoints.iter().map(Endpoint::as_str), config)?;
        // A command makes one.
        let _ = self.client.set(client.clone());
        Ok(client)
    }
}
