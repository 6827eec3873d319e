//! Tiers below the device: `Store`, `DiskTier`, and `KvTier`, a cache's connection to one.
//!
//! All calls that may wait let the GIL go. What a tier fails at is a count, never an exception: an engine only computes again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{TierPlace, TierUsage};
use shoal_memory::disk::{DiskOptions, DiskSpec, DiskState, DiskTier, DiskUsage, Engine};
use shoal_memory::store::{AdmissionRule, Store};
use shoal_memory::{KvTier, KvTierOptions};

use crate::convert;
use crate::errors;
use crate::kv_cache::{PyKvCache, bytes_of, list_of_tokens};
use crate::owner::Owned;

/// A tier, whatever it is made of.
#[pyclass(frozen, name = "Store", module = "shoal._native")]
pub(crate) struct PyStore {
    store: Owned<Arc<dyn Store>>,
}

#[pymethods]
impl PyStore {
    #[getter]
    fn name(&self) -> PyResult<String> {
        Ok(self.store.get()?.name().to_owned())
    }
}

/// Blocks on disks.
#[pyclass(frozen, name = "DiskTier", module = "shoal._native")]
pub(crate) struct PyDiskTier {
    tier: Owned<Arc<DiskTier>>,
}

#[pymethods]
impl PyDiskTier {
    #[new]
    fn new(
        py: Python<'_>,
        disks: Vec<(PathBuf, u64, Option<u64>)>,
        segment_bytes: Option<u64>,
        uses_min: u32,
        engine: &str,
    ) -> PyResult<Self> {
        let engine = match engine {
            "auto" => Engine::Auto,
            "threads" => Engine::Threads,
            other => {
                let message = format!("engine must be \"auto\" or \"threads\", not {other:?}");
                return Err(PyValueError::new_err(message));
            }
        };
        let disks: Vec<DiskSpec> = disks
            .into_iter()
            .map(|(path, bytes, per_hour)| DiskSpec {
                path,
                bytes: ByteCount(bytes),
                write_bytes_per_hour: per_hour.map(ByteCount),
            })
            .collect();
        let mut options = DiskOptions::fitting(&disks);
        options.segment_bytes = segment_bytes.map_or(options.segment_bytes, ByteCount);
        options.engine = engine;
        options.admission = AdmissionRule { uses_min };
        let tier = py.detach(|| DiskTier::open(&disks, options)).map_err(errors::of_disk)?;
        Ok(Self { tier: Owned::new(Arc::new(tier)) })
    }

    fn store(&self) -> PyResult<PyStore> {
        let store: Arc<dyn Store> = self.tier.get()?.clone();
        Ok(PyStore { store: Owned::new(store) })
    }

    /// A dict for each directory.
    fn places<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let tier = self.tier.get()?;
        let places: Vec<TierPlace> = py.detach(|| tier.usage().into_iter().map(place).collect());
        convert::to_plain(py, &places)
    }

    fn close(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let tier = self.tier.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        Ok(py.detach(|| tier.close(timeout)))
    }
}

fn place(disk: DiskUsage) -> TierPlace {
    let (state, reason) = match disk.state {
        DiskState::Opening => ("opening", None),
        DiskState::Ready => ("ready", None),
        DiskState::Aside { reason, .. } => ("aside", Some(reason)),
        DiskState::Closed => ("closed", None),
    };
    TierPlace {
        path: disk.path.display().to_string(),
        state: state.to_owned(),
        reason,
        means: disk.means.engine.to_owned(),
        blocks: disk.log.blocks,
        bytes: ByteCount(disk.log.live_bytes),
        bytes_max: disk.bytes_max,
        corrupt: disk.counts.corrupt,
        failed: disk.counts.failed + disk.counts.hung,
        asides: disk.counts.asides,
    }
}

/// A cache's connection to a tier.
#[pyclass(frozen, name = "KvTier", module = "shoal._native")]
pub(crate) struct PyKvTier {
    tier: Owned<KvTier>,
}

#[pymethods]
impl PyKvTier {
    #[new]
    fn new(
        py: Python<'_>,
        cache: &PyKvCache,
        store: &PyStore,
        facts: Vec<(String, String)>,
        load_s: f64,
        put_s: f64,
    ) -> PyResult<Self> {
        let (cache, store) = (cache.get()?, Arc::clone(store.store.get()?));
        let (load_wait, put_wait) = (convert::seconds("load_s", load_s)?, convert::seconds("put_s", put_s)?);
        let options = KvTierOptions { load_wait, put_wait, ..KvTierOptions::new(facts) };
        let tier = py.detach(|| KvTier::new(cache, store, options)).map_err(errors::of_memory)?;
        Ok(Self { tier: Owned::new(tier) })
    }

    /// Blocks that follow those which the caller has.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python list")]
    fn load(
        &self,
        py: Python<'_>,
        salt: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
        held: Vec<u32>,
    ) -> PyResult<Vec<u32>> {
        let (tier, salt, tokens) = (self.tier.get()?, bytes_of("salt", salt)?, list_of_tokens(tokens)?);
        Ok(py.detach(|| tier.load(&salt, &tokens, &held)))
    }

    fn save(
        &self,
        py: Python<'_>,
        salt: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
        first: usize,
    ) -> PyResult<()> {
        let (tier, salt, tokens) = (self.tier.get()?, bytes_of("salt", salt)?, list_of_tokens(tokens)?);
        py.detach(|| tier.save(&salt, &tokens, first));
        Ok(())
    }

    fn discard_queued(&self, py: Python<'_>) -> PyResult<()> {
        let tier = self.tier.get()?;
        py.detach(|| tier.discard_queued());
        Ok(())
    }

    fn flush(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let tier = self.tier.get()?;
        let timeout: Duration = convert::seconds("timeout_s", timeout_s)?;
        Ok(py.detach(|| tier.flush(timeout)))
    }

    /// A dict of counts.
    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let usage = TierUsage { counts: self.tier.get()?.counts(), ..TierUsage::default() };
        convert::to_plain(py, &usage)
    }
}
