//! Settings by the names that others have for them, and what becomes of each.

use super::*;
use crate::config::replication::GivenReplication;

/// What `settings` and names of others lead to in `quorate serve`.
fn served(file: &str, flags: &[&str]) -> Result<ServeConfig, SettingsError> {
    let (_dir, path) = super::file("c.yaml", file);
    ServeConfig::load(super::flags(&[&["--config", path.to_str().unwrap()], flags].concat()))
}

fn refused(file: &str) -> String {
    served(file, &[]).unwrap_err().to_string()
}

fn lines(config: &ServeConfig) -> Vec<String> {
    config.translation.lines.iter().map(ToString::to_string).collect()
}

fn assert_says(config: &ServeConfig, line: &str) {
    assert!(lines(config).iter().any(|said| said.contains(line)), "{line}: {:#?}", lines(config));
}

const ALL: &str = "
data_dir: d
replication:
  enabled: true
  role: ROLE
  bind_address: 127.0.0.1:7000
  master_address: a:7801, b:7801
  heartbeat_interval_secs: 6
  replica_timeout_secs: 31
  log_size: 5000
  reconnect_interval_secs: 7
";

#[test]
fn a_node_is_a_replica_if_its_role_is() {
    let config = served(&ALL.replace("ROLE", "replica"), &[]).unwrap();
    let seconds = |seconds| Some(std::time::Duration::from_secs(seconds));
    let expected = ReplicaWishes {
        sources: vec!["a:7801".to_owned(), "b:7801".to_owned()],
        heartbeat: seconds(6),
        patience: seconds(31),
        first_pause: seconds(7),
    };
    assert_eq!(config.translation.replica, Some(expected));
    assert_eq!((&*config.client_listen, config.event_log.operations), ("127.0.0.1:7000", 5000));
    assert_eq!(config.timing, Timing::default(), "what leaders are elected by is another matter");
    assert_eq!(lines(&config).len(), 8, "one line each: {:#?}", lines(&config));
    assert_says(&config, "replication.role = replica has this process be a replica");
    assert_says(&config, "replication.log_size = 5000 sets event_log_operations");
    // Nobody is told where it is, so it may listen everywhere.
    let everywhere = ALL.replace("ROLE", "replica").replace("127.0.0.1:7000", "0.0.0.0:7000");
    assert!(served(&everywhere, &[]).is_ok());
    let aimless = refused("replication: { role: replica }");
    assert!(aimless.contains("replication.master_address does not say what to follow"), "{aimless}");
}

#[test]
fn a_master_is_a_member_that_prefers_to_lead_or_a_cluster_of_its_own() {
    let alone = served(&ALL.replace("ROLE", "master"), &[]).unwrap();
    assert!(alone.single && alone.translation.replica.is_none());
    assert_eq!((alone.peer_policy.disconnected_after_ms, alone.timing.clone()), (31_000, Timing::default()));
    for line in [
        "replication.enabled = true changes nothing",
        "replication.role = master sets single",
        "replication.bind_address = 127.0.0.1:7000 sets client_listen",
        "replication.master_address = a:7801, b:7801 changes nothing: a member follows whoever is elected",
        "replication.heartbeat_interval_secs = 6 changes nothing: those who follow say themselves",
        "replication.replica_timeout_secs = 31 sets disconnected_after_ms",
        "replication.reconnect_interval_secs = 7 changes nothing",
    ] {
        assert_says(&alone, line);
    }
    let peers = ["--node-id", "1", "--peers", THREE, "--peer-listen", "127.0.0.1:7901"];
    let of_three = served(&ALL.replace("ROLE", "primary"), &peers).unwrap();
    assert!(of_three.preferred_leader && !of_three.single);
    let standalone = served("replication: { enabled: false, role: replica }", &[]).unwrap();
    assert!(standalone.single && standalone.translation.replica.is_none());
    assert_says(&standalone, "replication.enabled = false is read as the role standalone");
}

#[test]
fn what_is_given_by_its_own_name_wins_and_that_is_said() {
    let given = ["--client-listen", "127.0.0.1:7801", "--event-log-operations", "9000", "--single"];
    let config = served(&ALL.replace("ROLE", "replica"), &given).unwrap();
    assert!(config.single && config.translation.replica.is_none());
    assert_eq!((&*config.client_listen, config.event_log.operations), ("127.0.0.1:7801", 9000));
    for line in [
        "replication.role = replica changes nothing: single is given, so this node is a member",
        "replication.bind_address = 127.0.0.1:7000 changes nothing: client_listen is given",
        "replication.log_size = 5000 changes nothing: event_log_operations is given",
    ] {
        assert_says(&config, line);
    }
    let file = "event_log_operations: 8000\npreferred_leader: false\njoin: true\n".to_owned() + ALL.trim();
    let joins = served(&file.replace("ROLE", "standalone"), &[]).unwrap();
    assert_eq!((joins.event_log.operations, joins.preferred_leader), (8000, false));
    assert_says(&joins, "replication.role = standalone changes nothing: join is given");
    let master = served(&file.replace("ROLE", "master"), &[]).unwrap();
    assert_says(&master, "replication.role = master changes nothing: preferred_leader is given");
}

