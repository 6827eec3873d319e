//! Locks of what `tests/` also runs on loom's, which tries every order in which threads may meet.
//!
//! Apart because there the same source is compiled with another module of this name.

pub(crate) use parking_lot::{Condvar, Mutex};
