//! `Region`, and the transfer that a wake is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use shoal_core::bytes::ByteCount;
use shoal_device::VirtAddr;
use shoal_memory::{Flush, MemoryError, Region, RegionUse, Segments, Transfer};

use crate::buffer::{Bytes, RegionBuffer};
use crate::convert::{self, ReportTuple, SourceTuple};
use crate::dlpack;
use crate::errors;
use crate::manager::PyGuard;
use crate::owner::Owned;
use crate::torch_hooks;

/// Sealed, copied and dirty bytes, seconds, and why bytes stayed dirty.
type FlushTuple = (u64, u64, u64, f64, Option<Py<PyAny>>);

/// How long a wait goes without looking for an interrupt.
const SLICE: Duration = Duration::from_millis(100);
/// How long a wait for somebody else's wake takes at most, if nothing else is said.
const WAKE_TIMEOUT: Duration = Duration::from_mins(1);

/// A range of addresses with a name.
#[pyclass(frozen, name = "Region", module = "shoal._native")]
pub(crate) struct PyRegion {
    region: Owned<Region>,
    /// Of a region that grows.
    segments: Option<Owned<Arc<Segments>>>,
}

impl PyRegion {
    pub(crate) fn new(region: Region) -> Self {
        Self { region: Owned::new(region), segments: None }
    }

    pub(crate) fn growing(segments: Arc<Segments>) -> Self {
        Self { region: Owned::new(segments.region().clone()), segments: Some(Owned::new(segments)) }
    }

    fn segments(&self, doing: &'static str) -> PyResult<&Arc<Segments>> {
        let region = self.region.get()?.name();
        let why = "it was made with a length; make it without one for torch to fill it";
        let refused = || errors::of_memory(MemoryError::State { region: region.to_owned(), doing, why });
        self.segments.as_ref().ok_or_else(refused)?.get()
    }

    pub(crate) fn get(&self) -> PyResult<&Region> {
        self.region.get()
    }
}

#[pymethods]
impl PyRegion {
    #[getter]
    fn name(&self) -> PyResult<String> {
        Ok(self.region.get()?.name().to_owned())
    }

    #[getter]
    fn address(&self) -> PyResult<u64> {
        Ok(self.region.get()?.address())
    }

    #[getter]
    fn bytes(&self) -> PyResult<u64> {
        Ok(self.region.get()?.bytes().0)
    }

    /// `"sim:N"` or `"cuda:N"`.
    #[getter]
    fn device(&self) -> PyResult<String> {
        Ok(convert::device(self.region.get()?.manager().device().info()))
    }

    /// Whether torch can fill it.
    #[getter]
    fn is_growing(&self) -> bool {
        self.segments.is_some()
    }

    #[getter]
    fn reads_stored(&self) -> PyResult<bool> {
        Ok(self.region.get()?.reads_stored())
    }

    /// What went wrong most lately where nobody could be told.
    fn last_error(&self, py: Python<'_>) -> PyResult<Option<Py<PyAny>>> {
        let Some(segments) = &self.segments else { return Ok(None) };
        let error = segments.get()?.last_error();
        Ok(error.map(|error| errors::of_memory(error).into_value(py).into_any()))
    }

    /// Takes the memory of segments that torch will hand nothing out of any more, once their last work is done.
    fn torch_discard(&self, py: Python<'_>, addresses: Vec<u64>) -> PyResult<()> {
        let segments = self.segments("discard its segments")?;
        let dead: Vec<_> = addresses.into_iter().map(VirtAddr).collect();
        py.detach(|| segments.discard(&dead));
        Ok(())
    }

    /// The slot of torch's allocator that fills it.
    fn torch_bind(&self) -> PyResult<usize> {
        let segments = self.segments("use it with torch")?;
        let region = segments.region().name().to_owned();
        let doing = "use it with torch";
        let why = "64 regions are filled by torch already, the most at once; drop one whose tensors are gone, or put more into one region";
        torch_hooks::bind(segments)
            .ok_or_else(|| errors::of_memory(MemoryError::State { region, doing, why }))
    }

    /// Gives the slot back. In another process it is not ours to give.
    fn torch_unbind(&self) {
        if let Ok(segments) = self.segments("let go of it") {
            torch_hooks::unbind(segments);
        }
    }

    /// Vouches for the streams that use it.
    fn record_use(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        let region = self.region.get()?;
        py.detach(|| region.record_use(torch_hooks::stream_of(stream)));
        Ok(())
    }

    /// Remembers a stream that uses it.
    fn note_stream(&self, py: Python<'_>, stream: u64) -> PyResult<()> {
        let region = self.region.get()?;
        py.detach(|| region.note_stream(torch_hooks::stream_of(stream)));
        Ok(())
    }

