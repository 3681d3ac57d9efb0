//! The causes of errors, in one line.

/// Appends the causes to the message. The message of a status made on this side is as bare as "tcp
/// connect error"; the reason is in its sources.
pub(super) fn with_causes(status: tonic::Status) -> tonic::Status {
    use std::error::Error as _;
    let mut text = status.message().to_owned();
    append_causes(&mut text, status.source());
    if text == status.message() {
        return status;
    }
    tonic::Status::with_details_and_metadata(
        status.code(),
        text,
        status.details().to_vec().into(),
        status.metadata().clone(),
    )
}

/// An error with its causes in one line, because the outermost one is often as bare as "transport
/// error".
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    append_causes(&mut text, error.source());
    text
}

fn append_causes(text: &mut String, mut source: Option<&(dyn std::error::Error + 'static)>) {
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Layers repeat each other, and tonic's own layer adds only "transport error".
        if cause_text != "transport error" && !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
}
