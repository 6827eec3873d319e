//! What is known to be there without asking, and what was removed.
//!
//! Apart because it is only memory: bounded, sometimes wrong (others write and delete too), and corrected by every answer.
//! A wrong yes costs a miss, a wrong no a block that is computed again.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::store::StoreKey;

#[derive(Clone, Copy)]
struct Known {
    is_there: bool,
    at: Instant,
}

/// See the module.
pub(super) struct Presence {
    names: HashMap<StoreKey, Known>,
    /// Oldest first.
    order: VecDeque<StoreKey>,
    names_max: usize,
    absent_for: Duration,
    /// Names that were removed: by which number, and whether the remote did it. They are not there whatever was read, and
    /// puts of a lower number are undone.
    removals: HashMap<StoreKey, (u64, bool)>,
}

impl Presence {
    pub(super) fn new(names_max: usize, absent_for: Duration) -> Self {
        let (names, removals) = (HashMap::new(), HashMap::new());
        Self { names, order: VecDeque::new(), names_max: names_max.max(1), absent_for, removals }
    }

    /// Whether it is there; none if nothing is known.
    pub(super) fn find(&self, key: &StoreKey, now: Instant) -> Option<bool> {
        if self.removals.contains_key(key) {
            return Some(false);
        }
        let known = self.names.get(key)?;
        (known.is_there || now.saturating_duration_since(known.at) < self.absent_for)
            .then_some(known.is_there)
    }

    pub(super) fn note(&mut self, key: &StoreKey, is_there: bool, now: Instant) {
        if self.names.insert(*key, Known { is_there, at: now }).is_none() {
            self.order.push_back(*key);
        }
        while self.order.len() > self.names_max {
            if let Some(oldest) = self.order.pop_front() {
                self.names.remove(&oldest);
            }
        }
    }

    /// The remote was asked at `asked`. What was put since is there, whatever it said: it may have said so before.
    pub(super) fn answered(&mut self, key: &StoreKey, is_there: bool, asked: Instant, now: Instant) {
        let is_overtaken = self.names.get(key).is_some_and(|known| known.is_there && known.at >= asked);
        if is_there || !is_overtaken {
            self.note(key, is_there, now);
        }
    }

    /// Somebody asks the remote; until that is known, it is not there.
    pub(super) fn looking(&mut self, key: &StoreKey, now: Instant) {
        self.note(key, false, now);
    }

    /// Nobody knows after all.
    pub(super) fn forget(&mut self, key: &StoreKey) {
        if let Some(known) = self.names.get_mut(key).filter(|known| !known.is_there) {
            // As old as can be said: it is asked for again.
            known.at = known.at.checked_sub(self.absent_for).unwrap_or(known.at);
        }
    }

    pub(super) fn removed(&mut self, key: &StoreKey, number: u64, now: Instant) {
        self.removals.insert(*key, (number, false));
        self.note(key, false, now);
    }

    /// Whether a put of this number came before the name was removed.
    pub(super) fn is_removed(&self, key: &StoreKey, number: u64) -> bool {
        self.removals.get(key).is_some_and(|(removed, _)| number < *removed)
    }

    /// A removal ended at the remote, or failed there.
    pub(super) fn removal_ended(&mut self, key: &StoreKey, number: u64) {
        if let Some(removal) = self.removals.get_mut(key).filter(|removal| removal.0 == number) {
            removal.1 = true;
        }
    }

    /// Forgets a removal that has ended, unless `is_awaited` says that a put before it is still under way.
    pub(super) fn settle(&mut self, key: &StoreKey, is_awaited: impl Fn(u64) -> bool) {
        if self.removals.get(key).is_some_and(|(number, has_ended)| *has_ended && !is_awaited(*number)) {
            self.removals.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Fingerprint;

    fn key(block: u128) -> StoreKey {
        StoreKey { fingerprint: Fingerprint(1), tenant: 2, block }
    }

    #[test]
    fn what_is_known_fades_and_has_a_bound() {
        let now = Instant::now();
        let mut presence = Presence::new(2, Duration::from_secs(10));
        assert_eq!(presence.find(&key(1), now), None);
        presence.note(&key(1), true, now);
        presence.looking(&key(2), now);
        let later = now + Duration::from_secs(10);
        assert_eq!([presence.find(&key(1), later), presence.find(&key(2), later)], [Some(true), None]);
        assert_eq!(presence.find(&key(2), now), Some(false), "not asked for twice");
        presence.forget(&key(2));
        assert_eq!(presence.find(&key(2), now), None);
        presence.note(&key(3), true, now);
        assert_eq!([presence.find(&key(1), now), presence.find(&key(3), now)], [None, Some(true)]);
    }

    #[test]
    fn an_answer_that_a_put_has_overtaken_says_nothing() {
        let start = Instant::now();
        let [asked, put, now] = [1, 2, 3].map(|seconds| start + Duration::from_secs(seconds));
        let mut presence = Presence::new(9, Duration::from_secs(10));
        presence.looking(&key(1), start);
        presence.note(&key(1), true, put);
        presence.answered(&key(1), false, asked, now);
        assert_eq!(presence.find(&key(1), now), Some(true), "it was asked for before it was put");
        presence.answered(&key(1), false, now, now);
        assert_eq!(presence.find(&key(1), now), Some(false), "it has gone since");
        presence.answered(&key(1), true, now, now);
        assert_eq!(presence.find(&key(1), now), Some(true));
    }

    #[test]
    fn what_was_removed_is_not_there_until_all_that_came_before_has_ended() {
        let now = Instant::now();
        let mut presence = Presence::new(9, Duration::ZERO);
        presence.removed(&key(1), 5, now);
        presence.note(&key(1), true, now);
        assert_eq!(presence.find(&key(1), now), Some(false));
        assert!(presence.is_removed(&key(1), 4) && !presence.is_removed(&key(1), 6));
        presence.settle(&key(1), |_| false);
        assert_eq!(presence.find(&key(1), now), Some(false), "it has not ended");
        presence.removal_ended(&key(1), 5);
        presence.settle(&key(1), |number| number == 5);
        assert_eq!(presence.find(&key(1), now), Some(false), "a put of before is under way");
        presence.settle(&key(1), |_| false);
        assert_eq!(presence.find(&key(1), now), Some(true), "what was noted since");
    }
}
