//! Granules by how full they are: 64 lists, and a word that says which have any.
//!
//! Apart because it is what makes the pick O(1): the fullest granule that still has room is the head of the highest list
//! in use, and of the fullest that has room for some, only heads are looked at. Filling the fullest first lets the others
//! drain, so that memory can go back. Sources: the slab lists of an operating system's allocator, with a bitmap over the
//! lists as in two-level segregated fit (Masmano et al., 2004).

/// No granule.
pub(super) const NONE: u32 = u32::MAX;
/// The list of granules in which nothing is, and which have room.
pub(super) const EMPTY: u8 = 0;
/// The list of granules in which nothing is and nothing can be: where the one block that begins in them reaches into memory
/// that is not there.
pub(super) const USELESS: u8 = 63;
/// Lists between those two.
pub(super) const PARTS: u32 = 62;
const UNLISTED: u8 = u8::MAX;

#[derive(Clone, Copy, Debug)]
struct Link {
    next: u32,
    previous: u32,
    list: u8,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub(super) struct Fill {
    heads: [u32; 64],
    used: u64,
    links: Vec<Link>,
}

impl Fill {
    pub(super) const fn new() -> Self {
        Self { heads: [NONE; 64], used: 0, links: Vec::new() }
    }

    /// Makes room for a granule's links.
    pub(super) fn reach(&mut self, slot: u32) {
        let length = self.links.len().max(slot as usize + 1);
        self.links.resize(length, Link { next: NONE, previous: NONE, list: UNLISTED });
    }

    /// The fullest granule that has room.
    #[inline]
    pub(super) fn fullest(&self) -> Option<u32> {
        let used = self.used & !(1 << USELESS);
        (used != 0).then(|| self.heads[63 - used.leading_zeros() as usize])
    }

    /// The fullest granule of these lists, each a bit, that has enough by `has_enough`, as far as the head of each list says;
    /// none in which nothing is. With it the lists among which the next one is, when no less is wanted.
    #[inline]
    pub(super) fn fullest_with(&self, lists: u64, has_enough: impl Fn(u32) -> bool) -> Option<(u32, u64)> {
        let mut left = self.used & lists & !(1 << USELESS) & !(1 << EMPTY);
        while left != 0 {
            let list = left.ilog2();
            let slot = self.heads[list as usize];
            if has_enough(slot) {
                return Some((slot, (2 << list) - 1));
            }
            left &= !(1 << list);
        }
        None
    }

    /// The granules of one list.
    pub(super) fn list(&self, list: u8) -> impl Iterator<Item = u32> + '_ {
        let mut next = self.heads[usize::from(list)];
        core::iter::from_fn(move || {
            let slot = next;
            next = self.links.get(slot as usize)?.next;
            Some(slot)
        })
    }

    /// Puts a granule at the head of a list, or into none.
    #[inline]
    pub(super) fn put(&mut self, slot: u32, list: Option<u8>) {
        let list = list.unwrap_or(UNLISTED);
        let link = self.links[slot as usize];
        if link.list == list {
            return;
        }
        if link.list != UNLISTED {
            match link.previous {
                NONE => {
                    self.heads[usize::from(link.list)] = link.next;
                    if link.next == NONE {
                        self.used &= !(1 << link.list);
                    }
                }
                previous => self.links[previous as usize].next = link.next,
            }
            if link.next != NONE {
                self.links[link.next as usize].previous = link.previous;
            }
        }
        let mut next = NONE;
        if list != UNLISTED {
            let head = &mut self.heads[usize::from(list)];
            next = *head;
            *head = slot;
            self.used |= 1 << list;
            if next != NONE {
                self.links[next as usize].previous = slot;
            }
        }
        self.links[slot as usize] = Link { next, previous: NONE, list };
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_plain_lists(ops in proptest::collection::vec((0_u32..12, 0_u8..66), 1..200)) {
            let mut fill = Fill::new();
            fill.reach(11);
            let mut plain: Vec<(u8, u32)> = Vec::new();
            for (slot, list) in ops {
                let list = (list < 64).then_some(list);
                fill.put(slot, list);
                if plain.iter().any(|entry| Some(entry.0) == list && entry.1 == slot) {
                    continue;
                }
                plain.retain(|entry| entry.1 != slot);
                plain.extend(list.map(|list| (list, slot)));
                for list in 0..64 {
                    let wanted = plain.iter().rev().filter(|entry| entry.0 == list).map(|entry| entry.1);
                    prop_assert!(fill.list(list).eq(wanted));
                }
                let fullest = plain.iter().rev().filter(|entry| entry.0 < USELESS).max_by_key(|entry| entry.0);
                // As if a granule had as much room as its number says.
                for least in 0..12 {
                    let head = |list: u8| plain.iter().rev().find(|entry| entry.0 == list).map(|entry| entry.1);
                    let wanted = (1..USELESS).rev().find_map(|list| {
                        head(list).filter(|slot| *slot >= least).map(|slot| (slot, (2_u64 << list) - 1))
                    });
                    prop_assert_eq!(fill.fullest_with(u64::MAX, |slot| slot >= least), wanted);
                    if let Some((_, lists)) = wanted {
                        prop_assert_eq!(fill.fullest_with(lists, |slot| slot >= least), wanted);
                    }
                }
                prop_assert_eq!(
                    fill.fullest().map(|slot| plain.iter().find(|entry| entry.1 == slot).map(|entry| entry.0)),
                    fullest.map(|entry| Some(entry.0))
                );
            }
        }
    }
}
