//! Attempts to connect that waiting calls make during a backoff.

use super::*;

const MILLISECOND: Duration = Duration::from_millis(1);

fn attempts(harness: &Harness, count: usize) -> usize {
    let attempts = |index| harness.connector.attempts(&format!("host:{index}")).len();
    (1..=count).map(attempts).sum()
}

/// Ends the connections to all endpoints.
async fn disconnect(harness: &Harness, count: usize) {
    for index in 1..=count {
        let address = format!("host:{index}");
        harness.connector.disconnect(&address, "idle");
    }
    settle().await;
}

/// A pool whose endpoints all back off for about 0.8 s or more, and connect at once for a call.
async fn idle_pool(count: usize) -> Harness {
    let harness = Harness::new();
    harness.publish(fleet(count)).await;
    for _ in 0..3 {
        disconnect(&harness, count).await;
    }
    assert_eq!(attempts(&harness, count), 3 * count);
    harness
}

/// A pool of one endpoint that backs off for 5 s or more.
async fn long_idle_pool() -> Harness {
    let harness = idle_pool(1).await;
    for _ in 0..4 {
        while harness.state("host:1") != Some(EndpointState::Ready) {
            settle().await;
        }
        disconnect(&harness, 1).await;
    }
    harness
}

/// Makes a call that leaves as soon as the endpoint is connected. The connection ends later.
async fn call_that_leaves(harness: &Harness) {
    let call = harness.start_call();
    settle().await;
    drop(call);
    sleep(300 * MILLISECOND).await;
    disconnect(harness, 1).await;
}

/// The server was healthy, so the next call does not wait for the whole pause.
#[tokio::test(start_paused = true)]
async fn attempt_of_a_call_that_left_is_not_used_up() {
    let harness = long_idle_pool().await;
    let before = attempts(&harness, 1);
    for made in 1..=5 {
        call_that_leaves(&harness).await;
        assert_eq!(attempts(&harness, 1), before + made);
        // Attempts for calls are 1 s apart then.
        sleep(SECOND).await;
    }
}

#[tokio::test(start_paused = true)]
async fn attempt_whose_request_was_lost_is_used_up() {
    let harness = long_idle_pool().await;
    let before = attempts(&harness, 1);
    let _call = harness.start_call();
    settle().await;
    harness.connector.send_request("host:1");
    sleep(300 * MILLISECOND).await;
    disconnect(&harness, 1).await;
    let _waiting = harness.start_call();
    sleep(3 * SECOND).await;
    assert_eq!(attempts(&harness, 1), before + 1);
}

/// How often the pool connects within a minute to a server whose connections last `lifetime`, while
/// a call waits for 3 ms a hundred times per second.
async fn attempts_of_short_calls(server: Script, lifetime: Duration) -> usize {
    let harness = Harness::new();
    harness.connector.script("host:1", server);
    harness.publish(fleet(1)).await;
    let closing = async {
        loop {
            if harness.state("host:1") == Some(EndpointState::Ready) {
                sleep(lifetime).await;
                harness.connector.disconnect("host:1", "idle");
            }
            sleep(5 * MILLISECOND).await;
        }
    };
    let calls = async {
        loop {
            let call = harness.start_call();
            sleep(3 * MILLISECOND).await;
            drop(call);
            sleep(7 * MILLISECOND).await;
        }
    };
    let both = async { tokio::join!(closing, calls) };
    assert!(timeout(60 * SECOND, both).await.is_err());
    attempts(&harness, 1)
}

#[tokio::test(start_paused = true)]
async fn short_calls_make_no_tight_loop() {
    // An attempt after each of the pauses, which are 1 s, 1.6 s and so on.
    let refused = attempts_of_short_calls(REFUSE, Duration::ZERO).await;
    assert!((5..=10).contains(&refused), "{refused}");
    // Two more at the beginning, and one for a call in every second pause.
    let greeted = attempts_of_short_calls(Script::Accept, MILLISECOND).await;
    assert!((8..=20).contains(&greeted), "{greeted}");
    // An attempt in each second.
    let idle = attempts_of_short_calls(Script::Accept, 150 * MILLISECOND).await;
    assert!((8..=65).contains(&idle), "{idle}");
}

/// How many attempts follow the three that each endpoint of [`idle_pool`] has seen.
fn more_attempts(harness: &Harness, count: usize) -> usize {
    attempts(harness, count) - 3 * count
}

#[tokio::test(start_paused = true)]
async fn one_call_makes_one_attempt() {
    let harness = idle_pool(100).await;
    let call = harness.start_call();
    settle().await;
    assert!(call.is_finished());
    sleep(500 * MILLISECOND).await;
    assert_eq!(more_attempts(&harness, 100), 1);
}

#[tokio::test(start_paused = true)]
async fn each_call_makes_one_attempt_at_a_time() {
    let harness = idle_pool(100).await;
    for index in 1..=100 {
        let address = format!("host:{index}");
        harness.connector.script(&address, Script::Hang);
    }
    let calls: Vec<_> = (0..7).map(|_| harness.start_call()).collect();
    settle().await;
    assert_eq!(more_attempts(&harness, 100), 7);
    sleep(200 * MILLISECOND).await;
    assert_eq!(more_attempts(&harness, 100), 7);
    sleep(100 * MILLISECOND).await;
    assert_eq!(more_attempts(&harness, 100), 14);
    // Calls that leave make no more attempts.
    drop(calls);
    sleep(300 * MILLISECOND).await;
    assert_eq!(more_attempts(&harness, 100), 14);
}

#[tokio::test(start_paused = true)]
async fn endpoint_that_hangs_delays_the_next_attempt_by_250_ms() {
    let harness = idle_pool(3).await;
    harness.connector.script("host:1", Script::Hang);
    harness.connector.script("host:2", Script::Hang);
    let started = Instant::now();
    harness.wait_for_stream(SECOND).await;
    let waited = started.elapsed();
    assert!(waited <= 510 * MILLISECOND, "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn next_endpoint_follows_a_full_one_at_once() {
    let harness = idle_pool(3).await;
    let first = harness.start_call();
    settle().await;
    assert!(first.is_finished());
    harness.connector.set_stream_limit("host:1", 1);
    let second = harness.start_call();
    settle().await;
    assert!(second.is_finished());
    assert_eq!(more_attempts(&harness, 3), 2);
}

#[tokio::test(start_paused = true)]
async fn next_endpoint_follows_a_failed_one_at_once() {
    let harness = idle_pool(5).await;
    for index in 1..=4 {
        let address = format!("host:{index}");
        harness.connector.script(&address, REFUSE);
    }
    let call = harness.start_call();
    settle().await;
    assert!(call.is_finished());
    assert!(more_attempts(&harness, 5) <= 5);
}

#[tokio::test(start_paused = true)]
async fn draining_endpoint_is_passed_over() {
    let harness = idle_pool(2).await;
    let mut set = fleet(2);
    set[0].weight = 0;
    set[1].weight = 0;
    harness.publish(set.clone()).await;
    let call = harness.start_call();
    settle().await;
    assert_eq!(more_attempts(&harness, 2), 0);
    set[1].weight = 1;
    harness.publish(set).await;
    assert!(call.is_finished());
    assert_eq!(harness.connector.attempts("host:1").len(), 3);
}
