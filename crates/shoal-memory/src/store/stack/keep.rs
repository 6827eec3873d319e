//! One block on its way down, to several tiers.
//!
//! Apart because it makes copies, and those have a bound. A tier that holds blocks in memory is given a copy that it keeps
//! as it is; the last tier is given the source itself, so that a disk writes from where the block lies.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_device::HostBuffer;

use super::super::{Aligned, Buffer, Miss, Promise, StoreKey, Stored};
use super::{Shared, State};

/// A block to be kept.
pub(super) struct PutJob {
    pub(super) key: StoreKey,
    pub(super) source: Buffer,
    pub(super) bytes: usize,
    /// By which tiers, by bits.
    pub(super) admitted: u64,
    /// In the order of puts, so that a removal means those before it.
    pub(super) number: u64,
    pub(super) promise: Promise<Stored>,
}

impl PutJob {
    pub(super) fn refuse(self, miss: Miss) {
        let Self { source, promise, .. } = self;
        drop(source);
        promise.answer(Err(miss));
    }
}

/// Puts of one block that have not reached the tiers yet.
#[derive(Default)]
pub(super) struct Coming {
    count: usize,
    /// The number of the last of them.
    newest: u64,
    /// Those with a lower number were removed.
    removed_before: u64,
}

impl State {
    /// The number of a put that begins.
    pub(super) fn begin_put(&mut self, key: StoreKey) -> u64 {
        self.put_next += 1;
        let coming = self.coming.entry(key).or_default();
        coming.count += 1;
        coming.newest = self.put_next;
        self.put_next
    }

    /// Whether it was removed while puts of it were on their way, and not put since: what of it is in a tier still goes.
    pub(super) fn is_going(&self, key: &StoreKey) -> bool {
        self.coming.get(key).is_some_and(|coming| coming.newest < coming.removed_before)
    }

    fn is_removed(&self, key: &StoreKey, number: u64) -> bool {
        self.coming.get(key).is_some_and(|coming| number < coming.removed_before)
    }

    pub(super) fn end_put(&mut self, key: &StoreKey) {
        if let Some(coming) = self.coming.get_mut(key) {
            coming.count -= 1;
            if coming.count == 0 {
                self.coming.remove(key);
            }
        }
    }

    pub(super) fn remove_coming(&mut self, key: &StoreKey) {
        let next = self.put_next + 1;
        if let Some(coming) = self.coming.get_mut(key) {
            coming.removed_before = next;
        }
    }
}

/// A block for one more tier.
pub(super) struct Copied {
    memory: Buffer,
    bytes: usize,
    /// Bytes of a copy on its way; none where the memory is shared.
    counted: u64,
}

/// The answers of all tiers so far.
struct Answers {
    promise: Option<Promise<Stored>>,
    left: usize,
}

impl Answers {
    /// The first tier that has it answers; the last one that does not, if none has.
    fn saw(&mut self, answer: Result<Stored, Miss>) {
        self.left -= 1;
        if answer.is_err() && self.left > 0 {
            return;
        }
        if let Some(promise) = self.promise.take() {
            promise.answer(answer);
        }
    }
}

impl Shared {
    /// Gives a block to the tiers that admitted it.
    pub(super) fn keep(&self, job: PutJob) {
        let (key, number) = (job.key, job.number);
        let over = if job.promise.is_cancelled() || self.state.lock().is_removed(&key, number) {
            Some(Miss::Cancelled)
        } else {
            (job.promise.deadline() <= Instant::now()).then_some(Miss::Deadline)
        };
        match over {
            Some(miss) => job.refuse(miss),
            None => self.keep_in_tiers(job),
        }
        // What was removed while it was given to the tiers goes again, and until then nobody is served it; what is removed
        // later goes by itself.
        let is_removed = self.state.lock().is_removed(&key, number);
        if is_removed {
            self.take_back(key);
        }
        self.state.lock().end_put(&key);
    }

    /// Removes from every tier a block that came there in spite of its removal.
    pub(super) fn take_back(&self, key: StoreKey) {
        for tier in &self.tiers {
            drop(tier.remove(key, self.options.promote_deadline));
        }
    }

