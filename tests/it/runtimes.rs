//! Runtimes that end before the objects that were built on them, and callers outside of a runtime.
//!
//! Each test function of Tokio has a runtime of its own, so a channel or client in a `static`
//! outlives the runtime of the test that built it (reqwest#1148, grpc-rust#1751).

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt, stream};
use goo_etcd::balance::Source;
use goo_etcd::testing::Etcd;
use goo_etcd::{
    BalancedChannel, Client, Config, Directory, EndpointState, Error, Freshness, Instance,
    Registrar, RegistrationState,
};
use helloworld::echo::EchoRequest;
use helloworld::echo::echo_client::EchoClient;
use tokio::runtime::Runtime;
use tonic::{Code, Request, Status};

use crate::support::balanced::{
    call, call_with_timeout, hello, static_channel, unused_address, wait_until_ready,
};
use crate::support::echo::{EchoServer, Options};
use crate::support::{config, wait_for, wait_until};

/// Longer than [`PATIENCE`](crate::support::PATIENCE), so that no timeout ends a call in time.
const LONG: Duration = Duration::from_secs(90);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

/// The result of `build` on a runtime that has ended afterwards.
fn on_ended_runtime<T>(build: impl AsyncFnOnce() -> T) -> T {
    let runtime = runtime();
    runtime.block_on(build())
}

fn assert_ended(status: &Status) {
    let says_so = status.message().contains("the Tokio runtime");
    assert!(says_so && status.code() == Code::Unavailable, "{status}");
}

fn assert_client_ended<T>(result: Result<T, Error>) {
    let error = result.err().expect("the runtime has ended");
    assert!(matches!(error, Error::RuntimeEnded { .. }), "{error}");
    let message = error.to_string();
    let says_so = message.contains("the Tokio runtime") && message.contains("has ended");
    assert!(says_so, "{message}");
}

mod channel {
    use super::*;

    #[test]
    fn fails_at_once_after_its_runtime() {
        let server = EchoServer::start();
        let channel = on_ended_runtime(async || {
            let channel = static_channel([server.address()], |b| b.ready_timeout(LONG));
            call(&channel).await.unwrap();
            channel
        });
        runtime().block_on(async {
            let status = wait_for("an error", call(&channel)).await.unwrap_err();
            assert_ended(&status);
            assert!(status.message().contains("build the channel"), "{status}");
            let status = wait_for("an error", call_with_timeout(&channel, LONG)).await;
            assert_ended(&status.unwrap_err());

            let endpoints = channel.endpoints();
            assert_eq!(endpoints.len(), 1);
            assert_eq!(endpoints[0].state, EndpointState::Shutdown);
            assert_eq!(endpoints[0].connections, 0);
            let error = endpoints[0].last_error.as_deref().unwrap();
            assert!(error.contains("the Tokio runtime"), "{error}");

            wait_for("a wait for endpoints ends", channel.ready(1)).await;
            let items = channel.endpoint_statuses().collect::<Vec<_>>();
            let items = wait_for("the stream ends", items).await;
            assert_eq!(items.len(), 1);
            assert_eq!(items[0][0].state, EndpointState::Shutdown);
        });
    }

    #[test]
    fn calls_in_progress_end_with_its_runtime() {
        let server = EchoServer::start_with(Options {
            delay: LONG,
            ..Options::default()
        });
        let (own, callers) = (runtime(), runtime());
        let (channel, lonely) = own.block_on(async {
            let channel = static_channel([server.address()], |b| b);
            wait_until_ready(&channel, 1).await;
            let address = unused_address();
            let lonely = static_channel([&*address], |b| b.ready_timeout(LONG));
            (channel, lonely)
        });
        let calls = {
            let _entered = callers.enter();
            let (sent, waiting) = (channel.clone(), lonely.clone());
            let sent = tokio::spawn(async move { call(&sent).await });
            let waiting = tokio::spawn(async move { call(&waiting).await });
            let ready = tokio::spawn(async move { lonely.ready(1).await });
            (sent, waiting, ready)
        };
        callers.block_on(wait_until("the call is in flight", async || {
            server.counts().active() == 1
        }));
        own.shutdown_background();
        callers.block_on(async {
            let sent = wait_for("the call that was sent fails", calls.0).await;
            assert_ended(&sent.unwrap().unwrap_err());
            let waiting = wait_for("the call that waits fails", calls.1).await;
            assert_ended(&waiting.unwrap().unwrap_err());
            wait_for("the wait ends", calls.2).await.unwrap();
        });
    }

