#![no_main]

use goo_etcd::Instance;
use goo_etcd::format::GoZero;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    goo_etcd_fuzz::check(&GoZero, data, |instance| {
        Instance::new(&instance.service, &instance.address)
    });
});
