//! The command line: one file per command.
//!
//! Commands print results on standard output, as text for people or as JSON for programs (`-o json`), and
//! everything else on standard error; failures in [`report`]. Exit codes are those of [`crate::reason`].

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};

pub use crate::reason::{EXIT_ERROR, EXIT_INVALID, EXIT_NOT_FOUND, EXIT_OK, EXIT_UNKNOWN, EXIT_UNREACHABLE};
pub use conceal::conceal;
pub use error::CliError;
pub use input::ScopeArgs;
pub use output::Format;
pub use report::Report;

pub use crate::logging::{flush as flush_log, last_words};

use crate::duration;
use crate::kv::client::{
    Client, ClientConfig, ClientTls, ConfigError, Endpoint, KnownLeader, SESSION_TTL_MAX, SESSION_TTL_MIN,
    Token, TrustError,
};
use crate::reason::Reason;

pub mod bench;
pub mod cert;
pub mod cluster;
pub mod completion;
mod conceal;
pub mod config_test;
pub mod configure;
pub mod del;
mod endpoints;
mod error;
pub mod follow;
pub mod get;
pub mod health;
mod input;
pub mod load_test;
pub mod log;
pub mod member;
mod output;
mod process;
pub mod put;
pub mod range;
pub mod read;
pub mod replica;
pub mod replication_test;
pub mod report;
pub mod serve;
pub mod session;
pub mod snapshot;
pub mod status;
pub mod subscribe;
#[cfg(test)]
mod tests;
pub mod token;
pub mod transfer;
pub mod txn;
pub mod watch;
pub mod write;

/// quorate: keeps a key-value state on three or more machines, durable and linearizable.
#[derive(Debug, Parser)]
#[command(
    name = "quorate",
    version,
    arg_required_else_help = true,
    after_help = "Example:\n  quorate cluster                 three local nodes, until Ctrl-C\n  quorate put greeting hello      in another terminal\n  quorate get greeting\n  quorate status\n\nExit codes: 0 ok, 1 error, 2 cannot connect, 3 invalid input, 4 not found or a condition does not hold, 5 outcome of a write unknown"
)]
pub struct Cli {
    /// How to reach the cluster, and how to print.
    #[command(flatten)]
    pub common: Common,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Is told how many bytes of memory the node of this process may use, before it is opened: what the program's allocator keeps
    /// of what was freed is the program's affair.
    #[arg(skip)]
    pub on_memory: Option<fn(u64)>,
}

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
    /// File with the token to show to the nodes; QUORATE_TOKEN in the environment may hold the token itself
    #[arg(long, global = true, env = "QUORATE_TOKEN_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// The client of the command, once it has one: a failure tells what it has learnt.
    #[arg(skip)]
    client: Arc<OnceLock<Client>>,
}

/// What holds a token in the environment.
const TOKEN: &str = "QUORATE_TOKEN";

