//! Metrics, through the facade of the crate `metrics`: whoever installs a recorder gets them. Without the
//! feature `metrics` there are none, and nothing here costs anything.
//!
//! | name | kind | labels | what |
//! |---|---|---|---|
//! | `goo_etcd_mass_deletions_total` | counter | `service` | how often most instances of a channel vanished together |
//! | `goo_etcd_kept_endpoints` | gauge | `service` | how many endpoints a channel keeps that vanished so and are connected |
//!
//! The label is the key prefix that the instances are read from, such as `services/greeter/`.

/// Most instances have vanished together, and the guard, which kept none so far, keeps those that are connected.
pub(crate) fn mass_deletion(service: &str) {
    #[cfg(feature = "metrics")]
    metrics::counter!("goo_etcd_mass_deletions_total", "service" => service.to_owned())
        .increment(1);
    #[cfg(not(feature = "metrics"))]
    let _ = service;
}

/// The guard keeps so many more than before, or fewer. Channels of one service add up.
pub(crate) fn kept_endpoints(service: &str, before: usize, now: usize) {
    #[cfg(feature = "metrics")]
    {
        let gauge = metrics::gauge!("goo_etcd_kept_endpoints", "service" => service.to_owned());
        // Counts of endpoints are far below what a `f64` holds exactly.
        gauge.increment(now as f64 - before as f64);
    }
    #[cfg(not(feature = "metrics"))]
    let _ = (service, before, now);
}
