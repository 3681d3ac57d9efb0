//! Which process a connection comes from, as the operating system knows it.

use std::net::SocketAddrV4;

/// The process, of these, that has connected from `local` to `remote`. `None` if the connection has
/// ended, or if the system does not tell.
#[cfg(target_os = "linux")]
pub(super) fn find_owner(local: SocketAddrV4, remote: SocketAddrV4, pids: &[u32]) -> Option<u32> {
    let sockets = std::fs::read_to_string("/proc/net/tcp").ok()?;
    let socket = format!("socket:[{}]", find_inode(&sockets, local, remote)?);
    let has_socket = |pid: &&u32| {
        let files = std::fs::read_dir(format!("/proc/{pid}/fd"));
        let mut targets = files
            .into_iter()
            .flatten()
            .flatten()
            .map(|file| std::fs::read_link(file.path()));
        targets.any(|target| target.is_ok_and(|target| target.as_os_str() == socket.as_str()))
    };
    pids.iter().find(has_socket).copied()
}

/// The inode of a socket in the table `/proc/net/tcp`, whose columns 2, 3 and 10 are the local
/// address, the remote address and the inode.
#[cfg(target_os = "linux")]
fn find_inode(sockets: &str, local: SocketAddrV4, remote: SocketAddrV4) -> Option<&str> {
    // The kernel prints an IP address as a number in the byte order of the machine.
    let hexadecimal = |address: SocketAddrV4| {
        let ip = u32::from_ne_bytes(address.ip().octets());
        format!("{ip:08X}:{:04X}", address.port())
    };
    let (local, remote) = (hexadecimal(local), hexadecimal(remote));
    sockets.lines().find_map(|line| {
        let mut columns = line.split_ascii_whitespace().skip(1);
        let is_meant = columns.next()? == local && columns.next()? == remote;
        is_meant.then(|| columns.nth(6)).flatten()
    })
}

/// As on Linux, but `lsof` reads the tables of the kernel.
#[cfg(not(target_os = "linux"))]
pub(super) fn find_owner(local: SocketAddrV4, _: SocketAddrV4, pids: &[u32]) -> Option<u32> {
    let pids: Vec<_> = pids.iter().map(u32::to_string).collect();
    let output = std::process::Command::new("lsof")
        .args(["-n", "-P", "-t", "-a", "-p", &pids.join(",")])
        .arg(format!("-iTCP:{}", local.port()))
        .output()
        .ok()?;
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

    use super::*;

    fn v4(address: SocketAddr) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::LOCALHOST, address.port())
    }

    #[test]
    fn own_connection_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (local, remote) = (stream.local_addr().unwrap(), stream.peer_addr().unwrap());
        let (local, remote) = (v4(local), v4(remote));
        let own = std::process::id();
        assert_eq!(find_owner(local, remote, &[1, own]), Some(own));
        assert_eq!(find_owner(local, remote, &[]), None);
        let elsewhere = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 1);
        assert_eq!(find_owner(elsewhere, remote, &[own]), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn inode_is_in_the_tenth_column() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n   \
            0: 0100007F:1F90 0100007F:8000 01 00000000:00000000 00:00000000 00000000     0        0 41 1 0000000000000000 20 4 30 10 -1\n   \
            1: 0100007F:8000 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 42 1 0000000000000000 20 4 30 10 -1\n";
        let address = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        if cfg!(target_endian = "little") {
            let inode = find_inode(table, address(0x8000), address(0x1f90));
            assert_eq!(inode, Some("42"));
        }
        assert_eq!(find_inode(table, address(1), address(0x1f90)), None);
    }
}
