//! Ahead of a load: what only slow tiers have of a sequence comes to the fastest one while its request waits for its turn.
//!
//! Apart because nobody waits for it and no block of the device is taken for it: all it does is make a later load fast. One
//! thread takes one sequence after another. What waits, what is read at a time and what is read for one sequence have bounds
//! (I10); a request that is taken back ends its own. A load that comes meanwhile waits for the same transfers, where the tier
//! is a [`Stack`](crate::store::Stack).

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::kv::prefix::Found;

use super::{Inner, KvTier, blocks_ahead};
use crate::store::{Buffer, Fetched, Ticket};

/// Sequences that may wait.
const WAITING_MAX: usize = 256;
/// How long one block may take: as long as a request may wait.
const BLOCK_WAIT: Duration = Duration::from_secs(30);
/// How often the thread looks whether what it waits for is done.
const LOOK: Duration = Duration::from_millis(1);

/// A sequence on its way up. Dropped or cancelled, it goes no further; what has begun arrives.
#[derive(Debug)]
pub struct Prefetch(Arc<AtomicBool>);

impl Prefetch {
    /// Asks no more.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.cancel();
    }
}

/// A sequence that waits.
#[derive(Debug)]
pub(super) struct Wish {
    salt: Box<[u8]>,
    tokens: Vec<u32>,
    is_over: Arc<AtomicBool>,
}

impl Wish {
    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }
}

impl KvTier {
    /// Begins to bring what slow tiers have of a sequence to the fastest one; comes back at once. None where too many wait,
    /// or the sequence has no full block.
    #[must_use]
    pub fn prefetch(&self, salt: &[u8], tokens: &[u32]) -> Option<Prefetch> {
        let inner = &self.inner;
        if tokens.len() < inner.block_tokens {
            return None;
        }
        let is_over = Arc::new(AtomicBool::new(false));
        let wish = Wish { salt: salt.into(), tokens: tokens.to_vec(), is_over: Arc::clone(&is_over) };
        let mut wishes = inner.wishes.lock();
        wishes.retain(|wish| !wish.is_over());
        if wishes.len() >= WAITING_MAX {
            return None;
        }
        wishes.push_back(wish);
        drop(wishes);
        inner.wished.notify_one();
        Some(Prefetch(is_over))
    }
}

impl Inner {
    pub(super) fn run_ahead(&self) {
        while let Some(wish) = self.next_wish() {
            self.bring_ahead(&wish);
        }
    }

    fn next_wish(&self) -> Option<Wish> {
        let mut wishes = self.wishes.lock();
        loop {
            if self.is_over() {
                return None;
            }
            match wishes.pop_front() {
                Some(wish) if wish.is_over() => {}
                Some(wish) => return Some(wish),
                None => {
                    self.wished.wait_for(&mut wishes, Duration::from_mins(1));
                }
            }
        }
    }

    fn bring_ahead(&self, wish: &Wish) {
        let keys = self.keys(&wish.salt, &wish.tokens);
        let ahead = blocks_ahead(self.payload_bytes);
        let most = (self.options.prefetch_bytes_max / self.payload_bytes).max(1);
        let mut under_way: VecDeque<(Instant, Ticket<Fetched>)> = VecDeque::new();
        let mut spare: Vec<Buffer> = Vec::new();
        let mut asked = 0;
        let lacking = &keys[self.on_device(wish).min(keys.len())..];
        self.look_for(lacking);
        for key in lacking {
            // What comes after a gap is of no use.
            if wish.is_over() || self.is_over() || asked == most || !self.store.contains(key) {
                break;
            }
            if !self.store.would_rise(key) {
                continue;
            }
            if under_way.len() >= ahead {
                match self.wait_ahead(wish, &mut under_way) {
                    Some(memory @ Buffer::Own(_)) => spare.push(memory),
                    Some(_) => {}
                    None => break,
                }
            }
            // Where the fastest tier would keep it, nothing is copied for that.
            let room = self.kept_room(key).or_else(|| spare.pop());
            let target = room.unwrap_or_else(|| Buffer::zeroed(self.payload_bytes));
            under_way.push_back((Instant::now() + BLOCK_WAIT, self.store.get(*key, target, BLOCK_WAIT)));
            asked += 1;
        }
        while !under_way.is_empty() && self.wait_ahead(wish, &mut under_way).is_some() {}
        for (_, ticket) in under_way {
            ticket.cancel();
        }
    }

    /// How many blocks of the sequence the device has.
    fn on_device(&self, wish: &Wish) -> usize {
        let mut found = Found::default();
        if let Err(error) = self.cache.find(&wish.salt, &wish.tokens, &mut found) {
            tracing::debug!(%error, "cannot look for what the device has");
            return 0;
        }
        let Some(group) = found.groups.first() else { return 0 };
        let blocks = group.blocks.len();
        self.give_back(&group.blocks);
        blocks
    }

    /// The memory of the oldest that is under way, when that is there; none when it is over or does not come.
    fn wait_ahead(
        &self,
        wish: &Wish,
        under_way: &mut VecDeque<(Instant, Ticket<Fetched>)>,
    ) -> Option<Buffer> {
        let (deadline, ticket) = under_way.pop_front()?;
        while !ticket.is_done() && Instant::now() < deadline {
            if wish.is_over() || self.is_over() {
                ticket.cancel();
                return None;
            }
            thread::sleep(LOOK);
        }
        match ticket.wait() {
            Ok(fetched) => {
                self.count(|counts| counts.prefetched += 1);
                Some(fetched.buffer)
            }
            Err(miss) => {
                tracing::debug!(%miss, "a block does not come up ahead of its request");
                None
            }
        }
    }
}
