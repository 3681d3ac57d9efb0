//! Finds the leader, also where etcd responds to users only.
//!
//! With authentication enabled, some releases of etcd (3.6.16 is one) refuse the call that names
//! the leader without a user. Two pages that etcd serves over HTTP need none, but take seconds on a
//! busy machine: `/debug/vars` for clients shows the member's view of the consensus, and `/members`
//! for peers lists the members.

use etcd_client::Client;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::error::{Result, TestingError};
use super::etcd::Etcd;

/// The page `/debug/vars`.
#[derive(Deserialize)]
struct Variables {
    #[serde(rename = "raft.status")]
    raft: RaftStatus,
}

#[derive(Deserialize)]
struct RaftStatus {
    /// The id of the leader in hexadecimal; `0` without a leader.
    lead: String,
}

/// An entry of the page `/members`.
#[derive(Deserialize)]
struct ListedMember {
    id: u64,
    name: String,
}

/// The name of the leader, if this member knows one.
pub(super) async fn query_leader(member: &Etcd) -> Result<Option<String>> {
    match call_for_leader(member).await {
        // The pages are read without TLS, because this module has no HTTP client that knows the
        // certificates.
        Err(_) if !member.options().is_tls() => read_leader(member).await,
        result => result.map_err(TestingError::client("asking for the leader")),
    }
}

async fn call_for_leader(member: &Etcd) -> std::result::Result<Option<String>, etcd_client::Error> {
    let options = member.options().connect.clone();
    let mut client = Client::connect([member.client_url()], options).await?;
    let leader = client.status().await?.leader();
    let members = client.member_list().await?;
    let found = members.members().iter().find(|m| m.id() == leader);
    Ok(found.map(|member| member.name().to_owned()))
}

async fn read_leader(member: &Etcd) -> Result<Option<String>> {
    let leader = parse_leader(&get(&member.endpoint(), "/debug/vars").await?)?;
    let members = get(&member.peer_endpoint(), "/members").await?;
    name_of(leader, &members)
}

fn parse_leader(page: &[u8]) -> Result<u64> {
    let variables: Variables = parse(page)?;
    u64::from_str_radix(&variables.raft.lead, 16).map_err(|error| unreadable(&error.to_string()))
}

fn name_of(leader: u64, page: &[u8]) -> Result<Option<String>> {
    let members: Vec<ListedMember> = parse(page)?;
    let mut members = members.into_iter();
    Ok(members.find(|m| m.id == leader).map(|member| member.name))
}

fn parse<'a, T: Deserialize<'a>>(page: &'a [u8]) -> Result<T> {
    serde_json::from_slice(page).map_err(|error| unreadable(&error.to_string()))
}

fn unreadable(reason: &str) -> TestingError {
    TestingError::io(READING)(std::io::Error::other(reason.to_owned()))
}

const READING: &str = "reading a page of etcd";

/// The body of a page. HTTP/1.0 has no chunks, and ends the body with the connection.
async fn get(endpoint: &str, path: &str) -> Result<Vec<u8>> {
    let request = async {
        let mut connection = TcpStream::connect(endpoint).await?;
        let request = format!("GET {path} HTTP/1.0\r\nHost: etcd\r\n\r\n");
        connection.write_all(request.as_bytes()).await?;
        let mut response = Vec::new();
        connection.read_to_end(&mut response).await?;
        Ok(response)
    };
    let response: Vec<u8> = request.await.map_err(TestingError::io(READING))?;
    let head = response.windows(4).position(|end| end == b"\r\n\r\n");
    let body = head.map_or(response.len(), |head| head + 4);
    Ok(response[body..].to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leader_is_found_by_its_id() {
        let page = br#"{"cmdline": ["etcd"], "raft.status": {"id":"8211f1d0f64f3269","term":2,
            "lead":"91bc3c398fb3c146","raftState":"StateFollower"}}"#;
        let leader = parse_leader(page).unwrap();
        let members = br#"[{"id":9372538179322589801,"name":"etcd0","clientURLs":[]},
            {"id":10501334649042878790,"name":"etcd1","isLearner":true}]"#;
        assert_eq!(name_of(leader, members).unwrap().as_deref(), Some("etcd1"));
        assert_eq!(name_of(0, members).unwrap(), None);
        assert!(parse_leader(br#"{"raft.status": null}"#).is_err());
        assert!(parse_leader(b"404 page not found").is_err());
    }
}
