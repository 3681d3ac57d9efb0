//! The order in which the addresses of a name are tried.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::carried::{Carried, GREETING};

/// Past experience with the addresses of a name. Shared by the connections of an endpoint.
#[derive(Debug, Clone, Default)]
pub(super) struct AddressOrder(Arc<Mutex<Experience>>);

#[derive(Debug, Default)]
struct Experience {
    /// The address that connected last.
    winner: Option<SocketAddr>,
    /// Addresses to try after all others, the next one first.
    demoted: Vec<SocketAddr>,
}

/// All are equal, because experience is no property of a target.
impl PartialEq for AddressOrder {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for AddressOrder {}

impl AddressOrder {
    /// Tries an address first from now on.
    pub(super) fn prefer(&self, address: SocketAddr) {
        self.0.lock().winner = Some(address);
    }

    /// Tries an address last from now on.
    pub(super) fn demote(&self, address: SocketAddr) {
        let experience = &mut *self.0.lock();
        experience.winner = experience.winner.filter(|winner| *winner != address);
        experience.demoted.retain(|demoted| *demoted != address);
        experience.demoted.push(address);
    }

    /// Tries an address last from now on if its connection was of no use: if the server served no
    /// call that was sent, or only greeted, as a proxy without a backend may do. A server that
    /// closes an idle connection is not at fault.
    pub(super) fn record_end(&self, address: SocketAddr, lifetime: Duration, carried: &Carried) {
        let has_ignored_calls = carried.had_request() && !carried.is_draining();
        if !carried.has_served() && (has_ignored_calls || lifetime < GREETING) {
            return self.demote(address);
        }
        let demoted = &mut self.0.lock().demoted;
        demoted.retain(|demoted| *demoted != address);
    }

    /// The order in which to try the addresses that were found: the one that connected last, then
    /// the others with the families in turn (RFC 8305, section 4), starting with the family of the
    /// first address, then those that were demoted.
    pub(super) fn of(&self, found: &[SocketAddr]) -> Vec<SocketAddr> {
        let experience = &mut *self.0.lock();
        experience.demoted.retain(|demoted| found.contains(demoted));
        let winner = experience.winner.filter(|winner| found.contains(winner));
        let mut ordered: Vec<SocketAddr> = winner.into_iter().collect();
        let is_demoted = |address: &SocketAddr| experience.demoted.contains(address);
        let turns = in_turns(found).filter(|address| !is_demoted(address));
        for address in turns.chain(experience.demoted.iter().copied()) {
            if !ordered.contains(&address) {
                ordered.push(address);
            }
        }
        ordered
    }
}

/// The addresses with their families in turn.
fn in_turns(addresses: &[SocketAddr]) -> impl Iterator<Item = SocketAddr> {
    let starts_with_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<SocketAddr>, Vec<SocketAddr>) = addresses
        .iter()
        .partition(|address| address.is_ipv6() == starts_with_v6);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    (0..addresses.len()).flat_map(move |_| [first.next(), second.next()].into_iter().flatten())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::connection::state::ConnectionState;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn families_take_turns_and_the_winner_is_first() {
        let found = addresses(&["[::1]:1", "[::2]:1", "[::3]:1", "10.0.0.1:1", "10.0.0.2:1"]);
        let order = AddressOrder::default();
        let turns = ["[::1]:1", "10.0.0.1:1", "[::2]:1", "10.0.0.2:1", "[::3]:1"];
        assert_eq!(order.of(&found), addresses(&turns));
        order.prefer("10.0.0.2:1".parse().unwrap());
        let turns = ["10.0.0.2:1", "[::1]:1", "10.0.0.1:1", "[::2]:1", "[::3]:1"];
        assert_eq!(order.of(&found), addresses(&turns));
        // The name has changed since.
        let found = addresses(&["10.0.0.3:1", "10.0.0.4:1"]);
        assert_eq!(order.of(&found), found);
        assert_eq!(order.of(&[]), []);
    }

    #[test]
    fn demoted_addresses_are_last() {
        let found = addresses(&["10.0.0.1:1", "10.0.0.2:1", "10.0.0.3:1", "10.0.0.4:1"]);
        let order = AddressOrder::default();
        let after = |first: &[usize]| first.iter().map(|n| found[n - 1]).collect::<Vec<_>>();
        order.prefer(found[1]);
        order.demote(found[1]);
        assert_eq!(order.of(&found), after(&[1, 3, 4, 2]));
        order.demote(found[0]);
        assert_eq!(order.of(&found), after(&[3, 4, 2, 1]));
        order.demote(found[1]);
        assert_eq!(order.of(&found), after(&[3, 4, 1, 2]));
        order.prefer(found[1]);
        assert_eq!(order.of(&found), after(&[2, 3, 4, 1]));
        let served = ConnectionState::new();
        served.record_served();
        order.record_end(found[0], Duration::ZERO, &Carried::of(&served));
        assert_eq!(order.of(&found), after(&[2, 1, 3, 4]));
        // An address that the name no longer has is forgotten.
        order.demote(found[3]);
        order.of(&found[..3]);
        assert_eq!(order.of(&found), after(&[2, 1, 3, 4]));
    }

    /// Whether an address that connected last is not tried first any more after the end of its
    /// connection.
    fn is_demoted(lifetime: Duration, state: &Arc<ConnectionState>) -> bool {
        let found = addresses(&["10.0.0.1:1", "10.0.0.2:1"]);
        let order = AddressOrder::default();
        order.prefer(found[0]);
        order.record_end(found[0], lifetime, &Carried::of(state));
        order.of(&found)[0] != found[0]
    }

    #[tokio::test]
    async fn graceful_end_with_calls_in_flight_speaks_against_no_address() {
        let state = ConnectionState::new();
        state.set_stream_limit(1);
        assert!(state.acquire_stream());
        state.record_written(1);
        assert!(is_demoted(GREETING, &state));
        state
            .close_reason
            .set_graceful("GOAWAY NO_ERROR".to_owned());
        assert!(!is_demoted(GREETING, &state));
        state.release_streams(1);
        assert!(is_demoted(GREETING, &state), "the call has ended");
    }

    #[tokio::test]
    async fn end_of_a_connection_speaks_for_or_against_its_address() {
        for (sent, served, lifetime, expected) in [
            (false, false, Duration::ZERO, true),
            (false, false, GREETING, false),
            (true, false, 1_000 * GREETING, true),
            (true, true, Duration::ZERO, false),
        ] {
            let state = ConnectionState::new();
            if sent {
                state.record_written(1);
            }
            if served {
                state.record_served();
            }
            let is_demoted = is_demoted(lifetime, &state);
            assert_eq!(is_demoted, expected, "{sent} {served} {lifetime:?}");
        }
    }
}
