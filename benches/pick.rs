//! The cost of one pick, by policy and number of endpoints: `cargo bench --bench pick`.
//!
//! The picker is private to the crate, so this benchmark compiles the picker's files into itself.

#![allow(
    dead_code,
    unused_imports,
    reason = "parts of the picker are not measured, and its unit tests do not run here"
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

/// Laid out in memory like a channel's endpoints: the load and each connection are behind pointers.
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
    /// Stands for the rest of an endpoint, so that no two endpoints share a cache line.
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
            // The first endpoint has a hundred times the share of the others.
            weight: if index == 0 { 10_000 } else { 100 + index % 7 },
        };
        // The latencies differ enough to be compared, and do not count as equal.
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
        // A call reads the clock too.
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
fn clock_only() -> Instant {
    Instant::now()
}
