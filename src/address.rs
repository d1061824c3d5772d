//! Addresses as people write them, `HOST:PORT`: what cannot be one is refused before anybody is told of it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6};

/// What an address can be, for messages.
pub(crate) const FORM: &str =
    "of the form HOST:PORT, such as 10.0.0.1:7801, [fd00::1]:7801 or node1.example.com:7801";

/// Longest name of a host.
const MAX_NAME_BYTES: usize = 253;
/// Longest part of one.
const MAX_LABEL_BYTES: usize = 63;

/// An address that can be one. Whether anybody answers there is another question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address<'a> {
    /// As it was written; an IPv6 address has brackets.
    pub(crate) host: &'a str,
    /// The same as a number, unless it is a name.
    pub(crate) ip: Option<IpAddr>,
    pub(crate) port: u16,
}

/// Why nobody can listen on a host, or connect to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotOneHost {
    #[error("a multicast address stands for a group of hosts")]
    Multicast,
    #[error("a broadcast address stands for all hosts of a network")]
    Broadcast,
}

impl<'a> Address<'a> {
    /// Reads `text`; `None` when that is not [of the form](FORM).
    pub(crate) fn parse(text: &'a str) -> Option<Self> {
        let (host, port) = text.rsplit_once(':')?;
        let is_number = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port.parse().ok().filter(|_| is_number)?;
        if host.starts_with('[') {
            let address: SocketAddrV6 = text.parse().ok()?;
            return Some(Self { host, ip: Some(IpAddr::V6(*address.ip())), port });
        }
        let ip = host.parse::<Ipv4Addr>().ok().map(IpAddr::V4);
        (ip.is_some() || is_name(host)).then_some(Self { host, ip, port })
    }

    /// Refuses addresses that are no single host's.
    pub(crate) fn check_host(&self) -> Result<(), NotOneHost> {
        match self.ip {
            Some(ip) if ip.is_multicast() => Err(NotOneHost::Multicast),
            Some(IpAddr::V4(Ipv4Addr::BROADCAST)) => Err(NotOneHost::Broadcast),
            _ => Ok(()),
        }
    }

    /// Whether it stands for all addresses of a host, or for none: others cannot connect to it.
    pub(crate) fn is_unspecified(&self) -> bool {
        match self.ip {
            Some(IpAddr::V4(ip)) => ip.octets()[0] == 0,
            Some(IpAddr::V6(ip)) => ip == Ipv6Addr::UNSPECIFIED,
            None => false,
        }
    }
}

/// Names of hosts, and of containers, which have underscores too. One that ends in a number would be an address.
fn is_name(host: &str) -> bool {
    let is_label = |label: &str| {
        (1..=MAX_LABEL_BYTES).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
    };
    let labels = host.strip_suffix('.').unwrap_or(host);
    let last = labels.rsplit('.').next().unwrap_or_default();
    host.len() <= MAX_NAME_BYTES
        && labels.split('.').all(is_label)
        && !last.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_an_address_is_told_from_what_cannot() {
        for good in [
            "10.0.0.1:7801",
            "localhost:0",
            "node-1.example.com:65535",
            "node1.example.com.:1",
            "quorate_node_1:7801",
            "[::1]:7801",
            "[fe80::1%2]:7801",
            "n:1",
            "4ever.example:1",
        ] {
            assert!(Address::parse(good).is_some(), "{good}");
        }
        let long = format!("{}:1", "a".repeat(300));
        let label = format!("{}.example:1", "a".repeat(64));
        for bad in [
            "",
            ":1",
            "a:",
            "a",
            "a:b",
            "a:+1",
            "a:65536",
            " 127.0.0.1:1",
            "127.0.0.1 :1",
            "127.0.0.1:1 ",
            "*:1",
            "a b:1",
            "host\nname:1",
            "a/b:1",
            "http://a:1",
            "a..b:1",
            ".a:1",
            "::1:7801",
            "[::1:7801",
            "[::1]",
            "[a]:1",
            "[10.0.0.1]:1",
            "1.2.3:1",
            "256.0.0.1:1",
            "1.2.3.4.5:1",
            "7801:1",
            "nöd:1",
            "a,b:1",
            &long,
            &label,
        ] {
            assert_eq!(Address::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn groups_of_hosts_and_no_host_are_told_apart() {
        let check = |text| Address::parse(text).unwrap().check_host();
        assert_eq!(check("224.0.0.1:1"), Err(NotOneHost::Multicast));
        assert_eq!(check("[ff02::1]:1"), Err(NotOneHost::Multicast));
        assert_eq!(check("255.255.255.255:1"), Err(NotOneHost::Broadcast));
        assert_eq!(check("10.0.0.255:1"), Ok(()), "it depends on the network");
        for (text, unspecified) in
            [("0.0.0.0:1", true), ("0.1.2.3:1", true), ("[::]:1", true), ("[::1]:1", false), ("a:1", false)]
        {
            assert_eq!(Address::parse(text).unwrap().is_unspecified(), unspecified, "{text}");
        }
    }
}
