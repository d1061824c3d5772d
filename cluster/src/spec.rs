//! What to run.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use crate::error::ClusterError;
use crate::ports::PortBlock;
use crate::stderr::Stderr;

/// Most nodes of one local cluster.
pub const MAX_NODES: u64 = 16;

/// A local cluster: nodes 1 to `nodes`, node N on the Nth client port and the Nth peer port.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ClusterSpec {
    /// The `quorate` binary.
    pub binary: PathBuf,
    /// How many nodes.
    pub nodes: u64,
    /// How many of them, the last ones, do not form the cluster but are started to be added to it. Default 0.
    pub joining: u64,
    /// Where `cluster.json`, the lock and one directory per node go.
    pub data_dir: PathBuf,
    /// The address that all nodes listen on and are reached at.
    pub host: String,
    /// Client port of node 1; node N has `client_port + N - 1`.
    pub client_port: u16,
    /// Peer port of node 1; node N has `peer_port + N - 1`.
    pub peer_port: u16,
    /// Port of node 1 for followers without gRPC, if there are to be any; node N has the Nth from it.
    pub frames_port: Option<u16>,
    /// Name of the cluster.
    pub cluster: String,
    /// A directory with `ca.pem`, and `node-N.pem` and `node-N.key` for each node, by which members prove to each other who they are.
    pub peer_credentials: Option<PathBuf>,
    /// The same for the ports of clients, which speak TLS then.
    pub client_credentials: Option<PathBuf>,
    /// Arguments for every node, after those that this crate gives.
    pub extra_args: Vec<OsString>,
    /// Where the standard error of every node leads.
    pub stderr: Stderr,
    /// Keeps the ports reserved while any clone of this spec, and so any cluster made from it, lives.
    reserved: Option<Arc<PortBlock>>,
}

impl ClusterSpec {
    /// Three nodes of `binary` in `data_dir`, on 127.0.0.1 with client ports from 7801 and peer ports from
    /// 7901.
    pub fn new(binary: impl Into<PathBuf>, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            binary: binary.into(),
            nodes: 3,
            joining: 0,
            data_dir: data_dir.into(),
            host: "127.0.0.1".to_owned(),
            client_port: 7801,
            peer_port: 7901,
            frames_port: None,
            cluster: "quorate".to_owned(),
            peer_credentials: None,
            client_credentials: None,
            extra_args: Vec::new(),
            stderr: Stderr::default(),
            reserved: None,
        }
    }

    /// The same on ports that nothing else uses, now or while this spec or a cluster made from it lives.
    ///
    /// # Errors
    /// [`ClusterError::NoFreePorts`].
    pub fn with_free_ports(mut self) -> Result<Self, ClusterError> {
        let block = PortBlock::reserve(&self.host)?;
        self.client_port = block.client_port();
        self.peer_port = block.peer_port();
        self.reserved = Some(Arc::new(block));
        Ok(self)
    }

    /// How many nodes form the cluster; their ids come first.
    fn founders(&self) -> u64 {
        self.nodes.saturating_sub(self.joining)
    }

    /// The ids of all nodes.
    pub fn node_ids(&self) -> impl Iterator<Item = u64> + use<> {
        1..=self.nodes
    }

    /// `host:port` for clients of `node_id`, which may lie one or more beyond `nodes`.
    pub fn client_address(&self, node_id: u64) -> String {
        self.address(self.client_port, node_id)
    }

    /// `host:port` for peers of `node_id`, which may lie one or more beyond `nodes`.
    pub fn peer_address(&self, node_id: u64) -> String {
        self.address(self.peer_port, node_id)
    }

    /// `host:port` for followers of `node_id` without gRPC.
    pub fn frames_address(&self, node_id: u64) -> Option<String> {
        self.frames_port.map(|first_port| self.address(first_port, node_id))
    }

    fn address(&self, first_port: u16, node_id: u64) -> String {
        let port = u64::from(first_port) + node_id.saturating_sub(1);
        // An IPv6 address needs brackets before its port.
        if self.host.contains(':') {
            format!("[{}]:{port}", self.host)
        } else {
            format!("{}:{port}", self.host)
        }
    }

    /// The client addresses of all nodes, in the order of their ids.
    pub fn endpoints(&self) -> Vec<String> {
        self.node_ids().map(|node_id| self.client_address(node_id)).collect()
    }

    /// All founding members with their peer addresses, as `--peers` takes them.
    pub fn peers(&self) -> String {
        let peers: Vec<_> = (1..=self.founders())
            .map(|node_id| format!("{node_id}={}", self.peer_address(node_id)))
            .collect();
        peers.join(",")
    }

    /// The directory of all that belongs to `node_id`: its data and its output.
    pub fn node_dir(&self, node_id: u64) -> PathBuf {
        self.data_dir.join(format!("node-{node_id}"))
    }

    /// The node's own `--data-dir`.
    pub fn node_data_dir(&self, node_id: u64) -> PathBuf {
        self.node_dir(node_id).join("data")
    }

    /// Where the standard output and error of `node_id` are appended.
    pub fn node_log(&self, node_id: u64) -> PathBuf {
        self.node_dir(node_id).join("output.log")
    }

    /// The command that runs `node_id`. A test may change it and run it on its own account.
    pub fn command(&self, node_id: u64) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .arg("serve")
            .args(["--node-id", &node_id.to_string()])
            .args(["--cluster", &self.cluster])
            .arg("--data-dir")
            .arg(self.node_data_dir(node_id))
            .args(["--client-listen", &self.client_address(node_id)])
            .args(["--client-advertise", &self.client_address(node_id)])
            .args(["--peer-listen", &self.peer_address(node_id)])
            .args(["--peer-advertise", &self.peer_address(node_id)]);
        if let Some(address) = self.frames_address(node_id) {
            command.args(["--frames-listen", &address]);
        }
        if node_id <= self.founders() {
            command.args(["--peers", &self.peers()]);
        } else {
            command.arg("--join");
        }
        let file = |dir: &PathBuf, kind: &str| dir.join(format!("node-{node_id}.{kind}"));
        if let Some(dir) = &self.peer_credentials {
            command.arg("--peer-ca").arg(dir.join("ca.pem"));
            command.arg("--peer-cert").arg(file(dir, "pem")).arg("--peer-key").arg(file(dir, "key"));
        }
        // What a client of this shell shows is not the node's.
        command.env_remove("QUORATE_TLS_CERT").env_remove("QUORATE_TLS_KEY");
        if let Some(dir) = &self.client_credentials {
            command.arg("--tls-client-ca").arg(dir.join("ca.pem"));
            command.arg("--tls-cert").arg(file(dir, "pem")).arg("--tls-key").arg(file(dir, "key"));
        }
        command.args(&self.extra_args);
        command
    }

    /// [`ClusterSpec::command`] as a line for a shell.
    pub fn command_line(&self, node_id: u64) -> String {
        let command = self.command(node_id);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| quote(&word.to_string_lossy())).collect::<Vec<_>>().join(" ")
    }

    /// Refuses what cannot be started, at once. The number of nodes is to be checked before anything is made for each of them.
    ///
    /// # Errors
    /// [`ClusterError::Nodes`], [`ClusterError::PortRanges`].
    pub fn validate(&self) -> Result<(), ClusterError> {
        if self.nodes == 0 || self.nodes > MAX_NODES {
            return Err(ClusterError::Nodes { nodes: self.nodes, max: MAX_NODES });
        }
        if self.joining >= self.nodes {
            return Err(ClusterError::Nodes { nodes: 0, max: MAX_NODES });
        }
        let firsts = [Some(self.client_port), Some(self.peer_port), self.frames_port];
        let range = |first: u16| u64::from(first)..u64::from(first) + self.nodes;
        let mut ranges: Vec<_> = firsts.into_iter().flatten().map(range).collect();
        ranges.sort_by_key(|range| range.start);
        let overlap = ranges.windows(2).any(|two| two[1].start < two[0].end);
        let fits = ranges.iter().all(|range| range.start != 0 && range.end <= 1 << 16);
        if overlap || !fits {
            return Err(ClusterError::PortRanges {
                nodes: self.nodes,
                client_port: self.client_port,
                peer_port: self.peer_port,
                frames_port: self.frames_port,
            });
        }
        Ok(())
    }
}

