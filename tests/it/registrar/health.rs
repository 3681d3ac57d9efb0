//! Registered while the server's own health service reports SERVING.

use std::time::{Duration, Instant};

use crate::support::echo::EchoServer;
use crate::support::{PATIENCE, TestResult, connect, stored_value, wait_for, wait_until};
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{Client, Config, Instance, Registrar, Registration, RegistrationState};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Endpoint;
use tonic::transport::server::{Server, TcpIncoming};
use tonic::{Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_check_response};
use tonic_health::server::HealthReporter;

/// A server that has only a health service. Another can be started at its address.
struct HealthOnlyServer {
    address: String,
    reporter: HealthReporter,
    /// Runs the server and its connections.
    runtime: Option<Runtime>,
}

impl Drop for HealthOnlyServer {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl HealthOnlyServer {
    async fn start(address: &str, status: ServingStatus) -> TestResult<Self> {
        let (reporter, service) = tonic_health::server::health_reporter();
        reporter.set_service_status("", status).await;
        let listener = crate::support::echo::bind(address);
        let address = listener.local_addr()?.to_string();
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            let server = Server::builder().add_service(service);
            server
                .serve_with_incoming(TcpIncoming::from(listener))
                .await
                .unwrap();
        });
        Ok(Self {
            address,
            reporter,
            runtime: Some(runtime),
        })
    }
}

/// A health service that ends each watch at once, after at most one status.
struct ShortWatches {
    status: Option<ServingStatus>,
}

#[tonic::async_trait]
impl Health for ShortWatches {
    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Err(Status::internal("no test calls this"))
    }

    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let response = self.status.map(|status| HealthCheckResponse {
            status: health_check_response::ServingStatus::from(status).into(),
        });
        Ok(Response::new(stream::iter(response.map(Ok)).boxed()))
    }
}

fn endpoint(address: &str) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).unwrap()
}

async fn wait_until_registered(etcd: &Etcd, registration: &Registration) {
    wait_until("it is registered", async || {
        registration.state() == RegistrationState::Registered
            && stored_value(etcd, registration.key())
                .await
                .unwrap()
                .is_some()
    })
    .await;
}

async fn wait_until_unready(etcd: &Etcd, registration: &Registration) {
    wait_until("it is not registered", async || {
        matches!(registration.state(), RegistrationState::Unready { .. })
            && stored_value(etcd, registration.key())
                .await
                .unwrap()
                .is_none()
    })
    .await;
}

#[tokio::test]
async fn lost_connections_do_not_deregister_a_healthy_server() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let server = HealthOnlyServer::start("127.0.0.1:0", ServingStatus::NotServing).await?;
    let proxy = Proxy::start(server.address.as_str()).await?;
    let ready = goo_etcd::serving(endpoint(&proxy.endpoint()), "");
    let instance = Instance::new("greeter", &server.address);
    let registration = Registrar::new(&client).register_while_ready(instance, ready)?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    wait_until_unready(&etcd, &registration).await;
    for _ in 0..3 {
        server
            .reporter
            .set_service_status("", ServingStatus::Serving)
            .await;
        wait_until_registered(&etcd, &registration).await;
        // The connection of the health watch is lost, but the server stays healthy.
        let before = proxy.accepted();
        proxy.disconnect().await?;
        wait_until("the health is watched again", async || {
            proxy.accepted() > before
        })
        .await;
        wait_until_registered(&etcd, &registration).await;
        server
            .reporter
            .set_service_status("", ServingStatus::NotServing)
            .await;
        wait_until_unready(&etcd, &registration).await;
    }
    server
        .reporter
        .set_service_status("", ServingStatus::Serving)
        .await;
    wait_until_registered(&etcd, &registration).await;
    proxy.cut().await;
    wait_until_unready(&etcd, &registration).await;
    proxy.restore().await?;
    wait_until_registered(&etcd, &registration).await;
    registration.deregister().await?;
    assert_eq!(stored_value(&etcd, registration.key()).await?, None);
    Ok(())
}

