//! The structure of `src/`: imports run in one direction, `balance` does not know etcd, files stay
//! short.
//!
//! Imports are read from the text: `use` declarations and paths that begin with `crate::` or
//! `super::`. Unit tests are left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The longest a file may be without its unit tests.
const MAX_LINES: usize = 450;

/// A module's path, without `crate`: `["balance", "pool"]`.
type ModulePath = Vec<String>;

/// A source file without comments and unit tests.
struct Source {
    path: PathBuf,
    lines: usize,
    code: String,
}

/// All modules of the crate, with the names that each re-exports from its children.
struct Crate {
    modules: BTreeMap<ModulePath, Source>,
    reexports: BTreeMap<ModulePath, BTreeMap<String, ModulePath>>,
}

impl Crate {
    fn read() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut modules = BTreeMap::new();
        read_module(&root, "lib.rs".into(), Vec::new(), &mut modules);
        let mut all = Self {
            modules,
            reexports: BTreeMap::new(),
        };
        let mut reexports = BTreeMap::new();
        for (module, source) in &all.modules {
            let names = use_paths(&source.code, Uses::Reexports)
                .into_iter()
                .filter_map(|path| {
                    let name = path.last()?.clone();
                    let target = all.absolute(module, &path)?;
                    Some((name, target))
                })
                .collect();
            reexports.insert(module.clone(), names);
        }
        all.reexports = reexports;
        all
    }

    /// The full path of something that `module` names by `path`; `None` for another crate's.
    fn absolute(&self, module: &ModulePath, path: &[String]) -> Option<ModulePath> {
        let mut base = module.clone();
        let rest = match path.first()?.as_str() {
            "crate" => {
                base.clear();
                &path[1..]
            }
            "self" => &path[1..],
            "super" => {
                let ups = path.iter().take_while(|part| *part == "super").count();
                base.truncate(base.len().checked_sub(ups)?);
                &path[ups..]
            }
            child => {
                let mut inner = base.clone();
                inner.push(child.to_owned());
                if !self.modules.contains_key(&inner) {
                    return None;
                }
                path
            }
        };
        base.extend(rest.iter().cloned());
        Some(base)
    }

    /// The module that defines the item at an absolute path. Follows re-exports.
    fn definition(&self, path: &[String]) -> ModulePath {
        let mut length = path.len();
        while !self.modules.contains_key(&path[..length]) {
            length -= 1;
        }
        let module = path[..length].to_vec();
        let target = path
            .get(length)
            .and_then(|name| self.reexports[&module].get(name));
        match target {
            Some(target) if *target != path => self.definition(target),
            _ => module,
        }
    }

    /// The modules from which each module imports.
    fn imports(&self) -> BTreeMap<&ModulePath, BTreeSet<ModulePath>> {
        let of = |(module, source): (_, &Source)| {
            let mut paths = use_paths(&source.code, Uses::Imports);
            paths.extend(inline_paths(&source.code));
            let imported = paths
                .iter()
                .filter_map(|path| self.absolute(module, path))
                .map(|path| self.definition(&path))
                .filter(|imported| imported != module)
                .collect();
            (module, imported)
        };
        self.modules.iter().map(of).collect()
    }
}

