//! Both ends of a connection prove that they know a secret, and say nothing of it.
//!
//! ```text
//!  dialling                                 accepting
//!     | -------- nonce, 32 bytes ------------> |
//!     | <------- nonce, 32 bytes ------------- |
//!     | -- HMAC(key, "dialling" | nonces | binding) -> |   verified first
//!     | <- HMAC(key, "accepting" | nonces | binding) - |   said only to one that has proven itself
//! ```
//!
//! The key is PBKDF2-HMAC-SHA-256 of the secret, salted with the cluster's name: the secret of one cluster proves nothing in
//! another. The binding is keying material that both ends export from the TLS connection (RFC 5705, RFC 9266): whoever stands
//! between them has two connections with two bindings, so what it passes on proves nothing. Nonces are new each time, so
//! nothing can be replayed; the roles are named, so nothing can be sent back.
//!
//! The end that proves first shows its proof to whoever it has reached, who may then guess secrets offline, at the price of
//! [`DERIVATION_ROUNDS`] hashes a guess. That is the dialling end: it has chosen where to go, while anybody can come to a port. The
//! accepting end shows nothing to one that has not proven itself. A random secret of 16 bytes cannot be guessed.

use std::io;
use std::num::NonZeroU32;

use ring::rand::{SecureRandom as _, SystemRandom};
use ring::{hmac, pbkdf2};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// Fewest bytes of a secret.
pub(super) const MIN_SECRET_BYTES: usize = 16;
/// Most.
pub(super) const MAX_SECRET_BYTES: usize = 1024;
/// Most secrets in force at a time.
pub(super) const MAX_SECRETS: usize = 2;
/// What a guess at the secret costs, in rounds of HMAC-SHA-256. It is paid once for each secret that a node begins to use.
const DERIVATION_ROUNDS: NonZeroU32 = NonZeroU32::new(600_000).expect("invariant: it is not zero");
/// Bytes of a nonce, of a proof, and of a binding.
const BLOCK_BYTES: usize = 32;
/// What the keying material of the binding is for.
pub(super) const BINDING_LABEL: &[u8] = b"EXPORTER-quorate-peer-secret";
const SALT_PREFIX: &[u8] = b"quorate peer secret 1:";

type Block = [u8; BLOCK_BYTES];

/// What is exported from a connection.
pub(super) type Binding = Block;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prover {
    Dialling,
    Accepting,
}

impl Prover {
    fn label(self) -> &'static [u8] {
        match self {
            Self::Dialling => b"quorate dialling",
            Self::Accepting => b"quorate accepting",
        }
    }
}

/// A secret, derived.
#[derive(Debug, Clone)]
pub(super) struct SecretKey {
    key: hmac::Key,
    /// Tells it from others, and says nothing of it.
    pub(super) mark: Block,
}

impl SecretKey {
    /// The key that `secret` is in `cluster`. Takes some tenths of a second.
    pub(super) fn derive(cluster: &str, secret: &[u8]) -> Self {
        let salt = [SALT_PREFIX, cluster.as_bytes()].concat();
        let mut derived = [0; BLOCK_BYTES];
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, DERIVATION_ROUNDS, &salt, secret, &mut derived);
        Self::of(&derived)
    }

    fn of(derived: &Block) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, derived);
        let mut mark = [0; BLOCK_BYTES];
        mark.copy_from_slice(hmac::sign(&key, b"quorate mark").as_ref());
        Self { key, mark }
    }

    fn prove(&self, prover: Prover, exchange: &Exchange<'_>) -> Block {
        let mut proof = [0; BLOCK_BYTES];
        proof.copy_from_slice(hmac::sign(&self.key, &exchange.stated_by(prover)).as_ref());
        proof
    }

    fn is_proven(&self, prover: Prover, exchange: &Exchange<'_>, proof: &Block) -> bool {
        hmac::verify(&self.key, &exchange.stated_by(prover), proof).is_ok()
    }
}

/// What a proof is about.
struct Exchange<'a> {
    dialling_nonce: Block,
    accepting_nonce: Block,
    binding: &'a Binding,
}

impl Exchange<'_> {
    fn stated_by(&self, prover: Prover) -> Vec<u8> {
        [prover.label(), &self.dialling_nonce, &self.accepting_nonce, self.binding].concat()
    }
}

fn nonce() -> io::Result<Block> {
    let mut nonce = [0; BLOCK_BYTES];
    let filled = SystemRandom::new().fill(&mut nonce);
    filled.map_err(|_| io::Error::other("the system gives no random numbers"))?;
    Ok(nonce)
}

