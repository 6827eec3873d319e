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

mod host;
mod janitor;
mod jobs;
mod marks;

use core::ffi::c_void;
use core::sync::atomic::{AtomicU64, Ordering};
use std::collections::HashMap;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use host::{HostCall, run_host_call};
use janitor::start_janitor;
pub(super) use jobs::Submission;
use jobs::{Entry, StreamState, Submit};
use marks::{Mark, Spares};
use parking_lot::Mutex;

use super::context::Context;
use super::result::is_capture;
use super::{SharedErrorLog, record};
use crate::device::{ForeignStream, ForeignWork, HostFunction, Keep, RawEvent, RawStream};
use crate::error::DeviceError;

/// A wait asks in a loop for this long, then sleeps between questions.
const EAGER_WAIT: Duration = Duration::from_micros(30);
const NAP_MIN: Duration = Duration::from_micros(20);
const NAP_MAX: Duration = Duration::from_micros(500);

/// Sleeps a little, in proportion to how long one has waited: late by a sixteenth at most, or by [`NAP_MAX`].
fn nap(waited: Duration, left: Duration) {
    if waited < EAGER_WAIT {
        thread::yield_now();
    } else {
        thread::sleep((waited / 16).clamp(NAP_MIN, NAP_MAX).min(left));
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
    newest_load: Mutex<Option<Arc<Mark>>>,
}

impl Engine {
    pub(super) fn new(context: Arc<Context>, errors: SharedErrorLog) -> Self {
        let spares = Spares::new(&context);
        Self {
            context,
            errors,
            spares,
            next_handle: AtomicU64::new(1),
            streams: Mutex::default(),
            events: Mutex::default(),
            janitor: Mutex::default(),
            newest_load: Mutex::default(),
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

    /// Whether nothing is known to be queued or running on a stream.
    pub(super) fn is_idle(&self, stream: RawStream) -> Result<bool, DeviceError> {
        Ok(self.stream(stream)?.pending.lock().jobs.is_empty())
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
        let mut submission = Submission {
            stream: handle,
            scratch: &mut submit.scratch,
            hash: None,
            wants_mark: false,
            is_load: false,
            is_queued: false,
        };
        let outcome = enqueue(&mut submission);
        let Submission { hash, is_queued, wants_mark, is_load, .. } = submission;
        if outcome.is_err() && !is_queued {
            drop(guard);
            // What the job kept may call the device when dropped: after the lock.
            drop((hash, keep));
            return outcome;
        }
        submit.submitted += 1;
        let sequence = submit.submitted;
        state.pending.lock().jobs.push_back(Entry { sequence, hash, keep });
        if wants_mark || sequence - submit.marked >= jobs::JOBS_PER_MARK {
            // Without it the next one stands for these jobs too.
            match state.mark(handle, sequence) {
                Ok(mark) => {
                    submit.marked = sequence;
                    state.pending.lock().marks.push_back(Arc::clone(&mark));
                    if is_load {
                        let before = self.newest_load.lock().replace(mark);
                        drop(before);
                    }
                }
                Err(error) => tracing::debug!(%error, "a stream could not be marked"),
            }
        }
        outcome
    }

    /// Whether a job that brings bytes to the device is queued or running.
    pub(super) fn has_loads(&self) -> Result<bool, DeviceError> {
        let Some(mark) = self.newest_load.lock().clone() else { return Ok(false) };
        let _bound = self.context.bind()?;
        Ok(!mark.is_passed(self.context.driver())?)
    }

    /// Ends the jobs that are done, of every stream.
    pub(super) fn reap_all(&self) -> Result<(), DeviceError> {
        let _bound = self.context.bind()?;
        let streams: Vec<_> = self.streams.lock().values().cloned().collect();
        streams.iter().try_for_each(|state| state.reap())
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
        self.set_recorded(event, Recorded { stream: None, mark: Mark::new(handle, 0, &self.spares) })
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
