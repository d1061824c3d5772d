//! What the library shows: every item that a program can name, with its signature, and every type that stands in one.

use std::collections::{BTreeMap, BTreeSet};

use quote::ToTokens;
use syn::visit::{self, Visit};
use syn::{Attribute, Fields, ImplItem, Item, ItemImpl, Signature, TraitItem, Type, Visibility};

use super::source::{Source, Target, has, join, leaves, named};

/// The items that a program can name, and what is wrong with them.
#[derive(Debug, Default)]
pub(crate) struct Surface {
    /// Lines that say what is there, in order.
    pub(crate) lines: Vec<String>,
    /// Names of other crates where a program sees them, and of items that it cannot name.
    pub(crate) leaks: BTreeSet<String>,
}

type Definition = (String, String);

/// What is exported, and under which name; and what another crate defines.
fn exports(source: &Source) -> (BTreeMap<Definition, String>, BTreeSet<String>) {
    type Found = (BTreeMap<Definition, String>, BTreeSet<String>);
    fn walk(source: &Source, module: &str, shown: &str, found: &mut Found) {
        for item in source.items(module) {
            match item {
                Item::Use(import) if is_public(&import.vis) && !hidden(&import.attrs) => {
                    for (name, path) in leaves(&import.tree) {
                        match source.resolve(module, &path) {
                            Target::Item(from, own) => {
                                found.0.entry((from, own)).or_insert_with(|| join(shown, &name));
                            }
                            Target::Module(from) if name == "*" => walk(source, &from, shown, found),
                            Target::Module(from) => walk(source, &from, &join(shown, &name), found),
                            Target::Foreign(vendor) => {
                                found.1.insert(format!("{} is of {vendor}", join(shown, &name)));
                            }
                            Target::Plain => panic!("{} exports what was not found", join(module, &name)),
                        }
                    }
                }
                _ => match named(item) {
                    Some((name, attributes, visibility)) if is_public(visibility) && !hidden(attributes) => {
                        match item {
                            Item::Mod(_) => walk(source, &join(module, &name), &join(shown, &name), found),
                            _ => {
                                found.0.insert((module.to_owned(), name.clone()), join(shown, &name));
                            }
                        }
                    }
                    _ => {}
                },
            }
        }
    }
    let mut found = Found::default();
    walk(source, "", "", &mut found);
    found
}

fn is_public(visibility: &Visibility) -> bool {
    matches!(visibility, Visibility::Public(_))
}

fn hidden(attributes: &[Attribute]) -> bool {
    has(attributes, "doc", "hidden")
}

/// Tokens as people write them, as far as that is easily done.
fn shown(tokens: impl ToTokens) -> String {
    let mut text = tokens.to_token_stream().to_string();
    for (from, to) in [
        (" :: ", "::"),
        (" < ", "<"),
        (" >", ">"),
        ("< ", "<"),
        (" ,", ","),
        (" : ", ": "),
        ("& ", "&"),
        (" (", "("),
        ("( ", "("),
        (" )", ")"),
        (" ;", ";"),
        (", >", ">"),
        (",)", ")"),
    ] {
        text = text.replace(from, to);
    }
    text
}

/// The names in a signature.
struct Names<'a>(&'a mut Vec<Vec<String>>);

impl Visit<'_> for Names<'_> {
    fn visit_path(&mut self, path: &syn::Path) {
        self.0.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        visit::visit_path(self, path);
    }

    // Neither bodies nor documentation are part of a signature.
    fn visit_block(&mut self, _: &syn::Block) {}
    fn visit_attribute(&mut self, _: &Attribute) {}
    fn visit_expr(&mut self, _: &syn::Expr) {}
}

/// What one item shows.
#[derive(Default)]
struct Shown {
    lines: Vec<String>,
    names: Vec<Vec<String>>,
    /// That a trait is implemented shows no more of ours than a program can name.
    of_trait: bool,
}

impl Shown {
    fn line(&mut self, line: impl Into<String>) {
        self.lines.push(line.into());
    }

