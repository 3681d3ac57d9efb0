//! Loopback ports that stay reserved while no process listens on them.

use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::timing::POLL_INTERVAL;

/// How long [`Port::listen`] tries again while the port is in use.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(5);

/// A TCP port of 127.0.0.1 that stays reserved, also between a kill and a restart.
///
/// A port that is free for a moment can be lost in two ways. An outgoing connection may get it as
/// its source port; therefore the port is chosen outside the system's ephemeral range. Another test
/// process may choose it too; therefore it is claimed by binding the UDP port of the same number.
/// The claim disturbs nobody, because UDP and TCP ports are separate. The kernel makes it exclusive
/// and releases it when the process ends in any way, while lock files would need a clean-up.
#[derive(Debug)]
pub(super) struct Port {
    number: u16,
    _claim: UdpSocket,
}

impl Port {
    pub(super) fn claim() -> io::Result<Self> {
        let range = outside_ephemeral(ephemeral_range());
        // The range has about 20,000 ports, few of them busy. A hundred failures in a row mean that
        // the machine has another problem.
        let mut last = None;
        for _ in 0..100 {
            match Self::try_claim(fastrand::u16(range.clone())) {
                Ok(port) => return Ok(port),
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("the loop ran"))
    }

    fn try_claim(number: u16) -> io::Result<Self> {
        let claim = UdpSocket::bind((Ipv4Addr::LOCALHOST, number))?;
        // Fails if a program that does not use port claims listens on the port.
        TcpListener::bind((Ipv4Addr::LOCALHOST, number))?;
        Ok(Self {
            number,
            _claim: claim,
        })
    }

    pub(super) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.number)
    }

    /// Binds a listener to the port.
    ///
    /// Tries again for [`LISTEN_TIMEOUT`] while the port is in use. When another thread starts a
    /// process, the child holds a copy of every socket until it executes its program, so a listener
    /// that has just been closed may occupy the port for a moment.
    pub(super) async fn listen(&self) -> io::Result<tokio::net::TcpListener> {
        let deadline = Instant::now() + LISTEN_TIMEOUT;
        loop {
            match tokio::net::TcpListener::bind(self.endpoint()).await {
                Err(error)
                    if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline =>
                {
                    sleep(POLL_INTERVAL).await;
                }
                bound => return bound,
            }
        }
    }
}

fn ephemeral_range() -> RangeInclusive<u16> {
    // The file exists on Linux; the default is IANA's range.
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|text| {
            let mut numbers = text.split_whitespace().map(str::parse::<u16>);
            Some(numbers.next()?.ok()?..=numbers.next()?.ok()?)
        })
        .unwrap_or(49152..=65535)
}

/// The range to choose from: below the ephemeral range if there is room, else above it, else any.
fn outside_ephemeral(ephemeral: RangeInclusive<u16>) -> RangeInclusive<u16> {
    const LOWEST: u16 = 10_000; // above the well-known services
    const ROOM: u16 = 2_000;
    let (low, high) = ephemeral.into_inner();
    if low >= LOWEST + ROOM {
        LOWEST..=low - 1
    } else if high <= u16::MAX - ROOM {
        high.max(LOWEST) + 1..=u16::MAX
    } else {
        LOWEST..=u16::MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_outside_the_ephemeral_range() {
        assert_eq!(outside_ephemeral(32768..=60999), 10_000..=32767);
        assert_eq!(outside_ephemeral(1024..=40000), 40001..=65535);
        assert_eq!(outside_ephemeral(1024..=5000), 10_001..=65535);
        assert_eq!(outside_ephemeral(1024..=65535), 10_000..=65535);
    }

    #[test]
    fn claims_are_exclusive() {
        let port = Port::claim().unwrap();
        assert!(Port::try_claim(port.number).is_err());
        let listener = TcpListener::bind(port.endpoint()).unwrap();
        drop((port, listener));
    }
}
