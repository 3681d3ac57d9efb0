//! The public choice of a balancing policy.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How a channel picks among its ready endpoints.
///
/// Every policy honours weights. As text and with serde a policy has its snake-case name, such
/// as `peak_ewma`:
///
/// ```
/// use goo_etcd::balance::BalancePolicy;
///
/// let policy: BalancePolicy = "least_request".parse()?;
/// assert_eq!(policy, BalancePolicy::LeastRequest);
/// assert_eq!(policy.to_string(), "least_request");
/// # Ok::<_, goo_etcd::balance::ParseBalancePolicyError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BalancePolicy {
    /// Draws two endpoints at random, in proportion to their weights, and picks the one with less
    /// latency times calls in flight, per weight.
    ///
    /// The latency is a moving average that rises at once and falls slowly, so that an endpoint
    /// that turns slow is avoided within a few responses. Latencies count only where they differ by
    /// more than a factor of two. Smaller differences are noise, and calls in flight alone decide.
    ///
    /// This is the default, because it is the best choice whenever the endpoints, or the network
    /// paths to them, are not all alike.
    #[default]
    PeakEwma,
    /// Draws two endpoints at random, in proportion to their weights, and picks the one with fewer
    /// calls in flight, per weight (gRFC A48).
    LeastRequest,
    /// Picks the endpoints in turn, each in proportion to its weight, smoothly mixed (gRFC A58).
    RoundRobin,
}

impl BalancePolicy {
    /// All variants, in the order of their declaration.
    pub(super) const ALL: [Self; 3] = [Self::PeakEwma, Self::LeastRequest, Self::RoundRobin];

    fn name(self) -> &'static str {
        match self {
            Self::PeakEwma => "peak_ewma",
            Self::LeastRequest => "least_request",
            Self::RoundRobin => "round_robin",
        }
    }
}

impl fmt::Display for BalancePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for BalancePolicy {
    type Err = ParseBalancePolicyError;

    fn from_str(name: &str) -> Result<Self, ParseBalancePolicyError> {
        let mut policies = Self::ALL.into_iter();
        policies
            .find(|policy| policy.name() == name)
            .ok_or_else(|| ParseBalancePolicyError(name.to_owned()))
    }
}

/// The error of parsing a [`BalancePolicy`] from a name that no policy has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown balancing policy {0:?}; expected {list}", list = list_names())]
pub struct ParseBalancePolicyError(String);

/// The names of all policies, such as "`a`, `b` or `c`".
fn list_names() -> String {
    let names = BalancePolicy::ALL.map(|policy| format!("`{policy}`"));
    let [first @ .., last] = &names;
    format!("{} or {last}", first.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_serde_use_the_same_names() {
        for policy in BalancePolicy::ALL {
            let name = policy.to_string();
            assert_eq!(name.parse(), Ok(policy));
            let json = serde_json::to_string(&policy).unwrap();
            assert_eq!(json, format!("{name:?}"));
            assert_eq!(
                serde_json::from_str::<BalancePolicy>(&json).unwrap(),
                policy
            );
        }
    }

    /// serde derives its list from the declaration, so a variant that `ALL` lacks fails this test.
    #[test]
    fn all_has_every_variant() {
        let error = serde_json::from_str::<BalancePolicy>("\"random\"").unwrap_err();
        let names = BalancePolicy::ALL.map(|policy| format!("`{policy}`"));
        let list = format!("expected one of {} at", names.join(", "));
        assert!(error.to_string().contains(&list), "{error}; ALL: {list}");
    }

    #[test]
    fn unknown_name_is_an_error_that_lists_the_known_ones() {
        let error = "random".parse::<BalancePolicy>().unwrap_err().to_string();
        let expected = "unknown balancing policy \"random\"; expected `peak_ewma`, `least_request` \
                        or `round_robin`";
        assert_eq!(error, expected);
    }
}
