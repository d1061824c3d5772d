//! The settings of TLS at the ports that clients use.

use std::path::PathBuf;

use super::{SettingsError, invalid};
use crate::trust::port::{ClientCertificates, PortTls};

/// What is set of it, which may not be all that is needed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct TlsSettings {
    /// The node's certificate, and its chain.
    pub certificate: Option<PathBuf>,
    /// The key of that.
    pub key: Option<PathBuf>,
    /// The authorities whose certificates are believed of clients.
    pub client_ca: Option<PathBuf>,
    /// Whether clients must show one.
    pub client_auth: ClientCertificates,
}

impl TlsSettings {
    /// What the ports are to be secured by; none if they are plain.
    ///
    /// # Errors
    /// [`SettingsError::Invalid`] when a part is missing.
    pub(crate) fn resolve(&self) -> Result<Option<PortTls>, SettingsError> {
        let Self { certificate, key, client_ca, client_auth } = self;
        match (certificate, key) {
            (Some(certificate), Some(key)) => {
                let mut tls = PortTls::new(certificate, key);
                (tls.client_ca, tls.client_auth) = (client_ca.clone(), *client_auth);
                if *client_auth == ClientCertificates::Required && client_ca.is_none() {
                    return Err(invalid(
                        "--tls-client-auth required needs --tls-client-ca: name the authorities whose certificates are believed",
                    ));
                }
                Ok(Some(tls))
            }
            (None, None) if client_ca.is_none() && *client_auth == ClientCertificates::Optional => Ok(None),
            (None, None) => Err(invalid(
                "--tls-client-ca and --tls-client-auth are for a port that speaks TLS; give --tls-cert and --tls-key, too",
            )),
            (Some(_), None) => Err(invalid("--tls-cert needs its key; give --tls-key, too")),
            (None, Some(_)) => Err(invalid("--tls-key is the key of a certificate; give --tls-cert, too")),
        }
    }
}
