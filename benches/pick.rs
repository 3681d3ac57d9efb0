//! What one pick costs, by policy and number of endpoints: `cargo bench --bench pick`.
//!
//! The picker is private to the crate, so that its files are compiled into this benchmark as they are.

#![allow(
    dead_code,
    unused_imports,
    reason = "not all of the picker is measured, and its own tests do not run here"
)]

#[path = "../src/balance/pick/mod.rs"]
mod pick;

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use divan::{AllocProfiler, Bencher};
use pick::{BalancePolicy, Candidate, Cursor, Load, Picker};
use tokio::time::Instant;

#[global_allocator]
static ALLOCATIONS: AllocProfiler = AllocProfiler::system();

const ENDPOINTS: [usize; 3] = [3, 100, 10_000];

fn main() {
    divan::main();
}

/// As far from the picker as a channel's endpoints are: the load and the connections behind pointers of
/// their own.
struct Endpoint {
    endpoint: Arc<Shared>,
    connections: Box<[Arc<Connection>]>,
    weight: u32,
}

struct Connection {
    is_open: AtomicBool,
    calls: AtomicUsize,
    limit: AtomicUsize,
}

struct Shared {
    /// What else there is of an endpoint, so that two of them share no cache line.
    _address: [u8; 128],
    load: Load,
}

impl Candidate for Endpoint {
    fn load(&self) -> &Load {
        &self.endpoint.load
    }

    fn weight(&self) -> u32 {
        self.weight
    }

    fn is_usable(&self) -> bool {
        self.connections.iter().any(|connection| {
            connection.is_open.load(Ordering::Acquire)
                && connection.calls.load(Ordering::SeqCst) < connection.limit.load(Ordering::SeqCst)
        })
    }
}

fn picker(policy: BalancePolicy, count: usize) -> Picker<Endpoint> {
    let now = Instant::now();
    let endpoints = (0..count as u32).map(|index| {
        let endpoint = Endpoint {
            endpoint: Arc::new(Shared {
                _address: [0; 128],
                load: Load::new(now),
            }),
            connections: Box::new([Arc::new(Connection {
                is_open: AtomicBool::new(true),
                calls: AtomicUsize::new(0),
                limit: AtomicUsize::new(100),
            })]),
            // One has a hundred times the share of the others.
            weight: if index == 0 { 10_000 } else { 100 + index % 7 },
        };
        // So far apart that they are compared and not taken as alike.
        let latency = Duration::from_micros(200 + 1_000 * u64::from(index % 50));
        endpoint.load().observe(latency, false, now);
        (0..index % 5).for_each(|_| endpoint.load().begin());
        endpoint
    });
    Picker::new(policy, endpoints.collect(), &Cursor::default())
}

fn measure(bencher: Bencher<'_, '_>, policy: BalancePolicy, count: usize) {
    let picker = picker(policy, count);
    bencher.bench_local(|| {
        // With the clock, as in a call.
        let picked = picker.pick(Instant::now(), |_| false);
        black_box(picked.map(Candidate::weight))
    });
}

#[divan::bench(args = ENDPOINTS)]
fn peak_ewma(bencher: Bencher<'_, '_>, count: usize) {
    measure(bencher, BalancePolicy::PeakEwma, count);
}

#[divan::bench(args = ENDPOINTS)]
fn least_request(bencher: Bencher<'_, '_>, count: usize) {
    measure(bencher, BalancePolicy::LeastRequest, count);
}

#[divan::bench(args = ENDPOINTS)]
fn round_robin(bencher: Bencher<'_, '_>, count: usize) {
    measure(bencher, BalancePolicy::RoundRobin, count);
}

#[divan::bench]
fn the_clock_alone() -> Instant {
    Instant::now()
}
