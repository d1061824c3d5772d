//! What `quorate cluster` shows: lines that stay, and below them, on a terminal, a table that is redrawn
//! in place. Elsewhere a line is printed when something changes that a reader of a log wants to know.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Stdout, Write as _};

use crate::kv::client::NodeReport;
use crate::logging::{self, FLUSH_PATIENCE, LogWriter};
use crate::types::{NodeId, Role};

/// One node at one moment.
#[derive(Debug, Clone)]
pub(super) struct NodeRow {
    pub(super) node_id: NodeId,
    pub(super) endpoint: String,
    /// Its process, while it runs.
    pub(super) pid: Option<u32>,
    /// What it said of itself, when it answered.
    pub(super) status: Option<NodeReport>,
}

/// All nodes at one moment.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub(super) rows: Vec<NodeRow>,
}

impl View {
    /// Who leads: a deposed leader may not know it yet, so the highest term counts.
    pub(super) fn leader(&self) -> Option<NodeId> {
        self.leading().map(|(row, _)| row.node_id)
    }

    fn leading(&self) -> Option<(&NodeRow, &NodeReport)> {
        let answering = self.rows.iter().filter_map(|row| Some((row, row.status.as_ref()?)));
        answering.filter(|(_, status)| status.leads()).max_by_key(|(_, status)| status.term)
    }

    /// What a change is of, where there is no terminal: everything but the positions.
    fn gist(&self) -> String {
        let mut gist = match self.leading() {
            Some((row, status)) => {
                let mut text = format!("node {} leads term {}", row.node_id, status.term);
                if let Some(pid) = row.pid {
                    let _ = write!(text, " (kill -9 {pid} to see another take over)");
                }
                text
            }
            None => "no leader".to_owned(),
        };
        for row in &self.rows {
            let _ = match (&row.status, row.pid) {
                (Some(status), _) => write!(gist, "; node {} {}", row.node_id, role(status)),
                (None, Some(_)) => write!(gist, "; node {} does not answer", row.node_id),
                (None, None) => write!(gist, "; node {} is down", row.node_id),
            };
        }
        gist
    }

    /// The table, one string per line.
    fn table(&self) -> Vec<String> {
        let leading = self.leading();
        let committed =
            leading.and_then(|(_, status)| status.offsets.committed).map(|position| position.index);
        let mut lines = vec![String::new()];
        lines.push(match leading {
            Some((row, status)) => {
                let kill = row.pid.map(|pid| format!(" · kill -9 {pid} to depose it")).unwrap_or_default();
                let index = committed.map_or("nothing".to_owned(), |index| index.to_string());
                format!("node {} leads · term {} · committed {index}{kill}", row.node_id, status.term)
            }
            None => "no leader at present".to_owned(),
        });
        lines.push(format!(
            "{:<5} {:<10} {:>5} {:>10} {:>7} {:>8}  clients",
            "node", "role", "term", "applied", "lag", "process"
        ));
        for row in &self.rows {
            let pid = row.pid.map_or("-".to_owned(), |pid| pid.to_string());
            let (role, term, applied, lag) = match &row.status {
                Some(status) => {
                    let applied = status.offsets.applied.map(|position| position.index);
                    // Positions start at 0, so nothing applied is one behind it.
                    let count = |index: Option<u64>| index.map_or(0, |index| index + 1);
                    let lag = committed.map(|_| count(committed).saturating_sub(count(applied)));
                    (role(status), status.term.to_string(), text(applied), text(lag))
                }
                None => {
                    let role = if row.pid.is_some() { "silent" } else { "down" };
                    (role, "-".to_owned(), "-".to_owned(), "-".to_owned())
                }
            };
            lines.push(format!(
                "{:<5} {role:<10} {term:>5} {applied:>10} {lag:>7} {pid:>8}  {}",
                row.node_id, row.endpoint
            ));
        }
        lines
    }
}

fn role(status: &NodeReport) -> &'static str {
    status.role.map_or("-", Role::name)
}

fn text(number: Option<u64>) -> String {
    number.map_or("-".to_owned(), |number| number.to_string())
}

/// How to talk to the cluster in `view`, and how to hurt it.
pub(super) fn introduction(call: &str, view: &View) -> String {
    let mut text = format!(
        "the cluster is ready; in another terminal:\n\n  {call} put hello world\n  {call} get hello\n  {call} status\n"
    );
    if let Some((leader, _)) = view.leading()
        && let Some(pid) = leader.pid
    {
        let _ =
            writeln!(text, "  kill -9 {pid}    # node {}, the leader: another takes over", leader.node_id);
    }
    text.push_str("\nCtrl-C stops the nodes in order.");
    text
}

