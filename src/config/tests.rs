//! Where settings come from, which wins, and what is refused.

use clap::{Args, Command, CommandFactory, FromArgMatches, Parser};

use super::peers::InvalidPeers;
use super::*;

mod example;
mod replication;
mod script;

#[derive(Debug, Parser)]
struct Line {
    #[command(flatten)]
    args: ServeArgs,
}

/// A command line without the environment of the test process.
fn flags(flags: &[&str]) -> ServeArgs {
    let mut command = ServeArgs::augment_args(Command::new("serve").no_binary_name(true));
    for id in command.get_arguments().map(|arg| arg.get_id().clone()).collect::<Vec<_>>() {
        command = command.mut_arg(id, |arg| arg.env(None::<&str>));
    }
    ServeArgs::from_arg_matches(&command.try_get_matches_from(flags).unwrap()).unwrap()
}

fn file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    (dir, path)
}

fn parse(name: &str, text: &str) -> Result<GivenSettings, SettingsError> {
    let (_dir, path) = file(name, text);
    GivenSettings::from_file(&path)
}

fn refusal(given: &[&str]) -> String {
    ServeConfig::load(flags(given)).unwrap_err().to_string()
}

const THREE: &str = "1=a:7901,2=b:7901,3=c:7901";

#[test]
fn defaults_are_those_of_the_engine_and_work() {
    let config = ServeConfig::resolve(GivenSettings::default()).unwrap();
    assert_eq!((config.node_id, &*config.cluster), (1, "quorate"));
    assert!(config.peers.is_empty() && !config.join && !config.preferred_leader);
    let engine = config.engine_config("127.0.0.1:7801".to_owned());
    assert_eq!(engine.client_advertise, "127.0.0.1:7801");
    assert_eq!((engine.timing, engine.snapshots, engine.limits, engine.peers), Default::default());
}

#[test]
fn a_node_is_told_in_one_way_which_cluster_it_belongs_to() {
    let own = BTreeMap::from([(1, "127.0.0.1:7901".to_owned())]);
    assert_eq!(ServeConfig::load(flags(&["--single"])).unwrap().peers, own);
    let named = ServeConfig::load(flags(&["--peers", "1=127.0.0.1:7901", "--node-id", "1"])).unwrap();
    assert_eq!(named.peers, own);
    let joins = ServeConfig::load(flags(&["--join", "--node-id", "4", "--preferred-leader"])).unwrap();
    assert!(joins.join && joins.preferred_leader && joins.peers.is_empty());
    // The addresses of the others may be told; a joining node need not be among them.
    assert!(ServeConfig::load(flags(&["--join", "--node-id", "4", "--peers", THREE])).is_ok());
    assert!(!ServeConfig::load(flags(&["--join=false"])).unwrap().join);
    for contradiction in [
        &["--single", "--join"][..],
        &["--single", "--node-id", "1", "--peers", THREE, "--peer-advertise", "a:7901"],
    ] {
        assert!(refusal(contradiction).contains("--single forms a cluster of this node alone"));
    }
}

#[test]
fn the_help_tells_the_defaults() {
    let help = Line::command().term_width(1000).render_long_help().to_string();
    let told = |flag: &str| {
        let (_, after) = help.split_once(&format!("--{flag} <")).unwrap();
        let (_, told) = after.split_once("[default: ").unwrap();
        told.split_once(']').unwrap().0.to_owned()
    };
    for (flag, default) in [
        ("heartbeat-interval-ms", "50"),
        ("snapshot-every-bytes", "256 MiB"),
        ("max-command-bytes", "1.5 MiB"),
        ("disk-reserve-bytes", "auto"),
        ("max-connections", "0"),
        ("client-listen", "127.0.0.1:7801"),
        ("log-level", "info,openraft=error"),
        ("log-format", "text"),
        ("data-dir", "$XDG_DATA_HOME/quorate/node-ID, else $HOME/.local/share/quorate/node-ID"),
    ] {
        assert_eq!(told(flag), default, "--{flag}");
    }
    let short = Line::command().term_width(1000).render_help().to_string();
    assert!(help.contains("never copy it") && !short.contains("never copy it"), "{short}");
}

