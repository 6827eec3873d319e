//! A device that fails on request and remembers what it was asked.
//!
//! Apart because faults are a wrapper and not a mode: what is tested is the device that ships. A failed call
//! never reaches the inner device, so it has changed nothing. A sweep counts the calls of one good run
//! ([`FaultDevice::calls`]), then repeats it with the first, second, third.. call failing
//! ([`FaultDevice::fail_nth`]) and checks that nothing leaked and nothing was lost.

#![expect(unsafe_code, reason = "hands the unsafe verbs on under the same contract")]

use core::fmt;
use core::mem;
use core::time::Duration;
use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;

use crate::device::{
    Device, DeviceInfo, DeviceMemory, ForeignStream, ForeignWork, HashCell, HostBacking, HostFunction, Keep,
    RawCopy, RawEvent, RawFrame, RawHost, RawSpan, RawStream, Verb, VirtAddr,
};
use crate::error::DeviceError;
use crate::host::HostFile;

/// How many calls are remembered; older ones are forgotten.
const HISTORY_MAX: usize = 4096;

/// One call, as a rule sees it before it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Which call of this device, from 1.
    pub number: u64,
    /// The verb.
    pub verb: Verb,
    /// The size or length asked for, where the verb has one.
    pub bytes: ByteCount,
}

/// Decides on a call: the error it shall fail with, or `None` to let it pass.
pub type Rule = Box<dyn FnMut(Call) -> Option<DeviceError> + Send>;

#[derive(Default)]
struct State {
    calls: u64,
    injected: u64,
    rules: Vec<Rule>,
    history: VecDeque<Call>,
}

/// Wraps a device; counts, remembers and fails calls. Every verb counts except `info`, `record_error` and
/// `take_errors`, which cannot fail.
pub struct FaultDevice {
    inner: Arc<dyn Device>,
    state: Mutex<State>,
}

impl fmt::Debug for FaultDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultDevice({:?})", self.inner)
    }
}

impl FaultDevice {
    /// Wraps `inner`. Without rules it only counts.
    #[must_use]
    pub fn new(inner: Arc<dyn Device>) -> Arc<Self> {
        Arc::new(Self { inner, state: Mutex::default() })
    }

    /// How many calls there have been.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.state.lock().calls
    }

    /// How many of them were made to fail.
    #[must_use]
    pub fn injected(&self) -> u64 {
        self.state.lock().injected
    }

    /// The latest calls, oldest first (at most 4096).
    #[must_use]
    pub fn history(&self) -> Vec<Call> {
        self.state.lock().history.iter().copied().collect()
    }

    /// Forgets the history (not the count).
    pub fn clear_history(&self) {
        self.state.lock().history.clear();
    }

    /// Fails the `n`-th call from now (1 is the next) with [`DeviceError::Injected`].
    pub fn fail_nth(&self, n: u64) {
        self.fail_nth_matching(n, |_| true);
    }

    /// Fails the `n`-th call from now among those that `matches` takes, with [`DeviceError::Injected`].
    pub fn fail_nth_matching(&self, n: u64, mut matches: impl FnMut(Call) -> bool + Send + 'static) {
        let mut left = n;
        self.fail_when(move |call| {
            if left == 0 || !matches(call) {
                return None;
            }
            left -= 1;
            (left == 0).then_some(DeviceError::Injected { call: call.number, verb: call.verb })
        });
    }

    /// Fails every call of `verb` with `error`, until [`FaultDevice::heal`].
    pub fn fail_all(&self, verb: Verb, error: DeviceError) {
        self.fail_when(move |call| (call.verb == verb).then(|| error.clone()));
    }

    /// Adds a rule. It must not call the device.
    pub fn fail_when(&self, rule: impl FnMut(Call) -> Option<DeviceError> + Send + 'static) {
        self.state.lock().rules.push(Box::new(rule));
    }

    /// Takes all rules away.
    pub fn heal(&self) {
        let rules = mem::take(&mut self.state.lock().rules);
        // Outside of the lock: what a rule captured may be anything.
        drop(rules);
    }

    fn enter(&self, verb: Verb, bytes: ByteCount) -> Result<(), DeviceError> {
        let mut state = self.state.lock();
        state.calls += 1;
        let call = Call { number: state.calls, verb, bytes };
        if state.history.len() == HISTORY_MAX {
            state.history.pop_front();
        }
        state.history.push_back(call);
        // Every rule sees every call, so that two rules count alike.
        let mut error = None;
        for rule in &mut state.rules {
            let answer = rule(call);
            error = error.or(answer);
        }
        match error {
            Some(error) => {
                state.injected += 1;
                Err(error)
            }
            None => Ok(()),
        }
    }
}

#[deny(clippy::missing_trait_methods)]
impl Device for FaultDevice {
    fn info(&self) -> &DeviceInfo {
        self.inner.info()
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        self.enter(Verb::Memory, ByteCount::ZERO)?;
        self.inner.memory()
    }

    fn reserve(&self, bytes: ByteCount) -> Result<VirtAddr, DeviceError> {
        self.enter(Verb::Reserve, bytes)?;
        self.inner.reserve(bytes)
    }

