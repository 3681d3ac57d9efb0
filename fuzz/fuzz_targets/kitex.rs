#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    goo_etcd_fuzz::check(&goo_etcd::format::Kitex, data, Clone::clone);
});
