//! The record of a run: `store/<workload>/<time>/`.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

/// The directory of one run.
pub(crate) struct Store {
    path: PathBuf,
}

impl Store {
    /// A new directory for a run of `workload`, named by the time.
    pub(crate) fn create(root: &Path, workload: &str) -> anyhow::Result<Self> {
        let parent = root.join(workload);
        fs::create_dir_all(&parent).with_context(|| format!("cannot create {}", parent.display()))?;
        let now_ms = quorate::testkit::runtime::unix_time_ms();
        let path = parent.join(format!("{}.{:03}", timestamp(now_ms / 1000), now_ms % 1000));
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path: fs::canonicalize(path)? })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn write_json(&self, name: &str, value: &impl Serialize) -> anyhow::Result<()> {
        let mut text = serde_json::to_vec_pretty(value)?;
        text.push(b'\n');
        fs::write(self.path.join(name), text).with_context(|| format!("cannot write {name}"))
    }

    /// One JSON object a line.
    pub(crate) fn write_lines<T: Serialize>(&self, name: &str, values: &[T]) -> anyhow::Result<()> {
        let mut file = BufWriter::new(File::create(self.path.join(name))?);
        for value in values {
            serde_json::to_writer(&mut file, value)?;
            writeln!(file)?;
        }
        file.flush().with_context(|| format!("cannot write {name}"))
    }

    /// Removes the nodes' data; after a valid run only their logs are of interest.
    pub(crate) fn keep_only_logs(&self, cluster: &str) -> anyhow::Result<()> {
        for entry in fs::read_dir(self.path.join(cluster))? {
            let data = entry?.path().join("data");
            if data.is_dir() {
                fs::remove_dir_all(&data).with_context(|| format!("cannot remove {}", data.display()))?;
            }
        }
        Ok(())
    }
}

/// `2026-01-31T23-59-58Z`, which every file system takes. Days are counted in eras of 400 years that begin in
/// March, so that the leap day is the last of its year.
fn timestamp(unix_s: u64) -> String {
    let (days, second) = (unix_s / 86_400 + 719_468, unix_s % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}-{minute:02}-{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps() {
        assert_eq!(timestamp(0), "1970-01-01T00-00-00Z");
        assert_eq!(timestamp(951_868_799), "2000-02-29T23-59-59Z");
        assert_eq!(timestamp(951_868_800), "2000-03-01T00-00-00Z");
        assert_eq!(timestamp(1_767_225_599), "2025-12-31T23-59-59Z");
        assert_eq!(timestamp(1_767_225_600), "2026-01-01T00-00-00Z");
    }
}
