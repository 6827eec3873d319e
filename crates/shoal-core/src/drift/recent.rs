//! The most that was measured lately: what a lease follows that rises at once and falls late.

use std::collections::VecDeque;

use crate::bytes::ByteCount;

/// Figures that are remembered as having been; more are joined, towards the larger and the later.
const BEFORE_MAX: usize = 32;

/// A figure that holds until the next one is noted, and the largest that it was lately.
#[derive(Clone, Debug, Default)]
pub struct Recent {
    now: ByteCount,
    /// What it was before: until when, and how much. The newest last and the largest first, so each counts for longer than
    /// those before it and for less.
    before: VecDeque<(u64, ByteCount)>,
}

impl Recent {
    /// The newest figure.
    #[must_use]
    pub const fn now(&self) -> ByteCount {
        self.now
    }

    /// From `now_ms` on it is so much.
    pub fn note(&mut self, bytes: ByteCount, now_ms: u64) {
        let was = std::mem::replace(&mut self.now, bytes);
        let hides = |(_, earlier): &(u64, ByteCount), by: ByteCount| *earlier <= by;
        if was > bytes {
            while self.before.back().is_some_and(|earlier| hides(earlier, was)) {
                self.before.pop_back();
            }
            self.before.push_back((now_ms, was));
        }
        while self.before.back().is_some_and(|earlier| hides(earlier, bytes)) {
            self.before.pop_back();
        }
        if self.before.len() > BEFORE_MAX {
            // The larger of the two oldest, for as long as the other.
            let until_ms = self.before[1].0;
            self.before[0].0 = until_ms;
            self.before.remove(1);
        }
    }

    /// The most that it was at any moment of the `window_ms` before `now_ms`; never less than it is.
    pub fn most(&mut self, now_ms: u64, window_ms: u64) -> ByteCount {
        while self.before.front().is_some_and(|(until_ms, _)| until_ms.saturating_add(window_ms) <= now_ms) {
            self.before.pop_front();
        }
        self.before.front().map_or(self.now, |(_, bytes)| *bytes)
    }

    /// When that falls, if nothing is noted before; none where it is what it is.
    #[must_use]
    pub fn falls_at_ms(&self, window_ms: u64) -> Option<u64> {
        self.before.front().map(|(until_ms, _)| until_ms.saturating_add(window_ms))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: fn(u64) -> ByteCount = ByteCount::mib;

    #[test]
    fn it_rises_at_once_and_falls_a_window_after_the_figure_did() {
        let mut recent = Recent::default();
        recent.note(MIB(5), 0);
        recent.note(MIB(20), 1_000);
        assert_eq!(recent.most(1_000, 30_000), MIB(20));
        // It stays at 20 for a minute; the window begins when it falls.
        recent.note(MIB(8), 60_000);
        assert_eq!((recent.now(), recent.falls_at_ms(30_000)), (MIB(8), Some(90_000)));
        assert_eq!(recent.most(89_999, 30_000), MIB(20));
        assert_eq!(recent.most(90_000, 30_000), MIB(8));
        assert_eq!(recent.falls_at_ms(30_000), None);
    }

    #[test]
    fn what_falls_in_steps_falls_in_steps() {
        let mut recent = Recent::default();
        for (at_ms, mib) in [(0, 9), (10, 7), (20, 2), (30, 5), (40, 1)] {
            recent.note(MIB(mib), at_ms);
        }
        let most: Vec<u64> = [0, 110, 120, 140].map(|now| recent.clone().most(now, 100).0 >> 20).into();
        assert_eq!(most, [9, 7, 5, 1]);
    }

    proptest! {
        /// By the definition: the largest of what it was at each millisecond of the window. Bounded, it may be more, for
        /// longer, and never less.
        #[test]
        fn the_most_is_the_largest_of_the_window(
            steps in prop::collection::vec((1u64..40, 0u64..50), 1..120), window_ms in 1u64..400,
        ) {
            let (mut recent, mut now_ms, mut was) = (Recent::default(), 0, Vec::new());
            for (few, (after_ms, bytes)) in steps.into_iter().enumerate() {
                now_ms += after_ms;
                was.resize(usize::try_from(now_ms).expect("short"), recent.now().0);
                recent.note(ByteCount(bytes), now_ms);
                let since = usize::try_from(now_ms.saturating_sub(window_ms)).expect("short");
                let most = was[since..].iter().copied().max().unwrap_or(0).max(bytes);
                let said = recent.most(now_ms, window_ms).0;
                prop_assert!(if few < BEFORE_MAX { said == most } else { said >= most }, "{said}, not {most}");
                prop_assert!(recent.before.len() <= BEFORE_MAX);
            }
        }
    }
}
