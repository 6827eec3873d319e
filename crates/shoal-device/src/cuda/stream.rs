//! Streams, events, and what a queued job holds.
//!
//! Apart because the driver knows nothing of what a job keeps alive. Each stream has a list of its jobs in order;
//! a mark (an event of the driver's) stands for all jobs up to a number. Whoever finds a mark done ends the jobs
//! before it: hashes are fetched, then what the jobs kept is dropped, on that caller's thread and never on the
//! driver's. An event is reported complete only when the jobs before it have ended. A closed stream's last jobs
//! are ended by the janitor, a thread that exists from the first such stream on and sleeps while there is none.
//!
//! The lock `submit` of a stream is held across the call that queues, which is what makes the list's order the
//! stream's; nobody else takes it. No other lock is held while the driver is called or a job's things are dropped.

#![expect(unsafe_code, reason = "hands a boxed function through the driver")]

use core::any::Any;
use core::ffi::c_void;
use core::fmt;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::collections::{HashMap, VecDeque};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::Errno;

use super::context::Context;
use super::hash::PendingHash;
use super::result::{Driver, EventHandle, StreamHandle, is_capture};
use super::vmm::Block;
use super::{SharedErrorLog, record};
use crate::device::{ForeignStream, ForeignWork, HostFunction, Keep, RawEvent, RawStream};
use crate::error::DeviceError;

/// Jobs that one stream holds; a submission waits for room.
const QUEUE_DEPTH_MAX: usize = 1024;
/// How long a submission waits for room.
const SUBMIT_WAIT_MAX: Duration = Duration::from_secs(30);
/// A mark of our own after this many jobs, so that they can end without an event of the caller's.
const JOBS_PER_MARK: u64 = 16;
/// Driver events kept for the next marks.
const SPARES_MAX: usize = 256;
/// A wait asks in a loop for this long, then sleeps between questions.
const EAGER_WAIT: Duration = Duration::from_micros(30);
const NAP_MIN: Duration = Duration::from_micros(20);
const NAP_MAX: Duration = Duration::from_micros(500);
/// How often the janitor asks while it has something to ask about.
const JANITOR_NAP: Duration = Duration::from_millis(5);

/// Sleeps a little, in proportion to how long one has waited: late by a sixteenth at most, or by [`NAP_MAX`].
fn nap(waited: Duration, left: Duration) {
    if waited < EAGER_WAIT {
        thread::yield_now();
    } else {
        thread::sleep((waited / 16).clamp(NAP_MIN, NAP_MAX).min(left));
    }
}

/// Events of the driver's that no mark uses now.
#[derive(Debug)]
struct Spares {
    context: Arc<Context>,
    events: Mutex<Vec<EventHandle>>,
}

impl Spares {
    fn take(&self) -> Result<EventHandle, DeviceError> {
        let spare = self.events.lock().pop();
        spare.map_or_else(|| self.context.driver().event_create(), Ok)
    }

    fn put(&self, event: EventHandle) {
        let mut events = self.events.lock();
        if events.len() < SPARES_MAX {
            events.push(event);
            return;
        }
        drop(events);
        self.destroy(vec![event]);
    }

    fn destroy(&self, events: Vec<EventHandle>) {
        let outcome = self.context.bind().and_then(|_bound| {
            events.into_iter().try_for_each(|event| self.context.driver().event_destroy(event))
        });
        if let Err(error) = outcome {
            tracing::debug!(%error, "an event could not be given back");
        }
    }
}

impl Drop for Spares {
    fn drop(&mut self) {
        let events = mem::take(self.events.get_mut());
        self.destroy(events);
    }
}

/// A point of a stream: everything up to job number `sequence`.
#[derive(Debug)]
struct Mark {
    event: Option<EventHandle>,
    sequence: u64,
    is_done: AtomicBool,
    spares: Arc<Spares>,
}