    /// Says that it is being filled until the answer is released.
    fn begin_use(&self, py: Python<'_>, timeout_s: f64) -> PyResult<PyRegionUse> {
        let region = self.region.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let used = py.detach(|| region.begin_use(timeout)).map_err(errors::of_memory)?;
        Ok(PyRegionUse { used: Mutex::new(Some(Owned::new(used))) })
    }

    /// Keeps the memory of what is freed until the answer is released.
    fn hold_memory(&self, py: Python<'_>, timeout_s: f64) -> PyResult<PyRegionUse> {
        let region = self.region.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let held = py.detach(|| region.hold_memory(timeout)).map_err(errors::of_memory)?;
        Ok(PyRegionUse { used: Mutex::new(Some(Owned::new(held))) })
    }

    /// Seals what is there and begins to copy it to the host; `dead` are segments in which nothing lives.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn freeze(&self, py: Python<'_>, dead: Vec<u64>, timeout_s: f64) -> PyResult<PyFlush> {
        let region = self.region.get()?;
        let segments = self.segments.as_ref().map(Owned::get).transpose()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let dead: Vec<VirtAddr> = dead.iter().map(|at| VirtAddr(*at)).collect();
        let begin = || match segments {
            Some(segments) => segments.freeze(&dead, timeout),
            None => region.freeze(timeout),
        };
        let flush = py.detach(begin).map_err(errors::of_memory)?;
        Ok(PyFlush { flush: Owned::new(flush), timeout })
    }

    /// A range as its copies on the host have it; `None` where not all of it has one.
    fn host_copy<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        nbytes: usize,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let region = self.region.get()?;
        let mut is_whole = false;
        let bytes = PyBytes::new_with(py, nbytes, |into| {
            is_whole =
                py.detach(|| region.read_host_copy(ByteCount(offset), into)).map_err(errors::of_memory)?;
            Ok(())
        })?;
        Ok(is_whole.then_some(bytes))
    }

    /// From `offset` on, what the host copy of that extent holds, at most `nbytes`, as a `DLPack` capsule of bytes and
    /// its length; `None` where there is none.
    fn host_view<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        nbytes: u64,
    ) -> PyResult<Option<(Bound<'py, PyAny>, usize)>> {
        let region = self.region.get()?;
        let view = py
            .detach(|| region.host_view(ByteCount(offset), ByteCount(nbytes)))
            .map_err(errors::of_memory)?;
        let Some(view) = view else { return Ok(None) };
        let length = view.as_slice().len();
        Ok(Some((dlpack::host_capsule(py, view)?, length)))
    }

    /// Whether it may lose memory without its owner's word.
    fn set_yields(&self, yields: bool) -> PyResult<()> {
        self.region.get()?.set_yields(yields);
        Ok(())
    }

    /// Records checksums of what has none; it may grow afterwards.
    fn record_checksums(&self, py: Python<'_>, timeout_s: f64) -> PyResult<()> {
        let region = self.region.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        py.detach(|| region.record_checksums(timeout)).map(drop).map_err(errors::of_memory)
    }

    /// Forgets checksums and copies off the device; how many host bytes became free.
    fn forget_copies(&self, py: Python<'_>) -> PyResult<u64> {
        let region = self.region.get()?;
        py.detach(|| region.forget_copies()).map(|bytes| bytes.0).map_err(errors::of_memory)
    }

    /// Offset and length of what lies on the device.
    fn resident_ranges(&self, py: Python<'_>) -> PyResult<Vec<(u64, u64)>> {
        let region = self.region.get()?;
        let ranges = py.detach(|| region.resident_ranges());
        Ok(ranges.into_iter().map(|(offset, bytes)| (offset.0, bytes.0)).collect())
    }

    /// Figures of a growing region.
    fn segments_usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let segments = self.segments("show its segments")?;
        let usage = py.detach(|| segments.usage());
        let dict = PyDict::new(py);
        dict.set_item("segments", usage.segments)?;
        dict.set_item("segment_bytes", usage.segment_bytes.0)?;
        dict.set_item("dropped", usage.dropped.0)?;
        dict.set_item("retired", usage.retired.0)?;
        dict.set_item("committed", usage.committed.0)?;
        dict.set_item("allocations", usage.allocations)?;
        dict.set_item("frees", usage.frees)?;
        dict.set_item("refusals", usage.refusals)?;
        Ok(dict)
    }

    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let region = self.region.get()?;
        let usage = py.detach(|| region.usage());
        let dict = PyDict::new(py);
        dict.set_item("total", usage.total.0)?;
        dict.set_item("device", usage.device.0)?;
        dict.set_item("host", usage.host.0)?;
        dict.set_item("source_only", usage.source_only.0)?;
        dict.set_item("left", usage.left.0)?;
        Ok(dict)
    }

    fn stage(
        &self,
        py: Python<'_>,
        offset: u64,
        data: &Bound<'_, PyAny>,
        source: Option<SourceTuple>,
    ) -> PyResult<()> {
        let region = self.region.get()?;
        let source = source.map(convert::source_piece).transpose()?;
        let bytes = Bytes::of(data)?;
        let slice = bytes.as_slice();
        py.detach(|| region.stage(ByteCount(offset), slice, source)).map_err(errors::of_memory)
    }

    fn seal(&self, py: Python<'_>) -> PyResult<()> {
        let region = self.region.get()?;
        py.detach(|| region.seal()).map(drop).map_err(errors::of_memory)
    }

    fn commit(&self, py: Python<'_>, offset: u64, nbytes: u64) -> PyResult<()> {
        let region = self.region.get()?;
        py.detach(|| region.commit(ByteCount(offset), ByteCount(nbytes))).map(drop).map_err(errors::of_memory)
    }

    fn decommit(&self, py: Python<'_>, offset: u64, nbytes: u64) -> PyResult<()> {
        let region = self.region.get()?;
        py.detach(|| region.decommit(ByteCount(offset), ByteCount(nbytes)))
            .map(drop)
            .map_err(errors::of_memory)
    }

    fn sleep(&self, py: Python<'_>, keep: f64, trust_clean: bool, timeout_s: f64) -> PyResult<ReportTuple> {
        let region = self.region.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let keep = convert::share("keep", keep)?;
        py.detach(|| region.sleep(keep, trust_clean, timeout))
            .map(|report| convert::evicted(py, report))
            .map_err(errors::of_memory)
    }

    fn evict(&self, py: Python<'_>, nbytes: u64, timeout_s: f64) -> PyResult<ReportTuple> {
        let region = self.region.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        py.detach(|| region.evict(ByteCount(nbytes), timeout))
            .map(|report| convert::evicted(py, report))
            .map_err(errors::of_memory)
    }

    fn wake(&self, py: Python<'_>, timeout_s: f64) -> PyResult<PyTransfer> {
        let region = self.region.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let transfer = py.detach(|| region.wake(timeout)).map_err(errors::of_memory)?;
        Ok(PyTransfer { transfer: Owned::new(transfer), timeout })
    }

    /// The wake under way.
    #[getter]
    fn waking(&self) -> PyResult<Option<PyTransfer>> {
        let region = self.region.get()?;
        let begun = |transfer| PyTransfer { transfer: Owned::new(transfer), timeout: WAKE_TIMEOUT };
        Ok(region.waking().map(begun))
    }

    /// A guard of this region alone; in order, it is entered beside the wake that is given with it.
    fn guard(
        &self,
        py: Python<'_>,
        in_order: bool,
        timeout_s: f64,
    ) -> PyResult<(PyGuard, Option<PyTransfer>)> {
        let region = self.region.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let enter = || {
            if in_order {
                region.guard_in_order(timeout)
            } else {
                region.guard(timeout).map(|guard| (guard, None))
            }
        };
        let (guard, wake) = py.detach(enter).map_err(errors::of_memory)?;
        Ok((PyGuard::new(guard), wake.map(|wake| PyTransfer::begun(wake, timeout))))
    }

    /// The order in which its bytes are used: ranges of offset and length.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn set_order(&self, py: Python<'_>, ranges: Vec<(u64, u64)>) -> PyResult<()> {
        let region = self.region.get()?;
        let ranges: Vec<_> =
            ranges.iter().map(|(offset, nbytes)| (ByteCount(*offset), ByteCount(*nbytes))).collect();
        py.detach(|| region.set_order(&ranges)).map_err(errors::of_memory)
    }

    fn buffer(&self, offset: u64, nbytes: u64) -> PyResult<RegionBuffer> {
        let region = self.region.get()?;
        let end = offset.checked_add(nbytes).filter(|end| *end <= region.bytes().0);
        match (end, usize::try_from(nbytes)) {
            (Some(_), Ok(length)) => Ok(RegionBuffer::new(region.clone(), region.address() + offset, length)),
            _ => Err(errors::of_memory(MemoryError::OutOfRange {
                region: region.name().to_owned(),
                offset: ByteCount(offset),
                bytes: ByteCount(nbytes),
                region_bytes: region.bytes(),
            })),
        }
    }
}

