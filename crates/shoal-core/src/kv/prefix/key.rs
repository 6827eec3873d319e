//! The chained keys of blocks.
//!
//! Apart because others compute them too: a router that hears events finds out which worker holds a prompt by
//! computing the prompt's keys.

use xxhash_rust::xxh3::xxh3_128_with_seed;

/// What a sealed block is called outside the index.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlockKey {
    /// The chained key of tokens ([`KeyChain`]).
    Tokens(u128),
    /// The bytes that the engine brought.
    Engine(Box<[u8]>),
}

/// Computes the keys of a sequence, block after block.
///
/// A root's key is xxh3-128 of the salt; a block's is xxh3-128 of its parent's key (16 bytes, little endian) followed by
/// its token ids (4 bytes each, little endian). Everything is seeded.
#[derive(Clone, Debug)]
pub struct KeyChain {
    seed: u64,
    parent: u128,
    scratch: Vec<u8>,
}

impl KeyChain {
    /// At the start of a sequence of this tenant.
    #[must_use]
    pub fn new(seed: u64, salt: &[u8]) -> Self {
        Self { seed, parent: root_key(seed, salt), scratch: Vec::new() }
    }

    /// The key of the next block.
    pub fn next_key(&mut self, block: &[u32]) -> u128 {
        self.parent = block_key(self.seed, self.parent, block, &mut self.scratch);
        self.parent
    }

    /// The keys of all full blocks of a sequence.
    #[must_use]
    pub fn keys(seed: u64, salt: &[u8], tokens: &[u32], block_tokens: u32) -> Vec<u128> {
        let mut chain = Self::new(seed, salt);
        tokens.chunks_exact((block_tokens as usize).max(1)).map(|block| chain.next_key(block)).collect()
    }
}

/// The key of a tenant's root.
pub(super) fn root_key(seed: u64, salt: &[u8]) -> u128 {
    xxh3_128_with_seed(salt, seed)
}

/// The key of a block of tokens below `parent`; `scratch` is overwritten.
pub(super) fn block_key(seed: u64, parent: u128, tokens: &[u32], scratch: &mut Vec<u8>) -> u128 {
    scratch.clear();
    scratch.extend_from_slice(&parent.to_le_bytes());
    scratch.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
    xxh3_128_with_seed(scratch, seed)
}

/// The key under which a key that the engine brought is looked up: apart from those of tokens by the length before it.
pub(super) fn engine_key(seed: u64, root: u128, bytes: &[u8], scratch: &mut Vec<u8>) -> u128 {
    scratch.clear();
    scratch.extend_from_slice(&root.to_le_bytes());
    scratch.extend_from_slice(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
    scratch.extend_from_slice(bytes);
    xxh3_128_with_seed(scratch, !seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_depend_on_all_that_came_before() {
        let keys = KeyChain::keys(7, b"a", &[1, 2, 3, 4, 5], 2);
        assert_eq!(keys.len(), 2, "a part of a block has no key");
        assert_eq!(keys, KeyChain::keys(7, b"a", &[1, 2, 3, 4], 2));
        for other in [
            KeyChain::keys(8, b"a", &[1, 2, 3, 4], 2),
            KeyChain::keys(7, b"b", &[1, 2, 3, 4], 2),
            KeyChain::keys(7, b"a", &[1, 9, 3, 4], 2),
        ] {
            assert_ne!(keys[0], other[0]);
            assert_ne!(keys[1], other[1]);
        }
    }

    #[test]
    fn keys_stay_what_they_are() {
        // Routers and stores keep them: a change is a change of format.
        assert_eq!(
            KeyChain::keys(0, b"", &[1, 2, 3, 4], 2),
            [
                78_028_171_518_677_972_778_072_290_027_340_915_662,
                177_056_114_904_359_595_924_160_526_898_783_803_574
            ],
        );
    }
}
