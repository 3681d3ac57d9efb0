//! Watches: every event once and in order, through restarts, lost streams and compaction.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::support::{PATIENCE, TestResult, connect, version};
use futures::StreamExt;
use goo_etcd::client::WatchFilterType;
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{Client, Error, EventType, TxnOp, Watch, WatchOptions};
use tokio::time::timeout;

/// The next `n` events as (type, key, value).
async fn events(watch: &mut Watch, n: usize) -> Vec<(EventType, String, String)> {
    let mut events = Vec::new();
    while events.len() < n {
        let response = timeout(PATIENCE, watch.next())
            .await
            .unwrap_or_else(|_| panic!("no event after {events:?}"))
            .expect("the watch ended")
            .expect("the watch failed");
        for event in response.events() {
            let kv = event.kv().unwrap();
            events.push((
                event.event_type(),
                kv.key_str().unwrap().to_owned(),
                kv.value_str().unwrap().to_owned(),
            ));
        }
    }
    events
}

/// Puts a key, again after each failure.
async fn put_with_retries(client: &Client, key: &str, value: &str) {
    timeout(PATIENCE, async {
        while client.put(key, value, None).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn prefix_watch_yields_only_its_keys() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    client.put("a/before", "0", None).await?;
    let mut watch = client
        .watch("a/", WatchOptions::new().with_prefix())
        .await?;
    client.put("a/1", "1", None).await?;
    client.put("b/1", "1", None).await?;
    client.delete("a/1", None).await?;
    assert_eq!(
        events(&mut watch, 2).await,
        [
            (EventType::Put, "a/1".to_owned(), "1".to_owned()),
            (EventType::Delete, "a/1".to_owned(), String::new()),
        ]
    );
    // A start revision yields earlier events too.
    let from_start = WatchOptions::new().with_prefix().with_start_revision(1);
    let mut watch = client.watch("a/", from_start).await?;
    assert_eq!(events(&mut watch, 3).await[0].1, "a/before");
    Ok(())
}

#[tokio::test]
async fn watch_options_work_as_in_etcd() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let first = client.put("b", "0", None).await?;
    let start = first.header().ok_or("a header")?.revision() + 1;
    for key in ["a", "b", "c", "d"] {
        client.put(key, "1", None).await?;
    }
    client.delete("b", None).await?;
    client.put("end", "", None).await?;
    // The keys of all events before `end`, upper-case for deletions. Every watch sees `end`.
    let seen = async |key: &str, options: WatchOptions| {
        let mut watch = client
            .watch(key, options.with_start_revision(start))
            .await?;
        let mut seen = String::new();
        loop {
            for (kind, key, _) in events(&mut watch, 1).await {
                match (kind, key.as_str()) {
                    (_, "end") => return Ok::<_, Error>(seen),
                    (EventType::Put, key) => seen.push_str(key),
                    (EventType::Delete, key) => seen.push_str(&key.to_uppercase()),
                }
            }
        }
    };
    let options = WatchOptions::new;
    assert_eq!(seen("b", options().with_range("f")).await?, "bcdB");
    assert_eq!(seen("c", options().with_from_key()).await?, "cd");
    assert_eq!(seen("", options().with_all_keys()).await?, "abcdB");
    let no_deletes = options().with_filters([WatchFilterType::NoDelete]);
    assert_eq!(seen("", no_deletes.with_all_keys()).await?, "abcd");

    let no_puts = options().with_filters([WatchFilterType::NoPut]);
    let no_puts = no_puts.with_all_keys().with_start_revision(start);
    let mut watch = client.watch("", no_puts).await?;
    let deleted = (EventType::Delete, "b".to_owned(), String::new());
    assert_eq!(events(&mut watch, 1).await, [deleted]);

    // Events carry the previous value; the first has none.
    let before = options().with_prev_key().with_start_revision(1);
    let mut watch = client.watch("b", before).await?;
    let mut values = Vec::new();
    while values.len() < 3 {
        let response = timeout(PATIENCE, watch.next()).await?.ok_or("an event")??;
        for event in response.events() {
            let before = event.prev_kv().map(|kv| kv.value_str().unwrap().to_owned());
            values.push((event.event_type(), before));
        }
    }
    assert_eq!(
        values,
        [
            (EventType::Put, None),
            (EventType::Put, Some("0".to_owned())),
            (EventType::Delete, Some("1".to_owned())),
        ]
    );
    Ok(())
}

#[tokio::test]
async fn progress_is_yielded_only_on_request() -> TestResult {
    let flag = match version() {
        (3, ..6) => "--experimental-watch-progress-notify-interval",
        _ => "--watch-progress-notify-interval",
    };
    let etcd = Etcd::builder().args([flag, "1s"]).start().await?;
    let client = connect(etcd.endpoint()).await;
    let options = WatchOptions::new().with_progress_notify();
    let mut notified = client.watch("n", options).await?;
    let mut quiet = client.watch("n", None).await?;
    client.put("other", "1", None).await?;
    let put = client.put("other", "2", None).await?;
    let now = put.header().ok_or("a header")?.revision();
    loop {
        let progress = timeout(PATIENCE, notified.next())
            .await?
            .ok_or("progress")??;
        assert!(progress.is_progress() && progress.revision() <= now);
        if progress.revision() == now {
            break;
        }
    }
    let waited = timeout(Duration::from_secs(3), quiet.next()).await;
    assert!(waited.is_err(), "{waited:?}");
    client.put("n", "1", None).await?;
    assert_eq!(events(&mut quiet, 1).await[0].2, "1");
    Ok(())
}

#[tokio::test]
async fn restarts_keep_events_complete_and_ordered() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    // One watch has yielded nothing before etcd is killed, the other has.
    let mut quiet = client.watch("n", None).await?;
    let mut busy = client.watch("n", None).await?;
    let writer = connect(etcd.endpoint()).await;
    let mut last = 0;
    for round in 0..3 {
        for _ in 0..20 {
            last += 1;
            put_with_retries(&writer, "n", &last.to_string()).await;
        }
        if round == 1 {
            let seen = events(&mut busy, 40).await;
            assert_eq!(seen[39].2, "40");
        }
        // etcd 3.5.0 to 3.5.2 may lose a confirmed write if killed within 100 ms, before it is in
        // their store (etcd-io/etcd#13766). The revision is then assigned again.
        tokio::time::sleep(Duration::from_millis(500)).await;
        etcd.kill().await?;
        etcd.start_again().await?;
    }
    put_with_retries(&writer, "n", "end").await;

    // A retried put may have been applied twice, so the expected events come from etcd itself.
    let from_start = WatchOptions::new().with_start_revision(1);
    let mut all = client.watch("n", from_start).await?;
    let expected = values_to_end(&mut all).await;
    assert!(expected.len() > 50, "{expected:?}");
    let seen_before = expected.iter().position(|n| n == "40").ok_or("no 40")?;
    assert_eq!(values_to_end(&mut busy).await, expected[seen_before + 1..]);
    assert_eq!(values_to_end(&mut quiet).await, expected);
    Ok(())
}

