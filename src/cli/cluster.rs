//! `quorate cluster`: a whole cluster on this machine, for trying, developing and breaking.
//!
//! It starts real `quorate serve` processes, each with its own directory and log file, prints how to talk
//! to them, and shows until Ctrl-C who leads and how far everybody is. Ctrl-C stops the nodes in order,
//! the leader last; the next start continues from the same directory. A node that ends by itself is
//! reported, and with `--restart` started again.
//!
//! It is a supervisor for one machine and one terminal. Production runs one `quorate serve` per machine
//! under the supervisor that is there; `cluster/systemd` and `cluster/compose.yaml` are made for that.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quorate_cluster::{Cluster, ClusterError, ClusterSpec};
use tokio::time::MissedTickBehavior;

use super::health::disk_in_words;
use super::{CliError, cert};
use crate::engine::{MIN_MEMORY_BYTES, available_memory_bytes};
use crate::kv::client::{Client, ClientConfig, ClientTls, ConfigError, Endpoint, NodeReport};
use crate::reason::EXIT_INVALID;
use crate::runtime;
use crate::shown::shortened;
use crate::signals::StopSignals;
use crate::types::{DiskState, NodeId};
use screen::{NodeRow, Screen, View};
use supervisor::{Supervisor, SupervisorEvent};

mod screen;
mod supervisor;

/// Pause between two looks at the nodes.
const REFRESH_INTERVAL_MS: u64 = 500;
/// Longest wait for a node's status; longer than a busy machine takes, shorter than patience.
const STATUS_TIMEOUT_MS: u64 = 800;
/// How long a node may take to stop before it is killed. A leader hands over first.
const STOP_DEADLINE_MS: u64 = 10_000;
/// Without a leader after this long, the user is told where to look.
const LEADER_EXPECTED_MS: u64 = 15_000;

/// Where less is left than this, which a node at least sets aside and has free beside it, that is said of one that has ended.
const LITTLE_ROOM_BYTES: u64 = 64 * 1024 * 1024;
/// Longest repetition of what a node has said at its end.
const MOST_LAST_WORDS_BYTES: usize = 2048;

/// Arguments of `quorate cluster`.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Example:\n  quorate cluster\n  quorate cluster --nodes 5 --data-dir /tmp/five --client-port 8801 --peer-port 8901 --restart\n\nThe commands to try, with the leader's process id, are printed once a node leads."
)]
pub struct ClusterArgs {
    /// Number of nodes; three survive the loss of one, five the loss of two
    #[arg(long, value_name = "COUNT", allow_negative_numbers = true, default_value_t = 3)]
    pub nodes: u64,
    /// Directory for the data and logs of all nodes; an existing one is continued
    #[arg(long, value_name = "DIR", default_value = "./quorate-data")]
    pub data_dir: PathBuf,
    /// Client port of node 1; node N has the Nth from it
    #[arg(long, value_name = "PORT", allow_negative_numbers = true, default_value_t = 7801)]
    pub client_port: u16,
    /// Peer port of node 1; node N has the Nth from it
    #[arg(long, value_name = "PORT", allow_negative_numbers = true, default_value_t = 7901)]
    pub peer_port: u16,
    /// Also listen for followers without gRPC, from this port on; node N has the Nth from it
    #[arg(
        long,
        value_name = "PORT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "7811"
    )]
    pub frames: Option<u16>,
    /// Make certificates in the directory, and have members and clients use them; commands need --tls-ca, --tls-cert and --tls-key then
    #[arg(long)]
    pub secure: bool,
    /// Start a node again when its process ends
    #[arg(long)]
    pub restart: bool,
}

