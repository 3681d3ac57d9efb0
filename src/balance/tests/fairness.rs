//! The order in which waiting calls are served, and streams of calls that leave.

use fastrand::Rng;

use super::*;
use crate::balance::call::AttemptedEndpoints;

/// A call, and the endpoints that it was sent to.
struct Call {
    task: JoinHandle<Result<Response<Body>, Status>>,
    attempted: AttemptedEndpoints,
}

impl Call {
    fn start(channel: &Channel, timeout: Option<Duration>) -> Self {
        let mut request = Request::new(Body::empty());
        if let Some(timeout) = timeout {
            let value = format!("{}m", timeout.as_millis()).parse().unwrap();
            request.headers_mut().insert("grpc-timeout", value);
        }
        let dispatcher = Arc::clone(&channel.dispatcher);
        let attempted = AttemptedEndpoints::default();
        let sent_to = attempted.clone();
        let task = tokio::spawn(async move {
            let context = CallContext {
                attempted: Some(&sent_to),
                ..CallContext::default()
            };
            dispatcher.call(request, context).await
        });
        Self { task, attempted }
    }

    fn is_sent(&self) -> bool {
        self.attempted.last().is_some()
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Runs every task until it waits.
async fn settle() {
    sleep(Duration::from_millis(1)).await;
}

#[tokio::test(start_paused = true)]
async fn waiting_calls_are_served_in_order() {
    let channel = Channel::new(Script::Accept, true).await;
    channel.connector.set_stream_limit("a:1", 1);
    let mut calls = Vec::new();
    for _ in 0..20 {
        calls.push(Call::start(&channel, None));
        settle().await;
    }
    while !calls.is_empty() {
        let sent: Vec<bool> = calls.iter().map(Call::is_sent).collect();
        assert!(sent[0] && !sent[1..].contains(&true), "{sent:?}");
        // A call that starts at the moment when the stream is freed comes last all the same.
        drop(calls.remove(0));
        let late = Call::start(&channel, None);
        settle().await;
        assert!(calls.is_empty() || !late.is_sent());
    }
}

#[tokio::test(start_paused = true)]
async fn avoided_endpoint_with_room_is_used() {
    let channel = Channel::new(Script::Accept, true).await;
    channel.connector.set_stream_limit("a:1", 0);
    let waiting = Call::start(&channel, None);
    waiting.attempted.add(&"a:1".into());
    let behind = Call::start(&channel, None);
    settle().await;
    channel.connector.set_stream_limit("a:1", 2);
    settle().await;
    assert_eq!(channel.in_flight(), 2);
    assert!(behind.is_sent());
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_calls_get_the_first_endpoint() {
    let channel = Channel::new(REFUSE, true).await;
    let calls: Vec<Call> = (0..10_000).map(|_| Call::start(&channel, None)).collect();
    settle().await;
    channel.connector.script("a:1", Script::Accept);
    sleep(2 * SECOND).await;
    let sent = calls.iter().take_while(|call| call.is_sent()).count();
    assert_eq!(sent, STREAM_LIMIT);
    channel.connector.set_stream_limit("a:1", calls.len());
    settle().await;
    assert_eq!(channel.in_flight(), calls.len());
}

/// Whatever calls do while they wait, afterwards exactly as many calls run at once as the endpoint
/// allows.
#[tokio::test(start_paused = true)]
async fn no_stream_is_lost() {
    for seed in 0..100 {
        let mut rng = Rng::with_seed(seed);
        let channel = Channel::new(Script::Accept, rng.bool()).await;
        channel.connector.set_stream_limit("a:1", rng.usize(1..5));
        let mut calls: Vec<Call> = Vec::new();
        for _ in 0..200 {
            match rng.u32(..20) {
                0..8 => {
                    let timeout = Duration::from_millis(rng.u64(1..100));
                    calls.push(Call::start(&channel, rng.bool().then_some(timeout)));
                }
                8..14 if !calls.is_empty() => drop(calls.swap_remove(rng.usize(..calls.len()))),
                14 => channel.connector.set_stream_limit("a:1", rng.usize(..5)),
                15 => channel.connector.disconnect("a:1", "reset"),
                16 => sleep(SECOND * rng.u32(..3)).await,
                // Most steps run before the tasks that the earlier ones have woken.
                _ => sleep(Duration::from_millis(rng.u64(..20))).await,
            }
        }
        calls.clear();
        // Longer than the backoff after connections that did not last.
        sleep(100 * SECOND).await;
        assert_eq!(channel.in_flight(), 0, "seed {seed}");
        for limit in [3, 1, 0, 7] {
            channel.connector.set_stream_limit("a:1", limit);
            let calls: Vec<Call> = (0..20).map(|_| Call::start(&channel, None)).collect();
            settle().await;
            assert_eq!(channel.in_flight(), limit, "seed {seed}");
            let sent = calls.iter().take_while(|call| call.is_sent()).count();
            assert_eq!(sent, limit, "seed {seed}");
            drop(calls);
            settle().await;
            assert_eq!(channel.in_flight(), 0, "seed {seed}");
        }
    }
}
