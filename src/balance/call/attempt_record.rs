//! Where the attempts of one operation were sent, and how they failed.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;
use tonic::Status;

/// How many characters of a failure are kept. A server chooses the text of a status.
const MAX_FAILURE: usize = 300;

/// The shortest wait that is shown beside an earlier failure.
const NOTABLE_WAIT: Duration = Duration::from_millis(100);

/// The endpoints that the attempts of one operation were sent to, with the last failure of each.
///
/// An operation may make several calls, one after another or beside each other. When the operation
/// ends because its time is over, its error says what the record holds. Clones share the record.
#[derive(Debug, Clone, Default)]
pub(crate) struct AttemptRecord(Arc<Mutex<Record>>);

#[derive(Debug, Default)]
struct Record {
    /// The endpoint that was tried first. Most operations try only one, and allocate nothing here.
    first: Option<Tried>,
    others: Vec<Tried>,
    /// Why the latest call was sent to no endpoint.
    unsent: Option<String>,
}

/// An endpoint that an attempt was sent to.
#[derive(Debug)]
struct Tried {
    address: Arc<str>,
    /// When the attempt that has no response yet was sent.
    waiting_since: Option<Instant>,
    last_failure: Option<String>,
}

impl Tried {
    /// For how long an attempt has had no response.
    fn waited(&self, now: Instant) -> Option<Duration> {
        self.waiting_since.map(|since| now - since)
    }

    /// The last failure, and for how long an attempt has had no response. `None` after a success.
    fn describe(&self, now: Instant) -> Option<String> {
        let waited = self.waited(now);
        let waited = waited.filter(|waited| self.last_failure.is_none() || *waited >= NOTABLE_WAIT);
        Some(match (&self.last_failure, waited) {
            (None, None) => return None,
            (None, Some(waited)) => no_response(waited),
            (Some(failure), None) => failure.clone(),
            (Some(failure), Some(waited)) => format!("{failure}, then {}", no_response(waited)),
        })
    }
}

fn no_response(waited: Duration) -> String {
    format!(
        "no response for {:?}",
        Duration::from_millis(waited.as_millis() as u64)
    )
}

impl Record {
    fn tried(&mut self) -> impl Iterator<Item = &mut Tried> {
        self.first.iter_mut().chain(&mut self.others)
    }

    fn find(&mut self, address: &str) -> Option<&mut Tried> {
        self.tried().find(|tried| &*tried.address == address)
    }
}

impl AttemptRecord {
    /// Records that an attempt is sent to an endpoint.
    pub(crate) fn begin(&self, address: &Arc<str>) {
        let now = Instant::now();
        let mut record = self.0.lock();
        if let Some(tried) = record.find(address) {
            tried.waiting_since.get_or_insert(now);
            return;
        }
        let tried = Tried {
            address: Arc::clone(address),
            waiting_since: Some(now),
            last_failure: None,
        };
        match record.first {
            None => record.first = Some(tried),
            Some(_) => record.others.push(tried),
        }
    }

    /// Records that an attempt at an endpoint has failed.
    pub(crate) fn fail(&self, address: &str, status: &Status) {
        if let Some(tried) = self.0.lock().find(address) {
            tried.waiting_since = None;
            tried.last_failure = Some(failure(address, status));
        }
    }

    /// Records that an endpoint has responded as it should.
    pub(crate) fn succeed(&self, address: &str) {
        if let Some(tried) = self.0.lock().find(address) {
            tried.waiting_since = None;
            tried.last_failure = None;
        }
    }

    /// Records that a call could be sent to no endpoint.
    pub(crate) fn fail_unsent(&self, status: &Status) {
        self.0.lock().unsent = Some(failure("", status));
    }

    /// Records that the operation no longer waits for the attempts without a response.
    pub(crate) fn abandon_waiting(&self) {
        let now = Instant::now();
        for tried in self.0.lock().tried() {
            if let Some(waited) = tried.waited(now) {
                tried.last_failure = Some(no_response(waited));
                tried.waiting_since = None;
            }
        }
    }

    /// The last failure of each endpoint that was tried and has not responded since, in the order
    /// in which the endpoints were first tried.
    pub(crate) fn failures(&self) -> Vec<(Arc<str>, String)> {
        let now = Instant::now();
        let mut record = self.0.lock();
        let described = record.tried().filter_map(|tried| {
            let failure = tried.describe(now)?;
            Some((Arc::clone(&tried.address), failure))
        });
        described.collect()
    }

    /// Why the latest call that could be sent to no endpoint was not sent.
    pub(crate) fn unsent(&self) -> Option<String> {
        self.0.lock().unsent.clone()
    }
}

/// The text of a failure. Most messages begin with the address, which the record has already.
fn failure(address: &str, status: &Status) -> String {
    let message = status.message();
    let without_address = message
        .strip_prefix(address)
        .and_then(|rest| rest.strip_prefix(": "));
    match without_address.unwrap_or(message) {
        "" => format!("{:?}", status.code()),
        text => match text.char_indices().nth(MAX_FAILURE) {
            Some((end, _)) => format!("{}...", &text[..end]),
            None => text.to_owned(),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses() -> [Arc<str>; 2] {
        ["a:1", "b:1"].map(Arc::from)
    }

    fn failures(record: &AttemptRecord) -> Vec<String> {
        let failures = record.failures().into_iter();
        failures
            .map(|(address, failure)| format!("{address}: {failure}"))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn names_each_endpoint_once_with_its_last_failure() {
        let [a, b] = addresses();
        let record = AttemptRecord::default();
        record.begin(&a);
        record.fail(&a, &Status::unavailable("a:1: connection lost"));
        record.begin(&b);
        tokio::time::advance(Duration::from_millis(1500)).await;
        assert_eq!(
            failures(&record),
            ["a:1: connection lost", "b:1: no response for 1.5s"]
        );
        record.begin(&a);
        record.fail(&a, &Status::internal(""));
        assert_eq!(
            failures(&record),
            ["a:1: Internal", "b:1: no response for 1.5s"]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn wait_after_a_failure_shows_both() {
        let [a, _] = addresses();
        let record = AttemptRecord::default();
        record.begin(&a);
        record.fail(&a, &Status::unavailable("etcdserver: no leader"));
        record.begin(&a);
        tokio::time::advance(Duration::from_secs(2)).await;
        let both = "a:1: etcdserver: no leader, then no response for 2s";
        assert_eq!(failures(&record), [both]);
    }

    #[tokio::test(start_paused = true)]
    async fn abandoned_wait_is_a_failure_and_short_one_is_not_shown() {
        let [a, _] = addresses();
        let record = AttemptRecord::default();
        for _ in 0..3 {
            record.begin(&a);
            tokio::time::advance(Duration::from_secs(2)).await;
            record.abandon_waiting();
        }
        record.begin(&a);
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(failures(&record), ["a:1: no response for 2s"]);
    }

    #[tokio::test(start_paused = true)]
    async fn success_clears_the_failure() {
        let [a, b] = addresses();
        let record = AttemptRecord::default();
        for address in [&a, &b] {
            record.begin(address);
            record.fail(address, &Status::unavailable("text"));
        }
        record.succeed(&b);
        assert_eq!(failures(&record), ["a:1: text"]);
    }

    #[test]
    fn long_failures_are_cut() {
        let record = AttemptRecord::default();
        let [a, _] = addresses();
        record.begin(&a);
        record.fail(&a, &Status::unavailable("é".repeat(10_000)));
        assert!(failures(&record)[0].chars().count() < MAX_FAILURE + 20);
    }
}
