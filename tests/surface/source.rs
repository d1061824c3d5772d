//! The library's source as modules, and what a path in it means.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use syn::{Attribute, Item, UseTree, Visibility};

/// Where a name leads.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Target {
    /// A module of ours, by its path from the root.
    Module(String),
    /// An item of ours: its module, and its name.
    Item(String, String),
    /// Another crate's.
    Foreign(String),
    /// The standard library's, a generic parameter, or a name of the language.
    Plain,
}

/// All modules by their paths, `""` for the root.
pub(crate) struct Source {
    modules: BTreeMap<String, Vec<Item>>,
    /// Names of other crates.
    crates: Vec<String>,
}

pub(crate) fn has(attributes: &[Attribute], name: &str, within: &str) -> bool {
    let found = |attribute: &Attribute| match &attribute.meta {
        syn::Meta::List(list) => {
            let words = list.tokens.to_string();
            words.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == within)
        }
        _ => within.is_empty(),
    };
    attributes.iter().any(|attribute| attribute.path().is_ident(name) && found(attribute))
}

/// Whether an item is there for tests only.
fn in_tests_only(attributes: &[Attribute]) -> bool {
    has(attributes, "cfg", "test") && !has(attributes, "cfg", "feature")
}

pub(crate) fn join(module: &str, name: &str) -> String {
    if module.is_empty() { name.to_owned() } else { format!("{module}::{name}") }
}

/// A name of an item, with its attributes and visibility; none for what has no name.
pub(crate) fn named(item: &Item) -> Option<(String, &[Attribute], &Visibility)> {
    Some(match item {
        Item::Const(i) => (i.ident.to_string(), &i.attrs, &i.vis),
        Item::Enum(i) => (i.ident.to_string(), &i.attrs, &i.vis),
        Item::Fn(i) => (i.sig.ident.to_string(), &i.attrs, &i.vis),
        Item::Mod(i) => (i.ident.to_string(), &i.attrs, &i.vis),
        Item::Static(i) => (i.ident.to_string(), &i.attrs, &i.vis),
        Item::Struct(i) => (i.ident.to_string(), &i.attrs, &i.vis),
        Item::Trait(i) => (i.ident.to_string(), &i.attrs, &i.vis),
        Item::Type(i) => (i.ident.to_string(), &i.attrs, &i.vis),
        _ => return None,
    })
}

/// The leaves of an import: the name that each binds, `*` for all names, and its path.
pub(crate) fn leaves(tree: &UseTree) -> Vec<(String, Vec<String>)> {
    fn walk(tree: &UseTree, path: &mut Vec<String>, out: &mut Vec<(String, Vec<String>)>) {
        match tree {
            UseTree::Path(part) => {
                path.push(part.ident.to_string());
                walk(&part.tree, path, out);
                path.pop();
            }
            UseTree::Group(group) => group.items.iter().for_each(|tree| walk(tree, path, out)),
            UseTree::Glob(_) => out.push(("*".to_owned(), path.clone())),
            UseTree::Name(name) if name.ident == "self" => {
                out.push((path.last().unwrap().clone(), path.clone()));
            }
            UseTree::Name(name) => {
                let full = path.iter().cloned().chain([name.ident.to_string()]).collect();
                out.push((name.ident.to_string(), full));
            }
            UseTree::Rename(name) => {
                let full = path.iter().cloned().chain([name.ident.to_string()]).collect();
                out.push((name.rename.to_string(), full));
            }
        }
    }
    let mut out = Vec::new();
    walk(tree, &mut Vec::new(), &mut out);
    out
}

/// What `item` declares: the enumerations that `named!` in `src/types` makes are part of the surface like any other.
fn expanded(item: Item) -> Vec<Item> {
    let Item::Macro(call) = &item else { return vec![item] };
    if call.ident.is_some() || !call.mac.path.is_ident("named") {
        return vec![item];
    }
    let mut declared: syn::ItemEnum = syn::parse2(call.mac.tokens.clone()).unwrap();
    declared.variants.iter_mut().for_each(|variant| variant.discriminant = None);
    declared.attrs.push(syn::parse_quote!(#[non_exhaustive]));
    let functions = format!(
        "impl {} {{
            pub const ALL: [Self; 0] = [];
            pub const fn name(self) -> &'static str {{ \"\" }}
            pub fn from_name(name: &str) -> Option<Self> {{ None }}
        }}",
        declared.ident
    );
    vec![Item::Enum(declared), syn::parse_str(&functions).unwrap()]
}

impl Source {
    /// The library in `src`, which may name `crates`.
    pub(crate) fn read(src: &Path, crates: Vec<String>) -> Self {
        let mut source = Self { modules: BTreeMap::new(), crates };
        source.load(String::new(), &src.join("lib.rs"), src);
        source
    }

