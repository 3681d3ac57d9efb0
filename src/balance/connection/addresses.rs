//! Trying the addresses of a name ("Happy Eyeballs Version 2", RFC 8305).
//!
//! A machine whose address accepts TCP connections may still be unable to serve: a load balancer
//! without a backend, a hung process, a server of another protocol. So an attempt is the whole
//! handshake (TCP, TLS, HTTP/2), and the attempts overlap: each one starts a little later than the
//! one before, or as soon as an earlier one has failed. The first that completes wins.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::time::{Instant, sleep};

use super::address_order::AddressOrder;

/// The pause between the starts of two attempts: the "Connection Attempt Delay" of RFC 8305,
/// section 5, with the value that the RFC recommends.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// The shortest pause. It is shorter than [`ATTEMPT_DELAY`] if a name has so many addresses, or the
/// time is so short, that not all could be tried. RFC 8305 allows no less than 10 ms.
const MIN_ATTEMPT_DELAY: Duration = Duration::from_millis(10);

/// How many addresses the error of a name lists. A name may have hundreds.
const LISTED_ERRORS: usize = 4;

/// Connects to the first of `addresses` that completes, and drops the attempts to the others.
///
/// Every attempt must end by `deadline` by itself; after that time no attempt is started.
///
/// # Errors
///
/// The errors of the attempts, in the order in which they failed.
async fn race<A, T, E, F>(
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

/// [`race`] in the order that past attempts suggest, which the result changes.
pub(super) async fn connect_to_any<T, F>(
    order: &AddressOrder,
    found: &[SocketAddr],
    deadline: Instant,
    connect: impl Fn(SocketAddr) -> F,
) -> Result<(SocketAddr, T), String>
where
    F: Future<Output = Result<T, String>>,
{
    let addresses = order.of(found);
    let count = addresses.len();
    match race(addresses, deadline, connect).await {
        Ok((address, connection)) => {
            order.prefer(address);
            Ok((address, connection))
        }
        Err(errors) => {
            let untried = count - errors.len();
            if untried > 0 {
                // The next attempt starts with the addresses for which no time was left.
                errors
                    .iter()
                    .for_each(|(address, _)| order.demote(*address));
            }
            Err(describe(&errors, untried))
        }
    }
}

/// The pause between the starts of two attempts, if `count` addresses have to be tried in `time`.
fn attempt_delay(count: usize, time: Duration) -> Duration {
    let count = u32::try_from(count).unwrap_or(u32::MAX).max(1);
    (time / count).clamp(MIN_ATTEMPT_DELAY, ATTEMPT_DELAY)
}

/// The error of a name of which no address could be connected to. `untried` is the number of
/// addresses for which the time was too short.
fn describe(errors: &[(SocketAddr, String)], untried: usize) -> String {
    let mut text = match errors {
        [] => "the name has no address".to_owned(),
        [(_, error)] if untried == 0 => error.clone(),
        _ => {
            let listed = errors.iter().take(LISTED_ERRORS);
            let listed = listed.map(|(address, error)| format!("{address}: {error}"));
            listed.collect::<Vec<_>>().join("; ")
        }
    };
    if errors.len() > LISTED_ERRORS {
        let more = errors.len() - LISTED_ERRORS;
        text.push_str(&format!("; and {more} more addresses"));
    }
    if untried > 0 {
        text.push_str(&format!("; no time was left for {untried} addresses"));
    }
    text
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const MILLISECOND: Duration = Duration::from_millis(1);

    /// How and when an attempt to connect to an address ends.
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
        // An attempt each 10 ms before 5 s.
        assert_eq!(outcome.starts.len(), 500);
        assert_eq!(outcome.result.unwrap_err().len(), 500);
    }

    #[tokio::test(start_paused = true)]
    async fn untried_addresses_are_tried_next_time() {
        let address = |port| SocketAddr::from(([10, 0, 0, 1], port));
        let found: Vec<SocketAddr> = (1..=1_200).map(address).collect();
        let order = AddressOrder::default();
        let attempt = || {
            let deadline = Instant::now() + 5 * SECOND;
            let connect = move |address: SocketAddr| async move {
                if address.port() == 1_200 {
                    return Ok(());
                }
                tokio::time::sleep_until(deadline).await;
                Err("hung".to_owned())
            };
            connect_to_any(&order, &found, deadline, connect)
        };
        for untried in [700, 700] {
            let error = attempt().await.unwrap_err();
            let end = format!("no time was left for {untried} addresses");
            assert!(error.ends_with(&end), "{error}");
        }
        let (winner, ()) = attempt().await.unwrap();
        assert_eq!(winner.port(), 1_200);
        assert_eq!(order.of(&found)[0], winner);
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

    #[test]
    fn error_names_the_addresses_unless_there_is_one() {
        let errors: Vec<(SocketAddr, String)> = (1..=6)
            .map(|port| (SocketAddr::from(([10, 0, 0, 1], port)), "refused".into()))
            .collect();
        assert_eq!(describe(&errors[..1], 0), "refused");
        assert_eq!(
            describe(&errors[..2], 0),
            "10.0.0.1:1: refused; 10.0.0.1:2: refused"
        );
        let all = describe(&errors, 0);
        assert!(
            all.ends_with("10.0.0.1:4: refused; and 2 more addresses"),
            "{all}"
        );
        assert_eq!(
            describe(&errors[..1], 3),
            "10.0.0.1:1: refused; no time was left for 3 addresses"
        );
    }
}
