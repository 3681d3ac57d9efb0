//! Registered only while its server says that it is ready.

use std::pin::pin;

use futures::{Stream, StreamExt};
use tokio::sync::watch;

use super::state::Status;

/// Passes on what `ready` says, until it ends, or the registration is over, or nobody wants to know.
///
/// That it is withdrawn is enough, whether or not etcd can be told: a server that stops waits for its
/// connections to end, and `ready` may hold one of them.
pub(super) async fn follow(
    ready: impl Stream<Item = bool>,
    mut status: watch::Receiver<Status>,
    tell: impl Fn(bool) -> bool,
) {
    let mut ready = pin!(ready);
    let ended = async {
        // An error says that the sender is gone, and with it the registration.
        drop(status.wait_for(|status| status.over).await);
    };
    let mut ended = pin!(ended);
    loop {
        tokio::select! {
            biased;
            () = &mut ended => return,
            said = ready.next() => match said {
                Some(said) if tell(said) => {}
                _ => return,
            },
        }
    }
}

/// Whether a server says that it serves: the answers of its `grpc.health.v1.Health/Watch`, for
/// [`Registrar::register_while_ready`](crate::Registrar::register_while_ready). Needs the feature `health`.
///
/// The `service` is the name that the server was asked to report about; empty: the server as a whole.
///
/// It asks for as long as it is polled. When the connection is lost it asks anew, at once if it had held for
/// 10 s, and else up to a second apart. It says `false` when the server cannot be asked, or ends what was
/// asked a second time without an answer. A server without a health service is
/// taken as ready, and not asked again, as gRFC A17 has it. How a server is found out that accepts and is
/// silent is `endpoint`'s to say (`http2_keep_alive_interval`).
///
/// ```no_run
/// # async fn example(registrar: goo_etcd::Registrar) -> Result<(), Box<dyn std::error::Error>> {
/// use goo_etcd::Instance;
/// use tonic::transport::Endpoint;
///
/// let own = Endpoint::from_static("http://127.0.0.1:50051");
/// let instance = Instance::new("greeter", "10.0.0.5:50051");
/// // Before the server serves, if that is convenient.
/// let registration = registrar.register_while_ready(instance, goo_etcd::serving(own, ""))?;
/// # Ok(())
/// # }
/// ```
#[cfg(feature = "health")]
pub fn serving(
    endpoint: tonic::transport::Endpoint,
    service: impl Into<String>,
) -> impl Stream<Item = bool> + Send + 'static {
    let asking = health::Asking::new(endpoint, service.into());
    futures::stream::unfold(Some(asking), |asking| async move { asking?.next().await })
}

#[cfg(feature = "health")]
mod health {
    use std::time::Duration;

    use futures::StreamExt;
    use tokio::time::Instant;
    use tonic::transport::Endpoint;
    use tonic::{Code, Status, Streaming};
    use tonic_health::pb::health_check_response::ServingStatus;
    use tonic_health::pb::health_client::HealthClient;
    use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

    use crate::backoff::Backoff;

    /// How long a watch must have held for its end to be no reason to wait before the next.
    const QUIET: Duration = Duration::from_secs(10);

    pub(super) struct Asking {
        endpoint: Endpoint,
        service: String,
        /// With when they began.
        answers: Option<(Instant, Streaming<HealthCheckResponse>)>,
        /// How many watches have ended since the last answer.
        ended: u32,
        pauses: Backoff,
    }

    impl Asking {
        pub(super) fn new(endpoint: Endpoint, service: String) -> Self {
            Self {
                endpoint,
                service,
                answers: None,
                ended: 0,
                pauses: Backoff::for_etcd(),
            }
        }

        /// What it says next, and how to go on after that.
        pub(super) async fn next(mut self) -> Option<(bool, Option<Self>)> {
            loop {
                if let Some((begun, answers)) = &mut self.answers {
                    match answers.next().await {
                        Some(Ok(answer)) => {
                            self.ended = 0;
                            let serves = answer.status() == ServingStatus::Serving;
                            return Some((serves, Some(self)));
                        }
                        Some(Err(status)) if has_none(&status) => return Some((true, None)),
                        Some(Err(_)) | None => {
                            if begun.elapsed() >= QUIET {
                                self.pauses.reset();
                            } else {
                                tokio::time::sleep(self.pauses.next()).await;
                            }
                            self.answers = None;
                            self.ended = self.ended.saturating_add(1);
                            if self.ended > 1 {
                                return Some((false, Some(self)));
                            }
                        }
                    }
                }
                let service = self.service.clone();
                let mut client = HealthClient::new(self.endpoint.connect_lazy());
                match client.watch(HealthCheckRequest { service }).await {
                    Ok(answers) => self.answers = Some((Instant::now(), answers.into_inner())),
                    Err(status) if has_none(&status) => return Some((true, None)),
                    Err(error) => {
                        tracing::debug!(%error, "a server's health cannot be asked");
                        tokio::time::sleep(self.pauses.next()).await;
                        return Some((false, Some(self)));
                    }
                }
            }
        }
    }

    fn has_none(status: &Status) -> bool {
        status.code() == Code::Unimplemented
    }
}
