//! `POST /replication/configure`: settings of the running node by their own names, and what users of other systems ask for there.
//!
//! | name | of a member | of a replica |
//! |---|---|---|
//! | `role: master` | it is handed the lead | refused: it has no vote |
//! | `role: replica` | nothing, if it follows; refused of the leader | nothing |
//! | `role: standalone` | nothing, if it is alone; else refused | refused |
//! | `master_address` | nothing, if that is who leads; else refused | it follows this from now on |
//! | `heartbeat_interval` (s) | refused: those who follow say it | how often its source says that it is there |
//! | `log_size` | `event_log_operations` | the same |
//! | `bind_address` | nothing, if it listens there; else refused: a restart changes it | the same |
//!
//! All that is asked for is done or nothing, so `success` means what it says. What cannot be done of this node, or not while it runs, is a
//! conflict (409) and not a fault of the request (400).

use std::time::Duration;

use serde_json::Value;

use super::operated::{FollowedSources, OperatedNode};
use super::settings::{GivenMembers, LOG_LEVEL, NodeSettings, NotChanged, Refused, STATE_QUOTA, live};
use crate::engine::Settings;
use crate::error::TransferError;
use crate::shown::Shown;
use crate::types::Role;

const EXAMPLE: &str = "send an object such as {\"snapshot_every_entries\": 100000}";

/// Longest time, in seconds, between two signs of life of a source.
const MAX_HEARTBEAT_SECS: u64 = 3600;
/// Most sources of a replica.
const MAX_SOURCES: usize = 64;

/// Why a request was not carried out. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub(super) enum NotConfigured {
    /// It makes no sense.
    #[error(transparent)]
    Invalid(Refused),
    /// It makes sense, but not of this node, or not while it runs.
    #[error(transparent)]
    NotHere(Refused),
    #[error(transparent)]
    Settings(NotChanged),
    #[error(transparent)]
    Lead(#[from] TransferError),
}

impl From<NotChanged> for NotConfigured {
    fn from(error: NotChanged) -> Self {
        match error {
            NotChanged::Refused(refused) => Self::Invalid(refused),
            error @ NotChanged::Quota(_) => Self::Settings(error),
        }
    }
}

fn invalid(error: impl Into<String>, hint: impl Into<String>) -> NotConfigured {
    NotConfigured::Invalid(Refused::new(error, hint))
}

