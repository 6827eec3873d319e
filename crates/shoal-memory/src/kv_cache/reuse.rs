//! Blocks that are found again by what they hold.
//!
//! Apart because engines may do without: it is the state's business, and here only the lock is taken.

use shoal_core::kv::prefix::{EventBatch, Found, PrefixStats, Sealed, Start};
use shoal_core::kv::state::{KvError, KvState};

use super::KvCache;
use crate::error::MemoryError;

impl KvCache {
    /// Tokens of a block, if what blocks hold is remembered in this cache.
    #[must_use]
    pub fn block_tokens(&self) -> Option<u32> {
        self.shared.state.lock().block_tokens()
    }

    /// Lets the full blocks of `tokens` be found from now on, by whoever gives the same tokens and the same salt. `blocks`
    /// has a list for each group, with [`shoal_core::kv::prefix::NO_BLOCK`] where a group has none. Seal a block when the
    /// step that fills it has been launched on the stream that readers will use, and write to it no more.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] for blocks that nobody owns, or that hold something else; nothing is changed.
    pub fn seal(&self, start: Start<'_>, tokens: &[u32], blocks: &[&[u32]]) -> Result<Sealed, MemoryError> {
        Ok(self.shared.state.lock().seal(start, tokens, blocks)?.clone())
    }

    /// The same by keys that the engine brings, one a block; `after` is the key of the block before the first.
    ///
    /// # Errors
    /// As [`seal`](Self::seal).
    pub fn seal_keys(
        &self,
        salt: &[u8],
        after: Option<&[u8]>,
        keys: &[&[u8]],
        blocks: &[&[u32]],
    ) -> Result<Sealed, MemoryError> {
        Ok(self.shared.state.lock().seal_keys(salt, after, keys, blocks)?.clone())
    }

    /// Finds the longest prefix of `tokens` that was sealed for this salt and makes the caller one more owner of its
    /// blocks: free them like others. An engine must compute at least one token itself, so it gives all but the last.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] where what blocks hold is not remembered; nothing is changed.
    pub fn find(&self, salt: &[u8], tokens: &[u32], found: &mut Found) -> Result<(), MemoryError> {
        self.search(found, |state, found| state.find(salt, tokens, found))
    }

    /// The same, but only from block `first` of the sequence on the caller becomes an owner, and only that is named: for
    /// whoever copies a part of it.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn find_from(
        &self,
        salt: &[u8],
        tokens: &[u32],
        first: usize,
        found: &mut Found,
    ) -> Result<(), MemoryError> {
        self.search(found, |state, found| state.find_from(salt, tokens, first, found))
    }

    fn search(
        &self,
        found: &mut Found,
        find: impl FnOnce(&mut KvState, &mut Found) -> Result<(), KvError>,
    ) -> Result<(), MemoryError> {
        if let Some(debug) = &self.shared.debug {
            return self.shared.find_checked(debug, found, find);
        }
        Ok(find(&mut self.shared.state.lock(), found)?)
    }

    /// A tier copies what is sealed from now on (or one does so no longer): of what is cached, blocks that have their copy
    /// go first.
    pub(crate) fn copy_sealed(&self, is_copied: bool) -> Result<(), MemoryError> {
        Ok(self.shared.state.lock().copy_sealed(is_copied)?)
    }

    /// These blocks have their copy, or get none.
    pub(crate) fn copied(&self, blocks: &[u32]) -> Result<(), MemoryError> {
        Ok(self.shared.state.lock().copied(0, blocks)?)
    }

    /// The same for the blocks of a sequence from `first` on.
    pub(crate) fn copied_sequence(
        &self,
        salt: &[u8],
        tokens: &[u32],
        first: usize,
    ) -> Result<(), MemoryError> {
        Ok(self.shared.state.lock().copied_sequence(salt, tokens, first)?)
    }

    /// Forgets the blocks of a sequence from `first` on, backwards from its last one, as far as nobody owns them and no other
    /// sequence goes on from them. Returns how many, and whether an owner was in the way.
    pub(crate) fn demote(
        &self,
        salt: &[u8],
        tokens: &[u32],
        first: usize,
    ) -> Result<(u32, bool), MemoryError> {
        Ok(self.shared.state.lock().demote(salt, tokens, first)?)
    }

    /// The same for keys that the engine sealed.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn find_keys(&self, salt: &[u8], keys: &[&[u8]], found: &mut Found) -> Result<(), MemoryError> {
        self.search(found, |state, found| state.find_keys(salt, keys, found))
    }

    /// What a block holds shall not be found any more. True if it could be.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] for a group or a block that does not exist.
    pub fn forget(&self, group: usize, block: u32) -> Result<bool, MemoryError> {
        Ok(self.shared.state.lock().forget(group, block)?)
    }

    /// Nothing of what blocks hold shall be found any more, as after new weights. Blocks that are owned stay owned.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] where what blocks hold is not remembered.
    pub fn forget_all(&self) -> Result<(), MemoryError> {
        self.shared.state.lock().forget_all()?;
        self.shared.call();
        Ok(())
    }

    /// What was stored and removed from number `sequence` on, at most `max`: for routers that send a request to where its
    /// prefix lies.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] where what blocks hold is not remembered.
    pub fn events_since(&self, sequence: u64, max: usize) -> Result<EventBatch, MemoryError> {
        Ok(self.shared.state.lock().events_since(sequence, max)?)
    }

    /// Counts of what was stored, removed and refused.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] where what blocks hold is not remembered.
    pub fn prefix_stats(&self) -> Result<PrefixStats, MemoryError> {
        Ok(self.shared.state.lock().prefix_stats()?)
    }
}
