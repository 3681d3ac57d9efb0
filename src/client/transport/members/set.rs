//! Which addresses a client calls: a state machine without network.
//!
//! - The configured endpoints are called from the start, and again whenever no member is connected.
//! - An address that etcd lists is called once it has responded to a probe. An address that cannot
//!   be reached from here, as behind address translation, is therefore never called.
//! - An address that is listed but not configured must say by its cluster's id that it is a member.
//!   etcd may refuse to say so without a user, and the password is for members only.
//! - An address that is not listed is no longer called once every listed one is connected, if the
//!   list has an address of each voting member.
//! - A learner is left out until it responds to a probe as a voting member does. If nobody else is
//!   known, learners are called, and callers get their refusals.

use super::channel::Addresses;

/// The voting members of the cluster as etcd lists them.
#[derive(Debug)]
pub(super) struct List {
    pub(super) addresses: Addresses,
    /// Whether each voting member has one of the addresses.
    pub(super) has_all: bool,
    /// The id of the cluster that sent the list.
    pub(super) cluster_id: Option<u64>,
}

/// The known addresses, and what is known about them.
#[derive(Debug)]
pub(super) struct MemberSet {
    configured: Addresses,
    /// The addresses in the latest list. Empty before the first one.
    listed: Addresses,
    /// Whether that list has an address of each voting member.
    is_list_complete: bool,
    /// The id of the cluster that sent the latest list.
    cluster_id: Option<u64>,
    /// Whether the latest attempt to fetch a list has failed.
    has_list_failed: bool,
    /// The addresses that are connected now.
    connected: Addresses,
    /// The listed addresses that have been connected since the last time that none was.
    reached: Addresses,
    /// The addresses that are called unless they are left out.
    used: Addresses,
    learners: Addresses,
}

impl MemberSet {
    pub(super) fn new(configured: Addresses) -> Self {
        Self {
            used: configured.clone(),
            configured,
            listed: Addresses::new(),
            is_list_complete: false,
            cluster_id: None,
            has_list_failed: false,
            connected: Addresses::new(),
            reached: Addresses::new(),
            learners: Addresses::new(),
        }
    }

    /// The addresses to call.
    pub(super) fn called(&self) -> Addresses {
        if self.has_only_learners() {
            return self.used.clone();
        }
        &self.used - &self.learners
    }

    /// Whether all members are learners as far as is known.
    pub(super) fn has_only_learners(&self) -> bool {
        self.used.is_subset(&self.learners)
    }

    /// The addresses to probe until they respond as voting members do.
    pub(super) fn probed(&self) -> Addresses {
        &(&self.listed - &self.used) | &self.learners
    }

    /// The addresses that are learners as far as is known.
    pub(super) fn learners(&self) -> &Addresses {
        &self.learners
    }

    /// Whether an address may be called after it responded to a probe as a voting member of the
    /// cluster with this id. The id is `None` if the member did not say it.
    pub(super) fn accepts(&self, address: &str, cluster_id: Option<u64>) -> bool {
        match (self.cluster_id, cluster_id) {
            (Some(ours), Some(theirs)) => ours == theirs,
            _ => self.configured.contains(address),
        }
    }

    /// Records that etcd has listed its voting members.
    pub(super) fn on_list(&mut self, list: List) {
        self.listed = list.addresses;
        self.is_list_complete = list.has_all;
        self.cluster_id = list.cluster_id;
        self.has_list_failed = false;
        if !list.has_all {
            // A configured endpoint may be the only way to a member without an address.
            self.use_configured();
        }
        self.settle();
    }

    /// Records that no list could be fetched.
    pub(super) fn on_list_failure(&mut self) {
        self.has_list_failed = true;
        self.use_configured();
    }

    /// Records which addresses are connected now.
    pub(super) fn on_connected(&mut self, connected: Addresses) {
        if connected.is_empty() {
            self.use_configured();
        }
        self.connected = connected;
        self.settle();
    }

    /// Records that this member refused a call because it is a learner. Returns whether that is
    /// new.
    pub(super) fn on_refusal(&mut self, address: &str) -> bool {
        self.used.contains(address) && self.learners.insert(address.to_owned())
    }

