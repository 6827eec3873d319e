//! `MemoryManager` and its guard.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use shoal_core::bytes::ByteCount;
use shoal_core::extent::ExtentRule;
use shoal_core::protocol::LeaseKind;
use shoal_device::{CudaDevice, Device, DeviceError, DeviceMemory, SimDevice, SimOptions};
use shoal_memory::{
    BrokerClient, Guard, LeaseAhead, LeaseSource, LocalBudget, ManagerOptions, MemoryError, MemoryManager,
    RegionSpec, Segments,
};

use crate::broker::PyBrokerClient;
use crate::convert::{self, ReportTuple};
use crate::errors;
use crate::kv_cache::{self, PyKvCache};
use crate::owner::Owned;
use crate::region::{PyRegion, PyTransfer};

/// One device's memory in this process.
#[pyclass(frozen, name = "MemoryManager", module = "shoal._native")]
pub(crate) struct PyMemoryManager {
    manager: Owned<Arc<MemoryManager>>,
    /// What was leased before it is needed.
    ahead: Arc<LeaseAhead>,
}

impl PyMemoryManager {
    pub(crate) fn get(&self) -> PyResult<&Arc<MemoryManager>> {
        self.manager.get()
    }
}

#[pymethods]
impl PyMemoryManager {
    #[new]
    #[pyo3(signature = (device, device_capacity, device_budget, host_budget, runtime_dir, broker, overhead))]
    #[expect(clippy::too_many_arguments, reason = "Python's face names them")]
    fn new(
        py: Python<'_>,
        device: &str,
        device_capacity: u64,
        device_budget: Option<u64>,
        host_budget: u64,
        runtime_dir: PathBuf,
        broker: Option<&PyBrokerClient>,
        overhead: u64,
    ) -> PyResult<Self> {
        let choice = Choice::of(device)?;
        let client = broker.map(|broker| broker.client().map(Arc::clone)).transpose()?;
        let (manager, ahead) = py.detach(move || {
            if let Some(client) = &client {
                lease_overhead(client.as_ref(), ByteCount(overhead)).map_err(errors::of_memory)?;
            }
            let device = choice
                .open(ByteCount(device_capacity), runtime_dir)
                .map_err(|error| errors::of_device(&error))?;
            let lease: Arc<dyn LeaseSource> = match (&client, device_budget) {
                (Some(client), _) => Arc::clone(client) as _,
                (None, Some(budget)) => LocalBudget::new(ByteCount(budget)) as _,
                (None, None) => {
                    let memory = device.memory().map_err(|error| errors::of_device(&error))?;
                    LocalBudget::new(choice.default_budget(memory)) as _
                }
            };
            let ahead = LeaseAhead::new(lease);
            let mut options = ManagerOptions::new(ByteCount(host_budget), Arc::clone(&ahead) as _);
            options.slabs = client.as_ref().and_then(BrokerClient::slab_source);
            let manager = MemoryManager::new(device, options).map_err(errors::of_memory)?;
            if let Some(client) = client {
                client.serve(&manager).map_err(errors::of_memory)?;
            }
            Ok::<_, PyErr>((manager, ahead))
        })?;
        Ok(Self { manager: Owned::new(manager), ahead })
    }

    /// Leases bytes for regions to come.
    fn lease_ahead(
        &self,
        py: Python<'_>,
        kind: &str,
        nbytes: u64,
        timeout_s: f64,
        reason: &str,
    ) -> PyResult<()> {
        self.manager.get()?;
        let (kind, bytes) = (convert::lease_kind(kind)?, ByteCount(nbytes));
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        py.detach(|| self.ahead.keep(kind, bytes, timeout, reason))
            .map_err(|source| errors::of_memory(MemoryError::Lease { region: reason.to_owned(), source }))
    }

    /// Gives back what was leased and not needed; how many bytes that was.
    fn give_up_leases(&self, py: Python<'_>) -> PyResult<u64> {
        self.manager.get()?;
        Ok(py.detach(|| self.ahead.give_up()).0)
    }

    /// Makes the lease for what the process takes besides its regions so large.
    fn set_overhead(&self, py: Python<'_>, nbytes: u64, timeout_s: f64) -> PyResult<()> {
        self.manager.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        py.detach(|| set_overhead(self.ahead.as_ref(), ByteCount(nbytes), timeout)).map_err(errors::of_memory)
    }

