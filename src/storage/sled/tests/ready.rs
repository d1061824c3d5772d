//! The ready file: before it nothing was promised, after it nothing may be made anew.

use super::*;

/// A log with two entries, closed.
fn with_entries() -> Home {
    let home = Home::new();
    append(&open(&home.log()).unwrap(), vec![command(1, 0, 10), command(1, 1, 10)]).unwrap();
    home
}

fn remove_marker(home: &Home) {
    fs::remove_file(Marker::path(&home.log())).unwrap();
}

#[test]
fn a_log_that_was_never_ready_is_made_anew_if_it_does_not_open() {
    let home = with_entries();
    remove_marker(&home);
    for path in files::list(&home.log()).unwrap() {
        if path.is_file() {
            fs::write(&path, b"not what sled expects here").unwrap();
        }
    }
    let store = open(&home.log()).unwrap();
    assert_eq!(all(&store).unwrap(), []);
    assert!(Marker::path(&home.log()).exists());
    let paths = files::list(home.0.path()).unwrap();
    let aside = paths.iter().find(|path| path.to_string_lossy().contains("log.aside-")).unwrap();
    assert_eq!(fs::read(aside.join("db")).unwrap(), b"not what sled expects here", "nothing was destroyed");
}

#[test]
fn a_log_that_was_never_ready_is_kept_if_it_opens() {
    let home = with_entries();
    remove_marker(&home);
    assert_eq!(all(&open(&home.log()).unwrap()).unwrap().len(), 2);
    assert!(Marker::path(&home.log()).exists());
}

#[test]
fn a_log_that_was_ready_and_is_gone_is_lost() {
    for missing in ["", "db", "conf"] {
        let home = with_entries();
        let path = if missing.is_empty() { home.log() } else { home.log().join(missing) };
        if path.is_dir() {
            fs::remove_dir_all(&path).unwrap()
        } else {
            fs::remove_file(&path).unwrap()
        }
        let before = files::list(home.0.path()).unwrap();
        let error = open(&home.log()).unwrap_err();
        assert!(matches!(error, StorageError::Lost { missing, .. } if missing == path));
        assert!(!path.exists(), "nothing was changed");
        assert_eq!(files::list(home.0.path()).unwrap(), before);
    }
}

#[test]
fn a_log_that_was_ready_and_does_not_open_is_corrupt() {
    let home = with_entries();
    fs::write(home.log().join("db"), b"").unwrap();
    for _ in 0..2 {
        assert!(matches!(open(&home.log()), Err(StorageError::Corrupt { .. })));
    }
}

#[test]
fn every_open_writes_through_sled_and_counts_it() {
    let home = with_entries();
    let mark = || Marker::open(&Marker::path(&home.log())).unwrap().unwrap().1;
    let before = mark();
    drop(open(&home.log()).unwrap());
    assert_eq!(mark(), before + 1);
}

#[test]
fn an_older_copy_of_the_log_is_noticed() {
    let home = with_entries();
    let old = home.copy();
    append(&open(&home.log()).unwrap(), vec![command(1, 2, 10)]).unwrap();
    fs::remove_dir_all(home.log()).unwrap();
    copy_directory(&old.log(), &home.log());
    for _ in 0..2 {
        let error = open(&home.log()).unwrap_err();
        assert!(
            matches!(&error, StorageError::Corrupt { detail, .. } if detail.contains("lost acknowledged"))
        );
    }
}

#[test]
fn a_torn_snapshot_of_sled_is_removed() {
    let home = with_entries();
    let torn = home.log().join("snap.FFFFFFFFFFFFFFFF.generating");
    fs::write(&torn, b"torn").unwrap();
    assert_eq!(all(&open(&home.log()).unwrap()).unwrap().len(), 2);
    assert!(!torn.exists());
}

#[test]
fn a_log_is_open_once() {
    let home = with_entries();
    let held = open(&home.log()).unwrap();
    assert!(matches!(open(&home.log()), Err(StorageError::InUse { .. })));
    remove_marker(&home);
    assert!(matches!(open(&home.log()), Err(StorageError::InUse { .. })), "and not made anew either");
    assert_eq!(all(&held).unwrap().len(), 2);
    drop(held);
    open(&home.log()).unwrap();
}

#[test]
fn a_blob_is_fatal() {
    let home = with_entries();
    fs::write(home.log().join("blobs/1"), b"x").unwrap();
    assert!(matches!(open(&home.log()), Err(StorageError::Corrupt { .. })));
    fs::remove_file(home.log().join("blobs/1")).unwrap();

    let store = open(&home.log()).unwrap();
    fs::write(home.log().join("blobs/1"), b"x").unwrap();
    let outcome = (2..2000).try_for_each(|index| append(&store, vec![command(1, index, 60_000)]));
    assert!(outcome.unwrap_err().to_string().contains("blobs"));
}
