//! How soon a directory shows changes, and how soon a registration is restored:
//! `cargo bench --bench discovery`.
//!
//! Each line shows the best, the median and the worst of several rounds on one etcd of the same
//! machine. A directory has 10,000 instances, in one format and in two.

use std::time::{Duration, Instant};

use goo_etcd::format::Kratos;
use goo_etcd::testing::Etcd;
use goo_etcd::{Client, Config, Directory, Instance, Registrar, RegistrationState, TxnOp};
use tokio::time::sleep;

const SERVICE: &str = "greeter";

fn address(n: usize) -> String {
    format!("127.{}.{}.{}:1", 100 + (n >> 16), (n >> 8) & 255, n & 255)
}

fn key(n: usize) -> String {
    format!("services/{SERVICE}/{}", address(n))
}

/// A value of a realistic length.
fn value(n: usize, weight: u32) -> String {
    let address = address(n);
    format!(
        r#"{{"Op":0,"Addr":"{address}","Metadata":{{"weight":{weight},"zone":"eu-central-1a","version":"1.2.3"}}}}"#
    )
}

async fn connect(etcd: &Etcd) -> Client {
    let config = Config::builder().endpoints([etcd.endpoint()]).build();
    let client = Client::connect("bench", config.expect("a configuration")).await;
    client.expect("the client connects")
}

async fn fill(client: &Client, instances: usize) {
    let all: Vec<usize> = (0..instances).collect();
    // etcd allows 128 operations in a transaction by default.
    for some in all.chunks(100) {
        let puts = some
            .iter()
            .map(|n| TxnOp::put(key(*n), value(*n, 100), None));
        let stored = client.txn().and_then(puts).commit().await;
        stored.expect("the instances are stored");
    }
}

/// Opens a directory with a new client. Returns it with the time of its first list.
async fn open(etcd: &Etcd, with_kratos: bool) -> (Directory, Duration) {
    let client = connect(etcd).await;
    let builder = Directory::builder(&client, SERVICE);
    let builder = match with_kratos {
        true => builder.and_format(Kratos),
        false => builder,
    };
    let started = Instant::now();
    let directory = builder.watch().await.expect("the directory opens");
    (directory, started.elapsed())
}

/// The time from a write until the directory shows it.
async fn time_change(client: &Client, directory: &Directory, n: usize, weight: u32) -> Duration {
    let address = address(n);
    let started = Instant::now();
    let stored = client.put(key(n), value(n, weight), None).await;
    stored.expect("the change is stored");
    let is_shown = || {
        let snapshot = directory.snapshot();
        let mut instances = snapshot.instances();
        instances.any(|instance| instance.address == address && instance.weight == weight)
    };
    while !is_shown() {
        sleep(Duration::from_millis(1)).await;
    }
    started.elapsed()
}

/// The time until the key of a registration exists after `harm` was done to it.
async fn time_restore(client: &Client, key: &str, harm: impl AsyncFnOnce(i64)) -> Duration {
    let found = client.get(key, None).await.expect("etcd responds");
    harm(found.kvs()[0].lease()).await;
    let started = Instant::now();
    while client
        .get(key, None)
        .await
        .is_ok_and(|found| found.kvs().is_empty())
    {
        sleep(Duration::from_millis(1)).await;
    }
    started.elapsed()
}

fn print(what: &str, mut times: Vec<Duration>) {
    times.sort();
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "{what:44} {:9.1} {:9.1} {:9.1}",
        milliseconds(times[0]),
        milliseconds(times[times.len() / 2]),
        milliseconds(times[times.len() - 1]),
    );
}

async fn measure_directory(etcd: &Etcd, rounds: u32, with_kratos: bool) {
    let formats = if with_kratos {
        "two formats"
    } else {
        "one format"
    };
    let client = connect(etcd).await;
    let mut lists = Vec::new();
    for _ in 0..rounds {
        lists.push(open(etcd, with_kratos).await.1);
    }
    print(&format!("first list, {formats}"), lists);
    let (directory, _) = open(etcd, with_kratos).await;
    let mut changes = Vec::new();
    for round in 0..rounds * 5 {
        // No earlier round has set this weight.
        let weight = 101 + round + u32::from(with_kratos) * 1_000;
        changes.push(time_change(&client, &directory, round as usize, weight).await);
    }
    print(&format!("a change, {formats}"), changes);
}

async fn measure_registration(etcd: &Etcd, rounds: u32) {
    let client = connect(etcd).await;
    let registrar = Registrar::new(&client);
    let instance = Instance::new("restored", "10.0.0.1:80");
    let registration = registrar.register(instance).await.expect("it registers");
    let key = registration.key();
    let (mut deleted, mut revoked) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let delete = async |_| {
            client.delete(key, None).await.expect("it is deleted");
        };
        deleted.push(time_restore(&client, key, delete).await);
        let revoke = async |lease| {
            client.revoke(lease).await.expect("it is revoked");
        };
        revoked.push(time_restore(&client, key, revoke).await);
        // The next round begins when the registrar knows that its key is back.
        while registration.state() != RegistrationState::Registered {
            sleep(Duration::from_millis(1)).await;
        }
    }
    print("a deleted key is back", deleted);
    print("a key with a revoked lease is back", revoked);
    registrar.close().await.expect("the registrar closes");
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    // `cargo test --benches` runs benchmarks too; a single round is enough there.
    let test = std::env::args().any(|argument| argument == "--test");
    let (rounds, instances) = if test { (1, 100) } else { (10, 10_000) };
    let etcd = Etcd::start().await.expect("etcd starts");
    fill(&connect(&etcd).await, instances).await;
    println!("{instances} instances; times in ms");
    println!("{:44} {:>9} {:>9} {:>9}", "", "best", "median", "worst");
    measure_directory(&etcd, rounds, false).await;
    measure_directory(&etcd, rounds, true).await;
    measure_registration(&etcd, rounds).await;
}
