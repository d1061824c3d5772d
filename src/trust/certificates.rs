//! What stands in a certificate: names, and until when it is valid; and the names of members.
//!
//! # Names of members
//!
//! The certificate of a member has the DNS name `node-ID.LABEL.peer.quorate`. `ID` is the node's id, and `LABEL` the first 40
//! hexadecimal digits of the SHA-256 of the cluster's name. The name of a cluster may hold characters that DNS has not, and
//! whoever begins a handshake is shown the certificate: so the name itself does not stand in it.

use std::fmt::Write as _;

use ring::digest;
use rustls::pki_types::CertificateDer;
use webpki::EndEntityCert;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::types::NodeId;

/// What the names of members end in.
pub(crate) const PEER_DOMAIN: &str = ".peer.quorate";
/// Hexadecimal digits of a cluster's label.
const LABEL_DIGITS: usize = 40;

/// A cluster, as it stands in the names of its members.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ClusterLabel(String);

impl ClusterLabel {
    pub(crate) fn of(cluster: &str) -> Self {
        let hash = digest::digest(&digest::SHA256, cluster.as_bytes());
        let mut label = hexadecimal(hash.as_ref());
        label.truncate(LABEL_DIGITS);
        Self(label)
    }

    /// The name of a member.
    pub(crate) fn name_of(&self, node_id: NodeId) -> String {
        format!("node-{node_id}.{}{PEER_DOMAIN}", self.0)
    }

    /// Whose name it is, if it is a member's of this cluster.
    fn node_of(&self, name: &str) -> Option<NodeId> {
        let node = name.strip_suffix(PEER_DOMAIN)?.strip_suffix(self.0.as_str())?.strip_suffix('.')?;
        let node_id = node.strip_prefix("node-")?.parse().ok()?;
        // Written in one way only.
        (self.name_of(node_id) == name).then_some(node_id)
    }

    /// The members of this cluster that `names` are of.
    pub(crate) fn nodes_of<'a>(&'a self, names: &'a [String]) -> impl Iterator<Item = NodeId> + 'a {
        names.iter().filter_map(|name| self.node_of(name))
    }
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("invariant: a String takes all that is written to it");
        text
    })
}

/// The DNS names, in lower case, and the URIs of a certificate.
pub(crate) fn names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(parsed) = EndEntityCert::try_from(certificate) else { return Vec::new() };
    let names = parsed.valid_dns_names().map(str::to_ascii_lowercase);
    names.chain(parsed.valid_uri_names().map(str::to_owned)).collect()
}

/// What a certificate says of itself, for people and for metrics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CertificateFacts {
    /// Whose it is.
    pub(crate) subject: String,
    /// Who signed it.
    pub(crate) issuer: String,
    /// From when on it is valid, in seconds since the Unix epoch.
    pub(crate) not_before_s: i64,
    /// Until when.
    pub(crate) not_after_s: i64,
    /// Whether it may sign others.
    pub(crate) is_authority: bool,
}

/// What stands in a certificate; none if it cannot be read.
pub(crate) fn facts(certificate: &CertificateDer<'_>) -> Option<CertificateFacts> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    Some(CertificateFacts {
        subject: parsed.subject().to_string(),
        issuer: parsed.issuer().to_string(),
        not_before_s: parsed.validity().not_before.timestamp(),
        not_after_s: parsed.validity().not_after.timestamp(),
        is_authority: parsed.is_ca(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_members_name_is_written_in_one_way_and_read_back() {
        let label = ClusterLabel::of("c");
        // printf %s c | sha256sum | cut -c1-40
        assert_eq!(label.name_of(3), "node-3.2e7d2c03a9507ae265ecf5b5356885a53393a202.peer.quorate");
        assert_eq!(label.node_of(&label.name_of(u64::MAX)), Some(u64::MAX));
        let name = label.name_of(3);
        for other in [
            name.replace("node-3", "node-03"),
            name.replace("node-3", "node-+3"),
            name.replace("node-3", "node-"),
            name.replace("node-3", "x.node-3"),
            name.replace(".peer.quorate", ".peer.quorate.example"),
            ClusterLabel::of("d").name_of(3),
            String::new(),
        ] {
            assert_eq!(label.node_of(&other), None, "{other}");
        }
        assert!(label.name_of(u64::MAX).len() < 253);
    }
}