    #[test]
    fn statuses_end_without_another_item_when_it_is_dropped() {
        let server = EchoServer::start();
        runtime().block_on(async {
            let channel = static_channel([server.address()], |b| b);
            wait_until_ready(&channel, 1).await;
            let mut statuses = channel.endpoint_statuses();
            statuses.next().await.unwrap();
            drop(channel);
            while let Some(endpoints) = wait_for("the stream ends", statuses.next()).await {
                assert_ne!(endpoints[0].state, EndpointState::Shutdown);
            }
        });
    }
}

mod etcd_client {
    use super::*;

    async fn client_of(etcd: &Etcd) -> Client {
        let mut config = config([etcd.endpoint()]);
        config.request_timeout = LONG;
        Client::connect("test", config).await.unwrap()
    }

    #[test]
    fn every_call_fails_at_once_after_its_runtime() {
        let tests = runtime();
        let etcd = tests.block_on(Etcd::start()).unwrap();
        let client = on_ended_runtime(async || client_of(&etcd).await);
        let calls = async {
            assert_client_ended(client.get("key", None).await);
            assert_client_ended(client.put("key", "value", None).await);
            assert_client_ended(client.ping().await);
            assert_client_ended(client.grant(10).await);
            assert_client_ended(client.keep_alive(7).await);
            assert_client_ended(client.keep_alive_once(7).await);
            assert_client_ended(client.revoke(7).await);
            assert_client_ended(client.delete("key", None).await);
            assert_client_ended(client.txn().commit().await);
            let ttl = Duration::from_secs(10);
            assert_client_ended(client.lock("lock", ttl).await);
            assert_client_ended(client.try_lock("lock", ttl).await);
            assert_client_ended(client.campaign("election", "me", ttl).await);
            assert_client_ended(client.leader("election").await);
            let mut leaders = client.observe("election");
            assert_client_ended(leaders.next().await.unwrap());
            assert!(leaders.next().await.is_none());
            assert_client_ended(BalancedChannel::connect(&client, "greeter").await);
            assert_client_ended(client.member_list().await);
            assert_client_ended(Directory::watch(&client, "greeter").await);
            let instance = Instance::new("greeter", "10.0.0.1:1");
            assert_client_ended(Registrar::new(&client).register(instance).await);
            let watch = client.watch("key", None).await;
            assert_client_ended(watch);
        };
        tests.block_on(wait_for("every call fails", calls));
    }

    #[test]
    fn background_work_reports_the_end_of_its_runtime() {
        let tests = runtime();
        let etcd = tests.block_on(Etcd::start()).unwrap();
        let built = on_ended_runtime(async || {
            let client = client_of(&etcd).await;
            let ttl = Duration::from_secs(60);
            let lock = client.lock("lock", ttl).await.unwrap();
            let leadership = client.campaign("election", "me", ttl).await.unwrap();
            let mut leaders = client.observe("election");
            leaders.next().await.unwrap().unwrap();
            let lease = client.grant(60).await.unwrap().id();
            let keep_alive = client.keep_alive(lease).await.unwrap();
            let watch = client.watch("key", None).await.unwrap();
            let directory = Directory::watch(&client, "greeter").await.unwrap();
            let channel = directory.balance_channel(|_, endpoint| endpoint);
            (
                lock, leadership, leaders, keep_alive, watch, directory, channel,
            )
        });
        let (lock, leadership, mut leaders, mut keep_alive, mut watch, directory, channel) = built;
        tests.block_on(async {
            assert!(!lock.is_held());
            let lost = wait_for("the lock is lost", lock.lost()).await;
            assert_client_ended(Err::<(), _>(lost));
            assert_client_ended(wait_for("the lock is not released", lock.unlock()).await);

            assert!(!leadership.is_held());
            let lost = wait_for("the leadership is lost", leadership.lost()).await;
            assert_client_ended(Err::<(), _>(lost));
            let proclaimed = wait_for("no value is set", leadership.proclaim("you")).await;
            assert_client_ended(proclaimed);
            assert_client_ended(wait_for("nobody resigns", leadership.resign()).await);
            let item = wait_for("the leaders end", leaders.next()).await;
            assert_client_ended(item.unwrap());
            assert!(leaders.next().await.is_none());

            // tonic's own channel; the directory's task only forwards to it.
            let mut client = EchoClient::new(channel);
            let call = wait_for("the call fails", client.unary(hello())).await;
            call.unwrap_err();

            let item = wait_for("the renewals end", keep_alive.next()).await;
            assert_client_ended(item.unwrap());
            assert!(keep_alive.next().await.is_none());

            let item = wait_for("the watch ends", watch.next()).await;
            assert_client_ended(item.unwrap());

            let freshness = directory.snapshot().freshness().clone();
            let Freshness::Stale { reason, .. } = &freshness else {
                panic!("{freshness:?}");
            };
            assert!(reason.contains("its Tokio runtime has ended"), "{reason}");
        });
    }

