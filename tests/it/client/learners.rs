//! A learner among the configured endpoints. etcd refuses everything there but `Status` and
//! serializable reads (etcd#12789, etcd#19001).

use std::time::Duration;

use crate::support::{TestResult, config, wait_for, wait_until};
use futures::StreamExt as _;
use goo_etcd::testing::{EtcdCluster, Proxy};
use goo_etcd::{Client, Config, Directory, Instance, Registrar, Result, TxnOp};
use tokio::time::sleep;

/// How much later than the learner the voting members are connected, so that the first calls of a
/// client reach the learner.
const LATER: Duration = Duration::from_millis(150);

/// The value of a put that shows where the put was sent.
const LARGE: usize = 10_000;

/// A cluster whose last member is a learner, and the network to its members, which is slow to the
/// others.
struct SlowVoters {
    cluster: EtcdCluster,
    proxies: Vec<Proxy>,
}

impl SlowVoters {
    async fn start() -> TestResult<Self> {
        let cluster = EtcdCluster::start().await?;
        cluster.replace_with_learner(2).await?;
        let mut proxies = Vec::new();
        for member in cluster.members() {
            proxies.push(Proxy::start(member.endpoint()).await?);
        }
        proxies[0].delay(LATER);
        proxies[1].delay(LATER);
        Ok(Self { cluster, proxies })
    }

    fn config(&self) -> Config {
        config(self.proxies.iter().map(Proxy::endpoint))
    }

    /// Puts a large value. Returns whether it was sent to the learner. etcd before 3.6 does not
    /// count the calls that a learner refuses.
    async fn put_reaches_the_learner(&self, client: &Client) -> TestResult<bool> {
        let before = self.proxies[2].bytes_up();
        client.put("large", vec![0; LARGE], None).await?;
        Ok(self.proxies[2].bytes_up() - before >= LARGE as u64)
    }

    /// A client whose first put was sent to the learner. A stall of this process may let a voting
    /// member connect first; then another client tries.
    async fn client_that_met_the_learner(&self) -> TestResult<Client> {
        let mut met = None;
        wait_until("a first call reaches the learner", async || {
            let client = Client::new("main", self.config()).await.unwrap();
            let reached = self.put_reaches_the_learner(&client).await.unwrap();
            met = reached.then_some(client);
            reached
        })
        .await;
        Ok(met.ok_or("no client")?)
    }

    async fn promote_learner_and_wait_for_its_use(&self, client: &Client) -> TestResult {
        let list = client.member_list().await?;
        let learner = list.members().iter().find(|member| member.is_learner());
        let id = learner.ok_or("no learner is listed")?.id();
        // etcd refuses until the learner has caught up.
        wait_until("the learner is promoted", async || {
            client.member_promote(id).await.is_ok()
        })
        .await;
        wait_until("the promoted member is used", async || {
            self.put_reaches_the_learner(client).await.unwrap()
        })
        .await;
        Ok(())
    }
}

/// The operations that a test performs with a fresh client; see [`run`].
const OPERATIONS: [&str; 9] = [
    "get",
    "put",
    "txn",
    "grant and renew",
    "list members",
    "lock",
    "watch",
    "register and discover",
    "raw watch",
];

async fn run(operation: &str, client: &Client) -> Result<()> {
    match operation {
        "get" => client.get("key", None).await.map(drop),
        "put" => client.put("key", "1", None).await.map(drop),
        "txn" => {
            let txn = client.txn().and_then([TxnOp::put("key", "2", None)]);
            txn.commit().await.map(drop)
        }
        "grant and renew" => {
            let lease = client.grant(30).await?;
            client.keep_alive_once(lease.id()).await.map(drop)
        }
        "list members" => client.member_list().await.map(drop),
        "lock" => {
            let lock = client.lock("lock", Duration::from_secs(10)).await?;
            lock.unlock().await
        }
        "watch" => {
            let mut watch = client.watch("key", None).await?;
            client.put("key", "3", None).await?;
            wait_for("the event", watch.next()).await.unwrap().map(drop)
        }
        "register and discover" => {
            let instance = Instance::new("greeter", "10.0.0.5:50051");
            let registration = Registrar::new(client).register(instance).await?;
            let directory = Directory::watch(client, "greeter").await?;
            assert_eq!(directory.snapshot().instances().count(), 1);
            registration.deregister().await
        }
        "raw watch" => {
            let mut raw = client.client().watch_client();
            let mut stream = raw.watch("key", None).await.unwrap();
            assert!(stream.message().await.unwrap().unwrap().created());
            Ok(())
        }
        _ => unreachable!(),
    }
}

