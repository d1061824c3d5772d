//! Where to begin: the addresses of nodes, and why a client cannot be made of what it was given.

use std::fmt;
use std::sync::Arc;

use tonic::codegen::http::Uri;

use crate::shown::Shown;
use crate::trust::TrustError;

/// The longest name there is in DNS, and a little.
const MAX_HOST_BYTES: usize = 255;

/// Why a client could not be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// No endpoint was given.
    #[error("no endpoint was given")]
    NoEndpoints,
    /// An endpoint cannot be read.
    #[error("invalid endpoint \"{}\": {detail}", Shown(.endpoint))]
    Endpoint {
        /// What was given.
        endpoint: String,
        /// What is wrong with it.
        detail: &'static str,
    },
    /// A setting is out of its range.
    #[error("invalid client setting {setting}: {rule}")]
    Setting {
        /// Its name in [`ClientConfig`](super::ClientConfig).
        setting: &'static str,
        /// The rule that it breaks.
        rule: &'static str,
    },
    /// TLS cannot be used.
    #[error(transparent)]
    Tls(#[from] TrustError),
}

/// Where a node's client port is reached: `host:port`, with a DNS name or an address. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint(Arc<str>);

impl Endpoint {
    /// Reads `host:port` or `http://host:port`.
    ///
    /// # Errors
    /// [`ConfigError::Endpoint`] says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let refuse = |detail| Err(ConfigError::Endpoint { endpoint: text.to_owned(), detail });
        let trimmed = text.trim();
        if trimmed.starts_with("https://") {
            return refuse("write host:port, and say whom to believe: --tls-ca, or ClientConfig::tls");
        }
        let address = trimmed.strip_prefix("http://").unwrap_or(trimmed);
        let address = address.strip_suffix('/').unwrap_or(address);
        let Some((host, port)) = address.rsplit_once(':') else {
            return refuse("the port is missing; write host:port");
        };
        if host.is_empty() {
            return refuse("the host is missing; write host:port");
        }
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            return refuse("write an IPv6 address in brackets: [::1]:7801");
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '[' | ']' | ':');
        if !host.chars().all(plain) {
            return refuse("the host holds a character that no host name or address has");
        }
        if host.len() > MAX_HOST_BYTES {
            return refuse("the host is longer than any name, of which 255 bytes are the most");
        }
        if !matches!(port.parse::<u16>(), Ok(1..)) {
            return refuse("the port must be a number from 1 to 65535");
        }
        match Uri::try_from(format!("http://{address}")) {
            Ok(_) => Ok(Self(address.into())),
            Err(_) => refuse("no host has such a name or address"),
        }
    }

    /// `host:port`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_normalised_or_refused() {
        for (text, expected) in [
            ("127.0.0.1:7801", "127.0.0.1:7801"),
            (" http://node-1.example:80/ ", "node-1.example:80"),
            ("[::1]:7801", "[::1]:7801"),
        ] {
            assert_eq!(Endpoint::parse(text).unwrap().as_str(), expected);
        }
        for text in
            ["", "localhost", ":7801", "a:0", "a:70000", "a:b", "::1:7801", "https://a:1", "a b:1", "u@h:1"]
        {
            assert!(Endpoint::parse(text).is_err(), "{text}");
        }
    }

    /// The transport is made of it without asking again.
    #[test]
    fn what_makes_no_address_is_refused_and_not_repeated_at_length() {
        let config = crate::client::ClientConfig::default();
        let long = |count: usize| format!("{}:7801", "a".repeat(count));
        let texts = [
            "a]:1",
            "]:1",
            "[:1",
            "[]:1",
            "[a:1",
            "[a]:1",
            "[::1]]:1",
            "[[::1]]:1",
            "..:1",
            "-:1",
            "[::1]:+1",
        ];
        let texts = texts.map(str::to_owned).into_iter().chain([255, 256, 65_534, 65_536, 1 << 20].map(long));
        for text in texts {
            match Endpoint::parse(&text) {
                Ok(endpoint) => drop(crate::client::node::Node::new(endpoint, true, &config)),
                Err(error) => assert!(error.to_string().len() < 256, "{error}"),
            }
        }
        assert!(Endpoint::parse(&long(255)).is_ok() && Endpoint::parse(&long(256)).is_err());
    }
}
