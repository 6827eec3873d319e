//! Handing copied blocks to the tier, on several threads, while the next ones are copied.
//!
//! Apart because a tier in memory takes a checksum of all of a block before it has it, on the thread that puts it, and one
//! thread sums a part of what a link brings. What is under way has a bound in bytes, and each block a deadline (I10). What is
//! discarded before its turn comes, or comes after the end, is not put.

use std::collections::VecDeque;
use std::num::NonZero;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;

use super::Inner;
use crate::store::crew::Crew;
use crate::store::{Buffer, Miss, Promise, StoreKey, Stored, Ticket};

/// Bytes that may be on their way to the tier: twice what is copied with one turn, so that the threads have the one half
/// while the other is copied, however long the blocks are.
const UNDER_WAY_BYTES_MAX: usize = 128 << 20;
/// Nobody waits for this, so half of the cores is enough; each sums about 5 GiB/s beside copies.
const THREADS_MAX: usize = 8;
/// Short blocks are handed on so many bytes at a time.
const BYTES_AT_ONCE: usize = 1 << 20;
/// How often whoever waits looks whether all of it is over.
const LOOK: Duration = Duration::from_millis(5);
/// How long the threads may take to end, which only sum and copy.
const CLOSE_WAIT: Duration = Duration::from_secs(5);

/// A block that has been copied.
pub(super) struct Copied {
    pub(super) key: StoreKey,
    /// All that is put of it.
    pub(super) payload: Buffer,
    /// It lies where the tier keeps it.
    pub(super) is_room: bool,
}

/// A block on its way to the tier.
struct Handed {
    key: StoreKey,
    payload: Buffer,
    /// [`Queue::discards`](super::Queue) as its sequence was queued.
    discards: u64,
    promise: Promise<Stored>,
}

struct UnderWay {
    ticket: Ticket<Stored>,
    deadline: Instant,
    is_room: bool,
}

/// What was handed to the tier, oldest first, and the threads that do it.
pub(super) struct Hands {
    inner: Arc<Inner>,
    /// None where no thread could be started: then the caller's does it.
    crew: Option<Crew<Vec<Handed>>>,
    under_way: VecDeque<UnderWay>,
    under_way_max: usize,
}

impl Hands {
    pub(super) fn new(inner: &Arc<Inner>) -> Self {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        let under_way_max = (UNDER_WAY_BYTES_MAX / inner.payload_bytes).max(1);
        let worker = |_| {
            let inner = Arc::clone(inner);
            move |some: Vec<Handed>| some.into_iter().for_each(|one| inner.put(one))
        };
        // No more lists wait than blocks are under way.
        let crew =
            Crew::start("shoal-kv-hands", (cores / 2).clamp(1, THREADS_MAX), under_way_max + 1, worker);
        let crew = crew.inspect_err(|error| tracing::warn!(%error, "one thread alone saves KV blocks")).ok();
        Self { inner: Arc::clone(inner), crew, under_way: VecDeque::new(), under_way_max }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.under_way.is_empty()
    }

    /// Hands blocks on, each as soon as there is room for it among those that are under way. `discards` are those that their
    /// sequence knows of.
    pub(super) fn hand_on(&mut self, blocks: impl IntoIterator<Item = Copied>, discards: u64) {
        let at_once = (BYTES_AT_ONCE / self.inner.payload_bytes).clamp(1, self.under_way_max);
        let mut some = Vec::with_capacity(at_once);
        for Copied { key, payload, is_room } in blocks {
            let wait = self.inner.options.put_wait;
            let (ticket, promise) = Ticket::new(wait);
            some.push(Handed { key, payload, discards, promise });
            self.under_way.push_back(UnderWay { ticket, deadline: Instant::now() + wait, is_room });
            if some.len() == at_once {
                self.send(std::mem::replace(&mut some, Vec::with_capacity(at_once)));
                while self.under_way.len() + at_once > self.under_way_max.max(at_once) && !self.is_idle() {
                    self.wait_for_one();
                }
            }
        }
        if !some.is_empty() {
            self.send(some);
        }
    }

    fn send(&self, some: Vec<Handed>) {
        match &self.crew {
            // What is refused is dropped, and its promises say so.
            Some(crew) => drop(crew.desk().ask(some)),
            None => some.into_iter().for_each(|one| self.inner.put(one)),
        }
    }

    /// Waits until the tier has what lies where it keeps it: whatever else it has may make room then.
    pub(super) fn wait_for_rooms(&mut self) {
        while self.under_way.iter().any(|one| one.is_room) && !self.inner.is_over() {
            self.wait_for_one();
        }
    }

    /// Waits for the oldest that is under way, unless it is over.
    pub(super) fn wait_for_one(&mut self) {
        let Some(UnderWay { ticket, deadline, .. }) = self.under_way.pop_front() else { return };
        while !self.inner.is_over() {
            let now = Instant::now();
            if ticket.is_done_by(deadline.min(now + LOOK)) || now >= deadline {
                break;
            }
        }
        if self.inner.is_over() && !ticket.is_done() {
            return;
        }
        let bytes = self.inner.block_bytes as u64;
        match ticket.wait() {
            Ok(Stored::Written) => self.inner.count(|counts| {
                counts.saved += 1;
                counts.saved_bytes += ByteCount(bytes);
            }),
            Ok(Stored::Already) => {}
            Err(miss) => {
                tracing::debug!(%miss, "a block is not saved");
                self.inner.count(|counts| counts.unsaved += 1);
            }
        }
    }
}

impl Drop for Hands {
    fn drop(&mut self) {
        if self.crew.as_ref().is_some_and(|crew| !crew.close(CLOSE_WAIT)) {
            tracing::warn!("a tier keeps threads that hand it blocks for long");
        }
    }
}

impl Inner {
    /// Gives a block to the tier, unless nobody wants that any more.
    fn put(&self, handed: Handed) {
        let Handed { key, payload, discards, promise } = handed;
        let left = promise.deadline().saturating_duration_since(Instant::now());
        let over = if self.is_over() || promise.is_cancelled() || self.queue.lock().discards != discards {
            Some(Miss::Cancelled)
        } else {
            left.is_zero().then_some(Miss::Deadline)
        };
        if let Some(miss) = over {
            // Before anybody hears of it: the memory is free then.
            drop(payload);
            return promise.answer(Err(miss));
        }
        self.store.put(key, payload, self.payload_bytes, left).then(move |answer| promise.answer(answer));
    }
}