/// Somebody fills a region, or holds its memory.
#[pyclass(frozen, name = "RegionUse", module = "shoal._native")]
pub(crate) struct PyRegionUse {
    used: Mutex<Option<Owned<RegionUse>>>,
}

#[pymethods]
impl PyRegionUse {
    fn release(&self) {
        let used = self.used.lock().take();
        drop(used);
    }
}

/// What of a freeze goes on in the background.
#[pyclass(frozen, name = "Flush", module = "shoal._native")]
pub(crate) struct PyFlush {
    flush: Owned<Flush>,
    /// What it was begun with.
    timeout: Duration,
}

#[pymethods]
impl PyFlush {
    #[getter]
    fn sealed(&self) -> PyResult<u64> {
        Ok(self.flush.get()?.sealed().bytes.0)
    }

    fn done(&self) -> PyResult<bool> {
        Ok(self.flush.get()?.progress().is_finished)
    }

    fn progress(&self) -> PyResult<(u64, u64)> {
        let progress = self.flush.get()?.progress();
        Ok((progress.done.0, progress.total.0))
    }

    fn cancel(&self) -> PyResult<()> {
        self.flush.get()?.cancel();
        Ok(())
    }

    /// Waits in slices, so that an interrupt is seen.
    #[pyo3(signature = (timeout_s))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<FlushTuple> {
        let flush = self.flush.get()?;
        let timeout = timeout_s.map_or(Ok(self.timeout), |value| convert::seconds("timeout_s", value))?;
        let is_over = || flush.progress().is_finished;
        let report = in_slices(py, timeout, is_over, |wait| flush.wait(wait))?;
        let error = report.error.map(|error| errors::of_memory(*error).into_value(py).into_any());
        let (sealed, copied, dirty) = (report.sealed.bytes.0, report.copied.0, report.dirty.0);
        Ok((sealed, copied, dirty, report.duration.as_secs_f64(), error))
    }
}

