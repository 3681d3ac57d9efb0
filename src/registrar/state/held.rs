//! What is at a key in etcd, whose that is, and what is to be done about it.

use super::action::Ensure;

/// A key that is in etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::registrar) struct Held {
    /// 0: none.
    pub(in crate::registrar) lease: i64,
    pub(in crate::registrar) mod_revision: i64,
    pub(in crate::registrar) value: Vec<u8>,
}

/// What to do with an entry's keys.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::registrar) enum Verdict {
    /// They are as they should be.
    Fine,
    /// Another registration has one of them, by its lease.
    Superseded { by: i64 },
    /// To be written: these of the pairs, and these of the gone keys, by index, to be deleted.
    Write { put: Vec<usize>, delete: Vec<usize> },
}

/// Whose a key is.
pub(in crate::registrar) fn is_ours(held: &Held, ours: &[i64]) -> bool {
    ours.contains(&held.lease)
}

impl Ensure {
    /// Judges what was found at the keys, and at those that should be gone.
    ///
    /// A key under no lease is no registration, whoever wrote it. One under another's lease is that
    /// registration's, and is taken from it by a new registration only.
    pub(in crate::registrar) fn judge(
        &self,
        found: &[Option<Held>],
        gone: &[Option<Held>],
    ) -> Verdict {
        let another = found
            .iter()
            .flatten()
            .find(|held| held.lease != 0 && !is_ours(held, &self.ours));
        if let Some(another) = another
            && !self.take
        {
            return Verdict::Superseded { by: another.lease };
        }
        let wrong = |(at, (_, value)): (usize, &(String, Vec<u8>))| {
            let held = found.get(at).and_then(Option::as_ref);
            let fine = held.is_some_and(|held| held.lease == self.lease && held.value == *value);
            (!fine).then_some(at)
        };
        let put: Vec<usize> = self.pairs.iter().enumerate().filter_map(wrong).collect();
        let left = |(at, held): (usize, &Option<Held>)| {
            let held = held.as_ref()?;
            is_ours(held, &self.ours).then_some(at)
        };
        let delete: Vec<usize> = gone.iter().enumerate().filter_map(left).collect();
        if put.is_empty() && delete.is_empty() {
            Verdict::Fine
        } else {
            Verdict::Write { put, delete }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(lease: i64, value: &str) -> Option<Held> {
        Some(Held {
            lease,
            mod_revision: 7,
            value: value.into(),
        })
    }

    fn ensure(take: bool) -> Ensure {
        Ensure {
            key: "a".into(),
            token: 0,
            pairs: vec![("a".into(), b"v".to_vec()), ("x/a".into(), b"w".to_vec())],
            gone: vec!["old".into()],
            lease: 2,
            ours: vec![1, 2],
            take,
            generation: 0,
        }
    }

    fn put(put: &[usize]) -> Verdict {
        Verdict::Write {
            put: put.to_vec(),
            delete: Vec::new(),
        }
    }

    #[test]
    fn what_is_as_it_should_be_is_left_alone_and_the_rest_is_written() {
        let judge = |a, b| ensure(false).judge(&[a, b], &[None]);
        assert_eq!(judge(held(2, "v"), held(2, "w")), Verdict::Fine);
        assert_eq!(judge(None, None), put(&[0, 1]));
        assert_eq!(judge(held(2, "v"), None), put(&[1]));
        assert_eq!(judge(held(2, "by hand"), held(2, "w")), put(&[0]));
        // The same bytes, and they would not go with the lease.
        assert_eq!(judge(held(0, "v"), held(2, "w")), put(&[0]));
        assert_eq!(judge(held(1, "v"), held(2, "w")), put(&[0]));
    }

    #[test]
    fn another_registration_is_replaced_by_a_new_one_only() {
        let found = [held(2, "v"), held(9, "w")];
        assert_eq!(
            ensure(false).judge(&found, &[None]),
            Verdict::Superseded { by: 9 }
        );
        assert_eq!(ensure(true).judge(&found, &[None]), put(&[1]));
    }

    #[test]
    fn of_the_keys_that_should_be_gone_only_ours_go() {
        let found = [held(2, "v"), held(2, "w")];
        let judge = |old| ensure(false).judge(&found, &[old]);
        assert_eq!(judge(held(9, "")), Verdict::Fine);
        assert_eq!(
            judge(held(1, "")),
            Verdict::Write {
                put: Vec::new(),
                delete: vec![0]
            }
        );
    }
}
