//! Signed tokens (JWT, RFC 7519), by EdDSA over Ed25519 or HMAC with SHA-256 and nothing else.
//!
//! The algorithm is the key's: what the token says of it must be the same. So nobody makes a token with a public key in the place
//! of a secret, and none is taken without a signature. A token has an end (`exp`).

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use jsonwebtoken::crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils};
use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, JwkSet};
use jsonwebtoken::signature::{self, Signer, Verifier};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Validation};
use ring::hmac;
use ring::signature::{ED25519, Ed25519KeyPair, UnparsedPublicKey};
use serde::Deserialize;

use super::file::{MAX_GRANTS, check_name};
use super::grants::Granted;
use super::in_force::{CredentialKey, Identified, Unidentified};

/// Most keys of a set.
const MAX_KEYS: usize = 64;
/// Shortest secret for HMAC: as long as what it makes.
const MIN_SECRET_BYTES: usize = 32;
/// Bytes of a public key.
const ED25519_BYTES: usize = 32;
/// How a public key of Ed25519 begins as DER (RFC 8410).
const ED25519_DER: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// What is asked of a token beside its signature.
#[derive(Debug, Clone)]
pub(super) struct JwtPolicy {
    pub(super) audience: Option<String>,
    pub(super) issuer: Option<String>,
    pub(super) leeway: Duration,
}

struct JwtKey {
    kid: Option<String>,
    /// Of the key: what names it while it is in the file.
    hash: [u8; 32],
    key: DecodingKey,
    validation: Validation,
}

/// The keys by which tokens may be signed.
pub(super) struct JwtKeys {
    keys: Vec<JwtKey>,
    leeway: Duration,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
    exp: f64,
    quorate: Granted,
}

impl JwtKeys {
    /// The keys in `text`, a set of them (JWKS) or a public key as PEM.
    ///
    /// # Errors
    /// What is wrong with it. It repeats nothing of a key.
    pub(super) fn parse(text: &str, policy: JwtPolicy) -> Result<Self, String> {
        install();
        let leeway = policy.leeway;
        let keys = match text.trim_start().starts_with("-----BEGIN") {
            true => vec![(None, Algorithm::EdDSA, of_pem(text)?)],
            false => of_set(text)?,
        };
        if keys.is_empty() || keys.len() > MAX_KEYS {
            return Err(format!("it holds {} keys; have it hold 1 to {MAX_KEYS}", keys.len()));
        }
        let key = |(kid, algorithm, bytes): (Option<String>, Algorithm, Vec<u8>)| {
            let key = match algorithm {
                Algorithm::HS256 => {
                    DecodingKey::from_secret(&bytes).map_err(|_| "a secret is empty".to_owned())?
                }
                _ => DecodingKey::from_ed_der(&bytes),
            };
            Ok(JwtKey { kid, hash: super::sha256(&bytes), key, validation: validation(algorithm, &policy) })
        };
        let keys = keys.into_iter().map(key).collect::<Result<_, String>>()?;
        Ok(Self { keys, leeway })
    }

    /// Whether the key with this `hash` is among them.
    pub(super) fn has(&self, hash: &[u8; 32]) -> bool {
        self.keys.iter().any(|key| key.hash == *hash)
    }

    /// Whom `token` stands for.
    ///
    /// # Errors
    /// Why for nobody.
    pub(super) fn identify(&self, token: &str, now: u64) -> Result<Identified, Unidentified> {
        let header = jsonwebtoken::decode_header(token).map_err(|_| Unidentified::Malformed)?;
        let mut why = Unidentified::Unknown;
        for key in &self.keys {
            // One that names no key may be by any of them.
            let is_named = header.kid.is_none() || key.kid.is_none() || header.kid == key.kid;
            if !is_named || !key.validation.algorithms.contains(&header.alg) {
                continue;
            }
            match jsonwebtoken::decode::<Claims>(token, &key.key, &key.validation) {
                Ok(token) => return self.identified(token.claims, key, now),
                Err(error) => why = unidentified(error.kind()),
            }
        }
        Err(why)
    }

    fn identified(&self, claims: Claims, key: &JwtKey, now: u64) -> Result<Identified, Unidentified> {
        let Claims { sub, exp, quorate } = claims;
        let has_no_rate = quorate.limits.requests_per_second == Some(0);
        let is_too_much = quorate.grants.len() > MAX_GRANTS;
        if check_name(&sub).is_err() || is_too_much || has_no_rate || exp.is_nan() || exp < 0.0 {
            return Err(Unidentified::WrongClaims);
        }
        let expires = (exp as u64).saturating_add(self.leeway.as_secs());
        match expires <= now {
            true => Err(Unidentified::Expired),
            false => Ok(Identified {
                name: sub.into(),
                key: CredentialKey::Jwt(key.hash),
                granted: Arc::new(quorate),
                expires: Some(expires),
            }),
        }
    }
}

fn validation(algorithm: Algorithm, policy: &JwtPolicy) -> Validation {
    let mut validation = Validation::new(algorithm);
    let mut required = vec!["exp", "sub"];
    validation.leeway = policy.leeway.as_secs();
    validation.validate_nbf = true;
    if let Some(audience) = &policy.audience {
        validation.set_audience(&[audience]);
        required.push("aud");
    }
    if let Some(issuer) = &policy.issuer {
        validation.set_issuer(&[issuer]);
        required.push("iss");
    }
    validation.set_required_spec_claims(&required);
    validation
}