impl Mark {
    /// Whether the stream has passed it. Needs a bound thread.
    fn is_passed(&self, driver: Driver) -> Result<bool, DeviceError> {
        if self.is_done.load(Ordering::Acquire) {
            return Ok(true);
        }
        let Some(event) = &self.event else { return Ok(true) };
        let is_passed = driver.event_query(event)?;
        if is_passed {
            self.is_done.store(true, Ordering::Release);
        }
        Ok(is_passed)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        // It may be recorded again while a stream still waits for it: that wait is for the old record.
        if let Some(event) = self.event.take() {
            self.spares.put(event);
        }
    }
}

/// A job that is queued or running.
struct Entry {
    sequence: u64,
    hash: Option<PendingHash>,
    #[expect(dead_code, reason = "held for its Drop")]
    keep: Keep,
}

#[derive(Default)]
struct Pending {
    jobs: VecDeque<Entry>,
    marks: VecDeque<Arc<Mark>>,
    /// Jobs up to this number are done.
    done: u64,
    /// Somebody is ending jobs.
    is_ending: bool,
}

#[derive(Default)]
struct Submit {
    handle: Option<StreamHandle>,
    submitted: u64,
    marked: u64,
    scratch: Option<Arc<Block>>,
}

/// What a submission may use while it queues.
pub(super) struct Submission<'a> {
    /// Where to queue.
    pub(super) stream: &'a StreamHandle,
    /// The stream's scratch memory.
    pub(super) scratch: &'a mut Option<Arc<Block>>,
    /// A hash whose answer is fetched when the job has ended.
    pub(super) hash: Option<PendingHash>,
    /// Something was queued, even if the submission fails in the end.
    pub(super) is_queued: bool,
}

struct StreamState {
    number: u64,
    context: Arc<Context>,
    spares: Arc<Spares>,
    submit: Mutex<Submit>,
    pending: Mutex<Pending>,
    /// Jobs up to this number have ended.
    ended: AtomicU64,
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
    fn mark(&self, stream: &StreamHandle, sequence: u64) -> Result<Arc<Mark>, DeviceError> {
        let event = self.spares.take()?;
        if let Err(error) = self.context.driver().event_record(&event, stream) {
            self.spares.put(event);
            return Err(error);
        }
        let (event, spares) = (Some(event), Arc::clone(&self.spares));
        Ok(Arc::new(Mark { event, sequence, is_done: AtomicBool::new(false), spares }))
    }

