//! The structure of `src/`: imports run in one direction, `balance` does not know etcd, files and
//! the names of tests stay short.
//!
//! Imports are read from the text: `use` declarations, and paths that begin with `crate::`,
//! `super::`, a child module or an imported name. Unit tests are left out.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The longest a file may be without its unit tests.
const MAX_LINES: usize = 450;

/// The longest name of a test, in characters.
const MAX_TEST_NAME: usize = 60;

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
        let mut test_files = BTreeSet::new();
        let lib = root.join("lib.rs");
        read_module(&root, lib, Vec::new(), &mut modules, &mut test_files);
        let read: BTreeSet<&PathBuf> = modules.values().map(|source| &source.path).collect();
        for file in rust_files(&root) {
            let is_known = read.contains(&file) || test_files.contains(&file);
            assert!(is_known, "{} is declared nowhere", file.display());
        }
        Self::new(modules)
    }

    fn new(modules: BTreeMap<ModulePath, Source>) -> Self {
        let mut all = Self {
            modules,
            reexports: BTreeMap::new(),
        };
        let of = |(module, source): (&ModulePath, &Source)| {
            let named = all.named_paths(module, &source.code, Uses::Reexports);
            (module.clone(), named)
        };
        all.reexports = all.modules.iter().map(of).collect();
        all
    }

    /// The names that the `use` declarations of `module` introduce, with their full paths.
    fn named_paths(
        &self,
        module: &ModulePath,
        code: &str,
        uses: Uses,
    ) -> BTreeMap<String, ModulePath> {
        let paths = use_paths(code, uses).into_iter();
        let named = paths.filter_map(|path| {
            let name = path.last()?.clone();
            assert!(
                name != "*" || uses == Uses::Imports,
                "a glob hides what {} re-exports",
                module.join("::")
            );
            Some((name, self.absolute(module, &path)?))
        });
        named.collect()
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
        let of = |(module, source)| (module, self.imports_of(module, source));
        self.modules.iter().map(of).collect()
    }

    fn imports_of(&self, module: &ModulePath, source: &Source) -> BTreeSet<ModulePath> {
        let named = self.named_paths(module, &source.code, Uses::Imports);
        let through_name = |path: ModulePath| {
            let target = named.get(path.first()?)?;
            Some([target, &path[1..]].concat())
        };
        let inline = inline_paths(&source.code).into_iter();
        let inline = inline.filter_map(|path| {
            self.absolute(module, &path)
                .or_else(|| through_name(path.clone()))
        });
        named
            .values()
            .cloned()
            .chain(inline)
            .map(|path| self.definition(&path))
            .filter(|imported| imported != module)
            .collect()
    }
}

/// All Rust files of a folder and its folders.
fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found
}

/// Reads a module's file and those of the modules that it declares. Only collects the files that
/// are compiled for tests alone.
///
/// `folder` is where the module's children are, in files of their own or in folders.
fn read_module(
    folder: &Path,
    path: PathBuf,
    module: ModulePath,
    modules: &mut BTreeMap<ModulePath, Source>,
    test_files: &mut BTreeSet<PathBuf>,
) {
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let source = Source::parse(path, &text);
    for declared in declared_modules(&source.code) {
        let inner = folder.join(&declared.name);
        let in_folder = inner.join("mod.rs");
        let path = match in_folder.is_file() {
            true => in_folder,
            false => folder.join(format!("{}.rs", declared.name)),
        };
        let child = [module.as_slice(), &[declared.name]].concat();
        if declared.is_test {
            let mut tests = BTreeMap::new();
            read_module(&inner, path, child, &mut tests, test_files);
            test_files.extend(tests.into_values().map(|source| source.path));
        } else {
            read_module(&inner, path, child, modules, test_files);
        }
    }
    modules.insert(module, source);
}

impl Source {
    fn parse(path: PathBuf, text: &str) -> Self {
        let code = strip(text).join("\n");
        let lines = without_tests(text).lines().count();
        Self { path, lines, code }
    }
}

/// The text of a file up to the module of its unit tests. A module of unit tests in a file of its
/// own has only its declaration here, so the text goes on.
fn without_tests(text: &str) -> &str {
    let mut tests = text.match_indices("#[cfg(test)]\nmod ");
    let inline = tests.find(|(at, _)| {
        let declaration = text[*at..].lines().nth(1);
        declaration.is_some_and(|line| line.ends_with('{'))
    });
    inline.map_or(text, |(at, _)| &text[..at])
}

struct Declared {
    name: String,
    is_test: bool,
}

