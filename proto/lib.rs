//! The gRPC services of the examples, tests and benchmarks, as tonic generates them.

/// `helloworld.proto`: the greeter of the examples.
pub mod greeter {
    tonic::include_proto!("helloworld");
}

/// `echo.proto`: unary and streaming calls whose size, duration and outcome the caller chooses.
pub mod echo {
    tonic::include_proto!("echo");
}

/// `interop.proto`: the service of gRPC's interoperability test cases.
pub mod interop {
    tonic::include_proto!("grpc.testing");
}
