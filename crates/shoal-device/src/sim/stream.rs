//! Streams and events of the simulated device.
//!
//! Apart because here are its only threads: one per stream, named, with a bounded queue (I10). A job drops what
//! it keeps when it has finished and before the next begins, so when an event is seen complete, nothing before
//! it holds anything. Kernels and copies run here and not in the caller, so an unmap that comes too early really
//! faults. A stream waits for another as long as that takes, as on a GPU; hosts wait with a deadline.

#![expect(unsafe_code, reason = "copies and hashes by address, as its unsafe callers promised it may")]

use core::any::Any;
use core::fmt;
use core::ptr;
use core::slice;
use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::io::Errno;
use shoal_core::bytes::ByteCount;
use shoal_core::ids::DeviceId;

use super::{SharedErrorLog, record};
use crate::device::{
    ForeignStream, ForeignWork, HashCell, HostFunction, Keep, RawEvent, RawSpan, RawStream, Space, VirtAddr,
};
use crate::error::DeviceError;

/// Jobs that one stream holds; a submission waits for room.
const QUEUE_DEPTH_MAX: usize = 1024;
/// How long a submission waits for room.
const SUBMIT_WAIT_MAX: Duration = Duration::from_secs(30);
/// A copy is done in steps of this size, so that a bandwidth limit is smooth.
const COPY_STEP_BYTES: u64 = 4 << 20;

/// One thing for a stream to do.
pub(super) enum Job {
    Copy {
        source: RawSpan,
        target: RawSpan,
        keep: Keep,
    },
    /// Source and target of each.
    CopyMany {
        parts: Vec<(RawSpan, RawSpan)>,
        keep: Keep,
    },
    Zero {
        at: VirtAddr,
        bytes: ByteCount,
        keep: Keep,
    },
    Hash {
        span: RawSpan,
        result: Arc<HashCell>,
        keep: Keep,
    },
    Host {
        function: HostFunction,
        keep: Keep,
    },
    Signal(Arc<Signal>),
    Wait(Arc<Signal>),
}

/// A mark that becomes complete once.
#[derive(Debug, Default)]
pub(super) struct Signal {
    is_complete: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    fn complete(&self) {
        *self.is_complete.lock() = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut is_complete = self.is_complete.lock();
        while !*is_complete {
            self.changed.wait(&mut is_complete);
        }
    }

    fn wait_for(&self, timeout: Duration) -> bool {
        let mut is_complete = self.is_complete.lock();
        if timeout.is_zero() {
            return *is_complete;
        }
        let deadline = Instant::now().checked_add(timeout);
        while !*is_complete {
            match deadline {
                Some(deadline) => {
                    if self.changed.wait_until(&mut is_complete, deadline).timed_out() {
                        break;
                    }
                }
                None => self.changed.wait(&mut is_complete),
            }
        }
        *is_complete
    }
}

/// The link between host and device: two directions, each with its own clock.
#[derive(Debug)]
struct Link {
    bytes_per_second: Option<ByteCount>,
    up_free_at: Mutex<Option<Instant>>,
    down_free_at: Mutex<Option<Instant>>,
}

impl Link {
    /// Books `bytes` on one direction and says until when they occupy it.
    fn book(&self, source: Space, target: Space, bytes: u64) -> Option<Instant> {
        let limit = self.bytes_per_second?;
        let direction = match (source, target) {
            (Space::Host, Space::Device) => &self.up_free_at,
            (Space::Device, Space::Host) => &self.down_free_at,
            _ => return None,
        };
        let duration = Duration::from_secs_f64(bytes as f64 / limit.0.max(1) as f64);
        let mut free_at = direction.lock();
        let now = Instant::now();
        let until = free_at.unwrap_or(now).max(now) + duration;
        *free_at = Some(until);
        Some(until)
    }
}

/// Jobs waiting for one stream's thread.
#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    /// A job came, or the queue closed.
    filled: Condvar,
    /// A job went.
    drained: Condvar,
}

#[derive(Default)]
struct QueueState {
    jobs: VecDeque<Job>,
    is_closed: bool,
}

impl fmt::Debug for Queue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").field("jobs", &self.state.lock().jobs.len()).finish_non_exhaustive()
    }
}

impl Queue {
    /// Adds a job, waiting at most `waited` for room. False once closed: nobody would carry it out.
    fn push(&self, stream: RawStream, job: Job, waited: Duration) -> Result<bool, DeviceError> {
        let deadline = Instant::now() + waited;
        let mut state = self.state.lock();
        while !state.is_closed && state.jobs.len() >= QUEUE_DEPTH_MAX {
            if self.drained.wait_until(&mut state, deadline).timed_out() {
                drop(state);
                // What the job keeps may call the device when dropped: not under the lock.
                drop(job);
                return Err(DeviceError::QueueFull { stream: stream.0, depth: QUEUE_DEPTH_MAX, waited });
            }
        }
        if state.is_closed {
            drop(state);
            drop(job);
            return Ok(false);
        }
        state.jobs.push_back(job);
        drop(state);
        self.filled.notify_one();
        Ok(true)
    }

