//! In which order a node's files become durable, in scripts: `tests/golden/scripts/file-order`. Each command shows what it makes of
//! the files, and what it syncs. What is in the directory of the log is for `log-order`.

use std::io::Write as _;
use std::path::PathBuf;

use goldenscript::{Context, Runner};

use super::super::{
    DataDir, ReceivedSnapshot, SledOptions, SledStore, SnapshotDir, SnapshotMeta, SnapshotStore, lease,
};
use super::syncs::recorded;
use crate::golden::{Told, scripts};
use crate::types::{ClusterClock, HistoryEpoch, LogId, Membership, SnapshotMachines};

#[derive(goldenscript::Command)]
enum Step {
    /// A data directory is opened, for the first time or again.
    OpenDirectory,
    /// The log in it is.
    OpenLog,
    /// The snapshots in it are.
    OpenSnapshots,
    /// The node is about to promise its leaders a lease of this length.
    Promise {
        #[arg(key)]
        lease_ms: u64,
    },
    /// It takes a snapshot at this index.
    Take(u64),
    /// It begins one, and gives it up.
    GiveUp(u64),
    /// It receives one from another node, and verifies it.
    Receive(u64),
    /// What was received is put in its place.
    Place,
    /// A crash has left a file behind.
    LeftBehind(String),
    /// The process ends.
    End,
}

struct Node {
    home: tempfile::TempDir,
    data: Option<DataDir>,
    log: Option<SledStore>,
    snapshots: Option<SnapshotDir>,
    received: Option<ReceivedSnapshot>,
}

fn meta(index: u64) -> SnapshotMeta {
    SnapshotMeta {
        log_id: LogId::new(1, index),
        clock: ClusterClock::default(),
        membership_log_id: None,
        membership: Membership::default(),
        history: HistoryEpoch::UNKNOWN,
        quota_bytes: 0,
        machines: SnapshotMachines::default(),
    }
}

impl Node {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        Self { home, data: None, log: None, snapshots: None, received: None }
    }

    fn path(&self) -> PathBuf {
        self.home.path().join("node")
    }

    fn snapshots(&self) -> &SnapshotDir {
        self.snapshots.as_ref().expect("they are open")
    }

    fn step(&mut self, step: &Step) -> Result<(), Box<dyn std::error::Error>> {
        match step {
            Step::OpenDirectory => self.data = Some(DataDir::open(&self.path(), "c", 1)?),
            Step::OpenLog => {
                let data = self.data.take().expect("the directory is open");
                self.log = Some(SledStore::open_in(data, SledOptions::default(), None)?);
            }
            Step::OpenSnapshots => self.snapshots = Some(SnapshotDir::open(&self.path().join("snapshots"))?),
            Step::Promise { lease_ms } => drop(lease::promise(&self.path(), *lease_ms)?),
            Step::Take(index) => {
                let mut writer = self.snapshots().begin(&meta(*index))?;
                writer.write_all(b"state")?;
                writer.finish()?;
            }
            Step::GiveUp(index) => {
                let mut writer = self.snapshots().begin(&meta(*index))?;
                writer.write_all(b"state")?;
            }
            Step::Receive(index) => {
                let elsewhere = tempfile::tempdir()?;
                let mut writer = SnapshotDir::open(elsewhere.path())?.begin(&meta(*index))?;
                writer.write_all(b"state")?;
                let theirs = writer.finish()?;
                let mut receiver = self.snapshots().receive(theirs.meta().log_id)?;
                receiver.write(0, &theirs.read_at(0, usize::MAX)?)?;
                self.received = Some(receiver.finish()?);
            }
            Step::Place => drop(self.received.take().expect("it was received").place()?),
            Step::LeftBehind(name) => std::fs::write(self.path().join(name), b"x")?,
            Step::End => (self.received, self.snapshots, self.log, self.data) = (None, None, None, None),
        }
        Ok(())
    }
}

impl Runner for Node {
    type Command = Step;

    fn run(&mut self, step: &Step, _: &Context) -> Told {
        let home = self.home.path().to_owned();
        let (outcome, mut lines) = recorded(&home, || self.step(step));
        if let Err(error) = outcome {
            lines
                .push(format!("refused: {}", error.to_string().replace(&format!("{}/", home.display()), "")));
        }
        Ok(lines.into_iter().map(|line| line + "\n").collect())
    }
}

#[test]
fn scripts_of_the_order_of_files() {
    scripts("file-order", Node::new);
}
