//! The founding members as they are written: `1=a:7901,2=b:7901` in a flag, the environment or a file, or a
//! table from id to address in a file.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

use crate::shown::Shown;
use crate::types::NodeId;

/// Peer addresses by node id.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Peers(pub BTreeMap<NodeId, String>);

/// A list of peers that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidPeers {
    /// An element is not `ID=HOST:PORT`.
    #[error("\"{}\" is not of the form ID=HOST:PORT, such as 1=10.0.0.1:7901", Shown(.0))]
    Element(String),
    /// An id occurs twice.
    #[error("node {0} is named twice")]
    Duplicate(NodeId),
}

impl Peers {
    fn add(&mut self, id: &str, address: &str) -> Result<(), InvalidPeers> {
        let malformed = || InvalidPeers::Element(format!("{id}={address}"));
        let id: NodeId = id.trim().parse().map_err(|_| malformed())?;
        let address = address.trim();
        if address.is_empty() {
            return Err(malformed());
        }
        match self.0.insert(id, address.to_owned()) {
            None => Ok(()),
            Some(_) => Err(InvalidPeers::Duplicate(id)),
        }
    }
}

impl fmt::Display for Peers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (id, address)) in self.0.iter().enumerate() {
            let separator = if place == 0 { "" } else { "," };
            write!(f, "{separator}{id}={address}")?;
        }
        Ok(())
    }
}

impl FromStr for Peers {
    type Err = InvalidPeers;

    fn from_str(text: &str) -> Result<Self, InvalidPeers> {
        let mut peers = Self::default();
        for element in text.split(',') {
            let (id, address) =
                element.split_once('=').ok_or_else(|| InvalidPeers::Element(element.to_owned()))?;
            peers.add(id, address)?;
        }
        Ok(peers)
    }
}

impl<'de> Deserialize<'de> for Peers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(PeersVisitor)
    }
}

struct PeersVisitor;

impl<'de> Visitor<'de> for PeersVisitor {
    type Value = Peers;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table from node id to address, or a list such as \"1=a:7901,2=b:7901\"")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Peers, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Peers, A::Error> {
        let mut peers = Peers::default();
        while let Some((id, address)) = map.next_entry::<String, String>()? {
            peers.add(&id, &address).map_err(de::Error::custom)?;
        }
        Ok(peers)
    }
}
