//! `WeightStore`: weights at rest, and `StoredWeights`, one model in it.
//!
//! Calls that touch a disk let the GIL go.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use shoal_core::bytes::ByteCount;
use shoal_memory::StoredTensor;
use shoal_memory::weights::{Stored, WeightOptions, WeightStore};

use crate::convert::{self, SourceTuple};
use crate::errors;
use crate::owner::Owned;
use crate::region::PyRegion;

/// Offset, length and source of a tensor.
type TensorTuple = (u64, u64, Option<SourceTuple>);

fn tensors_of(tensors: Vec<TensorTuple>) -> PyResult<Vec<StoredTensor>> {
    let tensors = tensors.into_iter().map(|(offset, bytes, source)| {
        let source = source.map(convert::source_piece).transpose()?;
        Ok(StoredTensor { offset: ByteCount(offset), bytes: ByteCount(bytes), source })
    });
    tensors.collect()
}

/// A directory of weights.
#[pyclass(frozen, name = "WeightStore", module = "shoal._native")]
pub(crate) struct PyWeightStore {
    store: Owned<WeightStore>,
    stop: AtomicBool,
}

#[pymethods]
impl PyWeightStore {
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn new(
        py: Python<'_>,
        path: PathBuf,
        bytes_max: u64,
        write_bytes_per_s: Option<u64>,
        write_bytes_per_hour: Option<u64>,
        keep_s: f64,
    ) -> PyResult<Self> {
        let mut options = WeightOptions::new(ByteCount(bytes_max));
        options.keep = Duration::try_from_secs_f64(keep_s)
            .map_err(|error| PyValueError::new_err(format!("keep_s: {error}")))?;
        options.write_bytes_per_hour = write_bytes_per_hour.map(ByteCount);
        options.write_bytes_per_s = write_bytes_per_s.map_or(options.write_bytes_per_s, ByteCount);
        let store = py.detach(|| WeightStore::open(&path, options)).map_err(errors::of_disk)?;
        Ok(Self { store: Owned::new(store), stop: AtomicBool::new(false) })
    }

    fn find(&self, py: Python<'_>, name: &str) -> PyResult<Option<PyStoredWeights>> {
        let store = self.store.get()?;
        let found = py.detach(|| store.find(name));
        Ok(found.map(|stored| PyStoredWeights { stored: Owned::new(Arc::new(stored)) }))
    }

    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let store = self.store.get()?;
        let usage = py.detach(|| store.usage()).map_err(errors::of_disk)?;
        let dict = PyDict::new(py);
        dict.set_item("models", usage.models)?;
        dict.set_item("bytes", usage.bytes.0)?;
        dict.set_item("unshared", usage.unshared.0)?;
        Ok(dict)
    }

    /// Fills that are under way end, and none begins.
    fn stop(&self) -> PyResult<()> {
        self.store.get()?;
        self.stop.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Stores a sealed region.
    fn fill<'py>(
        &self,
        py: Python<'py>,
        region: &PyRegion,
        name: &str,
        note: &str,
        tensors: Vec<TensorTuple>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let (store, region) = (self.store.get()?, region.get()?);
        let tensors = tensors_of(tensors)?;
        let report = py
            .detach(|| region.store_in(store, name, note, &tensors, &self.stop))
            .map_err(errors::of_weights)?;
        let dict = PyDict::new(py);
        dict.set_item("bytes", report.bytes.0)?;
        dict.set_item("written", report.written.0)?;
        dict.set_item("shared", report.shared.0)?;
        dict.set_item("was_there", report.was_there)?;
        dict.set_item("evicted", report.evicted)?;
        Ok(dict)
    }
}

/// A model that is stored.
#[pyclass(frozen, name = "StoredWeights", module = "shoal._native")]
pub(crate) struct PyStoredWeights {
    stored: Owned<Arc<Stored>>,
}

#[pymethods]
impl PyStoredWeights {
    #[getter]
    fn note(&self) -> PyResult<String> {
        Ok(self.stored.get()?.note().to_owned())
    }

    #[getter]
    fn bytes(&self) -> PyResult<u64> {
        Ok(self.stored.get()?.bytes().0)
    }

    /// Fills an empty region, and seals it.
    fn load(&self, py: Python<'_>, region: &PyRegion, tensors: Vec<TensorTuple>) -> PyResult<()> {
        let (stored, region) = (self.stored.get()?, region.get()?);
        let tensors = tensors_of(tensors)?;
        py.detach(|| region.load_stored(stored, &tensors)).map(drop).map_err(errors::of_weights)
    }

    /// Lets a sealed region be read from here.
    fn attach(&self, region: &PyRegion) -> PyResult<()> {
        region.get()?.attach_stored(Arc::clone(self.stored.get()?)).map_err(errors::of_weights)
    }
}