    fn ty(&mut self, ty: &Type) {
        Names(&mut self.names).visit_type(ty);
    }

    fn generics(&mut self, generics: &syn::Generics) -> String {
        Names(&mut self.names).visit_generics(generics);
        shown(generics)
            + &generics.where_clause.as_ref().map_or(String::new(), |clause| format!(" {}", shown(clause)))
    }

    fn signature(&mut self, indent: &str, signature: &Signature) {
        Names(&mut self.names).visit_signature(signature);
        self.line(format!("{indent}{}", shown(signature)));
    }

    fn fields(&mut self, indent: &str, fields: &Fields, all: bool) {
        let mut private = false;
        for (at, field) in fields.iter().enumerate() {
            // An error converts from what it is made `from`, whoever may see the field.
            if has(&field.attrs, "from", "") {
                self.ty(&field.ty);
            }
            if !all && !is_public(&field.vis) || hidden(&field.attrs) {
                private = true;
                continue;
            }
            self.ty(&field.ty);
            let name = field.ident.as_ref().map_or(at.to_string(), ToString::to_string);
            self.line(format!("{indent}{name}: {}", shown(&field.ty)));
        }
        if private {
            self.line(format!("{indent}.."));
        }
    }

    fn item(&mut self, name: &str, item: &Item) {
        let traits = |attributes: &[Attribute]| {
            let mut said: Vec<_> = attributes
                .iter()
                .filter(|a| a.path().is_ident("derive"))
                .filter_map(|a| a.meta.require_list().ok())
                .map(|list| shown(&list.tokens))
                .collect();
            said.extend(has(attributes, "non_exhaustive", "").then(|| "non_exhaustive".to_owned()));
            if said.is_empty() { String::new() } else { format!("  [{}]", said.join(", ")) }
        };
        match item {
            Item::Struct(item) => {
                let generics = self.generics(&item.generics);
                self.line(format!("struct {name}{generics}{}", traits(&item.attrs)));
                self.fields("    ", &item.fields, false);
            }
            Item::Enum(item) => {
                let generics = self.generics(&item.generics);
                self.line(format!("enum {name}{generics}{}", traits(&item.attrs)));
                for variant in item.variants.iter().filter(|variant| !hidden(&variant.attrs)) {
                    self.line(format!("    {}", variant.ident));
                    self.fields("        ", &variant.fields, true);
                }
            }
            Item::Trait(item) => {
                let generics = self.generics(&item.generics);
                item.supertraits
                    .iter()
                    .for_each(|bound| Names(&mut self.names).visit_type_param_bound(bound));
                self.line(format!("trait {name}{generics}: {}", shown(&item.supertraits)));
                for part in &item.items {
                    match part {
                        TraitItem::Fn(part) if !hidden(&part.attrs) => {
                            self.signature(
                                if part.default.is_some() { "    default " } else { "    " },
                                &part.sig,
                            );
                        }
                        TraitItem::Type(part) => {
                            part.bounds
                                .iter()
                                .for_each(|bound| Names(&mut self.names).visit_type_param_bound(bound));
                            self.line(format!("    type {}: {}", part.ident, shown(&part.bounds)));
                        }
                        TraitItem::Const(part) => {
                            self.ty(&part.ty);
                            self.line(format!("    const {}: {}", part.ident, shown(&part.ty)));
                        }
                        _ => {}
                    }
                }
            }
            Item::Fn(item) => {
                Names(&mut self.names).visit_signature(&item.sig);
                self.line(shown(&item.sig));
            }
            Item::Const(item) => {
                self.ty(&item.ty);
                self.line(format!("const {name}: {}", shown(&item.ty)));
            }
            Item::Static(item) => {
                self.ty(&item.ty);
                self.line(format!("static {name}: {}", shown(&item.ty)));
            }
            Item::Type(item) => {
                self.ty(&item.ty);
                let generics = self.generics(&item.generics);
                self.line(format!("type {name}{generics} = {}", shown(&item.ty)));
            }
            _ => {}
        }
    }

