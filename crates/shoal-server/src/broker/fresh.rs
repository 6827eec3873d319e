//! KV granted so recently that the worker's figures may not show its use.

use std::collections::VecDeque;

use shoal_core::bytes::ByteCount;

/// How long KV that was granted counts as used, until the worker's figures show it.
const FRESH_MS: u64 = 1_500;
/// Grants within so long of one another are counted together, with the end of the last of them: a cache that grows with
/// every step has few of them.
const TOGETHER_MS: u64 = 250;

/// Grants that follow one another closely.
#[derive(Clone, Copy, Debug)]
struct Grants {
    bytes: ByteCount,
    first_ms: u64,
    until_ms: u64,
}

/// What a model was granted of late. Each grant counts by itself: a cache that grows all the time has no more of it than
/// it grew by in [`FRESH_MS`] and [`TOGETHER_MS`] together.
#[derive(Clone, Debug, Default)]
pub(super) struct FreshKv {
    /// Oldest first; at most [`FRESH_MS`] over [`TOGETHER_MS`], and two.
    grants: VecDeque<Grants>,
}

impl FreshKv {
    /// So much was granted.
    pub(super) fn granted(&mut self, bytes: ByteCount, now_ms: u64) {
        self.forget_old(now_ms);
        let until_ms = now_ms + FRESH_MS;
        match self.grants.back_mut() {
            Some(last) if now_ms < last.first_ms + TOGETHER_MS => {
                last.bytes += bytes;
                last.until_ms = until_ms;
            }
            _ => self.grants.push_back(Grants { bytes, first_ms: now_ms, until_ms }),
        }
    }

    /// So much came back: what was granted first, since what came last is what a step asked for.
    pub(super) fn returned(&mut self, bytes: ByteCount, now_ms: u64) {
        self.forget_old(now_ms);
        let mut left = bytes;
        while !left.is_zero() {
            let Some(first) = self.grants.front_mut() else { return };
            let part = first.bytes.min(left);
            first.bytes -= part;
            left -= part;
            if first.bytes.is_zero() {
                self.grants.pop_front();
            }
        }
    }

    fn forget_old(&mut self, now_ms: u64) {
        while self.grants.front().is_some_and(|first| first.until_ms <= now_ms) {
            self.grants.pop_front();
        }
    }

    /// What counts as used because of it.
    pub(super) fn bytes(&self, now_ms: u64) -> ByteCount {
        self.grants.iter().filter(|grants| grants.until_ms > now_ms).map(|grants| grants.bytes).sum()
    }

    /// When less of it will count, unless more is granted.
    pub(super) fn until_ms(&self, now_ms: u64) -> Option<u64> {
        self.grants.iter().map(|grants| grants.until_ms).find(|until| *until > now_ms)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_grows_all_the_time_is_fresh_only_where_it_is_new() {
        let mut fresh = FreshKv::default();
        for step in 0..1_000 {
            fresh.granted(ByteCount::mib(1), step * 50);
            let most = (FRESH_MS + TOGETHER_MS) / 50;
            assert!(fresh.bytes(step * 50) <= ByteCount::mib(most), "{step}: {fresh:?}");
            assert!(fresh.grants.len() as u64 <= FRESH_MS / TOGETHER_MS + 2);
        }
        assert!(fresh.bytes(50_000) >= ByteCount::mib(FRESH_MS / 50), "{fresh:?}");
        let mut at_ms = 50_000;
        while let Some(until_ms) = fresh.until_ms(at_ms) {
            assert!(fresh.bytes(until_ms) < fresh.bytes(at_ms));
            at_ms = until_ms;
        }
        assert_eq!((fresh.bytes(at_ms), at_ms <= 52_000), (ByteCount::ZERO, true), "{fresh:?}");
    }

    proptest! {
        /// No grant counts for less than it should, none for much longer, and what came back does not count.
        #[test]
        fn each_grant_counts_for_its_time(steps in proptest::collection::vec((0_u64..700, 0_u64..8, 0_u64..4), 1..60)) {
            let mut fresh = FreshKv::default();
            let mut granted: VecDeque<(u64, u64)> = VecDeque::new(); // when, bytes
            let mut now_ms = 0;
            for (pause, more, less) in steps {
                now_ms += pause;
                if more > 0 {
                    fresh.granted(ByteCount(more), now_ms);
                    granted.push_back((now_ms, more));
                }
                let of = |granted: &VecDeque<(u64, u64)>, window: u64| -> u64 {
                    granted.iter().filter(|one| one.0 + window > now_ms).map(|one| one.1).sum()
                };
                prop_assert!(fresh.bytes(now_ms).0 <= of(&granted, FRESH_MS + TOGETHER_MS));
                let before = fresh.bytes(now_ms);
                fresh.returned(ByteCount(less), now_ms);
                prop_assert!(fresh.bytes(now_ms) <= before);
                prop_assert!(fresh.bytes(now_ms).0 + less >= before.0);
                prop_assert!(less == 0 || fresh.bytes(now_ms) < before || before.is_zero());
                if less > 0 {
                    granted.clear(); // from here on it is known by what it says
                    let left = fresh.bytes(now_ms);
                    fresh = FreshKv::default();
                    if !left.is_zero() {
                        fresh.granted(left, now_ms);
                        granted.push_back((now_ms, left.0));
                    }
                }
                prop_assert!(fresh.bytes(now_ms).0 >= of(&granted, FRESH_MS));
                prop_assert!(fresh.grants.len() as u64 <= FRESH_MS / TOGETHER_MS + 2);
            }
        }
    }
}
