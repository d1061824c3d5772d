//! Whom a credential stands for, and whom a wrong one does not.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use ring::hmac;
use serde_json::{Value, json};

use super::file::TokensFile;
use super::grants::{AccessRole, DataRight, Granted, Touched};
use super::in_force::{CredentialKey, InForce, PresentedCredential, Unidentified};
use super::jwt::{JwtKeys, JwtPolicy};
use super::signing::{NewKey, SignedClaims, SigningKey, new_ed25519, new_secret, random_token, unverified};
use super::token_hash;
use crate::runtime;

fn now() -> u64 {
    runtime::unix_time_ms() / 1000
}

fn policy() -> JwtPolicy {
    JwtPolicy { audience: None, issuer: None, leeway: Duration::from_secs(30) }
}

fn in_force(file: &str, jwt: Option<JwtKeys>) -> InForce {
    let key = hmac::Key::new(hmac::HMAC_SHA256, &[7; 32]);
    InForce::new(&key, TokensFile::parse(file).unwrap(), jwt).unwrap()
}

fn by_token(in_force: &InForce, bearer: &str) -> Result<(String, CredentialKey), Unidentified> {
    let shown = PresentedCredential { bearer: Some(bearer), ..PresentedCredential::default() };
    in_force.identify(shown, now()).map(|found| (found.name.to_string(), found.key))
}

fn why(in_force: &InForce, bearer: &str) -> Unidentified {
    by_token(in_force, bearer).expect_err("it stands for nobody")
}

#[test]
fn a_token_stands_for_the_entry_with_its_hash() {
    let (token, other) = (random_token().unwrap(), random_token().unwrap());
    assert!(token.starts_with("qrt_") && token.len() == 4 + 43 && token != other);
    let entry = |name: &str, token: &str, more: &str| {
        format!(
            "[[token]]\nname = \"{name}\"\nsha256 = \"{}\"\nroles = [\"observe\"]\n{more}",
            token_hash(token)
        )
    };
    let ends = now() + 60;
    let file = entry("app", &token, "")
        + &entry("old", &other, "expires = 1\n")
        + &entry("new", "n", &format!("expires = {ends}\n"));
    let present = in_force(&file, None);
    let (name, key) = by_token(&present, &token).unwrap();
    assert_eq!((name.as_str(), key.kind()), ("app", "token"));
    assert_eq!(by_token(&present, "n").unwrap().0, "new");
    assert_eq!(why(&present, &other), Unidentified::Expired);
    for wrong in ["", "app", &token_hash(&token), &token[1..], &format!("{token} "), "a.b.c"] {
        assert_eq!(why(&present, wrong), Unidentified::Unknown, "{wrong}");
    }
    assert_eq!(why(&present, &"x".repeat(8193)), Unidentified::TooLong);
    let none = PresentedCredential::default();
    assert_eq!(present.identify(none, now()).unwrap_err(), Unidentified::Missing);
    assert!(!format!("{present:?}").contains(&token_hash(&token)));

    // What streams ask later.
    let granted = Granted { roles: vec![AccessRole::Observe], ..Granted::default() };
    assert!(present.still_grants(&key, &granted, None));
    assert!(!present.still_grants(&key, &Granted::everything(), None));
    assert!(!present.still_grants(&key, &granted, Some(1)), "it ends at another time by now");
    assert!(!in_force(&entry("other", "x", ""), None).still_grants(&key, &granted, None));
}

