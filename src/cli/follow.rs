//! What the commands that follow have in common: which entries, how they are shown, and how it is told that the cluster is
//! lost and found.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use serde_json::{Map, Value, json};
use tokio::time::Instant;

use super::{Format, input, output};
use crate::kv::client::{Contact, EntryFilter, FollowedChange, FollowedEntry};

/// Which entries are wanted. A collection is that of the tenant before it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FilterArgs {
    /// Any of these; none: all.
    pub filters: Vec<EntryFilter>,
}

impl FilterArgs {
    fn read(matches: &ArgMatches) -> Self {
        let given = |name: &str| {
            let is_given = matches.value_source(name) == Some(ValueSource::CommandLine);
            let values = matches.get_many::<String>(name).filter(|_| is_given).into_iter().flatten().cloned();
            values.zip(matches.indices_of(name).into_iter().flatten()).collect::<Vec<_>>()
        };
        let (tenants, collections) = (given("tenant"), given("collection"));
        let first = tenants.first().map_or(usize::MAX, |(_, at)| *at);
        let between = |from: usize, to: usize| {
            collections.iter().filter(move |(_, at)| (from..to).contains(at)).map(|(name, _)| name)
        };
        let mut filters: Vec<_> =
            between(0, first).map(|name| EntryFilter::collection("default", name)).collect();
        for (which, (tenant, at)) in tenants.iter().enumerate() {
            let to = tenants.get(which + 1).map_or(usize::MAX, |(_, next)| *next);
            let before = filters.len();
            filters.extend(between(*at, to).map(|name| EntryFilter::collection(tenant, name)));
            if filters.len() == before {
                filters.push(EntryFilter::tenant(tenant));
            }
        }
        Self { filters }
    }
}

impl FromArgMatches for FilterArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self::read(matches))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::read(matches);
        Ok(())
    }
}

