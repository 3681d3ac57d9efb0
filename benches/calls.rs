//! The cost of a call for the client: `cargo bench --bench calls`.
//!
//! A plain tonic `Channel` to one endpoint, tonic's `balance_list` and `BalancedChannel` make the
//! same unary call with 64 tasks, in turn, round after round. The servers run in another process.
//! The result is the CPU time of the client process per call, as a ratio to the plain channel in
//! the same round, so that changes of the machine's speed cancel out.
//!
//! `cargo bench --bench calls -- LeastRequest` measures only contenders with that text in their
//! name, and the plain channel.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use goo_etcd::BalancedChannel;
use goo_etcd::balance::{BalancePolicy, EndpointState};
use helloworld::echo::echo_client::EchoClient;
use helloworld::echo::echo_server::{Echo, EchoServer};
use helloworld::echo::{EchoReply, EchoRequest};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use tonic::codegen::{Body, Bytes, StdError};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

/// Environment variable of the server process: the number of servers to run.
const SERVERS: &str = "GOO_ETCD_BENCH_SERVERS";

const TASKS: usize = 64;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    match std::env::var(SERVERS) {
        Ok(count) => runtime.block_on(serve(count.parse().expect("a number"))),
        Err(_) => runtime.block_on(measure()),
    }
}

async fn measure() {
    // `cargo test --benches` runs benchmarks too; a single round is enough there.
    let test = std::env::args().any(|argument| argument == "--test");
    let (rounds, calls) = if test { (1, 640) } else { (9, 32_000) };
    let servers = Servers::start(100);
    let mut contenders = Vec::new();
    let one = endpoint(&servers.addresses[0])
        .connect()
        .await
        .expect("connects");
    contenders.push(Contender::new("tonic Channel, 1", one));
    for count in [1, 3, 10, 100] {
        let addresses = &servers.addresses[..count];
        let list = Channel::balance_list(addresses.iter().map(endpoint));
        contenders.push(Contender::new(format!("tonic balance_list, {count}"), list));
    }
    for (policy, name) in [
        (BalancePolicy::PeakEwma, "PeakEwma"),
        (BalancePolicy::LeastRequest, "LeastRequest"),
        (BalancePolicy::RoundRobin, "RoundRobin"),
    ] {
        for count in [1, 3, 10, 100] {
            let channel = connect_balanced(&servers.addresses[..count], policy).await;
            let name = format!("BalancedChannel {name}, {count}");
            contenders.push(Contender::new(name, channel));
        }
    }
    let wanted = std::env::args()
        .skip(1)
        .find(|argument| !argument.starts_with("--"));
    if let Some(wanted) = wanted {
        let mut index = 0;
        contenders.retain(|contender| {
            index += 1;
            index == 1 || contender.name.contains(&wanted)
        });
    }
    println!("{rounds} rounds of {calls} calls each, {TASKS} tasks");
    for contender in &mut contenders {
        contender.round(calls / 4).await;
    }
    let mut figures = vec![Vec::new(); contenders.len()];
    for _ in 0..rounds {
        for (contender, figures) in contenders.iter_mut().zip(&mut figures) {
            figures.push(contender.round(calls).await);
        }
    }
    println!(
        "{:34} {:>10} {:>10} {:>18}",
        "", "CPU/call", "calls/s", "CPU to plain (min-max)"
    );
    let plain = figures[0].clone();
    for (contender, figures) in contenders.iter().zip(&figures) {
        let ratios = figures
            .iter()
            .zip(&plain)
            .map(|(own, plain)| own.cpu / plain.cpu);
        let ratios = Spread::of(ratios);
        println!(
            "{:34} {:>7.2} us {:>10.0} {:>6.2} ({:.2}-{:.2})",
            contender.name,
            Spread::of(figures.iter().map(|figure| figure.cpu * 1e6)).median,
            Spread::of(figures.iter().map(|figure| figure.rate)).median,
            ratios.median,
            ratios.least,
            ratios.most,
        );
    }
}

fn endpoint(address: &String) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).expect("an address")
}

async fn connect_balanced(addresses: &[String], policy: BalancePolicy) -> BalancedChannel {
    let instances = addresses
        .iter()
        .map(|address| goo_etcd::Instance::new("echo", address));
    let channel = BalancedChannel::builder(goo_etcd::balance::Source::fixed(instances))
        .policy(policy)
        .build()
        .expect("a channel");
    let is_ready = |channel: &BalancedChannel| {
        let endpoints = channel.endpoints();
        endpoints.len() == addresses.len()
            && endpoints
                .iter()
                .all(|endpoint| endpoint.state == EndpointState::Ready)
    };
    while !is_ready(&channel) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    channel
}