/// The values of the next events, up to `end`.
async fn values_to_end(watch: &mut Watch) -> Vec<String> {
    let mut values = Vec::new();
    while values.last().is_none_or(|value| value != "end") {
        values.extend(events(watch, 1).await.into_iter().map(|event| event.2));
    }
    values
}

/// All events from the first revision up to the key `end`, read by the raw etcd-client.
async fn read_history(etcd: &Etcd, end: &str) -> TestResult<Vec<RawEvent>> {
    let everything = goo_etcd::etcd_client::WatchOptions::new()
        .with_all_keys()
        .with_start_revision(1);
    let mut raw = etcd.client().await?.watch_client();
    raw = raw.max_decoding_message_size(usize::MAX);
    let mut stream = raw.watch("", Some(everything)).await?;
    let mut history = Vec::new();
    while let Some(message) = timeout(PATIENCE, stream.message()).await?? {
        history.extend(message.events().iter().map(raw_event));
        if history.last().is_some_and(|(_, key, _)| key == end) {
            return Ok(history);
        }
    }
    Err("the watch ended before the last event".into())
}

/// Revision, key, and length of the value.
type RawEvent = (i64, String, usize);

fn raw_event(event: &goo_etcd::client::Event) -> RawEvent {
    let kv = event.kv().unwrap();
    let key = kv.key_str().unwrap().to_owned();
    (kv.mod_revision(), key, kv.value().len())
}