#[test]
fn a_certificate_stands_for_the_first_of_its_names_that_is_listed() {
    let file = "[[certificate]]\nname = \"replica.example.com\"\nroles = [\"observe\"]\n[anonymous]\nroles = [\"operate\"]\n";
    let present = in_force(file, None);
    let shown = |names: &[&str]| {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let shown =
            PresentedCredential { certificate: &names, certificate_expires: u64::MAX, ..Default::default() };
        present.identify(shown, now()).unwrap().name.to_string()
    };
    assert_eq!(shown(&["x", "replica.example.com"]), "replica.example.com");
    assert_eq!(shown(&["REPLICA.example.com"]), "anonymous");
    assert_eq!(shown(&[]), "anonymous");
    let names = ["replica.example.com".to_owned()];
    let named =
        PresentedCredential { certificate: &names, certificate_expires: now() + 60, ..Default::default() };
    let found = present.identify(named, now()).unwrap();
    assert_eq!(found.expires, Some(now() + 60), "it ends with the certificate");
    assert!(present.still_grants(&found.key, &found.granted, found.expires));
    let expired = PresentedCredential { certificate_expires: now(), ..named };
    assert_eq!(present.identify(expired, now()).unwrap_err(), Unidentified::Expired, "and is not none");
    let both = PresentedCredential { bearer: Some("wrong"), ..named };
    assert_eq!(
        present.identify(both, now()).unwrap_err(),
        Unidentified::Unknown,
        "a wrong token is not none"
    );
}

struct Issuer {
    key: NewKey,
}

impl Issuer {
    fn keys(&self, policy: JwtPolicy) -> JwtKeys {
        JwtKeys::parse(&self.key.set.to_string(), policy).unwrap()
    }

    fn signed(&self, change: impl FnOnce(&mut SignedClaims)) -> String {
        let granted = json!({ "roles": ["observe"], "grants": [{ "tenant": "acme", "prefix": "orders", "rights": ["read"] }] });
        let quorate: Granted = serde_json::from_value(granted).unwrap();
        let (iat, exp) = (now(), now() + 600);
        let mut claims =
            SignedClaims { sub: "app".into(), exp, iat, aud: None, iss: None, quorate: Arc::new(quorate) };
        change(&mut claims);
        SigningKey::parse(&self.key.private).unwrap().sign(&claims, None).unwrap()
    }
}

/// `claims` signed by `key`, whatever they are.
fn forged(algorithm: Algorithm, key: &EncodingKey, claims: &Value) -> String {
    jsonwebtoken::encode(&Header::new(algorithm), claims, key).unwrap()
}

fn claims(change: impl FnOnce(&mut Value)) -> Value {
    let mut claims = json!({ "sub": "app", "exp": now() + 600, "quorate": { "roles": ["observe"] } });
    change(&mut claims);
    claims
}

#[test]
fn a_signed_token_stands_for_what_it_says_by_either_algorithm() {
    for key in [new_ed25519("1").unwrap(), new_secret("1").unwrap()] {
        let issuer = Issuer { key };
        let present = in_force("", Some(issuer.keys(policy())));
        let token = issuer.signed(|_| {});
        let shown = PresentedCredential { bearer: Some(&token), ..PresentedCredential::default() };
        let found = present.identify(shown, now()).unwrap();
        assert_eq!((&*found.name, found.key.kind()), ("app", "jwt"));
        let orders = Touched::Collection { tenant: "acme", collection: "orders" };
        assert!(
            found.granted.covers(DataRight::Read, orders) && !found.granted.covers(DataRight::Write, orders)
        );
        assert!(found.expires.is_some_and(|at| at > now() + 600), "with the leeway");
        assert!(present.still_grants(&found.key, &found.granted, found.expires));
        let rotated = Issuer { key: new_ed25519("1").unwrap() };
        let later = in_force("", Some(rotated.keys(policy())));
        assert!(!later.still_grants(&found.key, &found.granted, found.expires), "its key is gone");
        assert!([Unidentified::WrongSignature, Unidentified::Unknown].contains(&why(&later, &token)));
        let (header, claims) = unverified(&token).unwrap();
        assert_eq!((&claims["sub"], header["alg"].is_string()), (&json!("app"), true));
    }
}

