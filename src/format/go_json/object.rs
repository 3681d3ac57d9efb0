//! Reads the fields of an object as Go does.

use std::collections::BTreeMap;

use serde_json::Value;

use super::text;
use super::value::{Json, Object};
use crate::format::codec::DecodeError;

impl Object {
    /// Parses a value that must be one JSON object. `null` is an object without fields, as in Go.
    pub(in crate::format) fn parse(value: &[u8]) -> Result<Self, DecodeError> {
        match serde_json::from_str(&text::decode(value)) {
            Ok(Json::Object(fields)) => Ok(fields),
            Ok(Json::Null) => Ok(Self::default()),
            Ok(_) => Err(DecodeError::new("the value is not a JSON object")),
            // The error must not quote the value, so it names the position only.
            Err(error) => Err(DecodeError::new(format!(
                "the value is not JSON (line {}, column {})",
                error.line(),
                error.column()
            ))),
        }
    }

    /// All values of a field, in order: a field may occur several times.
    fn all<'a, 'n>(&'a self, name: &'n str) -> impl Iterator<Item = &'a Json> + use<'a, 'n> {
        self.0
            .iter()
            .filter(move |(key, _)| is_name(key, name))
            .map(|(_, value)| value)
    }

    /// A field of any type; `null` counts as absent.
    pub(in crate::format) fn any(&self, name: &str) -> Option<Value> {
        match self.all(name).last() {
            None | Some(Json::Null) => None,
            Some(value) => Some(value.clone().into()),
        }
    }

    /// A field with one value. As in Go, a `null` leaves an earlier value in force, and a wrong
    /// type is an error even if a right one follows.
    fn scalar<'a, T>(
        &'a self,
        name: &str,
        expected: &str,
        read: impl Fn(&'a Json) -> Option<T>,
    ) -> Result<Option<T>, DecodeError> {
        let mut last = None;
        for value in self.all(name).filter(|value| **value != Json::Null) {
            let value = read(value);
            last = Some(value.ok_or_else(|| wrong_type(name, expected))?);
        }
        Ok(last)
    }

    /// A string field, empty if absent.
    pub(in crate::format) fn string(&self, name: &str) -> Result<&str, DecodeError> {
        let text = self.scalar(name, "a string", Json::as_str)?;
        Ok(text.unwrap_or_default())
    }

    /// An unsigned number field of at most `max`, 0 if absent.
    pub(in crate::format) fn unsigned(&self, name: &str, max: u64) -> Result<u64, DecodeError> {
        let expected = format!("a whole number from 0 to {max}");
        let number = self.scalar(name, &expected, |value| match value {
            Json::Number(number) => number.as_u64().filter(|number| *number <= max),
            _ => None,
        })?;
        Ok(number.unwrap_or_default())
    }

    /// A field of Go's type `int` or `int64`, 0 if absent.
    pub(in crate::format) fn signed(&self, name: &str) -> Result<i64, DecodeError> {
        let number = self.scalar(name, "a whole number of 64 bits", |value| match value {
            // serde_json parses `-0` as a float, Go as 0.
            Json::Number(number) if number.as_f64().is_some_and(is_minus_zero) => Some(0),
            Json::Number(number) => number.as_i64(),
            _ => None,
        })?;
        Ok(number.unwrap_or_default())
    }

    /// A boolean field, false if absent.
    pub(in crate::format) fn boolean(&self, name: &str) -> Result<bool, DecodeError> {
        let flag = self.scalar(name, "true or false", |value| match value {
            Json::Bool(flag) => Some(*flag),
            _ => None,
        })?;
        Ok(flag.unwrap_or_default())
    }

    /// An object field.
    pub(in crate::format) fn object(&self, name: &str) -> Result<Option<&Object>, DecodeError> {
        self.scalar(name, "an object", Json::as_object)
    }

    /// A field of Go's type `map[string]string`, empty if absent. As in Go, a second value adds its
    /// entries to the first, and a `null` removes all entries.
    pub(in crate::format) fn strings_by_name(
        &self,
        name: &str,
    ) -> Result<BTreeMap<String, String>, DecodeError> {
        let wrong = || wrong_type(name, "an object of strings");
        let mut map = BTreeMap::new();
        for value in self.all(name) {
            match value {
                Json::Null => map.clear(),
                Json::Object(Object(entries)) => {
                    for (key, value) in entries {
                        let value = match value {
                            Json::Null => "",
                            value => value.as_str().ok_or_else(wrong)?,
                        };
                        map.insert(key.clone(), value.to_owned());
                    }
                }
                _ => return Err(wrong()),
            }
        }
        Ok(map)
    }

    /// A list field, empty if absent; `null` elements are left out.
    fn list<'a, T>(
        &'a self,
        name: &str,
        expected: &str,
        read: impl Fn(&'a Json) -> Option<T>,
    ) -> Result<Vec<T>, DecodeError> {
        let wrong = || wrong_type(name, expected);
        let mut last = Vec::new();
        for value in self.all(name) {
            last = match value {
                Json::Null => Vec::new(),
                Json::List(elements) => elements
                    .iter()
                    .filter(|element| **element != Json::Null)
                    .map(|element| read(element).ok_or_else(wrong))
                    .collect::<Result<_, _>>()?,
                _ => return Err(wrong()),
            };
        }
        Ok(last)
    }

    /// A field with a list of strings.
    pub(in crate::format) fn strings(&self, name: &str) -> Result<Vec<&str>, DecodeError> {
        self.list(name, "a list of strings", Json::as_str)
    }

    /// A field with a list of objects.
    pub(in crate::format) fn objects(&self, name: &str) -> Result<Vec<&Object>, DecodeError> {
        self.list(name, "a list of objects", Json::as_object)
    }
}

