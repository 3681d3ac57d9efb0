//! The cost of an etcd operation compared with plain etcd-client: `cargo bench --bench client`.
//!
//! Both clients run put, get and transaction on the same etcd, with 1 and with 64 tasks, in turn,
//! round after round. The result is the CPU time of this process per operation, as a ratio to
//! etcd-client in the same round, so that changes of the machine's speed cancel out. The last part
//! stops one of two endpoints and counts failed operations.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use goo_etcd::testing::Etcd;
use goo_etcd::{Client, Config, TxnOp, etcd_client};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

#[derive(Clone, Copy, Debug)]
enum Operation {
    Put,
    Get,
    Txn,
}

const OPERATIONS: [Operation; 3] = [Operation::Put, Operation::Get, Operation::Txn];

#[derive(Clone)]
#[allow(
    clippy::large_enum_variant,
    reason = "there are few values, and a box would add cost to the measured one"
)]
enum Contender {
    Raw(etcd_client::KvClient),
    Ours(Client),
}

impl Contender {
    /// Runs one operation. Returns whether it succeeded.
    async fn call(&mut self, operation: Operation) -> bool {
        let both = || [TxnOp::put("key", "value", None), TxnOp::get("key", None)];
        match (self, operation) {
            (Contender::Raw(kv), Operation::Put) => kv.put("key", "value", None).await.is_ok(),
            (Contender::Raw(kv), Operation::Get) => kv.get("key", None).await.is_ok(),
            (Contender::Raw(kv), Operation::Txn) => {
                let txn = etcd_client::Txn::new().and_then(both());
                kv.txn(txn).await.is_ok()
            }
            (Contender::Ours(client), Operation::Put) => {
                client.put("key", "value", None).await.is_ok()
            }
            (Contender::Ours(client), Operation::Get) => client.get("key", None).await.is_ok(),
            (Contender::Ours(client), Operation::Txn) => {
                client.txn().and_then(both()).commit().await.is_ok()
            }
        }
    }

    /// Returns CPU seconds per operation and the number of failed operations.
    async fn round(&self, operation: Operation, tasks: usize, calls: usize) -> (f64, usize) {
        let left = Arc::new(AtomicUsize::new(calls));
        let failed = Arc::new(AtomicUsize::new(0));
        let cpu = cpu_seconds();
        let mut running = tokio::task::JoinSet::new();
        for _ in 0..tasks {
            let (mut contender, left, failed) =
                (self.clone(), Arc::clone(&left), Arc::clone(&failed));
            running.spawn(async move {
                let take = |left: usize| left.checked_sub(1);
                while left
                    .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
                    .is_ok()
                {
                    if !contender.call(operation).await {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        running.join_all().await;
        let cpu = (cpu_seconds() - cpu) / calls as f64;
        (cpu, failed.load(Ordering::Relaxed))
    }
}

fn cpu_seconds() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("the process's own usage");
    (usage.user_time() + usage.system_time()).num_microseconds() as f64 / 1e6
}

/// Minimum, median and maximum.
fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    (
        values[0],
        values[values.len() / 2],
        values[values.len() - 1],
    )
}

async fn contenders(endpoints: Vec<String>) -> (Contender, Contender) {
    let raw = etcd_client::Client::connect(&endpoints, None)
        .await
        .expect("etcd-client connects");
    let config = Config::builder().endpoints(endpoints).build();
    let ours = Client::connect("bench", config.expect("a configuration")).await;
    (
        Contender::Raw(raw.kv_client()),
        Contender::Ours(ours.expect("connects")),
    )
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    // `cargo test --benches` runs benchmarks too; a single round is enough there.
    let test = std::env::args().any(|argument| argument == "--test");
    let (rounds, one, many) = if test {
        (1, 20, 128)
    } else {
        (11, 1_000, 6_400)
    };
    let etcd = Etcd::start().await.expect("etcd starts");
    let (raw, ours) = contenders(vec![etcd.endpoint()]).await;
    println!("{rounds} rounds of {one} operations by 1 task and {many} by 64");
    println!(
        "{:4} {:>5} {:>12} {:>12} {:>20}",
        "", "tasks", "etcd-client", "goo-etcd", "ratio (min-max)"
    );
    for operation in OPERATIONS {
        for (tasks, calls) in [(1, one), (64, many)] {
            raw.round(operation, tasks, calls / 4).await;
            ours.round(operation, tasks, calls / 4).await;
            let (mut theirs, mut own, mut ratios) = (vec![], vec![], vec![]);
            for round in 0..rounds {
                // The clients take turns to go first.
                let (a, b) = if round % 2 == 0 {
                    let a = raw.round(operation, tasks, calls).await.0;
                    (a, ours.round(operation, tasks, calls).await.0)
                } else {
                    let b = ours.round(operation, tasks, calls).await.0;
                    (raw.round(operation, tasks, calls).await.0, b)
                };
                theirs.push(a * 1e6);
                own.push(b * 1e6);
                ratios.push(b / a);
            }
            let (least, median, most) = spread(ratios);
            println!(
                "{:4} {tasks:>5} {:>9.1} us {:>9.1} us {median:>6.2} ({least:.2}-{most:.2})",
                format!("{operation:?}"),
                spread(theirs).1,
                spread(own).1,
            );
        }
    }

    let dead = Etcd::start().await.expect("etcd starts");
    let (raw, ours) = contenders(vec![etcd.endpoint(), dead.endpoint()]).await;
    dead.kill().await.expect("it dies");
    println!("one of two endpoints dead, {one} operations by 64 tasks, failed:");
    for operation in OPERATIONS {
        let (theirs, own) = (
            raw.round(operation, 64, one).await.1,
            ours.round(operation, 64, one).await.1,
        );
        println!("{:4} {theirs:>18} {own:>15}", format!("{operation:?}"));
    }
}
