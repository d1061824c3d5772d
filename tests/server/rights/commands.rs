//! Commands and replicas that show who they are, and nodes that do not start where strangers may be.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use quorate::kv::client::{Client, ClientConfig, Reason, Scope, Token};
use quorate::server::{ClientAuth, Credentials};

use super::{TestToken, guarded, root, write_file};
use crate::forwarding::ReplicaProcess;
use crate::{DEADLINE, with_server};

/// Runs a command, with a token in its environment if there is one.
async fn quorate(args: &[&str], token: Option<&str>) -> Output {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_quorate"));
    command.args(args).stdin(Stdio::null()).env_remove("QUORATE_TOKEN_FILE").env_remove("QUORATE_TOKEN");
    if let Some(token) = token {
        command.env("QUORATE_TOKEN", token);
    }
    let ended = quorate::testkit::runtime::offload(move || command.output().unwrap());
    tokio::time::timeout(DEADLINE, ended).await.expect("it ends")
}

/// What it has printed.
async fn printed(args: &[&str]) -> String {
    let output = quorate(args, None).await;
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_made_signed_and_shown_by_commands_and_taken_by_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (key, keys, tokens) = (path("issuer.pem"), path("keys.json"), path("tokens.toml"));
    std::fs::write(&keys, printed(&["token", "keygen", text(&key), "--kid", "a"]).await).unwrap();
    let again = quorate(&["token", "keygen", text(&key)], None).await;
    assert_eq!(again.status.code(), Some(3), "a key is not overwritten: {again:?}");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&key).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);

    let made =
        printed(&["token", "create", "app", "--grant", "default/orders:read,write", "-o", "json"]).await;
    let made: serde_json::Value = serde_json::from_str(&made).unwrap();
    std::fs::write(&tokens, made["entry"].as_str().unwrap()).unwrap();
    let random = made["token"].as_str().unwrap().to_owned();
    assert!(!made["entry"].as_str().unwrap().contains(&random));
    let sign = ["token", "sign", "--key", text(&key), "--kid", "a", "--name", "job", "--expires-in", "1h"];
    let signed = printed(&[&sign[..], &["--grant", "default:read", "--audience", "quorate"]].concat()).await;
    let signed_file = path("job.token");
    std::fs::write(&signed_file, &signed).unwrap();
    let shown = printed(&["token", "show", text(&signed_file)]).await;
    assert!(shown.contains("\"sub\": \"job\"") || shown.contains("\"sub\":\"job\""), "{shown}");

    let mut auth = ClientAuth::default();
    (auth.tokens_file, auth.jwt_keys) = (Some(tokens.clone()), Some(keys.clone()));
    auth.jwt_audience = Some("quorate".to_owned());
    let server = quorate::kv::bind("127.0.0.1:0").await.unwrap();
    let server = server.with_credentials(Credentials::load(auth).unwrap());
    with_server(&path("data"), server, async |address| {
        let endpoint = address.to_string();
        let at = |args: &[&str]| {
            let all = [&["--endpoints", &endpoint][..], args].concat();
            all.into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        let run = async |args: &[&str], token: Option<&str>| {
            let args = at(args);
            let began = Instant::now();
            let output = quorate(&args.iter().map(String::as_str).collect::<Vec<_>>(), token).await;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(!said.contains(&random) && !said.contains(signed.trim()), "{said}");
            (output.status.code(), said, began.elapsed())
        };
        let put = ["put", "k", "v", "--collection", "orders"];
        let get = ["get", "k", "--collection", "orders"];
        assert_eq!(run(&put, Some(&random)).await.0, Some(0));
        assert_eq!(run(&get, Some(signed.trim())).await.0, Some(0));
        assert_eq!(run(&[&get[..], &["--token-file", text(&signed_file)]].concat(), None).await.0, Some(0));
        // What is refused is not tried again until the time is over.
        for (args, token, says) in [
            (&put[..], None, "--token-file"),
            (&put, Some("wrong"), "--token-file"),
            (&put, Some(signed.trim()), "quorate token show"),
            (&["get", "k"], Some(&random), "quorate token show"),
            (&["member", "list"], None, "--token-file"),
            (&["member", "remove", "7"], Some(&random), "quorate token show"),
            (&["transfer-leader"], None, "--token-file"),
            (&["status"], None, "--token-file"),
            (&["subscribe"], Some(&random), "quorate token show"),
            (&["watch", "k"], Some(&random), "quorate token show"),
            (&["configure"], Some(&random), "quorate token show"),
        ] {
            let (code, said, took) = run(args, token).await;
            assert_eq!(code, Some(1), "{args:?} {said}");
            assert!(said.contains(says) || args == ["status"], "{args:?} {said}");
            assert!(took < Duration::from_secs(8), "{args:?} {took:?}");
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_shows_its_own_token_and_asks_for_that_of_its_callers() {
    let follows = "grants = [{ tenant = \"*\", rights = [\"subscribe\", \"write\"] }]";
    let tokens = [root(), TestToken::new("replica", follows)];
    guarded(&tokens, "", async |source: SocketAddr, _| {
        let dir = tempfile::tempdir().unwrap();
        let (own, of_callers) = (dir.path().join("replica.token"), dir.path().join("callers.toml"));
        std::fs::write(&own, tokens[1].secret()).unwrap();
        let reads = TestToken::new("reader", "grants = [{ tenant = \"*\", rights = [\"read\"] }]");
        let writes =
            TestToken::new("writer", "grants = [{ tenant = \"*\", rights = [\"read\", \"write\"] }]");
        write_file(&of_callers, &[reads, writes], "");
        let more = ["--token-file", text(&own), "--tokens-file", text(&of_callers), "--forward-writes"];
        let replica = ReplicaProcess::of(&[source], &dir.path().join("data"), &more);
        let client = |token: &str| {
            let mut config = ClientConfig::default();
            config.token = Some(Token::new(token).unwrap());
            // Else the session would be refused, and not the write.
            config.exactly_once = token != "secret-of-reader";
            Client::new([replica.address.to_string()], config).unwrap()
        };
        let put = async |client: &Client| client.put(&Scope::default(), "k", "v").await;
        let refused = put(&client("secret-of-reader")).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::PermissionDenied, "{refused}");
        assert!(refused.is_final() && !refused.maybe_applied());
        let stranger = put(&client("wrong")).await.unwrap_err();
        assert_eq!(stranger.reason(), Reason::Unauthenticated, "{stranger}");
        // The member knows no such caller: the replica passes it on in its own name.
        put(&client("secret-of-writer")).await.unwrap();
        let read = quorate::ReadLevel::Local;
        let found = async {
            while client("secret-of-reader").get(&Scope::default(), "k", read).await.unwrap().item.is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(DEADLINE, found).await.expect("it arrives");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_listens_where_strangers_may_be_without_asking_who_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    for (args, says) in [
        (
            &["serve", "--single", "--client-listen", "0.0.0.0:0", "--client-advertise", "127.0.0.1:1"][..],
            "--client-listen",
        ),
        (
            &["serve", "--single", "--client-listen", "127.0.0.1:0", "--frames-listen", "0.0.0.0:0"],
            "--frames-listen",
        ),
        (
            &["serve", "--single", "--peer-listen", "0.0.0.0:0", "--peer-advertise", "127.0.0.1:1"],
            "--peer-listen",
        ),
        (&["replica", "--from", "127.0.0.1:1", "--listen", "0.0.0.0:0"], "--client-listen"),
    ] {
        let refused = quorate(&[args, &["--data-dir", text(&data)]].concat(), None).await;
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(3), "{args:?} {said}");
        for part in [says, "--insecure"] {
            assert!(said.contains(part), "{args:?} {said}");
        }
        assert!(!data.exists(), "nothing was made");
    }
    // A file that cannot be used is no credential.
    let tokens = dir.path().join("tokens.toml");
    std::fs::write(&tokens, "[[token]]\nname = 7\n").unwrap();
    let args = [
        "serve",
        "--single",
        "--data-dir",
        text(&data),
        "--tokens-file",
        text(&tokens),
        "--client-listen",
        "127.0.0.1:0",
        "--peer-listen",
        "127.0.0.1:0",
    ];
    let refused = quorate(&args, None).await;
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("tokens.toml"));
}

/// A line of the log, as JSON, once one is there of which this `holds`; all that were read before.
fn line(
    lines: &mut impl Iterator<Item = String>,
    read: &mut String,
    holds: impl Fn(&serde_json::Value) -> bool,
) -> serde_json::Value {
    for text in lines {
        read.push_str(&text);
        let line: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        if holds(&line) {
            return line;
        }
    }
    panic!("there is no such line: {read}")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_tells_who_has_done_what_and_who_was_refused_and_no_token() {
    let dir = tempfile::tempdir().unwrap();
    let (tokens, data) = (dir.path().join("tokens.toml"), dir.path().join("data"));
    let reader = TestToken::new("reader", "grants = [{ tenant = \"*\", rights = [\"read\"] }]");
    write_file(&tokens, &[root(), reader], "");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_quorate"));
    command.args(["serve", "--single", "--log-format", "json", "--client-listen", "127.0.0.1:0"]);
    command.args(["--peer-listen", "127.0.0.1:0", "--data-dir", text(&data), "--tokens-file", text(&tokens)]);
    let mut process = crate::Process(command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap());
    let stderr = process.0.stderr.take().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stderr)).map(Result::unwrap);
    let mut read = String::new();
    let serving = line(&mut lines, &mut read, |line| line["fields"]["message"] == "serving");
    let endpoint = serving["fields"]["client"].as_str().unwrap().to_owned();
    let is_audit = |line: &serde_json::Value| line["target"] == "quorate::audit";

    let run = async |args: &[&str], token: &str| {
        quorate(&[&["--endpoints", &endpoint][..], args].concat(), Some(token)).await.status.code()
    };
    assert_eq!(run(&["put", "k", "v"], "5ecret-and-wrong").await, Some(1));
    let refused = line(&mut lines, &mut read, is_audit);
    assert_eq!(
        (&refused["fields"]["outcome"], &refused["fields"]["credential"]),
        (&"unauthenticated".into(), &"unknown".into())
    );
    assert!(refused["fields"]["address"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert_eq!(run(&["snapshot"], "secret-of-reader").await, Some(1));
    let denied = line(&mut lines, &mut read, |line| {
        is_audit(line) && line["fields"]["outcome"] == "permission_denied"
    });
    assert_eq!(
        (&denied["fields"]["principal"], &denied["fields"]["call"]),
        (&"reader".into(), &"/quorate.v1.Admin/Snapshot".into())
    );
    let put = async { while run(&["put", "k", "v"], "secret-of-root").await != Some(0) {} };
    tokio::time::timeout(DEADLINE, put).await.expect("it leads");
    assert_eq!(run(&["snapshot"], "secret-of-root").await, Some(0));
    let operated =
        line(&mut lines, &mut read, |line| is_audit(line) && line["fields"]["message"] == "operated");
    let fields = &operated["fields"];
    assert_eq!(
        (&fields["principal"], &fields["credential"], &fields["outcome"]),
        (&"root".into(), &"token".into(), &"ok".into())
    );
    assert_eq!(run(&["configure", "log_level=warn"], "secret-of-root").await, Some(0));
    let configured =
        line(&mut lines, &mut read, |line| is_audit(line) && line["fields"]["message"] == "operated");
    assert_eq!(configured["fields"]["call"], "/quorate.v1.Admin/Configure");
    for secret in ["5ecret", "secret-of", &quorate::server::token_hash("secret-of-root")] {
        assert!(!read.contains(secret), "{secret} stands in the log: {read}");
    }
}