fn is_minus_zero(number: f64) -> bool {
    number == 0.0 && number.is_sign_negative()
}

fn wrong_type(name: &str, expected: &str) -> DecodeError {
    DecodeError::new(format!("{name} is not {expected}"))
}

/// Whether Go takes `key` for the field `name`, which is ASCII. Go folds case as Unicode does; two
/// characters outside ASCII, the long s and the Kelvin sign, fold into ASCII.
fn is_name(key: &str, name: &str) -> bool {
    let folded = key.chars().map(|character| match character {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        other => other.to_ascii_lowercase(),
    });
    folded.eq(name.chars().map(|character| character.to_ascii_lowercase()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Object {
        Object::parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn names_match_with_gos_case_folding() {
        for key in ["tasks", "TASKS", "Tasks", "taſks", "tas\u{212a}s"] {
            let object = parse(&format!(r#"{{"{key}":"x"}}"#));
            assert_eq!(object.string("tasks").unwrap(), "x", "{key}");
        }
        for key in ["task", "taskss", "tàsks", "taßks", " tasks"] {
            let object = parse(&format!(r#"{{"{key}":"x"}}"#));
            assert_eq!(object.string("tasks").unwrap(), "", "{key}");
        }
    }

    #[test]
    fn last_duplicate_counts_in_any_case() {
        assert_eq!(
            parse(r#"{"Addr":"a","addr":"b"}"#).string("Addr").unwrap(),
            "b"
        );
        assert_eq!(
            parse(r#"{"addr":"b","Addr":"a"}"#).string("Addr").unwrap(),
            "a"
        );
        // In Go, `null` leaves a number as it is, but makes a list or a map empty.
        let object = parse(r#"{"n":1,"n":null,"m":{"a":"1"},"m":null,"m":{"b":null}}"#);
        assert_eq!(object.signed("n").unwrap(), 1);
        assert_eq!(
            object.strings_by_name("m").unwrap(),
            BTreeMap::from([("b".to_owned(), String::new())])
        );
        // A wrong type is an error even if a right one follows.
        assert!(parse(r#"{"n":"1","n":1}"#).signed("n").is_err());
    }

    #[test]
    fn type_errors_name_the_field_but_not_the_value() {
        let object = parse(
            r#"{"s":1,"u":-1,"b":256,"i":9223372036854775808,"f":1.0,"t":"true","l":[1],"m":{"a":1},"o":[[]]}"#,
        );
        let errors = [
            object.string("s").map(drop),
            object.unsigned("u", 255).map(drop),
            object.unsigned("b", 255).map(drop),
            object.signed("i").map(drop),
            object.signed("f").map(drop),
            object.boolean("t").map(drop),
            object.strings("l").map(drop),
            object.strings_by_name("m").map(drop),
            object.objects("o").map(drop),
            object.object("l").map(drop),
        ];
        for (error, name) in errors.into_iter().zip("s u b i f t l m o l".split(' ')) {
            let message = error.unwrap_err().to_string();
            assert!(message.starts_with(&format!("{name} is not ")), "{message}");
        }
    }

    #[test]
    fn missing_and_null_fields_have_the_zero_value() {
        for text in [
            "null",
            "{}",
            r#" {"s":null,"n":null,"t":null,"l":null,"m":null,"x":[{}]} "#,
        ] {
            let object = parse(text);
            assert_eq!(object.string("s").unwrap(), "");
            assert_eq!(object.signed("n").unwrap(), 0);
            assert_eq!(object.unsigned("n", 255).unwrap(), 0);
            assert!(!object.boolean("t").unwrap());
            assert!(object.strings("l").unwrap().is_empty());
            assert!(object.strings_by_name("m").unwrap().is_empty());
            assert_eq!(object.any("s"), None);
        }
    }

    #[test]
    fn invalid_utf8_is_replaced_in_strings_only() {
        let object = Object::parse(b"{\"s\":\"a\xe2\x82b\"}").unwrap();
        assert_eq!(object.string("s").unwrap(), "a\u{fffd}\u{fffd}b");
        assert!(Object::parse(b"{\"s\":\xff}").is_err());
        let object = parse(r#"{"s":"a\ud800b"}"#);
        assert_eq!(object.string("s").unwrap(), "a\u{fffd}b");
        assert!(Object::parse(br#"{"s":\ud800}"#).is_err());
        assert!(Object::parse(b"{} {}").is_err());
    }
}