#[test]
fn every_setting_has_one_name_in_all_sources() {
    let command = ServeArgs::augment_args(Command::new("serve"));
    for arg in command.get_arguments() {
        let flag = arg.get_long().unwrap();
        let variable = format!("QUORATE_{}", flag.replace('-', "_").to_uppercase());
        assert_eq!(arg.get_env().and_then(|env| env.to_str()), Some(&*variable), "--{flag}");
        if flag != "config" {
            // Of a wrong type on purpose: the file must know the key, and dislike the value.
            let error =
                parse("c.toml", &format!("{} = [[]]", flag.replace('-', "_"))).unwrap_err().to_string();
            assert!(!error.contains("unknown field"), "{error}");
        }
    }
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let (_dir, path) = file("c.toml", "cluster = \"filed\"\nnode_id = 2\nlog_format = \"json\"\n");
    let config = ServeConfig::load(flags(&["--config", path.to_str().unwrap(), "--node-id", "3"])).unwrap();
    assert_eq!((&*config.cluster, config.node_id), ("filed", 3));
    assert_eq!((config.log_format, &*config.log_level), (LogFormat::Json, "info,openraft=error"));
}

/// Set in the child only: a process has one environment, and tests share theirs.
const PROBE: &str = "QUORATE_TEST_PROBE";

#[test]
fn the_environment_wins_over_the_file_and_flags_over_both() {
    let (_dir, path) = file("c.toml", "cluster = \"filed\"\nlog_level = \"warn\"\nnode_id = 2\n");
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "config::tests::environment_probe", "--nocapture"])
        .envs([(PROBE, "1"), ("QUORATE_CLUSTER", "environment"), ("QUORATE_NODE_ID", "3")])
        .env("QUORATE_CONFIG", &path)
        .output()
        .unwrap();
    assert!(child.status.success(), "{child:?}");
    assert!(String::from_utf8_lossy(&child.stdout).contains("environment 4 warn"), "{child:?}");
}

#[test]
fn environment_probe() {
    if std::env::var_os(PROBE).is_some() {
        let config = ServeConfig::load(Line::parse_from(["serve", "--node-id", "4"]).args).unwrap();
        println!("{} {} {}", config.cluster, config.node_id, config.log_level);
    }
}

#[test]
fn toml_and_yaml_say_the_same() {
    let toml = parse(
        "c.toml",
        "node_id = 2\ncluster = \"c\"\nlog_format = \"json\"\npeers = { 1 = \"a:7901\", 2 = \"b:7901\" }\nheartbeat_interval_ms = 100\n",
    );
    let yaml = parse(
        "c.yaml",
        "# comment\nnode_id: 2\ncluster: c\nlog_format: json\npeers:\n  1: a:7901\n  2: b:7901\nheartbeat_interval_ms: 100\n",
    );
    let list = parse(
        "c.yml",
        "node_id: 2\ncluster: c\nlog_format: json\npeers: 1=a:7901,2=b:7901\nheartbeat_interval_ms: 100\n",
    );
    let expected = GivenSettings {
        node_id: Some(2),
        cluster: Some("c".to_owned()),
        log_format: Some(LogFormat::Json),
        peers: Some("1=a:7901,2=b:7901".parse().unwrap()),
        heartbeat_interval_ms: Some(100),
        ..GivenSettings::default()
    };
    for parsed in [toml, yaml, list] {
        assert_eq!(parsed.unwrap(), expected);
    }
    assert_eq!(parse("c.yaml", "# nothing\n").unwrap(), GivenSettings::default());
    assert_eq!(parse("c.toml", "").unwrap(), GivenSettings::default());
}

