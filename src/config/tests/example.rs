//! The commented example `cluster/config/node.toml`, made from the table of settings. `QUORATE_GOLDEN=write` writes it.

use crate::config::ServeConfig;
use crate::config::flags::paragraphs;
use crate::config::table::{ROWS, SettingRow};
use crate::golden::golden;

/// Where the parts of the file begin, and what they are about.
const PARTS: [(&str, &str, &str); 5] = [
    ("node_id", "Who it is, and where", ""),
    ("log_format", "How it behaves", ""),
    ("allowed_hosts", "What clients may do", ""),
    (
        "log_level",
        "Can be changed while it runs",
        "With `quorate configure NAME=VALUE --endpoint HOST:PORT`, or POST /replication/configure. That lasts until the node \
         stops; what is to stay belongs here.",
    ),
    ("peers", "The founding members", ""),
];

/// What the example sets; the rest is commented out and shows its default.
const SET: [(&str, &str); 10] = [
    ("node_id", "1"),
    ("cluster", "\"production\""),
    ("data_dir", "\"/var/lib/quorate/node1/data\""),
    ("client_listen", "\"0.0.0.0:7801\""),
    ("client_advertise", "\"node1.example.com:7801\""),
    ("peer_listen", "\"0.0.0.0:7901\""),
    ("peer_advertise", "\"node1.example.com:7901\""),
    ("log_format", "\"json\""),
    ("tokens_file", "\"/etc/quorate/tokens.toml\""),
    ("peers", ""),
];

const HEAD: &str = "One of three nodes: quorate serve --config node.toml

All settings there are; those that are commented out show their defaults. Every setting can also be given as a flag \
(--node-id) or in the environment (QUORATE_NODE_ID); flags win over the environment, and that over this file. A key that \
quorate does not know is refused. `quorate serve --help` says the same.";

const PEERS: &str = "[peers]
1 = \"node1.example.com:7901\"
2 = \"node2.example.com:7901\"
3 = \"node3.example.com:7901\"
";

/// `text` as comments, broken between words.
fn comment(text: &str) -> String {
    const COLUMNS: usize = 120;
    let mut lines = String::new();
    for line in text.lines() {
        let mut written = "#".to_owned();
        for word in line.split_whitespace() {
            if written.len() + 1 + word.len() > COLUMNS {
                lines += &format!("{written}\n");
                written = "#".to_owned();
            }
            written += &format!(" {word}");
        }
        lines += &format!("{written}\n");
    }
    lines
}

fn setting(row: &SettingRow, usual: &ServeConfig) -> String {
    let (first, rest) = paragraphs(row.text);
    let set = SET.iter().find(|(name, _)| *name == row.name);
    // Its line shows the default, unless it sets something else.
    let first = match first.split_once(" [default: ") {
        Some((first, _)) if set.is_none() => first.to_owned(),
        Some(_) | None => first,
    };
    let text = format!("{first}.\n{}", rest.unwrap_or_default().replace("\n\n", "\n"));
    let value = match set {
        Some(("peers", _)) => PEERS.to_owned(),
        Some((name, value)) => format!("{name} = {value}\n"),
        None => format!("# {} = {}\n", row.name, (row.value)(usual)),
    };
    format!("{}{value}", comment(&text))
}

#[test]
fn the_commented_file_is_made_from_the_table() {
    let usual = ServeConfig::default();
    let mut file = comment(HEAD);
    for row in ROWS {
        if let Some((_, title, about)) = PARTS.iter().find(|(first, ..)| *first == row.name) {
            file += &format!("\n# == {title} ==\n");
            if !about.is_empty() {
                file += &format!("#\n{}", comment(about));
            }
        }
        file += &format!("\n{}", setting(row, &usual));
    }
    golden("../../cluster/config/node.toml", &file);
}
