//! `quorate cert`: makes an authority, and certificates of nodes and clients, for those who have no authority of their own.

use std::fs::{self, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{CliError, Common, Format, output};
use crate::runtime;
use crate::trust::certificates::CertificateFacts;
use crate::trust::issue::{Authority, IssueError, Issued, authority, shown};
use crate::types::NodeId;

/// Ten years.
const AUTHORITY_DAYS: u32 = 3650;
/// One.
const CERTIFICATE_DAYS: u32 = 365;
/// No file with a certificate is larger.
const MAX_FILE_BYTES: u64 = 256 * 1024;

/// Arguments of `quorate cert`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate cert ca --dir certs\n  quorate cert node 1 --dir certs --cluster quorate --host node-1.example --host 10.0.0.1\n  quorate cert client billing --dir certs\n  quorate cert show certs/node-1.pem\n  quorate serve --node-id 1 --peer-ca certs/ca.pem --peer-cert certs/node-1.pem --peer-key certs/node-1.key …\n\nFiles are for their owner alone, and none is written over without --force. Keep ca.key where no node is: whoever has it can make members."
)]
pub struct CertArgs {
    /// What to do.
    #[command(subcommand)]
    pub action: CertAction,
}

/// What `quorate cert` does.
#[derive(Debug, Subcommand)]
pub enum CertAction {
    /// Make an authority: ca.pem and ca.key
    #[command(after_help = "Example:\n  quorate cert ca --dir certs")]
    Ca(CaArgs),
    /// Make the certificate of a node, for other members and for clients: node-ID.pem and node-ID.key
    #[command(
        after_help = "Example:\n  quorate cert node 1 --dir certs --cluster quorate --host node-1.example --host 10.0.0.1"
    )]
    Node(NodeCertArgs),
    /// Make the certificate of a client: NAME.pem and NAME.key
    #[command(after_help = "Example:\n  quorate cert client billing --dir certs")]
    Client(ClientCertArgs),
    /// Show what stands in certificates
    #[command(after_help = "Example:\n  quorate cert show certs/ca.pem certs/node-1.pem")]
    Show(ShowArgs),
}

/// Where files go.
#[derive(Debug, Clone, Args)]
pub struct CertFiles {
    /// Directory of the authority's files, and of what is made; it is made where it does not exist
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub dir: PathBuf,
    /// Put new files in the place of those that are there
    #[arg(long)]
    pub force: bool,
}

/// Arguments of `quorate cert ca`.
#[derive(Debug, Args)]
pub struct CaArgs {
    /// Where files go.
    #[command(flatten)]
    pub files: CertFiles,
    /// What the authority is called
    #[arg(long, value_name = "NAME", default_value = "quorate authority")]
    pub name: String,
    /// How long it is valid
    #[arg(long, value_name = "DAYS", default_value_t = AUTHORITY_DAYS)]
    pub days: u32,
}

/// Arguments of `quorate cert node`.
#[derive(Debug, Args)]
pub struct NodeCertArgs {
    /// The node's id
    #[arg(value_name = "ID", value_parser = clap::value_parser!(u64).range(1..))]
    pub node_id: NodeId,
    /// Where files go.
    #[command(flatten)]
    pub files: CertFiles,
    /// Name of the cluster, as the nodes are given it
    #[arg(long, value_name = "NAME", env = "QUORATE_CLUSTER", default_value = "quorate")]
    pub cluster: String,
    /// Names and addresses by which clients reach the node
    #[arg(
        long = "host",
        value_name = "HOST",
        value_delimiter = ',',
        default_value = "localhost,127.0.0.1,::1"
    )]
    pub hosts: Vec<String>,
    /// How long it is valid
    #[arg(long, value_name = "DAYS", default_value_t = CERTIFICATE_DAYS)]
    pub days: u32,
}

/// Arguments of `quorate cert client`.
#[derive(Debug, Args)]
pub struct ClientCertArgs {
    /// The client's name: a word, a DNS name or a URI
    pub name: String,
    /// Where files go.
    #[command(flatten)]
    pub files: CertFiles,
    /// What the files are called [default: the name]
    #[arg(long, value_name = "NAME")]
    pub file_name: Option<String>,
    /// How long it is valid
    #[arg(long, value_name = "DAYS", default_value_t = CERTIFICATE_DAYS)]
    pub days: u32,
}

/// Arguments of `quorate cert show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// PEM files
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

impl From<IssueError> for CliError {
    fn from(error: IssueError) -> Self {
        match error {
            IssueError::Wrong(why) => Self::Usage(why),
            IssueError::Failed(_) => Self::node(error),
        }
    }
}

