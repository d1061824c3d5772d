//! `quorate serve`: one node of a cluster, in this process, until it is told to stop.
//!
//! When it ends, and how, is [`Server::run_until_signal`]'s; this is its settings, its ports and its log, which goes to standard error through
//! a [writer](crate::logging) that holds up nothing, whatever becomes of standard error. What ends at once takes the process with it from
//! within: what is left could hang.

use std::io::IsTerminal;
use std::net::TcpListener;
use std::path::Path;
use std::process;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, registry, reload};

pub use crate::config::ServeArgs;

use super::Common;
use super::replica::{self, ReplicaRun};

use crate::config::{LogFormat, ServeConfig, SettingsError};
use crate::door::{Credentials, CredentialsError};
use crate::engine::{Engine, EngineConfig};
use crate::error::OpenError;
use crate::incoming;
use crate::kv::machine::KvMachine;
use crate::kv::{self, Kv};
use crate::logging;
use crate::node::settings::{LogLevel, parse_filter};
use crate::node::{RunError, Server};
use crate::reason::EXIT_INVALID;
use crate::runtime::offload;
use crate::signals::StopSignals;

/// Why `quorate serve` ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeCommandError {
    /// The settings cannot be used.
    #[error(transparent)]
    Config(#[from] SettingsError),
    /// A port could not be opened, or the disk not be asked.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What callers are identified by cannot be used.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The node could not be opened, or its client port failed.
    #[error(transparent)]
    Run(#[from] RunError),
    /// There is nobody to write the log.
    #[error("cannot write a log to standard error: {0}")]
    Log(#[source] std::io::Error),
}

impl ServeCommandError {
    /// Whether the settings are to blame: the exit code tells.
    pub fn is_invalid_input(&self) -> bool {
        match self {
            Self::Config(_) | Self::Credentials(_) | Self::Open(OpenError::Config(_)) => true,
            Self::Run(error) => error.exit_code() == EXIT_INVALID,
            Self::Open(_) | Self::Log(_) => false,
        }
    }
}

/// Runs a node until a signal stops it. `on_memory` is told the memory that it may use. One that is to be a replica shows its sources the
/// token of `common`.
///
/// The process exits from within on a second signal and on a fatal error: see the [module](self).
///
/// # Errors
/// See [`ServeCommandError`].
pub async fn run(
    common: &Common,
    args: ServeArgs,
    on_memory: Option<fn(u64)>,
) -> Result<(), ServeCommandError> {
    let mut config = ServeConfig::load(args)?;
    config.check_exposure()?;
    if let Some(wishes) = config.translation.replica.take() {
        return Box::pin(replica::follow(ReplicaRun::of(config, wishes)?.showing(common)?)).await;
    }
    if let Some(on_memory) = on_memory {
        on_memory(config.memory());
    }
    let data_dir = std::path::absolute(&config.data_dir).unwrap_or_else(|_| config.data_dir.clone());
    let log_level =
        log_to_stderr(&config.log_level, config.log_format, &data_dir).map_err(ServeCommandError::Log)?;
    if let Err(error) = incoming::raise_open_files() {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    let mut signals = StopSignals::listen().map_err(RunError::Signals)?;
    let machine = KvMachine::default();
    let (server, engine_config) = tokio::select! {
        listening = listen(config, log_level, &data_dir) => listening?,
        signal = signals.next() => {
            tracing::info!(signal, "stopped before the node was open; the next start begins anew");
            return Ok(());
        }
    };
    let progress = engine_config.progress.clone();
    let opening = Engine::open(engine_config, machine);
    match Box::pin(server.run_until(signals, opening, progress)).await {
        Ok(_) => Ok(()),
        Err(RunError::SecondSignal(_)) => {
            logging::flush();
            process::exit(1);
        }
        Err(error @ (RunError::Fatal(_) | RunError::Port(_))) => {
            logging::last_words(&format!("error: {error}\n"));
            process::exit(1);
        }
        Err(error) => Err(error.into()),
    }
}

/// Opens both ports, and makes the settings fit the machine.
async fn listen(
    mut config: ServeConfig,
    log_level: Option<LogLevel>,
    data_dir: &Path,
) -> Result<(Server<Kv>, EngineConfig), ServeCommandError> {
    let mut server = kv::bind(&config.client_listen)
        .await?
        .with_limits(config.door.limits.clone())
        .with_names(config.names());
    if let Some(log_level) = log_level {
        server = server.with_log_level(log_level);
    }
    if let Some(tls) = config.tls.resolve()? {
        server = server.with_tls(tls).await?;
    }
    if let Some(credentials) = credentials(&config).await? {
        server = server.with_credentials(credentials);
    }
    if let Some(address) = &config.frames_listen {
        server = server.with_frames(address).await?;
    }
    let engine_config = config.engine_config(server.local_addr().to_string());
    // Both may wait, for a name to be resolved and for a disk.
    let engine_config = offload(move || {
        let mut engine_config = with_peer_listener(engine_config)?;
        engine_config.fit_disk().map(|()| engine_config)
    })
    .await?;
    (config.disk, config.limits) = (engine_config.disk.clone(), engine_config.limits.clone());
    tracing::info!(
        node_id = config.node_id,
        cluster = config.cluster,
        data_dir = %data_dir.display(),
        client = engine_config.client_advertise,
        frames = server.frames_addr().map(tracing::field::display),
        peer = engine_config.peer_advertise,
        disk_reserve_bytes = config.disk.reserve_bytes,
        max_inflight_bytes = config.limits.max_inflight_bytes,
        version = env!("CARGO_PKG_VERSION"),
        "starting"
    );
    config.translation.log();
    Ok((server.with_fixed_settings(config.fixed_settings()), engine_config))
}

/// What callers are identified by, if they are.
pub(super) async fn credentials(config: &ServeConfig) -> Result<Option<Credentials>, ServeCommandError> {
    let auth = config.door.auth.clone();
    match auth.is_required() {
        true => Ok(Some(offload(move || Credentials::load(auth)).await?)),
        false => Ok(None),
    }
}

/// Opens the peer port here, so that port 0 can be advertised as what it turned out to be.
fn with_peer_listener(mut config: EngineConfig) -> Result<EngineConfig, OpenError> {
    let address = config.peer_listen.clone();
    let failed = |source| OpenError::Listen { address: address.clone(), source };
    let listener = TcpListener::bind(&address).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let port = config.peer_advertise.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    if port == Some(0) {
        let bound = listener.local_addr().map_err(failed)?.to_string();
        // Only a node that forms a cluster by itself may have a port that nobody knows beforehand.
        config.initial_members.entry(config.node_id).and_modify(|own| own.clone_from(&bound));
        config.peer_advertise = bound;
    }
    config.peer_listener = Some(listener);
    Ok(config)
}

/// Writes the log to standard error, and first of all where the data are, whatever else is logged. Returns how to change
/// what is written; nothing if an embedding process has set up a log of its own, which stays.
pub(super) fn log_to_stderr(
    filter: &str,
    format: LogFormat,
    data_dir: &Path,
) -> std::io::Result<Option<LogLevel>> {
    let (writer, given) = (logging::start()?, filter.to_owned());
    let filter = parse_filter(filter).unwrap_or_default(); // checked before
    let colours = std::io::stderr().is_terminal();
    let lines = || -> Box<dyn Layer<Registry> + Send + Sync> {
        // It would say of itself what is wrong on standard error, and panic if it cannot.
        let lines = fmt::layer().with_ansi(colours).with_writer(writer.clone()).log_internal_errors(false);
        match format {
            LogFormat::Text => lines.boxed(),
            LogFormat::Json => lines.json().boxed(),
        }
    };
    let everything = registry().with(lines()).with(Targets::new().with_default(LevelFilter::INFO));
    tracing::subscriber::with_default(everything, || {
        tracing::info!("the data directory is {}", data_dir.display());
    });
    let (filter, handle) = reload::Layer::new(filter);
    let log = registry().with(lines()).with(filter);
    Ok(log.try_init().ok().map(|()| log_level(given, handle)))
}

fn log_level<S: 'static>(filter: String, handle: reload::Handle<Targets, S>) -> LogLevel {
    LogLevel::new(filter, move |filter| {
        let filter = parse_filter(filter)?;
        handle.reload(filter).map_err(|error| error.to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_free_peer_port_is_advertised_as_bound() {
        let config = with_peer_listener(EngineConfig::new(7, "unused", "127.0.0.1:0")).unwrap();
        let bound = config.peer_listener.unwrap().local_addr().unwrap().to_string();
        assert_eq!(config.peer_advertise, bound);
        assert_eq!(config.initial_members[&7], bound);

        let taken = with_peer_listener(EngineConfig::new(7, "unused", bound.clone()));
        assert!(taken.is_ok(), "the listener above is closed by now");
        let again = with_peer_listener(EngineConfig::new(7, "unused", bound));
        assert!(matches!(again, Err(OpenError::Listen { .. })));
    }
}