    /// Records that a probe found that this member takes calls.
    pub(super) fn on_probe_success(&mut self, address: &str) {
        self.learners.remove(address);
        if self.listed.contains(address) {
            self.used.insert(address.to_owned());
        }
        self.settle();
    }

    fn use_configured(&mut self) {
        self.used.extend(self.configured.iter().cloned());
        self.reached.clear();
    }

    /// Drops the addresses that are not listed: all of them if every listed one has been reached,
    /// and otherwise those that are of no use.
    fn settle(&mut self) {
        let Self {
            configured,
            listed,
            connected,
            reached,
            used,
            learners,
            ..
        } = self;
        let may_replace = self.is_list_complete && !self.has_list_failed;
        reached.extend(connected.iter().cloned());
        reached.retain(|address| listed.contains(address));
        if !listed.is_empty() && may_replace && reached.len() == listed.len() {
            used.clone_from(listed);
        } else {
            used.retain(|address| {
                [&*listed, configured, connected]
                    .iter()
                    .any(|known| known.contains(address))
            });
        }
        learners.retain(|address| used.contains(address));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(all: &[&str]) -> Addresses {
        all.iter().map(|address| (*address).to_owned()).collect()
    }

    fn set(configured: &[&str]) -> MemberSet {
        MemberSet::new(addresses(configured))
    }

    fn list(set: &mut MemberSet, listed: &[&str]) {
        list_with(set, listed, true);
    }

    fn list_with(set: &mut MemberSet, listed: &[&str], has_all: bool) {
        set.on_list(List {
            addresses: addresses(listed),
            has_all,
            cluster_id: Some(1),
        });
    }

    #[test]
    fn listed_member_is_called_once_it_responded() {
        let mut set = set(&["proxy"]);
        set.on_connected(addresses(&["proxy"]));
        list(&mut set, &["a", "b"]);
        assert_eq!(set.called(), addresses(&["proxy"]));
        assert_eq!(set.probed(), addresses(&["a", "b"]));
        set.on_probe_success("a");
        assert_eq!(set.called(), addresses(&["a", "proxy"]));
        assert_eq!(set.probed(), addresses(&["b"]));
    }

    #[test]
    fn proxy_leaves_when_every_listed_member_is_connected() {
        let mut set = set(&["proxy"]);
        list(&mut set, &["a", "b"]);
        set.on_probe_success("a");
        set.on_probe_success("b");
        set.on_connected(addresses(&["a", "proxy"]));
        assert_eq!(set.called(), addresses(&["a", "b", "proxy"]));
        // Both have been connected, though never at once.
        set.on_connected(addresses(&["b", "proxy"]));
        assert_eq!(set.called(), addresses(&["a", "b"]));
    }

    #[test]
    fn unusable_listed_address_displaces_nothing() {
        let mut set = set(&["a", "b", "c"]);
        set.on_connected(addresses(&["a", "b", "c"]));
        for listed in [&["x", "y", "z"][..], &["a", "y", "z"], &["x"]] {
            list(&mut set, listed);
            set.on_connected(addresses(&["a", "c"]));
            assert_eq!(set.called(), addresses(&["a", "b", "c"]), "{listed:?}");
        }
    }

    #[test]
    fn incomplete_list_displaces_nothing() {
        let all = addresses(&["a", "b", "c"]);
        let mut set = set(&["a", "b", "c"]);
        set.on_connected(all.clone());
        list_with(&mut set, &["c"], false);
        set.on_connected(all.clone());
        assert_eq!(set.called(), all);
        list(&mut set, &["c"]);
        assert_eq!(set.called(), addresses(&["c"]));
        list_with(&mut set, &["c"], false);
        assert_eq!(set.called(), all);
        set.on_connected(addresses(&["c"]));
        assert_eq!(set.called(), all);
    }

    #[test]
    fn listed_address_must_say_its_cluster() {
        let mut set = set(&["a"]);
        for (address, id, accepted) in [("a", None, true), ("a", Some(1), true), ("b", None, false)]
        {
            assert_eq!(set.accepts(address, id), accepted, "{address} {id:?}");
        }
        list(&mut set, &["a", "b"]);
        for (address, id, accepted) in [
            ("a", None, true),
            ("a", Some(1), true),
            ("a", Some(2), false),
            ("b", None, false),
            ("b", Some(1), true),
            ("b", Some(2), false),
        ] {
            assert_eq!(set.accepts(address, id), accepted, "{address} {id:?}");
        }
    }

    #[test]
    fn removed_member_leaves_with_the_list_or_its_connection() {
        let mut set = set(&["a"]);
        list(&mut set, &["a", "b", "c"]);
        set.on_probe_success("b");
        set.on_probe_success("c");
        set.on_connected(addresses(&["a", "b", "c"]));
        list(&mut set, &["a", "b"]);
        assert_eq!(set.called(), addresses(&["a", "b"]));
        // The new member cannot be reached, so the removed one stays while it is connected.
        set.on_connected(addresses(&["a", "b"]));
        list(&mut set, &["a", "d"]);
        assert_eq!(set.called(), addresses(&["a", "b"]));
        set.on_connected(addresses(&["a"]));
        assert_eq!(set.called(), addresses(&["a"]));
    }

    #[test]
    fn configured_endpoints_return_when_no_member_is_connected() {
        let mut set = set(&["proxy"]);
        list(&mut set, &["a"]);
        set.on_probe_success("a");
        set.on_connected(addresses(&["a"]));
        assert_eq!(set.called(), addresses(&["a"]));
        set.on_connected(Addresses::new());
        assert_eq!(set.called(), addresses(&["a", "proxy"]));
        list(&mut set, &["a"]);
        assert_eq!(set.called(), addresses(&["a", "proxy"]));
        set.on_connected(addresses(&["a", "proxy"]));
        assert_eq!(set.called(), addresses(&["a"]));
    }

    #[test]
    fn configured_endpoints_return_when_lists_fail() {
        let mut set = set(&["proxy"]);
        list(&mut set, &["a"]);
        set.on_probe_success("a");
        set.on_connected(addresses(&["a"]));
        set.on_list_failure();
        set.on_connected(addresses(&["a", "proxy"]));
        assert_eq!(set.called(), addresses(&["a", "proxy"]));
        list(&mut set, &["a"]);
        assert_eq!(set.called(), addresses(&["a"]));
    }

    #[test]
    fn learner_is_left_out_until_it_takes_calls() {
        let mut set = set(&["a", "b", "learner"]);
        assert!(set.on_refusal("learner"));
        assert!(!set.on_refusal("learner"));
        assert!(!set.on_refusal("unknown"));
        assert_eq!(set.called(), addresses(&["a", "b"]));
        assert_eq!(set.probed(), addresses(&["learner"]));
        // The learner is not called even while no other member is connected.
        set.on_connected(Addresses::new());
        assert_eq!(set.called(), addresses(&["a", "b"]));
        set.on_probe_success("learner");
        assert_eq!(set.called(), addresses(&["a", "b", "learner"]));
        assert!(set.probed().is_empty());
    }

    #[test]
    fn learners_alone_are_called() {
        let mut set = set(&["a", "b"]);
        set.on_refusal("a");
        set.on_refusal("b");
        assert_eq!(set.called(), addresses(&["a", "b"]));
        assert_eq!(set.probed(), addresses(&["a", "b"]));
        set.on_probe_success("b");
        assert_eq!(set.called(), addresses(&["b"]));
    }

    #[test]
    fn learner_that_is_not_listed_is_forgotten() {
        let mut set = set(&["a", "learner"]);
        set.on_refusal("learner");
        set.on_connected(addresses(&["a"]));
        list(&mut set, &["a"]);
        assert!(set.probed().is_empty());
        list(&mut set, &["a", "learner"]);
        assert_eq!(set.probed(), addresses(&["learner"]));
        set.on_probe_success("learner");
        assert_eq!(set.called(), addresses(&["a", "learner"]));
    }
}
