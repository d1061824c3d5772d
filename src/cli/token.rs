//! `quorate token`: makes what callers show, and shows what is in it. Asks no node.

use std::fs::OpenOptions;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};

use super::{CliError, Common, Format, output};
use crate::door::rights::grants::{AccessRole, Grant, Granted};
use crate::door::rights::signing::{self, SignedClaims, SigningKey};
use crate::door::token_hash;
use crate::duration;
use crate::runtime;

/// Longest file that is read.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// Arguments of `quorate token`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate token create app --grant acme/orders:read,write    a token, and its entry for the file of tokens\n  quorate token keygen issuer.pem > keys.json                a key that signs, and what nodes are given as --jwt-keys\n  quorate token sign --key issuer.pem --name app --expires-in 1h --grant acme:read\n\ndocs/SECURITY.md says what may be granted."
)]
pub struct TokenArgs {
    /// What to do
    #[command(subcommand)]
    command: TokenCommand,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a random token, and the entry that the file of tokens needs for it
    #[command(
        after_help = "Example:\n  quorate token create app --grant acme/orders:read,write\n  quorate token create monitoring --role observe --expires-in 90d -o json\n\nThe token is printed here and nowhere else: the file holds its hash. Append the entry to the file of tokens of every node; nodes read it some seconds later."
    )]
    Create(CreateArgs),
    /// Print the hash of a token, as the file of tokens has it
    #[command(
        after_help = "Example:\n  quorate token hash token.txt\n  pass show quorate | quorate token hash"
    )]
    Hash(FileArgs),
    /// Make a key that signs tokens; what nodes are given as --jwt-keys is printed
    #[command(
        after_help = "Example:\n  quorate token keygen issuer.pem > keys.json\n  quorate token keygen secret.json --algorithm hs256\n\nWith hs256 there is one secret for both sides: whoever reads it on a node can sign, too."
    )]
    Keygen(KeygenArgs),
    /// Sign a token
    #[command(
        after_help = "Example:\n  quorate token sign --key issuer.pem --name app --expires-in 1h --grant acme/orders:read,write > app.token"
    )]
    Sign(SignArgs),
    /// Show what is in a token; nothing is verified
    #[command(
        after_help = "Example:\n  quorate token show app.token\n  quorate token show --token-file app.token"
    )]
    Show(FileArgs),
}

