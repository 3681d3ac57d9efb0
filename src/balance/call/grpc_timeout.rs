//! A call's deadline and the `grpc-timeout` header that carries it.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::time::MAX_DURATION;

/// The header with a call's timeout ("gRPC over HTTP2", Call-Definition).
pub(super) const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The most digits that the header's value may have ("gRPC over HTTP2", TimeoutValue).
const MAX_DIGITS: usize = 8;

/// How far the client's and the server's deadline of one call may be apart on the same clock: both
/// have timers that tick in milliseconds, and the header is rounded by less than a millisecond for
/// timeouts of up to 100 s.
const CLOCK_SKEW: Duration = Duration::from_millis(3);

/// The point in time at which a call must have ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Deadline {
    pub(super) at: Instant,
    /// The timeout that the deadline was computed from, for messages.
    pub(super) timeout: Duration,
}

impl Deadline {
    /// The deadline of a call that started at `started`.
    pub(super) fn after(started: Instant, timeout: Duration) -> Self {
        Self {
            at: started + timeout,
            timeout,
        }
    }

    /// The status of a call that this deadline has ended while `reason` held.
    pub(super) fn exceeded_status(&self, reason: &str) -> Status {
        Status::deadline_exceeded(format!("deadline of {:?} exceeded: {reason}", self.timeout))
    }

    /// Whether `status` comes from the server's timer for this deadline, which fired just before
    /// the client's: tonic's server then responds with CANCELLED, and other servers reset the
    /// stream with CANCEL.
    pub(super) fn is_cause_of(&self, status: &Status) -> bool {
        status.code() == Code::Cancelled && Instant::now() + CLOCK_SKEW >= self.at
    }
}

/// The timeout in a request's headers. `None` without the header, and for a value that is not
/// valid, which servers ignore as well.
pub(super) fn parse(headers: &HeaderMap) -> Option<Duration> {
    // Requests have few headers, so comparing their names costs less than hashing one.
    let (_, value) = headers.iter().find(|(name, _)| **name == GRPC_TIMEOUT)?;
    let value = value.to_str().ok()?;
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    if digits.is_empty()
        || digits.len() > MAX_DIGITS
        || !digits.bytes().all(|byte| byte.is_ascii_digit())
    {
        return None;
    }
    let amount: u64 = digits.parse().ok()?;
    Some(MAX_DURATION.min(match unit {
        "H" => Duration::from_secs(amount * 3600),
        "M" => Duration::from_secs(amount * 60),
        "S" => Duration::from_secs(amount),
        "m" => Duration::from_millis(amount),
        "u" => Duration::from_micros(amount),
        "n" => Duration::from_nanos(amount),
        _ => return None,
    }))
}

/// The header's value for a timeout, in the finest unit whose number has at most eight digits.
pub(super) fn format(timeout: Duration) -> Option<HeaderValue> {
    let limit = 10u128.pow(MAX_DIGITS as u32);
    let (amount, unit) = [
        (timeout.as_nanos(), 'n'),
        (timeout.as_micros(), 'u'),
        (timeout.as_millis(), 'm'),
        (u128::from(timeout.as_secs()), 'S'),
    ]
    .into_iter()
    .find(|(amount, _)| *amount < limit)?;
    HeaderValue::try_from(format!("{amount}{unit}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_value(value: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(GRPC_TIMEOUT, value.parse().unwrap());
        parse(&headers)
    }

    #[test]
    fn every_unit_is_parsed_and_invalid_values_ignored() {
        assert_eq!(parse_value("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(parse_value("3M"), Some(Duration::from_secs(180)));
        assert_eq!(parse_value("4S"), Some(Duration::from_secs(4)));
        assert_eq!(parse_value("5m"), Some(Duration::from_millis(5)));
        assert_eq!(parse_value("6u"), Some(Duration::from_micros(6)));
        assert_eq!(parse_value("7n"), Some(Duration::from_nanos(7)));
        // Longer than an `Instant` can be moved by.
        assert_eq!(parse_value("99999999H"), Some(MAX_DURATION));
        for invalid in ["", "S", "5", "5x", "-5S", "+5S", "123456789S", "5 S"] {
            assert_eq!(parse_value(invalid), None, "{invalid:?}");
        }
        assert_eq!(parse(&HeaderMap::new()), None);
    }

    #[test]
    fn formatted_value_parses_to_the_same_timeout() {
        for timeout in [
            Duration::ZERO,
            Duration::from_nanos(99_999_999),
            Duration::from_micros(250_000),
            Duration::from_secs(3600),
        ] {
            let value = format(timeout).unwrap();
            assert_eq!(parse_value(value.to_str().unwrap()), Some(timeout));
        }
        // 100 ms and 1 ns has nine digits in nanoseconds.
        let value = format(Duration::from_nanos(100_000_001)).unwrap();
        assert_eq!(value, "100000u");
    }

    #[tokio::test(start_paused = true)]
    async fn cancelled_near_the_deadline_is_the_server_s_timer() {
        let deadline = Deadline::after(Instant::now(), Duration::from_secs(1));
        let cancelled = Status::cancelled("Timeout expired");
        assert!(!deadline.is_cause_of(&cancelled));
        tokio::time::advance(Duration::from_millis(998)).await;
        assert!(deadline.is_cause_of(&cancelled));
        assert!(!deadline.is_cause_of(&Status::unavailable("closing")));
    }
}