/// One word for a POSIX shell.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_count_up_from_the_first_port() {
        let spec = ClusterSpec::new("quorate", "/tmp/x");
        assert_eq!(spec.endpoints(), ["127.0.0.1:7801", "127.0.0.1:7802", "127.0.0.1:7803"]);
        assert_eq!(spec.peers(), "1=127.0.0.1:7901,2=127.0.0.1:7902,3=127.0.0.1:7903");
        let six = ClusterSpec { host: "::1".to_owned(), ..spec };
        assert_eq!(six.client_address(2), "[::1]:7802");
    }

    #[test]
    fn the_command_line_survives_a_shell() {
        let spec = ClusterSpec { cluster: "it's".to_owned(), ..ClusterSpec::new("quorate", "/tmp/a b") };
        let line = spec.command_line(2);
        assert!(line.starts_with(r"quorate serve --node-id 2 --cluster 'it'\''s' "), "{line}");
        assert!(line.contains("--data-dir '/tmp/a b/node-2/data'"), "{line}");
    }

    #[test]
    fn impossible_specs_are_refused() {
        let valid = ClusterSpec::new("quorate", "/tmp/x");
        assert!(valid.validate().is_ok());
        for nodes in [0, MAX_NODES + 1] {
            let spec = ClusterSpec { nodes, ..valid.clone() };
            assert!(matches!(spec.validate(), Err(ClusterError::Nodes { .. })));
        }
        for (client_port, peer_port) in [(7801, 7803), (7803, 7801), (65_534, 7901), (0, 7901)] {
            let spec = ClusterSpec { client_port, peer_port, ..valid.clone() };
            assert!(matches!(spec.validate(), Err(ClusterError::PortRanges { .. })), "{client_port}");
        }
        for (frames_port, fits) in [(7811, true), (7803, false), (7900, false), (65_534, false), (0, false)] {
            let spec = ClusterSpec { frames_port: Some(frames_port), ..valid.clone() };
            assert_eq!(spec.validate().is_ok(), fits, "{frames_port}");
        }
        assert!(ClusterSpec { client_port: 65_533, ..valid }.validate().is_ok());
    }
}
