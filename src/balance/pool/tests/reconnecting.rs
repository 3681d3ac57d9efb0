//! The next attempt to connect after the end of a connection.

use super::*;

/// Breaks the connections to `host:1`, and returns how many attempts to connect were made at once.
async fn disconnect(harness: &Harness) -> usize {
    let before = harness.connector.attempts("host:1").len();
    harness.connector.disconnect("host:1", "reset");
    settle().await;
    harness.connector.attempts("host:1").len() - before
}

async fn wait_until_ready(harness: &Harness) {
    while harness.state("host:1") != Some(EndpointState::Ready) {
        settle().await;
    }
}

/// A pool of one endpoint whose last three connections ended without a response.
async fn backing_off() -> Harness {
    let harness = Harness::new();
    harness.publish(fleet(1)).await;
    assert_eq!(disconnect(&harness).await, 1);
    assert_eq!(disconnect(&harness).await, 1);
    assert_eq!(disconnect(&harness).await, 0);
    assert_eq!(harness.state("host:1"), Some(EndpointState::Backoff));
    harness
}

#[tokio::test(start_paused = true)]
async fn connection_that_carried_a_response_is_replaced_at_once() {
    let harness = Harness::new();
    harness.publish(fleet(1)).await;
    for _ in 0..20 {
        harness.connector.respond("host:1");
        assert_eq!(disconnect(&harness).await, 1);
        assert_eq!(harness.state("host:1"), Some(EndpointState::Ready));
    }
}

#[tokio::test(start_paused = true)]
async fn third_connection_without_a_response_backs_off() {
    let harness = backing_off().await;
    let error = harness.endpoint("host:1").unwrap().last_error;
    assert_eq!(error.as_deref(), Some("connection lost: reset"));
    let mut paused = Vec::new();
    for _ in 0..4 {
        let lost_at = Instant::now();
        wait_until_ready(&harness).await;
        paused.push(lost_at.elapsed());
        assert_eq!(harness.endpoint("host:1").unwrap().last_error, None);
        assert_eq!(disconnect(&harness).await, 0);
    }
    assert!(paused[3] > paused[0].mul_f64(1.6), "{paused:?}");
}

#[tokio::test(start_paused = true)]
async fn late_response_ends_the_pause() {
    let harness = Harness::new();
    harness.publish(fleet(1)).await;
    // The call keeps the first connection open while the server announces its end.
    let call = harness.pick();
    assert_eq!(disconnect(&harness).await, 1);
    assert_eq!(disconnect(&harness).await, 1);
    assert_eq!(disconnect(&harness).await, 0);
    harness.connector.respond("host:1");
    settle().await;
    assert_eq!(harness.state("host:1"), Some(EndpointState::Ready));
    // The response counts for the connections before, and not for those after.
    drop(call);
    assert_eq!(disconnect(&harness).await, 1);
    assert_eq!(disconnect(&harness).await, 1);
    assert_eq!(disconnect(&harness).await, 0);
}

#[tokio::test(start_paused = true)]
async fn waiting_call_gets_one_attempt_at_once() {
    let harness = backing_off().await;
    let waiting = harness.start_call();
    settle().await;
    assert_eq!(harness.state("host:1"), Some(EndpointState::Ready));
    drop(waiting);
    // The call has gained nothing, so the pause holds although another one waits.
    harness.connector.set_stream_limit("host:1", 0);
    let _waiting = harness.start_call();
    assert_eq!(disconnect(&harness).await, 0);
    assert_eq!(harness.state("host:1"), Some(EndpointState::Backoff));
}

#[tokio::test(start_paused = true)]
async fn call_that_waits_already_gets_its_attempt() {
    let harness = Harness::new();
    harness.publish(fleet(1)).await;
    assert_eq!(disconnect(&harness).await, 1);
    assert_eq!(disconnect(&harness).await, 1);
    harness.connector.set_stream_limit("host:1", 0);
    let waiting = harness.start_call();
    settle().await;
    assert!(!waiting.is_finished());
    assert_eq!(disconnect(&harness).await, 1);
    assert!(waiting.is_finished());
}

#[tokio::test(start_paused = true)]
async fn waiting_call_does_not_hurry_failed_attempts() {
    let harness = Harness::new();
    harness.connector.script("host:1", REFUSE);
    harness.publish(fleet(1)).await;
    let _waiting = harness.start_call();
    settle().await;
    assert_eq!(harness.connector.attempts("host:1").len(), 1);
}
