//! `quorate transfer-leader`.

use clap::Args;
use serde_json::json;

use super::{CliError, Common, Format, input, output};
use crate::types::NodeId;

/// Arguments of `quorate transfer-leader`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate transfer-leader      to the voter that is furthest ahead\n  quorate transfer-leader 3\n\nA node that was started with --preferred-leader takes the lead back after a few seconds.\nExits with 0 only when the node that was asked for leads."
)]
pub struct TransferArgs {
    /// The voter that is to lead [default: the one that is furthest ahead]
    #[arg(value_parser = input::parse_node_id)]
    pub node_id: Option<NodeId>,
}

/// Hands the lead over and prints who leads then.
///
/// # Errors
/// [`CliError::OtherLeads`] when another node leads in the end; others see [`CliError`].
pub async fn run(common: &Common, args: TransferArgs) -> Result<(), CliError> {
    let leader = common.client()?.transfer_leader(args.node_id).await?;
    match args.node_id {
        Some(wanted) if wanted != leader => Err(CliError::OtherLeads { wanted, leader }),
        _ => {
            let printed = match common.output {
                Format::Table => output::line(&format!("node {leader} leads")),
                Format::Json => output::json(&json!({ "leader": leader })),
            };
            output::after("the lead was handed over", printed)
        }
    }
}
