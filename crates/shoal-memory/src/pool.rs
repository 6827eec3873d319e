//! The frame pool: memory that a region gave up and the next one may want, so that a growth need not create it.
//!
//! Apart because its frames belong to no region. They stay leased (I1), and each is here and nowhere else (I2). Creating
//! and destroying are most of what churn costs, and the driver scrubs what is destroyed; a frame that only changes hands
//! costs its mapping; it is zeroed when it comes, off the path of who grows next (docs/decisions/0006 and 0008).
//! Pools never share: a process reads no other's bytes (I12).
//!
//! What is decommitted comes here; what is evicted does not, because whoever puts a region to sleep wants the device's
//! memory for somebody else. The pool is bounded, it is the first thing that a reclaim takes, and it is emptied where a
//! lease is denied, where the device has no memory (what leaves it already is waited for), and by a sleep. What nobody took for [`PoolOptions::idle`] is given
//! back by a thread of the pool's own, in small steps, while nothing else changes memory; the thread ends when the pool
//! is empty.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;

use crate::manager::MemoryManager;
use crate::retire::{Bare, Released};

/// The share of a device that a pool holds at most, unless it is told otherwise.
const CAPACITY_PER_POOL: u64 = 16;
/// How long a frame waits for somebody to want it.
const IDLE: Duration = Duration::from_secs(1);
/// Bytes given back at a time, and the pause after that: others get at the driver in between.
const STEP_BYTES: ByteCount = ByteCount::mib(512);
const STEP_PAUSE: Duration = Duration::from_millis(1);
/// How long a trimming waits while an operation changes memory.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// How much of what regions give up is kept for the next one, and how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolOptions {
    /// The most bytes it holds; none: it keeps nothing.
    pub bytes_max: ByteCount,
    /// What nobody took for so long goes back to the device.
    pub idle: Duration,
}

impl PoolOptions {
    /// The usual values for a device of `capacity`: a sixteenth of it, for a second.
    #[must_use]
    pub const fn of(capacity: ByteCount) -> Self {
        Self { bytes_max: ByteCount(capacity.0 / CAPACITY_PER_POOL), idle: IDLE }
    }

    /// Nothing is kept.
    #[must_use]
    pub const fn off() -> Self {
        Self { bytes_max: ByteCount::ZERO, idle: Duration::ZERO }
    }
}

/// What a pool holds and has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Bytes that it holds; leased, and mapped nowhere.
    pub bytes: ByteCount,
    /// In so many frames.
    pub frames: usize,
    /// Frames that were taken from it, so that none had to be created.
    pub taken: u64,
    /// Frames that it gave back to the device.
    pub trimmed: u64,
}

#[derive(Debug)]
struct Pooled {
    bare: Bare,
    since: Instant,
}

#[derive(Debug, Default)]
struct State {
    /// By what their lease is for and by size, those that came last at the end.
    piles: BTreeMap<(LeaseKind, ByteCount), VecDeque<Pooled>>,
    usage: PoolUsage,
    /// A thread sees to what lies here too long.
    is_watched: bool,
    /// Nothing comes in any more.
    is_closed: bool,
    /// So many lots were taken out to be given back to the device, and hold their leases until they are.
    leaving: u32,
    /// So many lots have been given back.
    departed: u64,
}

/// Frames that leave the pool for the device. As long as this is there, who finds no memory knows that some is coming.
#[derive(Debug)]
struct Lot<'a> {
    pool: &'a FramePool,
    frames: Vec<Bare>,
    is_empty: bool,
}

impl Lot<'_> {
    /// Gives its frames to the device, and their leases back.
    fn destroy(mut self, manager: &MemoryManager) -> Released {
        manager.destroy(std::mem::take(&mut self.frames))
    }
}

impl Drop for Lot<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        state.leaving -= 1;
        state.departed += u64::from(!self.is_empty);
        drop(state);
        self.pool.changed.notify_all();
    }
}

