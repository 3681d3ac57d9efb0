//! Trying the addresses of a name ("Happy Eyeballs Version 2", RFC 8305).
//!
//! A machine whose address accepts TCP connections may still be unable to serve: a load balancer
//! without a backend, a hung process, a server of another protocol. So an attempt is the whole
//! handshake (TCP, TLS, HTTP/2), and the attempts overlap: each one starts a little later than the
//! one before, or as soon as an earlier one has failed. The first that completes wins.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

/// The pause between the starts of two attempts: the "Connection Attempt Delay" of RFC 8305,
/// section 5, with the value that the RFC recommends.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// The shortest pause. It is shorter than [`ATTEMPT_DELAY`] if a name has so many addresses, or the
/// time is so short, that not all could be tried. RFC 8305 allows no less than 10 ms.
const MIN_ATTEMPT_DELAY: Duration = Duration::from_millis(10);

/// How many addresses the error of a name lists. A name may have hundreds.
const LISTED_ERRORS: usize = 4;

/// The address of a name that connected last. Shared by the connections of an endpoint.
#[derive(Debug, Clone, Default)]
pub(super) struct LastWinner(Arc<Mutex<Option<SocketAddr>>>);

/// All are equal, because the address that connected last is no property of a target.
impl PartialEq for LastWinner {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for LastWinner {}

impl LastWinner {
    pub(super) fn set(&self, address: SocketAddr) {
        *self.0.lock() = Some(address);
    }