/// Commits transactions one after another, each of which puts several keys.
async fn put_transactions(
    client: &Client,
    transactions: usize,
    keys: usize,
    length: usize,
) -> TestResult {
    for _ in 0..transactions {
        let puts = (0..keys).map(|key| TxnOp::put(format!("t/{key}"), vec![7; length], None));
        client.txn().and_then(puts).commit().await?;
    }
    client.put("t/end", "", None).await?;
    Ok(())
}

/// All events up to the last, and asserts that each response has whole revisions.
async fn events_to_end(watch: &mut Watch) -> Vec<RawEvent> {
    let mut yielded: Vec<RawEvent> = Vec::new();
    loop {
        let response = timeout(PATIENCE, watch.next())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        let more: Vec<_> = response.events().iter().map(raw_event).collect();
        if let (Some(last), Some(first)) = (yielded.last(), more.first()) {
            assert!(last.0 < first.0, "revision {} is in two responses", first.0);
        }
        yielded.extend(more);
        if yielded.last().is_some_and(|(_, key, _)| key == "t/end") {
            return yielded;
        }
    }
}

#[tokio::test]
async fn lost_streams_keep_revisions_whole() -> TestResult {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let client = connect(proxy.endpoint()).await;
    let prefix = WatchOptions::new().with_prefix().with_start_revision(1);
    let mut watch = client.watch("t/", prefix).await?;
    let seen = tokio::spawn(async move { events_to_end(&mut watch).await });
    let writer = connect(etcd.endpoint()).await;
    let writing = tokio::spawn(async move {
        put_transactions(&writer, 3000, 7, 10).await.unwrap();
    });
    let mut lost = 0;
    while !writing.is_finished() {
        tokio::time::sleep(Duration::from_millis(40)).await;
        proxy.disconnect().await?;
        lost += 1;
    }
    writing.await?;
    let history = read_history(&etcd, "t/end").await?;
    assert!(history.len() == 3000 * 7 + 1 && lost > 5, "{lost}");
    assert_eq!(timeout(PATIENCE, seen).await??, history);
    Ok(())
}

#[tokio::test]
async fn cut_fragments_keep_revisions_whole() -> TestResult {
    let etcd = Etcd::start().await?;
    // etcd sends a backlog in fragments of 2 MiB: 4 of these events, while 3 are one revision.
    const LENGTH: usize = 450_000;
    put_transactions(&connect(etcd.endpoint()).await, 12, 3, LENGTH).await?;
    let history = read_history(&etcd, "t/end").await?;
    assert_eq!(history.len(), 12 * 3 + 1);
    for cut_after in [1, 5, 9, 14, 20, 30] {
        let proxy = Proxy::start(etcd.endpoint()).await?;
        let client = connect(proxy.endpoint()).await;
        // Slow enough to cut the stream in between.
        proxy.limit_rate(16 * 1024 * 1024);
        let prefix = WatchOptions::new().with_prefix().with_start_revision(1);
        let mut watch = client.watch("t/", prefix).await?;
        let seen = tokio::spawn(async move { events_to_end(&mut watch).await });
        let bytes = u64::try_from(cut_after * LENGTH)?;
        timeout(PATIENCE, async {
            while proxy.bytes_down() < bytes {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await?;
        proxy.disconnect().await?;
        assert!(!seen.is_finished());
        proxy.limit_rate(0);
        assert_eq!(timeout(PATIENCE, seen).await??, history, "{cut_after}");
    }
    Ok(())
}

#[tokio::test]
async fn gap_before_the_first_event_is_covered() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let mut watch = client.watch("n", None).await?;
    etcd.restart().await?;
    // The watch is not polled, so its stream has not been reopened before this put.
    put_with_retries(&connect(etcd.endpoint()).await, "n", "in the gap").await;
    assert_eq!(events(&mut watch, 1).await[0].2, "in the gap");
    Ok(())
}

#[tokio::test]
async fn compacted_start_revision_ends_the_watch() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    for n in 0..10 {
        client.put("n", n.to_string(), None).await?;
    }
    let compacted = etcd.compact().await?;
    let mut watch = client
        .watch("n", WatchOptions::new().with_start_revision(2))
        .await?;
    let end = timeout(PATIENCE, watch.next()).await?.unwrap().unwrap_err();
    assert!(
        matches!(end, Error::Compacted { compact_revision, .. } if compact_revision == compacted),
        "{end:?}"
    );
    assert!(watch.next().await.is_none());
    Ok(())
}

#[tokio::test]
async fn compaction_while_disconnected_ends_the_watch() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let mut watch = client.watch("n", None).await?;
    client.put("n", "1", None).await?;
    events(&mut watch, 1).await;
    etcd.restart().await?;
    let writer = connect(etcd.endpoint()).await;
    put_with_retries(&writer, "n", "2").await;
    put_with_retries(&writer, "n", "3").await;
    let compacted = etcd.compact().await?;
    let end = timeout(PATIENCE, watch.next()).await?.unwrap();
    assert!(
        matches!(end, Err(Error::Compacted { compact_revision, .. }) if compact_revision == compacted),
        "{end:?}"
    );
    Ok(())
}

