//! A greeter that registers in etcd, and leaves gracefully on SIGTERM and Ctrl-C.
//!
//! ```text
//! cargo run --example greeter_server -- --zone eu-1a
//! ```

use std::error::Error;
use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Parser;
use goo_etcd::{Client, Config, Instance, Registrar, RegistrationState};
use helloworld::greeter::greeter_server::{Greeter, GreeterServer};
use helloworld::greeter::{HelloReply, HelloRequest};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use tracing_subscriber::EnvFilter;

/// A greeter that registers in etcd, and leaves gracefully on SIGTERM and Ctrl-C.
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
    /// The address to listen on. Port 0 chooses a free port.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// The address for clients. Default: the address listened on.
    #[arg(long)]
    advertise: Option<String>,
    /// The name of the service.
    #[arg(long, default_value = "greeter")]
    service: String,
    /// The id of this server. Default: its address.
    #[arg(long)]
    id: Option<String>,
    /// The zone of this server.
    #[arg(long)]
    zone: Option<String>,
    /// The share of calls of this server, relative to the others.
    #[arg(long, default_value_t = Instance::DEFAULT_WEIGHT)]
    weight: u32,
    /// The time to live of the registration after a crash.
    #[arg(long, default_value = "10s")]
    ttl: humantime::Duration,
}

/// Greets, and names the server.
struct MyGreeter {
    address: String,
}

#[tonic::async_trait]
impl Greeter for MyGreeter {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        Ok(Response::new(HelloReply {
            message: format!("Hello {}!", request.into_inner().name),
            server: self.address.clone(),
        }))
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
    match run(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("greeter_server: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<(), Box<dyn Error>> {
    // Bind before registering, so that clients can connect as soon as they find the server.
    let listener = TcpListener::bind(args.listen)
        .await
        .map_err(|error| format!("cannot listen on {}: {error}", args.listen))?;
    let listening = listener.local_addr()?;
    let address = match args.advertise {
        Some(address) => address,
        None if listening.ip().is_unspecified() => {
            return Err(format!(
                "the server listens on all addresses of this machine ({listening}); \
                 give the address for clients with --advertise HOST:{}",
                listening.port()
            )
            .into());
        }
        None => listening.to_string(),
    };

    let mut instance = Instance::new(args.service, &address).weight(args.weight);
    if let Some(id) = args.id {
        instance = instance.id(id);
    }
    if let Some(zone) = args.zone {
        instance = instance.zone(zone);
    }

    let stopped = stop_signal()?;
    let config = Config::builder().endpoints(args.etcd).build()?;
    let client = Client::connect("greeter-server", config).await?;
    let registrar = Registrar::builder(&client).ttl(args.ttl.into()).build()?;
    let registration = registrar.register(instance).await?;
    println!("registered {} at {address}", registration.key());

    Server::builder()
        .add_service(GreeterServer::new(MyGreeter { address }))
        .serve_with_incoming_shutdown(
            TcpIncoming::from(listener).with_nodelay(Some(true)),
            registration.leave_on(stopped),
        )
        .await?;

    match registration.state() {
        RegistrationState::Deregistered => println!("left {}", registration.key()),
        // etcd is down: the key is deleted when its lease expires.
        _ => println!(
            "stopped; {} expires within {}",
            registration.key(),
            args.ttl
        ),
    }
    Ok(())
}

/// Resolves on SIGTERM and Ctrl-C. After this call they no longer end the process directly.
fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
