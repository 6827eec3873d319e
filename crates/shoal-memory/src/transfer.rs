//! A wake under way: progress, cancelling, waiting with a deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use shoal_core::bytes::ByteCount;
use shoal_core::ids::TransferId;

use crate::error::MemoryError;
use crate::region::Report;

/// How far a transfer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: ByteCount,
    /// Bytes in all (known once the transfer has its lease).
    pub total: ByteCount,
    /// True when it has ended, in whatever way.
    pub is_finished: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Shared {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    outcome: Mutex<Option<Result<Report, MemoryError>>>,
    finished: Condvar,
}

impl Shared {
    pub(crate) fn set_total(&self, bytes: ByteCount) {
        self.total.store(bytes.0, Ordering::Relaxed);
    }

    pub(crate) fn add_done(&self, bytes: ByteCount) {
        self.done.fetch_add(bytes.0, Ordering::Relaxed);
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    pub(crate) fn cancelled(&self) -> MemoryError {
        let done = ByteCount(self.done.load(Ordering::Relaxed));
        MemoryError::Cancelled { done, total: ByteCount(self.total.load(Ordering::Relaxed)) }
    }

    pub(crate) fn finish(&self, outcome: Result<Report, MemoryError>) {
        *self.outcome.lock() = Some(outcome);
        self.finished.notify_all();
    }
}

/// A transfer under way. Dropping it stops nothing.
#[derive(Clone, Debug)]
pub struct Transfer {
    id: TransferId,
    shared: Arc<Shared>,
}

impl Transfer {
    pub(crate) const fn new(id: TransferId, shared: Arc<Shared>) -> Self {
        Self { id, shared }
    }

    /// Its name.
    #[must_use]
    pub const fn id(&self) -> TransferId {
        self.id
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress {
            done: ByteCount(self.shared.done.load(Ordering::Relaxed)),
            total: ByteCount(self.shared.total.load(Ordering::Relaxed)),
            is_finished: self.shared.outcome.lock().is_some(),
        }
    }

    /// Asks it to stop before the next extent. What was brought back until then stays.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
    }

    /// Waits for its end, at most `timeout`.
    ///
    /// # Errors
    /// What the transfer failed with; [`MemoryError::Deadline`] if it has not ended (it goes on).
    pub fn wait(&self, timeout: Duration) -> Result<Report, MemoryError> {
        let deadline = Instant::now() + timeout;
        let mut outcome = self.shared.outcome.lock();
        loop {
            if let Some(outcome) = outcome.as_ref() {
                return outcome.clone();
            }
            if self.shared.finished.wait_until(&mut outcome, deadline).timed_out() && outcome.is_none() {
                return Err(MemoryError::Deadline { doing: "a wake", waited: timeout });
            }
        }
    }
}
