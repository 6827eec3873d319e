//! Tiers below the device: `Store`, `HostTier`, `DiskTier`, `RemoteTier`, a `Stack` of them, and `KvTier`, a cache's connection to one.
//!
//! All calls that may wait let the GIL go. What a tier fails at is a count, never an exception: an engine only computes again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use shoal_core::bytes::ByteCount;
use shoal_core::kv::prefix::BlockKey;
use shoal_core::protocol::{TierPlace, TierUsage};
use shoal_memory::disk::{DiskKey, DiskOptions, DiskSpec, DiskState, DiskTier, DiskUsage, Engine};
use shoal_memory::remote::{RemoteKey, RemoteOptions, RemoteSpec, RemoteTier, login_from_file};
use shoal_memory::store::{
    AdmissionRule, BatchOptions, Fingerprint, HostOptions, HostTier, Offered, Stack, StackOptions, Store,
    StoreKey, TierCounts, get_all, put_all,
};
use shoal_memory::{KvTier, KvTierOptions, Loading, Prefetch};

use crate::buffer::{Bytes, BytesMut};
use crate::convert;
use crate::errors;
use crate::kv_cache::{PyKvCache, bytes_of, list_of_tokens};
use crate::manager::PyMemoryManager;
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

    /// Which of the blocks it has, as far as it knows without reading.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python list")]
    fn contains(&self, keys: Vec<PyRef<'_, PyStoreKey>>) -> PyResult<Vec<bool>> {
        let store = self.store.get()?;
        Ok(keys.iter().map(|key| store.contains(&key.0)).collect())
    }

    /// Reads blocks into buffers of their lengths. For each, whether it was there, verified and in time.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python list")]
    fn get(
        &self,
        py: Python<'_>,
        keys: Vec<PyRef<'_, PyStoreKey>>,
        buffers: Vec<Bound<'_, PyAny>>,
        deadline_s: f64,
    ) -> PyResult<Vec<bool>> {
        let (store, options) = (self.store.get()?, batch_options(deadline_s)?);
        same_length(keys.len(), buffers.len())?;
        let targets = buffers.iter().map(BytesMut::of).collect::<PyResult<Vec<_>>>()?;
        let wanted: Vec<_> = keys.iter().zip(&targets).map(|(key, target)| (key.0, target.len())).collect();
        let results = py.detach(|| get_all(&**store, &wanted, options, |at, block| targets[at].write(block)));
        Ok(results.iter().map(Result::is_ok).collect())
    }

    /// Keeps blocks. For each `"written"`, `"already"`, `"declined"`, or nothing where it failed.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python list")]
    fn put(
        &self,
        py: Python<'_>,
        keys: Vec<PyRef<'_, PyStoreKey>>,
        buffers: Vec<Bound<'_, PyAny>>,
        deadline_s: f64,
    ) -> PyResult<Vec<Option<&'static str>>> {
        let (store, options) = (self.store.get()?, batch_options(deadline_s)?);
        same_length(keys.len(), buffers.len())?;
        let sources = buffers.iter().map(Bytes::of).collect::<PyResult<Vec<_>>>()?;
        let blocks: Vec<_> =
            keys.iter().zip(&sources).map(|(key, source)| (key.0, source.as_slice())).collect();
        let results = py.detach(|| put_all(&**store, &blocks, options));
        let word = |offered| match offered {
            Offered::Written => "written",
            Offered::Already => "already",
            Offered::Declined => "declined",
        };
        Ok(results.into_iter().map(|result| result.ok().map(word)).collect())
    }

    /// Forgets blocks. For each, whether there was one, as far as that is known in time.
    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python list")]
    fn remove(
        &self,
        py: Python<'_>,
        keys: Vec<PyRef<'_, PyStoreKey>>,
        deadline_s: f64,
    ) -> PyResult<Vec<bool>> {
        let (store, deadline) = (self.store.get()?, convert::seconds("deadline_s", deadline_s)?);
        let keys: Vec<StoreKey> = keys.iter().map(|key| key.0).collect();
        Ok(py.detach(|| {
            let tickets: Vec<_> = keys.into_iter().map(|key| store.remove(key, deadline)).collect();
            tickets.into_iter().map(|ticket| ticket.wait().unwrap_or(false)).collect()
        }))
    }

    /// Writes out what was put before. Whether it was in time, and could be.
    fn flush(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let (store, timeout) = (self.store.get()?, convert::seconds("timeout_s", timeout_s)?);
        Ok(py.detach(|| store.flush(timeout).wait().is_ok()))
    }
}

