//! The pool with a scripted connector, in paused time.

mod on_demand;
mod reconnecting;

use std::time::Duration;

use futures::channel::mpsc;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::*;
use crate::balance::connection::{FakeConnector, ReservedStream, Script};

const SECOND: Duration = Duration::from_secs(1);
const REFUSE: Script = Script::Refuse {
    after: Duration::ZERO,
};

/// The source panics at a set with an instance of this id.
const PANIC: &str = "panic";

/// A running pool, its source and its connector.
struct Harness {
    view: Arc<View>,
    connector: Arc<FakeConnector>,
    sets: mpsc::UnboundedSender<Vec<Instance>>,
    /// Aborted on drop.
    task: JoinSet<()>,
}

impl Harness {
    /// Without a mass-deletion guard.
    fn new() -> Self {
        Self::guarded_for(Duration::ZERO)
    }

    fn guarded_for(keep_for: Duration) -> Self {
        let view = Arc::new(View::new("services/echo/".into()));
        let connector = Arc::new(FakeConnector::default());
        let plan = ConnectPlan {
            connections: 1,
            max_backoff: 30 * SECOND,
        };
        let pool = Pool::new(
            Arc::clone(&view),
            Arc::clone(&connector),
            plan,
            BalancePolicy::RoundRobin,
            MassDeletionGuard::new(keep_for, DEFAULT_WINDOW),
        );
        let (sets, received) = mpsc::unbounded();
        let received = received.inspect(|set: &Vec<Instance>| {
            let is_bad = set.iter().any(|instance| instance.id == PANIC);
            assert!(!is_bad, "bad file");
        });
        let mut task = JoinSet::new();
        task.spawn(pool.run(Source::new("services/echo/", received)));
        Self {
            view,
            connector,
            sets,
            task,
        }
    }

    /// Publishes a set of instances, and waits until the pool has nothing left to do at this time.
    async fn publish(&self, instances: impl IntoIterator<Item = Instance>) {
        let set = instances.into_iter().collect();
        self.sets.unbounded_send(set).unwrap();
        settle().await;
    }

    fn endpoint(&self, address: &str) -> Option<EndpointStatus> {
        let mut endpoints = self.view.endpoints().into_iter();
        endpoints.find(|endpoint| endpoint.address == address)
    }

    fn state(&self, address: &str) -> Option<EndpointState> {
        self.endpoint(address).map(|endpoint| endpoint.state)
    }

    /// The addresses in the picker, sorted.
    fn pickable(&self) -> Vec<String> {
        let picker = self.view.picker.load();
        let addresses = picker.candidates().iter();
        let mut addresses: Vec<_> = addresses
            .map(|ready| ready.endpoint.target.address.to_string())
            .collect();
        addresses.sort();
        addresses
    }

    /// Picks an endpoint and reserves a stream on it, as a call does.
    fn pick(&self) -> Option<(Arc<Endpoint>, ReservedStream)> {
        self.view.reserve(|_| false)
    }

    /// Waits for a stream, as a call does.
    async fn wait_for_stream(&self, limit: Duration) -> (Arc<Endpoint>, ReservedStream) {
        timeout(limit, self.start_call()).await.unwrap().unwrap()
    }

    /// Starts a call that waits for a stream. Dropping the result cancels the call.
    fn start_call(&self) -> AbortOnDropHandle<(Arc<Endpoint>, ReservedStream)> {
        let call = WaitingCall {
            started: Instant::now(),
            avoids: Arc::new(|_| false),
            waits_for_ready: true,
        };
        let view = Arc::clone(&self.view);
        let waiting = async move { view.wait_for_stream(call).await.unwrap() };
        AbortOnDropHandle::new(tokio::spawn(waiting))
    }
}

/// Runs every task until it waits. Paused time advances only then.
async fn settle() {
    sleep(Duration::from_millis(1)).await;
}

fn instance(id: &str, address: &str) -> Instance {
    let mut instance = Instance::new("echo", address);
    instance.id = id.to_owned();
    instance
}

fn fleet(count: usize) -> Vec<Instance> {
    let instance = |index| instance(&format!("i{index}"), &format!("host:{index}"));
    (1..=count).map(instance).collect()
}

mod backoff {
    use super::*;

