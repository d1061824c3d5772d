//! A machine of a program's own behind credentials: whoever may call it, may everything.

use quorate::ReadLevel;
use quorate::client::{ClientConfig, MachineClient, Reason, Token};
use quorate::server::{ClientAuth, Credentials, MachineGuest, Server};

use super::{TestToken, root, write_file};
use crate::machine_guest::{Ask, Change, Sum, Told, served_on};

#[tokio::test(flavor = "multi_thread")]
async fn requests_of_which_nobody_knows_what_they_touch_take_the_right_to_everything() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.toml");
    let grants =
        |tenant: &str, rights: &str| format!("grants = [{{ tenant = \"{tenant}\", rights = [{rights}] }}]");
    let tokens = [
        root(),
        TestToken::new("reader", &grants("*", "\"read\"")),
        TestToken::new("writer", &grants("*", "\"write\"")),
        TestToken::new("tenant", &grants("default", "\"read\", \"write\"")),
    ];
    write_file(&file, &tokens, "");
    let mut auth = ClientAuth::default();
    auth.tokens_file = Some(file);
    let server = Server::<MachineGuest<Sum<2>>>::bind("127.0.0.1:0").await.unwrap();
    let server = server.with_credentials(Credentials::load(auth).unwrap());
    served_on(server, Sum::default(), async |address, _| {
        for (token, reads, writes) in [
            (&tokens[0], true, true),
            (&tokens[1], true, false),
            (&tokens[2], false, true),
            (&tokens[3], false, false),
        ] {
            let mut config = ClientConfig::default();
            config.token = Some(Token::new(&token.secret()).unwrap());
            // A session takes a right of its own, which a reader has not.
            config.exactly_once = false;
            let sum = MachineClient::<Sum<2>>::new([address.to_string()], config).unwrap();
            match sum.write(Change::Add(1)).await {
                Ok(_) => assert!(writes, "{}", token.name),
                Err(error) => {
                    assert!(!writes && error.reason() == Reason::PermissionDenied, "{} {error}", token.name)
                }
            }
            match sum.read(Ask::Sum, ReadLevel::Linearizable).await {
                Ok(read) => assert!(reads && matches!(read.answer, Told::Sum(1..)), "{}", token.name),
                Err(error) => {
                    assert!(!reads && error.reason() == Reason::PermissionDenied, "{} {error}", token.name)
                }
            }
        }
    })
    .await;
}
