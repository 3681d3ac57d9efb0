//! Opening a TCP connection to one address.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};

use super::settings::ConnectionSettings;

/// The pause between keep-alive probes, and how many may stay without a response. With the default
/// time of 20 s a dead host is found in 35 s.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);
const PROBES: u32 = 3;

/// The system takes no more bytes while it has this many that it has not sent yet. Without the
/// limit it takes as much as its send buffer holds, which is megabytes, and a ping waits behind all
/// of them. h2's frames are as large, so at most about two of them are unsent. Bytes in flight do
/// not count, so the limit does not bound the throughput.
#[cfg(any(target_os = "android", target_os = "linux"))]
const MAX_UNSENT: u32 = 16 * 1024;

/// Opens a TCP connection with the options in `settings`.
///
/// An option that the system refuses is logged and left out, because the connection works without
/// the option.
pub(super) async fn connect(
    address: SocketAddr,
    settings: &ConnectionSettings,
) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    configure(&socket, settings);
    let stream = socket.connect(address).await?;
    // After connecting, because some systems refuse the option on a socket without a connection.
    log_refused("TCP_NODELAY", stream.set_nodelay(settings.tcp_nodelay));
    Ok(stream)
}

/// Sets the options that apply to the handshake as well.
fn configure(socket: &TcpSocket, settings: &ConnectionSettings) {
    let socket = SockRef::from(socket);
    if let Some(idle) = settings.tcp_keepalive {
        let keepalive = TcpKeepalive::new().with_time(idle);
        log_refused(
            "SO_KEEPALIVE",
            socket.set_tcp_keepalive(&with_probes(keepalive)),
        );
    }
    #[cfg(any(target_os = "android", target_os = "linux"))]
    log_refused(
        "TCP_NOTSENT_LOWAT",
        socket.set_tcp_notsent_lowat(MAX_UNSENT),
    );
}

/// Sets the probes on systems that have the options.
fn with_probes(keepalive: TcpKeepalive) -> TcpKeepalive {
    #[cfg(any(
        target_os = "android",
        target_os = "freebsd",
        target_os = "ios",
        target_os = "linux",
        target_os = "macos",
        target_os = "netbsd",
        target_os = "windows",
    ))]
    let keepalive = keepalive.with_interval(PROBE_INTERVAL).with_retries(PROBES);
    keepalive
}

fn log_refused(option: &str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(option, %error, "cannot set a socket option");
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn options_are_set() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        for nodelay in [true, false] {
            for idle in [None, Some(Duration::from_secs(77))] {
                let settings = ConnectionSettings {
                    tcp_nodelay: nodelay,
                    tcp_keepalive: idle,
                    ..ConnectionSettings::default()
                };
                let stream = connect(address, &settings).await.unwrap();
                assert_eq!(stream.nodelay().unwrap(), nodelay);
                let socket = SockRef::from(&stream);
                assert_eq!(socket.tcp_notsent_lowat().unwrap(), MAX_UNSENT);
                assert_eq!(socket.keepalive().unwrap(), idle.is_some());
                if let Some(idle) = idle {
                    assert_eq!(socket.tcp_keepalive_time().unwrap(), idle);
                    assert_eq!(socket.tcp_keepalive_interval().unwrap(), PROBE_INTERVAL);
                    assert_eq!(socket.tcp_keepalive_retries().unwrap(), PROBES);
                }
            }
        }
    }
}
