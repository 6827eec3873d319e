//! Values that belong to the process that made them.
//!
//! A device context, a thread and a mapping do not survive `fork`, but Python objects do. So every handle remembers its
//! process: used elsewhere it raises `ForkError`, and dropped elsewhere it is left alone, because the child shares the
//! parent's memory file and would take the parent's bytes with it (I2).

use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use pyo3::prelude::*;

use crate::errors;

/// How often a process has come out of a fork, as far as the interpreter heard of it.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// The interpreter calls it in a child.
#[pyfunction]
pub(crate) fn after_fork_in_child() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// A value and the process that may use it.
#[derive(Debug)]
pub(crate) struct Owned<T: Send> {
    /// `None` only while it is being dropped.
    value: Option<T>,
    owner: u32,
    forks: u32,
}

impl<T: Send> Owned<T> {
    /// Takes a value that this process made.
    pub(crate) fn new(value: T) -> Self {
        Self { value: Some(value), owner: process::id(), forks: FORKS.load(Ordering::Relaxed) }
    }

    /// The value, in the process that made it.
    ///
    /// # Errors
    /// `ForkError` elsewhere.
    pub(crate) fn get(&self) -> PyResult<&T> {
        let pid = process::id();
        match &self.value {
            Some(value) if self.owner == pid => Ok(value),
            _ => Err(errors::forked(self.owner, pid)),
        }
    }

    /// The same without asking the system who we are, which would cost as much as a short call itself: a fork that the
    /// interpreter did not make is not seen.
    ///
    /// # Errors
    /// `ForkError` elsewhere.
    #[inline]
    pub(crate) fn get_fast(&self) -> PyResult<&T> {
        match &self.value {
            Some(value) if self.forks == FORKS.load(Ordering::Relaxed) => Ok(value),
            _ => Err(errors::forked(self.owner, process::id())),
        }
    }
}

impl<T: Send> Drop for Owned<T> {
    fn drop(&mut self) {
        let value = self.value.take();
        if self.owner != process::id() {
            std::mem::forget(value);
            return;
        }
        // Dropping may unmap and wait for a thread. Let others run meanwhile, unless the interpreter is gone already.
        let mut value = Some(value);
        if Python::try_attach(|py| {
            let value = value.take();
            py.detach(move || drop(value));
        })
        .is_none()
        {
            drop(value);
        }
    }
}