#[tokio::test]
async fn server_is_registered_once_it_serves() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let address = crate::support::balanced::unused_address();
    let ready = goo_etcd::serving(endpoint(&address), "");
    let instance = Instance::new("greeter", &address);
    let registration = Registrar::new(&client).register_while_ready(instance, ready)?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    wait_until_unready(&etcd, &registration).await;
    let server = HealthOnlyServer::start(&address, ServingStatus::Serving).await?;
    wait_until_registered(&etcd, &registration).await;
    drop(server);
    wait_until_unready(&etcd, &registration).await;
    // No key is in etcd, so draining does not wait for the grace period.
    let started = Instant::now();
    registration.drain(Duration::from_secs(600)).await?;
    assert!(started.elapsed() < Duration::from_secs(60));
    assert_eq!(registration.state(), RegistrationState::Deregistered);
    Ok(())
}

#[tokio::test]
async fn server_without_health_service_is_ready() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let server = EchoServer::start();
    let ready = goo_etcd::serving(endpoint(server.address()), "");
    let instance = Instance::new("greeter", server.address());
    let registration = Registrar::new(&client).register_while_ready(instance, ready)?;
    wait_until_registered(&etcd, &registration).await;
    Ok(())
}

/// The health watch is one of the connections for which a graceful shutdown waits.
#[tokio::test]
async fn server_shuts_down_without_etcd() -> TestResult {
    for (is_closed, is_held) in [(false, true), (false, false), (true, true), (true, false)] {
        let etcd = Etcd::start().await?;
        let config = Config::builder()
            .endpoints([etcd.endpoint()])
            .dial_timeout(PATIENCE)
            .request_timeout(Duration::from_secs(1))
            .build()?;
        let client = Client::new("impatient", config).await?;
        let (reporter, service) = tonic_health::server::health_reporter();
        reporter
            .set_service_status("", ServingStatus::Serving)
            .await;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let registrar = Registrar::builder(&client)
            .leave_grace(Duration::ZERO)
            .build()?;
        let ready = goo_etcd::serving(endpoint(&address), "");
        let instance = Instance::new("greeter", &address);
        let registration = registrar.register_while_ready(instance, ready)?;
        let (signal, signalled) = tokio::sync::oneshot::channel::<()>();
        let leaving = registration.leave_on(signalled);
        let serving = Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(TcpIncoming::from(listener), leaving);
        let serving = tokio::spawn(serving);
        wait_until_registered(&etcd, &registration).await;
        // If not held, the last handle is dropped with the future that waits for the signal.
        let _held = is_held.then_some((registration, registrar));
        if is_closed {
            client.close().await?;
        } else {
            etcd.kill().await?;
        }
        signal.send(()).map_err(|()| "dropped")?;
        wait_for("the server ends", serving).await??;
    }
    Ok(())
}

#[tokio::test]
async fn ended_health_watches_are_retried_with_backoff() -> TestResult {
    // Half of the sum of the pauses after the first six ends, because jitter shortens them.
    let pauses = Duration::from_millis([50, 80, 128, 204, 327, 524].iter().sum::<u64>() / 2);
    for (status, expected, count) in [
        (Some(ServingStatus::Serving), true, 7),
        (Some(ServingStatus::NotServing), false, 7),
        // Without a status the readiness is unknown until the first end.
        (None, false, 5),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let server = Server::builder().add_service(HealthServer::new(ShortWatches { status }));
        let _server = AbortOnDropHandle::new(tokio::spawn(
            server.serve_with_incoming(TcpIncoming::from(listener)),
        ));
        let started = Instant::now();
        let readiness = goo_etcd::serving(endpoint(&address), "").take(count);
        let readiness: Vec<bool> = wait_for("the readiness", readiness.collect()).await;
        let took = started.elapsed();
        assert!(
            readiness.iter().all(|ready| *ready == expected),
            "{readiness:?}"
        );
        assert!(took >= pauses, "{took:?}");
    }
    Ok(())
}