/// What is granted.
#[derive(Debug, Args)]
struct GrantArgs {
    /// See how nodes and cluster are (observe), change that, too (operate), or be told of to clients for their reads (replica)
    #[arg(long = "role", value_name = "ROLE", value_enum)]
    roles: Vec<RoleArg>,
    /// Rights to keys, as TENANT[/PREFIX]:read,write,subscribe; * is every tenant
    #[arg(long = "grant", value_name = "GRANT")]
    grants: Vec<Grant>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum RoleArg {
    Observe,
    Operate,
    Replica,
}

impl GrantArgs {
    fn granted(self) -> Result<Granted, CliError> {
        let roles = self.roles.into_iter().map(|role| match role {
            RoleArg::Observe => AccessRole::Observe,
            RoleArg::Operate => AccessRole::Operate,
            RoleArg::Replica => AccessRole::Replica,
        });
        let granted = Granted { roles: roles.collect(), grants: self.grants, ..Granted::default() };
        match granted.is_something() {
            true => Ok(granted),
            false => Err(CliError::Usage(
                "a token that grants nothing is of no use: give --role or --grant".into(),
            )),
        }
    }
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// Who is to show it
    name: String,
    /// After which time it is not taken any more, such as 90d [default: never]
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    expires_in: Option<Duration>,
    #[command(flatten)]
    grants: GrantArgs,
}

#[derive(Debug, Args)]
struct FileArgs {
    /// File with the token, or - for standard input [default: the token that is shown to nodes, else -]
    file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum AlgorithmArg {
    Eddsa,
    Hs256,
}

#[derive(Debug, Args)]
struct KeygenArgs {
    /// Where to write the key that signs; it is not overwritten
    key_file: PathBuf,
    /// What tokens call the key
    #[arg(long, value_name = "ID", default_value = "1")]
    kid: String,
    /// Signatures by Ed25519, or codes by one secret
    #[arg(long, value_enum, default_value = "eddsa")]
    algorithm: AlgorithmArg,
}

#[derive(Debug, Args)]
struct SignArgs {
    /// The key that `quorate token keygen` has written
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// What the key is called in the set that nodes have
    #[arg(long, value_name = "ID")]
    kid: Option<String>,
    /// Who is to show it
    #[arg(long, value_name = "NAME")]
    name: String,
    /// After which time it is not taken any more
    #[arg(long, value_name = "TIME", value_parser = duration::parse)]
    expires_in: Duration,
    /// For whom it is meant, where nodes ask (--jwt-audience)
    #[arg(long, value_name = "NAME")]
    audience: Option<String>,
    /// Who issues it, where nodes ask (--jwt-issuer)
    #[arg(long, value_name = "NAME")]
    issuer: Option<String>,
    #[command(flatten)]
    grants: GrantArgs,
}

/// Does what is asked for.
///
/// # Errors
/// See [`CliError`].
pub fn run(common: &Common, args: TokenArgs) -> Result<(), CliError> {
    match args.command {
        TokenCommand::Create(args) => create(common.output, args),
        TokenCommand::Hash(args) => {
            let hash = token_hash(&given(common, args)?);
            printed(common.output, &hash, || json!({ "sha256": hash }))
        }
        TokenCommand::Keygen(args) => keygen(args),
        TokenCommand::Sign(args) => sign(common.output, args),
        TokenCommand::Show(args) => show(common, args),
    }
}

/// An entry of the file of tokens.
#[derive(Serialize)]
struct Entry<'a> {
    token: [EntryToken<'a>; 1],
}

#[derive(Serialize)]
struct EntryToken<'a> {
    name: &'a str,
    sha256: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    expires: Option<u64>,
    #[serde(flatten)]
    granted: Granted,
}

fn create(format: Format, args: CreateArgs) -> Result<(), CliError> {
    let CreateArgs { name, expires_in, grants } = args;
    let token = signing::random_token().map_err(CliError::Usage)?;
    let expires = expires_in.map(|time| now() + time.as_secs());
    let granted = grants.granted()?;
    let entry = Entry { token: [EntryToken { name: &name, sha256: token_hash(&token), expires, granted }] };
    let entry = toml::to_string(&entry).map_err(|error| CliError::Usage(error.to_string()))?;
    let text = format!("{token}\n\n# Its entry for the file of tokens:\n{entry}");
    printed(format, text.trim_end(), || json!({ "token": token, "entry": entry }))
}

fn keygen(args: KeygenArgs) -> Result<(), CliError> {
    let KeygenArgs { key_file, kid, algorithm } = args;
    let new = match algorithm {
        AlgorithmArg::Eddsa => signing::new_ed25519(&kid),
        AlgorithmArg::Hs256 => signing::new_secret(&kid),
    };
    let new = new.map_err(CliError::Usage)?;
    let failed = |error: io::Error| CliError::Usage(format!("cannot write {}: {error}", key_file.display()));
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).open(&key_file).map_err(failed)?;
    file.write_all(new.private.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
    match algorithm {
        AlgorithmArg::Eddsa => output::json(&new.set),
        // The file itself is what nodes are given.
        AlgorithmArg::Hs256 => Ok(()),
    }
}

fn sign(format: Format, args: SignArgs) -> Result<(), CliError> {
    let SignArgs { key, kid, name, expires_in, audience, issuer, grants } = args;
    let unusable = |error: String| CliError::Usage(format!("{}: {error}", key.display()));
    let signing = SigningKey::parse(&read(&key)?).map_err(unusable)?;
    let (quorate, iat) = (Arc::new(grants.granted()?), now());
    let exp = iat + expires_in.as_secs();
    let claims = SignedClaims { sub: name, exp, iat, aud: audience, iss: issuer, quorate };
    let token = signing.sign(&claims, kid).map_err(CliError::Usage)?;
    printed(format, &token, || json!({ "token": token, "expires": exp }))
}

fn show(common: &Common, args: FileArgs) -> Result<(), CliError> {
    let token = given(common, args)?;
    let shown = match signing::unverified(&token) {
        Some((header, claims)) => json!({ "kind": "jwt", "header": header, "claims": claims }),
        None => json!({ "kind": "token", "sha256": token_hash(&token) }),
    };
    output::json(&shown)
}

fn printed(format: Format, text: &str, object: impl FnOnce() -> Value) -> Result<(), CliError> {
    match format {
        Format::Json => output::json(&object()),
        Format::Table => output::line(text),
    }
}

/// The token that a command is about.
fn given(common: &Common, args: FileArgs) -> Result<String, CliError> {
    let text = match (args.file, &common.token_file, std::env::var(super::TOKEN)) {
        (Some(path), _, _) => read(&path)?,
        (None, Some(path), _) => read(path)?,
        (None, None, Ok(token)) if !token.is_empty() => token,
        (None, None, _) => read(Path::new("-"))?,
    };
    match text.trim() {
        "" => Err(CliError::Usage("there is no token in it".to_owned())),
        token => Ok(token.to_owned()),
    }
}

fn read(path: &Path) -> Result<String, CliError> {
    let failed = |source| CliError::Input { path: path.to_owned(), source };
    let mut text = String::new();
    let from: Box<dyn io::Read> = match path.as_os_str() == "-" {
        true => Box::new(io::stdin()),
        false => Box::new(std::fs::File::open(path).map_err(failed)?),
    };
    from.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

fn now() -> u64 {
    runtime::unix_time_ms() / 1000
}