    fn implementation(&mut self, name: &str, block: &ItemImpl) {
        if let Some((_, path, _)) = &block.trait_ {
            self.of_trait = true;
            Names(&mut self.names).visit_path(path);
            self.line(format!("impl {} for {name}", shown(path)));
            for part in &block.items {
                if let ImplItem::Type(part) = part {
                    self.ty(&part.ty);
                }
            }
            return;
        }
        let is_shown = |part: &&ImplItem| match part {
            ImplItem::Fn(part) => is_public(&part.vis) && !hidden(&part.attrs),
            ImplItem::Const(part) => is_public(&part.vis) && !hidden(&part.attrs),
            _ => false,
        };
        let parts: Vec<_> = block.items.iter().filter(is_shown).collect();
        if parts.is_empty() {
            return;
        }
        let generics = self.generics(&block.generics);
        self.line(format!("impl{generics} {name}"));
        for part in parts {
            match part {
                ImplItem::Fn(part) => self.signature("    ", &part.sig),
                ImplItem::Const(part) => {
                    self.ty(&part.ty);
                    self.line(format!("    const {}: {}", part.ident, shown(&part.ty)));
                }
                _ => {}
            }
        }
    }
}

/// The surface of `source`, in which no crate but `allowed` may be seen.
pub(crate) fn of(source: &Source, allowed: &[&str]) -> Surface {
    let (exports, leaks) = exports(source);
    let mut told: BTreeMap<String, Vec<Shown>> = BTreeMap::new();
    let mut surface = Surface { leaks, ..Surface::default() };
    let mut tell = |surface: &mut Surface, module: &str, name: &str, shown: Shown| {
        for path in &shown.names {
            match source.resolve(module, path) {
                Target::Foreign(named) if !allowed.contains(&named.as_str()) => {
                    surface.leaks.insert(format!("{name} shows {}, of {named}", path.join("::")));
                }
                Target::Item(from, own)
                    if !shown.of_trait && !exports.contains_key(&(from.clone(), own.clone())) =>
                {
                    surface
                        .leaks
                        .insert(format!("{name} shows {}, which is not exported", join(&from, &own)));
                }
                _ => {}
            }
        }
        told.entry(name.to_owned()).or_default().push(shown);
    };
    for (module, items) in source.modules() {
        for item in items {
            let mut shown = Shown::default();
            if let Item::Impl(block) = item {
                let Type::Path(own) = &*block.self_ty else { continue };
                let path: Vec<_> =
                    own.path.segments.iter().map(|segment| segment.ident.to_string()).collect();
                let Target::Item(from, own) = source.resolve(module, &path) else { continue };
                let Some(name) = exports.get(&(from, own)) else { continue };
                // A trait that a program cannot name shows it nothing.
                let of_ours = block.trait_.as_ref().and_then(|(_, path, _)| {
                    let path: Vec<_> =
                        path.segments.iter().map(|segment| segment.ident.to_string()).collect();
                    match source.resolve(module, &path) {
                        Target::Item(from, own) => Some((from, own)),
                        _ => None,
                    }
                });
                if of_ours.is_some_and(|definition| !exports.contains_key(&definition)) {
                    continue;
                }
                shown.implementation(name, block);
                tell(&mut surface, module, name, shown);
            } else if let Some((own, _, _)) = named(item)
                && let Some(name) = exports.get(&(module.clone(), own))
            {
                shown.item(name, item);
                tell(&mut surface, module, name, shown);
            }
        }
    }
    for shown in told.into_values() {
        // What it is, then what it implements.
        let (mut implementations, items): (Vec<_>, Vec<_>) = shown
            .into_iter()
            .map(|shown| shown.lines)
            .partition(|lines| lines.first().is_none_or(|line| line.starts_with("impl")));
        implementations.sort();
        surface.lines.extend(items.into_iter().chain(implementations).flatten());
    }
    surface
}
