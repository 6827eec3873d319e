//! The server's policies for Python: a state in, a plan out, both as they stand in the decision log.
//!
//! JSON, because that is what a policy in Python reads and writes anyway; nothing is kept.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use shoal_core::policy::{BUILTIN, ShelfState, builtin};

/// The names there are, the default first.
#[pyfunction]
pub(crate) fn policies() -> Vec<&'static str> {
    BUILTIN.to_vec()
}

/// What the policy `name` would do of `state` (JSON) at `now_ms`.
#[pyfunction]
pub(crate) fn policy_plan(py: Python<'_>, name: &str, state: &str, now_ms: u64) -> PyResult<String> {
    let policy =
        builtin(name).ok_or_else(|| PyValueError::new_err(format!("there is no policy {name:?}")))?;
    py.detach(|| {
        let state: ShelfState = serde_json::from_str(state).map_err(|error| error.to_string())?;
        serde_json::to_string(&policy.plan(&state, now_ms)).map_err(|error| error.to_string())
    })
    .map_err(PyValueError::new_err)
}
