//! What holds of every format.

use proptest::prelude::*;

use super::*;

/// Any instance that can be registered.
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
    // kratos' list, of the instance's own address: as it is written, with a space, with an escape.
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
        .prop_filter("it can be registered", |instance| {
            instance.validate().is_ok()
        })
}

pub(super) fn read(
    format: &dyn Format,
    prefix: &str,
    service: &str,
    key: &str,
    value: &[u8],
) -> Result<Vec<Instance>, DecodeError> {
    format.decode(prefix, service, key.as_bytes(), value)
}

pub(super) fn in_range(format: &dyn Format, prefix: &str, service: &str, key: &str) -> bool {
    let range = format.range(prefix, service);
    (range.start.as_slice()..range.end.as_slice()).contains(&key.as_bytes())
}

pub(super) fn all() -> Vec<Box<dyn Format>> {
    vec![
        Box::new(EtcdNaming),
        Box::new(GoZero),
        Box::new(Kratos),
        Box::new(Kitex),
        Box::new(GoMicro),
        Box::new(DubboGo),
    ]
}

pub(super) fn named(name: &str) -> Box<dyn Format> {
    let mut all = all().into_iter();
    all.find(|format| format.name() == name).unwrap()
}

/// What of an instance the format carries: everything, but for go-zero.
fn carried_by(format: &dyn Format, instance: &Instance) -> Instance {
    match format.name() {
        "go-zero" => Instance::new(&instance.service, &instance.address),
        _ => instance.clone(),
    }
}

fn refuses(format: &dyn Format, instance: &Instance) -> bool {
    instance.address.starts_with("unix:") && matches!(format.name(), "kratos" | "dubbo-go")
}

proptest! {
    #[test]
    fn any_instance_survives_encode_and_decode_in_each_format(instance in instance()) {
        for format in all() {
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
                let read = read(format, prefix, service, &key, &value).unwrap();
                prop_assert_eq!(read, vec![carried_by(format, &instance)], "{}", name);
            }
        }
    }

    #[test]
    fn a_service_never_shows_another_whatever_their_names_have_in_common(
        instance in instance(),
        own in "[ab-]{1,3}",
        other in "[ab-]{1,3}",
    ) {
        prop_assume!(own != other);
        for format in all() {
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
    fn whatever_is_read_is_an_error_or_an_instance_and_never_a_panic(
        value in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..60),
            ".{0,60}".prop_map(String::into_bytes),
        ],
    ) {
        for format in all() {
            let _ = format.decode(format.default_prefix(), "svc", b"svc/1", &value);
        }
    }
}
