//! Which formats are the same.

use std::any::TypeId;

/// Tells formats apart; see [`Format::identity`](super::Format::identity).
///
/// Formats with equal identities must encode and decode alike.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity(Kind);

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Kind {
    /// A type without fields: all its values are the same.
    Type(TypeId),
    /// A type and the settings of its values.
    Settings(TypeId, String),
    /// A value with fields, by its address. No other value has the address while this one lives.
    Address(usize),
}

impl Identity {
    /// The default identity of a format.
    ///
    /// If the type has no fields (its size is zero), all its values are the same. A value with
    /// fields is the same as itself only: the same `Arc` or `Box`.
    pub fn of<F: ?Sized + 'static>(format: &F) -> Self {
        Self(if size_of_val(format) == 0 {
            Kind::Type(TypeId::of::<F>())
        } else {
            Kind::Address(std::ptr::from_ref(format).addr())
        })
    }

    /// The identity of the values of type `F` that have these settings.
    ///
    /// `settings` must tell apart all values of `F` that behave differently.
    pub fn with_settings<F: ?Sized + 'static>(settings: impl Into<String>) -> Self {
        Self(Kind::Settings(TypeId::of::<F>(), settings.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Empty;
    struct OtherEmpty;
    struct WithField(#[allow(dead_code, reason = "gives the type a size")] u8);

    #[test]
    fn values_without_fields_are_the_same() {
        assert_eq!(Identity::of(&Empty), Identity::of(&Empty));
        assert_ne!(Identity::of(&Empty), Identity::of(&OtherEmpty));
    }

    #[test]
    fn value_with_fields_is_the_same_as_itself_only() {
        let (one, other) = (WithField(1), WithField(1));
        assert_eq!(Identity::of(&one), Identity::of(&one));
        assert_ne!(Identity::of(&one), Identity::of(&other));
    }

    #[test]
    fn settings_are_compared_per_type() {
        let empty = Identity::with_settings::<Empty>;
        assert_eq!(empty("a"), empty("a"));
        assert_ne!(empty("a"), empty("b"));
        assert_ne!(empty("a"), Identity::with_settings::<OtherEmpty>("a"));
    }
}
