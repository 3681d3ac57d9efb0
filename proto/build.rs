fn main() -> std::io::Result<()> {
    tonic_prost_build::configure()
        .compile_protos(&["helloworld.proto", "echo.proto", "interop.proto"], &["."])
}