    /// Ends all jobs up to a number that is known to be done. Where another thread is at it, that one ends these too.
    fn end_jobs(&self, done: u64) {
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
    fn reap(&self) -> Result<(), DeviceError> {
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
    fn make_room(&self) -> Result<(), DeviceError> {
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

/// What an event stands for.
#[derive(Clone, Debug)]
struct Recorded {
    /// Our own; nothing of ours ends with a mark of others' work.
    stream: Option<Arc<StreamState>>,
    mark: Arc<Mark>,
}

impl Recorded {
    /// Ends the jobs before it if it is passed, and says whether they have ended.
    fn is_complete(&self) -> Result<bool, DeviceError> {
        let sequence = self.mark.sequence;
        let context = &self.mark.spares.context;
        let bound = context.bind()?;
        if !self.mark.is_passed(context.driver())? {
            return Ok(false);
        }
        drop(bound);
        let Some(stream) = &self.stream else { return Ok(true) };
        stream.end_jobs(sequence);
        Ok(stream.ended.load(Ordering::Acquire) >= sequence)
    }
}

/// All streams and events of one device object.
#[derive(Debug)]
pub(super) struct Engine {
    context: Arc<Context>,
    errors: SharedErrorLog,
    spares: Arc<Spares>,
    next_handle: AtomicU64,
    streams: Mutex<HashMap<u64, Arc<StreamState>>>,
    events: Mutex<HashMap<u64, Option<Recorded>>>,
    janitor: Mutex<Option<mpsc::Sender<Recorded>>>,
}

impl Engine {
    pub(super) fn new(context: Arc<Context>, errors: SharedErrorLog) -> Self {
        let spares = Arc::new(Spares { context: Arc::clone(&context), events: Mutex::default() });
        Self {
            context,
            errors,
            spares,
            next_handle: AtomicU64::new(1),
            streams: Mutex::default(),
            events: Mutex::default(),
            janitor: Mutex::default(),
        }
    }

    /// Streams, events.
    pub(super) fn count(&self) -> (usize, usize) {
        (self.streams.lock().len(), self.events.lock().len())
    }

    fn unknown(&self, what: &'static str, handle: u64) -> DeviceError {
        DeviceError::UnknownHandle { device: self.context.id(), what, handle }
    }

    fn stream(&self, stream: RawStream) -> Result<Arc<StreamState>, DeviceError> {
        self.streams.lock().get(&stream.0).cloned().ok_or_else(|| self.unknown("stream", stream.0))
    }

    pub(super) fn create_stream(&self) -> Result<RawStream, DeviceError> {
        let handle = {
            let _bound = self.context.bind()?;
            self.context.driver().stream_create()?
        };
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        let state = StreamState {
            number,
            context: Arc::clone(&self.context),
            spares: Arc::clone(&self.spares),
            submit: Mutex::new(Submit { handle: Some(handle), ..Submit::default() }),
            pending: Mutex::default(),
            ended: AtomicU64::new(0),
        };
        self.streams.lock().insert(number, Arc::new(state));
        Ok(RawStream(number))
    }

    pub(super) fn destroy_stream(&self, stream: RawStream) -> Result<(), DeviceError> {
        let state = self.streams.lock().remove(&stream.0).ok_or_else(|| self.unknown("stream", stream.0))?;
        let _bound = self.context.bind()?;
        let mut submit = state.submit.lock();
        let Some(handle) = submit.handle.take() else { return Ok(()) };
        let (scratch, sequence) = (submit.scratch.take(), submit.submitted);
        let last = state.mark(&handle, sequence);
        drop(submit);
        drop(scratch);
        let outcome = last.and_then(|mark| self.tidy_up(&state, mark));
        if let Err(cause) = outcome {
            let jobs = state.pending.lock().jobs.len();
            if jobs > 0 {
                let (what, cause) = ("the jobs of a stream", Box::new(cause));
                record(&self.errors, DeviceError::Leaked { what, handle: stream.0, cause });
            }
        }
        self.context.driver().stream_destroy(handle)
    }

    /// Ends the jobs of a closed stream, now or by the janitor.
    fn tidy_up(&self, stream: &Arc<StreamState>, mark: Arc<Mark>) -> Result<(), DeviceError> {
        let last = Recorded { stream: Some(Arc::clone(stream)), mark };
        if stream.pending.lock().jobs.is_empty() || last.is_complete()? {
            return Ok(());
        }
        let mut janitor = self.janitor.lock();
        let sender = match janitor.take() {
            Some(sender) => sender,
            None => start_janitor(self.context.id().0, &self.errors)?,
        };
        // The other end lives until every sender is gone.
        let _ = sender.send(last);
        *janitor = Some(sender);
        Ok(())
    }

    /// Queues a job by `enqueue`, which must say whether it queued something. On an error `keep` is dropped,
    /// unless part of the job is queued.
    pub(super) fn submit(
        &self,
        stream: RawStream,
        keep: Keep,
        enqueue: impl FnOnce(&mut Submission<'_>) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let state = self.stream(stream)?;
        let _bound = self.context.bind()?;
        state.make_room()?;
        let mut guard = state.submit.lock();
        let submit = &mut *guard;
        let Some(handle) = &submit.handle else {
            drop(guard);
            return Err(self.unknown("stream", stream.0));
        };
        let mut submission =
            Submission { stream: handle, scratch: &mut submit.scratch, hash: None, is_queued: false };
        let outcome = enqueue(&mut submission);
        let Submission { hash, is_queued, .. } = submission;
        if outcome.is_err() && !is_queued {
            drop(guard);
            // What the job kept may call the device when dropped: after the lock.
            drop((hash, keep));
            return outcome;
        }
        submit.submitted += 1;
        let sequence = submit.submitted;
        state.pending.lock().jobs.push_back(Entry { sequence, hash, keep });
        if sequence - submit.marked >= JOBS_PER_MARK {
            // Without it the next one stands for these jobs too.
            match state.mark(handle, sequence) {
                Ok(mark) => {
                    submit.marked = sequence;
                    state.pending.lock().marks.push_back(mark);
                }
                Err(error) => tracing::debug!(%error, "a stream could not be marked"),
            }
        }
        outcome
    }

    /// Queues a function of the host.
    pub(super) fn launch_host(
        &self,
        stream: RawStream,
        function: HostFunction,
        keep: Keep,
    ) -> Result<(), DeviceError> {
        let driver = self.context.driver();
        let call = HostCall { function, stream: stream.0, errors: Arc::clone(&self.errors) };
        self.submit(stream, keep, |submission| {
            let data = Box::into_raw(Box::new(call)).cast::<c_void>();
            // SAFETY: `run_host_call` takes the box back, once; the trait forbids the function to call the device.
            let launched = unsafe { driver.launch_host(submission.stream, run_host_call, data) };
            if launched.is_err() {
                // SAFETY: from `into_raw` above; the driver refused it and will not call.
                drop(unsafe { Box::from_raw(data.cast::<HostCall>()) });
            }
            launched
        })
    }

    #[expect(clippy::unnecessary_wraps, reason = "the driver's event is made when it is first recorded")]
    pub(super) fn create_event(&self) -> Result<RawEvent, DeviceError> {
        let event = RawEvent(self.next_handle.fetch_add(1, Ordering::Relaxed));
        self.events.lock().insert(event.0, None);
        Ok(event)
    }

    pub(super) fn destroy_event(&self, event: RawEvent) -> Result<(), DeviceError> {
        let removed = self.events.lock().remove(&event.0);
        removed.map(|_| ()).ok_or_else(|| self.unknown("event", event.0))
    }

    fn recorded(&self, event: RawEvent) -> Result<Option<Recorded>, DeviceError> {
        self.events.lock().get(&event.0).cloned().ok_or_else(|| self.unknown("event", event.0))
    }

    pub(super) fn record(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        let state = self.stream(stream)?;
        self.recorded(event)?;
        let _bound = self.context.bind()?;
        let mark = {
            let submit = state.submit.lock();
            let handle = submit.handle.as_ref().ok_or_else(|| self.unknown("stream", stream.0))?;
            state.mark(handle, submit.submitted)?
        };
        self.set_recorded(event, Recorded { stream: Some(state), mark })
    }

    fn set_recorded(&self, event: RawEvent, recorded: Recorded) -> Result<(), DeviceError> {
        let replaced = match self.events.lock().get_mut(&event.0) {
            Some(slot) => slot.replace(recorded),
            None => return Err(self.unknown("event", event.0)),
        };
        drop(replaced);
        Ok(())
    }

    /// Marks what others have queued.
    pub(super) fn record_foreign(&self, work: ForeignWork, event: RawEvent) -> Result<(), DeviceError> {
        self.recorded(event)?;
        let (driver, capturing) =
            (self.context.driver(), DeviceError::Capturing { device: self.context.id() });
        let _bound = self.context.bind()?;
        let handle = self.spares.take()?;
        let marked = match work {
            ForeignWork::Of(stream) => match driver.is_capturing(stream) {
                Ok(true) => Err(capturing.clone()),
                Ok(false) => driver.event_record_foreign(&handle, stream),
                Err(error) => Err(error),
            },
            ForeignWork::All => driver.context_record(self.context.handle(), &handle).and_then(|is_marked| {
                // An event that was never recorded is complete, which is right after the wait.
                if is_marked { Ok(()) } else { driver.context_synchronize() }
            }),
        };
        if let Err(error) = marked {
            self.spares.put(handle);
            return Err(if is_capture(&error) { capturing } else { error });
        }
        let (event_handle, spares) = (Some(handle), Arc::clone(&self.spares));
        let mark = Mark { event: event_handle, sequence: 0, is_done: AtomicBool::new(false), spares };
        self.set_recorded(event, Recorded { stream: None, mark: Arc::new(mark) })
    }

    pub(super) fn query_event(&self, event: RawEvent) -> Result<bool, DeviceError> {
        self.recorded(event)?.map_or(Ok(true), |recorded| recorded.is_complete())
    }

    pub(super) fn wait_event(&self, event: RawEvent, timeout: Duration) -> Result<bool, DeviceError> {
        let Some(recorded) = self.recorded(event)? else { return Ok(true) };
        let start = Instant::now();
        loop {
            if recorded.is_complete()? {
                return Ok(true);
            }
            let waited = start.elapsed();
            if waited >= timeout {
                return Ok(false);
            }
            nap(waited, timeout.saturating_sub(waited));
        }
    }

    pub(super) fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        let state = self.stream(stream)?;
        let Some(recorded) = self.recorded(event)? else { return Ok(()) };
        let Some(mark) = &recorded.mark.event else { return Ok(()) };
        let _bound = self.context.bind()?;
        let submit = state.submit.lock();
        let handle = submit.handle.as_ref().ok_or_else(|| self.unknown("stream", stream.0))?;
        self.context.driver().stream_wait_event(handle, mark)
    }

    pub(super) fn foreign_wait(&self, stream: ForeignStream, event: RawEvent) -> Result<bool, DeviceError> {
        let recorded = self.recorded(event)?;
        let (driver, capturing) =
            (self.context.driver(), DeviceError::Capturing { device: self.context.id() });
        let _bound = self.context.bind()?;
        if driver.is_capturing(stream)? {
            return Err(capturing);
        }
        let Some(mark) = recorded.as_ref().and_then(|recorded| recorded.mark.event.as_ref()) else {
            return Ok(true);
        };
        match driver.foreign_wait_event(stream, mark) {
            Ok(()) => Ok(true),
            Err(error) => Err(if is_capture(&error) { capturing } else { error }),
        }
    }
}

/// What travels through the driver to its thread.
struct HostCall {
    function: HostFunction,
    stream: u64,
    errors: SharedErrorLog,
}

/// The driver's thread comes here; a panic must not go back into it.
unsafe extern "C" fn run_host_call(data: *mut c_void) {
    // SAFETY: `launch_host` gave this box away, and the driver calls once.
    let call = unsafe { Box::from_raw(data.cast::<HostCall>()) };
    let HostCall { function, stream, errors } = *call;
    if let Err(panic) = catch_unwind(AssertUnwindSafe(function)) {
        let message = panic_message(panic.as_ref());
        record(&errors, DeviceError::HostFunctionPanicked { stream, message });
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "(not a text)".to_owned())
}

/// A thread that ends the jobs of closed streams; it ends itself when the device object is gone.
fn start_janitor(ordinal: u32, errors: &SharedErrorLog) -> Result<mpsc::Sender<Recorded>, DeviceError> {
    let (sender, closed) = mpsc::channel::<Recorded>();
    let errors = Arc::clone(errors);
    let run = move || {
        let mut waiting: Vec<Recorded> = Vec::new();
        loop {
            if waiting.is_empty() {
                match closed.recv() {
                    Ok(first) => waiting.push(first),
                    Err(_) => return,
                }
            }
            waiting.extend(closed.try_iter());
            waiting.retain(|last| match last.is_complete() {
                Ok(is_complete) => !is_complete,
                Err(cause) => {
                    let (what, handle) =
                        ("the jobs of a stream", last.stream.as_ref().map_or(0, |one| one.number));
                    record(&errors, DeviceError::Leaked { what, handle, cause: Box::new(cause) });
                    false
                }
            });
            if !waiting.is_empty() {
                thread::sleep(JANITOR_NAP);
            }
        }
    };
    thread::Builder::new().name(format!("shoal-cuda{ordinal}-end")).spawn(run).map(|_| sender).map_err(
        |error| {
            let source = error.raw_os_error().map_or(Errno::AGAIN, Errno::from_raw_os_error);
            DeviceError::system("starting a device's thread", source)
        },
    )
}