/// Why `quorate cluster` ended other than by request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterCommandError {
    /// The cluster could not be started or stopped.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// Every node has ended.
    #[error("all {nodes} nodes have ended; their output is in {}", logs.display())]
    AllEnded {
        /// How many there were.
        nodes: u64,
        /// Pattern of their log files.
        logs: PathBuf,
    },
    /// The path of this program is not known.
    #[error("cannot find the path of this program: {0}")]
    Program(#[source] io::Error),
    /// Certificates could not be made.
    #[error("cannot make certificates for the cluster: {0}")]
    Certificates(String),
    /// Signals could not be caught.
    #[error("cannot listen for signals: {0}")]
    Signals(#[source] io::Error),
    /// The addresses cannot be used by a client.
    #[error(transparent)]
    Client(#[from] ConfigError),
}

impl ClusterCommandError {
    /// Whether the arguments are at fault, which has an exit code of its own.
    pub fn is_invalid_input(&self) -> bool {
        matches!(self, Self::Cluster(ClusterError::Nodes { .. } | ClusterError::PortRanges { .. }))
    }
}

/// Runs a local cluster until it is told to stop, or every node has ended.
///
/// # Errors
/// See [`ClusterCommandError`]. A stop on request is no error.
pub async fn run(args: ClusterArgs) -> Result<(), ClusterCommandError> {
    let mut stop = StopSignals::listen().map_err(ClusterCommandError::Signals)?;
    let binary = std::env::current_exe().map_err(ClusterCommandError::Program)?;
    let mut spec = ClusterSpec::new(binary, &args.data_dir);
    (spec.nodes, spec.client_port, spec.peer_port) = (args.nodes, args.client_port, args.peer_port);
    spec.frames_port = args.frames;
    // Before addresses are written out for every node.
    spec.validate()?;
    if std::env::var_os("QUORATE_MEMORY_BYTES").is_none() {
        // Each would count on all of it.
        let share = (available_memory_bytes() / args.nodes).max(MIN_MEMORY_BYTES);
        spec.extra_args.extend(["--memory-bytes".into(), share.to_string().into()]);
    }

    let tls = match args.secure {
        true => Some(secure(&mut spec).await?),
        false => None,
    };
    let mut call = shown_path(&spec.binary);
    // Other commands look for three nodes on the default ports by themselves.
    if spec.endpoints() != ClusterSpec::new("", "").endpoints() {
        call = format!("{call} --endpoints {}", spec.endpoints().join(","));
    }
    if let Some(secured) = &tls {
        call = format!("{call} {}", secured.flags());
    }
    let mut screen = Screen::stdout();
    let data_dir = std::path::absolute(&args.data_dir).unwrap_or_else(|_| args.data_dir.clone());
    screen.print(&format!("the cluster's directory is {}", data_dir.display()));
    let cluster = Arc::new(runtime::offload(move || Cluster::start(spec)).await?);
    screen.print(&format!("{} nodes started in {}", args.nodes, cluster.data_dir().display()));
    let followed: Vec<_> =
        cluster.nodes().iter().filter_map(|node| cluster.spec().frames_address(node.node_id())).collect();
    if !followed.is_empty() {
        screen.print(&format!("followers without gRPC are served at {}", followed.join(", ")));
    }

    if let Some(secured) = &tls {
        screen.print(&format!(
            "members and clients use certificates; for other programs of this shell:\n  {}",
            secured.exports()
        ));
    }

    let tls = tls.map(|secured| secured.tls);
    let outcome = ClusterSession::new(&cluster, call, args.restart, tls)?.watch(&mut screen, &mut stop).await;
    let leader = match outcome {
        Ok(leader) => leader,
        Err(error) => {
            screen.keep();
            return Err(error);
        }
    };
    stop_all(cluster, leader, &mut screen, &mut stop).await
}

/// What a client of a cluster with certificates shows, and whom it believes.
struct SecuredCluster {
    files: [(&'static str, PathBuf); 3],
    tls: ClientTls,
}

impl SecuredCluster {
    fn flags(&self) -> String {
        let flags = self.files.iter().map(|(name, path)| format!("--tls-{name} {}", shown_path(path)));
        flags.collect::<Vec<_>>().join(" ")
    }

    fn exports(&self) -> String {
        let variables = self
            .files
            .iter()
            .map(|(name, path)| format!("QUORATE_TLS_{}={}", name.to_uppercase(), shown_path(path)));
        format!("export {}", variables.collect::<Vec<_>>().join(" "))
    }
}

/// Makes the certificates of a cluster that are not there yet, in its directory, and has `spec` use them.
async fn secure(spec: &mut ClusterSpec) -> Result<SecuredCluster, ClusterCommandError> {
    const CLIENT: &str = "client";
    let failed = |error: CliError| ClusterCommandError::Certificates(error.to_string());
    let dir =
        std::path::absolute(&spec.data_dir).unwrap_or_else(|_| spec.data_dir.clone()).join("certificates");
    let (path, cluster, nodes) = (dir.clone(), spec.cluster.clone(), spec.node_ids());
    runtime::offload(move || cert::make_missing(&path, &cluster, nodes, CLIENT)).await.map_err(failed)?;
    spec.peer_credentials = Some(dir.clone());
    spec.client_credentials = Some(dir.clone());
    let files = [
        ("ca", dir.join("ca.pem")),
        ("cert", dir.join(format!("{CLIENT}.pem"))),
        ("key", dir.join(format!("{CLIENT}.key"))),
    ];
    let tls =
        ClientTls::with_certificate(&files[0].1, &files[1].1, &files[2].1).map_err(ConfigError::from)?;
    Ok(SecuredCluster { files, tls })
}

/// Everything that the watching of a running cluster needs.
struct ClusterSession<'a> {
    cluster: &'a Arc<Cluster>,
    client: Client,
    endpoints: BTreeMap<NodeId, Endpoint>,
    supervisor: Supervisor,
    /// What the nodes' disks were good for when they last said so.
    disks: BTreeMap<NodeId, DiskState>,
    /// The program as it is called to talk to this cluster.
    call: String,
    started: Instant,
    introduced: bool,
    warned: bool,
}

impl<'a> ClusterSession<'a> {
    fn new(
        cluster: &'a Arc<Cluster>,
        call: String,
        restart: bool,
        tls: Option<ClientTls>,
    ) -> Result<Self, ConfigError> {
        let timeout = Duration::from_millis(STATUS_TIMEOUT_MS);
        let config = ClientConfig { timeout, tls, ..ClientConfig::default() };
        let endpoints: BTreeMap<_, _> = cluster
            .nodes()
            .iter()
            .map(|node| Ok((node.node_id(), Endpoint::parse(&node.client_address())?)))
            .collect::<Result<_, ConfigError>>()?;
        Ok(Self {
            cluster,
            client: Client::new(endpoints.values().map(Endpoint::as_str), config)?,
            endpoints,
            supervisor: Supervisor::new(restart),
            disks: BTreeMap::new(),
            call,
            started: Instant::now(),
            introduced: false,
            warned: false,
        })
    }

    /// Shows the cluster until a stop is asked for; returns who led then.
    async fn watch(
        mut self,
        screen: &mut Screen,
        stop: &mut StopSignals,
    ) -> Result<Option<NodeId>, ClusterCommandError> {
        let mut tick = tokio::time::interval(Duration::from_millis(REFRESH_INTERVAL_MS));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut leader = None;
        loop {
            tokio::select! {
                _ = stop.next() => return Ok(leader),
                view = async { tick.tick().await; self.look().await } => {
                    leader = view.leader();
                    self.supervise(&view, screen)?;
                    self.tell_disks(&view, screen);
                    self.introduce(&view, screen);
                    screen.show(&view);
                }
            }
        }
    }

    /// Asks all nodes for their status at the same time.
    async fn look(&self) -> View {
        let mut answers: BTreeMap<Endpoint, Option<NodeReport>> =
            self.client.status_all().await.into_iter().map(|(at, answer)| (at, answer.ok())).collect();
        let row = |(node_id, endpoint): (&NodeId, &Endpoint)| NodeRow {
            node_id: *node_id,
            endpoint: endpoint.to_string(),
            pid: self.cluster.node(*node_id).pid(),
            status: answers.remove(endpoint).flatten(),
        };
        View { rows: self.endpoints.iter().map(row).collect() }
    }

    /// Reports nodes that have ended, and starts those again that are due.
    fn supervise(&mut self, view: &View, screen: &mut Screen) -> Result<(), ClusterCommandError> {
        let now = Instant::now();
        for node in self.cluster.nodes() {
            match self.supervisor.observe(now, node.node_id(), node.exit()) {
                None => {}
                Some(SupervisorEvent::Ended { exit, restart_in }) => {
                    screen.print(&format!(
                        "node {} (process {}) ended with {}; its output is in {}",
                        node.node_id(),
                        exit.pid,
                        ended_with(exit.status),
                        node.log_path().display()
                    ));
                    let why = last_words(&node.log_tail(1));
                    // What it had to say may not have found room, either.
                    if let Some(why) = why.or_else(|| little_room(self.cluster.data_dir())) {
                        screen.print(&format!("  {why}"));
                    }
                    let invalid = exit.status.code() == Some(EXIT_INVALID.into());
                    screen.print(&match restart_in {
                        Some(pause) => format!("  it starts again in {} s", pause.as_secs()),
                        None if invalid => {
                            format!("  correct that, and start it again with:\n  {}", node.command_line())
                        }
                        None => format!("  start it again with:\n  {}", node.command_line()),
                    });
                }
                Some(SupervisorEvent::Restart) => match node.start() {
                    Ok(pid) => {
                        screen.print(&format!("node {} started again as process {pid}", node.node_id()));
                    }
                    Err(error) => screen.print(&format!("node {} cannot start: {error}", node.node_id())),
                },
            }
        }
        // A node that answers although its process here has ended was started by hand.
        if !self.supervisor.restarts()
            && view.rows.iter().all(|row| row.pid.is_none() && row.status.is_none())
        {
            return Err(ClusterCommandError::AllEnded {
                nodes: view.rows.len() as u64,
                logs: self.cluster.data_dir().join("node-*/output.log"),
            });
        }
        Ok(())
    }

    /// Says of nodes whose disks take no writes any more what they lack, and of those that take them again that they do.
    fn tell_disks(&mut self, view: &View, screen: &mut Screen) {
        for row in &view.rows {
            let Some(disk) = row.status.as_ref().and_then(|status| status.disk) else { continue };
            let before = self.disks.insert(row.node_id, disk.state).unwrap_or_default();
            let node_id = row.node_id;
            match (before.takes_writes(), disk.state.takes_writes()) {
                (true, false) => {
                    let data_dir = self.cluster.node(node_id).data_dir();
                    let words = disk_in_words(&disk);
                    let remedy = match disk.state {
                        DiskState::Full => {
                            ": make room there, and writes are taken again by themselves; or stop the cluster, and start it without a reserve (QUORATE_DISK_RESERVE_BYTES=0) or with --data-dir on a larger disk"
                        }
                        DiskState::Ok | DiskState::Low | DiskState::Stalled => "",
                    };
                    screen.print(&format!(
                        "node {node_id} takes no writes: {words}. Its data directory is {}{remedy}",
                        data_dir.display()
                    ));
                }
                (false, true) => screen.print(&format!("the disk of node {node_id} takes writes again")),
                (true, true) | (false, false) => {}
            }
        }
    }

    /// Says once how to talk to the cluster, as soon as it has a leader.
    fn introduce(&mut self, view: &View, screen: &mut Screen) {
        if self.introduced {
            return;
        }
        if view.leader().is_some() {
            self.introduced = true;
            screen.print(&screen::introduction(&self.call, view));
        } else if !self.warned && self.started.elapsed() >= Duration::from_millis(LEADER_EXPECTED_MS) {
            self.warned = true;
            let logs = self.cluster.data_dir().join("node-*/output.log");
            screen.print(&format!("no node leads yet; why may be found in {}", logs.display()));
        }
    }
}

/// Stops the nodes in order. A second signal kills those that are left.
async fn stop_all(
    cluster: Arc<Cluster>,
    leader: Option<NodeId>,
    screen: &mut Screen,
    stop: &mut StopSignals,
) -> Result<(), ClusterCommandError> {
    screen.keep();
    screen.print("stopping the nodes, the leader last; once more to kill them");
    let stopping = cluster.clone();
    let last = Vec::from_iter(leader);
    let work = runtime::offload(move || stopping.stop(&last, Duration::from_millis(STOP_DEADLINE_MS)));
    tokio::pin!(work);
    tokio::select! {
        outcome = &mut work => outcome?,
        _ = stop.next() => {
            cluster.kill_all()?;
            // It finds every node ended.
            work.await?;
            screen.print("killed");
            return Ok(());
        }
    }
    screen.print(&format!("stopped; the next start continues from {}", cluster.data_dir().display()));
    Ok(())
}

/// What to say of a directory whose file system is full, or nearly.
fn little_room(directory: &Path) -> Option<String> {
    let room = rustix::fs::statvfs(directory).ok()?;
    let bytes = room.f_bavail.saturating_mul(room.f_frsize);
    (bytes < LITTLE_ROOM_BYTES).then(|| {
        format!(
            "only {bytes} bytes are left in the file system of {}, and each node needs {LITTLE_ROOM_BYTES}: make room there, or choose another --data-dir",
            directory.display()
        )
    })
}

fn ended_with(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("exit code {code}"),
        // Such as `signal: 9 (SIGKILL)`.
        None => status.to_string().replacen(": ", " ", 1),
    }
}

/// The last line of a node's output, where it says why the node has ended.
fn last_words(line: &str) -> Option<String> {
    let why = line.strip_prefix("error: ")?;
    Some(shortened(why, MOST_LAST_WORDS_BYTES))
}

/// The shortest way to write the path of this program in the user's shell.
fn shown_path(binary: &Path) -> String {
    let on_path = std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|dir| dir.is_absolute() && dir.join("quorate") == binary)
    });
    if on_path {
        return "quorate".to_owned();
    }
    let here = std::env::current_dir().ok();
    let relative = here.as_deref().and_then(|here| binary.strip_prefix(here).ok());
    relative.unwrap_or(binary).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_that_says_why_it_ended_is_repeated() {
        assert_eq!(last_words("error: the disk is too small").as_deref(), Some("the disk is too small"));
        assert_eq!(last_words("2026-01-01T00:00:00Z  INFO stopped"), None);
    }

    #[tokio::test]
    async fn numbers_are_checked_before_anything_is_made_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let data_dir = dir.path().join("none");
        for (nodes, client_port, peer_port) in
            [(u64::MAX, 7801, 7901), (u64::from(u32::MAX) + 1, 7801, 7901), (0, 7801, 7901), (3, 7801, 7802)]
        {
            let at = data_dir.clone();
            let args = ClusterArgs {
                nodes,
                data_dir: at,
                client_port,
                peer_port,
                frames: None,
                secure: false,
                restart: false,
            };
            let refused = run(args).await.unwrap_err();
            assert!(refused.is_invalid_input(), "{refused}");
            assert!(!data_dir.exists(), "nothing was begun");
        }
    }
}