#[test]
fn wrong_values_are_refused_with_what_is_allowed() {
    for (line, part) in [
        ("role: boss", "expected one of master"),
        ("speed: 1", "unknown field `speed`"),
        ("bind_address: somewhere", "replication.bind_address \"somewhere\" is not"),
        ("master_address: \"0.0.0.0:1\"", "nothing that can be connected to"),
        ("heartbeat_interval_secs: 0", "replication.heartbeat_interval_secs (0) must be from 1 to 3600"),
        ("reconnect_interval_secs: 61", "(61) must be from 1 to 60"),
        ("log_size: 10", "replication.log_size (10) must be from 1000 to"),
        ("replica_timeout_secs: -1", "replica_timeout_secs"),
        ("heartbeat_interval_secs: 9\n  replica_timeout_secs: 9", "must be more than"),
    ] {
        let told = refused(&format!("node_id: 1\nreplication:\n  {line}\n"));
        assert!(told.contains(part), "{line}: {told}");
    }
    let unknown = refused("node_id: 1\nreplication:\n  role: master\n  speed: 1\n");
    assert!(unknown.contains("line 4"), "{unknown}");
}

fn environment(set: &[(&str, &str)]) -> Result<GivenReplication, SettingsError> {
    GivenReplication::from_environment(|name| {
        set.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
    })
}

#[test]
fn the_environment_says_the_same_and_wins_over_the_file() {
    let set = [
        ("REPLICATION_ROLE", "replica"),
        ("REPLICATION_BIND_ADDRESS", "127.0.0.1:7000"),
        ("REPLICATION_MASTER_ADDRESS", "a:7801"),
        ("REPLICATION_HEARTBEAT_INTERVAL", "6"),
        ("REPLICATION_LOG_SIZE", "5000"),
        ("REPLICATION_RECONNECT_INTERVAL", "7"),
    ];
    let given = environment(&set).unwrap();
    let file =
        GivenReplication { log_size: Some(1), replica_timeout_secs: Some(31), ..GivenReplication::default() };
    let both = given.or(file);
    assert_eq!((both.log_size, both.replica_timeout_secs), (Some(5000), Some(31)));
    let mut settings = GivenSettings::default();
    let translation = both.translate(&mut settings).unwrap();
    assert_eq!(translation.replica.unwrap().sources, ["a:7801"]);
    assert_eq!(settings.event_log_operations, Some(5000));
    assert_eq!(environment(&[("REPLICATION_ROLE", "")]).unwrap(), GivenReplication::default());
    for (name, value, part) in [
        ("REPLICATION_ROLE", "boss", "must be master, replica or standalone, not \"boss\""),
        ("REPLICATION_LOG_SIZE", "many", "REPLICATION_LOG_SIZE must be a whole number of operations"),
        ("REPLICATION_HEARTBEAT_INTERVAL", "5s", "whole number of seconds, not \"5s\""),
    ] {
        let told = environment(&[(name, value)]).unwrap_err().to_string();
        assert!(told.contains(part), "{told}");
    }
}

#[test]
fn quorate_replica_takes_the_same_file_and_is_a_replica_whatever_the_role() {
    let (_dir, path) =
        file("c.toml", "data_dir = \"d\"\n[replication]\nrole = \"master\"\nlog_size = 5000\n");
    let own = GivenSettings { client_listen: Some("127.0.0.1:1".to_owned()), ..GivenSettings::default() };
    let usual = GivenSettings { log_level: Some("warn".to_owned()), ..GivenSettings::default() };
    let config = ServeConfig::load_replica(own, usual, Some(&path)).unwrap();
    assert_eq!((&*config.client_listen, &*config.log_level), ("127.0.0.1:1", "warn"));
    assert_eq!(config.event_log.operations, 5000);
    assert_eq!(config.translation.replica, Some(ReplicaWishes::default()));
    assert_says(&config, "replication.role = master changes nothing: quorate replica runs a replica");
}

#[test]
fn the_example_is_one_that_works() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cluster/config/replication.yaml");
    let config = ServeConfig::load(flags(&["--config", path.to_str().unwrap()])).unwrap();
    assert_eq!(config.translation.replica.as_ref().unwrap().sources.len(), 2);
    assert_eq!(lines(&config).len(), 8, "it shows all names");
}