fn batch_options(deadline_s: f64) -> PyResult<BatchOptions> {
    Ok(BatchOptions { deadline: convert::seconds("deadline_s", deadline_s)?, ..BatchOptions::default() })
}

fn same_length(keys: usize, buffers: usize) -> PyResult<()> {
    if keys == buffers {
        return Ok(());
    }
    Err(PyValueError::new_err(format!("there are {keys} keys and {buffers} buffers")))
}

/// The name of a block.
#[pyclass(frozen, name = "StoreKey", module = "shoal._native")]
pub(crate) struct PyStoreKey(StoreKey);

/// What a program's blocks are of, and whose.
#[pyclass(frozen, name = "StoreNames", module = "shoal._native")]
pub(crate) struct PyStoreNames {
    fingerprint: Fingerprint,
    salt: Vec<u8>,
}

#[pymethods]
impl PyStoreNames {
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python list")]
    fn new(facts: Vec<(String, String)>, salt: &Bound<'_, PyAny>) -> PyResult<Self> {
        let facts: Vec<_> = facts.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        Ok(Self { fingerprint: Fingerprint::of(&facts), salt: bytes_of("salt", salt)? })
    }

    /// The name of the block that the program calls so.
    fn key(&self, name: &[u8]) -> PyStoreKey {
        PyStoreKey(StoreKey::new(self.fingerprint, &self.salt, &BlockKey::Engine(name.into())))
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
        key_file: Option<PathBuf>,
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
        let open = || {
            options.key = key_file.map(|path| DiskKey::from_file(&path)).transpose()?;
            DiskTier::open(&disks, options)
        };
        let tier = py.detach(open).map_err(errors::of_disk)?;
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

/// Blocks in this process's memory.
#[pyclass(frozen, name = "HostTier", module = "shoal._native")]
pub(crate) struct PyHostTier {
    tier: Owned<Arc<HostTier>>,
}

#[pymethods]
impl PyHostTier {
    #[new]
    fn new(bytes_max: u64, memory: Option<&PyMemoryManager>) -> PyResult<Self> {
        let options = HostOptions::new(ByteCount(bytes_max));
        let tier = match memory {
            Some(memory) => HostTier::in_arena(options, memory.get()?),
            None => HostTier::new(options),
        };
        Ok(Self { tier: Owned::new(Arc::new(tier)) })
    }

    fn store(&self) -> PyResult<PyStore> {
        let store: Arc<dyn Store> = self.tier.get()?.clone();
        Ok(PyStore { store: Owned::new(store) })
    }

    /// A dict of figures.
    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let usage = self.tier.get()?.usage();
        let dict = PyDict::new(py);
        let figures = [
            ("blocks", usage.blocks),
            ("bytes", usage.bytes),
            ("bytes_max", usage.bytes_max),
            ("hits", usage.hits),
            ("absent", usage.absent),
            ("written", usage.written),
            ("evicted", usage.evicted),
            ("corrupt", usage.corrupt),
        ];
        for (name, value) in figures {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }
}

/// Blocks on an object store, a Redis or a shared directory.
#[pyclass(frozen, name = "RemoteTier", module = "shoal._native")]
pub(crate) struct PyRemoteTier {
    tier: Owned<Arc<RemoteTier>>,
}

#[pymethods]
impl PyRemoteTier {
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "extracted from Python")]
    fn new(
        py: Python<'_>,
        address: &str,
        key_file: PathBuf,
        login_file: Option<PathBuf>,
        uses_min: u32,
    ) -> PyResult<Self> {
        let open = || -> Result<_, String> {
            let key = RemoteKey::from_file(&key_file)?;
            let login = login_file.as_deref().map(login_from_file).transpose()?;
            let spec = RemoteSpec::parse(address, login.as_deref())?;
            let admission = AdmissionRule { uses_min };
            Ok((spec, RemoteOptions { admission, ..RemoteOptions::new(key) }))
        };
        let (spec, options) = py.detach(open).map_err(PyValueError::new_err)?;
        let tier = py.detach(|| RemoteTier::open(&spec, options))?;
        Ok(Self { tier: Owned::new(Arc::new(tier)) })
    }

