//! The log of a test.

use std::io::Write;
use std::sync::{Arc, Mutex};

use tracing::Subscriber;
use tracing::subscriber::DefaultGuard;
use tracing_subscriber::fmt::MakeWriter;

/// The lines logged by the current thread, or by the whole process.
///
/// A test that reads its log must run in a child process (see
/// [`isolate`](super::process::isolate)). `tracing` caches whether an event has a subscriber; if
/// another test reached the event first, in a thread without a subscriber, the event could be off
/// for the whole process.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Starts to record the events that match `filter`, until the guard is dropped.
    pub fn start(filter: &str) -> (Self, DefaultGuard) {
        let log = Self::default();
        let guard = tracing::subscriber::set_default(log.subscriber(filter));
        (log, guard)
    }

    /// Starts to record the events of all threads that match `filter`, until the process ends.
    pub fn start_for_process(filter: &str) -> Self {
        let log = Self::default();
        tracing::subscriber::set_global_default(log.subscriber(filter)).unwrap();
        log
    }

    fn subscriber(&self, filter: &str) -> impl Subscriber + Send + Sync + use<> {
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(self.clone())
            .with_ansi(false)
            .finish()
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// How many lines contain `part`.
    pub fn count(&self, part: &str) -> usize {
        self.text()
            .lines()
            .filter(|line| line.contains(part))
            .count()
    }

    /// The latest line that contains `part`.
    ///
    /// # Panics
    ///
    /// If there is none.
    pub fn last(&self, part: &str) -> String {
        let text = self.text();
        let mut lines = text.lines().filter(|line| line.contains(part));
        let line = lines.next_back();
        line.unwrap_or_else(|| panic!("{part} in {text}"))
            .to_owned()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}