    /// The order in which to try `addresses`: the one that connected last, and the others with the
    /// families in turn (RFC 8305, section 4), starting with the family of the first address.
    pub(super) fn order(&self, addresses: &[SocketAddr]) -> Vec<SocketAddr> {
        let winner = self.0.lock().filter(|winner| addresses.contains(winner));
        let mut ordered: Vec<SocketAddr> = winner.into_iter().collect();
        let starts_with_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
        let (first, second): (Vec<SocketAddr>, Vec<SocketAddr>) = addresses
            .iter()
            .partition(|address| address.is_ipv6() == starts_with_v6);
        let (mut first, mut second) = (first.into_iter(), second.into_iter());
        for _ in addresses {
            for next in [first.next(), second.next()].into_iter().flatten() {
                if !ordered.contains(&next) {
                    ordered.push(next);
                }
            }
        }
        ordered
    }
}

/// Connects to the first of `addresses` that completes, and drops the attempts to the others.
///
/// Every attempt must end by `deadline` by itself; after that time no attempt is started.
///
/// # Errors
///
/// The errors of the attempts, in the order in which they failed.
pub(super) async fn race<A, T, E, F>(
    addresses: Vec<A>,
    deadline: Instant,
    connect: impl Fn(A) -> F,
) -> Result<(A, T), Vec<(A, E)>>
where
    A: Copy,
    F: Future<Output = Result<T, E>>,
{
    let delay = attempt_delay(addresses.len(), deadline - Instant::now());
    let mut untried = addresses.into_iter().peekable();
    let mut running = FuturesUnordered::new();
    let mut failed = Vec::new();
    loop {
        let is_first = running.is_empty() && failed.is_empty();
        let has_time = is_first || Instant::now() < deadline;
        if let Some(address) = untried.next_if(|_| has_time) {
            let attempt = connect(address);
            running.push(async move { (address, attempt.await) });
        }
        let may_start = has_time && untried.peek().is_some();
        tokio::select! {
            biased;
            ended = running.next() => match ended {
                Some((address, Ok(connection))) => return Ok((address, connection)),
                Some((address, Err(error))) => failed.push((address, error)),
                None => return Err(failed),
            },
            () = sleep(delay), if may_start => {}
        }
    }
}

/// The pause between the starts of two attempts, if `count` addresses have to be tried in `time`.
fn attempt_delay(count: usize, time: Duration) -> Duration {
    let count = u32::try_from(count).unwrap_or(u32::MAX).max(1);
    (time / count).clamp(MIN_ATTEMPT_DELAY, ATTEMPT_DELAY)
}

/// The error of a name of which no address could be connected to.
pub(super) fn describe(errors: &[(SocketAddr, String)]) -> String {
    match errors {
        [] => "the name has no address".to_owned(),
        [(_, error)] => error.clone(),
        _ => {
            let listed = errors.iter().take(LISTED_ERRORS);
            let mut text = listed
                .map(|(address, error)| format!("{address}: {error}"))
                .collect::<Vec<_>>()
                .join("; ");
            if errors.len() > LISTED_ERRORS {
                let more = errors.len() - LISTED_ERRORS;
                text.push_str(&format!("; and {more} more addresses"));
            }
            text
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MILLISECOND: Duration = Duration::from_millis(1);

    /// What connecting to an address leads to, and when.
    #[derive(Clone, Copy)]
    enum Script {
        Accept(Duration),
        Refuse(Duration),
    }

    const HANG: Script = Script::Refuse(Duration::from_secs(5));

    /// Counts an attempt from its start to its end or its drop.
    struct Running<'a>(&'a Mutex<usize>);

    impl Drop for Running<'_> {
        fn drop(&mut self) {
            *self.0.lock() -= 1;
        }
    }

    struct Outcome {
        /// The winner, or the addresses in the order in which they failed.
        result: Result<usize, Vec<usize>>,
        /// When each attempt started.
        starts: Vec<Duration>,
        took: Duration,
    }

    /// Races addresses that are numbered from 0.
    async fn run(scripts: &[Script]) -> Outcome {
        let begun = Instant::now();
        let starts = Mutex::new(Vec::new());
        let running = Mutex::new(0);
        let result = race((0..scripts.len()).collect(), begun + 5 * SECOND, |index| {
            starts.lock().push(begun.elapsed());
            *running.lock() += 1;
            let guard = Running(&running);
            async move {
                let _guard = guard;
                let (after, result) = match scripts[index] {
                    Script::Accept(after) => (after, Ok(())),
                    Script::Refuse(after) => (after, Err(())),
                };
                // As the connector does, an attempt ends at the deadline.
                let at = (Instant::now() + after).min(begun + 5 * SECOND);
                tokio::time::sleep_until(at).await;
                result
            }
        })
        .await;
        assert_eq!(*running.lock(), 0, "attempts still running");
        let indices = |failed: Vec<(usize, ())>| failed.into_iter().map(|(a, ())| a).collect();
        Outcome {
            result: result.map(|(winner, ())| winner).map_err(indices),
            starts: starts.into_inner(),
            took: begun.elapsed(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silent_address_delays_the_next_by_250_ms() {
        let outcome = run(&[HANG, HANG, Script::Accept(10 * MILLISECOND), HANG]).await;
        assert_eq!(outcome.result, Ok(2));
        assert_eq!(outcome.starts, [0, 250, 500].map(Duration::from_millis));
        assert_eq!(outcome.took, 510 * MILLISECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn failed_address_delays_the_next_not_at_all() {
        let refused = Script::Refuse(20 * MILLISECOND);
        let outcome = run(&[refused, refused, Script::Accept(SECOND)]).await;
        assert_eq!(outcome.result, Ok(2));
        assert_eq!(outcome.starts, [0, 20, 40].map(Duration::from_millis));
    }

    #[tokio::test(start_paused = true)]
    async fn slow_address_wins_if_the_later_ones_are_slower() {
        let slow = Script::Accept(400 * MILLISECOND);
        let outcome = run(&[slow, slow]).await;
        assert_eq!(outcome.result, Ok(0));
        assert_eq!(outcome.starts, [0, 250].map(Duration::from_millis));
        assert_eq!(outcome.took, 400 * MILLISECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn single_address_starts_no_timer() {
        let outcome = run(&[HANG]).await;
        assert_eq!(outcome.result, Err(vec![0]));
        assert_eq!(outcome.took, 5 * SECOND);
        let outcome = run(&[]).await;
        assert_eq!(outcome.result, Err(Vec::new()));
        assert_eq!(outcome.took, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn many_silent_addresses_are_all_tried_in_time() {
        let mut scripts = [HANG; 100];
        scripts[99] = Script::Accept(10 * MILLISECOND);
        let outcome = run(&scripts).await;
        assert_eq!(outcome.result, Ok(99));
        // 5 s for 100 addresses.
        assert_eq!(outcome.starts[1..3], [50, 100].map(Duration::from_millis));
    }

    #[tokio::test(start_paused = true)]
    async fn deadline_ends_all_attempts_and_starts_no_more() {
        let outcome = run(&[HANG; 1_000]).await;
        assert_eq!(outcome.took, 5 * SECOND);
        // One each 10 ms before 5 s.
        assert_eq!(outcome.starts.len(), 500);
        assert_eq!(outcome.result.unwrap_err().len(), 500);
    }

    #[test]
    fn delay_leaves_time_for_each_address() {
        let delay = |count, millis| attempt_delay(count, Duration::from_millis(millis));
        assert_eq!(delay(2, 5_000), Duration::from_millis(250));
        assert_eq!(delay(20, 5_000), Duration::from_millis(250));
        assert_eq!(delay(2, 200), Duration::from_millis(100));
        assert_eq!(delay(1_000, 5_000), MIN_ATTEMPT_DELAY);
        assert_eq!(delay(0, 5_000), ATTEMPT_DELAY);
        assert_eq!(delay(2, 0), MIN_ATTEMPT_DELAY);
    }

    #[tokio::test(start_paused = true)]
    async fn all_addresses_failing_at_once_are_all_tried() {
        let outcome = run(&[Script::Refuse(Duration::ZERO); 50]).await;
        assert_eq!(outcome.result, Err((0..50).collect()));
        assert_eq!(outcome.took, Duration::ZERO);
    }

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn families_take_turns_and_the_winner_is_first() {
        let found = addresses(&["[::1]:1", "[::2]:1", "[::3]:1", "10.0.0.1:1", "10.0.0.2:1"]);
        let winner = LastWinner::default();
        let turns = ["[::1]:1", "10.0.0.1:1", "[::2]:1", "10.0.0.2:1", "[::3]:1"];
        assert_eq!(winner.order(&found), addresses(&turns));
        winner.set("10.0.0.2:1".parse().unwrap());
        let turns = ["10.0.0.2:1", "[::1]:1", "10.0.0.1:1", "[::2]:1", "[::3]:1"];
        assert_eq!(winner.order(&found), addresses(&turns));
        // The name has changed since.
        let found = addresses(&["10.0.0.3:1", "10.0.0.4:1"]);
        assert_eq!(winner.order(&found), found);
        assert_eq!(winner.order(&[]), []);
    }

    #[test]
    fn error_names_the_addresses_unless_there_is_one() {
        let errors: Vec<(SocketAddr, String)> = (1..=6)
            .map(|port| (SocketAddr::from(([10, 0, 0, 1], port)), "refused".into()))
            .collect();
        assert_eq!(describe(&errors[..1]), "refused");
        assert_eq!(
            describe(&errors[..2]),
            "10.0.0.1:1: refused; 10.0.0.1:2: refused"
        );
        let all = describe(&errors);
        assert!(
            all.ends_with("10.0.0.1:4: refused; and 2 more addresses"),
            "{all}"
        );
    }
}
