//! Registers clients by name, one per cluster. Run with `cargo run --example many_clients`.

use goo_etcd::Config;

#[tokio::main(flavor = "current_thread")]
async fn main() -> goo_etcd::Result<()> {
    // Usually two different clusters.
    goo_etcd::register("orders", Config::from_env()?).await?;
    goo_etcd::register("users", Config::from_env()?).await?;
    goo_etcd::set_default("orders")?;

    // From here on, any part of the program can get the clients.
    let users = goo_etcd::get_client("users")?;
    users.put("users/1", "somebody", None).await?;
    println!("default: {}", goo_etcd::default()?.name());
    goo_etcd::ping().await?;

    match goo_etcd::get_client("user") {
        Ok(_) => println!("found"),
        Err(error) => println!("{error}"),
    }
    goo_etcd::close_all().await
}
