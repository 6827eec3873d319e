//! `Region`, and the transfer that a wake is.

use std::time::{Duration, Instant};

use pyo3::prelude::*;
use pyo3::types::PyDict;
use shoal_core::bytes::ByteCount;
use shoal_memory::{MemoryError, Region, Transfer};

use crate::buffer::{Bytes, RegionBuffer};
use crate::convert::{self, ReportTuple, SourceTuple};
use crate::errors;
use crate::owner::Owned;

/// How long a wait goes without looking for an interrupt.
const SLICE: Duration = Duration::from_millis(100);

/// A range of addresses with a name.
#[pyclass(frozen, name = "Region", module = "shoal._native")]
pub(crate) struct PyRegion {
    region: Owned<Region>,
}

impl PyRegion {
    pub(crate) fn new(region: Region) -> Self {
        Self { region: Owned::new(region) }
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

    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let region = self.region.get()?;
        let usage = py.detach(|| region.usage());
        let dict = PyDict::new(py);
        dict.set_item("total", usage.total.0)?;
        dict.set_item("device", usage.device.0)?;
        dict.set_item("host", usage.host.0)?;
        dict.set_item("source_only", usage.source_only.0)?;
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

/// A wake under way.
#[pyclass(frozen, name = "Transfer", module = "shoal._native")]
pub(crate) struct PyTransfer {
    transfer: Owned<Transfer>,
    /// What it was begun with.
    timeout: Duration,
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

    /// Waits in slices, so that an interrupt is seen.
    #[pyo3(signature = (timeout_s))]
    fn wait(&self, py: Python<'_>, timeout_s: Option<f64>) -> PyResult<ReportTuple> {
        let transfer = self.transfer.get()?;
        let timeout = timeout_s.map_or(Ok(self.timeout), |value| convert::seconds("timeout_s", value))?;
        let begun = Instant::now();
        loop {
            let left = timeout.saturating_sub(begun.elapsed());
            match py.detach(|| transfer.wait(left.min(SLICE))) {
                Err(MemoryError::Deadline { doing, .. }) if !transfer.progress().is_finished => {
                    if left <= SLICE {
                        return Err(errors::of_memory(MemoryError::Deadline { doing, waited: timeout }));
                    }
                    py.check_signals()?;
                }
                outcome => {
                    return outcome
                        .as_ref()
                        .map(convert::restored)
                        .map_err(Clone::clone)
                        .map_err(errors::of_memory);
                }
            }
        }
    }
}
