//! `quorate configure`.

use clap::Args;
use serde_json::{Map, Value};

use super::{CliError, Common, Format, output};
use crate::kv::client::{Endpoint, NodeSetting};

/// Arguments of `quorate configure`.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  quorate configure                                       lists all settings, of the leader\n  quorate configure snapshot_every_entries=100000 --endpoint 10.0.0.2:7801\n  quorate configure log_level=info,quorate::write=trace --endpoint 10.0.0.2:7801\n\nA change takes effect at once, on one node, until it stops: put what is to stay into its configuration file too.\nOf several settings all change or none."
)]
pub struct ConfigureArgs {
    /// Settings by their names in the configuration file; lists all when none is given
    #[arg(value_name = "NAME=VALUE", value_parser = parse_setting)]
    pub settings: Vec<(String, String)>,
    /// Client address of the node [default: the leader's]
    #[arg(long, value_name = "HOST:PORT", value_parser = Endpoint::parse)]
    pub endpoint: Option<Endpoint>,
}

fn parse_setting(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.replace('-', "_"), value.to_owned())),
        _ => Err("write NAME=VALUE, such as snapshot_every_entries=100000".to_owned()),
    }
}

/// Changes what is asked for, and prints the settings as they are then.
///
/// # Errors
/// See [`CliError`].
pub async fn run(common: &Common, args: ConfigureArgs) -> Result<(), CliError> {
    let settings = common.client()?.configure(args.endpoint.as_ref(), &args.settings).await?;
    let printed = match common.output {
        Format::Table => {
            let rows: Vec<_> = settings.into_iter().map(row).collect();
            output::raw(output::table(&["SETTING", "VALUE", "CHANGES"], &rows).as_bytes())
        }
        Format::Json => output::json(&object(settings)),
    };
    if args.settings.is_empty() { printed } else { output::after("the settings are changed", printed) }
}

fn row(setting: NodeSetting) -> Vec<String> {
    let changes = if setting.changeable { "at once" } else { "at a restart" };
    vec![setting.name, setting.value, changes.to_owned()]
}

/// What can change by its names, and the rest in an object of its own.
fn object(settings: Vec<NodeSetting>) -> Map<String, Value> {
    let (changeable, fixed): (Vec<_>, Vec<_>) = settings.into_iter().partition(|setting| setting.changeable);
    let members = |settings: Vec<NodeSetting>| {
        settings.into_iter().map(|setting| (setting.name, setting.value.into())).collect::<Map<_, _>>()
    };
    let mut object = members(changeable);
    object.insert("fixed".to_owned(), members(fixed).into());
    object
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    /// The variant of the command must not hide what its arguments have to say.
    #[test]
    fn the_help_of_serve_names_what_can_be_changed() {
        let cli = Cli::command();
        let serve = cli.find_subcommand("serve").unwrap().get_after_help().unwrap().to_string();
        for name in crate::node::settings::CHANGEABLE {
            assert!(serve.contains(name), "{name} is not in {serve}");
        }
    }

    #[test]
    fn settings_are_shown_with_what_changes_them() {
        let setting =
            |name: &str, changeable| NodeSetting { name: name.to_owned(), value: "1".to_owned(), changeable };
        let settings = || vec![setting("max_command_bytes", true), setting("node_id", false)];
        assert_eq!(
            settings().into_iter().map(|setting| row(setting).pop().unwrap()).collect::<Vec<_>>(),
            ["at once", "at a restart"]
        );
        let expected = serde_json::json!({ "max_command_bytes": "1", "fixed": { "node_id": "1" } });
        assert_eq!(Value::Object(object(settings())), expected);
    }

    #[test]
    fn a_setting_has_a_name_and_a_value() {
        let parsed = |name: &str, value: &str| Ok((name.to_owned(), value.to_owned()));
        assert_eq!(parse_setting("log_level=info,quorate=debug"), parsed("log_level", "info,quorate=debug"));
        assert_eq!(parse_setting("preferred-leader=true"), parsed("preferred_leader", "true"));
        for text in ["", "log_level", "=info"] {
            assert!(parse_setting(text).is_err(), "{text}");
        }
    }
}
