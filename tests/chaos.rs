//! A short `make chaos`: the same program, a fixed seed; and the tests of what it judges by.

// The program's own files, for their unit tests: cargo runs none of an example.
#[path = "../examples/chaos/check/mod.rs"]
mod check;
#[allow(dead_code, reason = "the program uses all of it")]
#[path = "../examples/chaos/record.rs"]
mod record;
#[allow(dead_code, reason = "the program uses all of it")]
#[path = "../examples/chaos/schedule/mod.rs"]
mod schedule;

use std::error::Error;
use std::process::{Command, Output, Stdio};

type TestResult = Result<(), Box<dyn Error>>;

/// `cargo test` builds the examples before it runs a test; `cargo test --test chaos` does not.
fn chaos(args: &[&str]) -> Result<Output, Box<dyn Error>> {
    let test = std::env::current_exe()?;
    let profile = test.ancestors().nth(2).ok_or("in target/PROFILE/deps")?;
    let program = profile.join("examples/chaos");
    assert!(
        program.is_file(),
        "{} is missing: run `cargo build --examples` first",
        program.display()
    );
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .env_remove("RUST_LOG");
    Ok(command.output()?)
}

#[test]
fn a_short_run_of_faults_breaks_no_promise() -> TestResult {
    let ended = chaos(&["--seed", "35", "--seconds", "20"])?;
    let told = String::from_utf8(ended.stdout)?;
    let stderr = String::from_utf8(ended.stderr)?;
    assert!(ended.status.success(), "{told}\n{stderr}");
    assert!(told.starts_with("chaos: seed 35\n"), "{told}");
    let last = told.lines().last().unwrap_or_default();
    assert!(
        last.starts_with("chaos: seed=35 seconds=20 faults="),
        "{last}"
    );
    assert!(
        last.ends_with(" failed=0 divergences=0 lost_registrations=0"),
        "{last}"
    );
    Ok(())
}

#[test]
fn a_seed_plans_the_same_faults_in_every_run() -> TestResult {
    let plan = |seed| chaos(&["--plan", "--seed", seed]);
    assert_eq!(plan("3")?.stdout, plan("3")?.stdout);
    assert_ne!(plan("3")?.stdout, plan("4")?.stdout);
    Ok(())
}