    fn region(
        &self,
        py: Python<'_>,
        name: String,
        nbytes: Option<u64>,
        kind: &str,
        backing: &str,
    ) -> PyResult<PyRegion> {
        let manager = self.manager.get()?;
        let Some(nbytes) = nbytes else {
            let (kind, backing) = (convert::lease_kind(kind)?, convert::backing(backing)?);
            let made = py.detach(|| Segments::new(manager, name, kind, backing));
            return Ok(PyRegion::growing(made.map_err(errors::of_memory)?));
        };
        if nbytes == 0 {
            return Err(PyValueError::new_err(format!(
                "region {name:?} of 0 bytes: a region needs a length"
            )));
        }
        let spec = RegionSpec {
            name,
            bytes: ByteCount(nbytes),
            kind: convert::lease_kind(kind)?,
            extent_rule: ExtentRule::default(),
            backing: convert::backing(backing)?,
        };
        let region = py.detach(|| manager.region(spec)).map_err(errors::of_memory)?;
        Ok(PyRegion::new(region))
    }

    /// A cache of KV blocks; its shape as a plain dictionary, which the package has checked.
    fn kv_cache(&self, py: Python<'_>, spec: &Bound<'_, PyAny>) -> PyResult<PyKvCache> {
        let manager = self.manager.get()?;
        let spec = kv_cache::spec(spec)?;
        let cache = py.detach(|| manager.kv_cache(spec)).map_err(errors::of_memory)?;
        Ok(PyKvCache::new(cache))
    }

    fn guard(&self, py: Python<'_>, timeout_s: f64) -> PyResult<PyGuard> {
        let manager = self.manager.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let guard = py.detach(|| manager.guard(timeout)).map_err(errors::of_memory)?;
        Ok(PyGuard::new(guard))
    }

    /// A guard of everything, entered beside the wake of this region that is given with it.
    fn guard_in_order(
        &self,
        py: Python<'_>,
        region: &PyRegion,
        timeout_s: f64,
    ) -> PyResult<(PyGuard, Option<PyTransfer>)> {
        let (manager, region) = (self.manager.get()?, region.get()?);
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let (guard, wake) =
            py.detach(|| manager.guard_in_order(region, timeout)).map_err(errors::of_memory)?;
        Ok((PyGuard::new(guard), wake.map(|wake| PyTransfer::begun(wake, timeout))))
    }

    fn swap(
        &self,
        py: Python<'_>,
        out: &PyRegion,
        into: &PyRegion,
        trust_clean: bool,
        timeout_s: f64,
    ) -> PyResult<(ReportTuple, ReportTuple)> {
        let (manager, out, into) = (self.manager.get()?, out.get()?, into.get()?);
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        let report =
            py.detach(|| manager.swap(out, into, trust_clean, timeout)).map_err(errors::of_memory)?;
        Ok((convert::evicted(py, report.out), convert::restored(&report.into)))
    }

    fn reclaim(&self, py: Python<'_>, nbytes: u64, timeout_s: f64, reason: &str) -> PyResult<ReportTuple> {
        let manager = self.manager.get()?;
        let timeout = convert::seconds("timeout_s", timeout_s)?;
        py.detach(|| manager.reclaim(ByteCount(nbytes), timeout, reason))
            .map(|report| convert::evicted(py, report))
            .map_err(errors::of_memory)
    }

    /// How many bytes of the device torch's allocations leave free.
    fn set_margin(&self, nbytes: u64) -> PyResult<()> {
        self.manager.get()?.set_margin(ByteCount(nbytes));
        Ok(())
    }

    /// Gives host memory back that is kept for the next copies; its bytes.
    fn trim_host(&self, py: Python<'_>) -> PyResult<u64> {
        let manager = self.manager.get()?;
        Ok(py.detach(|| manager.trim_host()).0)
    }

    fn usage<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let manager = self.manager.get()?;
        let usage = py.detach(|| manager.usage());
        convert::plain(py, &usage)
    }

    fn host_memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let manager = self.manager.get()?;
        let usage = py.detach(|| manager.host_usage());
        let dict = PyDict::new(py);
        for (name, bytes) in [
            ("budget", usage.budget),
            ("used", usage.used),
            ("made", usage.made),
            ("locked", usage.locked),
            ("spare", usage.spare),
        ] {
            dict.set_item(name, bytes.0)?;
        }
        dict.set_item("reasons", usage.reasons)?;
        Ok(dict)
    }

    fn device_memory<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let manager = self.manager.get()?;
        let memory = py.detach(|| manager.device().memory()).map_err(|error| errors::of_device(&error))?;
        let dict = PyDict::new(py);
        dict.set_item("total", memory.total.0)?;
        dict.set_item("free", memory.free.0)?;
        dict.set_item("used_by_this_process", memory.used_by_this_process.0)?;
        Ok(dict)
    }
}

