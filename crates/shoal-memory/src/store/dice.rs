//! What seeded histories of stores share.

use super::{Fingerprint, StoreKey};

/// Numbers that follow from a seed (xorshift64*; S. Vigna, 2016).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number below `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % end
    }
}

/// The key of one tenant's block.
pub(crate) fn key(block: u64) -> StoreKey {
    StoreKey { fingerprint: Fingerprint(1), tenant: 2, block: block.into() }
}
