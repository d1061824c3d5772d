//! Who may follow by frames.

use std::time::Duration;

use tokio::time::timeout;

use super::bind;
use super::follower::{Follower, Said, Subscribe, Told};
use crate::rights::{self, TestToken};

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_says_who_it_is_before_what_it_follows() {
    let (server, frames) = bind().await;
    let of_acme = "grants = [{ tenant = \"acme\", rights = [\"subscribe\"] }]";
    let tokens = [
        rights::root(),
        TestToken::new("acme", of_acme),
        TestToken::new("reader", "grants = [{ tenant = \"*\", rights = [\"read\"] }]"),
    ];
    let secrets = [tokens[0].secret(), tokens[1].secret(), tokens[2].secret()];
    let [root, acme, reader] = secrets.each_ref().map(|secret| Some(secret.as_str()));
    rights::guarded_at(server, &tokens, "", async |_, file| {
        let whole = Subscribe { from_now: true, heartbeat_ms: 100, ..Subscribe::default() };
        let part = Subscribe { filters: vec![("acme".to_owned(), String::new())], ..whole.clone() };
        for (token, first, ends) in [
            (None, &whole, Some("UNAUTHENTICATED")),
            (Some("wrong"), &whole, Some("UNAUTHENTICATED")),
            (reader, &whole, Some("PERMISSION_DENIED")),
            (acme, &whole, Some("PERMISSION_DENIED")),
            (acme, &part, None),
            (root, &whole, None),
        ] {
            let mut follower = Follower::connect(frames).await;
            if let Some(token) = token {
                follower.say(&authenticate(token)).await;
            }
            follower.say(&Said::Subscribe(first.clone())).await;
            match (follower.told().await.expect("it is told something"), ends) {
                (Told::End(end), Some(name)) => assert_eq!(end.name, name, "{token:?}"),
                (Told::Begin(_), None) => {}
                (told, _) => panic!("{token:?} is told {told:?}"),
            }
        }
        // Twice, too long, and after the beginning.
        for said in [vec![authenticate("a"), authenticate("b")], vec![authenticate(&"x".repeat(9000))]] {
            let mut follower = Follower::connect(frames).await;
            for said in &said {
                follower.say(said).await;
            }
            follower.say(&Said::Subscribe(whole.clone())).await;
            assert!(matches!(follower.told().await, Some(Told::End(_))), "{}", said.len());
        }
        // A token that is withdrawn ends what it has begun.
        let mut follower = Follower::connect(frames).await;
        follower.say(&authenticate(acme.unwrap())).await;
        follower.say(&Said::Subscribe(part)).await;
        assert!(matches!(follower.told().await, Some(Told::Begin(_))));
        rights::write_file(&file, &tokens[..1], "");
        let ended = async {
            loop {
                if let Some(Told::End(end)) = follower.told().await {
                    return end;
                }
            }
        };
        let end = timeout(Duration::from_secs(60), ended).await.expect("it ends within a minute");
        assert_eq!(end.name, "UNAUTHENTICATED");
    })
    .await;
}

fn authenticate(token: &str) -> Said {
    Said::Authenticate { magic: *b"QFRAMES\0", version: 1, token: token.to_owned() }
}
