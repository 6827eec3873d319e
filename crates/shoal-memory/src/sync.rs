//! Locks of what `tests/` also runs on loom's, which tries every order in which threads may meet.
//!
//! Apart because there the same source is compiled with another module of this name.

pub(crate) use std::thread::ThreadId;

pub(crate) use parking_lot::{Condvar, Mutex, MutexGuard};

/// Which thread this is.
pub(crate) fn this_thread() -> ThreadId {
    std::thread::current().id()
}
