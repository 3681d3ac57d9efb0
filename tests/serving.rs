//! Registered while the server's own health service says that it serves.
#![cfg(feature = "health")]

#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::{self, BoxStream};
use goo_etcd::testing::{Etcd, Proxy};
use goo_etcd::{Client, Config, Instance, Registrar, Registration, RegistrationState};
use support::echo::EchoServer;
use support::{PATIENCE, TestResult, connect, eventually, soon, stored};
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

/// A server of nothing but its health, which can be ended and started again at its address.
struct Healthy {
    address: String,
    reporter: HealthReporter,
    /// With all of its connections.
    runtime: Option<Runtime>,
}

impl Drop for Healthy {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Healthy {
    async fn start(address: &str, status: ServingStatus) -> TestResult<Self> {
        let (reporter, service) = tonic_health::server::health_reporter();
        reporter.set_service_status("", status).await;
        let listener = std::net::TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
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

/// Ends each watch at once, with an answer before it or without.
struct Fickle {
    answer: Option<ServingStatus>,
}

#[tonic::async_trait]
impl Health for Fickle {
    async fn check(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        Err(Status::internal("nobody checks it"))
    }

    type WatchStream = BoxStream<'static, Result<HealthCheckResponse, Status>>;

    async fn watch(
        &self,
        _: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let answer = self.answer.map(|status| HealthCheckResponse {
            status: health_check_response::ServingStatus::from(status).into(),
        });
        Ok(Response::new(stream::iter(answer.map(Ok)).boxed()))
    }
}

fn endpoint(address: &str) -> Endpoint {
    Endpoint::from_shared(format!("http://{address}")).unwrap()
}

async fn until_in(etcd: &Etcd, registration: &Registration) {
    eventually("it is in", async || {
        registration.state() == RegistrationState::Registered
            && stored(etcd, registration.key()).await.unwrap().is_some()
    })
    .await;
}

async fn until_out(etcd: &Etcd, registration: &Registration) {
    eventually("it is out", async || {
        registration.state() == RegistrationState::Unready
            && stored(etcd, registration.key()).await.unwrap().is_none()
    })
    .await;
}

#[tokio::test]
async fn given_a_server_s_health_then_it_is_registered_while_that_says_serving_over_lost_connections()
-> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let server = Healthy::start("127.0.0.1:0", ServingStatus::NotServing).await?;
    let proxy = Proxy::start(server.address.as_str()).await?;
    let ready = goo_etcd::serving(endpoint(&proxy.endpoint()), "");
    let instance = Instance::new("greeter", &server.address);
    let registration = Registrar::new(&client).register_while_ready(instance, ready)?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    until_out(&etcd, &registration).await;
    for _ in 0..3 {
        server
            .reporter
            .set_service_status("", ServingStatus::Serving)
            .await;
        until_in(&etcd, &registration).await;
        // The one connection is lost, and the server is as well as before.
        let before = proxy.accepted();
        proxy.disconnect().await?;
        eventually("it is asked anew", async || proxy.accepted() > before).await;
        until_in(&etcd, &registration).await;
        server
            .reporter
            .set_service_status("", ServingStatus::NotServing)
            .await;
        until_out(&etcd, &registration).await;
    }
    server
        .reporter
        .set_service_status("", ServingStatus::Serving)
        .await;
    until_in(&etcd, &registration).await;
    proxy.cut().await;
    until_out(&etcd, &registration).await;
    proxy.restore().await?;
    until_in(&etcd, &registration).await;
    registration.deregister().await?;
    assert_eq!(stored(&etcd, registration.key()).await?, None);
    Ok(())
}

#[tokio::test]
async fn given_a_server_that_is_not_there_yet_then_it_is_registered_once_it_serves() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let address = support::balanced::refusing();
    let ready = goo_etcd::serving(endpoint(&address), "");
    let instance = Instance::new("greeter", &address);
    let registration = Registrar::new(&client).register_while_ready(instance, ready)?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    until_out(&etcd, &registration).await;
    let server = Healthy::start(&address, ServingStatus::Serving).await?;
    until_in(&etcd, &registration).await;
    drop(server);
    until_out(&etcd, &registration).await;
    // Nothing was in etcd: leaving takes no grace and no time-out.
    let begun = std::time::Instant::now();
    registration.drain(Duration::from_secs(600)).await?;
    assert!(begun.elapsed() < Duration::from_secs(60));
    assert_eq!(registration.state(), RegistrationState::Deregistered);
    Ok(())
}

#[tokio::test]
async fn given_a_server_without_a_health_service_then_it_is_taken_as_ready() -> TestResult {
    let etcd = Etcd::start().await?;
    let client = connect(etcd.endpoint()).await;
    let server = EchoServer::start();
    let ready = goo_etcd::serving(endpoint(server.address()), "");
    let instance = Instance::new("greeter", server.address());
    let registration = Registrar::new(&client).register_while_ready(instance, ready)?;
    until_in(&etcd, &registration).await;
    Ok(())
}

/// What asks the server is one of its connections, for whose end it waits.
#[tokio::test]
async fn given_etcd_is_away_or_the_client_closed_when_the_server_leaves_then_it_ends() -> TestResult
{
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
        until_in(&etcd, &registration).await;
        // Without another handle, the last goes with what waits for the signal.
        let _held = is_held.then_some((registration, registrar));
        if is_closed {
            client.close().await?;
        } else {
            etcd.kill().await?;
        }
        signal.send(()).map_err(|()| "it waits")?;
        soon("the server ends", serving).await??;
    }
    Ok(())
}

#[tokio::test]
async fn given_a_server_that_ends_each_watch_at_once_then_it_is_asked_at_growing_intervals()
-> TestResult {
    // Half of what the pauses after the first to the sixth end grow to.
    let pauses = Duration::from_millis([50, 80, 128, 204, 327, 524].iter().sum::<u64>() / 2);
    for (answer, says, times) in [
        (Some(ServingStatus::Serving), true, 7),
        (Some(ServingStatus::NotServing), false, 7),
        // Nothing is known after the first end.
        (None, false, 5),
    ] {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let server = Server::builder().add_service(HealthServer::new(Fickle { answer }));
        let _server = AbortOnDropHandle::new(tokio::spawn(
            server.serve_with_incoming(TcpIncoming::from(listener)),
        ));
        let begun = Instant::now();
        let said = goo_etcd::serving(endpoint(&address), "").take(times);
        let said: Vec<bool> = soon("it says so", said.collect()).await;
        let took = begun.elapsed();
        assert!(said.iter().all(|said| *said == says), "{said:?}");
        assert!(took >= pauses, "{took:?}");
    }
    Ok(())
}
