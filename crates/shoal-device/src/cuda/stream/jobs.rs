//! The jobs of one stream: queued in order, ended in order, and what each holds until then.

use core::fmt;
use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::marks::{Mark, Spares};
use super::nap;
use crate::cuda::context::Context;
use crate::cuda::hash::PendingHash;
use crate::cuda::result::StreamHandle;
use crate::cuda::vmm::Block;
use crate::device::Keep;
use crate::error::DeviceError;

/// Jobs that one stream holds; a submission waits for room.
const QUEUE_DEPTH_MAX: usize = 1024;
/// How long a submission waits for room.
const SUBMIT_WAIT_MAX: Duration = Duration::from_secs(30);
/// A mark of our own after this many jobs, so that they can end without an event of the caller's.
pub(super) const JOBS_PER_MARK: u64 = 16;

/// A job that is queued or running.
pub(super) struct Entry {
    pub(super) sequence: u64,
    pub(super) hash: Option<PendingHash>,
    #[expect(dead_code, reason = "held for its Drop")]
    pub(super) keep: Keep,
}

#[derive(Default)]
pub(super) struct Pending {
    pub(super) jobs: VecDeque<Entry>,
    pub(super) marks: VecDeque<Arc<Mark>>,
    /// Jobs up to this number are done.
    pub(super) done: u64,
    /// Somebody is ending jobs.
    pub(super) is_ending: bool,
}

#[derive(Default)]
pub(super) struct Submit {
    pub(super) handle: Option<StreamHandle>,
    pub(super) submitted: u64,
    pub(super) marked: u64,
    pub(super) scratch: Option<Arc<Block>>,
}

/// What a submission may use while it queues.
pub(in crate::cuda) struct Submission<'a> {
    /// Where to queue.
    pub(in crate::cuda) stream: &'a StreamHandle,
    /// The stream's scratch memory.
    pub(in crate::cuda) scratch: &'a mut Option<Arc<Block>>,
    /// A hash whose answer is fetched when the job has ended.
    pub(in crate::cuda) hash: Option<PendingHash>,
    /// A mark is put behind it, so that whoever needs what it holds can end it as soon as it is done.
    pub(in crate::cuda) wants_mark: bool,
    /// It brings bytes to the device, and others may yield to it. Wants a mark.
    pub(in crate::cuda) is_load: bool,
    /// Something was queued, even if the submission fails in the end.
    pub(in crate::cuda) is_queued: bool,
}

pub(super) struct StreamState {
    pub(super) number: u64,
    pub(super) context: Arc<Context>,
    pub(super) spares: Arc<Spares>,
    pub(super) submit: Mutex<Submit>,
    pub(super) pending: Mutex<Pending>,
    /// Jobs up to this number have ended.
    pub(super) ended: AtomicU64,
}

impl fmt::Debug for StreamState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamState").field("number", &self.number).finish_non_exhaustive()
    }
}

/// Ends the state of ending, also when something that a job kept panics in its Drop.
struct Ending<'a>(&'a StreamState);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.pending.lock().is_ending = false;
    }
}

impl StreamState {
    /// Puts a mark behind what is queued.
    pub(super) fn mark(&self, stream: &StreamHandle, sequence: u64) -> Result<Arc<Mark>, DeviceError> {
        let event = self.spares.take()?;
        if let Err(error) = self.context.driver().event_record(&event, stream) {
            self.spares.put(event);
            return Err(error);
        }
        Ok(Mark::new(event, sequence, &self.spares))
    }

    /// Ends all jobs up to a number that is known to be done. Where another thread is at it, that one ends these too.
    pub(super) fn end_jobs(&self, done: u64) {
        let mut guard = None;
        loop {
            let mut pending = self.pending.lock();
            pending.done = pending.done.max(done);
            if guard.is_none() {
                if pending.is_ending || self.ended.load(Ordering::Relaxed) >= pending.done {
                    return;
                }
                pending.is_ending = true;
                guard = Some(Ending(self));
            }
            let done = pending.done;
            let count = pending.jobs.partition_point(|job| job.sequence <= done);
            if count == 0 {
                self.ended.store(done, Ordering::Release);
                // Under the lock, so that nobody's `done` is overlooked between this and the next.
                pending.is_ending = false;
                mem::forget(guard);
                return;
            }
            let mut ended: Vec<Entry> = pending.jobs.drain(..count).collect();
            let marks = pending.marks.partition_point(|mark| mark.sequence <= done);
            let marks: Vec<_> = pending.marks.drain(..marks).collect();
            drop(pending);
            drop(marks);
            for hash in ended.iter_mut().filter_map(|job| job.hash.take()) {
                hash.settle();
            }
            drop(ended);
        }
    }

    /// Ends what our own marks show to be done.
    pub(super) fn reap(&self) -> Result<(), DeviceError> {
        let mut done = None;
        loop {
            let first = {
                let pending = self.pending.lock();
                pending.marks.iter().find(|mark| Some(mark.sequence) > done).cloned()
            };
            match first {
                Some(mark) if mark.is_passed(self.context.driver())? => done = Some(mark.sequence),
                _ => break,
            }
        }
        if let Some(done) = done {
            self.end_jobs(done);
        }
        Ok(())
    }

    /// Waits until the queue has room.
    pub(super) fn make_room(&self) -> Result<(), DeviceError> {
        let start = Instant::now();
        loop {
            let queued = self.pending.lock().jobs.len() as u64;
            if queued < JOBS_PER_MARK {
                return Ok(());
            }
            self.reap()?;
            if self.pending.lock().jobs.len() < QUEUE_DEPTH_MAX {
                return Ok(());
            }
            let waited = start.elapsed();
            if waited >= SUBMIT_WAIT_MAX {
                let (stream, depth) = (self.number, QUEUE_DEPTH_MAX);
                return Err(DeviceError::QueueFull { stream, depth, waited: SUBMIT_WAIT_MAX });
            }
            nap(waited, SUBMIT_WAIT_MAX);
        }
    }
}

impl Drop for StreamState {
    fn drop(&mut self) {
        let pending = mem::take(self.pending.get_mut());
        if !pending.jobs.is_empty() {
            // Nobody knows that they are done, so what they touch must stay (I5).
            tracing::error!(
                stream = self.number,
                jobs = pending.jobs.len(),
                "jobs without an end were leaked"
            );
            mem::forget(pending.jobs);
        }
        if let Some(stream) = self.submit.get_mut().handle.take()
            && let Err(error) =
                self.context.bind().and_then(|_b| self.context.driver().stream_destroy(stream))
        {
            tracing::debug!(%error, "a stream could not be given back");
        }
    }
}
