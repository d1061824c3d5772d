//! `quorate replica`: a copy of the state outside the quorum, in this process, until it is told to stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::Common;
use super::follow::FilterArgs;
use super::serve::{ServeCommandError, log_to_stderr};
use crate::config::LogFormat;
use crate::error::OpenError;
use crate::incoming;
use crate::kv::client::Endpoint;
use crate::kv::machine::KvMachine;
use crate::kv::{self, Kv};
use crate::node::settings::parse_filter;
use crate::node::{Names, RunError, Server};
use crate::replica::{Replica, ReplicaConfig, ReplicaNode, ReplicaState};
use crate::report::millis;
use crate::signals::StopSignals;

/// Arguments of `quorate replica`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate replica --data-dir /var/lib/quorate-replica --listen 127.0.0.1:7811\n  quorate get greeting --endpoints 127.0.0.1:7811 --local\n  quorate replica --from 10.0.0.1:7801,10.0.0.2:7801 --tenant acme --data-dir acme\n\nFollows what is applied and answers reads; writes are refused, and who leads is named. Clients of its sources read there, too, unless --tenant or --collection leaves it a part of the state. Goes on where it was after a restart, and at another source when one fails. A replica that was away for longer than any source reaches back is sent the whole state. http://LISTEN/replication/status shows how it stands (`replica`)."
)]
pub struct ReplicaArgs {
    /// Client addresses of members, comma-separated [default: --endpoints]
    #[arg(long, value_name = "HOST:PORT,...", value_delimiter = ',', value_parser = Endpoint::parse)]
    pub from: Vec<Endpoint>,
    /// Where it keeps its state
    #[arg(long, value_name = "DIR")]
    pub data_dir: PathBuf,
    /// Where it listens for clients; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7811")]
    pub listen: String,
    /// Where clients reach it, which its sources tell them [default: --listen]
    #[arg(long, value_name = "HOST:PORT", value_parser = Endpoint::parse)]
    pub advertise: Option<Endpoint>,
    /// What its sources call it where they list those who follow
    #[arg(long, value_name = "NAME", default_value = "")]
    pub id: String,
    /// What it follows
    #[command(flatten)]
    pub filters: FilterArgs,
    /// How often it tries to reach its sources in vain before it ends; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub retries: u32,
    /// Have what it is told compressed on the way
    #[arg(long)]
    pub compress: bool,
    /// What to log: off, error, warn, info, debug, trace, or a filter such as info,quorate=debug
    #[arg(long, value_name = "FILTER", default_value = "info", value_parser = filter)]
    pub log_level: String,
    /// How lines of the log look
    #[arg(long, value_name = "FORMAT", value_enum, default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

fn filter(text: &str) -> Result<String, String> {
    parse_filter(text).map(|_| text.to_owned())
}

impl ReplicaArgs {
    /// Where clients reach it, if that is `listening` or was given. What listens on all addresses has none of its own.
    fn advertised(&self, listening: SocketAddr) -> Option<String> {
        if let Some(given) = &self.advertise {
            return Some(given.to_string());
        }
        if listening.ip().is_unspecified() {
            tracing::warn!(
                "clients are not told of this replica: it listens on all addresses; --advertise says at which one they reach it"
            );
            return None;
        }
        Some(listening.to_string())
    }

    fn config(&self, common: &Common, listening: SocketAddr) -> ReplicaConfig {
        let sources = if self.from.is_empty() { &common.endpoints } else { &self.from };
        let mut config = ReplicaConfig::new(sources.iter().map(ToString::to_string), &self.data_dir);
        config.id.clone_from(&self.id);
        config.filters.clone_from(&self.filters.filters);
        config.retries = (self.retries != 0).then_some(self.retries);
        config.compressed = self.compress;
        config.advertise = self.advertised(listening);
        config
    }
}

/// Follows until a signal says to stop, or it gives up.
///
/// # Errors
/// See [`ServeCommandError`].
pub async fn run(common: &Common, args: ReplicaArgs) -> Result<(), ServeCommandError> {
    let data_dir = std::path::absolute(&args.data_dir).unwrap_or_else(|_| args.data_dir.clone());
    let log_level =
        log_to_stderr(&args.log_level, args.log_format, &data_dir).map_err(ServeCommandError::Log)?;
    if let Err(error) = incoming::raise_open_files() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let mut signals = StopSignals::listen().map_err(RunError::Signals)?;
    let mut server = Server::<Kv, ReplicaNode<KvMachine>>::bind(&args.listen).await?;
    if let Some(log_level) = log_level {
        server = server.with_log_level(log_level);
    }
    if let Some(advertised) = &args.advertise {
        server =
            server.with_names(Names::default().and_host_of(&args.listen).and_host_of(advertised.as_str()));
    }
    let config = args.config(common, server.local_addr());
    let advertised = config.advertise.clone();
    let replica = tokio::select! {
        opened = Replica::open(config, KvMachine::default) => opened?,
        signal = signals.next() => {
            tracing::info!(signal, "stopped before the replica was open");
            return Ok(());
        }
    };
    let client = server.local_addr().to_string();
    tracing::info!(%client, position = replica.state().local.index, version = env!("CARGO_PKG_VERSION"), "serving a replica");
    let shown = replica.clone();
    let server = kv::with_services(server).with_status("replica", Arc::new(move || status(&shown.state())));
    let (stop, mut stopped) = watch::channel(false);
    let node = ReplicaNode::new(replica.clone(), advertised.unwrap_or(client));
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
fn status(state: &ReplicaState) -> Value {
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
        "error": state.error,
        "gave_up": state.gave_up,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_clients_are_told_is_what_was_given_or_where_it_listens() {
        #[derive(clap::Parser)]
        struct Replicating {
            #[command(flatten)]
            args: ReplicaArgs,
        }
        let advertised = |given: &[&str], listening: &str| {
            let args = ["replica", "--data-dir", "d"].iter().chain(given);
            let parsed = <Replicating as clap::Parser>::parse_from(args);
            parsed.args.advertised(listening.parse().unwrap())
        };
        assert_eq!(advertised(&[], "10.0.0.9:7811").as_deref(), Some("10.0.0.9:7811"));
        assert_eq!(advertised(&[], "0.0.0.0:7811"), None);
        assert_eq!(advertised(&["--advertise", "r:1"], "0.0.0.0:7811").as_deref(), Some("r:1"));
    }
}