impl State {
    /// The oldest of a pile, or of those that came last one that is zero or is not.
    fn pop(&mut self, key: (LeaseKind, ByteCount), newest: Option<bool>) -> Option<Bare> {
        let pile = self.piles.get_mut(&key)?;
        let pooled = match newest {
            None => pile.pop_front(),
            Some(is_zero) => match pile.iter().rposition(|pooled| pooled.bare.is_zero == is_zero) {
                Some(place) => pile.remove(place),
                None => pile.pop_back(),
            },
        };
        if pile.is_empty() {
            self.piles.remove(&key);
        }
        let Pooled { bare, .. } = pooled?;
        self.usage.bytes -= bare.lease.bytes();
        self.usage.frames -= 1;
        Some(bare)
    }

    /// What has been here longest, and since when.
    fn oldest(&self) -> Option<((LeaseKind, ByteCount), Instant)> {
        let firsts = self.piles.iter().filter_map(|(key, pile)| Some((*key, pile.front()?.since)));
        firsts.min_by_key(|(_, since)| *since)
    }
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct FramePool {
    options: PoolOptions,
    manager: Weak<MemoryManager>,
    state: Mutex<State>,
    changed: Condvar,
}

impl FramePool {
    pub(crate) fn new(options: PoolOptions, manager: Weak<MemoryManager>) -> Arc<Self> {
        Arc::new(Self { options, manager, state: Mutex::default(), changed: Condvar::new() })
    }

    pub(crate) fn usage(&self) -> PoolUsage {
        self.state.lock().usage
    }

    /// Keeps a frame that nothing touches any more; or hands it back, to be destroyed, where there is no room for it.
    pub(crate) fn put(self: &Arc<Self>, bare: Bare) -> Option<Bare> {
        let mut state = self.state.lock();
        let bytes = bare.lease.bytes();
        if state.is_closed || state.usage.bytes + bytes > self.options.bytes_max {
            return Some(bare);
        }
        let key = (bare.lease.kind(), bytes);
        state.piles.entry(key).or_default().push_back(Pooled { bare, since: Instant::now() });
        state.usage.bytes += bytes;
        state.usage.frames += 1;
        let is_unwatched = !std::mem::replace(&mut state.is_watched, true);
        drop(state);
        if is_unwatched {
            self.watch();
        }
        None
    }

    /// Bytes that it would still keep.
    pub(crate) fn room(&self) -> ByteCount {
        let state = self.state.lock();
        if state.is_closed {
            ByteCount::ZERO
        } else {
            self.options.bytes_max.saturating_sub(state.usage.bytes)
        }
    }

    /// A frame of exactly that size, on a lease of that kind: the one that came last, of those whose bytes are zero if
    /// `is_zero`, and of the others else, where there are such.
    pub(crate) fn take(&self, kind: LeaseKind, bytes: ByteCount, is_zero: bool) -> Option<Bare> {
        let mut state = self.state.lock();
        let taken = state.pop((kind, bytes), Some(is_zero));
        state.usage.taken += u64::from(taken.is_some());
        taken
    }

    /// Frames of at least `bytes` in all, or everything; long ones first.
    fn drain(&self, bytes: ByteCount) -> Lot<'_> {
        let mut state = self.state.lock();
        state.leaving += 1;
        let mut drained = Vec::new();
        let mut sum = ByteCount::ZERO;
        while sum < bytes {
            let Some(key) = state.piles.keys().max_by_key(|(_, size)| *size).copied() else { break };
            let Some(bare) = state.pop(key, None) else { break };
            sum += bare.lease.bytes();
            drained.push(bare);
        }
        state.usage.trimmed += drained.len() as u64;
        Lot { pool: self, is_empty: drained.is_empty(), frames: drained }
    }

    /// How many lots it has given back: to be asked before memory is, for [`MemoryManager::pool_gives_way`].
    pub(crate) fn departed(&self) -> u64 {
        self.state.lock().departed
    }

    /// Waits until something has come free that others took out of it; false where nothing has since there were `departed`
    /// and nothing will, or not in time.
    fn wait_for_leaving(&self, departed: u64, deadline: Instant) -> bool {
        let mut state = self.state.lock();
        while state.departed == departed {
            if state.leaving == 0 || self.changed.wait_until(&mut state, deadline).timed_out() {
                return false;
            }
        }
        true
    }

    /// Takes everything, and keeps nothing from now on.
    pub(crate) fn close(&self) -> Vec<Bare> {
        self.state.lock().is_closed = true;
        self.changed.notify_all();
        std::mem::take(&mut self.drain(ByteCount(u64::MAX)).frames)
    }

