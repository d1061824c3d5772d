//! `quorate member`: who belongs to the cluster.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::{Value, json};

use super::{CliError, Common, Format, input, output};
use crate::duration;
use crate::kv::client::{MemberChange, MemberList, MemberReport};
use crate::types::{MemberKind, NodeId};

/// Arguments of `quorate member`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate member list\n  quorate serve --node-id 4 --data-dir /var/lib/quorate --client-listen 10.0.0.4:7801 --peer-listen 10.0.0.4:7901 --join    on the new machine\n  quorate member add 4 --peer 10.0.0.4:7901 --promote\n  quorate member remove 2\n\nChanges go to the leader, wherever it is. One that was interrupted is completed by repeating it; to repeat one that is done changes nothing, and is said."
)]
pub struct MemberArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: MemberCommand,
}

/// What can be done with members.
#[derive(Debug, Subcommand)]
pub enum MemberCommand {
    /// Show the members, as the leader knows them
    #[command(
        after_help = "Example:\n  quorate member list\n  quorate member list -o json | jq '.members[] | select(.reachable == false)'"
    )]
    List,
    /// Add a node that was started with --join
    #[command(
        after_help = "Example:\n  quorate member add 4 --peer 10.0.0.4:7901            a learner, which receives everything and does not vote\n  quorate member add 4 --peer 10.0.0.4:7901 --promote  a voter, once it has caught up"
    )]
    Add {
        /// Its --node-id
        #[arg(value_parser = input::parse_node_id)]
        node_id: NodeId,
        /// Its peer address; it tells its client address itself
        #[arg(long, value_name = "HOST:PORT")]
        peer: String,
        /// Make it a voter once it has caught up
        #[arg(long)]
        promote: bool,
        /// How long it may take to catch up.
        #[command(flatten)]
        wait: CatchUp,
    },
    /// Make a learner a voter, once it has caught up
    #[command(after_help = "Example:\n  quorate member promote 4")]
    Promote {
        /// The learner
        #[arg(value_parser = input::parse_node_id)]
        node_id: NodeId,
        /// How long it may take to catch up.
        #[command(flatten)]
        wait: CatchUp,
    },
    /// Make a voter a learner
    #[command(after_help = "Example:\n  quorate member demote 4")]
    Demote {
        /// The voter
        #[arg(value_parser = input::parse_node_id)]
        node_id: NodeId,
        /// Do it although too few voters would be left that have caught up and whose disks are well; a majority must
        /// answer in any case
        #[arg(long)]
        force: bool,
    },
    /// Remove a member; if it runs it learns of it and stops
    #[command(
        after_help = "Example:\n  quorate member remove 2\n\nA leader hands over before it is removed. Refused when too few of the remaining voters answer: remove those first that are gone\nfor good. --force does not help there, as the removal itself could not be committed."
    )]
    Remove {
        /// The member
        #[arg(value_parser = input::parse_node_id)]
        node_id: NodeId,
        /// Do it although too few voters would be left that have caught up and whose disks are well; a majority must
        /// answer in any case
        #[arg(long)]
        force: bool,
    },
    /// Put a node in the place of a dead or wiped one
    #[command(
        after_help = "Example:\n  quorate member replace 2 --with 4 --peer 10.0.0.4:7901   by another node\n  quorate member replace 2 --peer 10.0.0.2:7901            by itself, started with --join on an empty data directory\n\nAnother node becomes a voter at the moment the old one ceases to be one; under the same id there is one voter less\nuntil the new data directory has caught up."
    )]
    Replace {
        /// The node that goes
        #[arg(value_parser = input::parse_node_id)]
        node_id: NodeId,
        /// The node that comes [default: the same id]
        #[arg(long, value_name = "NODE_ID", value_parser = input::parse_node_id)]
        with: Option<NodeId>,
        /// Peer address of the node that comes
        #[arg(long, value_name = "HOST:PORT")]
        peer: String,
        /// How long it may take to catch up.
        #[command(flatten)]
        wait: CatchUp,
    },
    /// Correct the addresses of a member
    #[command(
        group = clap::ArgGroup::new("addresses").required(true).multiple(true).args(["peer", "client"]),
        after_help = "Example:\n  quorate member update 2 --peer 10.0.1.2:7901 --client 10.0.1.2:7801\n\nA node that starts with new addresses does this by itself as soon as it finds the leader. It must answer at the addresses\ngiven, and advertise them."
    )]
    Update {
        /// The member
        #[arg(value_parser = input::parse_node_id)]
        node_id: NodeId,
        /// Its peer address
        #[arg(long, value_name = "HOST:PORT")]
        peer: Option<String>,
        /// Its client address
        #[arg(long, value_name = "HOST:PORT")]
        client: Option<String>,
    },
}

