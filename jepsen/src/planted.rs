//! Planted bugs: would the simulation notice? Each file in `planted/` is one: which lines it changes, which test is to fail
//! for it, and with which words. Nothing of them is in the program; a copy of the tree is changed, built and tested.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::verdict::Verdict;

#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct Config {
    /// The repository
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub(crate) tree: PathBuf,
    /// Only the bugs whose names contain this
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(crate) only: String,
    /// Seeds within which each has to be found
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub(crate) seeds: u32,
}

/// One planted bug.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bug {
    #[serde(skip)]
    name: String,
    /// What it does, for people.
    what: String,
    file: PathBuf,
    /// Text that occurs once in the file, and what takes its place.
    before: String,
    after: String,
    /// The test that is to fail, and a part of what it says then.
    test: String,
    finds: String,
}

/// What became of one.
#[derive(Debug, Serialize)]
struct Found {
    bug: String,
    what: String,
    found: bool,
    /// The first line of the failure.
    by: Option<String>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Results {
    pub(crate) verdict: Verdict,
    bugs: Vec<Found>,
}

/// What a copy of the tree needs of it.
const SOURCES: [&str; 9] =
    ["Cargo.toml", "Cargo.lock", ".clippy.toml", "src", "proto", "cluster", "jepsen", "docs", "tests"];

/// All planted bugs of the tree, by their names.
fn all(tree: &Path) -> anyhow::Result<Vec<Bug>> {
    let mut bugs = Vec::new();
    for entry in fs::read_dir(tree.join("jepsen/planted")).context("this is no tree with planted bugs")? {
        let path = entry?.path();
        let text = fs::read_to_string(&path)?;
        let mut bug: Bug = toml::from_str(&text).with_context(|| path.display().to_string())?;
        bug.name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        bugs.push(bug);
    }
    bugs.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(bugs)
}

impl Bug {
    /// The file with the bug in it, made of the file without.
    fn plant(&self, source: &str) -> anyhow::Result<String> {
        let times = source.matches(&self.before).count();
        ensure!(times == 1, "{}: what it changes in {} occurs {times} times", self.name, self.file.display());
        Ok(source.replace(&self.before, &self.after))
    }
}

/// Plants one bug after the other, and sees whether each is found.
///
/// # Errors
/// When a bug does not fit the tree any more, or the tree does not build with it.
pub(crate) fn run(config: &Config) -> anyhow::Result<Results> {
    let tree = fs::canonicalize(&config.tree)?;
    // What the tree has built of other crates is not built again.
    let target = tree.join("target");
    let copy = target.join("planted");
    let mut found = Vec::new();
    for bug in all(&tree)?.iter().filter(|bug| bug.name.contains(&config.only)) {
        copy_tree(&tree, &copy)?;
        let file = copy.join(&bug.file);
        fs::write(&file, bug.plant(&fs::read_to_string(&file)?)?)?;
        let by = test(&copy, &target, bug, config.seeds)?;
        writeln!(std::io::stderr(), "{}: {}", bug.name, by.as_deref().unwrap_or("NOT FOUND"))?;
        found.push(Found { bug: bug.name.clone(), what: bug.what.clone(), found: by.is_some(), by });
    }
    ensure!(!found.is_empty(), "no planted bug is called like \"{}\"", config.only);
    let all_found = found.iter().all(|found| found.found);
    Ok(Results { verdict: if all_found { Verdict::Valid } else { Verdict::Invalid }, bugs: found })
}

/// Makes `copy` what `tree` is. Files that are the same keep their times, so that little is built again.
fn copy_tree(tree: &Path, copy: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(copy)?;
    for source in SOURCES {
        copy_changed(&tree.join(source), &copy.join(source)).with_context(|| source.to_owned())?;
    }
    Ok(())
}

fn copy_changed(from: &Path, to: &Path) -> anyhow::Result<()> {
    if from.is_file() {
        let content = fs::read(from)?;
        if fs::read(to).ok().as_deref() != Some(&content) {
            fs::write(to, content)?;
        }
        return Ok(());
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(to)? {
        let gone = entry?.path();
        if !from.join(gone.file_name().unwrap_or_default()).exists() {
            if gone.is_dir() { fs::remove_dir_all(gone)? } else { fs::remove_file(gone)? }
        }
    }
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if entry.file_name() == "target" {
            continue;
        }
        copy_changed(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

/// Runs the test that is to fail. What it says, if it is what it was to say.
fn test(copy: &Path, target: &Path, bug: &Bug, seeds: u32) -> anyhow::Result<Option<String>> {
    let cargo = |args: &[&str]| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["test", "--test", "simulation"]).args(args).current_dir(copy);
        cargo.env("QUORATE_SIM_SEEDS", seeds.to_string()).env("CARGO_TARGET_DIR", target);
        cargo
    };
    let built = cargo(&["--no-run"]).output()?;
    if !built.status.success() {
        bail!("{} does not build: {}", bug.name, String::from_utf8_lossy(&built.stderr));
    }
    let output = cargo(&["--", "--exact", &bug.test]).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(said.contains("running 1 test"), "{}: there is no test called {}", bug.name, bug.test);
    let failure = said.lines().find(|line| line.starts_with("seed ") && line.contains(&bug.finds));
    let failure = failure.or_else(|| said.lines().find(|line| line.contains(&bug.finds)));
    Ok(failure.filter(|_| !output.status.success()).map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever changes what a bug changes is told here, and not when somebody runs them all.
    #[test]
    fn every_planted_bug_fits_the_tree() {
        let tree = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let bugs = all(tree).unwrap();
        assert!(bugs.len() >= 6, "{}", bugs.len());
        for bug in bugs {
            let source = fs::read_to_string(tree.join(&bug.file)).unwrap();
            let planted = bug.plant(&source).unwrap();
            assert!(planted != source && !bug.what.is_empty() && !bug.finds.is_empty(), "{}", bug.name);
            let test = bug.test.rsplit("::").next().unwrap();
            let named = |file: &str| fs::read_to_string(tree.join("tests/simulation").join(file)).unwrap().contains(&format!("fn {test}("));
            assert!(["main.rs", "ports.rs", "anywhere.rs"].into_iter().any(named), "{}: {test}", bug.name);
        }
    }
}
