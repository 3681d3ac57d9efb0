//! Connects with mutual TLS. Run with `cargo run --example tls --features tls -- https://HOST:2379
//! CA CERT KEY`; the last three are PEM files.

use goo_etcd::{Client, Config, TlsConfig};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [endpoint, ca, cert, key] = &arguments[..] else {
        return Err("usage: tls ENDPOINT CA CERT KEY".into());
    };
    // Trusts this authority only. Without certificate and key the client does not identify itself.
    let tls = TlsConfig::new().ca_file(ca).cert_file(cert).key_file(key);
    let config = Config::builder()
        .endpoints([endpoint])
        .enable_tls(true)
        .tls_config(tls)
        .build()?;
    let client = Client::connect("tls", config).await?;
    client.ping().await?;
    println!("etcd {} over TLS", client.status(endpoint).await?.version());
    client.close().await?;
    Ok(())
}
