//! The hash by which a device copy and a host copy are compared; one definition for the CPU and for every device.
//!
//! Apart because it is a format: it decides what a GPU kernel must compute. Plain xxh3 over gigabytes is one chain
//! of dependent steps, which a GPU cannot speed up. This is a tree of it: the bytes are cut in tiles of 4 KiB, the
//! last padded with zeroes (no bytes: one tile of zeroes); each tile gives the digest xxh3-64 (seed 0) of it; the
//! digests, as little-endian words, are bytes again and treated alike, until one is left. The hash is xxh3-64 of
//! that digest followed by the length. All levels but the first are 1/512 of the work.
//!
//! It finds damage and change, not malice: who can choose the bytes can make two alike. Use these and
//! [`crate::Stream::hash`] only, and store no value without storing that it is this definition's.

use xxhash_rust::xxh3::xxh3_64;

/// Bytes behind one digest.
pub const TILE_BYTES: usize = 4096;
/// Bytes of a digest.
pub const DIGEST_BYTES: usize = 8;

/// The hash of bytes that lie together.
#[must_use]
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    let mut hasher = Hasher::new();
    hasher.update(bytes);
    hasher.finish()
}

/// The last step: what a device leaves to the host.
pub(crate) fn finish(root: u64, length: u64) -> u64 {
    let mut last = [0; 2 * DIGEST_BYTES];
    last[..DIGEST_BYTES].copy_from_slice(&root.to_le_bytes());
    last[DIGEST_BYTES..].copy_from_slice(&length.to_le_bytes());
    xxh3_64(&last)
}

/// The hash of bytes that come in pieces: the same as [`hash_bytes`] of all of them together.
#[derive(Clone, Debug, Default)]
pub struct Hasher {
    levels: Vec<Level>,
    length: u64,
}

/// One level of the tree: the tile that is being filled. Bytes past `filled` are stale.
#[derive(Clone, Debug)]
struct Level {
    tile: Box<[u8; TILE_BYTES]>,
    filled: usize,
    digests: u64,
}

impl Level {
    fn new() -> Self {
        Self { tile: Box::new([0; TILE_BYTES]), filled: 0, digests: 0 }
    }

    /// The digest of the tile being filled, which becomes empty.
    fn close(&mut self) -> u64 {
        self.tile[self.filled..].fill(0);
        self.filled = 0;
        self.digests += 1;
        xxh3_64(self.tile.as_slice())
    }
}

impl Hasher {
    /// Nothing hashed yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.length += bytes.len() as u64;
        self.push(0, bytes);
    }

    fn push(&mut self, index: usize, mut bytes: &[u8]) {
        if self.levels.len() == index {
            self.levels.push(Level::new());
        }
        while !bytes.is_empty() {
            let level = &mut self.levels[index];
            let digest = if level.filled == 0 && bytes.len() >= TILE_BYTES {
                let (tile, rest) = bytes.split_at(TILE_BYTES);
                bytes = rest;
                level.digests += 1;
                xxh3_64(tile)
            } else {
                let (part, rest) = bytes.split_at(bytes.len().min(TILE_BYTES - level.filled));
                bytes = rest;
                level.tile[level.filled..level.filled + part.len()].copy_from_slice(part);
                level.filled += part.len();
                if level.filled < TILE_BYTES {
                    return;
                }
                level.close()
            };
            self.push(index + 1, &digest.to_le_bytes());
        }
    }

    /// The hash of all bytes so far.
    #[must_use]
    pub fn finish(&self) -> u64 {
        self.clone().close()
    }

    fn close(mut self) -> u64 {
        let mut index = 0;
        loop {
            if self.levels.len() == index {
                self.levels.push(Level::new());
            }
            let level = &mut self.levels[index];
            if level.filled > 0 || level.digests == 0 {
                let digest = level.close();
                if level.digests == 1 {
                    return finish(digest, self.length);
                }
                self.push(index + 1, &digest.to_le_bytes());
            } else if level.digests == 1 {
                // Exactly one tile: its digest, and nothing else, went up.
                let above = &self.levels[index + 1];
                let mut root = [0; DIGEST_BYTES];
                root.copy_from_slice(&above.tile[..DIGEST_BYTES]);
                return finish(u64::from_le_bytes(root), self.length);
            }
            index += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The module's text, word for word.
    fn by_definition(bytes: &[u8]) -> u64 {
        let mut level = bytes.to_vec();
        loop {
            level.resize(level.len().next_multiple_of(TILE_BYTES).max(TILE_BYTES), 0);
            let digests: Vec<u64> = level.chunks(TILE_BYTES).map(xxh3_64).collect();
            if let [root] = digests[..] {
                return finish(root, bytes.len() as u64);
            }
            level = digests.iter().flat_map(|digest| digest.to_le_bytes()).collect();
        }
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length as u64).map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
    }

    #[test]
    fn it_is_what_the_text_says_at_every_edge() {
        let edges = [0, 1, 8, 4095, 4096, 4097, 8192, 512 * 4096 - 1, 512 * 4096, 512 * 4096 + 1, 513 * 4096];
        for length in edges {
            let bytes = pattern(length);
            assert_eq!(hash_bytes(&bytes), by_definition(&bytes), "{length}");
        }
    }

    #[test]
    fn it_does_not_change_by_accident() {
        // Recorded on disk and by other processes: another value here is another format.
        let found = [&[], b"shoal".as_slice(), &pattern(3 << 20)].map(hash_bytes);
        let known = [0x6e7a_6b27_9a61_4035, 0x405f_f7e5_43d6_9e6a, 0xca7b_e054_40d2_d977];
        assert_eq!(found, known);
    }

    #[test]
    fn every_bit_and_the_length_count() {
        let mut bytes = pattern(3 * TILE_BYTES + 100);
        let whole = hash_bytes(&bytes);
        for index in [0, 4095, 4096, 8191, bytes.len() - 1] {
            bytes[index] ^= 0x10;
            assert_ne!(hash_bytes(&bytes), whole, "byte {index}");
            bytes[index] ^= 0x10;
        }
        bytes.push(0);
        assert_ne!(hash_bytes(&bytes), whole, "a zero more");
        assert_ne!(hash_bytes(&[0; 7]), hash_bytes(&[0; 8]));
        // Swapped tiles.
        bytes.rotate_left(TILE_BYTES);
        assert_ne!(hash_bytes(&bytes), whole);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn pieces_make_no_difference(
            length in 0..100_000_usize,
            cuts in proptest::collection::vec(0..100_000_usize, 0..8),
        ) {
            let bytes = pattern(length);
            let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(length)).collect();
            cuts.extend([0, length]);
            cuts.sort_unstable();
            let mut hasher = Hasher::new();
            for pair in cuts.windows(2) {
                hasher.update(&bytes[pair[0]..pair[1]]);
            }
            prop_assert_eq!(hasher.finish(), by_definition(&bytes));
        }
    }
}
