//! A load beside whatever its caller does: an engine goes on with its other requests meanwhile.
//!
//! Apart because it has a thread of its own, and because nobody but it knows its blocks until they are taken. One load runs at
//! a time, in the order of their calls, each with its own deadline from when its turn comes on; how many wait has a bound
//! (I10). When its turn comes it looks once more what the device has, as the load before it may have brought it. Where a tier
//! has to be asked what it has, another thread does that, so that who finds nothing does not wait for loads that were called
//! for before.
//!
//! **Steps that run meanwhile.** A block that is loaded to was free or cached before, so whoever had it has freed it; and
//! engines record a step before they free what it uses ([`KvCache::record_step`](super::KvCache::record_step)). The blocks are
//! allocated here before the recorded steps are read, so whichever step may still touch them is among those that the copies
//! wait for on the device, or came before one of them on its stream (I5). A step that is launched and not recorded at that
//! moment uses only what its engine owned when it launched it, which these blocks are not. The other way round, they are
//! sealed, handed over or given back only when the copies to them are done, or settled.
//!
//! **Who owns them.** This thread from before the first copy on, then the [`Loading`], then whoever takes it, each block once
//! (I7); what is not taken is given back, and what was sealed of it stays cached. Until then compaction moves nothing. The locks
//! here are held around no copy, no wait and no call of the device (I9). Whatever fails is a miss.

use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use shoal_core::kv::prefix::Found;

use super::load::Call;
use super::{Inner, KvTier};

/// Loads that may wait.
const WAITING_MAX: usize = 256;

/// What has become of a load.
#[derive(Debug)]
enum Stage {
    UnderWay,
    /// These have come, and are owned by the load.
    Done(Vec<u32>),
    /// Taken, or wanted by nobody.
    Over,
}

#[derive(Debug)]
struct Own {
    stage: Mutex<Stage>,
    changed: Condvar,
    is_cancelled: AtomicBool,
}

/// Blocks on their way to the device. Dropped, it goes no further, and what has come is given back.
#[derive(Debug)]
pub struct Loading {
    inner: Arc<Inner>,
    own: Arc<Own>,
}

/// One that waits for its turn.
#[derive(Debug)]
struct Job {
    salt: Box<[u8]>,
    tokens: Vec<u32>,
    /// So many blocks its caller has.
    held: usize,
    /// The block up to which it is loaded, where that is known.
    end: Option<usize>,
    discards: u64,
    own: Arc<Own>,
}

impl Job {
    fn is_cancelled(&self) -> bool {
        self.own.is_cancelled.load(Ordering::Relaxed)
    }
}

/// Those that wait, in their order.
#[derive(Debug, Default)]
struct Waiting {
    /// A tier is to be asked first.
    looking: VecDeque<Job>,
    loading: VecDeque<Job>,
}

/// Loads that have not begun.
#[derive(Debug, Default)]
pub(super) struct Loads {
    waiting: Mutex<Waiting>,
    asked: Condvar,
}

impl Loads {
    /// Wakes the threads to see that it is over.
    pub(super) fn end(&self) {
        // Under the lock: one that has just looked would not hear of it, and sleep for a minute.
        drop(self.waiting.lock());
        self.asked.notify_all();
    }
}

impl Loading {
    /// Whether [`take`](Self::take) gives what has come.
    #[must_use]
    pub fn is_done(&self) -> bool {
        !matches!(*self.own.stage.lock(), Stage::UnderWay)
    }

    /// Waits until it is done, until then at most. Whether it is.
    #[must_use]
    pub fn wait(&self, deadline: Instant) -> bool {
        let mut stage = self.own.stage.lock();
        while matches!(*stage, Stage::UnderWay) {
            if self.own.changed.wait_until(&mut stage, deadline).timed_out() {
                break;
            }
        }
        !matches!(*stage, Stage::UnderWay)
    }

    /// What has come in a row after the blocks that the caller has: its own from now on, and sealed. `None` while it is under
    /// way; nothing after the first time.
    #[must_use]
    pub fn take(&self) -> Option<Vec<u32>> {
        let mut stage = self.own.stage.lock();
        if matches!(*stage, Stage::UnderWay) {
            return None;
        }
        let Stage::Done(ids) = mem::replace(&mut *stage, Stage::Over) else { return Some(Vec::new()) };
        drop(stage);
        self.inner.is_in_a_table();
        Some(ids)
    }

    /// Asks no more: it ends soon, and what has come by then is given back.
    pub fn cancel(&self) {
        self.own.is_cancelled.store(true, Ordering::Relaxed);
        let stage = mem::replace(&mut *self.own.stage.lock(), Stage::Over);
        self.own.changed.notify_all();
        if let Stage::Done(ids) = stage {
            self.inner.give_back(&ids);
            self.inner.is_in_a_table();
        }
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        self.cancel();
    }
}

impl KvTier {
    /// Whether the tier has anything to give after the first `held` blocks of a sequence, as far as it knows: it may have to be
    /// asked.
    #[must_use]
    pub fn may_load(&self, salt: &[u8], tokens: &[u32], held: usize) -> bool {
        self.inner.may_load(salt, tokens, held)
    }

