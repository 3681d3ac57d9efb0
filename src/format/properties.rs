//! Properties that every format has.

use std::sync::Arc;

use proptest::prelude::*;

use super::codec::{DecodeError, Format};
use super::dubbo_go::DubboGo;
use super::etcd_naming::EtcdNaming;
use super::go_micro::GoMicro;
use super::go_zero::GoZero;
use super::key::KeyContext;
use super::kitex::Kitex;
use super::kratos::Kratos;
use super::layout::Layout;
use crate::instance::Instance;

/// Generates instances that can be registered.
pub(super) fn instance() -> impl Strategy<Value = Instance> {
    let address = prop_oneof![
        3 => "[a-z0-9.-]{1,12}:[0-9]{1,5}",
        1 => Just("[2001:db8::7]:50051".to_owned()),
        1 => "unix:/[a-z/]{1,12}",
    ];
    let id = prop_oneof![
        2 => Just(None),
        2 => "[^\\p{Cc}]{1,20}".prop_map(Some),
        1 => any::<i64>().prop_map(|number| Some(number.to_string())),
    ];
    let weight = prop_oneof![
        Just(0),
        Just(1),
        Just(10),
        Just(100),
        Just(u32::MAX),
        any::<u32>()
    ];
    let names = prop_oneof![
        4 => ".{0,6}",
        1 => Just(Kratos::ENDPOINTS.to_owned()),
        1 => Just(DubboGo::TAG.to_owned()),
    ];
    let values = prop_oneof![
        4 => "(?s).{0,20}",
        1 => Just(r#"["http://a:1","grpc://b:2?isSecure=false"]"#.to_owned()),
    ];
    let service = prop_oneof![1 => Just("svc".to_owned()), 2 => "[^/\\p{Cc}]{1,8}"];
    // kratos' list with the instance's own address: as we write it, with a space, with an escape.
    let own_endpoints = proptest::option::of(prop_oneof![
        Just(r#"["http://a:1","grpc://{}"]"#),
        Just(r#"["grpcs://{}?a=&b"]"#),
        Just(r#"["http://a:1", "grpc://{}"]"#),
        Just(r#"["http:\/\/a:1","grpcs://{}"]"#),
        Just("[\"grpc://{}\"]\n"),
    ]);
    let text = || proptest::option::of(".{0,8}");
    let metadata = proptest::collection::btree_map(names, values, 0..5);
    let tls = proptest::option::of(any::<bool>());
    (
        (address, id, weight, any::<bool>(), tls),
        (text(), text(), metadata, service, own_endpoints),
    )
        .prop_map(
            |(
                (address, id, weight, draining, tls),
                (zone, version, metadata, service, own_endpoints),
            )| {
                let mut instance = Instance::new(service, address)
                    .weight(weight)
                    .draining(draining);
                if let Some(id) = id {
                    instance.id = id;
                }
                instance.tls = tls;
                instance.zone = zone;
                instance.version = version;
                instance.metadata = metadata;
                if let Some(list) = own_endpoints {
                    let list = list.replace("{}", &instance.address);
                    let name = Kratos::ENDPOINTS.to_owned();
                    instance.metadata.insert(name, list);
                }
                instance
            },
        )
        .prop_filter("valid instances only", |instance| {
            instance.validate().is_ok()
        })
}

pub(super) fn decode(
    format: &dyn Format,
    prefix: &str,
    service: &str,
    key: &str,
    value: &[u8],
) -> Result<Vec<Instance>, DecodeError> {
    let key = key.as_bytes();
    let context = KeyContext::new(prefix, service, key);
    format.decode(context, value)
}

pub(super) fn in_range(format: &dyn Format, prefix: &str, service: &str, key: &str) -> bool {
    let range = format.range(prefix, service);
    (range.start.as_slice()..range.end.as_slice()).contains(&key.as_bytes())
}

/// The formats of this crate. A new one also needs: the tables in `mod.rs`, the README's table, a
/// fuzz target with seeds, and a place in `tests/it/formats.rs`.
pub(super) fn all_formats() -> Vec<Box<dyn Format>> {
    vec![
        Box::new(EtcdNaming),
        Box::new(GoZero),
        Box::new(Kratos),
        Box::new(Kitex),
        Box::new(GoMicro),
        Box::new(DubboGo),
    ]
}

pub(super) fn format_by_name(name: &str) -> Box<dyn Format> {
    let mut all = all_formats().into_iter();
    all.find(|format| format.name() == name).unwrap()
}

/// The fields of an instance that a format carries: all, except for go-zero.
fn carried_fields(format: &dyn Format, instance: &Instance) -> Instance {
    match format.name() {
        "go-zero" => Instance::new(&instance.service, &instance.address),
        _ => instance.clone(),
    }
}

/// Whether a format cannot carry the instance: kratos and dubbo-go have no Unix sockets.
fn refuses(format: &dyn Format, instance: &Instance) -> bool {
    instance.address.starts_with("unix:") && matches!(format.name(), "kratos" | "dubbo-go")
}

proptest! {
    #[test]
    fn decode_reverses_encode(instance in instance()) {
        for format in all_formats() {
            let format = format.as_ref();
            let name = format.name();
            let service = instance.service.as_str();
            let twice = format!("/{service}/{service}/");
            for prefix in [format.default_prefix(), "", service, &twice] {
                let key = format.key(prefix, &instance);
                prop_assert!(in_range(format, prefix, service, &key), "{}: {}", name, key);
                if refuses(format, &instance) {
                    let error = format.encode(&instance).unwrap_err().to_string();
                    prop_assert!(error.starts_with("invalid address"), "{}: {}", name, error);
                    continue;
                }
                let value = format.encode(&instance).unwrap();
                let decoded = decode(format, prefix, service, &key, &value).unwrap();
                prop_assert_eq!(decoded, vec![carried_fields(format, &instance)], "{}", name);
            }
        }
    }

    #[test]
    fn ranges_of_services_are_disjoint(
        instance in instance(),
        own in "[ab-]{1,3}",
        other in "[ab-]{1,3}",
    ) {
        prop_assume!(own != other);
        for format in all_formats() {
            let format = format.as_ref();
            let foreign = Instance { service: other.clone(), ..instance.clone() };
            let key = format.key(format.default_prefix(), &foreign);
            prop_assert!(
                !in_range(format, format.default_prefix(), &own, &key),
                "{} shows {} to {}", format.name(), key, own
            );
        }
    }

    #[test]
    fn decode_never_panics(
        value in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..60),
            ".{0,60}".prop_map(String::into_bytes),
        ],
    ) {
        for format in all_formats() {
            let _ = decode(format.as_ref(), format.default_prefix(), "svc", "svc/1", &value);
        }
    }
}

#[test]
fn pointers_delegate_to_their_format() {
    let instance = Instance::new("svc", "h:1").id("7");
    for format in all_formats() {
        let shared: Arc<dyn Format> = Arc::from(format_by_name(format.name()));
        let pointers: [&dyn Format; 2] = [&shared, &format];
        for pointer in pointers {
            let direct = format.as_ref();
            assert_eq!(pointer.name(), direct.name());
            assert_eq!(pointer.default_prefix(), direct.default_prefix());
            assert_eq!(pointer.default_ttl(), direct.default_ttl());
            assert_eq!(pointer.identity(), direct.identity());
            assert_eq!(pointer.merges_by_address(), direct.merges_by_address());
            assert_eq!(pointer.is_multi_instance(), direct.is_multi_instance());
            let (key, value) = (
                direct.key("p", &instance),
                direct.encode(&instance).unwrap(),
            );
            assert_eq!(pointer.key("p", &instance), key);
            assert_eq!(pointer.encode(&instance).unwrap(), value);
            assert_eq!(pointer.range("p", "svc"), direct.range("p", "svc"));
            assert_eq!(
                decode(pointer, "p", "svc", &key, &value),
                decode(direct, "p", "svc", &key, &value)
            );
        }
        let layout = Layout::from(shared);
        assert_eq!(layout.prefix, format.default_prefix());
    }
}

#[test]
fn each_format_has_its_own_identity() {
    let identities: std::collections::HashSet<_> = all_formats()
        .iter()
        .map(|format| format.identity())
        .collect();
    assert_eq!(identities.len(), all_formats().len());
}

#[test]
fn empty_prefix_is_joined_as_the_frameworks_do() {
    let instance = Instance::new("svc", "h:1").id("7");
    for (format, key) in [
        // The resolver's target, and go-zero's key, are the bare service name.
        (&EtcdNaming as &dyn Format, "svc/7"),
        (&GoZero, "svc/7"),
        // go-micro uses `path.Join`, which leaves out empty parts.
        (&GoMicro, "svc/7"),
        // The others use `"%s/%s/%s"` or an equivalent.
        (&Kratos, "/svc/7"),
        (&Kitex, "/svc/h:1"),
        (&DubboGo, "/svc/h:1"),
    ] {
        assert_eq!(format.key("", &instance), key, "{}", format.name());
        assert!(in_range(format, "", "svc", key), "{}", format.name());
    }
}