async fn heard(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Block> {
    let mut block = [0; BLOCK_BYTES];
    stream.read_exact(&mut block).await?;
    Ok(block)
}

async fn say(stream: &mut (impl AsyncWrite + Unpin), block: &Block) -> io::Result<()> {
    stream.write_all(block).await?;
    stream.flush().await
}

fn denied(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

/// The dialling end: proves `secret`, and has it proven.
pub(super) async fn dialling(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    binding: &Binding,
    secret: &SecretKey,
) -> io::Result<()> {
    let dialling_nonce = nonce()?;
    say(stream, &dialling_nonce).await?;
    let exchange = Exchange { dialling_nonce, accepting_nonce: heard(stream).await?, binding };
    say(stream, &secret.prove(Prover::Dialling, &exchange)).await?;
    let answer = heard(stream).await;
    let answer = answer.map_err(|_| denied("the node there does not accept this node's peer secret"))?;
    match secret.is_proven(Prover::Accepting, &exchange, &answer) {
        true => Ok(()),
        false => Err(denied("what answers there does not know the peer secret")),
    }
}

/// The accepting end: has one of `secrets` proven, and then proves it. Returns which it was.
pub(super) async fn accepting<'a>(
    stream: &mut (impl AsyncRead + AsyncWrite + Unpin),
    binding: &Binding,
    secrets: &'a [SecretKey],
) -> io::Result<&'a SecretKey> {
    let dialling_nonce = heard(stream).await?;
    let exchange = Exchange { dialling_nonce, accepting_nonce: nonce()?, binding };
    say(stream, &exchange.accepting_nonce).await?;
    let proof = heard(stream).await?;
    let known = secrets.iter().find(|secret| secret.is_proven(Prover::Dialling, &exchange, &proof));
    let known = known.ok_or_else(|| denied("the caller does not know the peer secret"))?;
    say(stream, &known.prove(Prover::Accepting, &exchange)).await?;
    Ok(known)
}

#[cfg(test)]
mod tests {
    use tokio::io::{DuplexStream, duplex};

    use super::*;

    const ONE: Binding = [1; BLOCK_BYTES];
    const OTHER: Binding = [2; BLOCK_BYTES];

    fn key(byte: u8) -> SecretKey {
        SecretKey::of(&[byte; BLOCK_BYTES])
    }

    /// Both ends of one connection, each with its binding and what it knows.
    async fn meet(
        (dialled, secret): (Binding, u8),
        (accepted, secrets): (Binding, &[u8]),
    ) -> (io::Result<()>, Option<[u8; 32]>) {
        let (mut near, mut far) = duplex(1024);
        let (secret, secrets): (_, Vec<_>) = (key(secret), secrets.iter().copied().map(key).collect());
        let dials = async move {
            let outcome = dialling(&mut near, &dialled, &secret).await;
            drop(near);
            outcome
        };
        let accepts = async move {
            let known = accepting(&mut far, &accepted, &secrets).await;
            drop(far);
            known.ok().map(|known| known.mark)
        };
        tokio::join!(dials, accepts)
    }

    #[tokio::test]
    async fn those_who_know_a_secret_prove_it_to_each_other() {
        let (dialled, accepted) = meet((ONE, 7), (ONE, &[9, 7])).await;
        assert!(dialled.is_ok());
        assert_eq!(accepted, Some(key(7).mark), "any of those in force");
    }

    #[tokio::test]
    async fn another_secret_and_another_connection_prove_nothing() {
        for ((dialled, secret), (accepted, secrets)) in
            [((ONE, 8), (ONE, &[7][..])), ((ONE, 7), (OTHER, &[7])), ((ONE, 7), (ONE, &[]))]
        {
            let (told, known) = meet((dialled, secret), (accepted, secrets)).await;
            assert_eq!(told.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
            assert_eq!(known, None);
        }
    }

    async fn exchanged(stream: &mut DuplexStream, said: &Block) -> io::Result<Block> {
        say(stream, said).await?;
        heard(stream).await
    }

    #[tokio::test]
    async fn what_was_recorded_or_is_sent_back_proves_nothing_and_is_not_answered() {
        let (mut near, mut far) = duplex(1024);
        let known = key(7);
        let recorded = async {
            let nonce = nonce().unwrap();
            let accepting_nonce = exchanged(&mut near, &nonce).await.unwrap();
            let exchange = Exchange { dialling_nonce: nonce, accepting_nonce, binding: &ONE };
            let proof = known.prove(Prover::Dialling, &exchange);
            let answer = exchanged(&mut near, &proof).await.unwrap();
            (nonce, proof, answer)
        };
        let secrets = [key(7)];
        let ((nonce, proof, answer), accepted) = tokio::join!(recorded, accepting(&mut far, &ONE, &secrets));
        accepted.unwrap();
        // The same words again, on a connection with the same binding even, and the answer to them.
        for replayed in [proof, answer] {
            let (mut near, mut far) = duplex(1024);
            let replay = async {
                let fresh = exchanged(&mut near, &nonce).await.unwrap();
                assert_ne!(fresh, nonce);
                exchanged(&mut near, &replayed).await
            };
            let accepts = async move {
                let known = accepting(&mut far, &ONE, &secrets_of_seven()).await.map(|known| known.mark);
                drop(far);
                known
            };
            let (heard, accepted) = tokio::join!(replay, accepts);
            assert!(heard.is_err(), "the stranger is told something");
            assert_eq!(accepted.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        }
    }

    fn secrets_of_seven() -> [SecretKey; 1] {
        [key(7)]
    }

    #[tokio::test]
    async fn one_who_sends_our_own_words_back_is_not_believed() {
        // It plays the accepting end, with what the dialling end says.
        let (mut near, mut far) = duplex(1024);
        let mirror = async move {
            let nonce = heard(&mut far).await.unwrap();
            let proof = exchanged(&mut far, &nonce).await.unwrap();
            say(&mut far, &proof).await.unwrap();
        };
        let (told, ()) = tokio::join!(dialling(&mut near, &ONE, &key(7)), mirror);
        assert_eq!(told.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn the_secret_of_one_cluster_is_not_that_of_another() {
        let secret = b"0123456789abcdef";
        let marks = ["c", "d"].map(|cluster| SecretKey::derive(cluster, secret).mark);
        assert_ne!(marks[0], marks[1]);
        assert_eq!(marks[0], SecretKey::derive("c", secret).mark);
    }
}