    /// Begins to bring back the blocks that follow the first `held` ones of `tokens`, which the caller owns, as
    /// [`load`](Self::load) does; comes back at once. Steps may run meanwhile, and blocks be taken and given back; record each
    /// step before what it uses is freed. `None`: there is nothing that is worth it, or too many wait.
    #[must_use]
    pub fn begin_load(&self, salt: &[u8], tokens: &[u32], held: usize) -> Option<Loading> {
        let inner = &self.inner;
        inner.has_looked(tokens, held);
        if self.loaders.is_empty() || !inner.may_load(salt, tokens, held) {
            return None;
        }
        let end = if inner.store.must_look() {
            None
        } else {
            let keys = inner.keys(salt, tokens);
            let parts = inner.worth_loading(tokens.len(), held, &keys[held..]);
            if parts.is_empty() {
                return None;
            }
            Some(held + parts.len())
        };
        let discards = inner.queue.lock().discards;
        let own = Arc::new(Own {
            stage: Mutex::new(Stage::UnderWay),
            changed: Condvar::new(),
            is_cancelled: AtomicBool::new(false),
        });
        let job =
            Job { salt: salt.into(), tokens: tokens.to_vec(), held, end, discards, own: Arc::clone(&own) };
        let mut waiting = inner.loads.waiting.lock();
        if waiting.looking.len() + waiting.loading.len() >= WAITING_MAX {
            drop(waiting);
            inner.count(|counts| counts.failed += 1);
            return None;
        }
        inner.cache.shared.loads.fetch_add(1, Ordering::SeqCst);
        if end.is_some() { &mut waiting.loading } else { &mut waiting.looking }.push_back(job);
        drop(waiting);
        inner.loads.asked.notify_all();
        Some(Loading { inner: Arc::clone(inner), own })
    }
}

impl Inner {
    fn may_load(&self, salt: &[u8], tokens: &[u32], held: usize) -> bool {
        let end = (held + 1) * self.block_tokens;
        tokens.len() >= end
            && (self.store.must_look()
                || self.keys(salt, &tokens[..end]).last().is_some_and(|key| self.store.contains(key)))
    }

    /// The blocks of a load are in its caller's hands, or nobody's.
    fn is_in_a_table(&self) {
        self.cache.shared.loads.fetch_sub(1, Ordering::SeqCst);
    }

    pub(super) fn run_loads(&self) {
        while let Some(job) = self.next_load(|waiting| waiting.loading.pop_front()) {
            let ids = self.load_beside(&job);
            self.have_come(&job, ids);
        }
    }

    /// Asks the tier what it has of sequences, and passes on those of which something is worth loading.
    pub(super) fn run_looks(&self) {
        while let Some(mut job) = self.next_load(|waiting| waiting.looking.pop_front()) {
            let mut parts = Vec::new();
            if !self.is_over() && !job.is_cancelled() {
                let keys = self.keys(&job.salt, &job.tokens);
                self.look_for(&keys[job.held..]);
                parts = self.worth_loading(job.tokens.len(), job.held, &keys[job.held..]);
            }
            job.end = Some(job.held + parts.len());
            let mut waiting = self.loads.waiting.lock();
            if parts.is_empty() || self.is_over() {
                drop(waiting);
                self.have_come(&job, Vec::new());
            } else {
                waiting.loading.push_back(job);
                drop(waiting);
                self.loads.asked.notify_all();
            }
        }
    }

    /// These are the load's, or nobody's where it is wanted no more.
    fn have_come(&self, job: &Job, ids: Vec<u32>) {
        let mut stage = job.own.stage.lock();
        if matches!(*stage, Stage::UnderWay) {
            *stage = Stage::Done(ids);
            drop(stage);
            job.own.changed.notify_all();
        } else {
            drop(stage);
            self.give_back(&ids);
            self.is_in_a_table();
        }
    }

    /// The next one; none when it is over, and no other waits: those end with nothing.
    fn next_load(&self, pop: impl Fn(&mut Waiting) -> Option<Job>) -> Option<Job> {
        let mut waiting = self.loads.waiting.lock();
        loop {
            if let Some(job) = pop(&mut waiting) {
                return Some(job);
            }
            if self.is_over() {
                return None;
            }
            self.loads.asked.wait_for(&mut waiting, Duration::from_mins(1));
        }
    }

    /// Loads what the device lacks still: all blocks after those that the caller has.
    fn load_beside(&self, job: &Job) -> Vec<u32> {
        let is_over = || self.is_over() || job.is_cancelled();
        if is_over() {
            return Vec::new();
        }
        let mut found = Found::default();
        if let Err(error) = self.cache.find(&job.salt, &job.tokens, &mut found) {
            tracing::warn!(%error, "cannot look for what the device has");
            return Vec::new();
        }
        let mut ids = found.groups.into_iter().next().map(|group| group.blocks).unwrap_or_default();
        if ids.len() < job.held {
            // It was forgotten meanwhile: what comes after it would not be found.
            self.give_back(&ids);
            return Vec::new();
        }
        let more = self.load(&Call {
            salt: &job.salt,
            tokens: &job.tokens,
            held: &ids,
            end: job.end,
            discards: Some(job.discards),
            is_beside: true,
            is_over: &is_over,
        });
        let after = ids.split_off(job.held);
        self.give_back(&ids);
        let ids = [after, more].concat();
        if self.queue.lock().discards != job.discards {
            self.give_back(&ids);
            return Vec::new();
        }
        ids
    }
}