/// A channel to measure, of any type.
struct Contender {
    name: String,
    #[allow(clippy::type_complexity, reason = "one place, spelled out")]
    run: Box<dyn Fn(usize) -> std::pin::Pin<Box<dyn Future<Output = ()>>>>,
}

#[derive(Clone, Copy)]
struct Figure {
    /// CPU seconds per call.
    cpu: f64,
    /// Calls per second.
    rate: f64,
}

impl Contender {
    fn new<T>(name: impl Into<String>, channel: T) -> Self
    where
        T: tonic::client::GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
        T::ResponseBody: Body<Data = Bytes> + Send + 'static,
        <T::ResponseBody as Body>::Error: Into<StdError> + Send,
        T::Error: Into<StdError>,
        T::Future: Send,
    {
        Self {
            name: name.into(),
            run: Box::new(move |calls| Box::pin(run(EchoClient::new(channel.clone()), calls))),
        }
    }

    async fn round(&mut self, calls: usize) -> Figure {
        let (cpu, begun) = (cpu_seconds(), Instant::now());
        (self.run)(calls).await;
        Figure {
            cpu: (cpu_seconds() - cpu) / calls as f64,
            rate: calls as f64 / begun.elapsed().as_secs_f64(),
        }
    }
}

async fn run<T>(client: EchoClient<T>, calls: usize)
where
    T: tonic::client::GrpcService<tonic::body::Body> + Clone + Send + Sync + 'static,
    T::ResponseBody: Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as Body>::Error: Into<StdError> + Send,
    T::Error: Into<StdError>,
    T::Future: Send,
{
    let left = Arc::new(AtomicUsize::new(calls));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..TASKS {
        let (mut client, left) = (client.clone(), Arc::clone(&left));
        tasks.spawn(async move {
            let payload = vec![7; 64];
            while left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                    left.checked_sub(1)
                })
                .is_ok()
            {
                let request = EchoRequest {
                    payload: payload.clone(),
                    ..EchoRequest::default()
                };
                client.unary(request).await.expect("an answer");
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("no call fails");
    }
}

fn cpu_seconds() -> f64 {
    let usage = getrusage(UsageWho::RUSAGE_SELF).expect("the process's own usage");
    let total = usage.user_time() + usage.system_time();
    total.num_microseconds() as f64 / 1e6
}

struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl Spread {
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.collect();
        values.sort_by(f64::total_cmp);
        Self {
            least: values[0],
            median: values[values.len() / 2],
            most: values[values.len() - 1],
        }
    }
}

/// The server process.
struct Servers {
    process: Child,
    addresses: Vec<String>,
}

impl Servers {
    fn start(count: usize) -> Self {
        let program = std::env::current_exe().expect("this program");
        let mut process = Command::new(program)
            .env(SERVERS, count.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the server process");
        let output = process.stdout.take().expect("its output");
        let addresses = BufReader::new(output)
            .lines()
            .take(count)
            .collect::<Result<_, _>>()
            .expect("addresses");
        Self { process, addresses }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn serve(count: usize) {
    let mut servers = tokio::task::JoinSet::new();
    for _ in 0..count {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a port");
        println!("{}", listener.local_addr().expect("its address"));
        let incoming =
            tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true));
        servers.spawn(
            Server::builder()
                .add_service(EchoServer::new(Unary))
                .serve_with_incoming(incoming),
        );
    }
    servers.join_all().await;
}

struct Unary;

type Replies = futures::stream::Empty<Result<EchoReply, Status>>;

#[tonic::async_trait]
impl Echo for Unary {
    type ServerStreamStream = Replies;
    type BidiStream = Replies;

    async fn unary(&self, request: Request<EchoRequest>) -> Result<Response<EchoReply>, Status> {
        let payload = request.into_inner().payload;
        Ok(Response::new(EchoReply {
            payload,
            ..EchoReply::default()
        }))
    }

    async fn server_stream(&self, _: Request<EchoRequest>) -> Result<Response<Replies>, Status> {
        Err(Status::unimplemented("unary calls only"))
    }

    async fn client_stream(
        &self,
        _: Request<Streaming<EchoRequest>>,
    ) -> Result<Response<EchoReply>, Status> {
        Err(Status::unimplemented("unary calls only"))
    }

    async fn bidi(&self, _: Request<Streaming<EchoRequest>>) -> Result<Response<Replies>, Status> {
        Err(Status::unimplemented("unary calls only"))
    }
}