    fn release(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError> {
        self.enter(Verb::Release, bytes)?;
        self.inner.release(at, bytes)
    }

    fn create_frame(&self, bytes: ByteCount) -> Result<RawFrame, DeviceError> {
        self.enter(Verb::CreateFrame, bytes)?;
        self.inner.create_frame(bytes)
    }

    fn destroy_frame(&self, frame: RawFrame) -> Result<(), DeviceError> {
        self.enter(Verb::DestroyFrame, ByteCount::ZERO)?;
        self.inner.destroy_frame(frame)
    }

    fn map(&self, at: VirtAddr, frame: RawFrame) -> Result<(), DeviceError> {
        self.enter(Verb::Map, ByteCount::ZERO)?;
        self.inner.map(at, frame)
    }

    fn unmap(&self, at: VirtAddr, bytes: ByteCount) -> Result<(), DeviceError> {
        self.enter(Verb::Unmap, bytes)?;
        self.inner.unmap(at, bytes)
    }

    fn allocate_host(&self, bytes: ByteCount, backing: HostBacking) -> Result<RawHost, DeviceError> {
        self.enter(Verb::AllocateHost, bytes)?;
        self.inner.allocate_host(bytes, backing)
    }

    fn adopt_host(&self, file: &HostFile) -> Result<RawHost, DeviceError> {
        self.enter(Verb::AdoptHost, file.bytes())?;
        self.inner.adopt_host(file)
    }

    fn lock_host(&self, host: RawHost) -> Result<(), DeviceError> {
        self.enter(Verb::LockHost, ByteCount::ZERO)?;
        self.inner.lock_host(host)
    }

    unsafe fn free_host(&self, host: RawHost) -> Result<(), DeviceError> {
        self.enter(Verb::FreeHost, ByteCount::ZERO)?;
        // SAFETY: the contract is the same and the caller keeps it.
        unsafe { self.inner.free_host(host) }
    }

    fn create_stream(&self) -> Result<RawStream, DeviceError> {
        self.enter(Verb::CreateStream, ByteCount::ZERO)?;
        self.inner.create_stream()
    }

    fn destroy_stream(&self, stream: RawStream) -> Result<(), DeviceError> {
        self.enter(Verb::DestroyStream, ByteCount::ZERO)?;
        self.inner.destroy_stream(stream)
    }

    unsafe fn copy(
        &self,
        stream: RawStream,
        source: RawSpan,
        target: RawSpan,
        keep: Keep,
    ) -> Result<(), DeviceError> {
        self.enter(Verb::Copy, source.bytes)?;
        // SAFETY: the contract is the same and the caller keeps it.
        unsafe { self.inner.copy(stream, source, target, keep) }
    }

    unsafe fn copy_many(&self, stream: RawStream, copies: &[RawCopy], keep: Keep) -> Result<(), DeviceError> {
        self.enter(Verb::CopyMany, copies.iter().map(|copy| copy.source.bytes).sum())?;
        // SAFETY: the contract is the same and the caller keeps it.
        unsafe { self.inner.copy_many(stream, copies, keep) }
    }

    unsafe fn zero(
        &self,
        stream: RawStream,
        at: VirtAddr,
        bytes: ByteCount,
        keep: Keep,
    ) -> Result<(), DeviceError> {
        self.enter(Verb::Zero, bytes)?;
        // SAFETY: the contract is the same and the caller keeps it.
        unsafe { self.inner.zero(stream, at, bytes, keep) }
    }

    unsafe fn hash(
        &self,
        stream: RawStream,
        span: RawSpan,
        result: Arc<HashCell>,
        keep: Keep,
    ) -> Result<(), DeviceError> {
        self.enter(Verb::Hash, span.bytes)?;
        // SAFETY: the contract is the same and the caller keeps it.
        unsafe { self.inner.hash(stream, span, result, keep) }
    }

    fn launch_host(&self, stream: RawStream, function: HostFunction, keep: Keep) -> Result<(), DeviceError> {
        self.enter(Verb::LaunchHost, ByteCount::ZERO)?;
        self.inner.launch_host(stream, function, keep)
    }

    fn create_event(&self) -> Result<RawEvent, DeviceError> {
        self.enter(Verb::CreateEvent, ByteCount::ZERO)?;
        self.inner.create_event()
    }

    fn destroy_event(&self, event: RawEvent) -> Result<(), DeviceError> {
        self.enter(Verb::DestroyEvent, ByteCount::ZERO)?;
        self.inner.destroy_event(event)
    }

    fn record(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        self.enter(Verb::Record, ByteCount::ZERO)?;
        self.inner.record(stream, event)
    }

    fn record_foreign(&self, work: ForeignWork, event: RawEvent) -> Result<(), DeviceError> {
        self.enter(Verb::RecordForeign, ByteCount::ZERO)?;
        self.inner.record_foreign(work, event)
    }

    fn foreign_wait(&self, stream: ForeignStream, event: RawEvent) -> Result<bool, DeviceError> {
        self.enter(Verb::ForeignWait, ByteCount::ZERO)?;
        self.inner.foreign_wait(stream, event)
    }

    fn query_event(&self, event: RawEvent) -> Result<bool, DeviceError> {
        self.enter(Verb::QueryEvent, ByteCount::ZERO)?;
        self.inner.query_event(event)
    }

    fn wait_event(&self, event: RawEvent, timeout: Duration) -> Result<bool, DeviceError> {
        self.enter(Verb::WaitEvent, ByteCount::ZERO)?;
        self.inner.wait_event(event, timeout)
    }

    fn stream_wait(&self, stream: RawStream, event: RawEvent) -> Result<(), DeviceError> {
        self.enter(Verb::StreamWait, ByteCount::ZERO)?;
        self.inner.stream_wait(stream, event)
    }

    fn record_error(&self, error: DeviceError) {
        self.inner.record_error(error);
    }

    fn take_errors(&self) -> Vec<DeviceError> {
        self.inner.take_errors()
    }
}
