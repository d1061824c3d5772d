//! Whether a node listens where strangers may be, and lets them do everything.

use super::{ServeConfig, SettingsError, invalid};
use crate::address::Address;
use crate::trust::port::ClientCertificates;
use crate::trust::settings::PeerAuth;

impl ServeConfig {
    /// Whether the other members have to prove who they are.
    fn identifies_peers(&self) -> bool {
        self.peer_trust.auth() == PeerAuth::Required
    }

    /// Whether clients have to. A certificate is enough where every client must show one: whoever has one that is believed may do everything.
    fn identifies_clients(&self) -> bool {
        self.door.auth.is_required()
            || (self.tls.client_ca.is_some() && self.tls.client_auth == ClientCertificates::Required)
    }

    /// Refuses to listen beyond this machine where nobody is asked who it is.
    ///
    /// # Errors
    /// [`SettingsError::Invalid`], saying which port and what to do.
    pub(crate) fn check_exposure(&self) -> Result<(), SettingsError> {
        if self.insecure {
            return Ok(());
        }
        let (is_replica, asks) = (self.translation.replica.is_some(), self.identifies_clients());
        let frames = self.frames_listen.as_deref().unwrap_or_default();
        let clients = "name a file of tokens with --tokens-file, or have clients show certificates with --tls-client-ca and --tls-client-auth required";
        for (flag, address, is_asked, remedy) in [
            ("--client-listen", self.client_listen.as_str(), asks, clients),
            ("--frames-listen", frames, asks, clients),
            (
                "--peer-listen",
                if is_replica { "" } else { &self.peer_listen },
                self.identifies_peers(),
                "give the members a secret or certificates with --peer-secret-file or --peer-ca",
            ),
        ] {
            if !is_asked && is_exposed(address) {
                return Err(invalid(format!(
                    "{flag} {address} can be reached from other machines, and whoever reaches it may do everything: {remedy}, or, on a network that only those can use who may, say --insecure"
                )));
            }
        }
        Ok(())
    }
}

/// Whether others than this machine may reach `address`.
fn is_exposed(address: &str) -> bool {
    let is_loopback = |address: Address<'_>| match address.ip {
        Some(ip) => ip.to_canonical().is_loopback(),
        None => address.host.eq_ignore_ascii_case("localhost"),
    };
    !address.is_empty() && !Address::parse(address).is_some_and(is_loopback)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::trust::settings::PeerTrust;

    #[test]
    fn only_loopback_addresses_are_no_exposure() {
        for address in ["127.0.0.1:1", "127.9.9.9:1", "[::1]:0", "localhost:1", "[::ffff:127.0.0.1]:1", ""] {
            assert!(!is_exposed(address), "{address}");
        }
        for address in ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "node1:1", "localhost.example.com:1"] {
            assert!(is_exposed(address), "{address}");
        }
    }

    #[test]
    fn a_port_that_strangers_reach_asks_who_calls_or_is_said_to_be_insecure() {
        let mut config = ServeConfig::default();
        assert!(config.check_exposure().is_ok(), "it listens on loopback by default");
        config.client_listen = "0.0.0.0:7801".to_owned();
        let refused = |config: &ServeConfig| config.check_exposure().unwrap_err().to_string();
        for part in ["--client-listen 0.0.0.0:7801", "--tokens-file", "--insecure"] {
            assert!(refused(&config).contains(part), "{}", refused(&config));
        }
        config.door.auth.tokens_file = Some(PathBuf::from("tokens.toml"));
        assert!(config.check_exposure().is_ok());
        config.frames_listen = Some("10.0.0.1:7811".to_owned());
        assert!(config.check_exposure().is_ok());
        config.peer_listen = "10.0.0.1:7901".to_owned();
        for part in ["--peer-listen", "--peer-secret-file", "--peer-ca", "--insecure"] {
            assert!(refused(&config).contains(part), "{}", refused(&config));
        }
        let mut known = config.clone();
        known.peer_trust = PeerTrust::secret_file("secret");
        assert!(known.check_exposure().is_ok());
        known.peer_trust.auth = Some(PeerAuth::Optional);
        assert!(refused(&known).contains("--peer-listen"), "whoever does not prove it is let in, too");
        config.insecure = true;
        assert!(config.check_exposure().is_ok());
        let mut certified =
            ServeConfig { client_listen: "0.0.0.0:7801".to_owned(), ..ServeConfig::default() };
        certified.tls.client_ca = Some(PathBuf::from("ca.pem"));
        assert!(refused(&certified).contains("--tls-client-auth required"));
        certified.tls.client_auth = ClientCertificates::Required;
        assert!(certified.check_exposure().is_ok());
        let frames = Some("10.0.0.1:7811".to_owned());
        let config = ServeConfig { frames_listen: frames, ..ServeConfig::default() };
        assert!(refused(&config).contains("--frames-listen"));
    }
}