fn not_here(error: impl Into<String>, hint: impl Into<String>) -> NotConfigured {
    NotConfigured::NotHere(Refused::new(error, hint))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AskedRole {
    Master,
    Replica,
    Standalone,
}

/// What is asked for, taken apart.
#[derive(Debug, Default, PartialEq)]
pub(super) struct AskedChange {
    role: Option<AskedRole>,
    bind_address: Option<String>,
    sources: Option<Vec<String>>,
    heartbeat: Option<Duration>,
    /// Settings by their own names; `log_size` is among them.
    own: Vec<(String, String)>,
}

impl AskedChange {
    /// `fixed` are settings that only a restart changes.
    pub(super) fn read(body: &[u8], fixed: &[(&'static str, Value)]) -> Result<Self, NotConfigured> {
        let GivenMembers(members) = serde_json::from_slice(body)
            .map_err(|error| invalid(format!("the body is not a JSON object: {error}"), EXAMPLE))?;
        let mut asked = Self::default();
        let mut seen: Vec<String> = Vec::new();
        for (name, value) in members {
            if seen.contains(&name) {
                return Err(invalid(format!("{} is given twice", Shown(&name)), "give it once"));
            }
            let text = match &value {
                Value::Null | Value::Array(_) | Value::Object(_) => None,
                Value::String(text) => Some(text.clone()),
                other => Some(other.to_string()),
            };
            asked.take(&name, text, fixed)?;
            seen.push(name);
        }
        Ok(asked)
    }

    fn take(
        &mut self,
        name: &str,
        text: Option<String>,
        fixed: &[(&'static str, Value)],
    ) -> Result<(), NotConfigured> {
        let is_known = [
            "role",
            "bind_address",
            "master_address",
            "heartbeat_interval",
            "log_size",
            LOG_LEVEL,
            STATE_QUOTA,
        ]
        .contains(&name);
        let Some(text) = text else {
            if !is_known {
                // Of what is no setting at all this is said first.
                live(name, fixed).map_err(NotConfigured::Invalid)?;
            }
            return Err(invalid(format!("{name} must be a number, true, false or a string"), EXAMPLE));
        };
        match name {
            "role" => self.role = Some(role(&text)?),
            "bind_address" => self.bind_address = Some(text),
            "master_address" => {
                let sources: Vec<_> = text.split(',').map(|source| source.trim().to_owned()).collect();
                if sources.len() > MAX_SOURCES {
                    return Err(invalid(
                        format!("master_address has {} addresses", sources.len()),
                        format!("give {MAX_SOURCES} at most: others are found through them"),
                    ));
                }
                self.sources = Some(sources);
            }
            "heartbeat_interval" => {
                let seconds = text.parse().ok().filter(|secs| (1..=MAX_HEARTBEAT_SECS).contains(secs));
                let seconds = seconds.ok_or_else(|| {
                    invalid(
                        format!("heartbeat_interval must be whole seconds, not \"{}\"", Shown(&text)),
                        format!("write a number from 1 to {MAX_HEARTBEAT_SECS}"),
                    )
                })?;
                self.heartbeat = Some(Duration::from_secs(seconds));
            }
            "log_size" => self.own.push(("event_log_operations".to_owned(), text)),
            own => self.own.push((own.to_owned(), text)),
        }
        Ok(())
    }

    /// Whether nothing but settings by their own names is asked for.
    fn is_own(&self) -> bool {
        self.role.is_none()
            && self.bind_address.is_none()
            && self.sources.is_none()
            && self.heartbeat.is_none()
    }
}

fn role(text: &str) -> Result<AskedRole, NotConfigured> {
    match text {
        "master" | "primary" | "leader" => Ok(AskedRole::Master),
        "replica" => Ok(AskedRole::Replica),
        "standalone" => Ok(AskedRole::Standalone),
        _ => Err(invalid(
            format!("there is no role \"{}\"", Shown(text)),
            "write master, replica or standalone",
        )),
    }
}

/// Does all that `body`, a JSON object, asks for, or nothing. Says what was done.
///
/// # Errors
/// Why it was not done.
pub(super) async fn configure<N: OperatedNode>(
    node: &N,
    settings: &NodeSettings<N>,
    body: &[u8],
) -> Result<String, NotConfigured> {
    let asked = AskedChange::read(body, settings.fixed())?;
    if !asked.is_own() && asked.own.iter().any(|(name, _)| name == STATE_QUOTA) {
        return Err(invalid(
            format!("{STATE_QUOTA} is the cluster's, the others are this node's"),
            "change it by itself",
        ));
    }
    let mut done = Vec::new();
    if let Some(address) = &asked.bind_address {
        listens_at(node, settings, address)?;
        done.push(format!("this node listens at {address} already"));
    }
    match node.following() {
        Some(following) => of_replica(node, settings, asked, following, &mut done).await?,
        None => of_member(node, settings, asked, &mut done).await?,
    }
    Ok(if done.is_empty() { "nothing was asked for".to_owned() } else { done.join("; ") })
}

fn listens_at<N: OperatedNode>(
    node: &N,
    settings: &NodeSettings<N>,
    address: &str,
) -> Result<(), NotConfigured> {
    let listens = settings.fixed().iter().find(|(name, _)| *name == "client_listen");
    let is_there = listens.is_some_and(|(_, at)| at == address) || node.report().client == address;
    match is_there {
        true => Ok(()),
        false => Err(not_here(
            format!("bind_address \"{}\" needs a restart: a running node does not move", Shown(address)),
            "leave it out here, set client_listen (a replica: --listen) and restart the node",
        )),
    }
}

/// Changes settings by their own names.
async fn change<N: OperatedNode>(
    settings: &NodeSettings<N>,
    own: &[(String, String)],
    done: &mut Vec<String>,
) -> Result<(), NotConfigured> {
    if own.is_empty() {
        return Ok(());
    }
    settings.change(own).await?;
    done.extend(own.iter().map(|(name, value)| format!("{name} is {value}")));
    Ok(())
}

async fn of_member<N: OperatedNode>(
    node: &N,
    settings: &NodeSettings<N>,
    asked: AskedChange,
    done: &mut Vec<String>,
) -> Result<(), NotConfigured> {
    let (state, report) = (node.state(), node.report());
    let leads = state.role == Role::Leader;
    match asked.role {
        Some(AskedRole::Replica) if leads => {
            return Err(not_here(
                "this node leads, and no member becomes a replica that is only read: that would take its vote from the cluster",
                "hand the lead over with `quorate transfer-leader`, or run a replica with `quorate replica`",
            ));
        }
        Some(AskedRole::Replica) => {
            done.push("this node follows, and stays a voter of its cluster".to_owned())
        }
        Some(AskedRole::Standalone) if report.peers().count() > 0 => {
            return Err(not_here(
                "this node is a member of a cluster, and leaves it by no setting",
                "take it out with `quorate member remove`, or start another node with --single",
            ));
        }
        Some(AskedRole::Standalone) => done.push("this node is a cluster by itself".to_owned()),
        Some(AskedRole::Master) | None => {}
    }
    if let Some(sources) = &asked.sources {
        match state.leader.as_ref().filter(|leader| sources.contains(&leader.client)) {
            Some(leader) => done.push(format!("{} leads already", leader.client)),
            None => {
                return Err(not_here(
                    "a member follows whoever is elected, and not a master_address",
                    "leave it out, or hand the lead over with `quorate transfer-leader`",
                ));
            }
        }
    }
    if asked.heartbeat.is_some() {
        return Err(not_here(
            "those who follow a member say themselves how often they want to hear from it",
            "leave heartbeat_interval out, or send it to the replica; heartbeats between members are heartbeat_interval_ms, at a restart",
        ));
    }
    let before: Settings = node.settings();
    change(settings, &asked.own, done).await?;
    if asked.role == Some(AskedRole::Master) {
        match node.take_lead().await {
            Ok(_) if leads => done.push("this node leads already".to_owned()),
            Ok(_) => done.push("this node was handed the lead".to_owned()),
            Err(error) => {
                // What was in force a moment ago is valid.
                let _ = node.configure(|settings| *settings = before);
                return Err(error.into());
            }
        }
    }
    Ok(())
}

async fn of_replica<N: OperatedNode>(
    node: &N,
    settings: &NodeSettings<N>,
    asked: AskedChange,
    before: FollowedSources,
    done: &mut Vec<String>,
) -> Result<(), NotConfigured> {
    match asked.role {
        Some(AskedRole::Master | AskedRole::Standalone) => {
            return Err(not_here(
                "this node is a replica: it has no vote, and cannot lead",
                "send role master to a member; `quorate member add` makes a node one",
            ));
        }
        Some(AskedRole::Replica) if asked.sources.is_none() => {
            done.push(format!("this node is a replica, and follows {}", before.sources.join(",")));
        }
        Some(AskedRole::Replica) | None => {}
    }
    let wanted = FollowedSources {
        sources: asked.sources.clone().unwrap_or_else(|| before.sources.clone()),
        heartbeat: asked.heartbeat.unwrap_or(before.heartbeat),
    };
    if wanted != before {
        let refused = |error| invalid(format!("{error}"), "write HOST:PORT of a member's client port");
        node.follow_by(wanted.clone()).map_err(refused)?;
    }
    if asked.sources.is_some() {
        done.push(format!(
            "this replica follows {} from now on; a restart follows what its flags, its file or the environment say",
            wanted.sources.join(",")
        ));
    }
    if asked.heartbeat.is_some() {
        done.push(format!(
            "its source says every {} s that it is there, until a restart",
            wanted.heartbeat.as_secs()
        ));
    }
    if let Err(error) = change(settings, &asked.own, done).await {
        // What it has followed a moment ago is valid.
        let _ = node.follow_by(before);
        return Err(error);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(body: &str) -> String {
        match AskedChange::read(body.as_bytes(), &[]) {
            Err(NotConfigured::Invalid(refused)) => format!("{}: {}", refused.error, refused.hint),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_asked_for_is_taken_apart() {
        let body = r#"{"role": "replica", "bind_address": "0.0.0.0:1", "master_address": "a:1, b:2",
            "heartbeat_interval": 7, "log_size": "5000", "max_command_bytes": 9}"#;
        let asked = AskedChange::read(body.as_bytes(), &[]).unwrap();
        let own = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let expected = AskedChange {
            role: Some(AskedRole::Replica),
            bind_address: Some("0.0.0.0:1".to_owned()),
            sources: Some(vec!["a:1".to_owned(), "b:2".to_owned()]),
            heartbeat: Some(Duration::from_secs(7)),
            own: vec![own("event_log_operations", "5000"), own("max_command_bytes", "9")],
        };
        assert_eq!(asked, expected);
        assert!(!asked.is_own() && AskedChange::default().is_own());
    }

    #[test]
    fn what_makes_no_sense_says_what_is_allowed() {
        for (body, part) in [
            (r#"{"role": "boss"}"#, "master, replica or standalone"),
            (r#"{"heartbeat_interval": 0}"#, "from 1 to 3600"),
            (r#"{"heartbeat_interval": "5s"}"#, "whole seconds, not \"5s\""),
            (r#"{"heartbeat_interval": null}"#, "must be a number"),
            (r#"{"role": "master", "role": "replica"}"#, "given twice"),
            (r#"{"nonsense": []}"#, "no setting \"nonsense\""),
            ("[]", "not a JSON object"),
        ] {
            assert!(refused(body).contains(part), "{body}: {}", refused(body));
        }
    }
}
