//! Nodes by their keys: a table of node numbers, open addressing, half empty.
//!
//! Apart from [`std::collections::HashMap`] because blocks come and go for ever at a constant count: a table that marks what
//! was removed has to be built anew every so many insertions. Here a removal moves what follows up instead (Knuth, The Art
//! of Computer Programming 3, 6.4, algorithm R). Keys stay in the nodes, so an entry is 8 bytes.

use std::hash::{BuildHasher, RandomState};

use super::NO_NODE;

/// Entries of the smallest table.
const SLOTS_MIN: usize = 64;

#[derive(Clone, Copy, Debug)]
struct Slot {
    hash: u32,
    node: u32,
}

const EMPTY: Slot = Slot { hash: 0, node: NO_NODE };

/// See the module's text. What is asked of keys is asked of `key_of`, which gives a node's.
#[derive(Clone, Debug)]
pub(super) struct KeyTable {
    slots: Vec<Slot>,
    len: usize,
    /// What keys are multiplied with: drawn anew for each table, because a client that knows the seed of the keys can find
    /// many that agree in half their bits.
    mix: (u64, u64),
}

impl KeyTable {
    pub(super) fn new() -> Self {
        let random = RandomState::new();
        Self { slots: vec![EMPTY; SLOTS_MIN], len: 0, mix: (random.hash_one(1), random.hash_one(2)) }
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    pub(super) fn get(&self, key: u128, key_of: impl Fn(u32) -> u128) -> Option<u32> {
        let hash = self.hash(key);
        let mut at = self.place(hash);
        loop {
            let slot = self.slots[at];
            if slot.node == NO_NODE {
                return None;
            }
            if slot.hash == hash && key_of(slot.node) == key {
                return Some(slot.node);
            }
            at = self.after(at);
        }
    }

    /// Adds a node whose key is in no other.
    pub(super) fn insert(&mut self, key: u128, node: u32) {
        if self.len * 2 >= self.slots.len() {
            let larger = vec![EMPTY; self.slots.len() * 2];
            let old = std::mem::replace(&mut self.slots, larger);
            for slot in old.into_iter().filter(|slot| slot.node != NO_NODE) {
                self.put(slot);
            }
        }
        self.put(Slot { hash: self.hash(key), node });
        self.len += 1;
    }

    /// Takes a node out.
    pub(super) fn remove(&mut self, key: u128, node: u32) {
        let mut hole = self.place(self.hash(key));
        while self.slots[hole].node != node {
            if self.slots[hole].node == NO_NODE {
                return;
            }
            hole = self.after(hole);
        }
        self.len -= 1;
        let mut at = self.after(hole);
        while self.slots[at].node != NO_NODE {
            // Whoever could stand in the hole without being before its own place moves there.
            let ideal = self.place(self.slots[at].hash);
            let mask = self.slots.len() - 1;
            if (at.wrapping_sub(ideal) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.slots[hole] = self.slots[at];
                hole = at;
            }
            at = self.after(at);
        }
        self.slots[hole] = EMPTY;
    }

    pub(super) fn clear(&mut self) {
        self.slots.clear();
        self.slots.resize(SLOTS_MIN, EMPTY);
        self.len = 0;
    }

    fn put(&mut self, slot: Slot) {
        let mut at = self.place(slot.hash);
        while self.slots[at].node != NO_NODE {
            at = self.after(at);
        }
        self.slots[at] = slot;
    }

    /// One multiplication will do: keys are hashes already.
    #[expect(clippy::cast_possible_truncation, reason = "parts of it")]
    fn hash(&self, key: u128) -> u32 {
        let low = key as u64 ^ self.mix.0;
        let high = (key >> 64) as u64 ^ self.mix.1;
        let product = u128::from(low) * u128::from(high);
        (product as u64 ^ (product >> 64) as u64) as u32
    }

    fn place(&self, hash: u32) -> usize {
        hash as usize & (self.slots.len() - 1)
    }

    fn after(&self, at: usize) -> usize {
        (at + 1) & (self.slots.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::collections::btree_map::Entry;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_plain_map(
            few in any::<bool>(), ops in proptest::collection::vec((any::<bool>(), 0_u32..200), 1..600),
        ) {
            let mut table = KeyTable::new();
            if few {
                // All in few places, so that entries stand far from their own.
                table.mix = (0, 0);
            }
            // With nothing mixed in, keys without a high half have all one hash.
            let key_of = |node: u32| if few { u128::from(node) << (64 * (node % 2)) } else { u128::from(node) << 3 };
            let mut plain = BTreeMap::new();
            for (adds, node) in ops {
                let key = key_of(node);
                match plain.entry(key) {
                    Entry::Vacant(place) if adds => {
                        table.insert(key, node);
                        place.insert(node);
                    }
                    Entry::Occupied(place) if !adds => {
                        table.remove(key, node);
                        place.remove();
                    }
                    _ => {}
                }
                prop_assert_eq!(table.len(), plain.len());
                for node in [node, (node + 1) % 200, node * 7 % 200] {
                    prop_assert_eq!(table.get(key_of(node), key_of), plain.get(&key_of(node)).copied());
                }
            }
            for node in 0..200 {
                prop_assert_eq!(table.get(key_of(node), key_of), plain.get(&key_of(node)).copied());
            }
            table.clear();
            prop_assert_eq!((table.len(), table.get(key_of(1), key_of)), (0, None));
        }
    }
}
