//! Planted bugs: would the simulation notice? Each file in `planted/` is one: which lines it changes, which test is to fail
//! for it, and with which words. Nothing of them is in the program; a copy of the tree is changed, built and tested.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

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
    /// The test of `tests/simulation` that is to fail, and parts of what it says then, of which one is enough.
    test: String,
    finds: Vec<String>,
}

/// What became of one.
#[derive(Debug, Serialize)]
struct Found {
    bug: String,
    what: String,
    found: bool,
    /// The seed that failed, and how; or why nothing could be found.
    by: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Results {
    pub(crate) verdict: Verdict,
    bugs: Vec<Found>,
}

/// A test that does not end by itself is ended.
const PATIENCE: Duration = Duration::from_secs(30 * 60);
/// Seeds that are run without a bug: what fails then anyway proves nothing.
const CONTROL_SEEDS: u32 = 12;

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

    fn plant_in(&self, tree: &Path) -> anyhow::Result<()> {
        let file = tree.join(&self.file);
        Ok(fs::write(&file, self.plant(&fs::read_to_string(&file)?)?)?)
    }
}

/// Plants one bug after the other, and sees whether each is found. Before that, the tests that are to find them have to pass.
///
/// # Errors
/// When no copy of the tree can be made, or the copy does not hold without bugs.
pub(crate) fn run(config: &Config) -> anyhow::Result<Results> {
    let tree = fs::canonicalize(&config.tree)?;
    let copy = Copy { tree: tree.join("target/planted/tree"), target: tree.join("target/planted/target") };
    fs::create_dir_all(&copy.target)?;
    // Held until the end: two runs in one copy would each test what the other has planted.
    let only_run = fs::File::create(copy.target.join("run.lock"))?;
    ensure!(only_run.try_lock().is_ok(), "another run is under way in {}", copy.target.display());
    let bugs = all(&tree)?;
    let chosen: Vec<&Bug> = bugs.iter().filter(|bug| bug.name.contains(&config.only)).collect();
    ensure!(!chosen.is_empty(), "no planted bug is called like \"{}\"", config.only);
    copy.update(&tree)?;
    for test in chosen.iter().map(|bug| &bug.test).collect::<BTreeSet<_>>() {
        let failure = copy.fails(test, CONTROL_SEEDS, "seed")?;
        ensure!(failure.is_none(), "{test} fails without a bug: {}", failure.unwrap_or_default());
    }
    let mut found = Vec::new();
    for bug in chosen {
        copy.update(&tree)?;
        let outcome =
            bug.plant_in(&copy.tree).and_then(|()| copy.fails(&bug.test, config.seeds, &bug.finds.join("|")));
        let (is_found, by) = match outcome {
            Ok(Some(failure)) => (true, failure),
            Ok(None) => (false, format!("{} seeds", config.seeds)),
            Err(error) => (false, format!("{error:#}")),
        };
        writeln!(std::io::stderr(), "{}: {}: {by}", bug.name, if is_found { "found" } else { "NOT FOUND" })?;
        found.push(Found { bug: bug.name.clone(), what: bug.what.clone(), found: is_found, by });
    }
    let all_found = found.iter().all(|found| found.found);
    Ok(Results { verdict: if all_found { Verdict::Valid } else { Verdict::Invalid }, bugs: found })
}

/// A copy of the tree, and what is built of it: apart from what is built of the tree, which would be taken for its own.
struct Copy {
    tree: PathBuf,
    target: PathBuf,
}

impl Copy {
    /// Makes the copy what `tree` is. Files that are the same keep their times, so that little is built again.
    fn update(&self, tree: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(&self.tree)?;
        for source in SOURCES {
            copy_changed(&tree.join(source), &self.tree.join(source)).with_context(|| source.to_owned())?;
        }
        Ok(())
    }

    /// Runs a test until a seed fails with one of `words`. What that seed says, if one does.
    fn fails(&self, test: &str, seeds: u32, words: &str) -> anyhow::Result<Option<String>> {
        let said = self.target.join("said.txt");
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(["test", "--test", "simulation", "--", "--exact", test]).current_dir(&self.tree);
        cargo.env("CARGO_TARGET_DIR", &self.target).env("QUORATE_SIM_SEEDS", seeds.to_string());
        cargo.env("QUORATE_SIM_FINDS", words);
        let output = fs::File::create(&said)?;
        let mut running = cargo.stdout(output.try_clone()?).stderr(output).spawn()?;
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match running.try_wait()? {
                Some(status) => break status,
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(200)),
                None => {
                    running.kill()?;
                    running.wait()?;
                    bail!("{test} does not end");
                }
            }
        };
        let said = fs::read_to_string(&said)?;
        if !said.contains("running 1 test") {
            let tail: Vec<_> = said.lines().rev().take(20).collect();
            bail!("{test} is not run: {}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        let found = said.lines().find_map(|line| line.strip_prefix("found by "));
        ensure!(status.success() || found.is_some(), "{test} fails for another reason: {said}");
        Ok(found.map(str::to_owned))
    }
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
            let tests = fs::read_dir(tree.join("tests/simulation")).unwrap();
            let is_named = tests
                .map(|file| fs::read_to_string(file.unwrap().path()).unwrap())
                .any(|source| source.contains(&format!("fn {test}(")));
            assert!(is_named, "{}: there is no test {test}", bug.name);
        }
    }
}
