//! Streams, events, and what a queued job holds.

#![expect(unsafe_code, reason = "calls the raw copy and hash verbs with ranges that the job keeps alive")]

use core::any::Any;
use core::time::Duration;
use std::sync::Arc;

use shoal_core::bytes::ByteCount;

use super::copies::HeldCopies;
use super::host::JobUse;
use super::{HostBuffer, Mapping, check_range, record_leak};
use crate::device::{
    Device, ForeignStream, ForeignWork, HashCell, Keep, RawEvent, RawSpan, RawStream, Space, VirtAddr,
};
use crate::error::DeviceError;

/// A run of bytes that a job reads or writes; the job holds the `Arc` until it has finished.
#[derive(Clone, Debug)]
pub enum Span {
    /// In device memory.
    Device {
        /// Where.
        mapping: Arc<Mapping>,
        /// From the mapping's begin.
        offset: ByteCount,
        /// How much.
        bytes: ByteCount,
    },
    /// In host memory.
    Host {
        /// Where.
        buffer: Arc<HostBuffer>,
        /// From the buffer's begin.
        offset: ByteCount,
        /// How much.
        bytes: ByteCount,
    },
}

impl Span {
    /// All of a mapping.
    #[must_use]
    pub fn mapping(mapping: &Arc<Mapping>) -> Self {
        Self::Device { mapping: Arc::clone(mapping), offset: ByteCount::ZERO, bytes: mapping.bytes() }
    }

    /// Part of a host buffer.
    #[must_use]
    pub fn host(buffer: &Arc<HostBuffer>, offset: ByteCount, bytes: ByteCount) -> Self {
        Self::Host { buffer: Arc::clone(buffer), offset, bytes }
    }

    /// Its length.
    #[must_use]
    pub fn bytes(&self) -> ByteCount {
        match self {
            Self::Device { bytes, .. } | Self::Host { bytes, .. } => *bytes,
        }
    }

    fn device(&self) -> &Arc<dyn Device> {
        match self {
            Self::Device { mapping, .. } => mapping.device(),
            Self::Host { buffer, .. } => buffer.device(),
        }
    }

    /// Checks the range and turns it into an address and what keeps that address good.
    fn enter(self, device: &Arc<dyn Device>, writes: bool) -> Result<(RawSpan, SpanKeep), DeviceError> {
        if !Arc::ptr_eq(device, self.device()) {
            let (device, handle) = (device.info().id, 0);
            return Err(DeviceError::UnknownHandle { device, what: "span of another device", handle });
        }
        match self {
            Self::Device { mapping, offset, bytes } => {
                check_range("mapping", offset, bytes, mapping.bytes())?;
                let at = mapping.address().offset(offset).0;
                Ok((RawSpan { space: Space::Device, at, bytes }, SpanKeep::Mapping(mapping)))
            }
            Self::Host { buffer, offset, bytes } => {
                let base = buffer.address();
                let held = buffer.enter_job(offset, bytes, writes)?;
                let at = base + offset.0;
                Ok((RawSpan { space: Space::Host, at, bytes }, SpanKeep::Host(held)))
            }
        }
    }
}

/// What keeps one end of a job alive.
#[derive(Debug)]
#[expect(dead_code, reason = "held for its Drop")]
enum SpanKeep {
    Mapping(Arc<Mapping>),
    Host(JobUse),
}

/// Work done in order, beside everything else.
///
/// Dropping it returns at once; what is queued is still done, and holds what it touches until then.
#[derive(Debug)]
pub struct Stream {
    device: Arc<dyn Device>,
    raw: RawStream,
}

impl Stream {
    /// A new stream.
    ///
    /// # Errors
    /// As [`Device::create_stream`].
    pub fn create(device: &Arc<dyn Device>) -> Result<Arc<Self>, DeviceError> {
        let raw = device.create_stream()?;
        Ok(Arc::new(Self { device: Arc::clone(device), raw }))
    }