/// A wake under way.
#[pyclass(frozen, name = "Transfer", module = "shoal._native")]
pub(crate) struct PyTransfer {
    transfer: Owned<Transfer>,
    /// What it was begun with.
    timeout: Duration,
}

impl PyTransfer {
    pub(crate) fn begun(transfer: Transfer, timeout: Duration) -> Self {
        Self { transfer: Owned::new(transfer), timeout }
    }
}

#[pymethods]
impl PyTransfer {
    fn done(&self) -> PyResult<bool> {
        Ok(self.transfer.get()?.progress().is_finished)
    }

    fn progress(&self) -> PyResult<(u64, u64)> {
        let progress = self.transfer.get()?.progress();
        Ok((progress.done.0, progress.total.0))
    }

    fn cancel(&self) -> PyResult<()> {
        self.transfer.get()?.cancel();
        Ok(())
    }

    /// Waits until the copies of a range are queued.
    fn wait_host(&self, py: Python<'_>, offset: u64, nbytes: u64, timeout_s: f64) -> PyResult<()> {
        let transfer = self.transfer.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let (offset, bytes) = (ByteCount(offset), ByteCount(nbytes));
        in_slices(py, timeout, is_over_of(transfer), |wait| transfer.wait_host(offset, bytes, wait))
    }

    /// Makes the stream of that handle wait for a range.
    fn wait_stream(
        &self,
        py: Python<'_>,
        offset: u64,
        nbytes: u64,
        stream: u64,
        timeout_s: f64,
    ) -> PyResult<()> {
        let transfer = self.transfer.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let (offset, bytes, stream) = (ByteCount(offset), ByteCount(nbytes), torch_hooks::stream_of(stream));
        in_slices(py, timeout, is_over_of(transfer), |wait| transfer.wait_stream(offset, bytes, stream, wait))
    }

    /// Waits in slices, so that an interrupt is seen.
    #[pyo3(signature = (timeout_s))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<ReportTuple> {
        let transfer = self.transfer.get()?;
        let timeout = timeout_s.map_or(Ok(self.timeout), |value| convert::seconds("timeout_s", value))?;
        in_slices(py, timeout, is_over_of(transfer), |wait| transfer.wait(wait))
            .map(|report| convert::restored(&report))
    }
}

fn is_over_of(transfer: &Transfer) -> impl Fn() -> bool {
    || transfer.progress().is_finished
}

/// Waits again and again for a little, so that an interrupt is seen.
fn in_slices<T: Send>(
    py: Python<'_>,
    timeout: Duration,
    is_over: impl Fn() -> bool,
    wait: impl Fn(Duration) -> Result<T, MemoryError> + Sync,
) -> PyResult<T> {
    let begun = Instant::now();
    loop {
        let left = timeout.saturating_sub(begun.elapsed());
        // Asked before: it may end between the slice's end and this line.
        let was_over = is_over();
        match py.detach(|| wait(left.min(SLICE))) {
            // Of a wake that has ended it is the outcome.
            Err(MemoryError::Deadline { doing, .. }) if !was_over => {
                if left <= SLICE {
                    return Err(errors::of_memory(MemoryError::Deadline { doing, waited: timeout }));
                }
                py.check_signals()?;
            }
            outcome => return outcome.map_err(errors::of_memory),
        }
    }
}
