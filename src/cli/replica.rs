//! `quorate replica`: a copy of the state outside the quorum, in this process, until it is told to stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Common;
use super::follow::FilterArgs;
use super::serve::{ServeCommandError, credentials, log_to_stderr};
use crate::config::{GivenSettings, LogFormat, ReplicaWishes, ServeConfig, SettingsError};
use crate::duration;
use crate::error::OpenError;
use crate::incoming;
use crate::kv::client::Endpoint;
use crate::kv::machine::KvMachine;
use crate::kv::{self, Kv};
use crate::node::settings::parse_filter;
use crate::node::{RunError, Server};
use crate::replica::{LONGEST_PAUSE, Replica, ReplicaConfig, ReplicaNode, ReplicaState};
use crate::report::millis;
use crate::signals::StopSignals;

/// Arguments of `quorate replica`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate replica --data-dir /var/lib/quorate-replica --listen 127.0.0.1:7811\n  quorate get greeting --endpoints 127.0.0.1:7811 --local\n  quorate replica --from 10.0.0.1:7801,10.0.0.2:7801 --tenant acme --data-dir acme\n  quorate replica --config replica.yaml --forward-writes\n\nFollows what is applied and answers reads; writes are refused, and who leads is named, unless it forwards them. Clients of its sources read there, too, unless --tenant or --collection leaves it a part of the state. Goes on where it was after a restart, and at another source when one fails. A replica that was away for longer than any source reaches back is sent the whole state. http://LISTEN/replication/status shows how it stands (`replica`)."
)]
pub struct ReplicaArgs {
    /// File with settings, TOML or YAML by its extension; flags take precedence
    ///
    /// As that of a node, of which a replica has data_dir, client_listen, log_level, log_format, event_log_* and what bounds clients. The
    /// section `replication` is what other systems call their settings; the log says at the start what became of each.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Client addresses of members, comma-separated [default: --endpoints]
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',', value_parser = Endpoint::parse)]
    pub from: Vec<Endpoint>,
    /// Where it keeps its state; to be given here or in the file
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// Where it listens for clients; port 0 takes a free one [default: 127.0.0.1:7811]
    #[arg(long, value_name = "HOST:PORT")]
    pub listen: Option<String>,
    /// Where clients reach it, which its sources tell them [default: --listen]
    #[arg(long, value_name = "HOST:PORT", value_parser = Endpoint::parse)]
    pub advertise: Option<Endpoint>,
    /// File that says who may do what at it, as that of a node
    #[arg(long, value_name = "FILE")]
    pub tokens_file: Option<PathBuf>,
    /// File of the keys that sign tokens, as that of a node
    #[arg(long, value_name = "FILE")]
    pub jwt_keys: Option<PathBuf>,
    /// Listen on another address than a loopback one although whoever reaches it may read everything
    #[arg(long)]
    pub insecure: bool,
    /// What its sources call it where they list those who follow
    #[arg(long, value_name = "NAME", default_value = "")]
    pub id: String,
    /// What it follows
    #[command(flatten)]
    pub filters: FilterArgs,
    /// How often it tries to reach its sources in vain before it ends; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub retries: u32,
    /// How often a source is to say that it is there [default: 5s]
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    pub heartbeat: Option<Duration>,
    /// How long all sources may be silent before it begins anew with them [default: 30s]
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    pub patience: Option<Duration>,
    /// How long it waits before it tries its sources again; twice as long every time, up to 60s [default: 1s]
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    pub first_pause: Option<Duration>,
    /// Pass writes and sessions on to the leader, instead of naming it
    ///
    /// What becomes of a write is told as the leader tells it, session and sequence are the caller's.
    #[arg(long)]
    pub forward_writes: bool,
    /// Most bytes of a whole state that it is sent in a second, at least 65536; 0 for no limit
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub state_bytes_per_second: u64,
    /// Have what it is told compressed on the way
    #[arg(long)]
    pub compress: bool,
    /// PEM file with the authorities whose certificates are believed of its clients; with --tls-cert, its port speaks TLS
    #[arg(long, value_name = "FILE")]
    pub tls_client_ca: Option<PathBuf>,
    /// What to log: off, error, warn, info, debug, trace, or a filter such as info,quorate=debug [default: info]
    #[arg(long, value_name = "FILTER", value_parser = filter)]
    pub log_level: Option<String>,
    /// How lines of the log look [default: text]
    #[arg(long, value_name = "FORMAT", value_enum)]
    pub log_format: Option<LogFormat>,
}

fn filter(text: &str) -> Result<String, String> {
    parse_filter(text).map(|_| text.to_owned())
}

/// What a process needs to know to be a replica.
pub(super) struct ReplicaRun {
    /// Its port, its log and its event log.
    serve: ServeConfig,
    replica: ReplicaConfig,
    forwards_writes: bool,
}

