//! What every reading command can be told: how fresh, and from which node.

use clap::Args;

use crate::duration;
use crate::kv::client::{Client, Endpoint, ReadPreference};
use crate::types::{Bookmark, ReadLevel, ReadOptions};

/// How fresh a read must be, and which node answers it.
#[derive(Debug, Clone, Args)]
pub struct ReadArgs {
    /// How fresh: linearizable; lease: the same from the leader alone; bounded:TIME: at most so old, a bare number
    /// being milliseconds; or local: whatever the node has applied
    #[arg(long, value_name = "LEVEL", value_parser = parse_level, default_value = "linearizable")]
    pub level: ReadLevel,
    /// Short for --level local
    #[arg(long, conflicts_with = "level")]
    pub local: bool,
    /// Which node is asked first: leader, any, round-robin, nearest, or weighted:HOST:PORT=N,...
    #[arg(long, value_name = "WHICH", value_parser = parse_preference)]
    pub prefer: Option<ReadPreference>,
    /// Wait until the node has applied the entry at this index: the revision of a write, to read it anywhere. Of another
    /// cluster's history, it is refused
    #[arg(long, value_name = "INDEX[@HISTORY]", default_value_t, hide_default_value = true)]
    pub after: Bookmark,
}

impl ReadArgs {
    pub(super) fn options(&self) -> ReadOptions {
        let level = if self.local { ReadLevel::Local } else { self.level };
        ReadOptions::from(level).after(self.after)
    }

    /// The client with the preference, if one was given.
    pub(super) async fn prefer(&self, client: &Client) -> Client {
        match &self.prefer {
            Some(preference) => {
                if *preference == ReadPreference::Nearest {
                    // Nobody has measured yet who is nearest.
                    client.status_all().await;
                }
                client.preferring(preference.clone())
            }
            None => client.clone(),
        }
    }
}

pub(super) fn parse_level(text: &str) -> Result<ReadLevel, String> {
    match text {
        "linearizable" => Ok(ReadLevel::Linearizable),
        "lease" => Ok(ReadLevel::Lease),
        "local" => Ok(ReadLevel::Local),
        _ => {
            match text.strip_prefix("bounded:").map(duration::parse_ms) {
                Some(Ok(max_lag_ms)) => Ok(ReadLevel::Bounded { max_lag_ms }),
                _ => Err("write linearizable, lease, local, or bounded: and a time, such as bounded:500ms"
                    .to_owned()),
            }
        }
    }
}

/// Revisions are counted from 1.
pub(super) fn parse_revision(text: &str) -> Result<Bookmark, String> {
    match text.parse::<Bookmark>() {
        Ok(Bookmark { index: 0, .. }) => Err("revisions are counted from 1".to_owned()),
        parsed => parsed.map_err(|error| error.to_string()),
    }
}

fn parse_preference(text: &str) -> Result<ReadPreference, String> {
    match text {
        "leader" => Ok(ReadPreference::Leader),
        "any" => Ok(ReadPreference::Any),
        "round-robin" => Ok(ReadPreference::RoundRobin),
        "nearest" => Ok(ReadPreference::Nearest),
        _ => match text.strip_prefix("weighted:") {
            Some(weights) => weights
                .split(',')
                .map(parse_weight)
                .collect::<Result<Vec<_>, _>>()
                .map(ReadPreference::weighted),
            None => Err("write leader, any, round-robin, nearest, or weighted:HOST:PORT=N,...".to_owned()),
        },
    }
}

fn parse_weight(text: &str) -> Result<(Endpoint, u32), String> {
    let (endpoint, weight) = text.rsplit_once('=').ok_or("write a weight as HOST:PORT=N")?;
    let weight = weight.parse().map_err(|_| "a weight must be a whole number".to_owned())?;
    Ok((Endpoint::parse(endpoint).map_err(|error| error.to_string())?, weight))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_preferences_are_read_or_refused() {
        assert_eq!(parse_level("bounded:250"), Ok(ReadLevel::Bounded { max_lag_ms: 250 }));
        assert_eq!(parse_level("bounded:1m30s"), Ok(ReadLevel::Bounded { max_lag_ms: 90_000 }));
        assert_eq!(parse_level("lease"), Ok(ReadLevel::Lease));
        for text in ["", "bounded", "bounded:", "bounded:soon", "strong"] {
            assert!(parse_level(text).is_err(), "{text}");
        }
        let endpoint = |text| Endpoint::parse(text).unwrap();
        let weights = ReadPreference::weighted([(endpoint("a:1"), 2), (endpoint("[::1]:2"), 0)]);
        assert_eq!(parse_preference("weighted:a:1=2,[::1]:2=0"), Ok(weights));
        for text in ["", "closest", "weighted:", "weighted:a:1", "weighted:a=1", "weighted:a:1=-1"] {
            assert!(parse_preference(text).is_err(), "{text}");
        }
    }
}