#[test]
fn unknown_keys_are_refused_with_key_and_file() {
    for (name, text) in [("c.toml", "nodeid = 1"), ("c.yaml", "nodeid: 1")] {
        let error = parse(name, text).unwrap_err().to_string();
        assert!(error.contains("nodeid") && error.contains(name), "{error}");
    }
    assert!(matches!(parse("c.json", "{}"), Err(SettingsError::UnknownFormat { .. })));
    assert!(matches!(
        GivenSettings::from_file(Path::new("/nowhere/c.toml")),
        Err(SettingsError::Read { .. })
    ));
}

#[test]
fn peers_are_read_strictly() {
    let parse = |text: &str| text.parse::<Peers>();
    assert_eq!(parse(" 1=a:1, 2=b:2 ").unwrap().0.len(), 2);
    assert_eq!(parse("1=a:1,1=b:2"), Err(InvalidPeers::Duplicate(1)));
    for text in ["", "1", "x=a:1", "1=", "1=a:1,"] {
        assert!(matches!(parse(text), Err(InvalidPeers::Element(_))), "{text}");
    }
}

const LONG: &str = const {
    const LETTERS: [u8; 300] = {
        let mut letters = [b'a'; 300];
        (letters[298], letters[299]) = (b':', b'1');
        letters
    };
    match std::str::from_utf8(&LETTERS) {
        Ok(text) => text,
        Err(_) => unreachable!(),
    }
};

#[test]
fn what_cannot_work_is_refused_with_what_to_do() {
    let cases: &[(&[&str], &str)] = &[
        (&["--peers", THREE], "--peers needs --node-id"),
        (&["--peers", THREE, "--node-id", "4"], "add 4=127.0.0.1:7901"),
        (&["--peers", "1=a:7901,2=a:7901", "--node-id", "1"], "nodes 1 and 2 the same address"),
        (&["--peers", "1=a:7902,2=b:7901", "--node-id", "1"], "set --peer-listen 127.0.0.1:7902"),
        (&["--peers", THREE, "--node-id", "1", "--peer-advertise", "z:7901"], "make them agree"),
        (&["--peers", "1=a:0,2=b:7901", "--node-id", "2"], "port 0"),
        (&["--node-id", "0"], "number the nodes from 1"),
        (&["--node-id", "18446744073709551615"], "must be from 1 to 9007199254740991"),
        (
            &["--node-id", "1", "--peers", "1=127.0.0.1:7901,18446744073709551615=b:7901"],
            "node id 18446744073709551615 must be from 1 to",
        ),
        (&["--client-advertise", " 127.0.0.1:1"], "--client-advertise"),
        (&["--client-advertise", "*:1"], "HOST:PORT"),
        (&["--peer-advertise", "host\nname:1"], "host\\nname:1"),
        (&["--peer-advertise", LONG], "(300 bytes)"),
        (&["--client-advertise", "224.0.0.1:1"], "multicast"),
        (&["--client-listen", "224.0.0.1:1"], "multicast"),
        (&["--client-listen", "255.255.255.255:1"], "broadcast"),
        (&["--peer-listen", "[ff02::1]:1"], "multicast"),
        (&["--peers", "1=127.0.0.1:7901,2=b c:7901", "--node-id", "1"], "HOST:PORT"),
        (&["--memory-bytes", "18446744073709551615"], "memory_bytes (18446744073709551615) is more than"),
        (&["--client-listen", "0.0.0.0:7801"], "set --client-advertise"),
        (&["--client-listen", "[::]:7801"], "set --client-advertise"),
        (&["--client-advertise", "0.0.0.0:1"], "set --client-advertise"),
        (&["--client-advertise", "a:0"], "port 0"),
        (&["--peer-listen", "0.0.0.0:7901"], "set --peer-advertise"),
        (&["--client-listen", "7801"], "HOST:PORT"),
        (&["--client-listen", "::1:7801"], "HOST:PORT"),
        (&["--client-listen", "a:70000"], "HOST:PORT"),
        (&["--cluster", "a b"], "--cluster"),
        (&["--log-level", "quorate=loud"], "--log-level"),
        (&["--heartbeat-interval-ms", "100"], "heartbeat_interval_ms"),
        (&["--snapshot-every-entries", "0"], "snapshot_every_entries (0) must be from 1 to 1000000000"),
        (&["--snapshot-keep-bytes", "18446744073709551615"], "snapshot_keep_bytes"),
        (&["--heartbeat-interval-ms", "18446744073709551615"], "heartbeat_interval_ms"),
        (
            &["--election-timeout-max-ms", "999999999"],
            "election_timeout_max_ms (999999999) must be from 3 to 600000",
        ),
        (&["--disk-reserve-bytes", "18446744073709551615"], "disk_reserve_bytes"),
        (&["--fsync-stall-ms", "60000"], "fsync_stall_ms (60000) must be from 1 to 30000, or 0 for never"),
        (&["--log-level", "loud"], "\"loud\" is no level"),
        (&["--log-level", "openraft=debug"], "begin it with one, such as info"),
        (&["--peer-advertise", "a:0"], "port 0"),
        (&["--single", "--peer-listen", "127.0.0.1:7", "--peer-advertise", "127.0.0.1:0"], "port 0"),
        (
            &["--max-command-bytes", "999999999"],
            "--max-command-bytes (999999999) must be from 1024 to 4194304",
        ),
        (&["--max-command-bytes", "1000"], "--max-command-bytes (1000) must be from 1024 to 4194304"),
        (&["--max-inflight-bytes", "1"], "max_inflight_bytes"),
        (&["--disk-reserve-bytes", "1000000"], "disk_reserve_bytes"),
        (
            &["--max-inflight-bytes", "500000000", "--disk-reserve-bytes", "134217728"],
            "disk_reserve_bytes (134217728) must be 0, for none, or at least 658554432",
        ),
        (&["--log-tail-bytes", "1"], "--log-tail-bytes"),
    ];
    for (given, expected) in cases {
        let message = refusal(given);
        assert!(message.contains(expected), "{given:?}: {message}");
        assert_eq!(message.matches("invalid configuration").count(), 1, "{message}");
    }
}

