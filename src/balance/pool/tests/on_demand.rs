//! Attempts to connect that waiting calls make during a backoff.

use tokio_util::task::AbortOnDropHandle;

use super::*;

const MILLISECOND: Duration = Duration::from_millis(1);

/// A call that waits for a stream and then keeps it. Dropping it cancels the call.
fn start_call(harness: &Harness) -> AbortOnDropHandle<(Arc<Endpoint>, ReservedStream)> {
    let view = Arc::clone(&harness.view);
    AbortOnDropHandle::new(tokio::spawn(async move {
        let _waiting = view.demand.register();
        let call = WaitingCall {
            started: Instant::now(),
            avoids: Arc::new(|_| false),
            waits_for_ready: true,
        };
        view.wait_for_stream(call).await.unwrap()
    }))
}

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
    let call = start_call(harness);
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
    let _call = start_call(&harness);
    settle().await;
    harness.connector.send_request("host:1");
    sleep(300 * MILLISECOND).await;
    disconnect(&harness, 1).await;
    let _waiting = start_call(&harness);
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
            let call = start_call(&harness);
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
    // One after each of the pauses, which are 1 s, 1.6 s and so on.
    let refused = attempts_of_short_calls(REFUSE, Duration::ZERO).await;
    assert!((5..=10).contains(&refused), "{refused}");
    // Two more at the beginning, and one for a call in every second pause.
    let greeted = attempts_of_short_calls(Script::Accept, MILLISECOND).await;
    assert!((8..=20).contains(&greeted), "{greeted}");
    // One in each second.
    let idle = attempts_of_short_calls(Script::Accept, 150 * MILLISECOND).await;
    assert!((8..=65).contains(&idle), "{idle}");
}