    /// The pauses between the attempts to connect to `host:1`.
    fn pauses(harness: &Harness) -> Vec<f64> {
        let attempts = harness.connector.attempts("host:1");
        let pairs = attempts.windows(2);
        pairs
            .map(|pair| (pair[1] - pair[0]).as_secs_f64())
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_with_jitter_up_to_the_maximum() {
        let harness = Harness::new();
        harness.connector.script("host:1", REFUSE);
        harness.publish(fleet(1)).await;
        assert_eq!(harness.state("host:1"), Some(EndpointState::Backoff));
        sleep(600 * SECOND).await;

        let pauses = pauses(&harness);
        let mut expected: f64 = 1.0;
        for pause in &pauses {
            // Timers tick in milliseconds.
            let range = 0.8 * expected - 0.002..=1.2 * expected + 0.002;
            assert!(range.contains(pause), "{pause} of {pauses:?}");
            expected = (expected * 1.6).min(30.0);
        }
        assert!(pauses.len() > 15, "{pauses:?}");
        let distinct = |pair: &[f64]| (pair[0] - pair[1]).abs() > 0.01;
        assert!(pauses[8..].windows(2).any(distinct), "{pauses:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn pause_counts_from_the_start_of_the_attempt() {
        let harness = Harness::new();
        let slow = Script::Refuse { after: 5 * SECOND };
        harness.connector.script("host:1", slow);
        harness.publish(fleet(1)).await;
        assert_eq!(harness.state("host:1"), Some(EndpointState::Connecting));
        sleep(12 * SECOND).await;
        // The pauses of about 1 s and 1.6 s are over when the attempts of 5 s end.
        let pauses = pauses(&harness);
        assert_eq!(pauses.len(), 2);
        assert!(pauses.iter().all(|pause| (5.0..5.01).contains(pause)));
    }

    #[tokio::test(start_paused = true)]
    async fn stable_connection_resets_the_pause() {
        let harness = Harness::new();
        harness.connector.script("host:1", REFUSE);
        harness.publish(fleet(1)).await;
        sleep(60 * SECOND).await;
        harness.connector.script("host:1", Script::Accept);
        sleep(40 * SECOND).await;
        assert_eq!(harness.state("host:1"), Some(EndpointState::Ready));

        // The first attempt after the loss is made at once, and the next pause is short again.
        harness.connector.script("host:1", REFUSE);
        let before = harness.connector.attempts("host:1").len();
        let lost_at = Instant::now();
        harness.connector.disconnect("host:1", "reset");
        sleep(5 * SECOND).await;
        let attempts = harness.connector.attempts("host:1");
        assert_eq!(attempts[before], lost_at);
        let pause = attempts[before + 1] - lost_at;
        assert!(pause <= SECOND.mul_f64(1.21), "{pause:?}");
    }
}

mod replacement {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn old_endpoint_serves_until_the_new_one_is_ready() {
        let harness = Harness::new();
        harness.connector.script("host:2", REFUSE);
        harness.publish([instance("a", "host:1")]).await;
        harness.publish([instance("a", "host:2")]).await;
        assert_eq!(harness.pickable(), ["host:1"]);
        assert_eq!(harness.state("host:2"), Some(EndpointState::Backoff));

        harness.connector.script("host:2", Script::Accept);
        sleep(2 * SECOND).await;
        assert_eq!(harness.pickable(), ["host:2"]);
        assert_eq!(harness.state("host:1"), None);
        assert_eq!(harness.connector.open_connections("host:1"), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn new_endpoint_takes_over_after_the_connect_timeout() {
        let harness = Harness::new();
        harness.connector.script("host:2", Script::Hang);
        harness.publish([instance("a", "host:1")]).await;
        harness.publish([instance("a", "host:2")]).await;
        sleep(FakeConnector::CONNECT_TIMEOUT - 10 * Duration::from_millis(1)).await;
        assert_eq!(harness.pickable(), ["host:1"]);
        sleep(20 * Duration::from_millis(1)).await;
        assert!(harness.pickable().is_empty());
        assert_eq!(harness.state("host:1"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn new_endpoint_takes_over_from_a_lost_one() {
        let harness = Harness::new();
        harness.connector.script("host:2", Script::Hang);
        harness.publish([instance("a", "host:1")]).await;
        harness.publish([instance("a", "host:2")]).await;
        harness.connector.script("host:1", REFUSE);
        harness.connector.disconnect("host:1", "reset");
        settle().await;
        assert_eq!(harness.state("host:1"), None);
        assert_eq!(harness.state("host:2"), Some(EndpointState::Connecting));
    }

    #[tokio::test(start_paused = true)]
    async fn address_that_changes_back_keeps_its_connection() {
        let harness = Harness::new();
        harness.connector.script("host:2", Script::Hang);
        harness.publish([instance("a", "host:1")]).await;
        harness.publish([instance("a", "host:2")]).await;
        harness.publish([instance("a", "host:1")]).await;
        assert_eq!(harness.pickable(), ["host:1"]);
        assert_eq!(harness.state("host:2"), None);
        assert_eq!(harness.connector.attempts("host:1").len(), 1);
    }
}

mod removal {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn removed_endpoint_is_not_picked_and_closes_after_its_calls() {
        let harness = Harness::new();
        harness.publish([instance("a", "host:1")]).await;
        let (endpoint, stream) = harness.pick().unwrap();
        harness.publish([instance("b", "host:2")]).await;
        assert_eq!(harness.pickable(), ["host:2"]);
        assert_eq!(harness.state("host:1"), None);
        assert!(!endpoint.is_connected());
        assert_eq!(harness.connector.open_connections("host:1"), 1);

        drop(stream);
        assert_eq!(harness.connector.open_connections("host:1"), 0);
        harness.connector.disconnect("host:1", "closed");
        sleep(60 * SECOND).await;
        assert_eq!(harness.connector.attempts("host:1").len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn removed_endpoint_is_not_connected_any_more() {
        let harness = Harness::new();
        harness.connector.script("host:1", REFUSE);
        harness.publish(fleet(2)).await;
        sleep(10 * SECOND).await;
        harness.publish(fleet(2).split_off(1)).await;
        let attempts = harness.connector.attempts("host:1").len();
        sleep(600 * SECOND).await;
        assert_eq!(harness.connector.attempts("host:1").len(), attempts);
        assert_eq!(harness.pickable(), ["host:2"]);
    }

    #[tokio::test(start_paused = true)]
    async fn instance_under_another_id_keeps_its_connection() {
        let harness = Harness::new();
        harness.publish([instance("a", "host:1")]).await;
        harness.publish([instance("b", "host:1")]).await;
        assert_eq!(harness.pickable(), ["host:1"]);
        assert_eq!(harness.connector.attempts("host:1").len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn dropped_pool_closes_its_connections() {
        let mut harness = Harness::new();
        harness.publish(fleet(3)).await;
        harness.task.shutdown().await;
        // The view keeps the last picker, with its senders, until it is dropped too.
        let empty = Picker::new(BalancePolicy::RoundRobin, vec![], &Cursor::default());
        harness.view.picker.store(Arc::new(empty));
        for index in 1..=3 {
            let address = format!("host:{index}");
            assert_eq!(harness.connector.open_connections(&address), 0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn draining_instance_stays_connected_and_unpicked() {
        let harness = Harness::new();
        harness.publish(fleet(2)).await;
        let mut set = fleet(2);
        set[0].weight = 0;
        harness.publish(set).await;
        assert_eq!(harness.pickable(), ["host:2"]);
        let drained = harness.endpoint("host:1").unwrap();
        assert_eq!(drained.state, EndpointState::Draining);
        assert_eq!(drained.connections, 1);
    }
}

mod mass_deletion {
    use super::*;

    const KEEP_FOR: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn connected_endpoints_serve_until_the_time_is_over() {
        let harness = Harness::guarded_for(KEEP_FOR);
        harness.connector.script("host:5", REFUSE);
        harness.publish(fleet(5)).await;
        harness.publish(fleet(1)).await;
        let connected = ["host:1", "host:2", "host:3", "host:4"];
        assert_eq!(harness.pickable(), connected);
        assert!(harness.endpoint("host:2").unwrap().retained);
        assert!(!harness.endpoint("host:1").unwrap().retained);
        assert_eq!(harness.state("host:5"), None);

        // A retained endpoint that loses its connection for good is given up.
        harness.connector.script("host:4", REFUSE);
        harness.connector.disconnect("host:4", "reset");
        settle().await;
        assert_eq!(harness.pickable(), ["host:1", "host:2", "host:3"]);
        assert_eq!(harness.state("host:4"), None);

        sleep(KEEP_FOR).await;
        assert_eq!(harness.pickable(), ["host:1"]);
        assert_eq!(harness.connector.open_connections("host:2"), 0);
        assert_eq!(harness.connector.attempts("host:2").len(), 1);
    }

    /// A server that ends connections after a number of requests is not lost.
    #[tokio::test(start_paused = true)]
    async fn retained_endpoint_stays_while_its_connection_is_replaced() {
        let harness = Harness::guarded_for(KEEP_FOR);
        harness.publish(fleet(5)).await;
        harness.publish(fleet(1)).await;
        harness.connector.script("host:2", Script::Hang);
        harness.connector.disconnect("host:2", "GOAWAY NO_ERROR");
        settle().await;
        assert_eq!(harness.state("host:2"), Some(EndpointState::Connecting));
        assert!(harness.endpoint("host:2").unwrap().retained);

        sleep(FakeConnector::CONNECT_TIMEOUT).await;
        assert_eq!(harness.state("host:2"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn single_removal_takes_the_endpoint_out_at_once() {
        let harness = Harness::guarded_for(KEEP_FOR);
        harness.publish(fleet(5)).await;
        harness.publish(fleet(4)).await;
        assert_eq!(harness.pickable().len(), 4);
        assert_eq!(harness.state("host:5"), None);
        // The connection is held for the window, in case most of the others vanish too.
        assert_eq!(harness.connector.open_connections("host:5"), 1);
        sleep(DEFAULT_WINDOW).await;
        assert_eq!(harness.connector.open_connections("host:5"), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn removals_within_the_window_add_up() {
        let harness = Harness::guarded_for(KEEP_FOR);
        harness.publish(fleet(5)).await;
        for left in [4, 3] {
            harness.publish(fleet(left)).await;
            assert_eq!(harness.pickable().len(), left);
            sleep(SECOND).await;
        }
        harness.publish(fleet(2)).await;
        assert_eq!(harness.pickable().len(), 5);
    }

    #[tokio::test(start_paused = true)]
    async fn returning_instances_reclaim_their_connections() {
        let harness = Harness::guarded_for(KEEP_FOR);
        harness.publish(fleet(3)).await;
        harness.publish([]).await;
        assert_eq!(harness.pickable().len(), 3);
        harness.publish(fleet(3)).await;
        let endpoints = harness.view.endpoints();
        assert_eq!(endpoints.len(), 3);
        for endpoint in endpoints {
            assert!(!endpoint.retained);
            assert_eq!(harness.connector.attempts(&endpoint.address).len(), 1);
        }
        sleep(2 * KEEP_FOR).await;
        assert_eq!(harness.pickable().len(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn draining_instances_are_not_retained() {
        let harness = Harness::guarded_for(KEEP_FOR);
        let mut set = fleet(3);
        harness.publish(set.clone()).await;
        set.iter_mut().for_each(|instance| instance.draining = true);
        harness.publish(set).await;
        harness.publish([]).await;
        assert!(harness.view.endpoints().is_empty());
    }
}

mod panics {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn connector_s_is_a_failed_attempt() {
        let harness = Harness::new();
        harness.connector.script("host:1", Script::Panic);
        harness.publish(fleet(2)).await;
        let status = harness.endpoint("host:1").unwrap();
        assert_eq!(status.state, EndpointState::Backoff);
        let expected = "the connector panicked: no route to host:1";
        assert_eq!(status.last_error.as_deref(), Some(expected));
        assert_eq!(harness.pickable(), ["host:2"]);
        // About 1, 1.6 and 2.6 s apart.
        sleep(4 * SECOND).await;
        assert_eq!(harness.connector.attempts("host:1").len(), 3);
        harness.connector.script("host:1", Script::Accept);
        sleep(5 * SECOND).await;
        assert_eq!(harness.pickable(), ["host:1", "host:2"]);
        assert_eq!(harness.endpoint("host:1").unwrap().last_error, None);
    }

    #[tokio::test(start_paused = true)]
    async fn source_s_leaves_the_last_set_in_use() {
        let harness = Harness::new();
        harness.connector.script("host:2", REFUSE);
        harness.publish(fleet(2)).await;
        assert_eq!(harness.endpoint("host:1").unwrap().last_error, None);
        harness.publish([instance(PANIC, "host:3")]).await;
        let error = "the source panicked: bad file; its last set is kept";
        let status = harness.endpoint("host:1").unwrap();
        assert_eq!(status.state, EndpointState::Ready);
        assert_eq!(status.last_error.as_deref(), Some(error));
        let both = format!("connection refused; {error}");
        let status = harness.endpoint("host:2").unwrap();
        assert_eq!(status.last_error, Some(both));
        let message = harness.view.describe_unavailable();
        assert!(message.ends_with(error), "{message}");

        // The pool goes on.
        harness.connector.script("host:2", Script::Accept);
        sleep(3 * SECOND).await;
        assert_eq!(harness.pickable(), ["host:1", "host:2"]);
        harness.connector.script("host:1", REFUSE);
        harness.connector.disconnect("host:1", "reset");
        settle().await;
        assert_eq!(harness.pickable(), ["host:2"]);
    }
}

mod publications {
    use super::*;

    /// How often the pool publishes while `count` endpoints fail, one in each millisecond.
    async fn while_failing(count: u32) -> usize {
        let harness = Harness::new();
        let fleet = fleet(count as usize);
        for (instance, index) in fleet.iter().zip(1..) {
            let after = Duration::from_millis(1) * index;
            harness
                .connector
                .script(&instance.address, Script::Refuse { after });
        }
        harness.publish(fleet).await;
        let mut statuses = harness.view.watch_status();
        let mut publications = 0;
        let counting = async {
            while statuses.changed().await.is_ok() {
                publications += 1;
            }
        };
        let duration = Duration::from_millis(1) * count;
        let _ = timeout(duration, counting).await;
        publications
    }

    #[tokio::test(start_paused = true)]
    async fn of_a_large_set_merge_changes() {
        let small = while_failing(100).await;
        assert!((90..=110).contains(&small), "{small}");
        // An attempt every 2 ms.
        let large = while_failing(2_000).await;
        assert!((600..=1_100).contains(&large), "{large}");
    }
}

mod view {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waiting_call_wakes_when_an_endpoint_becomes_ready() {
        let harness = Harness::new();
        harness.connector.script("host:1", REFUSE);
        harness.publish(fleet(1)).await;
        assert!(harness.pick().is_none());
        harness.connector.script("host:1", Script::Accept);
        let (endpoint, _stream) = harness.wait_for_stream(3 * SECOND).await;
        assert_eq!(&*endpoint.target.address, "host:1");
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_call_wakes_when_a_stream_is_free() {
        let harness = Harness::new();
        harness.publish(fleet(1)).await;
        harness.connector.set_stream_limit("host:1", 1);
        let (_, stream) = harness.pick().unwrap();
        assert!(harness.pick().is_none());
        let limit = "host:1 (ready, its limit of 1 streams is reached)";
        let message = harness.view.describe_unavailable();
        assert!(message.contains(limit), "{message}");

        let free = async {
            settle().await;
            drop(stream);
        };
        tokio::join!(harness.wait_for_stream(SECOND), free);
    }

    #[tokio::test(start_paused = true)]
    async fn unavailable_names_each_endpoint_and_its_error() {
        let harness = Harness::new();
        harness.connector.script("host:1", REFUSE);
        harness.connector.script("host:2", Script::Hang);
        let mut tls = instance("c", "host:3");
        tls.tls = Some(true);
        let empty = harness.view.describe_unavailable();
        assert_eq!(empty, "no instances under services/echo/");
        harness
            .publish([instance("a", "host:1"), instance("b", "host:2"), tls])
            .await;
        assert_eq!(
            harness.view.describe_unavailable(),
            "none of 3 instances under services/echo/ is ready: host:1 (backing off: connection \
             refused), host:2 (connecting), host:3 speaks TLS and the channel does not; give it \
             `tls(..)`"
        );
        harness.publish(fleet(20)).await;
        assert!(harness.view.describe_unavailable().ends_with(", ..."));
    }

    #[tokio::test(start_paused = true)]
    async fn status_is_published_with_each_change() {
        let harness = Harness::new();
        let mut statuses = harness.view.watch_status();
        let mut wait_for_ready = async |ready| {
            let published = statuses.wait_for(|status| status.ready == ready);
            let published = timeout(10 * SECOND, published).await.unwrap();
            Arc::clone(&published.unwrap())
        };
        harness.connector.script("host:2", REFUSE);
        harness.publish(fleet(2)).await;
        assert_eq!(wait_for_ready(1).await.endpoints().len(), 2);
        harness.connector.script("host:2", Script::Accept);
        let both = wait_for_ready(2).await;
        assert_eq!(both.endpoints(), harness.view.endpoints());
        harness.connector.script("host:1", REFUSE);
        harness.connector.disconnect("host:1", "reset");
        wait_for_ready(1).await;
    }
}