    /// Says what is wrong, if anything is.
    pub(crate) fn check_invariants(&self) -> Result<(), String> {
        let state = self.state.lock();
        let (mut bytes, mut frames) = (ByteCount::ZERO, 0);
        for ((kind, size), pile) in &state.piles {
            for Pooled { bare, .. } in pile {
                if (bare.lease.kind(), bare.lease.bytes(), bare.frame.bytes()) != (*kind, *size, *size) {
                    return Err(format!("pool: {bare:?} among frames of {size} for {kind:?} (I1, I2)"));
                }
                if Arc::strong_count(&bare.frame) != 1 {
                    return Err(format!("pool: {bare:?} is held elsewhere too (I2)"));
                }
                (bytes, frames) = (bytes + *size, frames + 1);
            }
        }
        if (bytes, frames) != (state.usage.bytes, state.usage.frames) || bytes > self.options.bytes_max {
            return Err(format!("pool: {bytes} in {frames} frames, but {:?} is told", state.usage));
        }
        Ok(())
    }

    /// Lets a thread give back what lies here too long.
    fn watch(self: &Arc<Self>) {
        let pool = Arc::clone(self);
        let watch = move || {
            while let Some(wait) = pool.step() {
                let mut state = pool.state.lock();
                if !state.is_closed {
                    pool.changed.wait_for(&mut state, wait);
                }
            }
        };
        if thread::Builder::new().name("shoal-pool".to_owned()).spawn(watch).is_err() {
            // Whatever comes next tries again; until then a reclaim takes it.
            self.state.lock().is_watched = false;
        }
    }

    /// Gives back a little of what is due. How long to wait for the next; nothing: there is nothing to wait for.
    fn step(&self) -> Option<Duration> {
        let due = {
            let mut state = self.state.lock();
            let oldest = if state.is_closed { None } else { state.oldest() };
            let Some((_, since)) = oldest else {
                state.is_watched = false;
                return None;
            };
            self.options.idle.saturating_sub(since.elapsed())
        };
        if !due.is_zero() {
            return Some(due);
        }
        // Where the manager is gone or going, it empties the pool itself.
        let Some(manager) = self.manager.upgrade() else { return Some(BUSY_PAUSE) };
        if !manager.turn().is_free() {
            return Some(BUSY_PAUSE);
        }
        // What the device refuses is told, and kept.
        let _ = self.drain_due().destroy(&manager);
        Some(STEP_PAUSE)
    }

    fn drain_due(&self) -> Lot<'_> {
        let mut state = self.state.lock();
        state.leaving += 1;
        let mut drained = Vec::new();
        let mut sum = ByteCount::ZERO;
        while sum < STEP_BYTES
            && let Some((key, since)) = state.oldest()
            && since.elapsed() >= self.options.idle
        {
            let Some(bare) = state.pop(key, None) else { break };
            sum += bare.lease.bytes();
            drained.push(bare);
        }
        state.usage.trimmed += drained.len() as u64;
        Lot { pool: self, is_empty: drained.is_empty(), frames: drained }
    }
}

impl MemoryManager {
    /// What the frame pool holds and has done.
    #[must_use]
    pub fn pool_usage(&self) -> PoolUsage {
        self.pool().usage()
    }

    /// Gives back what the frame pool holds, at least `bytes` as far as there is so much; says what came free.
    ///
    /// # Errors
    /// [`crate::MemoryError::Device`] where the device refuses; that memory is asked for again by the next operation.
    pub fn trim_pool(&self, bytes: ByteCount) -> Result<ByteCount, crate::MemoryError> {
        let Released { freed, error } = self.empty_pool(bytes);
        error.map_or(Ok(freed), Err)
    }

    pub(crate) fn empty_pool(&self, bytes: ByteCount) -> Released {
        self.pool().drain(bytes).destroy(self)
    }

    /// Empties the pool of at least `bytes`; or, where it holds nothing, waits for what leaves it already. False where
    /// nothing has come free since it had given back `departed` lots.
    pub(crate) fn pool_gives_way(&self, bytes: ByteCount, departed: u64, deadline: Instant) -> bool {
        !self.empty_pool(bytes).freed.is_zero() || self.pool().wait_for_leaving(departed, deadline)
    }
}