    fn keep_in_tiers(&self, job: PutJob) {
        let PutJob { key, source, bytes, admitted, promise, .. } = job;
        let is_wanted = |index: &usize| admitted >> index & 1 == 1 && !self.tiers[*index].contains(&key);
        let wanted: Vec<usize> = (0..self.tiers.len()).filter(is_wanted).collect();
        let Some((last, others)) = wanted.split_last() else {
            let is_there = self.tiers.iter().any(|tier| tier.contains(&key));
            let reason = "no tier admitted it".to_owned();
            drop(source);
            return promise.answer(if is_there { Ok(Stored::Already) } else { Err(Miss::NoRoom { reason }) });
        };
        let left = promise.deadline().saturating_duration_since(Instant::now());
        let answers = Arc::new(Mutex::new(Answers { promise: Some(promise), left: wanted.len() }));
        let (source, is_shared) = self.shared(source);
        let memory = is_shared.then_some(&source);
        let copy = |index: &usize| (*index, self.copy(&source.as_slice()[..bytes], memory));
        let copies: Vec<_> = others.iter().map(copy).collect();
        // First to the slowest: whoever hears that the block is kept may flush at once, and that is to reach it there too.
        let (state, last, saw) = (Arc::clone(&self.state), *last, Arc::clone(&answers));
        self.tiers[last].put(key, source, bytes, left).then(move |answer| {
            state.lock().count_put(last, &answer, bytes, false);
            saw.lock().saw(answer);
        });
        for (index, copy) in copies {
            let saw = Arc::clone(&answers);
            if let Some(copy) = copy {
                self.put_to(index, key, copy, left, false, move |answer| saw.lock().saw(answer));
            } else {
                let reason = "too many copies are under way".to_owned();
                saw.lock().saw(Err(Miss::NoRoom { reason }));
            }
        }
    }

    /// Memory that is a tier's own can be had by several, and is not copied for the tier that keeps blocks there. Whether it is.
    pub(super) fn shared(&self, memory: Buffer) -> (Buffer, bool) {
        let is_own = |host: &Arc<HostBuffer>| self.tiers.iter().any(|tier| tier.is_own(host));
        if memory.host().is_some_and(is_own) { (memory.shared(), true) } else { (memory, false) }
    }

    /// Another hold of the memory that a block lies in, or else a copy of it, if there may be one more.
    pub(super) fn copy(&self, block: &[u8], memory: Option<&Buffer>) -> Option<Copied> {
        if let Some(memory) = memory.and_then(Buffer::again) {
            return Some(Copied { memory, bytes: block.len(), counted: 0 });
        }
        let bytes = block.len() as u64;
        let mut state = self.state.lock();
        if state.copy_bytes > 0 && state.copy_bytes + bytes > self.options.copy_bytes_max.0 {
            state.counts.copies_refused += 1;
            return None;
        }
        state.copy_bytes += bytes;
        drop(state);
        let memory = Buffer::Own(Aligned::copy_of(block));
        Some(Copied { memory, bytes: block.len(), counted: bytes })
    }

    /// Gives a copy to a tier.
    pub(super) fn put_to(
        &self,
        index: usize,
        key: StoreKey,
        copy: Copied,
        deadline: Duration,
        is_promoted: bool,
        then: impl FnOnce(Result<Stored, Miss>) + Send + 'static,
    ) {
        let Copied { memory, bytes, counted } = copy;
        // Not the tiers: the last of a disk must not go on the disk's own thread.
        let state = Arc::clone(&self.state);
        self.tiers[index].put(key, memory, bytes, deadline).then(move |answer| {
            let mut state = state.lock();
            state.copy_bytes -= counted;
            state.count_put(index, &answer, bytes, is_promoted);
            drop(state);
            then(answer);
        });
    }
}

impl State {
    fn count_put(&mut self, index: usize, answer: &Result<Stored, Miss>, bytes: usize, is_promoted: bool) {
        let counts = &mut self.counts.tiers[index];
        match answer {
            Ok(Stored::Written) => {
                counts.written += 1;
                counts.written_bytes += bytes as u64;
                counts.promoted += u64::from(is_promoted);
            }
            Ok(Stored::Already) => {}
            Err(_) => counts.refused += 1,
        }
    }
}