impl Common {
    /// A client for a command that does one thing: it does not wait for a cluster that is not there.
    fn client(&self) -> Result<Client, CliError> {
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
    async fn with_client(
        &self,
        command: impl AsyncFnOnce(&Client) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        let client = self.client()?;
        let outcome = command(&client).await;
        client.close().await;
        outcome
    }

    /// TLS towards nodes, if it is asked for.
    fn tls(&self) -> Result<Option<ClientTls>, ConfigError> {
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
    async fn leader(&self, error: &CliError) -> Option<KnownLeader> {
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

    /// What is shown to the nodes. A token on the command line would be shown to all who look at the processes.
    fn token(&self) -> Result<Option<Token>, CliError> {
        let unusable = |path: PathBuf| move |source| CliError::Input { path, source };
        match (&self.token_file, std::env::var(TOKEN)) {
            (Some(path), _) => Token::from_file(path).map(Some).map_err(unusable(path.clone())),
            (None, Ok(token)) if !token.is_empty() => {
                Token::new(&token).map(Some).map_err(unusable(TOKEN.into()))
            }
            (None, _) => Ok(None),
        }
    }

    fn client_with(&self, change: impl FnOnce(&mut ClientConfig)) -> Result<Client, CliError> {
        let token = self.token()?;
        let mut config = ClientConfig { timeout: self.timeout, token, ..ClientConfig::default() };
        config.tls = self.tls()?;
        change(&mut config);
        let client = Client::new(self.endpoints.iter().map(Endpoint::as_str), config)?;
        // A command makes one.
        let _ = self.client.set(client.clone());
        Ok(client)
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Set a key
    Put(put::PutArgs),
    /// Print the value of a key
    Get(get::GetArgs),
    /// Remove a key, or all with a prefix
    Del(del::DelArgs),
    /// List keys and values in order
    Range(range::RangeArgs),
    /// Compare, then do one of two lists of operations at one revision
    Txn(txn::TxnArgs),
    /// Print what happens to keys, until Ctrl-C
    Watch(watch::WatchArgs),
    /// Show what was applied, entry by entry
    Log(log::LogArgs),
    /// Print what is applied, entry by entry, until Ctrl-C
    Subscribe(Box<subscribe::SubscribeArgs>),
    /// Ask every node whether it is healthy
    Health(health::HealthArgs),
    /// Show every node's role, term and positions
    Status(status::StatusArgs),
    /// Show and change who belongs to the cluster
    Member(member::MemberArgs),
    /// Show and close the sessions of clients
    Session(session::SessionArgs),
    /// Hand the lead to another node
    TransferLeader(transfer::TransferArgs),
    /// Take a snapshot of a node's state now
    Snapshot(snapshot::SnapshotArgs),
    /// Show and change settings of a running node
    Configure(configure::ConfigureArgs),
    /// Make tokens for callers, and show what is in one
    Token(token::TokenArgs),
    /// Measure operations per second and latency
    Bench(bench::BenchArgs),
    /// Write and read at every node and replica for a short while, and say whether all went well
    LoadTest(load_test::LoadTestArgs),
    /// Write, and see that every node and replica gets each write once, in order, and how late
    ReplicationTest(replication_test::ReplicationTestArgs),
    /// Check the endpoints of a client, or the configuration file of a node
    ConfigTest(config_test::ConfigTestArgs),
    /// Run one node
    Serve(Box<serve::ServeArgs>),
    /// Run a replica: a copy of the state that follows the cluster and answers reads
    Replica(Box<replica::ReplicaArgs>),
    /// Make certificates for nodes and clients
    Cert(cert::CertArgs),
    /// Run a local cluster in real processes until Ctrl-C
    Cluster(cluster::ClusterArgs),
    /// Print a completion script for a shell
    Completion(completion::CompletionArgs),
}

/// What a command is about, which decides what helps when it fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    /// Keys that it changes.
    Write,
    /// Keys that it reads.
    Read,
    /// Who belongs to the cluster.
    Members,
    /// Who leads.
    Lead,
    /// Sessions, whoever opened them.
    Sessions,
    /// The settings of a node.
    Settings,
    /// Nodes, of which it changes nothing.
    Node,
    /// Processes that it runs, or none.
    Process,
}

impl Command {
    /// Whether the process is a node: it needs more than one that asks a node.
    pub fn runs_a_node(&self) -> bool {
        matches!(self, Self::Serve(_) | Self::Replica(_))
    }

    fn subject(&self) -> Subject {
        match self {
            Self::Put(_) | Self::Del(_) | Self::Txn(_) => Subject::Write,
            Self::Get(_) | Self::Range(_) | Self::Watch(_) | Self::Log(_) | Self::Subscribe(_) => {
                Subject::Read
            }
            Self::Member(_) => Subject::Members,
            Self::TransferLeader(_) => Subject::Lead,
            Self::Session(_) => Subject::Sessions,
            Self::Configure(_) => Subject::Settings,
            Self::Health(_) | Self::Status(_) | Self::Snapshot(_) | Self::Bench(_) => Subject::Node,
            Self::LoadTest(_) | Self::ReplicationTest(_) | Self::ConfigTest(_) => Subject::Node,
            Self::Serve(_)
            | Self::Replica(_)
            | Self::Cluster(_)
            | Self::Completion(_)
            | Self::Cert(_)
            | Self::Token(_) => Subject::Process,
        }
    }
}

/// Reads the arguments, the program's name first.
///
/// # Errors
/// What clap has to say: a usage error, or the text of `--help` or `--version`. [`report::usage`] tells what to
/// print, and the exit code.
pub fn parse<I, A>(args: I) -> Result<Cli, clap::Error>
where
    I: IntoIterator<Item = A>,
    A: Into<OsString> + Clone,
{
    Cli::try_parse_from(args)
}

/// Executes the command on a runtime of its own. No future leaves this library: whoever polls one has all that it stands on
/// compiled once more, which took the program's own crate a minute.
///
/// # Errors
/// What to tell of its failure. `None` when nobody is left to be told: the reader of standard output has gone away.
pub fn execute(cli: Cli) -> Result<(), Option<Report>> {
    let runtime =
        process::start(cli.command.runs_a_node()).map_err(|error| Some(Report::of_start(&error)))?;
    let outcome = runtime.block_on(reported(cli));
    // What still runs would hold up the end, a disk that hangs for ever. All that matters has ended, or may end anywhere.
    runtime.shutdown_background();
    outcome
}

async fn reported(cli: Cli) -> Result<(), Option<Report>> {
    let (subject, common) = (cli.command.subject(), cli.common.clone());
    let Err(error) = run(cli).await else { return Ok(()) };
    if error.is_broken_pipe() {
        return Err(None);
    }
    let leader = common.leader(&error).await;
    Err(Some(Report::of(&error, subject, leader)))
}

/// Executes the command.
///
/// # Errors
/// See [`CliError`], which also knows the exit code.
async fn run(cli: Cli) -> Result<(), CliError> {
    let Cli { common, command, on_memory } = cli;
    let common = &common;
    match command {
        Command::Put(args) => put::run(common, args).await,
        Command::Get(args) => get::run(common, args).await,
        Command::Del(args) => del::run(common, args).await,
        Command::Range(args) => range::run(common, args).await,
        Command::Txn(args) => txn::run(common, args).await,
        Command::Watch(args) => watch::run(common, args).await,
        Command::Log(args) => log::run(common, args).await,
        Command::Subscribe(args) => subscribe::run(common, *args).await,
        Command::Health(args) => health::run(common, args).await,
        Command::Status(args) => status::run(common, args).await,
        Command::Member(args) => member::run(common, args).await,
        Command::Session(args) => session::run(common, args).await,
        Command::TransferLeader(args) => transfer::run(common, args).await,
        Command::Snapshot(args) => snapshot::run(common, args).await,
        Command::Configure(args) => configure::run(common, args).await,
        Command::Token(args) => token::run(common, args),
        Command::Bench(args) => bench::run(common, args).await,
        Command::LoadTest(args) => load_test::run(common, args).await,
        Command::ReplicationTest(args) => replication_test::run(common, args).await,
        Command::ConfigTest(args) => config_test::run(common, args).await,
        Command::Serve(args) => serve::run(common, *args, on_memory).await.map_err(CliError::node),
        Command::Replica(args) => replica::run(common, *args).await.map_err(CliError::node),
        Command::Cluster(args) => cluster::run(args).await.map_err(CliError::node),
        Command::Cert(args) => cert::run(common, args),
        Command::Completion(args) => completion::run(&args, &mut Cli::command()),
    }
}
