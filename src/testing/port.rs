//! Loopback ports that stay ours while nothing listens on them.

use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::ops::RangeInclusive;

/// A TCP port of 127.0.0.1 that nothing else takes, also between a kill and a restart.
///
/// Two dangers threaten a port that is "free" for a moment. An outgoing connection may get it as its
/// source port: so it is chosen outside the range that the system gives those from. Another test
/// process may choose it too: so it is claimed, by holding the UDP port of the same number. UDP ports
/// are a space of their own, so the claim is in nobody's way; the kernel makes it exclusive, and ends
/// it with the process, however that ends. Lock files would need cleaning up.
#[derive(Debug)]
pub(super) struct Port {
    number: u16,
    _claim: UdpSocket,
}

impl Port {
    pub(super) fn claim() -> io::Result<Self> {
        let range = outside_ephemeral(ephemeral_range());
        // In a range of some 20,000 ports a busy one is rare; a hundred in a row means that the
        // machine, not the choice, is the problem.
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
        // Programs that know nothing of claims show here.
        TcpListener::bind((Ipv4Addr::LOCALHOST, number))?;
        Ok(Self {
            number,
            _claim: claim,
        })
    }

    pub(super) fn endpoint(&self) -> String {
        format!("127.0.0.1:{}", self.number)
    }
}

fn ephemeral_range() -> RangeInclusive<u16> {
    // Linux; elsewhere IANA's range is the custom.
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|text| {
            let mut numbers = text.split_whitespace().map(str::parse::<u16>);
            Some(numbers.next()?.ok()?..=numbers.next()?.ok()?)
        })
        .unwrap_or(49152..=65535)
}

/// Where to choose from: below the ephemeral range if there is room, else above it, else anywhere.
fn outside_ephemeral(ephemeral: RangeInclusive<u16>) -> RangeInclusive<u16> {
    const LOWEST: u16 = 10_000; // below live the well-known services
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
    fn ports_are_chosen_where_no_outgoing_connection_gets_one() {
        assert_eq!(outside_ephemeral(32768..=60999), 10_000..=32767);
        assert_eq!(outside_ephemeral(1024..=40000), 40001..=65535);
        assert_eq!(outside_ephemeral(1024..=5000), 10_001..=65535);
        assert_eq!(outside_ephemeral(1024..=65535), 10_000..=65535);
    }

    #[test]
    fn a_claimed_port_is_not_claimed_again_and_can_be_listened_on() {
        let port = Port::claim().unwrap();
        assert!(Port::try_claim(port.number).is_err());
        let listener = TcpListener::bind(port.endpoint()).unwrap();
        drop((port, listener));
    }
}
