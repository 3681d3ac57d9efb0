//! Opening a TCP connection to one address.

use std::io;
use std::net::SocketAddr;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpSocket, TcpStream};

use super::settings::ConnectionSettings;

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
    if let Some(idle) = settings.tcp_keepalive {
        let keepalive = TcpKeepalive::new().with_time(idle);
        let socket = SockRef::from(socket);
        log_refused("SO_KEEPALIVE", socket.set_tcp_keepalive(&keepalive));
    }
}

fn log_refused(option: &str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(option, %error, "cannot set a socket option");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

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
                assert_eq!(socket.keepalive().unwrap(), idle.is_some());
                if let Some(idle) = idle {
                    assert_eq!(socket.tcp_keepalive_time().unwrap(), idle);
                }
            }
        }
    }
}
