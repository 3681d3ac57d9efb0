//! One server process: it registers, serves, and leaves on SIGTERM.

use std::error::Error;
use std::io::{Read, stdin};
use std::time::Duration;

use clap::Args;
use futures::FutureExt;
use futures::future::join_all;
use goo_etcd::{Client, Config, Instance, Registrar, Registration};
use helloworld::greeter::greeter_server::{Greeter, GreeterServer};
use helloworld::greeter::{HelloReply, HelloRequest};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use crate::record::SERVICE;

/// Precedes the address in the first line of output.
pub const LISTENING: &str = "listening ";

/// Duration of a call in milliseconds: long enough that some calls are in flight when the server is
/// killed.
const TAKES: std::ops::Range<u64> = 1..30;

#[derive(Args, Debug)]
pub struct ServerArgs {
    /// The instance ids to register, all at the server's one address.
    #[arg(long = "id", required = true)]
    pub ids: Vec<String>,
    /// The etcd endpoints, as this server reaches them.
    #[arg(long, value_delimiter = ',')]
    pub etcd: Vec<String>,
    /// TTL of the registration, in seconds.
    #[arg(long)]
    pub ttl: u64,
}

/// Serves until SIGTERM, or until the parent process is gone.
pub async fn run(args: ServerArgs) -> Result<(), Box<dyn Error>> {
    // Standard input is a pipe that nobody writes to. Reading returns when the parent process ends,
    // however that happens.
    std::thread::spawn(|| {
        let _ = stdin().read(&mut [0]);
        std::process::exit(0);
    });
    let mut terminate = signal(SignalKind::terminate())?;
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    println!("{LISTENING}{address}");

    let serving = Server::builder().add_service(GreeterServer::new(Named(address.clone())));
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let name = args.ids.first().ok_or("an id")?;
    let client = connect(name, args.etcd);
    let registered = async {
        let client = tokio::select! {
            client = client => client?,
            _ = terminate.recv() => return Ok(()),
        };
        let registrar = Registrar::builder(&client)
            .ttl(Duration::from_secs(args.ttl))
            .build()?;
        let instances = args
            .ids
            .iter()
            .map(|id| Instance::new(SERVICE, &address).id(id));
        let registrations = instances.map(|instance| registrar.register_eventually(instance));
        let registrations: Vec<Registration> = registrations.collect::<Result<_, _>>()?;
        let terminated = terminate.recv().map(|_| ()).shared();
        let leave = |registration: &Registration| registration.leave_on(terminated.clone());
        join_all(registrations.iter().map(leave)).await;
        Ok::<_, goo_etcd::Error>(())
    };
    let mut result = Ok(());
    let until = async { result = registered.await };
    serving
        .serve_with_incoming_shutdown(incoming, until)
        .await?;
    Ok(result?)
}

/// Connects to etcd, retrying while etcd is unavailable.
async fn connect(id: &str, endpoints: Vec<String>) -> goo_etcd::Result<Client> {
    let config = Config::builder().endpoints(endpoints).build()?;
    loop {
        match Client::connect(id, config.clone()).await {
            Ok(client) => return Ok(client),
            Err(error) => {
                tracing::debug!(%error, "etcd cannot be reached");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

struct Named(String);

#[tonic::async_trait]
impl Greeter for Named {
    async fn say_hello(
        &self,
        request: Request<HelloRequest>,
    ) -> Result<Response<HelloReply>, Status> {
        tokio::time::sleep(Duration::from_millis(fastrand::u64(TAKES))).await;
        Ok(Response::new(HelloReply {
            message: format!("hello {}", request.into_inner().name),
            server: self.0.clone(),
        }))
    }
}
