//! The versions of etcd that tests run, and what some of them lack.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::sync::LazyLock;

use goo_etcd::testing::{Etcd, EtcdBuilder};

/// The path of another version of etcd: from an environment variable, or where `scripts/tools` puts
/// it. `None` if the variable is `none`.
///
/// # Panics
///
/// If the program does not exist.
pub fn find_etcd(variable: &str, name: &str) -> Option<PathBuf> {
    let set = std::env::var(variable).unwrap_or_default();
    if set == "none" {
        return None;
    }
    let found = if set.is_empty() {
        PathBuf::from(env!("CARGO_MANIFEST_DIR"))
            .join("target/tools/bin")
            .join(name)
    } else {
        set.into()
    };
    assert!(
        found.is_file(),
        "{} is missing: run scripts/tools, or set {variable} to one or to `none`",
        found.display()
    );
    Some(found)
}

/// The version of the etcd under test, such as `(3, 5)`: of the one that tests start without
/// choosing another program.
pub fn version() -> (u32, u32) {
    static VERSION: LazyLock<(u32, u32)> = LazyLock::new(|| {
        let program = find_etcd("ETCD", "etcd").expect("ETCD names a program");
        let output = Command::new(program).arg("--version").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let mut numbers = text
            .split(['.', ':', '\n'])
            .filter_map(|part| part.trim().parse().ok());
        let mut next = || numbers.next().expect("the version has two numbers");
        (next(), next())
    });
    *VERSION
}

/// The usual etcd and, if available, the newest one, which behaves differently.
pub fn etcd_versions() -> Vec<EtcdBuilder> {
    let newest = find_etcd("ETCD_NEWEST", "etcd-newest");
    let newest = newest.map(|program| Etcd::builder().program(program));
    [Etcd::builder()].into_iter().chain(newest).collect()
}

/// A feature that some versions of etcd lack.
pub struct Feature {
    name: &'static str,
    since: (u32, u32),
}

impl Feature {
    pub const GZIP: Self = Self {
        name: "gzip",
        since: (3, 5),
    };
    pub const LINEARIZABLE_MEMBER_LIST: Self = Self {
        name: "linearizable member lists",
        since: (3, 5),
    };

    /// Whether the etcd under test lacks the feature. If so, says that a test is left out.
    pub fn is_missing(&self) -> bool {
        let is_missing = version() < self.since;
        if is_missing {
            let (major, minor) = version();
            say_left_out(&format!("etcd {major}.{minor} has no {}", self.name));
        }
        is_missing
    }
}

/// Says that the current test is left out. Not with `eprintln!`, because the test harness hides
/// what a passing test prints.
pub fn say_left_out(reason: &str) {
    let text = format!("left out: {reason}\n");
    let _ = std::io::stderr().write_all(text.as_bytes());
}
