//! The settings as arguments of the command line, each with its variable of the environment, and what the help says of them.

use clap::{Arg, Args, Command};

use super::ServeConfig;
use super::table::{BYTES, GivenSettings, MS, ROWS, SECRET, SWITCH, SettingRow, TakesEffect};
use crate::duration::parse_ms;
use crate::node::settings::STATE_QUOTA;

impl Args for GivenSettings {
    fn augment_args(command: Command) -> Command {
        let usual = ServeConfig::default();
        command.args(ROWS.iter().map(|row| row.argument(&usual)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl SettingRow {
    fn argument(&self, usual: &ServeConfig) -> Arg {
        let (first, rest) = paragraphs(self.text);
        let help = match self.told_default(usual) {
            Some(default) => format!("{first} [default: {default}]"),
            None => first,
        };
        let arg = Arg::new(self.name)
            .long(self.name.replace('_', "-"))
            .env(format!("QUORATE_{}", self.name.to_uppercase()))
            .hide_env_values(self.form == SECRET)
            .value_name(self.form)
            .long_help(rest.map_or_else(|| help.clone(), |rest| format!("{help}\n\n{rest}")))
            .help(help);
        let arg = (self.parsed)(arg);
        match self.form {
            MS => arg.value_parser(parse_ms),
            SWITCH => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
            _ => arg,
        }
    }

    /// The default, where the help is to add it: a switch is off, and what says its own does not need it.
    fn told_default(&self, usual: &ServeConfig) -> Option<String> {
        if self.form == SWITCH || self.text.contains("[default: ") {
            return None;
        }
        match (self.value)(usual) {
            serde_json::Value::Array(none) if none.is_empty() => None,
            serde_json::Value::String(text) => (!text.is_empty()).then_some(text),
            value if self.form == BYTES => value.as_u64().map(sized),
            value => Some(value.to_string()),
        }
    }
}

/// A number of bytes for people.
fn sized(bytes: u64) -> String {
    const MIB: f64 = 1024.0 * 1024.0;
    format!("{} MiB", bytes as f64 / MIB)
}

/// The first paragraph of `text`, and the others.
pub(super) fn paragraphs(text: &str) -> (String, Option<String>) {
    let lines = text.lines().map(str::trim).collect::<Vec<_>>();
    let mut paragraphs = lines.split(|line| line.is_empty()).map(|lines| lines.join(" "));
    let first = paragraphs.next().unwrap_or_default();
    let rest = paragraphs.filter(|paragraph| !paragraph.is_empty()).collect::<Vec<_>>().join("\n\n");
    (first, (!rest.is_empty()).then_some(rest))
}

/// What is said below the help.
pub(super) fn after_help() -> String {
    let live: Vec<_> =
        ROWS.iter().filter(|row| row.effect == TakesEffect::Live).map(|row| row.name).collect();
    format!(
        "Example:
  quorate serve --single                       one node by itself
  quorate serve --node-id 1 --data-dir /var/lib/quorate \\
    --client-listen 0.0.0.0:7801 --client-advertise 10.0.0.1:7801 --peer-listen 0.0.0.0:7901 \\
    --peers 1=10.0.0.1:7901,2=10.0.0.2:7901,3=10.0.0.3:7901 --tokens-file /etc/quorate/tokens.toml
  quorate serve --node-id 4 --data-dir /var/lib/quorate --client-listen 10.0.0.4:7801 --peer-listen 10.0.0.4:7901 --join
  quorate serve --config quorate.toml

A node that belongs to no cluster yet needs one of --peers, --join and --single; later starts need none of them.

Settings come from the file, then the environment, then flags; the later wins. In a file, --node-id is node_id.
cluster/config/node.toml explains all of them.

These can change while the node runs, with `quorate configure`: {}; and, for the whole cluster, {STATE_QUOTA}.",
        live.join(", ")
    )
}
