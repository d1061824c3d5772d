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
    TrustError,
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
    /// The client of the command, once it has one: a failure tells what it has learnt.
    #[arg(skip)]
    client: Arc<OnceLock<Client>>,
}

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
            (None, ..) => refuse("--tls-cert and --tls-key are shown to nodes that are believed; give --tls-ca, too"),
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

    fn client_with(&self, change: impl FnOnce(&mut ClientConfig)) -> Result<Client, CliError> {
        let mut config = ClientConfig { timeout: self.timeout, ..ClientConfig::default() };
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
            Self::Serve(_) | Self::Replica(_) | Self::Cluster(_) | Self::Completion(_) | Self::Cert(_) => Subject::Process,
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
        Command::Bench(args) => bench::run(common, args).await,
        Command::LoadTest(args) => load_test::run(common, args).await,
        Command::ReplicationTest(args) => replication_test::run(common, args).await,
        Command::ConfigTest(args) => config_test::run(common, args).await,
        Command::Serve(args) => serve::run(*args, on_memory).await.map_err(CliError::node),
        Command::Replica(args) => replica::run(common, *args).await.map_err(CliError::node),
        Command::Cluster(args) => cluster::run(args).await.map_err(CliError::node),
        Command::Cert(args) => cert::run(common, args),
        Command::Completion(args) => completion::run(&args, &mut Cli::command()),
    }
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use serde_json::{Value, json};

    use super::*;
    use crate::kv::client::tests::fake::{Fake, Step, leader, refusing};
    use crate::proto::v1::{self, tagged_response};

    async fn run_at(fake: &Fake, args: &[&str]) -> Result<(), CliError> {
        let endpoint = fake.endpoint();
        run(parse(["quorate", "--endpoints", &endpoint].iter().chain(args)).unwrap()).await
    }

    #[tokio::test]
    async fn commands_do_what_they_say() {
        let node = Fake::start(leader);
        node.set_status(v1::StatusResponse { node_id: 1, ..Default::default() });
        for format in ["table", "json"] {
            for args in [
                vec!["put", "k", "v"],
                vec!["get", "k"],
                vec!["get", "k", "--local"],
                vec!["del", "k", "--ack", "leader"],
                vec!["get", "k", "--level", "bounded:100", "--prefer", "nearest", "--after", "3"],
                vec!["put", "k", "v", "--if-absent", "--ttl", "30s", "--ack", "all"],
                vec!["del", "k", "--prefix"],
                vec!["del", "--all"],
                vec!["put", "--key-base64", "/wA=", "-", "--ttl", "400d"],
                vec!["put", "k", "--value-base64", "/wA="],
                vec!["get", "--key-base64", "/wA="],
                vec!["del", "--key-base64", "/wA="],
                vec!["range", "--key-base64", "/w==", "--prefix"],
                vec!["range", "--prefix", "k", "--limit", "1"],
                vec!["txn", "--when", "k = v", "--then", "put k w", "--else", "get k"],
                vec!["status", "--members"],
                vec!["bench", "--callers", "4", "--seconds", "1", "--warmup-seconds", "0", "--reads", "0.5"],
            ] {
                let args: Vec<_> = args.into_iter().chain(["-o", format]).collect();
                run_at(&node, &args).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn failures_have_their_exit_codes() {
        let node = Fake::start(|requests| {
            let nothing = Some(tagged_response::Response::Get(v1::GetResponse::default()));
            let answers = requests.iter();
            Step::Answer(
                answers.map(|ask| v1::TaggedResponse { tag: ask.tag, response: nothing.clone() }).collect(),
            )
        });
        let missing = run_at(&node, &["get", "k"]).await.unwrap_err();
        assert_eq!(missing.exit_code(), EXIT_NOT_FOUND);
        assert!(missing.hint(Subject::Read).is_some());
        node.set_script(refusing(v1::Failure { reason: v1::Reason::TooLarge.into(), ..Default::default() }));
        let unread = run_at(&node, &["txn", "--then", "put"]).await.unwrap_err();
        assert_eq!(unread.exit_code(), EXIT_INVALID);
        let too_large = run_at(&node, &["put", "k", "v"]).await.unwrap_err();
        assert_eq!(too_large.exit_code(), EXIT_INVALID);
        let unreadable = run_at(&node, &["put", "k", "--file", "/nonexistent/file"]).await.unwrap_err();
        assert_eq!(unreadable.exit_code(), EXIT_INVALID);
    }

    #[tokio::test]
    async fn what_not_every_voter_has_confirmed_is_told_with_what_came_of_it() {
        let node = Fake::start(leader);
        let position = Some(v1::Position { term: 3, index: 41, history: 0xabc });
        let unconfirmed = |response: Vec<u8>| {
            let header = Some(v1::Header { node_id: 2, position, ..Default::default() });
            let (reason, response) = (v1::Reason::AckTimeout.into(), response.into());
            let told = v1::Failure { reason, maybe_applied: true, position, ..Default::default() };
            let unconfirmed = Some(Box::new(v1::UnconfirmedAnswer { header, response }));
            refusing(v1::Failure { missing: vec![3], unconfirmed, ..told })
        };
        let txn = |succeeded| v1::TxnResponse { revision: 41, succeeded, ..Default::default() };
        let put = v1::PutResponse { revision: 41, version: 2, ..Default::default() };
        let removed = |deleted| v1::DeleteResponse { header: None, deleted };
        let piece = v1::DeleteRangeResponse { header: None, deleted: 7, more: true };
        for (args, response, code, field, expected) in [
            (&["put", "k", "v"][..], put.encode_to_vec(), EXIT_UNKNOWN, "version", json!(2)),
            (
                &["put", "k", "v", "--if-absent"],
                txn(true).encode_to_vec(),
                EXIT_UNKNOWN,
                "succeeded",
                json!(true),
            ),
            (
                &["put", "k", "v", "--if-absent"],
                txn(false).encode_to_vec(),
                EXIT_NOT_FOUND,
                "succeeded",
                json!(false),
            ),
            (&["del", "k"], removed(true).encode_to_vec(), EXIT_UNKNOWN, "deleted", json!(true)),
            (&["del", "k"], removed(false).encode_to_vec(), EXIT_NOT_FOUND, "deleted", json!(false)),
            (&["del", "k", "--prefix"], piece.encode_to_vec(), EXIT_UNKNOWN, "deleted", json!(7)),
            (
                &["txn", "--when", "missing k", "--then", "put k v"],
                txn(false).encode_to_vec(),
                EXIT_UNKNOWN,
                "succeeded",
                json!(false),
            ),
        ] {
            node.set_script(unconfirmed(response));
            let error = run_at(&node, &[args, &["--ack", "all"]].concat()).await.unwrap_err();
            let report = Report::of(&error, Subject::Write, None);
            let object: Value = serde_json::from_str(&report.text(Format::Json)).unwrap();
            assert_eq!(object["code"], json!(code), "{args:?}: {object}");
            assert_eq!(object["maybe_applied"], json!(code == EXIT_UNKNOWN), "{args:?}: {object}");
            assert_eq!(object["result"][field], expected, "{args:?}: {object}");
            assert_eq!(object["result"]["missing"], json!([3]), "{args:?}: {object}");
            assert_eq!(object["result"]["index"], json!(41), "{args:?}: {object}");
            assert!(object["message"].as_str().unwrap().contains("node 3"), "{args:?}: {object}");
        }
    }

    fn exit_code(args: &[&str]) -> u8 {
        match parse(["quorate"].iter().chain(args)) {
            Ok(_) => EXIT_OK,
            Err(error) => report::usage(&error, &[]).2,
        }
    }

    #[test]
    fn the_declaration_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn usage_errors_exit_with_3_and_help_with_0() {
        for args in [
            vec!["--help"],
            vec!["--version"],
            vec!["put", "--help"],
            vec!["put", "k", "v"],
            vec!["--endpoints", "a:1,b:2", "get", "k"],
            vec!["get", "k", "--endpoints", "a:1", "-o", "json", "--timeout", "500ms"],
            vec!["del", "k", "--tenant", "t", "--collection", "c"],
            vec!["range"],
            vec!["range", "a", "b", "--limit", "3"],
            vec!["range", "--prefix", "a"],
            vec!["range", "--all", "--prefer", "weighted:a:1=2,b:1=1"],
            vec!["txn", "-"],
            vec!["txn", "--then", "get k"],
            vec!["watch", "--prefix", "", "--from", "7"],
            vec!["watch", "--key-base64", "/w==", "--prefix"],
            vec!["put", "--key-base64", "/w==", "v"],
            vec!["put", "k", "--value", "-"],
            vec!["put", "k", "--value", "--ttl"],
            vec!["put", "k", "v", "--ttl", "1w2d3h"],
            vec!["del", "--all"],
            vec!["range", "--key-base64", "/w==", "--end-base64", "//8="],
            vec!["range", "--all", "--prefix", "a"],
            vec!["health", "-o", "json"],
            vec!["status", "-o", "json"],
            vec!["bench", "--callers", "8", "--value-bytes", "16", "--seconds", "1", "--kind", "get"],
            vec!["completion", "bash"],
            vec!["member", "list"],
            vec!["member", "add", "4", "--peer", "a:1", "--promote", "--catch-up", "5m"],
            vec!["member", "replace", "2", "--peer", "a:1"],
            vec!["member", "update", "2", "--client", "a:1"],
            vec!["session", "list"],
            vec!["session", "list", "--opener", "192.0.2.1", "-o", "json"],
            vec!["session", "close", "7", "18446744073709551615"],
            vec!["session", "close", "--opener", "192.0.2.1:5"],
            vec!["transfer-leader"],
            vec!["transfer-leader", "3"],
            vec!["snapshot", "--endpoint", "a:1"],
            vec!["configure"],
            vec!["configure", "log_level=debug", "preferred_leader=true", "--endpoint", "a:1"],
        ] {
            assert_eq!(exit_code(&args), EXIT_OK, "{args:?}");
        }
        for args in [
            vec![],
            vec!["frobnicate"],
            vec!["put"],
            vec!["put", "k"],
            vec!["put", "k", "v", "--file", "f"],
            vec!["put", "k", "v", "--value", "w"],
            vec!["put", "k", "--value-base64", "%"],
            vec!["get", "--key-base64", "%"],
            vec!["get", "--key-base64", "/w==", "--key-file", "f"],
            vec!["del"],
            vec!["del", "--all", "--collection", ""],
            vec!["del", "--all", "--tenant="],
            vec!["txn", "--then", "del-all", "--collection", ""],
            vec!["get", "k", "--collection", ""],
            vec!["range", "--all", "--tenant", ""],
            vec!["watch", "--all", "--tenant", ""],
            vec!["bench", "--collection", ""],
            vec!["del", "k", "--all"],
            vec!["del", "--prefix", "--all"],
            vec!["watch"],
            vec!["watch", "k", "--all"],
            vec!["put", "k", "v", "--ttl", "7 days"],
            vec!["get", "k", "--endpoints", "nowhere"],
            vec!["get", "k", "--endpoints", ""],
            vec!["get", "k", "-o", "xml"],
            vec!["get", "k", "--timeout", "0"],
            vec!["get", "k", "--timeout", "5 parsecs"],
            vec!["range", "a", "b", "--prefix"],
            vec!["range", "--all", "--limit", "3"],
            vec!["get", "k", "--level", "fresh"],
            vec!["get", "k", "--local", "--level", "lease"],
            vec!["put", "k", "v", "--ttl", "0s"],
            vec!["put", "k", "v", "--if-absent", "--if-revision", "3"],
            vec!["txn"],
            vec!["txn", "--when", "k = v"],
            vec!["watch", "k", "--from", "0"],
            vec!["bench", "--callers", "0"],
            vec!["bench", "--reads", "1.5"],
            vec!["bench", "--kind", "put", "--reads", "0.5"],
            vec!["completion", "cmd.exe"],
            vec!["member"],
            vec!["member", "add", "4"],
            vec!["member", "update", "2"],
            vec!["put", "k", "v", "--ttl", "-1s"],
            vec!["get", "k", "--timeout", "-1s"],
            vec!["range", "a", "b", "--limit", "-1"],
            vec!["session"],
            vec!["session", "close"],
            vec!["session", "close", "seven"],
            vec!["session", "close", "7", "--opener", "192.0.2.1"],
            vec!["transfer-leader", "three"],
            vec!["transfer-leader", "0"],
            vec!["member", "remove", "0"],
            vec!["member", "replace", "2", "--with", "0", "--peer", "a:1"],
            vec!["configure", "log_level"],
        ] {
            assert_eq!(exit_code(&args), EXIT_INVALID, "{args:?}");
        }
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for (args, named) in [
            (&["quorate", "put", "k", "v", "--ttl", "-1s"][..], "'-1s' for '--ttl <TIME>'"),
            (&["quorate", "member", "add", "4", "--peer", "a:1", "--catch-up", "-5"], "'-5' for '--catch-up"),
            (&["quorate", "range", "a", "b", "--limit", "-1"], "'-1' for '--limit"),
            (&["quorate", "cluster", "--nodes", "-1"], "'-1' for '--nodes"),
            (&["quorate", "member", "update", "2"], "<--peer <HOST:PORT>|--client <HOST:PORT>>"),
            (&["quorate", "del", "--all", "--collection", ""], "write `default`"),
        ] {
            let refused = parse(args).unwrap_err().to_string();
            assert!(refused.contains(named) && !refused.contains("tip:"), "{refused}");
        }
    }

    fn assert_examples(command: &clap::Command, path: &str) {
        for command in command.get_subcommands().filter(|command| command.get_name() != "help") {
            let path = format!("{path} {}", command.get_name());
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains(&path), "`{path}` shows no example of itself");
            assert_examples(command, &path);
        }
    }

    #[test]
    fn every_command_shows_an_example() {
        assert_examples(&Cli::command(), "quorate");
    }

    #[test]
    fn default_endpoints_are_those_of_the_local_cluster() {
        // The environment may hold others.
        if std::env::var_os("QUORATE_ENDPOINTS").is_none() {
            let cli = parse(["quorate", "status"]).unwrap();
            let endpoints: Vec<_> = cli.common.endpoints.iter().map(Endpoint::as_str).collect();
            assert_eq!(endpoints, ["127.0.0.1:7801", "127.0.0.1:7802", "127.0.0.1:7803"]);
        }
    }
}