#[test]
fn an_empty_data_directory_is_refused() {
    // clap refuses the flag by itself; a file can say it.
    let settings = GivenSettings { data_dir: Some(PathBuf::new()), ..GivenSettings::default() };
    assert!(ServeConfig::resolve(settings).unwrap_err().to_string().contains("--data-dir"));
}

#[test]
fn listen_and_advertise_are_separate() {
    let given = ["--node-id", "2", "--peers", THREE, "--peer-listen", "0.0.0.0:7901"];
    let given =
        [&given[..], &["--client-listen", "0.0.0.0:7801", "--client-advertise", "b.example:7801"]].concat();
    let config = ServeConfig::load(flags(&given)).unwrap();
    let engine = config.engine_config("0.0.0.0:7801".to_owned());
    assert_eq!((&*engine.peer_listen, &*engine.peer_advertise), ("0.0.0.0:7901", "b:7901"));
    assert_eq!(engine.client_advertise, "b.example:7801");
    assert_eq!(engine.initial_members.len(), 3);
}

#[test]
fn what_is_made_of_slow_peers_reaches_the_engine_if_it_can_work() {
    let given =
        ["--lagging-after-ms", "500", "--disconnected-after-ms", "9000", "--reconnect-interval-ms", "50"];
    let config = ServeConfig::load(flags(&given)).unwrap();
    let expected =
        PeerPolicy { lagging_after_ms: 500, disconnected_after_ms: 9000, reconnect_interval_ms: 50 };
    assert_eq!(config.engine_config(String::new()).peers, expected);
    for (given, named) in [
        (["--lagging-after-ms", "0"], "lagging_after_ms (0) must be from 1"),
        (["--disconnected-after-ms", "1000"], "lagging_after_ms < disconnected_after_ms"),
        (["--reconnect-interval-ms", "0"], "reconnect_interval_ms (0) must be from 1"),
        (["--reconnect-interval-ms", "60001"], "reconnect_interval_ms (60001)"),
    ] {
        let refusal = refusal(&given);
        assert!(refusal.contains(named), "{refusal}");
    }
}