impl ReplicaArgs {
    /// What these say, and the file, and names that others have for it.
    fn resolve(self, common: &Common) -> Result<ReplicaRun, SettingsError> {
        let own = GivenSettings {
            data_dir: self.data_dir,
            tokens_file: self.tokens_file,
            jwt_keys: self.jwt_keys,
            insecure: self.insecure.then_some(true),
            client_listen: self.listen,
            client_advertise: self.advertise.map(|given| given.to_string()),
            log_level: self.log_level,
            log_format: self.log_format,
            // What it shows to its sources it shows to its clients, too.
            tls_cert: common.tls_cert.clone(),
            tls_key: common.tls_key.clone(),
            tls_client_ca: self.tls_client_ca,
            ..GivenSettings::default()
        };
        let usual = GivenSettings {
            client_listen: Some("127.0.0.1:7811".to_owned()),
            log_level: Some("info".to_owned()),
            ..GivenSettings::default()
        };
        let mut serve = ServeConfig::load_replica(own, usual, self.config.as_deref())?;
        let mut wishes = serve.translation.replica.clone().unwrap_or_default();
        let mut own_wins = |name, flag, is_given: bool| {
            if is_given {
                serve.translation.overrule(name, flag);
            }
            is_given
        };
        if own_wins("master_address", "--from", !self.from.is_empty()) {
            wishes.sources = self.from.iter().map(ToString::to_string).collect();
        } else if wishes.sources.is_empty() {
            wishes.sources = common.endpoints.iter().map(ToString::to_string).collect();
        }
        for (name, flag, given, place) in [
            ("heartbeat_interval_secs", "--heartbeat", self.heartbeat, &mut wishes.heartbeat),
            ("replica_timeout_secs", "--patience", self.patience, &mut wishes.patience),
            ("reconnect_interval_secs", "--first-pause", self.first_pause, &mut wishes.first_pause),
        ] {
            if own_wins(name, flag, given.is_some()) {
                *place = given;
            }
        }
        let mut run = ReplicaRun::of(serve, wishes)?;
        run.replica.id = self.id;
        run.replica.filters = self.filters.filters;
        run.replica.retries = (self.retries != 0).then_some(self.retries);
        run.replica.compressed = self.compress;
        run.replica.state_bytes_per_second = self.state_bytes_per_second;
        let tls = common.tls().map_err(|error| SettingsError::Invalid(error.to_string()))?;
        run.replica.tls = tls.or(run.replica.tls);
        run.forwards_writes = self.forward_writes;
        run.showing(common)
    }
}

impl ReplicaRun {
    /// One that follows as `wishes` say, with the usual for what they leave open.
    pub(super) fn of(serve: ServeConfig, wishes: ReplicaWishes) -> Result<Self, SettingsError> {
        let ReplicaWishes { sources, heartbeat, patience, first_pause } = wishes;
        let mut replica = ReplicaConfig::new(sources, &serve.data_dir);
        replica.heartbeat = heartbeat.unwrap_or(replica.heartbeat);
        replica.patience = patience.unwrap_or(replica.patience);
        replica.first_pause = first_pause.unwrap_or(replica.first_pause);
        replica.event_log = serve.event_log;
        let invalid = |message: String| Err(SettingsError::Invalid(message));
        if replica.first_pause > LONGEST_PAUSE {
            return invalid("--first-pause must be 60 s at most".to_owned());
        }
        if replica.patience <= replica.heartbeat {
            return invalid(format!(
                "a source is given up after {} s of silence (--patience), and says only every {} s that it is there (--heartbeat); have the one be longer than the other",
                replica.patience.as_secs_f64(),
                replica.heartbeat.as_secs_f64()
            ));
        }
        Ok(Self { serve, replica, forwards_writes: false })
    }

    /// The same, which shows the token of `common` to its sources.
    pub(super) fn showing(mut self, common: &Common) -> Result<Self, SettingsError> {
        self.replica.token = common.token().map_err(|error| SettingsError::Invalid(error.to_string()))?;
        Ok(self)
    }

    /// What only a restart changes, for those who ask a running replica.
    fn fixed(&self) -> Vec<(&'static str, Value)> {
        let Self { serve, replica, forwards_writes } = self;
        vec![
            ("data_dir", serve.data_dir.display().to_string().into()),
            ("client_listen", serve.client_listen.clone().into()),
            ("patience_ms", millis(replica.patience).into()),
            ("first_pause_ms", millis(replica.first_pause).into()),
            ("retries", replica.retries.into()),
            ("forward_writes", (*forwards_writes).into()),
        ]
    }
}

/// Where clients reach a replica, if that was `given` or it is `listening` there. What listens on all addresses has none of its own.
fn advertised(given: Option<&str>, listening: SocketAddr) -> Option<String> {
    if let Some(given) = given {
        return Some(given.to_owned());
    }
    if listening.ip().is_unspecified() {
        tracing::warn!(
            "clients are not told of this replica: it listens on all addresses; --advertise says at which one they reach it"
        );
        return None;
    }
    Some(listening.to_string())
}

