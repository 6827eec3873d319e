//! What histories of a KV cache share: what may fail in them, and somebody else's lease.

use std::thread;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::ids::DeviceId;
use shoal_core::protocol::LeaseKind;
use shoal_device::{DeviceError, FaultDevice};
use shoal_memory::{ErrorKind, KvCache, LeaseSource, LocalBudget, MemoryError};

use super::{PAGE, WAIT};

/// What a device never says of itself: it tells an injected error from a real one.
fn injected_full(device: DeviceId, requested: ByteCount) -> DeviceError {
    DeviceError::OutOfMemory { device, requested, free: ByteCount::ZERO, capacity: ByteCount(PAGE) }
}

/// Lets the n-th device call from now on fail, as an error or as a full device.
pub(crate) fn arm(faults: &FaultDevice, device: DeviceId, fault: Option<(u64, bool)>) {
    let Some((mut left, is_full)) = fault else { return };
    faults.fail_when(move |call| {
        left = left.checked_sub(1)?;
        let injected = DeviceError::Injected { call: call.number, verb: call.verb };
        (left == 0).then(|| if is_full { injected_full(device, call.bytes) } else { injected })
    });
}

/// An error that was injected.
fn is_injected(error: &MemoryError) -> bool {
    match error {
        MemoryError::Device { source: DeviceError::Injected { .. }, .. } => true,
        MemoryError::Device { source: DeviceError::OutOfMemory { free, capacity, .. }, .. } => {
            (*free, *capacity) == (ByteCount::ZERO, ByteCount(PAGE))
        }
        _ => false,
    }
}

/// An error that an operation may have: the one that was injected, or what is short or busy beside it.
fn may_be(error: &MemoryError) -> bool {
    match error {
        _ if is_injected(error) => true,
        MemoryError::State { .. } => error.to_string().contains("on the host"),
        _ => matches!(error.kind(), ErrorKind::Lease | ErrorKind::HostBudget | ErrorKind::Transfer),
    }
}

/// What came of an operation; any other error than those that it may have ends the test.
pub(crate) fn may_fail<T>(outcome: Result<T, MemoryError>) -> Option<T> {
    outcome.map_err(|error| assert!(may_be(&error), "{error} ({error:?})")).ok()
}

/// Whether an allocation gave anything. Where something is short or busy, *not now* is its answer and no error.
pub(crate) fn is_given(outcome: Result<bool, MemoryError>) -> bool {
    match outcome {
        Ok(is_given) => is_given,
        Err(error) => {
            assert!(is_injected(&error), "{error} ({error:?})");
            false
        }
    }
}

/// Somebody else's lease, which comes and goes.
#[derive(Default)]
pub(crate) struct Ballast {
    is_there: bool,
}

impl Ballast {
    const BYTES: ByteCount = ByteCount::mib(12);

    pub(crate) fn toggle(&mut self, budget: &LocalBudget) {
        if self.is_there {
            self.let_go(budget);
        } else {
            let taken = budget.acquire(LeaseKind::Overhead, Self::BYTES, Self::BYTES, WAIT, "somebody else");
            self.is_there = taken.is_ok();
        }
    }

    pub(crate) fn let_go(&mut self, budget: &LocalBudget) {
        if std::mem::take(&mut self.is_there) {
            budget.give_back(LeaseKind::Overhead, Self::BYTES);
        }
    }
}

/// Waits until the books agree with the memory: the cache's thread may be about to give something back.
pub(crate) fn settle(cache: &KvCache) {
    let deadline = Instant::now() + WAIT;
    while let Err(wrong) = cache.check_invariants() {
        assert!(Instant::now() < deadline, "{wrong}");
        thread::sleep(Duration::from_millis(1));
    }
}