/// What a running node says of its settings can be given to another one.
#[test]
fn the_fixed_settings_are_those_that_the_node_was_started_with() {
    let given = ["--node-id", "2", "--peers", THREE, "--peer-listen", "b:7901", "--log-format", "json"];
    let config = ServeConfig::load(flags(&given)).unwrap();
    let fixed = config.fixed_settings();
    assert!(fixed.iter().all(|(name, _)| !crate::node::settings::CHANGEABLE.contains(name)));
    let told = fixed.into_iter().map(|(name, value)| (name.to_owned(), value));
    let told: serde_json::Map<_, _> = told.collect();
    assert_eq!((&told["peers"], &told["log_format"]), (&THREE.into(), &"json".into()));
    let again: GivenSettings = serde_json::from_value(told.into()).unwrap();
    let again = ServeConfig::resolve(again).unwrap();
    assert_eq!(again.client_advertise.as_ref(), Some(&config.client_listen), "told where it is not given");
    assert_eq!(ServeConfig { client_advertise: None, ..again }, config);
}

#[test]
fn what_the_client_port_may_hold_follows_the_memory() {
    const MIB: usize = 1024 * 1024;
    let small = |more: &[&str]| {
        let memory = (240 * MIB).to_string();
        ServeConfig::load(flags(&[&["--memory-bytes", &memory], more].concat())).unwrap()
    };
    let config = small(&[]);
    assert_eq!((config.memory(), config.door.limits.unsent_bytes.all), ((240 * MIB) as u64, 16 * MIB));
    let told = config.fixed_settings().into_iter().find(|(name, _)| *name == "max_unsent_bytes");
    assert_eq!(told.unwrap().1, 16 * MIB, "what is in force is told");
    let set = small(&["--max-unsent-bytes", "70000000", "--max-queued-bytes", "150000000"]);
    let limits = set.door.limits;
    assert_eq!((limits.unsent_bytes.all, limits.queued_bytes.all), (70_000_000, 150_000_000));
}

#[test]
fn settings_of_the_client_port_that_cannot_work_are_refused() {
    for (given, named) in [
        (&["--max-connection-unsent-bytes", "1"][..], "--max-connection-unsent-bytes"),
        (&["--max-watches", "1"], "--max-watches"),
        (&["--max-connections", "18446744073709551615"], "(18446744073709551615) must be from 1 to 1000000"),
        (&["--max-connection-watches", "0"], "--max-connection-watches (0) must be from 1"),
        (&["--max-watches", "18446744073709551615"], "--max-watches"),
        (&["--max-unsent-bytes", "18446744073709551615"], "--max-unsent-bytes"),
        (&["--max-unfinished-bytes", "18446744073709551615"], "--max-unfinished-bytes"),
        (&["--max-queued-bytes", "18446744073709551615"], "--max-queued-bytes"),
        (&["--max-pipeline-queued-bytes", "18446744073709551615"], "--max-pipeline-queued-bytes"),
        (&["--event-log-operations", "18446744073709551615"], "event_log_operations"),
        (&["--event-log-bytes", "1"], "event_log_bytes"),
        (&["--event-log-age-ms", "18446744073709551615"], "or 0 for any age"),
        (
            &["--memory-bytes", "201326592", "--max-unsent-bytes", "201326593"],
            "more than the 201326592 bytes of memory",
        ),
        (&["--allowed-hosts", "a.example.com,b:7801"], "\"b:7801\" is no host name"),
        (&["--allowed-origins", "console"], "\"console\" is no origin"),
    ] {
        let refusal = refusal(given);
        assert!(refusal.contains(named), "{refusal}");
    }
    let given = ["--allowed-hosts", "a.example.com,*.b.example.com", "--max-connections", "7"];
    let config = ServeConfig::load(flags(&given)).unwrap();
    assert_eq!(config.door.allowed_hosts, ["a.example.com", "*.b.example.com"]);
    assert_eq!(config.door.limits.connections, Some(7));
    let text = "allowed_hosts = [\"a.example.com\"]\nevent_log_age_ms = 5\n";
    let settings = parse("c.toml", text)
        .unwrap()
        .or(GivenSettings { event_log_operations: Some(7_000), ..GivenSettings::default() });
    assert_eq!(settings.allowed_hosts.as_deref(), Some(&["a.example.com".to_owned()][..]));
    assert_eq!((settings.event_log_age_ms, settings.event_log_operations), (Some(5), Some(7_000)));
}

