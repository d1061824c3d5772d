//! The types that settings are given as, and how what a node has is told.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, ValueEnum, value_parser};
use serde_json::Value;

use super::{LogFormat, Peers, ReserveBytes};
use crate::trust::port::ClientCertificates;
use crate::trust::settings::{PeerAuth, PeerSecret};

/// What is read from an argument.
pub(super) trait FromArgument: Sized {
    /// Has `arg` parsed as this.
    fn parsed(arg: Arg) -> Arg;

    /// What argument `name` was given, if anything.
    fn taken(matches: &ArgMatches, name: &str) -> Option<Self>;
}

macro_rules! given {
    ($($given:ty),+) => { $(
        impl FromArgument for $given {
            fn parsed(arg: Arg) -> Arg {
                arg.value_parser(value_parser!($given))
            }

            fn taken(matches: &ArgMatches, name: &str) -> Option<Self> {
                matches.get_one::<Self>(name).cloned()
            }
        }
    )+ };
}

given!(u64, usize, bool, String, PathBuf, LogFormat, Peers, ReserveBytes, PeerAuth, ClientCertificates);

/// Whatever it is: a text that cannot be one is refused later, and not repeated.
impl FromArgument for PeerSecret {
    fn parsed(arg: Arg) -> Arg {
        arg.value_parser(value_parser!(String))
    }

    fn taken(matches: &ArgMatches, name: &str) -> Option<Self> {
        matches.get_one::<String>(name).map(Self::new)
    }
}

/// Several, with commas between them or given one by one.
impl FromArgument for Vec<String> {
    fn parsed(arg: Arg) -> Arg {
        arg.value_parser(value_parser!(String)).action(ArgAction::Append).value_delimiter(',')
    }

    fn taken(matches: &ArgMatches, name: &str) -> Option<Self> {
        matches.get_many(name).map(|all| all.cloned().collect())
    }
}

/// What is told as JSON.
pub(super) trait ToJson {
    fn value(&self) -> Value;
}

macro_rules! told {
    ($($told:ty),+) => { $(
        impl ToJson for $told {
            fn value(&self) -> Value {
                self.clone().into()
            }
        }
    )+ };
}

told!(u64, usize, bool, String, Vec<String>, Value);

impl ToJson for ClientCertificates {
    fn value(&self) -> Value {
        self.to_possible_value().map(|auth| auth.get_name().to_owned()).into()
    }
}

impl ToJson for PeerAuth {
    fn value(&self) -> Value {
        self.to_possible_value().map(|auth| auth.get_name().to_owned()).into()
    }
}

impl ToJson for LogFormat {
    fn value(&self) -> Value {
        self.to_possible_value().map(|format| format.get_name().to_owned()).into()
    }
}