/// Reads a module's file and those of the modules that it declares outside of tests.
fn read_module(
    folder: &Path,
    file: PathBuf,
    module: ModulePath,
    modules: &mut BTreeMap<ModulePath, Source>,
) {
    let path = folder.join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let source = strip(&text);
    let code = source.join("\n");
    let mut for_tests = false;
    for line in &source {
        let line = line.trim();
        if line.starts_with("#[cfg(") && line.contains("test)") || line.contains("(test,") {
            for_tests = true;
            continue;
        }
        let declared = line
            .trim_start_matches("pub(crate) ")
            .trim_start_matches("pub(super) ")
            .trim_start_matches("pub ")
            .strip_prefix("mod ")
            .and_then(|rest| rest.strip_suffix(';'));
        if let (Some(name), false) = (declared, for_tests) {
            let mut child = module.clone();
            child.push(name.to_owned());
            let own = match module.last() {
                None => folder.to_owned(),
                Some(last) if path.ends_with("mod.rs") => {
                    debug_assert!(folder.ends_with(last));
                    folder.to_owned()
                }
                Some(last) => folder.join(last),
            };
            let inner = own.join(name);
            if inner.join("mod.rs").is_file() {
                read_module(&inner, "mod.rs".into(), child, modules);
            } else {
                read_module(&own, format!("{name}.rs").into(), child, modules);
            }
        }
        for_tests = for_tests && line.starts_with("#[");
    }
    let lines = text
        .split("#[cfg(test)]\nmod ")
        .next()
        .unwrap_or(&text)
        .lines()
        .count();
    modules.insert(module, Source { path, lines, code });
}

/// The lines of code: no comments, and nothing from the unit tests' module on. In an inline module,
/// a path that begins with `super` is rewritten as the file's own module would write it: `super` is
/// that module's `self`.
fn strip(text: &str) -> Vec<String> {
    let mut lines = Vec::new();
    let mut all = text.lines().peekable();
    let mut is_inline = false;
    while let Some(line) = all.next() {
        let next_is_tests = all
            .peek()
            .is_some_and(|next| next.starts_with("mod tests {"));
        if line.starts_with("#[cfg(test)]") && next_is_tests {
            break;
        }
        if line.trim_start().starts_with("//") {
            continue;
        }
        let code = line.split(" // ").next().unwrap_or_default();
        if code.starts_with("mod ") && code.ends_with('{') {
            is_inline = true;
        }
        if code == "}" {
            is_inline = false;
        }
        lines.push(if is_inline {
            let outer = code.replace("super::super", "\0");
            outer.replace("super::", "self::").replace('\0', "super")
        } else {
            code.to_owned()
        });
    }
    lines
}

/// Which `use` declarations are looked at. A re-export (`pub use`) makes a name available to others
/// and is no import.
#[derive(Clone, Copy, PartialEq)]
enum Uses {
    Imports,
    Reexports,
}

/// The paths of `use` declarations.
fn use_paths(code: &str, uses: Uses) -> Vec<ModulePath> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("use ") {
        let before = code[..at].rsplit('\n').next().unwrap_or_default().trim();
        let found_uses = match before {
            "" => Uses::Imports,
            _ if before.starts_with("pub") => Uses::Reexports,
            _ => continue,
        };
        if found_uses != uses {
            continue;
        }
        let Some(tree) = code[at + 4..].split(';').next() else {
            continue;
        };
        expand(tree, &[], &mut found);
    }
    found
}

/// The paths of a `use` tree such as `a::{b, c::d as e}`.
fn expand(tree: &str, prefix: &[String], found: &mut Vec<ModulePath>) {
    let tree = tree.trim();
    let Some((head, group)) = tree.split_once('{') else {
        let path = tree.split(" as ").next().unwrap_or_default();
        let parts = path.split("::").map(|part| part.trim().to_owned());
        let mut path: ModulePath = prefix.iter().cloned().chain(parts).collect();
        path.retain(|part| !part.is_empty());
        if path.len() > 1 && path.last().is_some_and(|last| last == "self") {
            path.pop();
        }
        found.push(path);
        return;
    };
    let head = head.split("::").map(|part| part.trim().to_owned());
    let mut inner: ModulePath = prefix.iter().cloned().chain(head).collect();
    inner.retain(|part| !part.is_empty());
    let group = group.trim_end().trim_end_matches('}');
    let (mut depth, mut start) = (0, 0);
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&group[start..at], &inner, found);
                start = at + 1;
            }
            _ => {}
        }
    }
    if !group[start..].trim().is_empty() {
        expand(&group[start..], &inner, found);
    }
}

