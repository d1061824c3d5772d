//! `quorate config-test`: whether a client's endpoints, or a node's configuration file, are what they should be. Changes nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use futures::future::join_all;
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::{Instant, timeout};

use super::endpoints::{self, AskedNode, NodeKind};
use super::serve::ServeCommandError;
use super::{CliError, Common, Format, output, status};
use crate::config::{GivenSettings, ServeArgs, ServeConfig};
use crate::door::Credentials;
use crate::kv::client::{Client, Endpoint, NodeReport, ReplicaReads};
use crate::report::millis;
use crate::types::NodeId;

/// How long a name may take to be resolved, and a connection to be made.
const PATIENCE: Duration = Duration::from_secs(2);

/// Arguments of `quorate config-test`.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Example:\n  quorate config-test --endpoints 10.0.0.1:7801,10.0.0.2:7801,10.0.0.9:7811\n  quorate config-test -o json | jq .problems\n  quorate config-test --config /etc/quorate/node1.toml\n\nAsks every endpoint: its name must be resolved, it must take connections and answer, and all must be of one cluster and one history, run one version, and know who leads. Shows which are replicas, and which members and replicas were not given. With --config FILE it reads the file as `quorate serve --config FILE` does, refuses what that would refuse, and starts nothing; no endpoint is asked. Exits with 0 when all is well, with 1 when not, with 2 when no endpoint answers, and with 3 when the file is at fault."
)]
pub struct ConfigTestArgs {
    /// Check this configuration file of a node, TOML or YAML, instead of the endpoints
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What is printed of endpoints.
#[derive(Debug, Serialize)]
struct ConfigReport {
    passed: bool,
    cluster: Option<String>,
    /// Where the leader is, as most say.
    leader: Option<String>,
    version: Option<String>,
    problems: Vec<String>,
    /// What is no problem, and good to know.
    remarks: Vec<String>,
    endpoints: Vec<EndpointRow>,
}

/// One endpoint.
#[derive(Debug, Serialize)]
struct EndpointRow {
    endpoint: String,
    /// How many addresses its name has.
    addresses: usize,
    connects: bool,
    answers: bool,
    /// How long it took to connect.
    connect_ms: Option<f64>,
    node_id: Option<NodeId>,
    kind: Option<NodeKind>,
    role: Option<String>,
    cluster: Option<String>,
    version: Option<String>,
    ready: Option<bool>,
    error: Option<String>,
}

/// Checks what was given.
///
/// # Errors
/// After the report: [`CliError::TestFailed`], or [`CliError::NoNodeAnswers`]. [`CliError::Node`] when the file is at fault.
pub async fn run(common: &Common, args: ConfigTestArgs) -> Result<(), CliError> {
    if let Some(path) = &args.config {
        return check_file(common.output, path);
    }
    let client = common.client_with(|config| {
        config.unavailable_after = Duration::ZERO;
        config.replica_reads = ReplicaReads::Never;
    })?;
    let checked = join_all(common.endpoints.iter().map(|endpoint| check(&client, endpoint))).await;
    let (rows, answers): (Vec<_>, Vec<_>) = checked.into_iter().unzip();
    let others = endpoints::ask_others(&client, &answers, true).await;
    let report = report(rows, &answers, &others);
    let printed = match common.output {
        Format::Json => output::json(&report),
        Format::Table => output::raw(table(&report).as_bytes()),
    };
    match report.passed {
        true => printed,
        false if report.endpoints.iter().all(|row| !row.answers) => Err(CliError::NoNodeAnswers),
        false => {
            let count = report.problems.len();
            Err(CliError::TestFailed(format!("{count} problem{} found", if count == 1 { "" } else { "s" })))
        }
    }
}

/// Reads the settings as a node would, without the flags and the environment of this process.
fn check_file(format: Format, path: &Path) -> Result<(), CliError> {
    let args = ServeArgs { config: Some(path.to_owned()), settings: GivenSettings::default() };
    let refused = |error: ServeCommandError| CliError::node(error);
    let config = ServeConfig::load(args).map_err(|error| refused(error.into()))?;
    config.check_exposure().map_err(|error| refused(error.into()))?;
    if config.door.auth.is_required() {
        Credentials::load(config.door.auth.clone()).map_err(|error| refused(error.into()))?;
    }
    let settings = config.fixed_settings();
    match format {
        Format::Json => {
            let settings: Map<String, Value> =
                settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
            output::json(&serde_json::json!({ "passed": true, "settings": settings }))
        }
        Format::Table => {
            let rows: Vec<_> = settings
                .into_iter()
                .map(|(name, value)| {
                    vec![name.to_owned(), value.as_str().map_or_else(|| value.to_string(), str::to_owned)]
                })
                .collect();
            output::raw(output::table(&["SETTING", "VALUE"], &rows).as_bytes())?;
            output::line("passed: a node can be started with it")
        }
    }
}

/// Resolves, connects, and asks.
async fn check(client: &Client, endpoint: &Endpoint) -> (EndpointRow, AskedNode) {
    let mut row = EndpointRow {
        endpoint: endpoint.to_string(),
        addresses: 0,
        connects: false,
        answers: false,
        connect_ms: None,
        node_id: None,
        kind: None,
        role: None,
        cluster: None,
        version: None,
        ready: None,
        error: None,
    };
    match timeout(PATIENCE, lookup_host(endpoint.as_str())).await {
        Ok(Ok(addresses)) => row.addresses = addresses.count(),
        Ok(Err(error)) => row.error = Some(format!("its name is not resolved: {error}")),
        Err(_) => row.error = Some(format!("its name is not resolved within {} s", PATIENCE.as_secs())),
    }
    if row.error.is_none() {
        let asked = Instant::now();
        match timeout(PATIENCE, TcpStream::connect(endpoint.as_str())).await {
            Ok(Ok(_)) => (row.connects, row.connect_ms) = (true, Some(millis(asked.elapsed()))),
            Ok(Err(error)) => row.error = Some(format!("it takes no connection: {error}")),
            Err(_) => row.error = Some(format!("it takes no connection within {} s", PATIENCE.as_secs())),
        }
    }
    let answer = client.status(endpoint).await;
    match &answer {
        Ok(report) => row.tell(report),
        Err(error) => {
            row.error.get_or_insert_with(|| status::why(error));
        }
    }
    (row, (endpoint.clone(), answer))
}

impl EndpointRow {
    fn tell(&mut self, report: &NodeReport) {
        (self.answers, self.error) = (true, None);
        self.node_id = Some(report.node_id).filter(|node_id| *node_id != 0);
        let kind = NodeKind::of(report);
        self.kind = Some(kind);
        self.role = match kind {
            NodeKind::Member => report.role.map(|role| role.to_string()),
            NodeKind::Replica | NodeKind::PartialReplica => Some(kind.name().to_owned()),
        };
        self.cluster = Some(report.cluster.clone()).filter(|name| !name.is_empty());
        self.version = Some(report.version.clone());
        self.ready = Some(report.ready);
    }
}

/// The values of something, and which endpoints have each; more than one is a problem.
fn differ<T: Ord + ToString>(what: &str, of: impl Iterator<Item = (String, T)>) -> Option<String> {
    let mut values: BTreeMap<T, Vec<String>> = BTreeMap::new();
    for (endpoint, value) in of {
        values.entry(value).or_default().push(endpoint);
    }
    let shown = |(value, endpoints): (&T, &Vec<String>)| {
        format!("{} ({})", output::printable(value.to_string().as_bytes()), endpoints.join(", "))
    };
    (values.len() > 1)
        .then(|| format!("{what} differ: {}", values.iter().map(shown).collect::<Vec<_>>().join(" and ")))
}

fn report(rows: Vec<EndpointRow>, answers: &[AskedNode], others: &[AskedNode]) -> ConfigReport {
    let told = || answers.iter().filter_map(|(at, answer)| Some((at.to_string(), answer.as_ref().ok()?)));
    let mut problems: Vec<_> =
        rows.iter().filter_map(|row| Some(format!("{}: {}", row.endpoint, row.error.as_ref()?))).collect();
    for row in rows.iter().filter(|row| row.ready == Some(false)) {
        problems.push(format!("{} is not ready", row.endpoint));
    }
    // A replica that has not heard from its source since it was started knows neither name nor history yet.
    let clusters =
        told().map(|(at, report)| (at, report.cluster.clone())).filter(|(_, name)| !name.is_empty());
    problems.extend(differ("the clusters", clusters));
    let histories = told().filter(|(_, report)| report.history.0 != 0);
    problems.extend(differ("the histories", histories.map(|(at, report)| (at, report.history.to_string()))));
    problems.extend(differ("the versions", told().map(|(at, report)| (at, report.version.clone()))));
    let leaders = || told().filter_map(|(at, report)| Some((at, report.leader.as_ref()?.client.clone())));
    problems.extend(differ("the leaders that they know", leaders().filter(|(_, leader)| !leader.is_empty())));
    let leader = leaders().next().map(|(_, leader)| leader);
    if leader.is_none() && told().next().is_some() {
        problems.push("no leader is known".to_owned());
    }
    let mut remarks = Vec::new();
    let mut first_at: BTreeMap<NodeId, String> = BTreeMap::new();
    for (at, report) in told().filter(|(_, report)| report.node_id != 0) {
        if let Some(first) = first_at.insert(report.node_id, at.clone()) {
            remarks.push(format!("{first} and {at} are the same node, {}", report.node_id));
        }
    }
    for (endpoint, answer) in others {
        match answer {
            Ok(report) => {
                remarks.push(format!("{endpoint} was not given: a {}", NodeKind::of(report).name()));
            }
            Err(error) => {
                let why = status::why(error);
                remarks.push(format!("{endpoint} was not given, and does not answer: {why}"));
            }
        }
    }
    ConfigReport {
        passed: problems.is_empty(),
        cluster: rows.iter().find_map(|row| row.cluster.clone()),
        leader,
        version: rows.iter().find_map(|row| row.version.clone()),
        problems,
        remarks,
        endpoints: rows,
    }
}

fn table(report: &ConfigReport) -> String {
    let dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let yes = |yes: bool| if yes { "yes" } else { "no" }.to_owned();
    let row = |row: &EndpointRow| {
        vec![
            row.endpoint.clone(),
            yes(row.addresses > 0),
            yes(row.connects),
            yes(row.answers),
            dash(row.node_id.map(|node_id| node_id.to_string())),
            dash(row.role.clone()),
            dash(row.cluster.as_deref().map(|name| output::printable(name.as_bytes()))),
            dash(row.version.as_deref().map(|version| output::printable(version.as_bytes()))),
            row.ready.map_or_else(|| "-".to_owned(), yes),
        ]
    };
    let headings =
        ["ENDPOINT", "RESOLVES", "CONNECTS", "ANSWERS", "NODE", "ROLE", "CLUSTER", "VERSION", "READY"];
    let rows: Vec<_> = report.endpoints.iter().map(row).collect();
    let mut text = output::table(&headings, &rows);
    for remark in &report.remarks {
        text.push_str(&format!("note: {remark}\n"));
    }
    for problem in &report.problems {
        text.push_str(&format!("problem: {problem}\n"));
    }
    let leader = report.leader.as_deref().map_or_else(String::new, |leader| format!(", {leader} leads"));
    text.push_str(&match report.passed {
        true => format!("passed{leader}\n"),
        false => "FAILED\n".to_owned(),
    });
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::golden;
    use crate::kv::client::{ClientError, MemberReport, ReplicaReport};
    use crate::types::{HistoryEpoch, Leader, Role};

    fn node(node_id: NodeId, role: Role) -> NodeReport {
        NodeReport {
            node_id,
            cluster: "c".to_owned(),
            role: Some(role),
            leader: Some(Leader { node_id: 1, client: "n1:1".to_owned() }),
            ready: true,
            members: vec![MemberReport { node_id: 1, client: "n1:1".to_owned(), ..Default::default() }],
            history: HistoryEpoch(7),
            version: "0.1.0".to_owned(),
            ..Default::default()
        }
    }

    fn asked(nodes: Vec<(&str, Option<NodeReport>)>) -> (Vec<EndpointRow>, Vec<AskedNode>) {
        let asked = nodes.into_iter().map(|(at, report)| {
            let endpoint = Endpoint::parse(at).unwrap();
            let mut row = EndpointRow {
                endpoint: at.to_owned(),
                addresses: 1,
                connects: report.is_some(),
                answers: false,
                connect_ms: report.as_ref().map(|_| 0.5),
                node_id: None,
                kind: None,
                role: None,
                cluster: None,
                version: None,
                ready: None,
                error: report.is_none().then(|| "it takes no connection: refused".to_owned()),
            };
            let answer = report.ok_or(ClientError::Unavailable { tried: Vec::new() });
            if let Ok(report) = &answer {
                row.tell(report);
            }
            (row, (endpoint, answer))
        });
        asked.unzip()
    }

    #[test]
    fn what_is_wrong_with_endpoints_is_told() {
        let replica = |partial| {
            let replica = Some(ReplicaReport { partial, ..Default::default() });
            Some(NodeReport { replica, ..node(0, Role::Learner) })
        };
        let (leader, follower) = (|| Some(node(1, Role::Leader)), || Some(node(2, Role::Follower)));
        let other = NodeReport {
            cluster: "d".to_owned(),
            version: "0.2.0".to_owned(),
            ready: false,
            leader: Some(Leader { node_id: 9, client: "m9:1".to_owned() }),
            history: HistoryEpoch(8),
            ..node(3, Role::Follower)
        };
        let lone = NodeReport { leader: None, ..node(2, Role::Candidate) };
        let mut shown = String::new();
        for (given, others) in [
            (vec![("n1:1", leader()), ("n2:1", follower()), ("r1:1", replica(false))], vec![]),
            (
                vec![("n1:1", leader()), ("also:1", leader())],
                vec![("n2:1", follower()), ("r2:1", replica(true)), ("n3:1", None)],
            ),
            (vec![("n1:1", leader()), ("n2:1", None), ("n3:1", Some(other))], vec![]),
            (vec![("n2:1", Some(lone))], vec![]),
        ] {
            let ((rows, answers), (_, others)) = (asked(given), asked(others));
            let report = report(rows, &answers, &others);
            let json = serde_json::to_string_pretty(&report).unwrap();
            shown.push_str(&format!("{}{json}\n\n", table(&report)));
        }
        golden("cli-config-test.txt", &shown);
    }

    #[test]
    fn a_file_is_checked_as_a_node_would() {
        let dir = tempfile::tempdir().unwrap();
        let check = |text: &str| {
            let path = dir.path().join("quorate.toml");
            std::fs::write(&path, text).unwrap();
            check_file(Format::Json, &path).map_err(|error| (error.exit_code(), error.to_string()))
        };
        assert_eq!(check("node_id = 1\nsingle = true\ndata_dir = \"/nowhere\"\n"), Ok(()));
        for text in ["node_id = 0\n", "frobnicate = 1\n", "node_id = \n"] {
            assert_eq!(check(text).unwrap_err().0, crate::reason::EXIT_INVALID, "{text}");
        }
        assert_eq!(check_file(Format::Table, Path::new("/nowhere.toml")).unwrap_err().exit_code(), 3);
    }
}
