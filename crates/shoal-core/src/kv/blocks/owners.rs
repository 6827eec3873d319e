//! How many own each block, as words of bits: owned once, owned by several, or by nobody though it is cached.
//!
//! Apart because it is the other half of the inner loop, beside [`Bits`](super::super::bits::Bits): nearly every block has
//! one owner, so taking and giving back neighbours is a few operations on a word, and no block's own number is looked at
//! but where it is shared. A block with none of the three bits is owned by nobody and holds nothing.

use super::{BlockError, BlockState};

const WORD: usize = 64;
const OWNERS_MAX: u32 = u32::MAX - 2;

#[derive(Clone, Copy, Debug, Default)]
struct Word {
    once: u64,
    shared: u64,
    cached: u64,
}

/// See the module's text.
#[derive(Clone, Debug)]
pub(super) struct Owners {
    words: Vec<Word>,
    /// Owners of what is shared, two or more; nothing is said of others.
    counts: Vec<u32>,
}

impl Owners {
    /// Nobody owns any of `blocks` blocks.
    pub(super) fn new(blocks: u32) -> Self {
        let words = vec![Word::default(); (blocks as usize).div_ceil(WORD)];
        Self { words, counts: vec![0; blocks as usize] }
    }

    const fn split(block: u32) -> (usize, u64) {
        (block as usize / WORD, 1 << (block as usize % WORD))
    }

    /// What a block is; it exists.
    pub(super) fn state(&self, block: u32) -> BlockState {
        let (word, bit) = Self::split(block);
        let word = self.words[word];
        if word.once & bit != 0 {
            BlockState::Owned(1)
        } else if word.shared & bit != 0 {
            BlockState::Owned(self.counts[block as usize])
        } else if word.cached & bit != 0 {
            BlockState::Cached
        } else {
            BlockState::Free
        }
    }

    /// Says what a block is.
    pub(super) fn put(&mut self, block: u32, state: BlockState) {
        let (word, bit) = Self::split(block);
        let word = &mut self.words[word];
        word.once &= !bit;
        word.shared &= !bit;
        word.cached &= !bit;
        match state {
            BlockState::Free | BlockState::Owned(0) => {}
            BlockState::Cached => word.cached |= bit,
            BlockState::Owned(1) => word.once |= bit,
            BlockState::Owned(owners) => {
                word.shared |= bit;
                self.counts[block as usize] = owners;
            }
        }
    }

    /// Blocks of one word that were nobody's have one owner each.
    #[inline]
    pub(super) fn own(&mut self, word: usize, bits: u64) {
        self.words[word].once |= bits;
    }

    /// Blocks of one word that have one owner each are nobody's. False, and nothing is changed, if that is not so of all.
    #[inline]
    pub(super) fn disown(&mut self, word: usize, bits: u64) -> bool {
        let Some(word) = self.words.get_mut(word) else { return false };
        let is_so = word.once & bits == bits;
        word.once &= !if is_so { bits } else { 0 };
        is_so
    }

    /// Those of some blocks of one word that nobody owns and that are not cached.
    #[inline]
    pub(super) fn unowned(&self, word: usize, bits: u64) -> u64 {
        let word = self.words[word];
        bits & !(word.once | word.shared | word.cached)
    }

    /// One owner more for a block that has one.
    ///
    /// # Errors
    /// [`BlockError::NotOwned`], [`BlockError::TooManyOwners`]; nothing is changed.
    pub(super) fn join(&mut self, block: u32) -> Result<(), BlockError> {
        match self.state(block) {
            BlockState::Free | BlockState::Cached => Err(BlockError::NotOwned { block }),
            BlockState::Owned(OWNERS_MAX..) => Err(BlockError::TooManyOwners { block }),
            BlockState::Owned(owners) => {
                self.put(block, BlockState::Owned(owners + 1));
                Ok(())
            }
        }
    }

    /// One owner less for a block that has one.
    ///
    /// # Errors
    /// [`BlockError::NotOwned`]; nothing is changed.
    pub(super) fn leave(&mut self, block: u32) -> Result<(), BlockError> {
        let BlockState::Owned(owners) = self.state(block) else {
            return Err(BlockError::NotOwned { block });
        };
        self.put(block, BlockState::Owned(owners - 1));
        Ok(())
    }

    /// Takes back a [`leave`](Self::leave), after which nothing else was done.
    pub(super) fn rejoin(&mut self, block: u32) {
        let owners = match self.state(block) {
            BlockState::Owned(owners) => owners,
            BlockState::Free | BlockState::Cached => 0,
        };
        self.put(block, BlockState::Owned(owners + 1));
    }

    /// Whether a block is one thing only.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub(super) fn check(&self, block: u32) -> Result<(), String> {
        let (at, bit) = Self::split(block);
        let word = self.words[at];
        let is = |bits: u64| u32::from(bits & bit != 0);
        if is(word.once) + is(word.shared) + is(word.cached) > 1 {
            return Err(format!("block {block} is several things at once: {word:x?}"));
        }
        if is(word.shared) == 1 && self.counts[block as usize] < 2 {
            return Err(format!("block {block} is shared by {} (I7)", self.counts[block as usize]));
        }
        Ok(())
    }
}
