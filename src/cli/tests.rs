//! Arguments, as they are read and refused.

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