    /// The next job; `None` once closed and empty.
    fn pop(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                self.drained.notify_one();
                return Some(job);
            }
            if state.is_closed {
                return None;
            }
            self.filled.wait(&mut state);
        }
    }

    fn close(&self) {
        self.state.lock().is_closed = true;
        self.filled.notify_one();
    }
}

/// All streams and events of one device object.
#[derive(Debug)]
pub(super) struct Engine {
    id: DeviceId,
    link: Arc<Link>,
    errors: SharedErrorLog,
    next_handle: AtomicU64,
    streams: Mutex<HashMap<u64, Arc<Queue>>>,
    events: Mutex<HashMap<u64, Option<Arc<Signal>>>>,
}

impl Engine {
    pub(super) fn new(id: DeviceId, copy_bandwidth: Option<ByteCount>, errors: SharedErrorLog) -> Self {
        let link = Link {
            bytes_per_second: copy_bandwidth,
            up_free_at: Mutex::new(None),
            down_free_at: Mutex::new(None),
        };
        Self {
            id,
            link: Arc::new(link),
            errors,
            next_handle: AtomicU64::new(1),
            streams: Mutex::default(),
            events: Mutex::default(),
        }
    }

    /// Streams, events.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.streams.lock().len(), self.events.lock().len())
    }

    pub(super) fn create_stream(&self) -> Result<RawStream, DeviceError> {
        let stream = RawStream(self.next_handle.fetch_add(1, Ordering::Relaxed));
        let queue = Arc::new(Queue::default());
        let worker = Worker {
            stream,
            queue: Arc::clone(&queue),
            link: Arc::clone(&self.link),
            errors: Arc::clone(&self.errors),
        };
        // Not joined: like the driver, closing a stream does not wait, and the thread holds no device.
        thread::Builder::new()
            .name(format!("shoal-sim{}-{}", self.id.0, stream.0))
            .spawn(move || worker.run())
            .map_err(|error| {
                let source = error.raw_os_error().map_or(Errno::AGAIN, Errno::from_raw_os_error);
                DeviceError::system("starting a stream's thread", source)
            })?;
        self.streams.lock().insert(stream.0, queue);
        Ok(stream)
    }

    pub(super) fn destroy_stream(&self, stream: RawStream) -> Result<(), DeviceError> {
        let queue = self.streams.lock().remove(&stream.0).ok_or_else(|| self.unknown("stream", stream.0))?;
        queue.close();
        Ok(())
    }

    pub(super) fn submit(&self, stream: RawStream, job: Job) -> Result<(), DeviceError> {
        let queue = self.streams.lock().get(&stream.0).cloned();
        let unknown = || self.unknown("stream", stream.0);
        // It may be closed by another thread after it was found.
        let is_queued = queue.ok_or_else(unknown)?.push(stream, job, SUBMIT_WAIT_MAX)?;
        if is_queued { Ok(()) } else { Err(unknown()) }
    }

    pub(super) fn create_event(&self) -> RawEvent {
        let event = RawEvent(self.next_handle.fetch_add(1, Ordering::Relaxed));
        self.events.lock().insert(event.0, None);
        event
    }

    pub(super) fn destroy_event(&self, event: RawEvent) -> Result<(), DeviceError> {
        let removed = self.events.lock().remove(&event.0);
        removed.map(|_| ()).ok_or_else(|| self.unknown("event", event.0))
    }

    pub(super) fn record(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        self.signal(event)?;
        let signal = Arc::new(Signal::default());
        self.submit(stream, Job::Signal(Arc::clone(&signal)))?;
        match self.events.lock().get_mut(&event.0) {
            Some(slot) => *slot = Some(signal),
            None => return Err(self.unknown("event", event.0)),
        }
        Ok(())
    }

    /// Somebody else's stream can only be one of ours here: a test's. All of them together are waited for by a
    /// stream that exists for nothing else.
    pub(super) fn record_foreign(&self, work: ForeignWork, event: RawEvent) -> Result<(), DeviceError> {
        self.signal(event)?;
        match work {
            ForeignWork::Of(stream) if self.streams.lock().contains_key(&stream.handle()) => {
                self.record(RawStream(stream.handle()), event)
            }
            ForeignWork::Of(_) => Ok(()),
            ForeignWork::All => {
                let streams: Vec<u64> = self.streams.lock().keys().copied().collect();
                let all = self.create_stream()?;
                for stream in streams {
                    let signal = Arc::new(Signal::default());
                    // A stream that was closed meanwhile has nothing that anybody could still wait for.
                    if self.submit(RawStream(stream), Job::Signal(Arc::clone(&signal))).is_ok() {
                        self.submit(all, Job::Wait(signal))?;
                    }
                }
                self.record(all, event)?;
                self.destroy_stream(all)
            }
        }
    }

    pub(super) fn wait_event(&self, event: RawEvent, timeout: Duration) -> Result<bool, DeviceError> {
        Ok(self.signal(event)?.is_none_or(|signal| signal.wait_for(timeout)))
    }

    pub(super) fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        match self.signal(event)? {
            Some(signal) => self.submit(stream, Job::Wait(signal)),
            None => Ok(()),
        }
    }

    /// Nobody but us has streams here.
    pub(super) fn foreign_wait(&self, _stream: ForeignStream, event: RawEvent) -> Result<bool, DeviceError> {
        self.signal(event).map(|_| false)
    }

    fn signal(&self, event: RawEvent) -> Result<Option<Arc<Signal>>, DeviceError> {
        self.events.lock().get(&event.0).cloned().ok_or_else(|| self.unknown("event", event.0))
    }

    fn unknown(&self, what: &'static str, handle: u64) -> DeviceError {
        DeviceError::UnknownHandle { device: self.id, what, handle }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for (_, queue) in self.streams.get_mut().drain() {
            queue.close();
        }
    }
}