/// Follows until a signal says to stop, or it gives up.
///
/// # Errors
/// See [`ServeCommandError`].
pub async fn run(common: &Common, args: ReplicaArgs) -> Result<(), ServeCommandError> {
    if args.data_dir.is_none() && args.config.is_none() {
        let message = "a replica needs a place for its state; name a directory with --data-dir".to_owned();
        return Err(SettingsError::Invalid(message).into());
    }
    Box::pin(follow(args.resolve(common)?)).await
}

/// The same, once it is known what to do.
pub(super) async fn follow(run: ReplicaRun) -> Result<(), ServeCommandError> {
    run.serve.check_exposure()?;
    let fixed = run.fixed();
    let ReplicaRun { serve, replica: mut config, forwards_writes } = run;
    let data_dir = std::path::absolute(&serve.data_dir).unwrap_or_else(|_| serve.data_dir.clone());
    let log_level =
        log_to_stderr(&serve.log_level, serve.log_format, &data_dir).map_err(ServeCommandError::Log)?;
    serve.translation.log();
    if let Err(error) = incoming::raise_open_files() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let mut signals = StopSignals::listen().map_err(RunError::Signals)?;
    let mut server = Server::<Kv, ReplicaNode<KvMachine>>::bind(&serve.client_listen)
        .await?
        .with_limits(serve.door.limits.clone())
        .with_names(serve.names())
        .with_fixed_settings(fixed);
    if let Some(log_level) = log_level {
        server = server.with_log_level(log_level);
    }
    if let Some(tls) = serve.tls.resolve()? {
        server = server.with_tls(tls).await?;
    }
    if let Some(credentials) = credentials(&serve).await? {
        server = server.with_credentials(credentials);
    }
    config.advertise = advertised(serve.client_advertise.as_deref(), server.local_addr());
    let client = config.advertise.clone().unwrap_or_else(|| server.local_addr().to_string());
    let replica = tokio::select! {
        opened = Replica::open(config, KvMachine::default) => opened?,
        signal = signals.next() => {
            tracing::info!(signal, "stopped before the replica was open");
            return Ok(());
        }
    };
    tracing::info!(
        %client,
        position = replica.state().local.index,
        forwards_writes,
        version = env!("CARGO_PKG_VERSION"),
        "serving a replica"
    );
    let node = ReplicaNode::new(replica.clone(), client);
    let node = if forwards_writes { node.forwarding() } else { node };
    let (shown, passed_on) = (replica.clone(), node.clone());
    let part = move || status(&shown.state(), passed_on.passed_on());
    let server = kv::with_services(server).with_status("replica", Arc::new(part));
    let (stop, mut stopped) = watch::channel(false);
    let serving = server.serve_told(node, async move {
        // The sender is dropped when nobody waits any more.
        let _ = stopped.wait_for(|stop| *stop).await;
    });
    let mut serving = std::pin::pin!(serving);
    let ended = tokio::select! {
        served = &mut serving => return served.map_err(|error| RunError::from(error).into()),
        signal = signals.next() => {
            tracing::info!(signal, "stopping");
            Ok(())
        }
        state = replica.wait_for(|state| state.gave_up.is_some()) => {
            let why = state.and_then(|state| state.gave_up).unwrap_or_default();
            Err(OpenError::Core(format!("the replica follows no more: {why}")).into())
        }
    };
    stop.send_replace(true);
    let served = serving.await.map_err(|error| RunError::from(error).into());
    ended.and(served)
}

/// The replica on the status page.
fn status(state: &ReplicaState, passed_on: Option<u64>) -> Value {
    json!({
        "connected": state.is_connected(),
        "state": state.sync,
        "in_state_ms": millis(state.since.elapsed()),
        "retries": state.retries,
        "source": state.source,
        "local_seq": state.local.index,
        "history": state.local.history.to_string(),
        "primary_seq": state.primary_seq,
        "lag_operations": state.lag_entries(),
        "lag_ms": state.lag().map(millis),
        "heard_ms": state.heard.map(|heard| millis(heard.elapsed())),
        "received_entries": state.received_entries,
        "received_bytes": state.received_bytes,
        "full_syncs": state.full_syncs,
        // Null where changes are refused.
        "forwarded": passed_on,
        "error": state.error,
        "gave_up": state.gave_up,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_are_told_is_what_was_given_or_where_it_listens() {
        let at = |listening: &str| listening.parse().unwrap();
        assert_eq!(advertised(None, at("10.0.0.9:7811")).as_deref(), Some("10.0.0.9:7811"));
        assert_eq!(advertised(None, at("0.0.0.0:7811")), None);
        assert_eq!(advertised(Some("r:1"), at("0.0.0.0:7811")).as_deref(), Some("r:1"));
    }
}
