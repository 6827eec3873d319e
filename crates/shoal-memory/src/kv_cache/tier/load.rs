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

impl Inner {
    pub(super) fn load(&self, salt: &[u8], tokens: &[u32], held: &[u32]) -> Vec<u32> {
        let full = tokens.len() / self.block_tokens;
        let Some(looked_up) = full.checked_sub(held.len()).filter(|blocks| *blocks > 0) else {
            return Vec::new();
        };
        self.count(|counts| counts.looked_up += looked_up as u64);
        let begun = Instant::now();
        let mut keys = self.keys(salt, tokens);
        keys.drain(..held.len());
        self.look_for(&keys);
        let mut parts = self.store.parts_of(&keys);
        let there = if parts.is_empty() { 0 } else { self.choose(tokens.len(), held.len(), &parts) };
        if there == 0 {
            return Vec::new();
        }
        parts.truncate(there);
        let deadline = begun + self.options.load_wait;
        if !self.bring_rest_back(deadline) {
            return Vec::new();
        }
        let mut ids = vec![0_u32; there];
        if !self.cache.alloc(0, &mut ids).unwrap_or_else(|error| {
            tracing::warn!(%error, "no blocks for what a tier has");
            false
        }) {
            self.count(|counts| counts.failed += 1);
            return Vec::new();
        }
        let wanted = Wanted { tokens, first: held.len(), keys: &keys[..there], ids: &ids, deadline };
        let mut shares = Shares { lookup: begun.elapsed(), ..Shares::default() };
        let loaded = self.bring(&wanted, Watch::new(parts), &mut shares);
        self.give_back(&ids.split_off(loaded));
        if !ids.is_empty() {
            let blocks = [held, &ids].concat();
            let sealed = &tokens[..blocks.len() * self.block_tokens];
            if let Err(error) = self.cache.seal(Start::Salt(salt), sealed, &[&blocks]) {
                tracing::warn!(%error, "blocks from a tier cannot be used");
                self.give_back(&std::mem::take(&mut ids));
            }
            // They came from where copies go.
            self.are_copied(|cache| cache.copied(&ids));
        }
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
        tracing::debug!(looked_up, there, blocks, ?took, ?shares, "loaded KV blocks from a tier");
        ids
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