/// The modules that are declared with `mod name;`.
fn declared_modules(code: &str) -> Vec<Declared> {
    let mut found = Vec::new();
    let mut is_test = false;
    for line in code.lines().map(str::trim) {
        if line.starts_with("#[cfg(") && (line.contains("test)") || line.contains("(test,")) {
            is_test = true;
            continue;
        }
        let unscoped = match line.split_once(") ") {
            Some((scope, rest)) if scope.starts_with("pub(") => rest,
            _ => line.trim_start_matches("pub "),
        };
        let declared = unscoped
            .strip_prefix("mod ")
            .and_then(|rest| rest.strip_suffix(';'));
        if let Some(name) = declared {
            let name = name.to_owned();
            found.push(Declared { name, is_test });
        }
        is_test = is_test && line.starts_with("#[");
    }
    found
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

/// Paths outside of `use` declarations: `crate::error::chain(..)`, `child::open()`.
fn inline_paths(code: &str) -> Vec<ModulePath> {
    let is_path = |character: char| character.is_alphanumeric() || "_:".contains(character);
    let mut is_use = false;
    let mut found = Vec::new();
    for line in code.lines() {
        let start = line.trim_start();
        is_use |= start.starts_with("use ") || start.starts_with("pub") && start.contains(" use ");
        if !is_use {
            let paths = line.split(|character| !is_path(character));
            let paths = paths.filter(|path| path.contains("::") && !path.starts_with(':'));
            found.extend(paths.map(|path| path.split("::").map(str::to_owned).collect()));
        }
        is_use = is_use && !line.contains(';');
    }
    found
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

/// A crate of these modules, each with its path and its text.
fn crate_of(files: &[(&str, &str)]) -> Crate {
    let modules = files.iter().map(|(module, text)| {
        let path = module.split("::").filter(|part| !part.is_empty());
        let source = Source::parse(PathBuf::new(), text);
        (path.map(str::to_owned).collect(), source)
    });
    Crate::new(modules.collect())
}

#[test]
fn each_way_to_name_a_module_is_an_import() {
    for text in [
        "use crate::b::item;",
        "use super::b;",
        "use super::b::item as other;",
        "use crate::{a::x, b::{item}};",
        "use crate::facade::item;",
        "use crate::facade;\nfn f() { facade::item() }",
        "use super::b as other;\nfn f() { other::item() }",
        "fn f() { crate::b::item() }",
        "fn f() { super::b::item() }",
        "mod inner {\n    use super::super::b;\n}",
    ] {
        let of_b = "use super::a::x;";
        let all = crate_of(&[
            ("", "mod a;\nmod b;\nmod facade;"),
            ("a", text),
            ("b", of_b),
            ("facade", "pub use super::b::item;"),
        ]);
        let circles = circles(&all.imports());
        assert_eq!(circles, ["a -> b", "b -> a"], "{text}");
    }
    let all = crate_of(&[
        ("", "pub(crate) mod a;"),
        ("a", "mod child;\nfn f() { child::item() }"),
        ("a::child", "fn item() { super::x() }"),
    ]);
    let circles = circles(&all.imports());
    assert_eq!(circles, ["a -> a::child", "a::child -> a"]);
}

#[test]
fn modules_are_declared_in_every_visibility() {
    let code =
        "mod a;\npub mod b;\npub(in crate::x) mod c;\n#[cfg(test)]\nmod d;\n#[cfg(unix)]\nmod e;";
    let declared = declared_modules(code);
    let names: Vec<_> = declared.iter().map(|one| one.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "c", "d", "e"]);
    let tests: Vec<_> = declared.iter().map(|one| one.is_test).collect();
    assert_eq!(tests, [false, false, false, true, false]);
}

#[test]
fn lines_count_up_to_inline_unit_tests() {
    let count = |text| Source::parse(PathBuf::new(), text).lines;
    assert_eq!(count("a\n#[cfg(test)]\nmod tests;\nb\nc\n"), 5);
    assert_eq!(count("a\nb\n#[cfg(test)]\nmod tests {\n}\n"), 2);
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
    let is_balance = |module: &ModulePath| module.first().is_some_and(|first| first == "balance");
    let imports = all.imports();
    let balance = imports.iter().filter(|(module, _)| is_balance(module));
    let mut files = 0;
    for (module, imported) in balance {
        files += 1;
        let module_name = module.join("::");
        for other in imported {
            let other = other.join("::");
            let is_etcd = other.starts_with("client") || other.starts_with("directory");
            assert!(!is_etcd, "{module_name} imports from {other}");
        }
        let text = fs::read_to_string(&all.modules[*module].path).unwrap();
        for name in ["etcd_client", "crate::client", "crate::directory"] {
            assert!(!text.contains(name), "{module_name} names {name}");
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

/// The names of the tests in a file: functions with an attribute that ends in `test`.
fn test_names(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut is_test = false;
    for line in text.lines().map(str::trim) {
        if let Some(attribute) = line.strip_prefix("#[") {
            let name = attribute.split(['(', ']']).next().unwrap_or_default();
            is_test |= name == "test" || name.ends_with("::test");
        } else if let Some((before, rest)) = line.split_once("fn ")
            && (before.is_empty() || before == "async ")
        {
            let name = rest.split(['(', '<']).next().unwrap_or_default();
            if std::mem::take(&mut is_test) {
                found.push(name);
            }
        }
    }
    found
}

#[test]
fn names_of_tests_are_short() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["src", "tests", "chaos"].map(|folder| root.join(folder));
    let mut tests = 0;
    for file in folders.iter().flat_map(|folder| rust_files(folder)) {
        let text = fs::read_to_string(&file).unwrap();
        for name in test_names(&text) {
            tests += 1;
            let file = file.display();
            assert!(name.chars().count() <= MAX_TEST_NAME, "{file}: {name}");
        }
    }
    assert!(tests > 500, "only {tests} tests were found");
}
