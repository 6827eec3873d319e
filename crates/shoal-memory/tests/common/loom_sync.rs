//! What `crate::sync` of the crate is, over loom: for tests that compile a module of the crate with loom's locks.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::time::Instant;

pub(crate) use loom::thread::ThreadId;

/// Which thread this is.
pub(crate) fn this_thread() -> ThreadId {
    loom::thread::current().id()
}

#[derive(Default)]
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard { mutex: &self.0, held: Some(self.0.lock().expect("no panic")) }
    }
}

impl<T> fmt::Debug for Mutex<T> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("Mutex")
    }
}

pub(crate) struct MutexGuard<'a, T> {
    mutex: &'a loom::sync::Mutex<T>,
    held: Option<loom::sync::MutexGuard<'a, T>>,
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.held.as_ref().expect("held but while it waits")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.held.as_mut().expect("held but while it waits")
    }
}

#[derive(Debug)]
pub(crate) struct Condvar(loom::sync::Condvar);

impl Default for Condvar {
    fn default() -> Self {
        Self(loom::sync::Condvar::new())
    }
}

pub(crate) struct Waited(bool);

impl Waited {
    pub(crate) fn timed_out(&self) -> bool {
        self.0
    }
}

impl Condvar {
    /// Waits without end for a deadline that lies ahead; one that has passed is heard of at some later moment.
    pub(crate) fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, deadline: Instant) -> Waited {
        let held = guard.held.take().expect("held");
        if deadline <= Instant::now() {
            drop(held);
            loom::thread::yield_now();
            guard.held = Some(guard.mutex.lock().expect("no panic"));
            return Waited(true);
        }
        guard.held = Some(self.0.wait(held).expect("no panic"));
        Waited(false)
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}