/// What one stream's thread owns.
struct Worker {
    stream: RawStream,
    queue: Arc<Queue>,
    link: Arc<Link>,
    errors: SharedErrorLog,
}

impl Worker {
    fn run(self) {
        while let Some(job) = self.queue.pop() {
            match job {
                Job::Copy { source, target, keep } => {
                    self.copy(source, target);
                    drop(keep);
                }
                Job::CopyMany { parts, keep } => {
                    for (source, target) in parts {
                        self.copy(source, target);
                    }
                    drop(keep);
                }
                Job::Zero { at, bytes, keep } => {
                    zero(at, bytes);
                    drop(keep);
                }
                Job::Hash { span, result, keep } => {
                    result.set(hash(span));
                    drop(keep);
                }
                Job::Host { function, keep } => {
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(function)) {
                        let (stream, message) = (self.stream.0, panic_message(panic.as_ref()));
                        record(&self.errors, DeviceError::HostFunctionPanicked { stream, message });
                    }
                    drop(keep);
                }
                Job::Signal(signal) => signal.complete(),
                Job::Wait(signal) => signal.wait(),
            }
        }
    }

    fn copy(&self, source: RawSpan, target: RawSpan) {
        let total = source.bytes.0;
        let mut done = 0;
        while done < total {
            let bytes = COPY_STEP_BYTES.min(total - done);
            let occupied_until = self.link.book(source.space, target.space, bytes);
            let from = address(source.at + done).cast_const();
            let length = usize::try_from(bytes).expect("64-bit sizes");
            // SAFETY: whoever queued the job promised that both ranges are mapped until it has finished and are
            // not referenced meanwhile (contract of `Device::copy`); `copy` allows them to overlap.
            unsafe { ptr::copy(from, address(target.at + done), length) };
            if let Some(until) = occupied_until {
                thread::sleep(until.saturating_duration_since(Instant::now()));
            }
            done += bytes;
        }
    }
}

fn address(at: u64) -> *mut u8 {
    ptr::with_exposed_provenance_mut(usize::try_from(at).expect("64-bit addresses"))
}

fn zero(at: VirtAddr, bytes: ByteCount) {
    let length = usize::try_from(bytes.0).expect("64-bit sizes");
    // SAFETY: whoever queued the job promised that the range is mapped until it has finished and not referenced
    // meanwhile (contract of `Device::zero`).
    unsafe { ptr::write_bytes(address(at.0), 0, length) };
}

fn hash(span: RawSpan) -> u64 {
    let length = usize::try_from(span.bytes.0).expect("64-bit sizes");
    // SAFETY: whoever queued the job promised that the range is mapped until it has finished and that nobody
    // writes to it meanwhile (contract of `Device::hash`).
    let bytes = unsafe { slice::from_raw_parts(address(span.at).cast_const(), length) };
    crate::hash_bytes(bytes)
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "(not a text)".to_owned())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;

    #[test]
    fn a_full_queue_refuses_after_its_wait_and_drops_what_the_job_kept() {
        let (queue, stream, short) = (Queue::default(), RawStream(7), Duration::from_millis(20));
        let kept = Arc::new(());
        let job = || Job::Host { function: Box::new(|| ()), keep: Box::new(Arc::clone(&kept)) };
        for _ in 0..QUEUE_DEPTH_MAX {
            queue.push(stream, job(), Duration::ZERO).unwrap();
        }
        let refused = queue.push(stream, job(), short);
        assert_eq!(refused, Err(DeviceError::QueueFull { stream: 7, depth: QUEUE_DEPTH_MAX, waited: short }));
        assert_eq!(Arc::strong_count(&kept), QUEUE_DEPTH_MAX + 1);
        drop(queue.pop());
        queue.push(stream, job(), short).unwrap();
        queue.close();
        assert_eq!(queue.push(stream, job(), short), Ok(false), "nobody would carry it out");
        let left = std::iter::from_fn(|| queue.pop()).count();
        assert_eq!(left, QUEUE_DEPTH_MAX, "a closed queue still gives what it has");
        assert_eq!(Arc::strong_count(&kept), 1);
    }
}
