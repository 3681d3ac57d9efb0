//! Writes a key as an etcd user. Run with `cargo run --example users -- NAME PASSWORD KEY`. The
//! client renews its token when it expires.

use goo_etcd::{Client, Config};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, password, key] = &arguments[..] else {
        return Err("usage: users NAME PASSWORD KEY".into());
    };
    let mut config = Config::from_env()?;
    config.username = Some(name.clone());
    config.password = Some(password.clone());
    // Fails at once if the password is wrong.
    let client = Client::connect("users", config).await?;
    match client.put(key.as_str(), "mine", None).await {
        Ok(_) => println!("{key} is written"),
        Err(error) => println!("{error}"),
    }
    client.close().await?;
    Ok(())
}
