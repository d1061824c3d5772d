//! Settings from a file.

use std::io::Read;
use std::path::Path;

use super::{GivenReplication, GivenSettings, SettingsError};

/// Most bytes of a configuration file. Some files have no end.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

impl GivenSettings {
    /// What the file at `path` says, if there is one.
    pub(super) fn of(path: Option<&Path>) -> Result<Self, SettingsError> {
        path.map_or_else(|| Ok(Self::default()), Self::from_file)
    }

    /// What is given by the names of others, in the environment or else here.
    pub(super) fn others_names(&mut self) -> Result<GivenReplication, SettingsError> {
        let file = self.replication.take().unwrap_or_default();
        Ok(GivenReplication::from_environment(|name| std::env::var_os(name))?.or(file))
    }

    /// Reads `path`.
    ///
    /// # Errors
    /// [`SettingsError::Read`], [`SettingsError::UnknownFormat`] or [`SettingsError::Parse`].
    pub fn from_file(path: &Path) -> Result<Self, SettingsError> {
        let failed = |source| SettingsError::Read { path: path.to_owned(), source };
        let mut text = String::new();
        let file = std::fs::File::open(path).map_err(failed)?;
        file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > MAX_FILE_BYTES {
            let detail = format!("it has more than {MAX_FILE_BYTES} bytes: is it the right file?");
            return Err(SettingsError::Parse { path: path.to_owned(), detail });
        }
        Self::parse(path, &text)
    }

    /// What `text` says, in the form that the name of its file tells.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, SettingsError> {
        // The words of an error show the line, which may hold a secret.
        let is_shown = !text.contains("secret");
        let parsed = match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") if is_shown => toml::from_str(text).map_err(|error| error.to_string()),
            Some("toml") => toml::from_str(text).map_err(|error| toml_words(text, &error)),
            // A file of comments only has no document to parse.
            Some("yaml" | "yml") if is_blank_yaml(text) => Ok(Self::default()),
            Some("yaml" | "yml") if is_shown => {
                serde_saphyr::from_str(text).map_err(|error| error.to_string())
            }
            Some("yaml" | "yml") => {
                serde_saphyr::from_str(text).map_err(|error| error.without_snippet().to_string())
            }
            _ => return Err(SettingsError::UnknownFormat { path: path.to_owned() }),
        };
        parsed.map_err(|detail| SettingsError::Parse { path: path.to_owned(), detail })
    }
}

fn is_blank_yaml(text: &str) -> bool {
    text.lines().map(str::trim).all(|line| line.is_empty() || line.starts_with('#') || line == "---")
}

/// What is wrong, and in which line.
fn toml_words(text: &str, error: &toml::de::Error) -> String {
    let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
    format!("line {line}: {}", error.message())
}
