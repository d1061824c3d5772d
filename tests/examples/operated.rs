//! The commands of the program `quorate`, on the nodes of another program.

use std::process::Command;

use serde_json::Value;

use crate::jobs::Command as Change;
use crate::three_processes::Nodes;

/// What a command says on standard output, as JSON.
pub(crate) fn quorate(endpoints: &str, args: &[&str]) -> Value {
    let (code, value, errors) = outcome(endpoints, args);
    assert_eq!(code, 0, "{args:?}: {value} {errors}");
    value
}

fn outcome(endpoints: &str, args: &[&str]) -> (i32, Value, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_quorate"));
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("QUORATE_")) {
        command.env_remove(name);
    }
    let output = command.args(args).args(["--endpoints", endpoints, "-o", "json"]).output().unwrap();
    let errors = String::from_utf8(output.stderr).unwrap();
    let value = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code().unwrap(), value, errors)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_nodes_of_another_program_are_operated_like_those_of_this_one() {
    let nodes = Nodes::start(&[]).await;
    let all = nodes.all_addresses();
    let queue = nodes.queue(1);
    queue.write(Change::Push("wash".to_owned())).await.unwrap();

    let status = quorate(&all, &["status"]);
    println!("{status:#}");
    let health = quorate(&all, &["health"]);
    println!("{health:#}");
    let members = quorate(&all, &["member", "list"]);
    println!("{members:#}");
    let sessions = quorate(&all, &["session", "list"]);
    println!("{sessions:#}");
    let snapshot = quorate(&nodes.address(2), &["snapshot"]);
    println!("{snapshot:#}");
    let lead = quorate(&all, &["transfer-leader", "3"]);
    println!("{lead:#}");
    let settings = quorate(&nodes.address(1), &["configure"]);
    println!("{settings:#}");
    println!("{:?}", outcome(&nodes.address(1), &["configure", "snapshot_every_entries=7000"]));
    println!("{:?}", outcome(&all, &["get", "k"]));
    println!("{:?}", outcome(&all, &["put", "k", "v"]));
    println!("{:?}", outcome(&all, &["watch", "k"]));
    println!("{:?}", outcome(&all, &["session", "close", "--all"]));
    println!("{:?}", outcome(&all, &["member", "demote", "1"]));
    println!("{:?}", outcome(&all, &["member", "promote", "1"]));
    println!("{:?}", outcome(&all, &["member", "remove", "2"]));
    println!("{:?}", crate::three_processes::get(&nodes.address(1), "/metrics"));
    println!("{:?}", crate::three_processes::get(&nodes.address(1), "/stats"));
    println!("{:?}", crate::three_processes::get(&nodes.address(1), "/replication/status"));
}