/// Runs the command.
///
/// # Errors
/// See [`CliError`].
pub fn run(common: &Common, args: CertArgs) -> Result<(), CliError> {
    match args.action {
        CertAction::Ca(CaArgs { files, name, days }) => files.write(common, "ca", &authority(&name, days)?),
        CertAction::Node(NodeCertArgs { node_id, files, cluster, hosts, days }) => {
            let issued = files.authority()?.node(&cluster, node_id, &hosts, days)?;
            files.write(common, &format!("node-{node_id}"), &issued)
        }
        CertAction::Client(ClientCertArgs { name, files, file_name, days }) => {
            let issued = files.authority()?.client(&name, days)?;
            let file_name = file_name.unwrap_or_else(|| name.clone());
            if file_name.is_empty() || file_name.starts_with('.') || file_name.contains(['/', '\0']) {
                let why =
                    format!("{} is no name of a file; give one with --file-name", file_name.escape_debug());
                return Err(CliError::Usage(why));
            }
            files.write(common, &file_name, &issued)
        }
        CertAction::Show(args) => show(common, &args.files),
    }
}

/// Makes an authority in `dir`, and by it the certificates of `nodes` and of a client; leaves those that are there.
pub(super) fn make_missing(
    dir: &Path,
    cluster: &str,
    nodes: impl Iterator<Item = NodeId>,
    client: &str,
) -> Result<(), CliError> {
    let files = CertFiles { dir: dir.to_owned(), force: false };
    let is_there =
        |name: &str| dir.join(format!("{name}.pem")).exists() && dir.join(format!("{name}.key")).exists();
    if !is_there("ca") {
        files.put("ca", &authority("quorate cluster", AUTHORITY_DAYS)?)?;
    }
    let made = files.authority()?;
    let hosts = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    for node_id in nodes {
        let name = format!("node-{node_id}");
        if !is_there(&name) {
            files.put(&name, &made.node(cluster, node_id, &hosts, CERTIFICATE_DAYS)?)?;
        }
    }
    if !is_there(client) {
        files.put(client, &made.client(client, CERTIFICATE_DAYS)?)?;
    }
    Ok(())
}

impl CertFiles {
    fn path(&self, name: &str, kind: &str) -> PathBuf {
        self.dir.join(format!("{name}.{kind}"))
    }

    fn authority(&self) -> Result<Authority, CliError> {
        let (certificate, key) = (self.path("ca", "pem"), self.path("ca", "key"));
        if !certificate.exists() {
            let dir = self.dir.display();
            return Err(CliError::Usage(format!(
                "there is no authority in {dir}: `quorate cert ca --dir {dir}` makes one"
            )));
        }
        Ok(Authority::read(&read(&certificate)?, &read(&key)?)?)
    }

    /// The certificate and its key, each in a file of its own: both, or none where one of them is there already.
    fn put(&self, name: &str, issued: &Issued) -> Result<[PathBuf; 2], CliError> {
        let paths = [self.path(name, "pem"), self.path(name, "key")];
        if !self.force
            && let Some(there) = paths.iter().find(|path| path.exists())
        {
            return Err(CliError::Usage(format!(
                "{} is there already; --force puts another one in its place",
                there.display()
            )));
        }
        let failed = |path: &Path, source| CliError::node(CertFileError { path: path.to_owned(), source });
        fs::create_dir_all(&self.dir).map_err(|error| failed(&self.dir, error))?;
        for (path, text) in paths.iter().zip([&issued.certificate, &issued.key]) {
            place(path, text).map_err(|error| failed(path, error))?;
        }
        Ok(paths)
    }

    fn write(&self, common: &Common, name: &str, issued: &Issued) -> Result<(), CliError> {
        let [certificate, key] = self.put(name, issued)?;
        match common.output {
            Format::Table => output::line(&format!("{}\n{}", certificate.display(), key.display())),
            Format::Json => output::json(&MadeCertificate { certificate, key }),
        }
    }
}

/// A file that cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}", path.display())]
struct CertFileError {
    path: PathBuf,
    source: io::Error,
}

#[derive(Serialize)]
struct MadeCertificate {
    certificate: PathBuf,
    key: PathBuf,
}

/// A file for its owner alone, whole or not at all: a node may be reading it.
fn place(path: &Path, text: &str) -> io::Result<()> {
    const OWNER: u32 = 0o600;
    let new = path.with_extension(format!("{}.new-{}", std::process::id(), runtime::random_u64()));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(OWNER).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}