fn unidentified(kind: &ErrorKind) -> Unidentified {
    match kind {
        ErrorKind::InvalidSignature => Unidentified::WrongSignature,
        ErrorKind::ExpiredSignature => Unidentified::Expired,
        ErrorKind::ImmatureSignature => Unidentified::NotYet,
        ErrorKind::InvalidToken | ErrorKind::Base64(_) | ErrorKind::Utf8(_) => Unidentified::Malformed,
        _ => Unidentified::WrongClaims,
    }
}

fn of_pem(text: &str) -> Result<Vec<u8>, String> {
    const NONE: &str = "it holds no public key of Ed25519 as PEM: \"BEGIN PUBLIC KEY\", as `quorate token keygen` and openssl write it";
    let body = text.trim().strip_prefix("-----BEGIN PUBLIC KEY-----");
    let body = body.and_then(|body| body.strip_suffix("-----END PUBLIC KEY-----")).ok_or(NONE)?;
    let der = STANDARD.decode(body.split_whitespace().collect::<String>()).map_err(|_| NONE)?;
    let key = der.strip_prefix(&ED25519_DER).filter(|key| key.len() == ED25519_BYTES);
    key.map(<[u8]>::to_vec).ok_or_else(|| NONE.to_owned())
}

/// As a key calls what it is for.
fn name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::HS256 => "HS256",
        _ => "EdDSA",
    }
}

type ParsedKey = (Option<String>, Algorithm, Vec<u8>);

fn of_set(text: &str) -> Result<Vec<ParsedKey>, String> {
    let set: JwkSet = serde_json::from_str(text)
        .map_err(|error| format!("line {}: it is no set of keys (JWKS), nor a PEM", error.line()))?;
    let mut kids = HashMap::new();
    let mut keys = Vec::new();
    for (place, jwk) in set.keys.into_iter().enumerate() {
        let place = place + 1;
        let kid = jwk.common.key_id.clone();
        if let Some(other) = kid.clone().and_then(|kid| kids.insert(kid, place)) {
            return Err(format!("keys {other} and {place} have the same kid"));
        }
        let algorithm = match &jwk.algorithm {
            AlgorithmParameters::OctetKeyPair(pair) if pair.curve == EllipticCurve::Ed25519 => {
                Algorithm::EdDSA
            }
            AlgorithmParameters::OctetKey(_) => Algorithm::HS256,
            _ => return Err(format!("key {place} is neither of Ed25519 (OKP) nor a secret (oct)")),
        };
        let said = jwk.common.key_algorithm.map(|said| said.to_string());
        if said.is_some_and(|said| said != name(algorithm)) {
            return Err(format!("key {place} is for another algorithm than EdDSA or HS256"));
        }
        let unreadable = || format!("key {place} cannot be read");
        let key = DecodingKey::from_jwk(&jwk).map_err(|_| unreadable())?;
        let bytes = key.try_get_as_bytes().map_err(|_| unreadable())?.to_vec();
        match algorithm {
            Algorithm::HS256 if bytes.len() < MIN_SECRET_BYTES => {
                return Err(format!("the secret of key {place} has less than {MIN_SECRET_BYTES} bytes"));
            }
            Algorithm::EdDSA if bytes.len() != ED25519_BYTES => return Err(unreadable()),
            _ => {}
        }
        keys.push((kid, algorithm, bytes));
    }
    Ok(keys)
}

/// Has tokens verified and signed by ring. A program that has brought algorithms of its own keeps them: they do the same.
pub(super) fn install() {
    let _ = RING.install_default();
}

/// The two algorithms, by ring.
static RING: CryptoProvider = CryptoProvider {
    signer_factory: |algorithm, key| match algorithm {
        Algorithm::HS256 => Ok(Box::new(HmacCode(hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes())))),
        Algorithm::EdDSA => Ok(Box::new(EdSigner::of(key)?)),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    },
    verifier_factory: |algorithm, key| match algorithm {
        Algorithm::HS256 => {
            Ok(Box::new(HmacCode(hmac::Key::new(hmac::HMAC_SHA256, key.try_get_as_bytes()?))))
        }
        Algorithm::EdDSA => Ok(Box::new(EdVerifier(key.try_get_as_bytes()?.to_vec()))),
        _ => Err(ErrorKind::InvalidAlgorithm.into()),
    },
    key_utils: KeyUtils::new_unimplemented(),
};

struct HmacCode(hmac::Key);

impl Verifier<Vec<u8>> for HmacCode {
    fn verify(&self, message: &[u8], code: &Vec<u8>) -> Result<(), signature::Error> {
        hmac::verify(&self.0, message, code).map_err(|_| signature::Error::new())
    }
}

impl JwtVerifier for HmacCode {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

impl Signer<Vec<u8>> for HmacCode {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, signature::Error> {
        Ok(hmac::sign(&self.0, message).as_ref().to_vec())
    }
}

impl JwtSigner for HmacCode {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

struct EdVerifier(Vec<u8>);

impl Verifier<Vec<u8>> for EdVerifier {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), signature::Error> {
        let key = UnparsedPublicKey::new(&ED25519, &self.0);
        key.verify(message, signature).map_err(|_| signature::Error::new())
    }
}

impl JwtVerifier for EdVerifier {
    fn algorithm(&self) -> Algorithm {
        Algorithm::EdDSA
    }
}

struct EdSigner(Ed25519KeyPair);

impl EdSigner {
    fn of(key: &EncodingKey) -> Result<Self, jsonwebtoken::errors::Error> {
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(key.as_bytes());
        pair.map(Self).map_err(|_| ErrorKind::InvalidEddsaKey.into())
    }
}

impl Signer<Vec<u8>> for EdSigner {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, signature::Error> {
        Ok(self.0.sign(message).as_ref().to_vec())
    }
}

impl JwtSigner for EdSigner {
    fn algorithm(&self) -> Algorithm {
        Algorithm::EdDSA
    }
}