#[tokio::test]
async fn wiped_etcd_ends_the_watch() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let mut watch = client.watch("n", None).await?;
    for n in 0..10 {
        client.put("n", n.to_string(), None).await?;
    }
    events(&mut watch, 10).await;
    etcd.wipe_and_restart().await?;
    let end = timeout(PATIENCE, watch.next()).await?.unwrap().unwrap_err();
    assert!(
        matches!(
            end,
            Error::RevisionWentBack {
                seen: 11,
                now: 1,
                ..
            }
        ),
        "{end:?}"
    );
    assert!(watch.next().await.is_none());
    Ok(())
}

#[tokio::test]
async fn idle_watch_still_yields() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let mut watch = client.watch("n", None).await?;
    // The watch sends several progress requests, whose responses are not yielded.
    assert!(
        timeout(Duration::from_secs(12), watch.next())
            .await
            .is_err()
    );
    client.put("n", "1", None).await?;
    assert_eq!(events(&mut watch, 1).await[0].2, "1");
    Ok(())
}

#[tokio::test]
async fn paused_etcd_does_not_end_the_watch() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let mut watch = client.watch("n", None).await?;
    etcd.pause().await?;
    // Longer than keep-alive interval plus timeout, so the connection is closed meanwhile.
    assert!(
        timeout(Duration::from_secs(16), watch.next())
            .await
            .is_err()
    );
    etcd.resume()?;
    put_with_retries(&client, "n", "1").await;
    assert_eq!(events(&mut watch, 1).await[0].2, "1");
    Ok(())
}

#[tokio::test]
async fn dropped_watch_is_cancelled_in_etcd() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let watches = futures::future::try_join_all((0..5).map(|_| client.watch("n", None))).await?;
    assert_eq!(crate::support::watcher_count(&etcd).await?, 5);
    drop(watches);
    timeout(PATIENCE, async {
        while crate::support::watcher_count(&etcd).await.unwrap() > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn unpolled_watches_do_not_block_the_connection() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let mut parked = Vec::new();
    for _ in 0..4 {
        parked.push(client.watch("n", None).await?);
    }
    let mut other = client.watch("last", None).await?;
    let lease = client.grant(60).await?.id();
    let kept = client.keep_alive(lease).await?;
    // Many small messages, then more bytes than any flow-control window.
    for round in 0..300 {
        let puts = (0..100).map(|n| client.put("n", format!("{round}/{n}"), None));
        futures::future::try_join_all(puts).await?;
    }
    for _ in 0..20 {
        client.put("n", vec![b'x'; 500_000], None).await?;
    }
    client.put("last", "1", None).await?;
    assert_eq!(events(&mut other, 1).await[0].2, "1");
    assert_eq!(client.get("last", None).await?.count(), 1);
    client.keep_alive_once(lease).await?;
    drop(kept);
    // No stream was reopened, and no event is missing.
    assert_eq!(crate::support::call_count(&etcd, "Watch").await?, 5);
    for watch in &mut parked {
        let seen = events(watch, 30_020).await;
        assert_eq!(seen.len(), 30_020);
        let different: BTreeSet<_> = seen[..30_000].iter().map(|(_, _, value)| value).collect();
        assert_eq!(different.len(), 30_000);
    }
    Ok(())
}
