//! Tokens for callers: random ones for the file, and signed ones. Nodes need none of it.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jsonwebtoken::jwk::{AlgorithmParameters, JwkSet};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use ring::rand::{SystemRandom, generate};
use ring::signature::{Ed25519KeyPair, KeyPair as _};
use serde::Serialize;
use serde_json::{Value, json};

use super::grants::Granted;
use super::jwt;

/// How a random token begins, so that whoever finds one knows what it is.
const TOKEN_BEGINS: &str = "qrt_";
/// How a private key of Ed25519 begins as DER (RFC 8410); its 32 bytes follow.
const ED25519_PKCS8: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
const PEM_BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";

fn random() -> Result<[u8; 32], String> {
    let random = generate::<[u8; 32]>(&SystemRandom::new());
    random.map(|random| random.expose()).map_err(|_| "the system gives no random numbers".to_owned())
}

/// A token that nobody guesses.
///
/// # Errors
/// In words.
pub(crate) fn random_token() -> Result<String, String> {
    Ok(format!("{TOKEN_BEGINS}{}", URL_SAFE_NO_PAD.encode(random()?)))
}

/// What a signed token says.
#[derive(Debug, Serialize)]
pub(crate) struct SignedClaims {
    /// The name of the caller.
    pub(crate) sub: String,
    /// When it ends and when it was signed, in seconds since the Unix epoch.
    pub(crate) exp: u64,
    pub(crate) iat: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) aud: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) iss: Option<String>,
    pub(crate) quorate: Arc<Granted>,
}

/// A key that signs tokens.
pub(crate) struct SigningKey {
    algorithm: Algorithm,
    kid: Option<String>,
    key: EncodingKey,
}

impl SigningKey {
    /// The key in `text`: a private one of Ed25519 as PEM (PKCS #8), or a set with one secret (JWKS, oct).
    ///
    /// # Errors
    /// What is wrong with it. It repeats nothing of it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        jwt::install();
        if text.trim_start().starts_with("-----BEGIN") {
            const NONE: &str = "it holds no private key of Ed25519 as PEM: `quorate token keygen` and `openssl genpkey -algorithm ed25519` write one";
            let body = text.trim().strip_prefix(PEM_BEGIN).and_then(|body| body.strip_suffix(PEM_END));
            let body = body.ok_or(NONE)?.split_whitespace().collect::<String>();
            let der = STANDARD.decode(body).map_err(|_| NONE)?;
            Ed25519KeyPair::from_pkcs8_maybe_unchecked(&der).map_err(|_| NONE)?;
            return Ok(Self { algorithm: Algorithm::EdDSA, kid: None, key: EncodingKey::from_ed_der(&der) });
        }
        const NO_SET: &str = "it is neither a private key as PEM nor a set of keys (JWKS) with one secret";
        let set: JwkSet = serde_json::from_str(text).map_err(|_| NO_SET)?;
        let [jwk] = &set.keys[..] else { return Err(NO_SET.to_owned()) };
        let AlgorithmParameters::OctetKey(secret) = &jwk.algorithm else { return Err(NO_SET.to_owned()) };
        let secret = URL_SAFE_NO_PAD.decode(&secret.value).map_err(|_| NO_SET)?;
        let key = EncodingKey::from_secret(&secret).map_err(|_| NO_SET)?;
        Ok(Self { algorithm: Algorithm::HS256, kid: jwk.common.key_id.clone(), key })
    }

    /// `claims`, signed. `kid` names the key in the set that nodes have, unless the key itself does.
    ///
    /// # Errors
    /// In words.
    pub(crate) fn sign(&self, claims: &SignedClaims, kid: Option<String>) -> Result<String, String> {
        let header = Header { kid: kid.or_else(|| self.kid.clone()), ..Header::new(self.algorithm) };
        jsonwebtoken::encode(&header, claims, &self.key)
            .map_err(|error| format!("it cannot be signed: {error}"))
    }
}

/// A new key: what signs, as text that [`SigningKey`] reads, and the set of keys that nodes are given.
pub(crate) struct NewKey {
    pub(crate) private: String,
    pub(crate) set: Value,
}

/// A key of Ed25519.
///
/// # Errors
/// In words.
pub(crate) fn new_ed25519(kid: &str) -> Result<NewKey, String> {
    let seed = random()?;
    let pair = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|error| error.to_string())?;
    let private = STANDARD.encode([&ED25519_PKCS8[..], &seed].concat());
    let x = URL_SAFE_NO_PAD.encode(pair.public_key().as_ref());
    let set = json!({ "keys": [{ "kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": kid, "x": x }] });
    Ok(NewKey { private: format!("{PEM_BEGIN}\n{private}\n{PEM_END}\n"), set })
}

/// A secret for HMAC, which nodes know as well: whoever reads it there can sign, too.
///
/// # Errors
/// In words.
pub(crate) fn new_secret(kid: &str) -> Result<NewKey, String> {
    let k = URL_SAFE_NO_PAD.encode(random()?);
    let set = json!({ "keys": [{ "kty": "oct", "alg": "HS256", "use": "sig", "kid": kid, "k": k }] });
    Ok(NewKey { private: format!("{set}\n"), set })
}

/// The header and the claims of a signed token, which nobody has verified; `None` where it is none.
pub(crate) fn unverified(token: &str) -> Option<(Value, Value)> {
    let mut parts = token.split('.');
    let mut part = || serde_json::from_slice(&URL_SAFE_NO_PAD.decode(parts.next()?).ok()?).ok();
    let both = (part()?, part()?);
    (parts.count() == 1).then_some(both)
}