    /// Whose stream this is.
    #[must_use]
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Queues a copy. Both ends are held until it has finished. Where two jobs on different streams touch the
    /// same bytes, order them by [`Stream::wait_for`]; otherwise the bytes are whichever came last.
    ///
    /// # Errors
    /// `LengthMismatch`, `OutOfRange`, `Busy` (the host is using these bytes of a buffer), `QueueFull`;
    /// then nothing is queued.
    pub fn copy(&self, source: Span, target: Span) -> Result<(), DeviceError> {
        let (source_bytes, target_bytes) = (source.bytes(), target.bytes());
        if source_bytes != target_bytes {
            return Err(DeviceError::LengthMismatch { source_bytes, target_bytes });
        }
        let (source, source_keep) = source.enter(&self.device, false)?;
        let (target, target_keep) = target.enter(&self.device, true)?;
        let keep: Keep = Box::new((source_keep, target_keep));
        // SAFETY: both ranges were checked against the mapping or buffer that `keep` holds until the job has
        // finished; host ranges are entered as in use, so no slice of them exists meanwhile.
        unsafe { self.device.copy(self.raw, source, target, keep) }
    }

    /// Queues many copies, each from the first span to the second, of any sizes and directions, as one job: they are
    /// done in any order, in the way that is cheapest on this device, so their targets must not overlap one another or
    /// a source. The spans are held until all have finished.
    ///
    /// # Errors
    /// As [`Stream::copy`], before anything is queued; on `QueueFull` and what a driver says, some may be queued.
    pub fn copy_many(&self, copies: &[(Span, Span)]) -> Result<(), DeviceError> {
        if copies.is_empty() {
            return Ok(());
        }
        let (copies, keep) = HeldCopies::new(&self.device, copies)?.enter()?;
        // SAFETY: each range was checked against a mapping or buffer that `keep` holds until the job has finished; host
        // ranges are entered as in use, so no slice of them exists meanwhile.
        unsafe { self.device.copy_many(self.raw, &copies, Box::new(keep)) }
    }

    /// Queues writing zeroes over the whole of a mapping, which is held until that has finished.
    ///
    /// # Errors
    /// `UnknownHandle` for one of another device, `QueueFull`; then nothing is queued.
    pub fn zero(&self, mapping: &Arc<Mapping>) -> Result<(), DeviceError> {
        let (span, keep) = Span::mapping(mapping).enter(&self.device, true)?;
        // SAFETY: the whole of a mapping that `keep` holds until the job has finished.
        unsafe { self.device.zero(self.raw, VirtAddr(span.at), span.bytes, Box::new(keep)) }
    }

    /// Queues a hash of a span ([`crate::hash_bytes`]). The span is held until it has finished.
    ///
    /// # Errors
    /// As [`Stream::copy`].
    pub fn hash(&self, span: Span) -> Result<HashTicket, DeviceError> {
        let event = Event::create(&self.device)?;
        let (span, keep) = span.enter(&self.device, false)?;
        let (cell, keep): (_, Keep) = (Arc::new(HashCell::default()), Box::new(keep));
        // SAFETY: the range was checked against the mapping or buffer that `keep` holds until the job has
        // finished; a host range is entered as in use, so no `&mut` of it exists meanwhile.
        let queued = unsafe { self.device.hash(self.raw, span, Arc::clone(&cell), keep) };
        queued?;
        self.device.record(self.raw, event.raw)?;
        Ok(HashTicket { event, cell })
    }

    /// Queues a function of the host. It must be short and must not call the device; it stands in for a kernel
    /// on the simulated device. `held` (the mappings it touches) lives until it has run.
    ///
    /// # Errors
    /// `QueueFull`.
    pub fn launch_host(
        &self,
        held: impl Any + Send,
        function: impl FnOnce() + Send + 'static,
    ) -> Result<(), DeviceError> {
        self.device.launch_host(self.raw, Box::new(function), Box::new(held))
    }

