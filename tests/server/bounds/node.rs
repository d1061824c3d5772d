//! A node of its own, as a process.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream as Socket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use quorate::testkit::proto::v1::kv_client::KvClient;
use quorate::testkit::proto::v1::{GetRequest, PutRequest};
use tempfile::TempDir;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};

use super::MIB;
use crate::{DEADLINE, Process};

/// A node of its own, as a process.
pub(super) struct Node {
    pub(super) process: Process,
    pub(super) client: SocketAddr,
    pub(super) peer: SocketAddr,
    _dir: TempDir,
}

impl Node {
    /// Starts one with `args`, which may open so many files.
    pub(super) fn start(args: &[&str], files: Option<u32>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let limit = files.map_or(String::new(), |files| format!("ulimit -n {files}; "));
        let mut command = Command::new("sh");
        command.args([
            "-c",
            &format!("{limit}exec \"$0\" \"$@\""),
            env!("CARGO_BIN_EXE_quorate"),
            "serve",
            "--single",
        ]);
        command.args([
            "--client-listen",
            "127.0.0.1:0",
            "--peer-listen",
            "127.0.0.1:0",
            "--log-format",
            "json",
        ]);
        command.arg("--data-dir").arg(dir.path().join("data")).args(args).stderr(Stdio::piped());
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("QUORATE_")) {
            command.env_remove(name);
        }
        let mut process = Process(command.spawn().unwrap());
        let mut lines = BufReader::new(process.0.stderr.take().unwrap()).lines();
        let mut address = BTreeMap::new();
        let mut serving = false;
        for line in lines.by_ref().map(Result::unwrap) {
            let line: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            let fields = &line["fields"];
            for name in ["client", "peer"] {
                if let Some(found) = fields[name].as_str().and_then(|text| text.parse::<SocketAddr>().ok()) {
                    address.insert(name, found);
                }
            }
            serving |= fields["message"] == "serving";
            if serving && address.len() == 2 {
                break;
            }
        }
        std::thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
        let node = Self { process, client: address["client"], peer: address["peer"], _dir: dir };
        let started = Instant::now();
        while node.page("/readyz").0 != 200 {
            assert!(started.elapsed() < DEADLINE, "no leader");
            std::thread::sleep(Duration::from_millis(10));
        }
        node
    }

    /// `VmRSS` or `VmHWM` of the process, in bytes.
    pub(super) fn memory(&self, what: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(what)?.strip_prefix(':')).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    /// Code and body of a page.
    pub(super) fn page(&self, path: &str) -> (u16, String) {
        self.ask(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"))
    }

    pub(super) fn ask(&self, request: &str) -> (u16, String) {
        let mut socket = Socket::connect(self.client).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).unwrap();
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        (head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_default(), body.to_owned())
    }

    pub(super) fn metric(&self, name: &str) -> u64 {
        let (_, text) = self.page("/metrics");
        let value =
            text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<f64>().ok());
        value.unwrap_or_else(|| panic!("there is no {name} in\n{text}")) as u64
    }

    pub(super) async fn metric_reaches(&self, name: &str, reached: impl Fn(u64) -> bool) {
        let start = Instant::now();
        loop {
            let value = self.metric(name);
            if reached(value) {
                return;
            }
            assert!(start.elapsed() < DEADLINE, "{name} is {value}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(super) async fn channel(&self) -> Channel {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.client)).unwrap();
        // What most clients announce.
        endpoint
            .initial_stream_window_size(65_535)
            .initial_connection_window_size(65_535)
            .connect()
            .await
            .unwrap()
    }

    pub(super) async fn kv(&self) -> KvClient<Channel> {
        KvClient::new(self.channel().await)
    }

    /// It writes and reads, and answers probes, at once.
    pub(super) async fn serves_others(&self) {
        let serves = async {
            let mut kv = self.kv().await;
            kv.put(PutRequest { key: "other".into(), value: "v".into(), ..Default::default() })
                .await
                .unwrap();
            let request = GetRequest { key: "other".into(), ..Default::default() };
            assert_eq!(kv.get(request).await.unwrap().into_inner().item.unwrap().value, "v");
        };
        timeout(DEADLINE, serves).await.expect("others are not served");
        assert_eq!(self.page("/livez").0, 200);
        assert_eq!(self.page("/readyz").0, 200);
    }

    /// Puts `count` values of 1 MiB, `k0` and so on.
    pub(super) async fn put_large(&self, count: usize) {
        let mut kv = self.kv().await;
        for number in 0..count {
            let (key, value) = (format!("k{number}").into(), vec![7; MIB as usize].into());
            kv.put(PutRequest { key, value, ..Default::default() }).await.unwrap();
        }
    }
}
