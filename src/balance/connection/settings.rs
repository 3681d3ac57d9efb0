//! The settings of a channel's connections, and their checks.

use std::time::Duration;

use super::keep_alive::KeepAliveSettings;
use super::ping_budget::PingPolicy;
use crate::error::{Error, Result};
use crate::time::MAX_DURATION;

/// The sizes that HTTP/2 allows for frames (RFC 9113, section 4.2). h2 panics on others.
const FRAME_SIZES: std::ops::Range<u32> = 1 << 14..1 << 24;

/// The sizes that HTTP/2 allows for flow-control windows (RFC 9113, section 6.9.1).
const WINDOW_SIZES: std::ops::Range<u32> = 1..1 << 31;

/// The smallest useful limit of a response's headers, in bytes. `:status`, `content-type`, `date`
/// and `grpc-status` together count as 211 (RFC 9113, section 6.5.2).
const MIN_HEADER_LIST: u32 = 256;

/// HTTP/2 and TCP settings, named as in tonic's `Endpoint`.
#[derive(Debug, Clone)]
pub(crate) struct ConnectionSettings {
    pub(crate) connect_timeout: Duration,
    pub(crate) tcp_nodelay: bool,
    pub(crate) tcp_keepalive: Option<Duration>,
    pub(crate) keep_alive: KeepAliveSettings,
    pub(crate) initial_stream_window_size: u32,
    pub(crate) initial_connection_window_size: u32,
    pub(crate) max_header_list_size: u32,
    pub(crate) max_frame_size: Option<u32>,
}

impl Default for ConnectionSettings {
    fn default() -> Self {
        Self {
            // The dial timeout of an etcd client.
            connect_timeout: Duration::from_secs(5),
            tcp_nodelay: true,
            tcp_keepalive: Some(Duration::from_secs(20)),
            // A peer that stops responding must be detected soon. How many pings servers accept is
            // another question; see `ping_budget`.
            keep_alive: KeepAliveSettings {
                interval: Some(Duration::from_secs(10)),
                timeout: Duration::from_secs(3),
                while_idle: true,
                policy: PingPolicy::DEFAULT,
            },
            // The default of hyper, and so of tonic's channel.
            initial_stream_window_size: 2 * 1024 * 1024,
            // The largest that HTTP/2 allows. Each stream has a window too, and streams that nobody
            // reads must not stop the others on the connection.
            initial_connection_window_size: (1 << 31) - 1,
            max_header_list_size: 16 * 1024,
            max_frame_size: None,
        }
    }
}

impl ConnectionSettings {
    /// Checks the settings, and limits durations to [`MAX_DURATION`].
    pub(crate) fn validate(mut self) -> Result<Self> {
        self.limit_durations();
        let interval = self.keep_alive.interval;
        let durations = [
            ("connect_timeout", self.connect_timeout),
            ("keep_alive_timeout", self.keep_alive.timeout),
            (
                "http2_keep_alive_interval",
                interval.unwrap_or(MAX_DURATION),
            ),
        ];
        for (field, value) in durations {
            if value.is_zero() {
                return Err(Error::invalid(field, "0 s", "must be more than zero"));
            }
        }
        let windows = [
            (
                "initial_stream_window_size",
                self.initial_stream_window_size,
            ),
            (
                "initial_connection_window_size",
                self.initial_connection_window_size,
            ),
        ];
        for (field, size) in windows {
            if !WINDOW_SIZES.contains(&size) {
                let reason = "must be from 1 to 2,147,483,647 bytes";
                return Err(Error::invalid(field, size.to_string(), reason));
            }
        }
        if self.max_header_list_size < MIN_HEADER_LIST {
            return Err(Error::invalid(
                "http2_max_header_list_size",
                self.max_header_list_size.to_string(),
                format!("must be at least {MIN_HEADER_LIST} bytes, the headers of a gRPC response"),
            ));
        }
        match self.max_frame_size {
            Some(size) if !FRAME_SIZES.contains(&size) => Err(Error::invalid(
                "http2_max_frame_size",
                size.to_string(),
                "must be from 16,384 to 16,777,215 bytes",
            )),
            _ => Ok(self),
        }
    }

    fn limit_durations(&mut self) {
        let limit = |duration: &mut Duration| *duration = (*duration).min(MAX_DURATION);
        limit(&mut self.connect_timeout);
        limit(&mut self.keep_alive.timeout);
        self.keep_alive.interval.iter_mut().for_each(limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invalid_field(change: impl FnOnce(&mut ConnectionSettings)) -> Option<&'static str> {
        let mut settings = ConnectionSettings::default();
        change(&mut settings);
        match settings.validate() {
            Ok(_) => None,
            Err(Error::Invalid { field, .. }) => Some(field),
            Err(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults_are_valid() {
        assert_eq!(invalid_field(|_| {}), None);
    }

    #[test]
    fn zero_durations_are_invalid() {
        let field = invalid_field(|settings| settings.connect_timeout = Duration::ZERO);
        assert_eq!(field, Some("connect_timeout"));
        let field = invalid_field(|settings| settings.keep_alive.timeout = Duration::ZERO);
        assert_eq!(field, Some("keep_alive_timeout"));
        let field = invalid_field(|settings| settings.keep_alive.interval = Some(Duration::ZERO));
        assert_eq!(field, Some("http2_keep_alive_interval"));
        assert_eq!(
            invalid_field(|settings| settings.keep_alive.interval = None),
            None
        );
    }

    #[test]
    fn sizes_are_limited_to_those_of_http2() {
        for (size, field) in [
            (0, Some("initial_stream_window_size")),
            (1, None),
            ((1 << 31) - 1, None),
            (1 << 31, Some("initial_stream_window_size")),
        ] {
            let found = invalid_field(|settings| settings.initial_stream_window_size = size);
            assert_eq!(found, field, "{size}");
        }
        for (size, field) in [
            ((1 << 14) - 1, Some("http2_max_frame_size")),
            (1 << 14, None),
            ((1 << 24) - 1, None),
            (1 << 24, Some("http2_max_frame_size")),
        ] {
            let found = invalid_field(|settings| settings.max_frame_size = Some(size));
            assert_eq!(found, field, "{size}");
        }
    }

    #[test]
    fn header_limit_has_room_for_a_response() {
        let invalid =
            |size| invalid_field(|settings| settings.max_header_list_size = size).is_some();
        assert!(invalid(0) && invalid(MIN_HEADER_LIST - 1));
        assert!(!invalid(MIN_HEADER_LIST) && !invalid(u32::MAX));
    }

    #[test]
    fn durations_are_limited() {
        let settings = ConnectionSettings {
            connect_timeout: Duration::MAX,
            ..ConnectionSettings::default()
        };
        assert_eq!(settings.validate().unwrap().connect_timeout, MAX_DURATION);
    }
}