/// The one file in which every setting is explained.
const COMMENTED: &str = include_str!("../../cluster/config/node.toml");

/// The name of the setting that a line sets, commented out or not.
fn set_by(line: &str) -> Option<&str> {
    let (name, _) = line.trim_start_matches("# ").split_once(" = ")?;
    name.chars().all(|c| c.is_ascii_lowercase() || c == '_').then_some(name)
}

#[test]
fn the_commented_file_can_be_used_and_shows_the_defaults() {
    assert_eq!(parse("c.toml", COMMENTED).unwrap().peers.unwrap().0.len(), 3);
    let commented: Vec<_> = COMMENTED
        .lines()
        .filter(|line| line.starts_with("# ") && set_by(line).is_some())
        .map(|line| &line[2..])
        .collect();
    let only_defaults = ServeConfig::resolve(parse("c.toml", &commented.join("\n")).unwrap()).unwrap();
    assert_eq!(only_defaults, ServeConfig::resolve(GivenSettings::default()).unwrap());
    assert!(parse("c.yaml", include_str!("../../cluster/config/node.yaml")).is_ok());
}

#[test]
fn what_takes_effect_at_once_is_what_a_running_node_can_change() {
    let live = table::ROWS.iter().filter(|row| row.effect == table::TakesEffect::Live).map(|row| row.name);
    let changeable = crate::node::settings::CHANGEABLE.iter().copied();
    let sorted = |names: Vec<&'static str>| names.into_iter().collect::<std::collections::BTreeSet<_>>();
    assert_eq!(sorted(live.collect()), sorted(changeable.collect()));
}

#[test]
fn what_cannot_be_read_of_a_file_is_not_shown() {
    let says = |name: &str, text: &str| {
        GivenSettings::parse(Path::new(name), text).expect_err("it cannot be read").to_string()
    };
    for (name, text) in [
        ("node.toml", "node_id = 1\npeer_secret = \"5ecret\nsingle = true\n"),
        ("node.toml", "node_id = 1\npeer_secret = 5ecret\n"),
        ("node.yaml", "node_id: 1\npeer_secret: \"5ecret\nsingle: true\n"),
        ("node.yaml", "node_id: 1\npeer_secret: [5ecret]\n"),
        ("node.yaml", "node_id: 1\npeer_secret: 5ecret: more\n"),
        ("node.toml", "node_id = 1\npeer_secret = 735707\n"),
        ("node.toml", "node_id = 1\ndata_dir = 735707\npeer_secret = \"5ecret\"\n"),
    ] {
        let error = says(name, text);
        assert!(!error.contains("5ecret") && !error.contains("peer_secret = 7"), "{name}: {error}");
        assert!(!text.contains("secret = 7") || !error.contains("735707"), "{name}: {error}");
        assert!(error.contains("line 2") || error.contains("line 3"), "{name}: {error}");
    }
}
