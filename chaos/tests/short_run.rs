//! A short run of the chaos program with a fixed seed.

use std::error::Error;
use std::process::{Command, Output, Stdio};

type TestResult = Result<(), Box<dyn Error>>;

fn chaos(args: &[&str]) -> Result<Output, Box<dyn Error>> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chaos"));
    command
        .args(args)
        .stdin(Stdio::null())
        .env_remove("RUST_LOG");
    Ok(command.output()?)
}

#[test]
fn breaks_no_promise() -> TestResult {
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
fn seed_fixes_the_planned_faults() -> TestResult {
    let plan = |seed| chaos(&["--plan", "--seed", seed]);
    assert_eq!(plan("3")?.stdout, plan("3")?.stdout);
    assert_ne!(plan("3")?.stdout, plan("4")?.stdout);
    Ok(())
}
