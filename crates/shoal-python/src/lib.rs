//! `shoal._native`: the Rust half of the Python package.
//!
//! What it does: PyO3 classes over `shoal-memory`, and the command line of `shoal-server`. Why it is apart: this is the
//! only crate that knows Python, so every other one serves a Rust user as it stands. It translates and decides nothing.
//!
//! Two rules hold in every function here. The GIL is the outermost lock (I9): it is let go (`Python::detach`) before
//! anything that can wait, and no thread that holds one of our locks ever takes it. And nothing happens at import: no
//! thread, socket or device call before the first object is made.

use pyo3::prelude::*;

/// The native half of the package; its documented face is `shoal`.
#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