    /// A runtime on one thread ends here before it has polled the directory's task.
    #[test]
    fn directory_is_stale_if_its_task_never_ran() {
        let tests = runtime();
        let etcd = tests.block_on(Etcd::start()).unwrap();
        let client = tests.block_on(client_of(&etcd));
        let own = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let directory = own.block_on(Directory::watch(&client, "greeter")).unwrap();
        assert!(matches!(directory.snapshot().freshness(), Freshness::Live));
        drop(own);
        let freshness = directory.snapshot().freshness().clone();
        let Freshness::Stale { reason, .. } = &freshness else {
            panic!("{freshness:?}");
        };
        assert!(reason.contains("its Tokio runtime has ended"), "{reason}");
    }

    #[test]
    fn named_client_says_that_its_runtime_has_ended() {
        let tests = runtime();
        let etcd = tests.block_on(Etcd::start()).unwrap();
        let name = "on a runtime that ends";
        on_ended_runtime(async || {
            goo_etcd::register(name, config([etcd.endpoint()]))
                .await
                .unwrap();
        });
        let client = goo_etcd::get_client(name).unwrap();
        tests.block_on(async {
            assert_client_ended(wait_for("an error", client.ping()).await);
            goo_etcd::unregister(name).await.unwrap();
        });
    }
}

mod registrar {
    use super::*;

    #[test]
    fn registrations_fail_at_once_after_its_runtime() {
        let tests = runtime();
        let etcd = tests.block_on(Etcd::start()).unwrap();
        // The client lives on; only the registrar loses its tasks.
        let client = tests.block_on(async {
            let mut config = config([etcd.endpoint()]);
            config.request_timeout = LONG;
            Client::connect("test", config).await.unwrap()
        });
        let (registrar, registration) = on_ended_runtime(async || {
            let registrar = Registrar::new(&client);
            let instance = Instance::new("greeter", "10.0.0.1:1").id("one");
            let registration = registrar.register(instance).await.unwrap();
            (registrar, registration)
        });
        let work = async {
            assert_client_ended(registration.update(|i| i.weight = 7).await);
            assert_client_ended(registration.deregister().await);
            // A new registration gets tasks on this runtime.
            let instance = Instance::new("greeter", "10.0.0.1:1").id("one");
            let _registration = registrar.register(instance).await.unwrap();
        };
        tests.block_on(wait_for("every call ends", work));
    }
}

mod readiness {
    use super::*;

    async fn registered(client: &Client) -> bool {
        !client
            .get("services/greeter/one", None)
            .await
            .unwrap()
            .kvs()
            .is_empty()
    }

    /// The instance is held back when nobody can say any more whether its server is ready.
    #[test]
    fn is_lost_with_its_runtime_or_a_panic() {
        let tests = runtime();
        let etcd = tests.block_on(Etcd::start()).unwrap();
        let (client, registrar) = tests.block_on(async {
            let client = crate::support::connect(etcd.endpoint()).await;
            let registrar = Registrar::new(&client);
            // Starts the registrar's own task on this runtime.
            let other = Instance::new("greeter", "10.0.0.1:2").id("two");
            let other = registrar.register(other).await.unwrap();
            (client, (registrar, other))
        });
        let follow = |ready: BoxStream<'static, bool>| {
            let instance = Instance::new("greeter", "10.0.0.1:1").id("one");
            registrar.0.register_while_ready(instance, ready).unwrap()
        };
        let is_registered = async || registered(&client).await;
        let is_held_back = async || !registered(&client).await;

        let own = runtime();
        let registration = {
            let _entered = own.enter();
            follow(stream::iter([true]).chain(stream::pending()).boxed())
        };
        tests.block_on(wait_until("it is registered", is_registered));
        drop(own);
        tests.block_on(wait_until("it is held back", is_held_back));
        tests.block_on(registration.deregister()).unwrap();