fn read(path: &Path) -> Result<String, CliError> {
    let failed = |source| CliError::Input { path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    file.take(MAX_FILE_BYTES).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

/// A certificate, for programs.
#[derive(Serialize)]
struct ShownCertificate<'a> {
    file: &'a Path,
    subject: &'a str,
    issuer: &'a str,
    names: &'a [String],
    authority: bool,
    not_before: i64,
    not_after: i64,
    expires_in_seconds: i64,
}

fn show(common: &Common, files: &[PathBuf]) -> Result<(), CliError> {
    let now_s = i64::try_from(runtime::unix_time_ms() / 1000).unwrap_or(i64::MAX);
    for file in files {
        let wrong = |why: String| CliError::Usage(format!("{}: {why}", file.display()));
        for (facts, names) in shown(&read(file)?).map_err(|error| wrong(error.to_string()))? {
            let CertificateFacts { subject, issuer, not_before_s, not_after_s, is_authority } = &facts;
            match common.output {
                Format::Json => output::json(&ShownCertificate {
                    file,
                    subject,
                    issuer,
                    names: &names,
                    authority: *is_authority,
                    not_before: *not_before_s,
                    not_after: *not_after_s,
                    expires_in_seconds: not_after_s - now_s,
                })?,
                Format::Table => output::line(&in_words(file, &facts, &names, now_s))?,
            }
        }
    }
    Ok(())
}

fn in_words(file: &Path, facts: &CertificateFacts, names: &[String], now_s: i64) -> String {
    const DAY_S: i64 = 24 * 3600;
    let time = |seconds: i64| output::time(u64::try_from(seconds).unwrap_or(0).saturating_mul(1000));
    let left_s = facts.not_after_s - now_s;
    let left = match left_s {
        ..=0 => "expired".to_owned(),
        left => format!("{} days left", left / DAY_S),
    };
    let kind = if facts.is_authority { "authority" } else { "certificate" };
    let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    format!(
        "{}\n  {kind} {}, signed by {}\n  names: {names}\n  valid from {} to {} ({left})",
        file.display(),
        facts.subject,
        facts.issuer,
        time(facts.not_before_s),
        time(facts.not_after_s)
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::cli::{EXIT_INVALID, parse, run as run_cli};

    async fn cert(dir: &Path, args: &[&str]) -> Result<(), CliError> {
        let dir = ["--dir", dir.to_str().unwrap()];
        let args = [&["quorate", "cert"][..], args, &dir].concat();
        run_cli(parse(args).unwrap()).await
    }

    #[tokio::test]
    async fn files_are_their_owners_and_not_written_over() {
        let dir = tempfile::tempdir().unwrap();
        let none = cert(dir.path(), &["node", "1"]).await.unwrap_err();
        assert!(none.to_string().contains("quorate cert ca") && none.exit_code() == EXIT_INVALID, "{none}");
        cert(dir.path(), &["ca"]).await.unwrap();
        cert(dir.path(), &["node", "1", "--cluster", "c", "--host", "a.example"]).await.unwrap();
        cert(dir.path(), &["client", "urn:app:1", "--file-name", "app"]).await.unwrap();
        for name in ["ca.pem", "ca.key", "node-1.pem", "node-1.key", "app.pem", "app.key"] {
            let mode = fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let before = fs::read(dir.path().join("ca.key")).unwrap();
        assert_eq!(cert(dir.path(), &["ca"]).await.unwrap_err().exit_code(), EXIT_INVALID);
        assert_eq!(fs::read(dir.path().join("ca.key")).unwrap(), before);
        cert(dir.path(), &["ca", "--force"]).await.unwrap();
        assert_ne!(fs::read(dir.path().join("ca.key")).unwrap(), before);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 6, "nothing is left over");
        assert!(cert(dir.path(), &["client", "../x"]).await.is_err());
    }

    #[test]
    fn what_is_shown_can_be_read() {
        let made = authority("an authority", 10).unwrap();
        let node = Authority::read(&made.certificate, &made.key).unwrap().node("c", 3, &[], 9).unwrap();
        let (facts, names) = shown(&node.certificate).unwrap().remove(0);
        let text = in_words(Path::new("node-3.pem"), &facts, &names, facts.not_before_s + 2 * 3600);
        assert!(text.contains("CN=quorate node 3, signed by CN=an authority"), "{text}");
        assert!(text.contains("names: node-3.") && text.contains("(8 days left)"), "{text}");
        assert!(in_words(Path::new("x"), &facts, &names, facts.not_after_s).contains("(expired)"));
        assert!(shown("nothing").is_err());
    }
}
