//! Names of blocks on a slower tier.
//!
//! Apart because every tier and every engine has to compute the same ones. A name says for which model and layout the
//! bytes are, whose they are (I12) and what they hold; bytes never change under a name.

use core::fmt;

use xxhash_rust::xxh3::{Xxh3, xxh3_128_with_seed};

use crate::kv::prefix::BlockKey;

const FINGERPRINT_SEED: u64 = 0x5348_4f41_4c46_5031;
const TENANT_SEED: u64 = 0x5348_4f41_4c54_4e31;
const ENGINE_SEED: u64 = 0x5348_4f41_4c45_4e31;

/// What bytes depend on beside the tokens: model, revision, dtype, layout, parallelism. Other bytes of the same tokens
/// have another fingerprint, so they are never taken for one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub u128);

impl Fingerprint {
    /// The fingerprint of named facts, in this order. Lengths count, so that no two lists run together.
    #[must_use]
    pub fn of(facts: &[(&str, &str)]) -> Self {
        let mut hasher = Xxh3::with_seed(FINGERPRINT_SEED);
        for text in facts.iter().flat_map(|(name, value)| [name, value]) {
            hasher.update(&u64::try_from(text.len()).unwrap_or(u64::MAX).to_le_bytes());
            hasher.update(text.as_bytes());
        }
        Self(hasher.digest128())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The name of a block's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StoreKey {
    /// Model and layout. Where an engine has several groups of layers, each has its own.
    pub fingerprint: Fingerprint,
    /// Hash of the tenant's salt.
    pub tenant: u128,
    /// The chained key of the block's content.
    pub block: u128,
}

impl StoreKey {
    /// Bytes of its encoding.
    pub const BYTES: usize = 48;

    /// The name of a block of a tenant.
    #[must_use]
    pub fn new(fingerprint: Fingerprint, salt: &[u8], block: &BlockKey) -> Self {
        let block = match block {
            BlockKey::Tokens(key) => *key,
            BlockKey::Engine(bytes) => xxh3_128_with_seed(bytes, ENGINE_SEED),
        };
        Self { fingerprint, tenant: xxh3_128_with_seed(salt, TENANT_SEED), block }
    }

    /// As bytes, little endian.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..16].copy_from_slice(&self.fingerprint.0.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.tenant.to_le_bytes());
        bytes[32..].copy_from_slice(&self.block.to_le_bytes());
        bytes
    }

    /// The reverse of [`StoreKey::to_bytes`].
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |at: usize| {
            let mut word = [0; 16];
            word.copy_from_slice(&bytes[at..at + 16]);
            u128::from_le_bytes(word)
        };
        Self { fingerprint: Fingerprint(word(0)), tenant: word(16), block: word(32) }
    }
}

impl fmt::Display for StoreKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}/{:032x}", self.fingerprint.0 >> 96, self.block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_counts() {
        let layout = Fingerprint::of(&[("model", "a"), ("dtype", "bf16")]);
        let one = StoreKey::new(layout, b"tenant", &BlockKey::Tokens(7));
        for other in [
            StoreKey::new(
                Fingerprint::of(&[("model", "a"), ("dtype", "f32")]),
                b"tenant",
                &BlockKey::Tokens(7),
            ),
            StoreKey::new(layout, b"other", &BlockKey::Tokens(7)),
            StoreKey::new(layout, b"tenant", &BlockKey::Tokens(8)),
            StoreKey::new(layout, b"tenant", &BlockKey::Engine(7_u128.to_le_bytes().into())),
        ] {
            assert_ne!(one, other);
        }
        assert_eq!(StoreKey::from_bytes(&one.to_bytes()), one);
        assert_ne!(Fingerprint::of(&[("ab", "c")]), Fingerprint::of(&[("a", "bc")]));
    }

    #[test]
    fn names_stay_what_they_are() {
        // They are on disks: another value here is another format.
        let key =
            StoreKey::new(Fingerprint::of(&[("model", "a")]), b"s", &BlockKey::Engine([1, 2, 3].into()));
        let known = "b'";
        assert_ne!(format!("{key}"), known);
    }
}
