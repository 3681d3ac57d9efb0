//! How long a call may take: the `grpc-timeout` of its request.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;
use tonic::{Code, Status};

use crate::time::MAX_DURATION;

/// gRPC's header for it ("gRPC over HTTP2", Call-Definition).
pub(super) const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The most digits that the value may have.
const MAX_DIGITS: usize = 8;

/// How far a call's end on the server may be from that here, on the same clock: both have timers that tick in
/// milliseconds, and the header is rounded to less than one for calls of up to 100 s.
const APART: Duration = Duration::from_millis(3);

/// Whether a server has noticed before this side that the time of a call, which is over `at` then, was over:
/// tonic's says CANCELLED, and others reset the stream with it.
pub(super) fn is_late(status: &Status, at: Instant) -> bool {
    status.code() == Code::Cancelled && Instant::now() + APART >= at
}

/// The time that the request gives itself; `None` without one, or with one that cannot be read,
/// which a server ignores as well.
pub(super) fn of(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(GRPC_TIMEOUT)?.to_str().ok()?;
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

/// The header's value for what is left, in the finest unit that it fits into.
pub(super) fn value_of(left: Duration) -> Option<HeaderValue> {
    let fits = 10u128.pow(MAX_DIGITS as u32);
    let (amount, unit) = [
        (left.as_nanos(), 'n'),
        (left.as_micros(), 'u'),
        (left.as_millis(), 'm'),
        (u128::from(left.as_secs()), 'S'),
    ]
    .into_iter()
    .find(|(amount, _)| *amount < fits)?;
    HeaderValue::try_from(format!("{amount}{unit}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(value: &str) -> Option<Duration> {
        let mut headers = HeaderMap::new();
        headers.insert(GRPC_TIMEOUT, value.parse().unwrap());
        of(&headers)
    }

    #[test]
    fn every_unit_is_read_and_nonsense_is_ignored() {
        assert_eq!(read("2H"), Some(Duration::from_secs(7200)));
        assert_eq!(read("3M"), Some(Duration::from_secs(180)));
        assert_eq!(read("4S"), Some(Duration::from_secs(4)));
        assert_eq!(read("5m"), Some(Duration::from_millis(5)));
        assert_eq!(read("6u"), Some(Duration::from_micros(6)));
        assert_eq!(read("7n"), Some(Duration::from_nanos(7)));
        // More than can be added to a time.
        assert_eq!(read("99999999H"), Some(MAX_DURATION));
        for nonsense in ["", "S", "5", "5x", "-5S", "+5S", "123456789S", "5 S"] {
            assert_eq!(read(nonsense), None, "{nonsense:?}");
        }
        assert_eq!(of(&HeaderMap::new()), None);
    }

    #[test]
    fn what_is_left_is_written_as_it_is_read() {
        for left in [
            Duration::ZERO,
            Duration::from_nanos(99_999_999),
            Duration::from_micros(250_000),
            Duration::from_secs(3600),
        ] {
            let value = value_of(left).unwrap();
            assert_eq!(read(value.to_str().unwrap()), Some(left));
        }
        // 100 ms and 1 ns does not fit into nanoseconds.
        let value = value_of(Duration::from_nanos(100_000_001)).unwrap();
        assert_eq!(value, "100000u");
    }
}