impl Args for FilterArgs {
    fn augment_args(command: Command) -> Command {
        let arg = |name: &'static str, value: &'static str, help: &'static str| {
            let arg = Arg::new(name).long(name).value_name(value).help(help);
            arg.action(ArgAction::Append).value_parser(input::parse_name)
        };
        command
            .arg(arg("tenant", "TENANT", "Only what happens to this tenant; may be given several times"))
            .arg(arg(
                "collection",
                "COLLECTION",
                "Of the tenant before it (or `default`), only what happens to this collection; may be given several times",
            ))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

/// The columns of an entry.
pub(super) const HEADINGS: [&str; 7] = ["SEQ", "TIME", "OPERATION", "TENANT", "COLLECTION", "KEY", "VALUE"];

/// An entry, by its columns.
pub(super) fn cells(entry: &FollowedEntry) -> Vec<String> {
    let (operation, rest) = match &entry.change {
        FollowedChange::Event { operation, tenant, collection, key, value, .. } => {
            let value = if operation.has_value() { output::printable(value) } else { String::new() };
            let name = |name: &str| output::printable(name.as_bytes());
            (operation.name(), [name(tenant), name(collection), output::printable(key), value])
        }
        FollowedChange::Command { machine, version, command } => {
            let machine = format!("machine={machine},version={version}");
            ("command", ["-".to_owned(), "-".to_owned(), machine, output::printable(command)])
        }
        FollowedChange::Nothing => ("-", std::array::from_fn(|_| "-".to_owned())),
    };
    let first = [entry.seq.to_string(), output::time(entry.time_ms), operation.to_owned()];
    first.into_iter().chain(rest).collect()
}

/// An entry on a line of its own, with the value that was there before where it is told.
pub(super) fn line(entry: &FollowedEntry) -> String {
    let mut line = cells(entry).join("  ");
    line.truncate(line.trim_end().len());
    match &entry.change {
        FollowedChange::Event { previous_value: Some(value), .. } => {
            line.push_str(&format!("  (before: {})", output::printable(value)));
        }
        FollowedChange::Event { previous_unknown: true, .. } => {
            line.push_str("  (before: not kept any more)")
        }
        _ => {}
    }
    line
}

/// An entry as a JSON object.
pub(super) fn object(entry: &FollowedEntry) -> Map<String, Value> {
    let mut object = Map::new();
    let mut insert = |name: &str, value: Value| drop(object.insert(name.to_owned(), value));
    insert("seq", entry.seq.into());
    insert("term", entry.term.into());
    insert("time_ms", entry.time_ms.into());
    insert("more", entry.more.into());
    match &entry.change {
        FollowedChange::Event {
            operation,
            tenant,
            collection,
            key,
            value,
            create_seq,
            previous_seq,
            version,
            expires_ms,
            previous_value,
            previous_unknown,
            ..
        } => {
            insert("operation", operation.name().into());
            insert("tenant", tenant.as_str().into());
            insert("collection", collection.as_str().into());
            insert("create_seq", (*create_seq).into());
            insert("previous_seq", Some(*previous_seq).filter(|seq| *seq != 0).into());
            insert("version", (*version).into());
            insert("expires_ms", Some(*expires_ms).filter(|expires_ms| *expires_ms != 0).into());
            output::insert_bytes(&mut object, "key", key);
            if operation.has_value() {
                output::insert_bytes(&mut object, "value", value);
            }
            if let Some(previous) = previous_value {
                output::insert_bytes(&mut object, "previous_value", previous);
            }
            if *previous_unknown {
                object.insert("previous_unknown".to_owned(), true.into());
            }
        }
        FollowedChange::Command { machine, version, command } => {
            insert("operation", "command".into());
            insert("machine", (*machine).into());
            insert("machine_version", (*version).into());
            output::insert_bytes(&mut object, "command", command);
        }
        FollowedChange::Nothing => insert("operation", Value::Null),
    }
    object
}

/// Says on standard error when the cluster is lost, and when it is found again.
#[derive(Debug, Default)]
pub(super) struct Whereabouts {
    lost_since: Option<Instant>,
    heard: bool,
}

impl Whereabouts {
    pub(super) fn tell(&mut self, format: Format, contact: Contact) {
        match contact {
            Contact::Heard { endpoint } => {
                self.heard = true;
                if let Some(lost) = self.lost_since.take() {
                    let message = format!(
                        "found the cluster again, at {endpoint}, after {:.1} s; nothing is left out",
                        lost.elapsed().as_secs_f64()
                    );
                    say(format, "found", &message);
                }
            }
            Contact::Lost { why } if self.heard => {
                self.lost_since.get_or_insert_with(Instant::now);
                say(format, "lost", &format!("lost the cluster, trying again: {why}"));
            }
            // At the beginning the error says it, if it comes to that.
            Contact::Lost { .. } | Contact::Seeking => {}
        }
    }
}

fn say(format: Format, contact: &str, message: &str) {
    match format {
        Format::Table => output::remark(message),
        Format::Json => output::remark(&json!({ "contact": contact, "message": message }).to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Command, parse};
    use crate::kv::client::tests::replica;

    fn filters(args: &[&str]) -> Vec<EntryFilter> {
        match parse([&["quorate", "log"], args].concat()).unwrap().command {
            Command::Log(log) => log.filters.filters,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_collection_belongs_to_the_tenant_before_it() {
        let (whole, part) = (EntryFilter::tenant, |tenant, name| EntryFilter::collection(tenant, name));
        for (args, expected) in [
            (&[][..], vec![]),
            (&["--tenant", "a"], vec![whole("a")]),
            (&["--tenant", "a", "--tenant=b"], vec![whole("a"), whole("b")]),
            (&["--tenant", "a", "--collection", "x", "--tenant", "b"], vec![part("a", "x"), whole("b")]),
            (
                &["--tenant", "a", "--tenant", "b", "--collection", "x", "--collection=y"],
                vec![whole("a"), part("b", "x"), part("b", "y")],
            ),
            (
                &["--collection", "x", "--tenant", "b", "--collection", "x"],
                vec![part("default", "x"), part("b", "x")],
            ),
        ] {
            assert_eq!(filters(args), expected, "{args:?}");
        }
        assert!(parse(["quorate", "log", "--tenant", ""]).is_err());
    }

    #[test]
    fn an_entry_is_one_line_and_one_object() {
        let inserted = replica::followed(replica::entry(7));
        assert_eq!(line(&inserted), "7  2026-01-01T00:00:00Z  insert  default  default  k7  v");
        let json = serde_json::to_value(object(&inserted)).unwrap();
        assert_eq!((&json["key"], &json["previous_seq"]), (&json!("k7"), &Value::Null));
        let removed = replica::followed(replica::removal(8));
        assert_eq!(line(&removed), "8  2026-01-01T00:00:00Z  delete  default  default  k8");
        assert!(object(&removed).get("value").is_none());
        let told = |previous_value: Option<&'static str>, unknown| {
            let mut message = replica::removal(8);
            let entity = message.entity.as_mut().unwrap();
            (entity.previous_value, entity.previous_unknown) = (previous_value.map(Into::into), unknown);
            replica::followed(message)
        };
        assert!(line(&told(Some("old"), false)).ends_with("k8  (before: old)"));
        assert!(line(&told(Some(""), false)).ends_with("k8  (before: \"\")"), "a value may be empty");
        assert!(line(&told(None, true)).ends_with("k8  (before: not kept any more)"));
        assert_eq!(object(&told(Some("old"), false))["previous_value"], "old");
        assert_eq!(object(&told(None, true))["previous_unknown"], true);
        let command = replica::followed(replica::command(9, b"\xff\0"));
        assert_eq!(line(&command), "9  2026-01-01T00:00:00Z  command  -  -  machine=1,version=2  \\xff\\x00");
        let json = serde_json::to_value(object(&command)).unwrap();
        assert_eq!((&json["command_base64"], &json["machine_version"]), (&json!("/wA="), &json!(2)));
    }
}