        let (go, panic) = futures::channel::oneshot::channel::<()>();
        let ready = stream::iter([true]).chain(stream::once(async {
            panic.await.ok();
            panic!("bad health")
        }));
        let _registration = {
            let _entered = tests.enter();
            follow(ready.boxed())
        };
        tests.block_on(wait_until("it is registered", is_registered));
        go.send(()).unwrap();
        tests.block_on(wait_until("it is held back", is_held_back));
    }
}

mod outside_of_a_runtime {
    use super::*;

    fn assert_no_runtime<T>(result: Option<Result<T, Error>>) {
        let result = result.expect("an error at once");
        let error = result.err().expect("there is no runtime");
        assert!(matches!(error, Error::NoRuntime { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains("needs a Tokio runtime"), "{message}");
    }

    #[test]
    fn building_is_an_error() {
        assert_no_runtime(Some(BalancedChannel::from_endpoints(["10.0.0.1:1"])));
        let source = Source::fixed([Instance::new("echo", "10.0.0.1:1")]);
        assert_no_runtime(Some(BalancedChannel::builder(source).build()));
        assert_no_runtime(Some(Client::connect_lazy("test", Config::default())));
        assert_no_runtime(Client::connect("test", Config::default()).now_or_never());
        let register = goo_etcd::register("outside of a runtime", Config::default());
        assert_no_runtime(register.now_or_never());
    }

    #[test]
    fn using_a_client_is_an_error() {
        let runtime = runtime();
        let client = runtime
            .block_on(async { Client::connect_lazy("test", config([unused_address()])).unwrap() });
        assert_no_runtime(client.get("key", None).now_or_never());
        assert_no_runtime(client.watch("key", None).now_or_never());
        assert_no_runtime(client.keep_alive(7).now_or_never());
        assert_no_runtime(client.lock("lock", Duration::from_secs(10)).now_or_never());
        assert_no_runtime(Directory::watch(&client, "greeter").now_or_never());
        let registrar = Registrar::new(&client);
        let instance = || Instance::new("greeter", "10.0.0.1:1");
        assert_no_runtime(registrar.register(instance()).now_or_never());
        assert_no_runtime(Some(registrar.register_eventually(instance())));
        let ready = stream::iter([true]);
        assert_no_runtime(Some(registrar.register_while_ready(instance(), ready)));
    }

    /// Runs a future without a runtime.
    fn block_on<T>(future: impl Future<Output = T>) -> T {
        struct Unpark(Thread);
        impl Wake for Unpark {
            fn wake(self: Arc<Self>) {
                self.0.unpark();
            }
        }
        let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
        let mut context = Context::from_waker(&waker);
        let mut future = pin!(future);
        loop {
            match future.as_mut().poll(&mut context) {
                Poll::Ready(output) => return output,
                Poll::Pending => std::thread::park_timeout(crate::support::PATIENCE),
            }
        }
    }

    /// A ready channel, one with a limit of concurrent calls, and one without a ready endpoint.
    pub(super) async fn channels(server: &EchoServer) -> [BalancedChannel; 3] {
        let channel = static_channel([server.address()], |b| b);
        let limited = static_channel([server.address()], |b| b.concurrency_limit(1));
        wait_until_ready(&channel, 1).await;
        wait_until_ready(&limited, 1).await;
        let address = unused_address();
        [channel, limited, static_channel([&*address], |b| b)]
    }

    pub(super) fn assert_refused<T>(result: Result<T, Status>) {
        let status = result.err().expect("there is no runtime");
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        let says_so = status.message().contains("needs a Tokio runtime");
        assert!(says_so, "{status}");
    }

    #[test]
    fn call_that_needs_a_timer_or_a_task_is_an_error() {
        let runtime = runtime();
        let server = EchoServer::start();
        let [channel, limited, lonely] = runtime.block_on(channels(&server));
        assert_refused(block_on(call_with_timeout(&channel, LONG)));
        assert_refused(block_on(call(&limited)));
        assert_refused(block_on(call(&lonely)));
        let request = Request::new(stream::pending::<EchoRequest>());
        assert_refused(block_on(
            EchoClient::new(channel.clone()).client_stream(request),
        ));
        // A plain call on a ready endpoint needs neither.
        block_on(EchoClient::new(channel).unary(hello())).unwrap();
    }

    #[test]
    fn ending_a_registration_is_an_error_and_ends_it() {
        let runtime = runtime();
        let etcd = runtime.block_on(Etcd::start()).unwrap();
        let (registrar, registrations) = runtime.block_on(async {
            let client = crate::support::connect(etcd.endpoint()).await;
            let registrar = Registrar::new(&client);
            let register = async |id: &str| {
                let instance = Instance::new("greeter", "10.0.0.1:1").id(id);
                registrar.register(instance).await.unwrap()
            };
            let registrations = [
                register("a").await,
                register("b").await,
                register("c").await,
            ];
            (registrar, registrations)
        });
        let [a, b, c] = &registrations;
        assert_no_runtime(a.update(|instance| instance.weight = 7).now_or_never());
        assert_ne!(a.instance().weight, 7);
        assert_no_runtime(a.deregister().now_or_never());
        assert_no_runtime(b.drain(LONG).now_or_never());
        assert_no_runtime(registrar.close().now_or_never());
        // The registrar's own tasks delete the keys.
        runtime.block_on(wait_until("all are gone", async || {
            [a, b, c]
                .iter()
                .all(|registration| registration.state() == RegistrationState::Deregistered)
        }));
    }
}

/// Runtimes that were built without `enable_all`.
mod without_drivers {
    use super::outside_of_a_runtime::{assert_refused, channels};
    use super::*;

    fn bare() -> tokio::runtime::Builder {
        tokio::runtime::Builder::new_current_thread()
    }

    fn assert_lacks<T>(driver: &str, result: Option<Result<T, Error>>) {
        let error = result.expect("an error at once").err();
        let message = error.expect("the runtime is refused").to_string();
        let expected = format!("needs a Tokio runtime with {driver}; call `enable_all`");
        assert!(message.contains(&expected), "{message}");
    }

    #[test]
    fn building_is_an_error() {
        let without_timers = bare().enable_io().build().unwrap();
        let without_io = bare().enable_time().build().unwrap();
        for (runtime, lacking) in [(without_timers, "timers"), (without_io, "I/O")] {
            let _entered = runtime.enter();
            let channel = BalancedChannel::from_endpoints(["10.0.0.1:1"]);
            assert_lacks(lacking, Some(channel));
            let client = Client::connect_lazy("test", Config::default());
            assert_lacks(lacking, Some(client));
            let client = Client::connect("test", Config::default());
            assert_lacks(lacking, client.now_or_never());
        }
    }

    #[test]
    fn connector_of_the_user_s_may_need_no_io() {
        let runtime = bare().enable_time().build().unwrap();
        let _entered = runtime.enter();
        let connector = tower::service_fn(|_: http::Uri| async {
            Err::<hyper_util::rt::TokioIo<tokio::io::DuplexStream>, _>(std::io::Error::other("no"))
        });
        let source = Source::fixed([Instance::new("echo", "in-memory:1")]);
        let builder = BalancedChannel::builder(source).connector(connector);
        let _channel = builder.build().unwrap();
    }

    #[test]
    fn calls_that_need_a_timer_are_errors() {
        let own = runtime();
        let server = EchoServer::start();
        let [channel, limited, lonely] = own.block_on(channels(&server));
        bare().build().unwrap().block_on(async {
            assert_refused(call_with_timeout(&channel, LONG).await);
            assert_refused(call(&limited).await);
            assert_refused(call(&lonely).await);
            EchoClient::new(channel.clone())
                .unary(hello())
                .await
                .unwrap();
        });
        // Calls that were refused hold nothing.
        assert_eq!(own.block_on(call(&limited)).unwrap(), server.address());
    }

    #[test]
    fn using_a_client_is_an_error() {
        let own = runtime();
        let client = own
            .block_on(async { Client::connect_lazy("test", config([unused_address()])).unwrap() });
        let runtime = bare().build().unwrap();
        let _entered = runtime.enter();
        assert_lacks("timers", client.get("key", None).now_or_never());
        assert_lacks("timers", client.watch("key", None).now_or_never());
        let lock = client.lock("lock", Duration::from_secs(10));
        assert_lacks("timers", lock.now_or_never());
        let directory = Directory::watch(&client, "greeter");
        assert_lacks("timers", directory.now_or_never());
        let instance = Instance::new("greeter", "10.0.0.1:1");
        let registration = Registrar::new(&client).register_eventually(instance);
        assert_lacks("timers", Some(registration));
    }
}
