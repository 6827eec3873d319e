//! `KvBacking`.

use std::sync::Arc;

use pyo3::prelude::*;
use shoal_core::bytes::ByteCount;
use shoal_memory::KvBacking;

use crate::convert::{self, ReportTuple};
use crate::errors;
use crate::owner::Owned;
use crate::region::PyRegion;

/// Which blocks of a KV region have device memory.
#[pyclass(frozen, name = "KvBacking", module = "shoal._native")]
pub(crate) struct PyKvBacking {
    backing: Owned<Arc<KvBacking>>,
}

#[pymethods]
impl PyKvBacking {
    #[new]
    fn new(py: Python<'_>, region: &PyRegion, block_bytes: u64, blocks: u32) -> PyResult<Self> {
        let region = region.get()?.clone();
        let backing = py
            .detach(|| KvBacking::new(&region, ByteCount(block_bytes), blocks))
            .map_err(errors::of_memory)?;
        Ok(Self { backing: Owned::new(backing) })
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python list")]
    fn back(&self, py: Python<'_>, ids: Vec<u32>) -> PyResult<bool> {
        let backing = self.backing.get()?;
        py.detach(|| backing.back(&ids)).map_err(errors::of_memory)
    }

    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python list")]
    fn unback(&self, py: Python<'_>, ids: Vec<u32>) -> PyResult<()> {
        let backing = self.backing.get()?;
        py.detach(|| backing.unback(&ids)).map_err(errors::of_memory)
    }

    fn trim(&self, py: Python<'_>, nbytes: u64) -> PyResult<ReportTuple> {
        let backing = self.backing.get()?;
        py.detach(|| backing.trim(ByteCount(nbytes)))
            .map(|report| convert::evicted(py, report))
            .map_err(errors::of_memory)
    }

    #[getter]
    fn idle_bytes(&self) -> PyResult<u64> {
        Ok(self.backing.get()?.idle_bytes().0)
    }

    #[getter]
    fn backed_bytes(&self) -> PyResult<u64> {
        Ok(self.backing.get()?.backed_bytes().0)
    }

    #[getter]
    fn live_bytes(&self) -> PyResult<u64> {
        Ok(self.backing.get()?.live_bytes().0)
    }
}