    /// Marks this point of the stream.
    ///
    /// # Errors
    /// `QueueFull`.
    pub fn record(&self) -> Result<Event, DeviceError> {
        let event = Event::create(&self.device)?;
        self.device.record(self.raw, event.raw)?;
        Ok(event)
    }

    /// Lets what is queued from now on wait for `event`. The host does not wait.
    ///
    /// # Errors
    /// `QueueFull`.
    pub fn wait_for(&self, event: &Event) -> Result<(), DeviceError> {
        if !Arc::ptr_eq(&self.device, &event.device) {
            let (device, handle) = (self.device.info().id, event.raw.0);
            return Err(DeviceError::UnknownHandle { device, what: "event of another device", handle });
        }
        self.device.stream_wait(self.raw, event.raw)
    }

    /// Waits until all that is queued now is done, at most `timeout`. False: not yet.
    ///
    /// # Errors
    /// As [`Stream::record`].
    pub fn synchronize(&self, timeout: Duration) -> Result<bool, DeviceError> {
        self.record()?.wait(timeout)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Err(cause) = self.device.destroy_stream(self.raw) {
            record_leak(&self.device, "stream", self.raw.0, cause);
        }
    }
}

/// A point of a stream. When it is complete, jobs before it hold nothing any more.
#[derive(Debug)]
pub struct Event {
    device: Arc<dyn Device>,
    raw: RawEvent,
}

impl Event {
    /// Marks what others have queued until now.
    ///
    /// # Errors
    /// As [`Device::record_foreign`].
    pub fn of_foreign(device: &Arc<dyn Device>, work: ForeignWork) -> Result<Self, DeviceError> {
        let event = Self::create(device)?;
        device.record_foreign(work, event.raw)?;
        Ok(event)
    }

    fn create(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let raw = device.create_event()?;
        Ok(Self { device: Arc::clone(device), raw })
    }

    /// Makes a stream of others wait for it. False: others have no streams here, so that the caller has to wait.
    ///
    /// # Errors
    /// As [`Device::foreign_wait`].
    pub fn foreign_wait(&self, stream: ForeignStream) -> Result<bool, DeviceError> {
        self.device.foreign_wait(stream, self.raw)
    }

    /// Whether everything before it is done. Never waits.
    ///
    /// # Errors
    /// As [`Device::query_event`].
    pub fn is_complete(&self) -> Result<bool, DeviceError> {
        self.device.query_event(self.raw)
    }

    /// Waits until everything before it is done, at most `timeout`. False: not yet.
    ///
    /// # Errors
    /// As [`Device::wait_event`].
    pub fn wait(&self, timeout: Duration) -> Result<bool, DeviceError> {
        self.device.wait_event(self.raw, timeout)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Err(cause) = self.device.destroy_event(self.raw) {
            record_leak(&self.device, "event", self.raw.0, cause);
        }
    }
}

/// A hash that a stream is computing.
#[derive(Debug)]
pub struct HashTicket {
    event: Event,
    cell: Arc<HashCell>,
}

impl HashTicket {
    /// The hash, if it is there already.
    ///
    /// # Errors
    /// As [`Event::is_complete`].
    pub fn try_get(&self) -> Result<Option<u64>, DeviceError> {
        Ok(if self.event.is_complete()? { self.cell.get() } else { None })
    }

    /// Waits for the hash, at most `timeout`.
    ///
    /// # Errors
    /// [`DeviceError::Timeout`]; otherwise as [`Event::wait`].
    pub fn wait(&self, timeout: Duration) -> Result<u64, DeviceError> {
        if self.event.wait(timeout)?
            && let Some(hash) = self.cell.get()
        {
            return Ok(hash);
        }
        Err(DeviceError::Timeout { what: "a hash", waited: timeout })
    }
}