/// Paths that are written out where they are used: `crate::error::chain(..)`.
fn inline_paths(code: &str) -> Vec<ModulePath> {
    let is_path = |character: char| character.is_alphanumeric() || "_:".contains(character);
    code.split(|character| !is_path(character))
        .filter(|path| path.starts_with("crate::") || path.starts_with("super::"))
        .map(|path| path.split("::").map(str::to_owned).collect())
        .collect()
}

/// Groups of modules that import each other in a circle.
fn circles(imports: &BTreeMap<&ModulePath, BTreeSet<ModulePath>>) -> Vec<String> {
    let reachable = |from: &ModulePath| {
        let mut seen = BTreeSet::new();
        let mut open: Vec<&ModulePath> = imports[from].iter().collect();
        while let Some(module) = open.pop() {
            if seen.insert(module) {
                open.extend(&imports[module]);
            }
        }
        seen
    };
    let reach: BTreeMap<&ModulePath, BTreeSet<&ModulePath>> = imports
        .keys()
        .map(|module| (*module, reachable(module)))
        .collect();
    let mut found = Vec::new();
    for (module, imported) in imports {
        for other in imported {
            if reach[other].contains(module) {
                found.push(format!("{} -> {}", module.join("::"), other.join("::")));
            }
        }
    }
    found
}

#[test]
fn imports_have_no_circle() {
    let all = Crate::read();
    assert!(all.modules.len() > 50, "only {} modules", all.modules.len());
    let imports = all.imports();
    let arrows: usize = imports.values().map(BTreeSet::len).sum();
    assert!(arrows > 150, "only {arrows} imports were found");
    let circles = circles(&imports);
    assert!(circles.is_empty(), "in a circle:\n{}", circles.join("\n"));
}

#[test]
fn circles_are_found() {
    let path = |name: &str| vec![name.to_owned()];
    let (a, b, c) = (path("a"), path("b"), path("c"));
    let imports = BTreeMap::from([
        (&a, BTreeSet::from([path("b")])),
        (&b, BTreeSet::from([path("c")])),
        (&c, BTreeSet::new()),
    ]);
    assert!(circles(&imports).is_empty());
    let imports = BTreeMap::from([
        (&a, BTreeSet::from([path("b")])),
        (&b, BTreeSet::from([path("c")])),
        (&c, BTreeSet::from([path("a")])),
    ]);
    assert_eq!(circles(&imports), ["a -> b", "b -> c", "c -> a"]);
}

#[test]
fn nothing_is_imported_through_lib() {
    let all = Crate::read();
    for (module, imported) in all.imports() {
        assert!(
            module.is_empty() || !imported.contains(&Vec::new()),
            "{} imports from lib.rs",
            module.join("::")
        );
    }
    for (module, source) in &all.modules {
        for path in use_paths(&source.code, Uses::Imports) {
            let through_lib = path.len() == 2
                && path[0] == "crate"
                && path[1].starts_with(|first: char| first.is_uppercase());
            assert!(!through_lib, "{} imports {path:?}", module.join("::"));
        }
    }
}

#[test]
fn balance_does_not_know_etcd() {
    let all = Crate::read();
    let balance = all
        .modules
        .iter()
        .filter(|(module, _)| module.first().is_some_and(|first| first == "balance"));
    let mut files = 0;
    for (module, source) in balance {
        files += 1;
        for name in ["etcd_client", "crate::client", "crate::directory"] {
            let text = fs::read_to_string(&source.path).unwrap_or_default();
            assert!(!text.contains(name), "{} names {name}", module.join("::"));
        }
    }
    assert!(files > 5, "only {files} files");
}

#[test]
fn files_are_short() {
    for source in Crate::read().modules.values() {
        assert!(
            source.lines <= MAX_LINES,
            "{} has {} lines without its unit tests",
            source.path.display(),
            source.lines
        );
    }
}