#[test]
fn nobody_makes_a_token_without_the_key() {
    let issuer = Issuer { key: new_ed25519("1").unwrap() };
    let present = in_force("", Some(issuer.keys(policy())));
    let token = issuer.signed(|_| {});
    assert!(by_token(&present, &token).is_ok());
    let [header, body, signature] = token.split('.').collect::<Vec<_>>()[..] else { panic!("{token}") };
    let encoded = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());

    // No signature, or one that is said not to be needed.
    for none in ["none", "None", "NONE", "nOnE"] {
        let unsigned = encoded(&json!({ "alg": none, "typ": "JWT" }));
        for token in [format!("{unsigned}.{body}."), format!("{unsigned}.{body}.{signature}")] {
            assert_eq!(why(&present, &token), Unidentified::Malformed, "{token}");
        }
    }
    assert_eq!(why(&present, &format!("{header}.{body}.")), Unidentified::WrongSignature);

    // The public key in the place of a secret, in whichever form.
    let x = issuer.key.set["keys"][0]["x"].as_str().unwrap();
    for secret in
        [x.as_bytes().to_vec(), URL_SAFE_NO_PAD.decode(x).unwrap(), issuer.key.set.to_string().into_bytes()]
    {
        let confused = forged(Algorithm::HS256, &EncodingKey::from_secret(&secret).unwrap(), &claims(|_| {}));
        assert_eq!(why(&present, &confused), Unidentified::Unknown);
    }

    // Another key, and other claims under the same signature.
    let other = Issuer { key: new_ed25519("1").unwrap() };
    assert_eq!(why(&present, &other.signed(|_| {})), Unidentified::WrongSignature);
    let more = encoded(&claims(|claims| claims["quorate"]["roles"] = json!(["operate"])));
    assert_eq!(why(&present, &format!("{header}.{more}.{signature}")), Unidentified::WrongSignature);
    let named = encoded(&json!({ "alg": "EdDSA", "kid": "2" }));
    assert_eq!(why(&present, &format!("{named}.{body}.{signature}")), Unidentified::Unknown);

    // Neither of the two algorithms.
    for algorithm in ["HS384", "HS512", "RS256", "ES256", "PS512"] {
        let other = encoded(&json!({ "alg": algorithm }));
        assert_eq!(
            why(&present, &format!("{other}.{body}.{signature}")),
            Unidentified::Unknown,
            "{algorithm}"
        );
    }

    // What is none at all.
    for garbage in
        ["a.b.c", "..", ".", "a.b", "a.b.c.d", "\u{0}.\u{0}.\u{0}", &format!("{token}.x"), &".".repeat(8192)]
    {
        let why = why(&present, garbage);
        assert!([Unidentified::Malformed, Unidentified::Unknown].contains(&why), "{garbage:?} {why:?}");
    }
    assert_eq!(why(&present, &format!("{token}{}", "x".repeat(8192))), Unidentified::TooLong);
}

