//! Certificates are made: of an authority, and by it of nodes and of clients.
//!
//! For those who have no authority of their own. Keys are ECDSA on P-256, and each is made here and never leaves but into the file that it is
//! for. There is no list of what was issued and none of what is revoked: what must not be believed any more is replaced together
//! with its authority (`docs/OPERATIONS.md`).

use std::net::IpAddr;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose as Usage, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, DnsName};

use super::certificates::{CertificateFacts, ClusterLabel, PEER_DOMAIN, facts, names};
use crate::runtime;
use crate::types::NodeId;

/// A certificate is valid from a little before it was made: clocks differ.
const BACKDATED: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// The longest that a certificate can be made for, in days: a hundred years.
pub(crate) const MOST_DAYS: u32 = 36_500;

/// Why a certificate cannot be made. Every message says what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IssueError {
    /// What it is to be made of cannot be used.
    #[error("{0}")]
    Wrong(String),
    /// It cannot be made.
    #[error("the certificate cannot be made: {0}")]
    Failed(#[from] rcgen::Error),
}

/// A certificate and its key, as PEM files hold them.
pub(crate) struct Issued {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// What signs certificates.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    expires_s: i64,
}

/// A new authority called `name`.
pub(crate) fn authority(name: &str, days: u32) -> Result<Issued, IssueError> {
    let mut params = params(name, Vec::new(), days)?;
    // It signs certificates of nodes and clients, and no other authority.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    Ok(Issued { certificate: params.self_signed(&key)?.pem(), key: key.serialize_pem() })
}

impl Authority {
    /// The one in two PEM files.
    pub(crate) fn read(certificate: &str, key: &str) -> Result<Self, IssueError> {
        let wrong = |why: &str| IssueError::Wrong(why.to_owned());
        let der = CertificateDer::from_pem_slice(certificate.as_bytes())
            .map_err(|_| wrong("no certificate is in the authority's file"))?;
        let said = facts(&der).ok_or_else(|| wrong("the authority's certificate cannot be read"))?;
        if !said.is_authority {
            return Err(wrong(
                "the certificate is no authority's; name the one that `quorate cert ca` has made",
            ));
        }
        let key = KeyPair::from_pem(key).map_err(|_| wrong("no key is in the authority's key file"))?;
        let spki = |der: &CertificateDer<'_>| {
            let parsed = rustls::server::ParsedCertificate::try_from(der).ok()?;
            Some(parsed.subject_public_key_info().as_ref().to_vec())
        };
        let own = rcgen::PublicKeyData::subject_public_key_info(&key);
        if spki(&der).is_some_and(|spki| spki != own) {
            return Err(wrong("the authority's key is not that of its certificate"));
        }
        Ok(Self { issuer: Issuer::from_ca_cert_der(&der, key)?, expires_s: said.not_after_s })
    }

    /// The certificate of node `node_id` of `cluster`, at its peer port and, by the names and addresses `hosts`, at its client port.
    pub(crate) fn node(
        &self,
        cluster: &str,
        node_id: NodeId,
        hosts: &[String],
        days: u32,
    ) -> Result<Issued, IssueError> {
        let mut names = vec![dns(&ClusterLabel::of(cluster).name_of(node_id))?];
        for host in hosts {
            names.push(match host.trim_matches(['[', ']']).parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) if host.to_ascii_lowercase().ends_with(PEER_DOMAIN) => {
                    return Err(IssueError::Wrong(format!(
                        "{host} is the name of a member and no host's; leave it out"
                    )));
                }
                Err(_) => dns(host)?,
            });
        }
        let params = params(&format!("quorate node {node_id}"), names, days)?;
        self.sign(params, &[Usage::ServerAuth, Usage::ClientAuth])
    }

    /// The certificate of a client with a name: a DNS name, a single word, or a URI.
    pub(crate) fn client(&self, name: &str, days: u32) -> Result<Issued, IssueError> {
        let is_uri = name.contains(':');
        let lower = name.to_ascii_lowercase();
        if lower.ends_with(PEER_DOMAIN) || lower.ends_with(PEER_DOMAIN.trim_start_matches('.')) {
            return Err(IssueError::Wrong(format!(
                "a client must not be called {name}: names that end in {PEER_DOMAIN} are those of members"
            )));
        }
        let san = match is_uri {
            true => SanType::URI(name.try_into().map_err(|_| unusable(name))?),
            false => dns(&lower)?,
        };
        self.sign(params(name, vec![san], days)?, &[Usage::ClientAuth])
    }

    fn sign(&self, mut params: CertificateParams, usages: &[Usage]) -> Result<Issued, IssueError> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages.to_vec();
        params.use_authority_key_identifier_extension = true;
        if params.not_after.unix_timestamp() > self.expires_s {
            return Err(IssueError::Wrong(
                "the certificate would be valid for longer than its authority; give fewer --days, or make a new authority"
                    .to_owned(),
            ));
        }
        let key = KeyPair::generate()?;
        Ok(Issued { certificate: params.signed_by(&key, &self.issuer)?.pem(), key: key.serialize_pem() })
    }
}

