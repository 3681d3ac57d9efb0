//! Calls the greeters that are registered in etcd, and shows which servers respond.
//!
//! ```text
//! cargo run --example greeter_client -- --rate 100
//! ```

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use goo_etcd::{BalancedChannel, Client, Config, Directory, Freshness};
use helloworld::greeter::HelloRequest;
use helloworld::greeter::greeter_client::GreeterClient;
use tokio::task::JoinSet;
use tokio::time::interval;
use tracing_subscriber::EnvFilter;

/// Calls the greeters that are registered in etcd, and shows which servers respond.
#[derive(Parser)]
struct Args {
    /// etcd's endpoints, separated by commas.
    #[arg(
        long,
        env = "GOO_ETCD_ENDPOINTS",
        value_delimiter = ',',
        default_value = "localhost:2379"
    )]
    etcd: Vec<String>,
    /// The service to call.
    #[arg(long, default_value = "greeter")]
    service: String,
    /// Stop after this number of calls, with status 1 if any failed. Default: call until Ctrl-C.
    #[arg(long)]
    count: Option<u64>,
    /// Calls per second.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// The deadline of a call.
    #[arg(long, default_value = "1s")]
    timeout: humantime::Duration,
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    match run(Args::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("greeter_client: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<ExitCode, Box<dyn Error>> {
    let config = Config::builder().endpoints(args.etcd).build()?;
    let client = Client::connect("greeter-client", config).await?;
    let directory = Directory::watch(&client, args.service).await?;
    let channel = BalancedChannel::builder(&directory).timeout(args.timeout.into());
    let greeter = GreeterClient::new(channel.build()?);

    let begun = Instant::now();
    let (mut second, mut total) = (Tally::default(), Tally::default());
    let mut started = 0;
    let mut calls = JoinSet::new();
    let mut next_call = interval(Duration::from_secs(1) / args.rate);
    let mut next_line = interval(Duration::from_secs(1));
    next_line.tick().await;
    let stopped = tokio::signal::ctrl_c();
    tokio::pin!(stopped);
    let complete = loop {
        let more = args.count.is_none_or(|count| started < count);
        if !more && calls.is_empty() {
            break true;
        }
        tokio::select! {
            _ = next_call.tick(), if more => {
                started += 1;
                calls.spawn(call(greeter.clone()));
            }
            Some(result) = calls.join_next() => {
                let result = result?;
                second.add(&result);
                total.add(&result);
            }
            _ = next_line.tick() => {
                let line = std::mem::take(&mut second).line("requests/s");
                show(&format!("{line}   {}", describe(&directory)))?;
            }
            _ = &mut stopped => break false,
        }
    };
    let line = total.line("requests");
    show(&format!(
        "{line}   in {:.1} s",
        begun.elapsed().as_secs_f64()
    ))?;
    if io::stdout().is_terminal() {
        println!();
    }
    Ok(match total.failed {
        1.. if complete => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    })
}

/// Makes one call; returns the address of the server that responded, or the error.
async fn call(mut greeter: GreeterClient<BalancedChannel>) -> Result<String, String> {
    let name = "client".to_owned();
    match greeter.say_hello(HelloRequest { name }).await {
        Ok(reply) => Ok(reply.into_inner().server),
        Err(status) => Err(format!("{:?}: {}", status.code(), status.message())),
    }
}

/// The number of known instances, and the age of the data if it is stale.
fn describe(directory: &Directory) -> String {
    let snapshot = directory.snapshot();
    match snapshot.freshness() {
        Freshness::Stale { reason, .. } => format!(
            "[{} in {}, as of {} s ago: {reason}]",
            snapshot.len(),
            snapshot.range(),
            snapshot.freshness().age().as_secs()
        ),
        _ => format!("[{} in {}]", snapshot.len(), snapshot.range()),
    }
}

#[derive(Default)]
struct Tally {
    failed: u64,
    last_failure: String,
    /// Responses by server.
    responses: BTreeMap<String, u64>,
}

impl Tally {
    fn add(&mut self, result: &Result<String, String>) {
        match result {
            Ok(server) => *self.responses.entry(server.clone()).or_default() += 1,
            Err(failure) => {
                self.failed += 1;
                self.last_failure.clone_from(failure);
            }
        }
    }

    fn line(&self, unit: &str) -> String {
        let requests = self.failed + self.responses.values().sum::<u64>();
        let mut line = format!("{requests} {unit}, {} failed", self.failed);
        if self.failed > 0 {
            line += &format!(" ({})", self.last_failure);
        }
        for (server, count) in &self.responses {
            line += &format!("   {server} {count}");
        }
        line
    }
}

/// Shows a line. On a terminal it replaces the previous line, elsewhere it follows it.
fn show(line: &str) -> io::Result<()> {
    let mut out = io::stdout();
    if out.is_terminal() {
        // `?7l` cuts the line off at the edge; a wrapped line would stay, because `\r` returns to
        // the start of one row only.
        write!(out, "\r\x1b[?7l{line}\x1b[K\x1b[?7h")?;
        out.flush()
    } else {
        writeln!(out, "{line}")
    }
}