    fn store(&self) -> PyResult<PyStore> {
        let store: Arc<dyn Store> = self.tier.get()?.clone();
        Ok(PyStore { store: Owned::new(store) })
    }

    /// Why it is set aside, if it is.
    fn aside(&self) -> PyResult<Option<String>> {
        Ok(self.tier.get()?.usage().aside)
    }

    /// A dict of figures.
    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counts = self.tier.get()?.usage().counts;
        let dict = PyDict::new(py);
        let figures = [
            ("hits", counts.hits),
            ("absent", counts.absent),
            ("corrupt", counts.corrupt),
            ("failed", counts.failed),
            ("retries", counts.retries),
            ("refused", counts.refused),
            ("written", counts.written),
            ("bytes_read", counts.bytes_read),
            ("bytes_written", counts.bytes_written),
            ("probes", counts.probes),
            ("asides", counts.asides),
        ];
        for (name, value) in figures {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }
}

/// Several tiers as one.
#[pyclass(frozen, name = "TierStack", module = "shoal._native")]
pub(crate) struct PyTierStack {
    stack: Owned<Arc<Stack>>,
}

#[pymethods]
impl PyTierStack {
    #[new]
    #[expect(clippy::needless_pass_by_value, reason = "extracted from a Python list")]
    fn new(py: Python<'_>, tiers: Vec<PyRef<'_, PyStore>>, copy_bytes_max: u64) -> PyResult<Self> {
        let tiers = tiers.iter().map(|tier| tier.store.get().cloned()).collect::<PyResult<Vec<_>>>()?;
        let options = StackOptions { copy_bytes_max: ByteCount(copy_bytes_max), ..StackOptions::default() };
        let stack = py.detach(|| Stack::new(tiers, options)).map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidInput => PyValueError::new_err(error.to_string()),
            _ => PyErr::from(error),
        })?;
        Ok(Self { stack: Owned::new(Arc::new(stack)) })
    }

    fn store(&self) -> PyResult<PyStore> {
        let store: Arc<dyn Store> = self.stack.get()?.clone();
        Ok(PyStore { store: Owned::new(store) })
    }

    /// A dict of each tier's counts, the fastest first.
    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        let counts = self.stack.get()?.counts();
        let each = |tier: &TierCounts| {
            let dict = PyDict::new(py);
            dict.set_item("name", &tier.name)?;
            let figures = [
                ("hits", tier.hits),
                ("hit_bytes", tier.hit_bytes),
                ("missed", tier.missed),
                ("written", tier.written),
                ("written_bytes", tier.written_bytes),
                ("promoted", tier.promoted),
                ("refused", tier.refused),
                ("declined", tier.declined),
            ];
            for (name, value) in figures {
                dict.set_item(name, value)?;
            }
            Ok(dict)
        };
        counts.tiers.iter().map(each).collect()
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
    #[expect(clippy::too_many_arguments, reason = "Python's face names them")]
    fn new(
        py: Python<'_>,
        cache: &PyKvCache,
        store: &PyStore,
        facts: Vec<(String, String)>,
        load_s: f64,
        put_s: f64,
        is_choosing: bool,
        idle_s: Option<f64>,
    ) -> PyResult<Self> {
        let (cache, store) = (cache.get()?, Arc::clone(store.store.get()?));
        let (load_wait, put_wait) = (convert::seconds("load_s", load_s)?, convert::seconds("put_s", put_s)?);
        let idle = idle_s.map(|idle_s| convert::seconds("idle_s", idle_s)).transpose()?;
        let options = KvTierOptions { load_wait, put_wait, is_choosing, idle, ..KvTierOptions::new(facts) };
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

    /// Whether there may be something to load.
    fn may_load(
        &self,
        py: Python<'_>,
        salt: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
        held: usize,
    ) -> PyResult<bool> {
        let (tier, salt, tokens) = (self.tier.get()?, bytes_of("salt", salt)?, list_of_tokens(tokens)?);
        Ok(py.detach(|| tier.may_load(&salt, &tokens, held)))
    }

    /// Begins a load; none where there is nothing worth it.
    fn begin_load(
        &self,
        py: Python<'_>,
        salt: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
        held: usize,
    ) -> PyResult<Option<PyLoading>> {
        let (tier, salt, tokens) = (self.tier.get()?, bytes_of("salt", salt)?, list_of_tokens(tokens)?);
        let loading = py.detach(|| tier.begin_load(&salt, &tokens, held));
        Ok(loading.map(|loading| PyLoading { loading: Owned::new(loading) }))
    }

    /// Begins to bring a sequence up to the fastest tier; none where too many wait.
    fn prefetch(
        &self,
        py: Python<'_>,
        salt: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
    ) -> PyResult<Option<PyPrefetch>> {
        let (tier, salt, tokens) = (self.tier.get()?, bytes_of("salt", salt)?, list_of_tokens(tokens)?);
        let prefetch = py.detach(|| tier.prefetch(&salt, &tokens));
        Ok(prefetch.map(|prefetch| PyPrefetch { prefetch: Owned::new(prefetch) }))
    }

    /// A step of the engine computed so many tokens in that time.
    fn computed(&self, tokens: u64, seconds: f64) -> PyResult<()> {
        self.tier.get()?.computed(tokens, convert::seconds("seconds", seconds)?);
        Ok(())
    }

    /// Knows what another connection of the cache has seen.
    fn learn_from(&self, other: &Self) -> PyResult<()> {
        self.tier.get()?.learn_from(other.tier.get()?);
        Ok(())
    }

    /// What bringing one MiB more to the device takes; none before something was loaded.
    fn load_us_per_mib(&self) -> PyResult<Option<f64>> {
        Ok(self.tier.get()?.load_us_per_mib())
    }

    /// What was decided last, in words.
    fn choice(&self) -> PyResult<Option<String>> {
        Ok(self.tier.get()?.last_choice())
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

/// Blocks on their way to the device.
#[pyclass(frozen, name = "Loading", module = "shoal._native")]
pub(crate) struct PyLoading {
    loading: Owned<Loading>,
}

#[pymethods]
impl PyLoading {
    fn is_done(&self) -> PyResult<bool> {
        Ok(self.loading.get()?.is_done())
    }

    /// Waits until it is done.
    fn wait(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let loading = self.loading.get()?;
        let timeout: Duration = convert::seconds("timeout_s", timeout_s)?;
        Ok(py.detach(|| loading.wait(Instant::now() + timeout)))
    }

    /// What has come; none while it is under way.
    fn take(&self, py: Python<'_>) -> PyResult<Option<Vec<u32>>> {
        let loading = self.loading.get()?;
        Ok(py.detach(|| loading.take()))
    }

    fn cancel(&self, py: Python<'_>) -> PyResult<()> {
        let loading = self.loading.get()?;
        py.detach(|| loading.cancel());
        Ok(())
    }
}

/// A sequence on its way up.
#[pyclass(frozen, name = "Prefetch", module = "shoal._native")]
pub(crate) struct PyPrefetch {
    prefetch: Owned<Prefetch>,
}

#[pymethods]
impl PyPrefetch {
    fn cancel(&self) -> PyResult<()> {
        self.prefetch.get()?.cancel();
        Ok(())
    }
}
