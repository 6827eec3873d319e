//! From which granules a batch of blocks comes.
//!
//! Apart because two things are wanted that are at odds: the fullest granule first, so that the others drain; and as few
//! words as can be, since a word costs as much as all 64 of its blocks, and the fullest granules have the fewest to give. So a
//! batch takes the fullest granule with room for all of it, or for half a word at least, and crumbs where nobody has more:
//! before it begins an empty granule, which could go back. Single blocks, as a step takes them, fill the crumbs.

use super::BlockPool;

/// What of a batch a granule has to have room for, while there are such: then a batch lies in twice as many words as it
/// would in a fresh cache, at most.
const LEAST_OF_MANY: usize = 32;

/// Where one batch looks for granules.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pick {
    /// Fuller ones have less room than is wanted.
    lists: u64,
    /// What was wanted of a granule.
    least: usize,
    /// All that is wanted is less than half a word.
    is_at_end: bool,
}

impl Default for Pick {
    fn default() -> Self {
        Self { lists: u64::MAX, least: usize::MAX, is_at_end: false }
    }
}

impl BlockPool {
    /// The granule from which the next of so many blocks come. Each list's head is looked at twice in a batch at most.
    #[inline]
    pub(super) fn pick(&self, wanted: usize, pick: &mut Pick) -> Option<u32> {
        let least = wanted.min(LEAST_OF_MANY);
        if least < pick.least {
            // The end of a batch, which may lie where there was too little for more.
            let lists = if pick.is_at_end { pick.lists } else { u64::MAX };
            *pick = Pick { lists, least, is_at_end: wanted < LEAST_OF_MANY };
        }
        let granules = &self.granules;
        let found = self.fill.fullest_with(pick.lists, |slot| granules[slot as usize].free as usize >= least);
        pick.lists = found.map_or(0, |(_, lists)| lists);
        found.map(|(slot, _)| slot).or_else(|| self.fill.fullest())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::ByteCount;
    use crate::kv::layout::{BlockShape, CacheLayout, CacheSpec, GroupSpec, PlaneOrder};

    /// Granules of 64 blocks with so many of them free each, which begin at 64 times their number.
    fn pool(free: &[u32]) -> BlockPool {
        let shape = BlockShape::State { elements: 32 << 10 };
        let groups = vec![GroupSpec { name: "full".to_owned(), layers: 1, shape, element_bytes: 1 }];
        let bytes = ByteCount::mib(2 * free.len() as u64);
        let spec =
            CacheSpec { groups, order: PlaneOrder::BlockMajor, bytes, granule_bytes_max: ByteCount::mib(2) };
        let layout = CacheLayout::new(&spec).expect("a layout");
        let mut pool = BlockPool::new(&layout.groups()[0]);
        for unit in 0..pool.units() {
            let slot = pool.coming(unit, 1).expect("open");
            pool.mapped(slot).expect("coming");
        }
        for (number, free) in (0..).zip(free) {
            for block in 0..64 - free {
                pool.take(64 * number + block).expect("free");
            }
        }
        pool
    }

    /// How many of a batch come from each granule.
    fn from(pool: &mut BlockPool, count: usize) -> Vec<usize> {
        let mut ids = vec![0_u32; count];
        assert!(pool.alloc(&mut ids));
        (0..pool.units()).map(|number| ids.iter().filter(|id| **id / 64 == number).count()).collect()
    }

    #[test]
    fn a_batch_lies_in_the_fullest_granule_that_has_room_for_all_of_it() {
        let free = [3, 20, 17, 64, 40];
        assert_eq!(from(&mut pool(&free), 1), [1, 0, 0, 0, 0]);
        assert_eq!(from(&mut pool(&free), 16), [0, 0, 16, 0, 0]);
        assert_eq!(from(&mut pool(&free), 20), [0, 20, 0, 0, 0]);
        assert_eq!(from(&mut pool(&free), 32), [0, 0, 0, 0, 32]);
    }

    #[test]
    fn a_long_one_looks_past_what_has_less_than_half_a_word() {
        let free = [3, 33, 17, 64, 40];
        assert_eq!(from(&mut pool(&free), 70), [0, 33, 0, 0, 37], "and not what is empty");
        // Its end may lie in what was too little for more of it.
        assert_eq!(from(&mut pool(&free), 76), [3, 33, 0, 0, 40]);
    }

    #[test]
    fn crumbs_come_before_memory_in_which_nothing_lies() {
        let free = [3, 2, 5, 64, 5];
        assert_eq!(from(&mut pool(&free), 16), [3, 2, 5, 1, 5]);
        assert_eq!(from(&mut pool(&free), 79), [3, 2, 5, 64, 5]);
    }
}
