//! The way up: from the tier to blocks of the device.
//!
//! Apart because it is what a request waits for: what of a sequence is there, what of it is worth loading, and blocks for it.
//! How it comes is [`bring`](super::bring)'s business; what arrived in a row is used.

use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::kv::prefix::Start;

use super::Inner;
use super::bring::{Shares, Wanted};
use super::choice::Watch;
use crate::store::StoreKey;
use crate::transfer::Shared;

/// Which part of the time for a load a request waits at most to hear what a remote has of it.
const LOOK_PART: u32 = 4;

/// What is to be loaded, and for whom.
pub(super) struct Call<'a> {
    pub(super) salt: &'a [u8],
    pub(super) tokens: &'a [u32],
    /// Blocks of the sequence, from its first on, that the caller owns.
    pub(super) held: &'a [u32],
    /// The block up to which it is loaded, where that was decided before.
    pub(super) end: Option<usize>,
    /// [`Queue::discards`](super::Queue) as it was asked for: after another one nothing is given.
    pub(super) discards: Option<u64>,
    /// Steps may run meanwhile of which nobody has told yet.
    pub(super) is_beside: bool,
    /// Whether nobody wants it any more.
    pub(super) is_over: &'a (dyn Fn() -> bool + Sync),
}

impl<'a> Call<'a> {
    /// Of somebody who does nothing else until it is there.
    pub(super) fn waiting(salt: &'a [u8], tokens: &'a [u32], held: &'a [u32]) -> Self {
        Self { salt, tokens, held, end: None, discards: None, is_beside: false, is_over: &|| false }
    }
}

impl Inner {
    /// Counts what is looked for after the first `held` blocks: how many blocks.
    pub(super) fn has_looked(&self, tokens: &[u32], held: usize) -> usize {
        let blocks = (tokens.len() / self.block_tokens).saturating_sub(held);
        self.count(|counts| counts.looked_up += blocks as u64);
        blocks
    }

    pub(super) fn load(&self, call: &Call<'_>) -> Vec<u32> {
        let Call { salt, tokens, held, .. } = *call;
        let begun = Instant::now();
        let mut keys = self.keys(salt, tokens);
        if keys.len() <= held.len() {
            return Vec::new();
        }
        keys.drain(..held.len());
        let parts = if let Some(end) = call.end {
            // Which part has them may have changed since.
            self.store.parts_of(&keys[..end.saturating_sub(held.len()).min(keys.len())])
        } else {
            self.look_for(&keys);
            self.worth_loading(tokens.len(), held.len(), &keys)
        };
        let deadline = begun + self.options.load_wait;
        if parts.is_empty() || !self.bring_rest_back(deadline) {
            return Vec::new();
        }
        let there = parts.len();
        let mut ids = vec![0_u32; there];
        if !self.cache.alloc(0, &mut ids).unwrap_or_else(|error| {
            tracing::warn!(%error, "no blocks for what a tier has");
            false
        }) {
            self.count(|counts| counts.failed += 1);
            return Vec::new();
        }
        let wanted = Wanted { call, first: held.len(), keys: &keys[..there], ids: &ids, deadline };
        let mut shares = Shares { lookup: begun.elapsed(), ..Shares::default() };
        let loaded = self.bring(&wanted, Watch::new(parts), &mut shares);
        self.give_back(&ids.split_off(loaded));
        self.let_be_found(call, &mut ids);
        let (blocks, took) = (ids.len() as u64, begun.elapsed());
        self.count(|counts| {
            counts.loaded += blocks;
            counts.loaded_bytes += ByteCount(blocks * self.block_bytes as u64);
            let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
            counts.load_us += us(took);
            counts.lookup_us += us(shares.lookup);
            counts.read_us += us(shares.read);
            counts.copy_us += us(shares.copy);
            counts.verify_us += us(shares.verify);
        });
        tracing::debug!(there, blocks, ?took, ?shares, "loaded KV blocks from a tier");
        ids
    }

    /// Which parts have the blocks of these keys, as far as they are worth loading.
    pub(super) fn worth_loading(&self, tokens: usize, held: usize, keys: &[StoreKey]) -> Vec<usize> {
        let mut parts = self.store.parts_of(keys);
        if !parts.is_empty() {
            let worth = self.choose(tokens, held, &parts);
            parts.truncate(worth);
        }
        parts
    }

    /// Seals what has come, which follows what is held. What somebody else has sealed meanwhile takes the place of a copy. If
    /// it must not be used, it is given back.
    fn let_be_found(&self, call: &Call<'_>, ids: &mut Vec<u32>) {
        if ids.is_empty() {
            return;
        }
        let mut blocks = [call.held, ids].concat();
        let sealed = &call.tokens[..blocks.len() * self.block_tokens];
        let sealed = {
            // Until it is sealed: whoever discards forgets what was sealed after that.
            let queue = self.queue.lock();
            let is_void = call.discards.is_some_and(|discards| discards != queue.discards);
            if is_void { None } else { Some(self.cache.seal(Start::Salt(call.salt), sealed, &[&blocks])) }
        };
        match sealed {
            Some(Ok(sealed)) => {
                // They came from where copies go.
                self.are_copied(|cache| cache.copied(ids));
                for copy in sealed.duplicates {
                    // Nobody may own it, and then it may be evicted at any moment.
                    if copy.at >= call.held.len() && self.cache.fork(0, &[copy.kept]).is_ok() {
                        blocks[copy.at] = copy.kept;
                        self.give_back(&[copy.given]);
                    }
                }
                ids.copy_from_slice(&blocks[call.held.len()..]);
            }
            Some(Err(error)) => {
                tracing::warn!(%error, "blocks from a tier cannot be used");
                self.give_back(&std::mem::take(ids));
            }
            None => self.give_back(&std::mem::take(ids)),
        }
    }

    /// Finds out what a tier has that knows only after it has asked, where there is one.
    pub(super) fn look_for(&self, keys: &[StoreKey]) {
        if self.store.must_look() {
            self.store.look_for(keys, self.options.load_wait / LOOK_PART);
        }
    }

    /// Brings back what of the cache itself was evicted, as the next step would: it may be what somebody owned as the model
    /// was put to sleep. Copies between blocks and host memory need the whole cache on the device.
    fn bring_rest_back(&self, deadline: Instant) -> bool {
        let region = self.cache.region();
        if region.missing_bytes().is_zero() {
            return true;
        }
        match region.restore_now(
            ByteCount(u64::MAX),
            deadline,
            &Shared::default(),
            "a prefix that a tier has",
        ) {
            Ok(_) => true,
            Err(error) => {
                tracing::debug!(%error, "the cache is not on the device, so nothing is loaded to it");
                self.count(|counts| counts.failed += 1);
                false
            }
        }
    }

    pub(super) fn give_back(&self, ids: &[u32]) {
        if ids.is_empty() {
            return;
        }
        if let Err(error) = self.cache.free(0, ids) {
            tracing::error!(%error, "blocks that a tier did not fill cannot be freed");
        }
    }
}