/// Takes a lease for what a process needs besides its regions, before it takes that: it is held until the process ends.
fn lease_overhead(source: &dyn LeaseSource, bytes: ByteCount) -> Result<(), MemoryError> {
    if bytes.is_zero() {
        return Ok(());
    }
    source
        .acquire(LeaseKind::Overhead, bytes, bytes, OVERHEAD_WAIT, "its context and libraries")
        .map(drop)
        .map_err(|source| MemoryError::Lease { region: "context and libraries".to_owned(), source })
}

/// Takes what is missing of that lease, or gives back what is too much.
fn set_overhead(source: &dyn LeaseSource, bytes: ByteCount, timeout: Duration) -> Result<(), MemoryError> {
    let held = source.held(LeaseKind::Overhead);
    if bytes < held {
        source.give_back(LeaseKind::Overhead, held - bytes);
        return Ok(());
    }
    if bytes == held {
        return Ok(());
    }
    let lacking = bytes - held;
    source
        .acquire(LeaseKind::Overhead, lacking, lacking, timeout, "its context, libraries and activations")
        .map(drop)
        .map_err(|source| MemoryError::Lease { region: "context and libraries".to_owned(), source })
}

/// How long a process waits for room for its context.
const OVERHEAD_WAIT: Duration = Duration::from_mins(1);
/// What is left of a GPU's free memory when nobody says how much of it to use.
const HEADROOM: ByteCount = ByteCount::gib(1);

/// How fast a simulated device's link is each way, in MiB a second; as fast as the machine where it is not set.
const SIM_LINK: &str = "SHOAL_SIM_LINK_MIB_PER_S";

fn sim_link() -> Option<ByteCount> {
    let speed: u64 = std::env::var(SIM_LINK).ok()?.parse().ok()?;
    Some(ByteCount::mib(speed)).filter(|speed| !speed.is_zero())
}

/// Which device to open.
#[derive(Clone, Copy, Debug)]
enum Choice {
    Sim(u32),
    Cuda(u32),
}

impl Choice {
    /// From `"sim"`, `"sim:N"`, `"cuda"` or `"cuda:N"`.
    fn of(device: &str) -> PyResult<Self> {
        let (kind, number) = device.split_once(':').unwrap_or((device, "0"));
        let make = match kind {
            "sim" => Self::Sim,
            "cuda" => Self::Cuda,
            _ => {
                return Err(PyValueError::new_err(format!(
                    "device must be \"auto\", \"sim\" or \"cuda:N\", not {device:?}"
                )));
            }
        };
        number.parse().map(make).map_err(|_| {
            PyValueError::new_err(format!("device {device:?}: what follows \"{kind}:\" must be a number"))
        })
    }

    fn open(self, capacity: ByteCount, runtime_dir: PathBuf) -> Result<Arc<dyn Device>, DeviceError> {
        match self {
            Self::Sim(ordinal) => {
                let copy_bandwidth = sim_link();
                SimDevice::open_dyn(SimOptions {
                    ordinal,
                    copy_bandwidth,
                    ..SimOptions::new(capacity, runtime_dir)
                })
            }
            Self::Cuda(ordinal) => CudaDevice::open_dyn(ordinal),
        }
    }

    /// The budget of a manager that was given none.
    fn default_budget(self, memory: DeviceMemory) -> ByteCount {
        match self {
            Self::Sim(_) => memory.total,
            Self::Cuda(_) => memory.free.saturating_sub(HEADROOM),
        }
    }
}

/// A shared pass through the manager's gate.
#[pyclass(frozen, name = "Guard", module = "shoal._native")]
pub(crate) struct PyGuard {
    guard: Mutex<Option<Owned<Guard>>>,
}

impl PyGuard {
    pub(crate) fn new(guard: Guard) -> Self {
        Self { guard: Mutex::new(Some(Owned::new(guard))) }
    }
}

#[pymethods]
impl PyGuard {
    fn release(&self, py: Python<'_>) -> PyResult<()> {
        // The data lock is let go on this line: what follows may wait, and the GIL is the outermost lock (I9).
        let guard = self.guard.lock().take();
        if let Some(guard) = guard {
            guard.get()?;
            py.detach(move || drop(guard));
        }
        Ok(())
    }
}