/// Where it is printed: on a terminal at once; elsewhere by a thread of its own, because a pipe that nobody reads is
/// no reason to look after the nodes no more.
enum Out {
    Terminal(Stdout),
    Lines(LogWriter),
}

/// Standard output. A reader that goes away (`quorate cluster | head`) is no reason to stop nodes, so
/// failures to print are ignored.
pub(super) struct Screen {
    out: Out,
    terminal: bool,
    /// Lines of the table on the screen, to go up by before it is drawn again.
    drawn_lines: usize,
    table: Vec<String>,
    gist: String,
}

impl Screen {
    pub(super) fn stdout() -> Self {
        let stdout = io::stdout();
        let terminal = stdout.is_terminal();
        let lines = || logging::unlocked(&stdout).and_then(LogWriter::start);
        let out = match terminal {
            true => Out::Terminal(stdout),
            false => lines().map_or(Out::Terminal(io::stdout()), Out::Lines),
        };
        Self { out, terminal, drawn_lines: 0, table: Vec::new(), gist: String::new() }
    }

    /// Prints `text`, which stays, above the table.
    pub(super) fn print(&mut self, text: &str) {
        let erase = self.erase();
        self.write(&format!("{erase}{text}\n"));
        self.draw();
    }

    /// Shows the cluster as it is now.
    pub(super) fn show(&mut self, view: &View) {
        if self.terminal {
            self.table = view.table();
            let erase = self.erase();
            self.write(&erase);
            self.draw();
        } else {
            let gist = view.gist();
            if gist != self.gist {
                self.write(&format!("{gist}\n"));
                self.gist = gist;
            }
        }
    }

    /// Leaves the table where it is; what is printed next comes below it.
    pub(super) fn keep(&mut self) {
        self.drawn_lines = 0;
        self.table.clear();
    }

    fn draw(&mut self) {
        if self.table.is_empty() {
            return;
        }
        // A line that wraps would make the count of lines wrong, so the terminal is told to cut it.
        let text = format!("\x1b[?7l{}\n\x1b[?7h", self.table.join("\n"));
        self.write(&text);
        self.drawn_lines = self.table.len();
    }

    /// The control sequence that removes the table.
    fn erase(&mut self) -> String {
        match std::mem::take(&mut self.drawn_lines) {
            0 => String::new(),
            lines => format!("\x1b[{lines}A\r\x1b[J"),
        }
    }

    fn write(&mut self, text: &str) {
        match &mut self.out {
            Out::Terminal(stdout) => {
                let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
            }
            Out::Lines(writer) => writer.line(text.as_bytes()),
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if let Out::Lines(writer) = &self.out {
            writer.flush(FLUSH_PATIENCE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kv::client::Endpoint;
    use crate::proto::v1::{Position, StatusResponse};

    fn row(node_id: NodeId, role: Role, term: u64, index: u64) -> NodeRow {
        let at = Some(Position { term, index, history: 0 });
        let endpoint = Endpoint::parse(&format!("127.0.0.1:780{node_id}")).unwrap();
        NodeRow {
            node_id,
            endpoint: endpoint.to_string(),
            pid: Some(100 + node_id as u32),
            status: Some(NodeReport::decode(StatusResponse {
                node_id,
                role: role.name().to_owned(),
                term,
                committed: at,
                applied: at,
                ..Default::default()
            })),
        }
    }

    #[test]
    fn the_table_names_leader_term_positions_and_lag() {
        let mut down = row(3, Role::Follower, 2, 0);
        (down.pid, down.status) = (None, None);
        // Node 1 has not heard yet that it was deposed.
        let view = View { rows: vec![row(1, Role::Leader, 2, 30), row(2, Role::Leader, 4, 50), down] };
        assert_eq!(view.leader(), Some(2));
        assert_eq!(
            view.table().join("\n"),
            "
node 2 leads · term 4 · committed 50 · kill -9 102 to depose it
node  role        term    applied     lag  process  clients
1     leader         2         30      20      101  127.0.0.1:7801
2     leader         4         50       0      102  127.0.0.1:7802
3     down           -          -       -        -  127.0.0.1:7803"
        );
        assert_eq!(
            view.gist(),
            "node 2 leads term 4 (kill -9 102 to see another take over); \
             node 1 leader; node 2 leader; node 3 is down"
        );
    }

    #[test]
    fn the_introduction_can_be_pasted() {
        let view = View { rows: vec![row(1, Role::Leader, 1, 3), row(2, Role::Follower, 1, 3)] };
        let text = introduction("target/release/quorate", &view);
        assert!(text.contains("\n  target/release/quorate put hello world\n"), "{text}");
        assert!(text.contains("\n  kill -9 101 "), "{text}");
    }
}