#[tokio::test]
async fn refused_calls_go_to_another_member() -> TestResult {
    let voters = SlowVoters::start().await?;
    for operation in OPERATIONS {
        let client = Client::new("main", voters.config()).await?;
        let done = run(operation, &client).await;
        assert!(done.is_ok(), "{operation}: {done:?}");
    }

    // The learner is left out after one refusal.
    let client = voters.client_that_met_the_learner().await?;
    for _ in 0..10 {
        assert!(!voters.put_reaches_the_learner(&client).await?);
    }

    // A call to the learner itself.
    let status = client.status(voters.proxies[2].endpoint()).await?;
    assert!(status.is_learner());
    voters.promote_learner_and_wait_for_its_use(&client).await
}

#[tokio::test]
async fn lock_outlives_a_member_that_became_a_learner() -> TestResult {
    // Much longer than the streams take to move, even on a busy machine.
    let ttl = Duration::from_secs(12);
    let cluster = EtcdCluster::start().await?;
    let mut clients = Vec::new();
    // Some of the streams are on the member that is replaced.
    for n in 0..6 {
        let client = Client::new("main", config(cluster.endpoints())).await?;
        let lock = client.lock(format!("lock-{n}"), ttl).await?;
        let watch = client.watch("key", None).await?;
        clients.push((client, lock, watch));
    }
    // Not the leader, because an election takes a part of the TTL.
    let leader = cluster.leader().await?;
    cluster.replace_with_learner((leader + 1) % 3).await?;
    sleep(ttl).await;
    for (client, lock, watch) in &mut clients {
        assert!(lock.is_held());
        client.put("key", "1", None).await?;
        wait_for("the event", watch.next()).await.unwrap()?;
    }
    Ok(())
}

#[tokio::test]
async fn errors_name_learners_if_no_voter_is_up() -> TestResult {
    let cluster = EtcdCluster::start().await?;
    cluster.replace_with_learner(2).await?;
    let learner = cluster.member(2).endpoint();
    let errors = async |config: Config| -> TestResult {
        let mut config = config;
        config.request_timeout = Duration::from_secs(2);
        let client = Client::new("main", config).await?;
        for operation in ["get", "put", "watch", "grant and renew"] {
            let error = run(operation, &client).await.unwrap_err();
            assert!(error.is_retryable(), "{operation}: {error:?}");
            let text = error.to_string();
            assert!(
                text.contains("learner") && text.contains(&learner),
                "{operation}: {text}"
            );
        }
        Ok(())
    };
    errors(config([learner.clone()])).await?;
    for member in &cluster.members()[..2] {
        member.kill().await?;
    }
    errors(config(cluster.endpoints())).await
}

#[tokio::test]
async fn user_is_authenticated_past_a_learner() -> TestResult {
    let voters = SlowVoters::start().await?;
    let mut auth = voters.cluster.member(0).client().await?.auth_client();
    auth.user_add("root", "secret", None).await?;
    auth.user_grant_role("root", "root").await?;
    auth.auth_enable().await?;
    let mut config = voters.config();
    config.username = Some("root".to_owned());
    config.password = Some("secret".to_owned());
    let client = Client::new("main", config.clone()).await?;
    client.put("key", "1", None).await?;
    let lazy = Client::connect_lazy("lazy", config)?;
    drop(lazy.watch("key", None).await?);
    voters.promote_learner_and_wait_for_its_use(&client).await
}
