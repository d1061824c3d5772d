//! The settings that only a restart changes, for those who ask a running node.

use serde_json::Value;

use super::ServeConfig;
use super::table::{ROWS, TakesEffect};

impl ServeConfig {
    /// The settings that take effect when the node is started, by their names in the configuration file and with the
    /// values that the node was started with, defaults included. Addresses are as configured: a free port is 0.
    pub(crate) fn fixed_settings(&self) -> Vec<(&'static str, Value)> {
        let fixed = ROWS.iter().filter(|row| row.effect == TakesEffect::Restart);
        fixed.map(|row| (row.name, (row.value)(self))).collect()
    }
}