/// How long to wait for a node to catch up.
#[derive(Debug, Clone, Copy, Args)]
pub struct CatchUp {
    /// How long to wait for the node to catch up, such as 60s or 10m
    #[arg(long, value_name = "TIME", value_parser = duration::parse, allow_hyphen_values = true, default_value = "60s")]
    pub catch_up: Duration,
}

/// One member, as shown.
#[derive(Debug, Serialize)]
struct MemberRow<'a> {
    node_id: NodeId,
    role: MemberKind,
    /// Null when no leader is known.
    leader: Option<bool>,
    peer: &'a str,
    /// Null until it has told.
    client: Option<&'a str>,
    matched: Option<u64>,
    reachable: Option<bool>,
    incarnation: Option<String>,
}

/// Does what was asked for, and lists the members.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: MemberArgs) -> Result<(), CliError> {
    let client = common.client()?;
    let change = match args.command {
        MemberCommand::List => None,
        MemberCommand::Add { node_id, peer, promote, wait: CatchUp { catch_up } } => {
            Some(MemberChange::Add { node_id, peer, promote, catch_up })
        }
        MemberCommand::Promote { node_id, wait: CatchUp { catch_up } } => {
            Some(MemberChange::Promote { node_id, catch_up })
        }
        MemberCommand::Demote { node_id, force } => Some(MemberChange::Demote { node_id, force }),
        MemberCommand::Remove { node_id, force } => Some(MemberChange::Remove { node_id, force }),
        MemberCommand::Replace { node_id, with, peer, wait: CatchUp { catch_up } } => {
            let new_node_id = with.unwrap_or(node_id);
            Some(MemberChange::Replace { node_id, new_node_id, peer, catch_up })
        }
        MemberCommand::Update { node_id, peer, client } => {
            Some(MemberChange::Update { node_id, peer, client })
        }
    };
    match change {
        None => show(common.output, &client.members().await?, None),
        Some(change) => {
            let list = client.change_members(change).await?;
            let printed = show(common.output, &list, Some(list.unchanged));
            if list.unchanged { printed } else { output::after("the members are changed", printed) }
        }
    }
}

/// Prints the members, and of a change whether it has changed anything.
fn show(format: Format, list: &MemberList, unchanged: Option<bool>) -> Result<(), CliError> {
    match format {
        Format::Json => output::json(&document(list, unchanged)),
        Format::Table => {
            output::raw(table(list).as_bytes())?;
            if unchanged == Some(true) {
                output::remark("nothing had to be done: the members are as before");
            }
            if list.joint == Some(true) {
                output::remark(
                    "a change of the voters is under way: it needs majorities of the old and the new ones",
                );
            }
            Ok(())
        }
    }
}

fn document(list: &MemberList, unchanged: Option<bool>) -> Value {
    let rows: Vec<MemberRow<'_>> = list.members.iter().map(|member| row(list, member)).collect();
    json!({
        "members": rows,
        "term": list.position.map(|position| position.term),
        "position": list.position.map(|position| position.index),
        "joint": list.joint,
        "unchanged": unchanged,
    })
}

fn table(list: &MemberList) -> String {
    let headings = ["NODE", "ROLE", "PEER", "CLIENT", "MATCHED", "ANSWERS", "DATA DIRECTORY"];
    let cells: Vec<_> = list.members.iter().map(|member| cells(&row(list, member))).collect();
    output::table(&headings, &cells)
}

fn row<'a>(list: &MemberList, member: &'a MemberReport) -> MemberRow<'a> {
    MemberRow {
        node_id: member.node_id,
        role: member.kind(),
        leader: list.leader.as_ref().map(|leader| leader.node_id == member.node_id),
        peer: &member.peer,
        client: Some(&*member.client).filter(|client| !client.is_empty()),
        matched: member.matched,
        reachable: member.reachable,
        incarnation: member.incarnation.map(|own| own.to_string()),
    }
}

fn cells(row: &MemberRow<'_>) -> Vec<String> {
    let unknown = || "-".to_owned();
    vec![
        row.node_id.to_string(),
        if row.leader == Some(true) { format!("{}, leads", row.role) } else { row.role.to_string() },
        row.peer.to_owned(),
        row.client.map_or_else(unknown, str::to_owned),
        row.matched.map_or_else(unknown, |matched| matched.to_string()),
        row.reachable.map_or_else(unknown, |answers| if answers { "yes" } else { "no" }.to_owned()),
        row.incarnation.clone().unwrap_or_else(unknown),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden::golden;
    use crate::kv::client::tests::fake::{Fake, leader, told};
    use crate::kv::client::{Client, ClientConfig};

    #[tokio::test]
    async fn what_the_leader_tells_is_shown_as_ever() {
        let node = Fake::start(leader);
        node.set_status(told()[0].clone());
        let client = Client::new([node.endpoint()], ClientConfig::default()).unwrap();
        let list = client.members().await.unwrap();
        golden("cli-members.txt", &format!("{}{:#}\n", table(&list), document(&list, None)));
    }
}
