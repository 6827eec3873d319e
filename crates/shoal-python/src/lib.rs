//! `shoal._native`: the Rust half of the Python package.
//!
//! What it does: `PyO3` classes over `shoal-memory`, and the command line of `shoal-server`. Why it is apart: this is the
//! only crate that knows Python, so every other one serves a Rust user as it stands. It translates and decides nothing.
//!
//! | module | subject |
//! |---|---|
//! | `manager` | `MemoryManager` and its guard |
//! | `region` | `Region` and the transfer that a wake is |
//! | `kv` | `KvBacking` |
//! | `kv_cache` | `KvCache` and its groups |
//! | `tiers` | `DiskTier`, and a cache's connection to a tier |
//! | `broker` | `BrokerClient`: a worker's line to the server |
//! | `buffer`, `dlpack` | memory as the buffer protocol and as `DLPack` see it; the homes of `unsafe` |
//! | `policy` | the server's policies, for policies in Python |
//! | `torch_hooks` | what torch's allocator calls |
//! | `owner` | handles belong to the process that made them |
//! | `convert`, `errors` | Python's words for our values and our failures |
//!
//! Two rules hold in every function here. The GIL is the outermost lock (I9): it is let go (`Python::detach`) before
//! anything that can wait, and no thread that holds one of our locks ever takes it. And nothing happens at import: no
//! thread, socket or device call before the first object is made.

use pyo3::prelude::*;

mod broker;
mod buffer;
mod convert;
mod dlpack;
mod errors;
mod kv;
mod kv_cache;
mod manager;
mod owner;
mod policy;
mod region;
mod tiers;
mod torch_hooks;
mod weights;

/// The native half of the package; its documented face is `shoal`.
#[pymodule]
mod _native {
    use pyo3::prelude::*;
    use pyo3::types::PyDict;

    #[pymodule_export]
    use crate::broker::PyBrokerClient;
    #[pymodule_export]
    use crate::buffer::RegionBuffer;
    #[pymodule_export]
    use crate::convert::parse_bytes;
    #[pymodule_export]
    use crate::kv::PyKvBacking;
    #[pymodule_export]
    use crate::kv_cache::{PyKvCache, PyKvGroup};
    #[pymodule_export]
    use crate::manager::{PyGuard, PyMemoryManager};
    #[pymodule_export]
    use crate::policy::{policies, policy_plan};
    #[pymodule_export]
    use crate::region::{PyFlush, PyRegion, PyRegionUse, PyTransfer};
    #[pymodule_export]
    use crate::tiers::{
        PyDiskTier, PyHostTier, PyKvTier, PyLoading, PyPrefetch, PyRemoteTier, PyStore, PyStoreKey,
        PyStoreNames, PyTierStack,
    };
    #[pymodule_export]
    use crate::weights::{PyStoredWeights, PyWeightStore};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        let hook = PyDict::new(module.py());
        hook.set_item("after_in_child", wrap_pyfunction!(crate::owner::after_fork_in_child, module)?)?;
        module.py().import("os")?.call_method("register_at_fork", (), Some(&hook))?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }

    /// Runs the command line; gives the exit status.
    #[pyfunction]
    fn main(py: Python<'_>, argv: Vec<String>) -> i32 {
        py.detach(|| shoal_server::cli::run(argv))
    }
}
