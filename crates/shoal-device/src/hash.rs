//! The hash by which copies are compared, the same on the host and on every device: xxh3-64 with seed 0.
//!
//! Apart so that one definition serves both sides. One long xxh3 is a chain that a GPU cannot compute in
//! parallel, so this will become a hash of hashes of fixed pieces when a kernel has to compute it too: use these
//! and [`crate::Stream::hash`] only, and store no value across versions without storing which definition made it.

use core::fmt;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// The hash of bytes that lie together.
#[must_use]
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// The hash of bytes that come in pieces: the same as [`hash_bytes`] of all of them together.
#[derive(Clone, Default)]
pub struct Hasher(Xxh3);

impl Hasher {
    /// Of no bytes so far.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash of all bytes so far.
    #[must_use]
    pub fn finish(&self) -> u64 {
        self.0.digest()
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hasher({:016x})", self.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_hash_as_the_whole_does() {
        let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i * 7 % 251).to_le_bytes()[0]).collect();
        for piece in [1, 240, 241, 1024, 65_536, 100_000] {
            let mut hasher = Hasher::new();
            bytes.chunks(piece).for_each(|chunk| hasher.update(chunk));
            assert_eq!(hasher.finish(), hash_bytes(&bytes), "in pieces of {piece}");
        }
        // Known value: a change of the definition must be meant.
        assert_eq!(hash_bytes(b""), 0x2d06_8005_38d3_94c2);
    }
}
