//! Watches against a real etcd: every event once and in order, whatever happens to it.

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use futures::StreamExt;
use goo_etcd::client::WatchFilterType;
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{Client, Config, Error, EventType, TxnOp, Watch, WatchOptions};
use tokio::time::timeout;

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Generous: the machine may be busy.
const SOON: Duration = Duration::from_secs(30);

async fn connect(etcd: &Etcd) -> goo_etcd::Result<Client> {
    let mut config = Config::default();
    config.endpoints = vec![etcd.endpoint()];
    Client::new("main", config).await
}

/// The next `n` events as (type, key, value).
async fn events(watch: &mut Watch, n: usize) -> Vec<(EventType, String, String)> {
    let mut events = Vec::new();
    while events.len() < n {
        let response = timeout(SOON, watch.next())
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

async fn put_until_it_works(client: &Client, key: &str, value: &str) {
    timeout(SOON, async {
        while client.put(key, value, None).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn given_a_watch_on_a_prefix_then_it_yields_what_happens_there_and_nothing_else() -> Outcome {
    let etcd = Etcd::start().await?;
    let client = connect(&etcd).await?;
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
    // From the start, with a start revision.
    let from_start = WatchOptions::new().with_prefix().with_start_revision(1);
    let mut watch = client.watch("a/", from_start).await?;
    assert_eq!(events(&mut watch, 3).await[0].1, "a/before");
    Ok(())
}

#[tokio::test]
async fn given_options_of_a_watch_then_each_does_what_etcd_says() -> Outcome {
    let etcd = Etcd::start().await?;
    let client = connect(&etcd).await?;
    let first = client.put("b", "0", None).await?;
    let start = first.header().ok_or("a header")?.revision() + 1;
    for key in ["a", "b", "c", "d"] {
        client.put(key, "1", None).await?;
    }
    client.delete("b", None).await?;
    client.put("end", "", None).await?;
    // What comes up to `end`, which each of them sees.
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

    // The value before, and none before the first.
    let before = options().with_prev_key().with_start_revision(1);
    let mut watch = client.watch("b", before).await?;
    let mut values = Vec::new();
    while values.len() < 3 {
        let response = timeout(SOON, watch.next()).await?.ok_or("an event")??;
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
async fn given_progress_asked_for_then_etcd_s_notifications_are_yielded_and_else_they_are_not()
-> Outcome {
    let etcd = Etcd::builder()
        .args(["--experimental-watch-progress-notify-interval", "1s"])
        .start()
        .await?;
    let client = connect(&etcd).await?;
    let options = WatchOptions::new().with_progress_notify();
    let mut told = client.watch("n", options).await?;
    let mut quiet = client.watch("n", None).await?;
    client.put("other", "1", None).await?;
    let put = client.put("other", "2", None).await?;
    let now = put.header().ok_or("a header")?.revision();
    loop {
        let progress = timeout(SOON, told.next()).await?.ok_or("progress")??;
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
async fn given_etcd_killed_and_restarted_then_every_event_comes_once_and_in_order() -> Outcome {
    let etcd = Etcd::start().await?;
    let client = connect(&etcd).await?;
    // One has seen nothing yet when etcd dies, one has.
    let mut quiet = client.watch("n", None).await?;
    let mut busy = client.watch("n", None).await?;
    let writer = connect(&etcd).await?;
    let mut last = 0;
    for round in 0..3 {
        for _ in 0..20 {
            last += 1;
            put_until_it_works(&writer, "n", &last.to_string()).await;
        }
        if round == 1 {
            let seen = events(&mut busy, 40).await;
            assert_eq!(seen[39].2, "40");
        }
        // 3.5.0 to 3.5.2 may lose a write that they had confirmed when they are killed within the 100 ms
        // in which they write it to their store (etcd-io/etcd#13766); the revision is then given anew.
        tokio::time::sleep(Duration::from_millis(500)).await;
        etcd.kill().await?;
        etcd.start_again().await?;
    }
    put_until_it_works(&writer, "n", "end").await;

    // A put that was tried again may be there twice: what etcd itself has is the truth.
    let from_start = WatchOptions::new().with_start_revision(1);
    let mut told = client.watch("n", from_start).await?;
    let wanted = until_the_end(&mut told).await;
    assert!(wanted.len() > 50, "{wanted:?}");
    let seen_before = wanted.iter().position(|n| n == "40").ok_or("no 40")?;
    assert_eq!(until_the_end(&mut busy).await, wanted[seen_before + 1..]);
    assert_eq!(until_the_end(&mut quiet).await, wanted);
    Ok(())
}

async fn until_the_end(watch: &mut Watch) -> Vec<String> {
    let mut values = Vec::new();
    while values.last().is_none_or(|value| value != "end") {
        values.extend(events(watch, 1).await.into_iter().map(|event| event.2));
    }
    values
}

/// (revision, key, length of the value) of every event up to the one of `end`, as the raw etcd-client reads
/// them from the first revision on.
async fn told_by_etcd(etcd: &Etcd, end: &str) -> Result<Vec<Told>, Box<dyn std::error::Error>> {
    let everything = goo_etcd::etcd_client::WatchOptions::new()
        .with_all_keys()
        .with_start_revision(1);
    let mut raw = etcd.client().await?.watch_client();
    raw = raw.max_decoding_message_size(usize::MAX);
    let mut stream = raw.watch("", Some(everything)).await?;
    let mut told = Vec::new();
    while let Some(message) = timeout(SOON, stream.message()).await?? {
        told.extend(message.events().iter().map(as_told));
        if told.last().is_some_and(|(_, key, _)| key == end) {
            return Ok(told);
        }
    }
    Err("the history ended before its end".into())
}

type Told = (i64, String, usize);

fn as_told(event: &goo_etcd::client::Event) -> Told {
    let kv = event.kv().unwrap();
    let key = kv.key_str().unwrap().to_owned();
    (kv.mod_revision(), key, kv.value().len())
}

/// One after the other, each of several keys at once.
async fn put_transactions(
    client: &Client,
    transactions: usize,
    keys: usize,
    length: usize,
) -> Outcome {
    for _ in 0..transactions {
        let puts = (0..keys).map(|key| TxnOp::put(format!("t/{key}"), vec![7; length], None));
        client.txn().and_then(puts).commit().await?;
    }
    client.put("t/end", "", None).await?;
    Ok(())
}

/// What a watch yields up to the end, each response with whole revisions.
async fn yielded(watch: &mut Watch) -> Vec<Told> {
    let mut yielded: Vec<Told> = Vec::new();
    loop {
        let response = timeout(SOON, watch.next()).await.unwrap().unwrap().unwrap();
        let more: Vec<_> = response.events().iter().map(as_told).collect();
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
async fn given_transactions_when_streams_are_lost_then_a_watch_yields_each_revision_whole_and_once()
-> Outcome {
    let etcd = Etcd::start().await?;
    let proxy = Proxy::start(etcd.endpoint()).await?;
    let mut config = Config::default();
    config.endpoints = vec![proxy.endpoint()];
    let client = Client::new("main", config).await?;
    let prefix = WatchOptions::new().with_prefix().with_start_revision(1);
    let mut watch = client.watch("t/", prefix).await?;
    let seen = tokio::spawn(async move { yielded(&mut watch).await });
    let writer = connect(&etcd).await?;
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
    let told = told_by_etcd(&etcd, "t/end").await?;
    assert!(told.len() == 3000 * 7 + 1 && lost > 5, "{lost}");
    assert_eq!(timeout(SOON, seen).await??, told);
    Ok(())
}

#[tokio::test]
async fn given_a_stream_cut_in_the_middle_of_a_split_answer_then_a_watch_yields_each_revision_whole_and_once()
-> Outcome {
    let etcd = Etcd::start().await?;
    // etcd sends what there is to catch up with in pieces of 2 MiB: 4 events each, and 3 are one revision.
    const LENGTH: usize = 450_000;
    put_transactions(&connect(&etcd).await?, 12, 3, LENGTH).await?;
    let told = told_by_etcd(&etcd, "t/end").await?;
    assert_eq!(told.len(), 12 * 3 + 1);
    for cut_after in [1, 5, 9, 14, 20, 30] {
        let proxy = Proxy::start(etcd.endpoint()).await?;
        let mut config = Config::default();
        config.endpoints = vec![proxy.endpoint()];
        let client = Client::new("main", config).await?;
        // 16 KiB in a millisecond or more, so that there is a time in which it can be cut.
        proxy.delay(Duration::from_millis(1));
        let prefix = WatchOptions::new().with_prefix().with_start_revision(1);
        let mut watch = client.watch("t/", prefix).await?;
        let seen = tokio::spawn(async move { yielded(&mut watch).await });
        let bytes = u64::try_from(cut_after * LENGTH)?;
        timeout(SOON, async {
            while proxy.bytes_down() < bytes {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await?;
        proxy.disconnect().await?;
        assert!(!seen.is_finished());
        proxy.delay(Duration::ZERO);
        assert_eq!(timeout(SOON, seen).await??, told, "{cut_after}");
    }
    Ok(())
}

#[tokio::test]
async fn given_a_gap_before_the_first_event_then_nothing_in_it_is_missed() -> Outcome {
    let etcd = Etcd::start().await?;
    let client = connect(&etcd).await?;
    let mut watch = client.watch("n", None).await?;
    etcd.restart().await?;
    // The watch is not polled, so its stream is still lost when this happens.
    put_until_it_works(&connect(&etcd).await?, "n", "in the gap").await;
    assert_eq!(events(&mut watch, 1).await[0].2, "in the gap");
    Ok(())
}

#[tokio::test]
async fn given_a_compacted_start_then_the_watch_ends_with_compacted() -> Outcome {
    let etcd = Etcd::start().await?;
    let client = connect(&etcd).await?;
    for n in 0..10 {
        client.put("n", n.to_string(), None).await?;
    }
    let compacted = etcd.compact().await?;
    let mut watch = client
        .watch("n", WatchOptions::new().with_start_revision(2))
        .await?;
    let end = timeout(SOON, watch.next()).await?.unwrap().unwrap_err();
    assert!(
        matches!(end, Error::Compacted { compact_revision } if compact_revision == compacted),
        "{end:?}"
    );
    assert!(watch.next().await.is_none());
    Ok(())
}

#[tokio::test]
async fn given_history_compacted_while_cut_off_then_the_watch_ends_with_compacted() -> Outcome {
    let etcd = Etcd::start().await?;
    let client = connect(&etcd).await?;
    let mut watch = client.watch("n", None).await?;
    client.put("n", "1", None).await?;
    events(&mut watch, 1).await;
    etcd.restart().await?;
    let writer = connect(&etcd).await?;
    put_until_it_works(&writer, "n", "2").await;
    put_until_it_works(&writer, "n", "3").await;
    let compacted = etcd.compact().await?;
    let end = timeout(SOON, watch.next()).await?.unwrap();
    assert!(
        matches!(end, Err(Error::Compacted { compact_revision }) if compact_revision == compacted),
        "{end:?}"
    );
    Ok(())
}

#[tokio::test]
async fn given_etcd_wiped_then_the_watch_says_so_instead_of_waiting_for_ever() -> Outcome {
    let etcd = Etcd::start().await?;
    let client = connect(&etcd).await?;
    let mut watch = client.watch("n", None).await?;
    for n in 0..10 {
        client.put("n", n.to_string(), None).await?;
    }
    events(&mut watch, 10).await;
    etcd.wipe_and_restart().await?;
    let end = timeout(SOON, watch.next()).await?.unwrap().unwrap_err();
    assert!(
        matches!(end, Error::RevisionWentBack { seen: 11, now: 1 }),
        "{end:?}"
    );
    assert!(watch.next().await.is_none());
    Ok(())
}

#[tokio::test]
async fn given_a_watch_idle_for_long_then_it_still_yields() -> Outcome {
    let etcd = Etcd::start().await?;
    let client = connect(&etcd).await?;
    let mut watch = client.watch("n", None).await?;
    // Several questions for progress, whose answers are no items.
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
async fn given_etcd_frozen_and_thawed_then_the_watch_goes_on() -> Outcome {
    let etcd = Etcd::start().await?;
    let client = connect(&etcd).await?;
    let mut watch = client.watch("n", None).await?;
    etcd.pause().await?;
    // Longer than keep-alive interval and timeout: the connection is given up meanwhile.
    assert!(
        timeout(Duration::from_secs(16), watch.next())
            .await
            .is_err()
    );
    etcd.resume()?;
    put_until_it_works(&client, "n", "1").await;
    assert_eq!(events(&mut watch, 1).await[0].2, "1");
    Ok(())
}

#[tokio::test]
async fn given_a_dropped_watch_then_etcd_forgets_it() -> Outcome {
    let etcd = Etcd::start().await?;
    let client = connect(&etcd).await?;
    let watches = futures::future::try_join_all((0..5).map(|_| client.watch("n", None))).await?;
    assert_eq!(support::watchers(&etcd).await?, 5);
    drop(watches);
    timeout(SOON, async {
        while support::watchers(&etcd).await.unwrap() > 0 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    })
    .await?;
    Ok(())
}

#[tokio::test]
async fn given_watches_that_nobody_polls_then_everything_else_on_the_connection_goes_on() -> Outcome
{
    let etcd = Etcd::start().await?;
    let client = connect(&etcd).await?;
    let mut parked = Vec::new();
    for _ in 0..4 {
        parked.push(client.watch("n", None).await?);
    }
    let mut other = client.watch("last", None).await?;
    let lease = client.grant(60).await?.id();
    let kept = client.keep_alive(lease).await?;
    // Many small messages, and then more than any window.
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
    // Nothing was lost, and nothing is missing.
    assert_eq!(support::calls(&etcd, "Watch").await?, 5);
    for watch in &mut parked {
        let seen = events(watch, 30_020).await;
        assert_eq!(seen.len(), 30_020);
        let different: BTreeSet<_> = seen[..30_000].iter().map(|(_, _, value)| value).collect();
        assert_eq!(different.len(), 30_000);
    }
    Ok(())
}
