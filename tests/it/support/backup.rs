//! Backups of an etcd server.

use std::process::Command;

use goo_etcd::testing::Etcd;
use tempfile::TempDir;

use super::TestResult;

/// A copy of an etcd's data.
pub struct Backup(TempDir);

impl Backup {
    /// Stops the server, copies its data, and starts it again.
    pub async fn take(etcd: &Etcd) -> TestResult<Self> {
        let backup = Self(TempDir::new()?);
        etcd.stop().await?;
        let to = backup.0.path().join("data");
        run(Command::new("cp").arg("-r").arg(etcd.data_dir()).arg(to))?;
        etcd.start_again().await?;
        Ok(backup)
    }

    /// Kills the server, and starts it with the data of the backup.
    pub async fn restore(&self, etcd: &Etcd) -> TestResult {
        etcd.kill().await?;
        std::fs::remove_dir_all(etcd.data_dir())?;
        let from = self.0.path().join("data");
        run(Command::new("cp").arg("-r").arg(from).arg(etcd.data_dir()))?;
        etcd.start_again().await?;
        Ok(())
    }
}

fn run(command: &mut Command) -> TestResult {
    let status = command.status()?;
    if !status.success() {
        return Err(format!("{command:?}: {status}").into());
    }
    Ok(())
}
