//! Metrics, through the facade crate `metrics`: the user installs a recorder for them. Without the
//! feature `metrics` these functions do nothing.
//!
//! | name | kind | labels | meaning |
//! |---|---|---|---|
//! | `goo_etcd_mass_deletions_total` | counter | `service` | mass deletions handled by guards |
//! | `goo_etcd_retained_endpoints` | gauge | `service` | connected endpoints kept after mass deletions |
//!
//! The label is the key prefix of the service's instances, such as `services/greeter/`.

/// Counts a mass deletion: most instances were removed at once, and the guard starts to keep the
/// connected ones.
pub(crate) fn count_mass_deletion(service: &str) {
    #[cfg(feature = "metrics")]
    metrics::counter!("goo_etcd_mass_deletions_total", "service" => service.to_owned())
        .increment(1);
    #[cfg(not(feature = "metrics"))]
    let _ = service;
}

/// Reports how many endpoints the guard keeps, `before` and `now`. The gauge is the sum over all
/// channels of a service.
pub(crate) fn report_retained_endpoints(service: &str, before: usize, now: usize) {
    #[cfg(feature = "metrics")]
    {
        let gauge = metrics::gauge!("goo_etcd_retained_endpoints", "service" => service.to_owned());
        // An `f64` holds counts up to 2^53 exactly.
        gauge.increment(now as f64 - before as f64);
    }
    #[cfg(not(feature = "metrics"))]
    let _ = (service, before, now);
}
