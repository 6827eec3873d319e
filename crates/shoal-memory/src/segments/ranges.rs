//! Which stretches of a range of addresses are taken.
//!
//! Apart because it is arithmetic: best fit among the holes below the frontier, else at the frontier.

use std::collections::BTreeMap;

use shoal_core::bytes::ByteCount;

/// Taken stretches by their begin, each with a value; holes between them; nothing beyond the frontier.
#[derive(Debug)]
pub(super) struct Ranges<T> {
    taken: BTreeMap<u64, (u64, T)>,
    holes: BTreeMap<u64, u64>,
    frontier: u64,
}

impl<T> Default for Ranges<T> {
    fn default() -> Self {
        Self { taken: BTreeMap::new(), holes: BTreeMap::new(), frontier: 0 }
    }
}

impl<T> Ranges<T> {
    /// Takes `bytes` (not zero) somewhere below `limit`; where, or `None` if there is no room.
    pub(super) fn insert(&mut self, bytes: ByteCount, limit: ByteCount, value: T) -> Option<u64> {
        let fitting = self.holes.iter().filter(|(_, hole)| **hole >= bytes.0);
        let begin = if let Some((&begin, &hole)) = fitting.min_by_key(|(begin, hole)| (**hole, **begin)) {
            self.holes.remove(&begin);
            if hole > bytes.0 {
                self.holes.insert(begin + bytes.0, hole - bytes.0);
            }
            begin
        } else {
            let end = self.frontier.checked_add(bytes.0).filter(|end| *end <= limit.0)?;
            std::mem::replace(&mut self.frontier, end)
        };
        self.taken.insert(begin, (bytes.0, value));
        Some(begin)
    }

    /// Gives the stretch that begins there back.
    pub(super) fn remove(&mut self, begin: u64) -> Option<T> {
        let (bytes, value) = self.taken.remove(&begin)?;
        let (mut from, mut to) = (begin, begin + bytes);
        if let Some((&before, &hole)) = self.holes.range(..begin).next_back()
            && before + hole == begin
        {
            self.holes.remove(&before);
            from = before;
        }
        if let Some(hole) = self.holes.remove(&to) {
            to += hole;
        }
        if to == self.frontier {
            self.frontier = from;
        } else {
            self.holes.insert(from, to - from);
        }
        Some(value)
    }

    pub(super) fn get_mut(&mut self, begin: u64) -> Option<&mut T> {
        self.taken.get_mut(&begin).map(|(_, value)| value)
    }

    /// By address.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &T)> {
        self.taken.iter().map(|(begin, (_, value))| (*begin, value))
    }

    /// The end of the last stretch.
    pub(super) const fn frontier(&self) -> u64 {
        self.frontier
    }

    /// Says what is wrong, if anything is.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut all: Vec<(u64, u64, bool)> =
            self.taken.iter().map(|(at, (bytes, _))| (*at, *bytes, true)).collect();
        all.extend(self.holes.iter().map(|(at, bytes)| (*at, *bytes, false)));
        all.sort_unstable();
        let (mut next, mut was_taken) = (0, true);
        for (at, bytes, is_taken) in all {
            if at != next || bytes == 0 || (!is_taken && !was_taken) {
                return Err(format!(
                    "{bytes} at {at:#x}, expected at {next:#x}: {self_holes:?}",
                    self_holes = self.holes
                ));
            }
            (next, was_taken) = (at + bytes, is_taken);
        }
        if next != self.frontier || !was_taken {
            return Err(format!("the last stretch ends at {next:#x}, the frontier is {:#x}", self.frontier));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: ByteCount = ByteCount(64);

    #[test]
    fn the_smallest_hole_that_fits_is_taken_first() {
        let mut ranges = Ranges::default();
        let all: Vec<u64> =
            [8, 2, 4, 2].into_iter().filter_map(|bytes| ranges.insert(ByteCount(bytes), LIMIT, ())).collect();
        assert_eq!(all, [0, 8, 10, 14]);
        ranges.remove(0);
        ranges.remove(10);
        assert_eq!(ranges.insert(ByteCount(3), LIMIT, ()), Some(10), "a hole of 4 rather than one of 8");
        assert_eq!(ranges.insert(ByteCount(9), LIMIT, ()), Some(16));
        assert_eq!(ranges.insert(ByteCount(40), LIMIT, ()), None);
    }

    proptest! {
        #[test]
        fn stretches_never_overlap(steps in prop::collection::vec((any::<bool>(), 1_u64..12), 1..80)) {
            let mut ranges = Ranges::default();
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (takes, number) in steps {
                if takes {
                    if let Some(begin) = ranges.insert(ByteCount(number), LIMIT, number) {
                        prop_assert!(begin + number <= LIMIT.0);
                        prop_assert!(held.iter().all(|(at, bytes)| begin + number <= *at || at + bytes <= begin));
                        held.push((begin, number));
                    }
                } else if !held.is_empty() {
                    let (begin, bytes) = held.swap_remove(usize::try_from(number).unwrap_or(0) % held.len());
                    prop_assert_eq!(ranges.remove(begin), Some(bytes));
                    prop_assert_eq!(ranges.remove(begin), None);
                }
                if let Err(wrong) = ranges.check() {
                    return Err(TestCaseError::fail(wrong));
                }
            }
        }
    }
}
