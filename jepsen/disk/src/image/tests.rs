use super::*;

const CUTS: [Cut; 6] = [
    Cut::DropUnsynced,
    Cut::Subset,
    Cut::Torn { sector_bytes: 512 },
    Cut::Torn { sector_bytes: 4096 },
    Cut::Prefix,
    Cut::DataWithoutLength,
];
const FILE: Kind = Kind::File { bytes: 0 };

fn name(name: &str) -> &OsStr {
    OsStr::new(name)
}

fn read(image: &Image, path: &str) -> Option<Vec<u8>> {
    image.content_at(Path::new(path)).map(<[u8]>::to_vec)
}

#[test]
fn what_is_synced_survives_every_cut() {
    for names in [Names::WithFile, Names::WithDirectoryOnly] {
        let mut image = Image::new(names);
        let directory = image.create(ROOT, name("directory"), Kind::Directory).unwrap();
        image.sync(ROOT).unwrap();
        let file = image.create(directory, name("aside"), FILE).unwrap();
        image.write(file, 0, b"content").unwrap();
        image.set_length(file, 4).unwrap();
        image.sync(file).unwrap();
        image.rename((directory, name("aside")), (directory, name("file"))).unwrap();
        image.sync(directory).unwrap();
        assert_eq!(image.unsynced(), 0);
        for (cut, seed) in CUTS.into_iter().flat_map(|cut| (0..20).map(move |seed| (cut, seed))) {
            let left = image.after(cut, seed);
            assert_eq!(read(&left, "directory/file").as_deref(), Some(b"cont".as_slice()), "{cut:?}");
            assert_eq!(read(&left, "directory/aside"), None);
            let inode = left.lookup(ROOT, name("directory")).unwrap();
            assert_ne!(inode, directory, "numbers are new");
            assert_eq!(left.path(inode), Some("directory".into()));
        }
    }
}

#[test]
fn what_is_not_synced_is_lost_by_some_cuts_and_kept_by_some() {
    let mut image = Image::new(Names::WithDirectoryOnly);
    let file = image.create(ROOT, name("file"), FILE).unwrap();
    image.write(file, 0, &[1; 8192]).unwrap();
    image.sync(file).unwrap();
    image.sync(ROOT).unwrap();
    image.write(file, 4096, &[2; 8192]).unwrap();
    image.create(ROOT, name("other"), FILE).unwrap();

    let old = [1; 8192].to_vec();
    let new = [[1; 4096].as_slice(), &[2; 8192]].concat();
    let left = image.after(Cut::DropUnsynced, 1);
    assert_eq!(read(&left, "file"), Some(old.clone()));
    assert_eq!(read(&left, "other"), None);
    let left = image.after(Cut::DataWithoutLength, 1);
    assert_eq!(read(&left, "file"), Some(new[..8192].to_vec()));

    let outcomes =
        |cut| -> Vec<Option<Vec<u8>>> { (0..64).map(|seed| read(&image.after(cut, seed), "file")).collect() };
    let half = [[1; 4096].as_slice(), &[2; 4096]].concat();
    for (cut, expected) in [(Cut::Subset, [&old, &new]), (Cut::Prefix, [&half, &new])] {
        let outcomes = outcomes(cut);
        for content in expected {
            assert!(outcomes.contains(&Some(content.clone())), "{cut:?}");
        }
    }
    for sector_bytes in [512, 4096] {
        for torn in outcomes(Cut::Torn { sector_bytes }).into_iter().flatten() {
            for sector in torn.chunks(sector_bytes) {
                assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is written whole");
            }
        }
    }
    assert_eq!(outcomes(Cut::Torn { sector_bytes: 512 }), outcomes(Cut::Torn { sector_bytes: 512 }));
    let others = (0..64).filter(|seed| read(&image.after(Cut::Subset, *seed), "other").is_some()).count();
    assert!((1..64).contains(&others));
}

#[test]
fn a_name_is_durable_with_its_file_or_with_its_directory_only() {
    for (names, expected) in [(Names::WithFile, true), (Names::WithDirectoryOnly, false)] {
        let mut image = Image::new(names);
        let file = image.create(ROOT, name("file"), FILE).unwrap();
        image.write(file, 0, b"x").unwrap();
        image.sync(file).unwrap();
        let left = image.after(Cut::DropUnsynced, 1);
        assert_eq!(read(&left, "file").is_some(), expected, "{names:?}");
    }
}

#[test]
fn an_interrupted_rename_leaves_one_of_both_names() {
    let mut image = Image::new(Names::WithDirectoryOnly);
    for (file, content) in [("old", b"old"), ("new", b"new")] {
        let file = image.create(ROOT, name(file), FILE).unwrap();
        image.write(file, 0, content).unwrap();
        image.sync(file).unwrap();
    }
    image.sync(ROOT).unwrap();
    image.rename((ROOT, name("new")), (ROOT, name("old"))).unwrap();
    let mut seen = [false; 2];
    for seed in 0..64 {
        let left = image.after(Cut::Subset, seed);
        match (read(&left, "old").as_deref(), read(&left, "new").as_deref()) {
            (Some(b"old"), Some(b"new")) => seen[0] = true,
            (Some(b"new"), None) => seen[1] = true,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(seen, [true; 2]);
}

#[test]
fn what_a_program_sees_is_compared() {
    let mut image = Image::new(Names::WithFile);
    let directory = image.create(ROOT, name("directory"), Kind::Directory).unwrap();
    let file = image.create(directory, name("file"), FILE).unwrap();
    image.write(file, 0, b"content").unwrap();
    let before = image.clone();
    image.sync(file).unwrap();
    image.write(file, 0, b"con").unwrap();
    assert!(image.shows_the_same(&before));
    for change in [
        |image: &mut Image, file, _| image.write(file, 0, b"other").unwrap(),
        |image: &mut Image, file, _| image.set_length(file, 6).unwrap(),
        |image: &mut Image, _, directory| image.remove(directory, name("file")).unwrap(),
        |image: &mut Image, _, _| {
            image.create(ROOT, name("file"), FILE).unwrap();
        },
    ] {
        let mut image = image.clone();
        change(&mut image, file, directory);
        assert!(!image.shows_the_same(&before) && !before.shows_the_same(&image));
    }
}

#[test]
fn names_that_do_not_fit_are_refused() {
    let mut image = Image::new(Names::WithFile);
    let directory = image.create(ROOT, name("directory"), Kind::Directory).unwrap();
    let file = image.create(directory, name("file"), FILE).unwrap();
    assert_eq!(image.create(directory, name("file"), FILE), Err(Refusal::Exists));
    assert_eq!(image.remove(ROOT, name("directory")), Err(Refusal::NotEmpty));
    assert_eq!(image.remove(ROOT, name("none")), Err(Refusal::Missing));
    assert_eq!(image.create(file, name("below"), FILE), Err(Refusal::NotADirectory));
    assert_eq!(image.write(directory, 0, b"x"), Err(Refusal::IsADirectory));
    image.remove(directory, name("file")).unwrap();
    image.write(file, 0, b"open").unwrap();
    assert_eq!(image.read(file, 1, 100), Ok(b"pen".as_slice()));
    assert_eq!(image.path(file), None);
}
