//! A stream to a real etcd, which hangs or is idle.

use tonic::Code;

use super::*;
use crate::config::Config;
use crate::testing::Etcd;

async fn open_watch(etcd: &Etcd) -> Result<RawWatch> {
    let config = Config::builder()
        .endpoints([etcd.endpoint()])
        // Too long for the connection's keep-alive to notice the loss first.
        .keep_alive_interval(Duration::from_secs(600))
        .build()?;
    let client = Client::connect("main", config).await?;
    client.open_watch("key", &WatchOptions::new()).await
}

#[tokio::test]
async fn silent_stream_of_a_hung_server_is_lost() {
    let etcd = Etcd::start().await.unwrap();
    let mut watch = open_watch(&etcd).await.unwrap();
    etcd.pause().await.unwrap();
    let error = tokio::time::timeout(Duration::from_secs(60), watch.next())
        .await
        .unwrap()
        .unwrap_err();
    assert_eq!(error.code(), Some(Code::Unavailable));
    assert!(
        matches!(&error, Error::StreamLost { reason, .. }
            if reason.contains("silent") && reason.contains(&etcd.endpoint())),
        "{error}"
    );
}

#[tokio::test]
async fn idle_stream_of_a_live_server_is_kept() {
    let etcd = Etcd::start().await.unwrap();
    let mut watch = open_watch(&etcd).await.unwrap();
    let idle = PROGRESS_REQUEST_AFTER * 2 + PROGRESS_TIMEOUT + Duration::from_secs(2);
    assert!(tokio::time::timeout(idle, watch.next()).await.is_err());
}