/// What stands in the certificates of a PEM file, and their names.
pub(crate) fn shown(text: &str) -> Result<Vec<(CertificateFacts, Vec<String>)>, IssueError> {
    let parsed: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let parsed = parsed.map_err(|error| IssueError::Wrong(format!("it is no PEM file: {error}")))?;
    if parsed.is_empty() {
        return Err(IssueError::Wrong("no certificate is in it".to_owned()));
    }
    let unread = || IssueError::Wrong("a certificate in it cannot be read".to_owned());
    parsed.iter().map(|der| Ok((facts(der).ok_or_else(unread)?, names(der)))).collect()
}

fn unusable(name: &str) -> IssueError {
    IssueError::Wrong(format!(
        "\"{}\" is no name that a certificate can hold; use letters, digits, dots and hyphens, or a URI",
        name.escape_debug()
    ))
}

fn dns(name: &str) -> Result<SanType, IssueError> {
    if DnsName::try_from(name).is_err() || name.contains('*') {
        return Err(unusable(name));
    }
    Ok(SanType::DnsName(name.try_into().map_err(|_| unusable(name))?))
}

fn params(name: &str, names: Vec<SanType>, days: u32) -> Result<CertificateParams, IssueError> {
    if !(1..=MOST_DAYS).contains(&days) {
        return Err(IssueError::Wrong(format!(
            "a certificate is valid for 1 to {MOST_DAYS} days, and not {days}"
        )));
    }
    let mut params = CertificateParams::default();
    params.subject_alt_names = names;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    let now = date_time_ymd(1970, 1, 1) + Duration::from_millis(runtime::unix_time_ms());
    params.not_before = now - BACKDATED;
    params.not_after = now + DAY * days;
    Ok(params)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::trust) fn read(issued: &Issued) -> Authority {
        Authority::read(&issued.certificate, &issued.key).unwrap()
    }

    fn der(issued: &Issued) -> CertificateDer<'static> {
        CertificateDer::from_pem_slice(issued.certificate.as_bytes()).unwrap()
    }

    #[test]
    fn a_nodes_certificate_names_it_and_its_hosts() {
        let made = authority("an authority", 10).unwrap();
        let hosts = ["node-1.example", "10.0.0.1", "[::1]"].map(str::to_owned);
        let node = read(&made).node("c", 3, &hosts, 10).unwrap();
        assert_eq!(names(&der(&node)), [ClusterLabel::of("c").name_of(3), "node-1.example".to_owned()]);
        let said = facts(&der(&node)).unwrap();
        assert_eq!((said.subject.as_str(), said.is_authority), ("CN=quorate node 3", false));
        assert_eq!(said.issuer, "CN=an authority");
        assert_eq!((said.not_after_s - said.not_before_s) / 3600, 10 * 24 + 1);
    }

    #[test]
    fn what_must_not_be_made_is_refused() {
        let made = authority("an authority", 10).unwrap();
        let ours = read(&made);
        let member = ClusterLabel::of("c").name_of(1);
        for name in [member.as_str(), &member.to_uppercase(), "peer.quorate", "", "a b", "*.example"] {
            assert!(matches!(ours.client(name, 1), Err(IssueError::Wrong(_))), "{name}");
        }
        assert!(
            ours.node("c", 1, &[ClusterLabel::of("d").name_of(2)], 1).is_err(),
            "a member of another cluster"
        );
        assert!(ours.client("app", 11).is_err(), "longer than its authority");
        assert!(ours.client("app", 0).is_err());
        let node = ours.node("c", 1, &[], 1).unwrap();
        assert!(Authority::read(&node.certificate, &node.key).is_err(), "no authority");
        assert!(Authority::read(&made.certificate, &node.key).is_err(), "another key");
        for name in ["app", "billing.example", "urn:quorate:billing"] {
            assert_eq!(names(&der(&ours.client(name, 1).unwrap())), [name]);
        }
    }
}