    /// One that is given, as a single file.
    pub(crate) fn of(text: &str, crates: &[&str]) -> Self {
        let mut source =
            Self { modules: BTreeMap::new(), crates: crates.iter().map(|name| (*name).to_owned()).collect() };
        source.add(String::new(), syn::parse_file(text).unwrap().items, Path::new("/nowhere"));
        source
    }

    fn load(&mut self, module: String, file: &Path, within: &Path) {
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        self.add(module, syn::parse_file(&text).unwrap().items, within);
    }

    fn add(&mut self, module: String, items: Vec<Item>, within: &Path) {
        let items: Vec<Item> = items.into_iter().flat_map(expanded).collect();
        for item in &items {
            let Item::Mod(child) = item else { continue };
            if in_tests_only(&child.attrs) {
                continue;
            }
            let name = child.ident.to_string();
            let (path, directory) = (join(&module, &name), within.join(&name));
            match &child.content {
                Some((_, items)) => self.add(path, items.clone(), &directory),
                None => {
                    let files: [PathBuf; 2] = [within.join(format!("{name}.rs")), directory.join("mod.rs")];
                    let file = files.iter().find(|file| file.exists()).unwrap_or(&files[0]);
                    self.load(path, file, &directory);
                }
            }
        }
        self.modules.insert(module, items);
    }

    /// All modules with their items, but for those that are there for tests only.
    pub(crate) fn modules(&self) -> impl Iterator<Item = (&String, impl Iterator<Item = &Item>)> {
        let kept = |item: &&Item| !named(item).is_some_and(|(_, attributes, _)| in_tests_only(attributes));
        self.modules.iter().map(move |(module, items)| (module, items.iter().filter(kept)))
    }

    pub(crate) fn items(&self, module: &str) -> &[Item] {
        self.modules.get(module).map_or(&[], Vec::as_slice)
    }

    /// What `path` means in `module`.
    pub(crate) fn resolve(&self, module: &str, path: &[String]) -> Target {
        self.follow(module, path, 0)
    }

    fn follow(&self, module: &str, path: &[String], depth: usize) -> Target {
        assert!(depth < 64, "{path:?} in {module} leads nowhere");
        let Some((first, rest)) = path.split_first() else { return Target::Module(module.to_owned()) };
        let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
        let next = match first.as_str() {
            "crate" => Target::Module(String::new()),
            "self" => Target::Module(module.to_owned()),
            "super" => Target::Module(parent.to_owned()),
            "std" | "core" | "alloc" => return Target::Plain,
            name => match self.lookup(module, name, depth) {
                Some(target) => target,
                None if self.crates.iter().any(|known| known == name) => {
                    return Target::Foreign(name.to_owned());
                }
                None => return Target::Plain,
            },
        };
        match next {
            Target::Module(module) => self.follow(&module, rest, depth + 1),
            other => other,
        }
    }

    /// What `name` is in `module`: an item, a module, or an import.
    fn lookup(&self, module: &str, name: &str, depth: usize) -> Option<Target> {
        let items = self.modules.get(module)?;
        let same = |item: &&Item| {
            named(item).is_some_and(|(own, attributes, _)| own == name && !in_tests_only(attributes))
        };
        match items.iter().find(same) {
            Some(Item::Mod(_)) => return Some(Target::Module(join(module, name))),
            Some(_) => return Some(Target::Item(module.to_owned(), name.to_owned())),
            None => {}
        }
        let imports = || {
            let uses = items.iter().filter_map(|item| match item {
                Item::Use(import) if !in_tests_only(&import.attrs) => Some(import),
                _ => None,
            });
            uses.flat_map(|import| leaves(&import.tree))
        };
        if let Some((_, path)) = imports().find(|(bound, _)| bound == name) {
            // An import may have the name of the crate that it is from.
            let own = path.len() == 1 && path[0] == name;
            return match own {
                true => self.crates.contains(&path[0]).then(|| Target::Foreign(name.to_owned())),
                false => Some(self.follow(module, &path, depth + 1)),
            };
        }
        let of_globs = imports().filter(|(bound, _)| bound == "*").find_map(|(_, path)| {
            match self.follow(module, &path, depth + 1) {
                Target::Module(from) if from != module => self.lookup(&from, name, depth + 1),
                _ => None,
            }
        });
        // What is included was generated for the protocol, with the traits of its crate.
        let includes = |item: &Item| matches!(item, Item::Macro(call) if call.mac.path.is_ident("include"));
        of_globs.or_else(|| items.iter().any(includes).then(|| Target::Foreign("prost".to_owned())))
    }
}