#[test]
fn a_token_is_taken_in_its_time_and_by_those_it_is_meant_for() {
    let issuer = Issuer { key: new_ed25519("1").unwrap() };
    let strict = JwtPolicy { audience: Some("quorate".into()), issuer: Some("idp".into()), ..policy() };
    let (present, strict) =
        (in_force("", Some(issuer.keys(policy()))), in_force("", Some(issuer.keys(strict))));
    assert_eq!(why(&present, &issuer.signed(|claims| claims.exp = now() - 60)), Unidentified::Expired);
    assert!(
        by_token(&present, &issuer.signed(|claims| claims.exp = now() - 10)).is_ok(),
        "within the leeway"
    );
    // It is meant for somebody, and this node does not know that it is meant.
    let meant = |audience: &str, by: &str| {
        issuer.signed(|claims| (claims.aud, claims.iss) = (Some(audience.into()), Some(by.into())))
    };
    assert_eq!(why(&present, &meant("other", "idp")), Unidentified::WrongClaims);
    assert!(by_token(&strict, &meant("quorate", "idp")).is_ok());
    for wrong in [meant("other", "idp"), meant("quorate", "other"), issuer.signed(|_| {})] {
        assert_eq!(why(&strict, &wrong), Unidentified::WrongClaims);
    }
    assert_eq!(why(&present, &issuer.signed(|claims| claims.sub = String::new())), Unidentified::WrongClaims);

    let secret = Issuer { key: new_secret("1").unwrap() };
    let by_secret = in_force("", Some(secret.keys(policy())));
    let k = secret.key.set["keys"][0]["k"].as_str().unwrap();
    let key = EncodingKey::from_secret(&URL_SAFE_NO_PAD.decode(k).unwrap()).unwrap();
    let signed = |claims: Value| forged(Algorithm::HS256, &key, &claims);
    assert!(by_token(&by_secret, &signed(claims(|_| {}))).is_ok());
    let soon = now() + 10_000_000;
    assert_eq!(why(&by_secret, &signed(claims(|claims| claims["nbf"] = soon.into()))), Unidentified::NotYet);
    for wrong in [
        claims(|claims| claims["exp"] = Value::Null),
        claims(|claims| claims["exp"] = "tomorrow".into()),
        claims(|claims| claims["exp"] = (-1).into()),
        claims(|claims| claims["nbf"] = "now".into()),
        claims(|claims| claims["sub"] = 7.into()),
        claims(|claims| claims["quorate"] = Value::Null),
        claims(|claims| claims["quorate"] = json!({ "roles": ["root"] })),
        // A condition that this version does not know.
        claims(|claims| {
            claims["quorate"] = json!({ "grants": [{ "tenant": "*", "rights": ["read"], "only": "x" }] })
        }),
    ] {
        let why = why(&by_secret, &signed(wrong.clone()));
        assert!([Unidentified::WrongClaims, Unidentified::Malformed].contains(&why), "{wrong} {why:?}");
    }
}

#[test]
fn keys_that_cannot_be_used_are_refused_without_being_shown() {
    let (ed, secret) = (new_ed25519("1").unwrap(), new_secret("1").unwrap());
    let parsed = |text: &str| JwtKeys::parse(text, policy()).map(drop);
    assert!(parsed(&ed.set.to_string()).is_ok());
    // As openssl writes a public key.
    let x = URL_SAFE_NO_PAD.decode(ed.set["keys"][0]["x"].as_str().unwrap()).unwrap();
    let der = [&[0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00][..], &x].concat();
    let pem = base64::engine::general_purpose::STANDARD.encode(der);
    let pem = format!("-----BEGIN PUBLIC KEY-----\n{pem}\n-----END PUBLIC KEY-----\n");
    let present = in_force("", Some(JwtKeys::parse(&pem, policy()).unwrap()));
    assert!(by_token(&present, &Issuer { key: ed }.signed(|_| {})).is_ok());

    let twice = json!({ "keys": [secret.set["keys"][0], secret.set["keys"][0]] });
    let short = json!({ "keys": [{ "kty": "oct", "k": "c2hvcnQ" }] });
    let other = json!({ "keys": [{ "kty": "oct", "alg": "HS512", "k": secret.set["keys"][0]["k"] }] });
    let rsa = json!({ "keys": [{ "kty": "RSA", "n": "AQAB", "e": "AQAB" }] });
    for (text, says) in [
        (twice.to_string(), "same kid"),
        (short.to_string(), "less than 32 bytes"),
        (other.to_string(), "another algorithm"),
        (rsa.to_string(), "neither"),
        ("{}".to_owned(), "no set of keys"),
        (json!({ "keys": [] }).to_string(), "0 keys"),
        (secret.private.replace("{", ""), "no set of keys"),
        ("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----".to_owned(), "no public key"),
    ] {
        let error = parsed(&text).unwrap_err();
        assert!(error.contains(says), "{error}");
        assert!(!error.contains(secret.set["keys"][0]["k"].as_str().unwrap()), "{error}");
    }
}
