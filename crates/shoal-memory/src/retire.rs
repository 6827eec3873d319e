//! Device memory on its way back: unmapped once nothing touches it, its lease given back once it is true (I1, I5).
//!
//! Apart because it ends what others began, and later than they did: memory that something queued may still touch waits
//! here, and so does what the device refused to give back. Each operation asks again for both when it has its turn.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_device::{DeviceError, Frame, Mapping, Reservation};

use crate::error::MemoryError;
use crate::lease::Grant;
use crate::manager::MemoryManager;

/// How long an operation waits for kernels on behalf of what others could not free.
const SWEEP_WAIT: Duration = Duration::from_millis(20);

/// How long memory that goes to the pool may take to be zeroed; it takes a millisecond for 2 GiB.
const ZERO_WAIT: Duration = Duration::from_millis(200);

/// Device memory of one extent, with the lease it lives on.
#[derive(Debug)]
pub(crate) struct Resident {
    pub(crate) mapping: Arc<Mapping>,
    pub(crate) lease: Grant,
    /// The name of its region.
    pub(crate) region: Arc<str>,
}

/// A frame that is not mapped any more, with its lease.
#[derive(Debug)]
pub(crate) struct Bare {
    pub(crate) frame: Arc<Frame>,
    pub(crate) lease: Grant,
    pub(crate) region: Arc<str>,
    /// All of its bytes are zero.
    pub(crate) is_zero: bool,
}

/// How far it is on its way.
#[derive(Debug)]
pub(crate) enum Rest {
    Mapped(Resident),
    Bare(Bare),
}

impl Rest {
    const fn bytes(&self) -> ByteCount {
        match self {
            Self::Mapped(Resident { lease, .. }) | Self::Bare(Bare { lease, .. }) => lease.bytes(),
        }
    }
}

/// Why memory stays.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Why {
    /// Something that steps queued may touch it.
    Unfenced,
    /// A copy of ours holds it.
    Held,
    /// The device refused.
    Refused(DeviceError),
}

/// Why memory is mapped still that a region has given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Lingering {
    /// Something holds it, which ends by itself.
    Held,
    /// The device refused to unmap it.
    Refused,
}

/// Memory that cannot be freed yet.
#[derive(Debug)]
pub(crate) struct Retired {
    rest: Rest,
    why: Why,
}

impl Retired {
    /// What the device said, if it was that.
    pub(crate) fn error(&self) -> Option<MemoryError> {
        match &self.why {
            Why::Refused(source) => {
                Some(MemoryError::Device { doing: "give device memory back", source: source.clone() })
            }
            Why::Unfenced | Why::Held => None,
        }
    }
}

/// What a release did.
#[derive(Debug, Default)]
pub(crate) struct Released {
    /// Bytes that are free now.
    pub(crate) freed: ByteCount,
    /// What the device refused first. That memory is kept, and asked for again.
    pub(crate) error: Option<MemoryError>,
}

impl Released {
    pub(crate) fn absorb(&mut self, other: Self) {
        self.freed += other.freed;
        self.error = self.error.take().or(other.error);
    }
}

impl Resident {
    /// Unmaps it, if nothing holds it.
    pub(crate) fn unmap(self) -> Result<Bare, Retired> {
        let Self { mapping, lease, region } = self;
        let refuse = |mapping, lease, region, why| {
            let rest = Rest::Mapped(Self { mapping, lease, region });
            Err(Retired { rest, why })
        };
        match Arc::try_unwrap(mapping) {
            Err(held) => refuse(held, lease, region, Why::Held),
            Ok(mapping) => match mapping.unmap() {
                Ok(frame) => Ok(Bare { frame, lease, region, is_zero: false }),
                Err((mapping, error)) => {
                    tell(&region, &error);
                    refuse(Arc::new(mapping), lease, region, Why::Refused(error))
                }
            },
        }
    }
}

impl Bare {
    /// Destroys the frame. What is left is the lease.
    pub(crate) fn destroy(self) -> Result<Grant, Retired> {
        let Self { frame, lease, region, is_zero } = self;
        let refuse = |frame, lease, region, why| {
            let rest = Rest::Bare(Self { frame, lease, region, is_zero });
            Err(Retired { rest, why })
        };
        match Arc::try_unwrap(frame) {
            Err(held) => refuse(held, lease, region, Why::Held),
            Ok(frame) => match frame.destroy() {
                Ok(()) => Ok(lease),
                Err((frame, error)) => {
                    tell(&region, &error);
                    refuse(Arc::new(frame), lease, region, Why::Refused(error))
                }
            },
        }
    }
}

fn tell(region: &str, error: &DeviceError) {
    tracing::error!(region, %error, "the device does not give memory back; it is asked again");
}

impl MemoryManager {
    /// Frees memory that steps may have used, once their kernels are done. What cannot be freed yet is freed by a later
    /// operation.
    pub(crate) fn release(&self, residents: Vec<Resident>) -> Released {
        if residents.is_empty() {
            return Released::default();
        }
        match self.fence(self.operation_deadline()) {
            Ok(()) => self.release_unused(residents),
            Err(error) => {
                tracing::warn!(%error, "device memory stays until what runs has ended");
                self.retire_unfenced(residents);
                Released::default()
            }
        }
    }

    /// Frees the memory of a region that nobody has any more. While a step runs it is kept: a graph may be captured,
    /// which a fence would break.
    pub(crate) fn release_dropped(&self, residents: Vec<Resident>) {
        if self.gate().is_shared() {
            self.retire_unfenced(residents);
        } else {
            // What the device refused is told already, and kept.
            let _ = self.release(residents);
        }
    }

    fn retire_unfenced(&self, residents: Vec<Resident>) {
        let retired = residents
            .into_iter()
            .map(|resident| Retired { rest: Rest::Mapped(resident), why: Why::Unfenced });
        self.retired.lock().extend(retired);
    }

    /// Why memory is mapped in this range of a reservation that could not be freed yet; `None`: none is. Needs the turn: who has
    /// it may be asking for that memory again.
    pub(crate) fn lingering_within(
        &self,
        reservation: &Arc<Reservation>,
        offset: ByteCount,
        bytes: ByteCount,
    ) -> Option<Lingering> {
        let retired = self.retired.lock();
        let within = retired.iter().filter(|entry| match &entry.rest {
            Rest::Mapped(Resident { mapping, .. }) => {
                let (start, length) = (mapping.offset(), mapping.bytes());
                Arc::ptr_eq(mapping.reservation(), reservation)
                    && start < offset + bytes
                    && offset < start + length
            }
            Rest::Bare(_) => false,
        });
        let why = within.map(|entry| match entry.why {
            Why::Unfenced | Why::Held => Lingering::Held,
            Why::Refused(_) => Lingering::Refused,
        });
        why.max()
    }

    /// Whether anything at all could not be freed yet.
    pub(crate) fn has_retired(&self) -> bool {
        !self.retired.lock().is_empty()
    }

    /// Keeps what could not be freed for a later operation.
    pub(crate) fn retire(&self, retired: Retired) {
        self.retired.lock().push(retired);
    }

    /// Frees memory that nothing queued by steps touches: fenced, or not in anybody's hands yet. Unmaps; gives the lease
    /// back once it is true (I1). What a copy of ours still holds, and what the device refuses, is freed later.
    pub(crate) fn release_unused(&self, residents: impl IntoIterator<Item = Resident>) -> Released {
        self.free(residents.into_iter().map(Rest::Mapped))
    }

    /// Takes memory that nothing queued by steps touches from its region, and keeps its frames for the next growth. What the
    /// pool has room for is zeroed before, if `is_zeroed`: that waits for a kernel of ours, and so for room beside those of
    /// others.
    pub(crate) fn pool_unused(&self, residents: Vec<Resident>, is_zeroed: bool) -> Released {
        let zeroed = if is_zeroed { self.zero(&residents) } else { 0 };
        let mut released = Released::default();
        let mut surplus = Vec::new();
        for (place, resident) in residents.into_iter().enumerate() {
            let bytes = resident.lease.bytes();
            match resident.unmap() {
                Ok(bare) => match self.pool().put(Bare { is_zero: place < zeroed, ..bare }) {
                    None => released.freed += bytes,
                    Some(bare) => surplus.push(bare),
                },
                Err(retired) => {
                    released.error = released.error.take().or_else(|| retired.error());
                    self.retire(retired);
                }
            }
        }
        released.absorb(self.destroy(surplus));
        released
    }

    /// Zeroes the first of these that the pool has room for, and says how many. None where it takes too long or fails: then
    /// whoever takes one zeroes it.
    fn zero(&self, residents: &[Resident]) -> usize {
        let mut room = self.pool().room();
        let mut count = 0;
        for resident in residents {
            let bytes = resident.lease.bytes();
            if bytes > room || self.beside().zero(&resident.mapping).is_err() {
                break;
            }
            (room, count) = (room - bytes, count + 1);
        }
        if count == 0 {
            return 0;
        }
        match self.beside().synchronize(ZERO_WAIT) {
            Ok(true) => count,
            Ok(false) => 0,
            Err(error) => {
                tracing::debug!(%error, "it is not known when memory is zero");
                // Or it is held by the zeroing when it is unmapped.
                self.settle();
                0
            }
        }
    }

    /// Keeps a frame that nothing touches for the next growth, or gives it back to the device.
    pub(crate) fn keep(&self, bare: Bare) {
        // What the device refuses is told, and kept.
        let _ = self.destroy(self.pool().put(bare));
    }

    /// Gives frames back to the device, that nothing touches.
    pub(crate) fn destroy(&self, frames: impl IntoIterator<Item = Bare>) -> Released {
        self.free(frames.into_iter().map(Rest::Bare))
    }

    fn free(&self, rests: impl IntoIterator<Item = Rest>) -> Released {
        let mut released = Released::default();
        let mut grants: Vec<Grant> = Vec::new();
        for rest in rests {
            let bytes = rest.bytes();
            let freed = match rest {
                Rest::Mapped(resident) => resident.unmap().and_then(Bare::destroy),
                Rest::Bare(bare) => bare.destroy(),
            };
            match freed {
                Ok(lease) => {
                    released.freed += bytes;
                    let rest = grants.iter_mut().try_fold(lease, |lease, grant| match grant.join(lease) {
                        Ok(()) => Err(()),
                        Err(lease) => Ok(lease),
                    });
                    grants.extend(rest);
                }
                Err(retired) => {
                    released.error = released.error.take().or_else(|| retired.error());
                    self.retire(retired);
                }
            }
        }
        released
    }

    /// Frees what was kept and is no longer touched, and asks again for what the device refused. `may_fence`: also what
    /// steps may touch, which marks all work and may wait for a little.
    pub(crate) fn sweep(&self, may_fence: bool) {
        let retired = std::mem::take(&mut *self.retired.lock());
        if retired.is_empty() {
            return;
        }
        let (unfenced, others): (Vec<_>, Vec<_>) =
            retired.into_iter().partition(|entry| entry.why == Why::Unfenced);
        self.free(others.into_iter().map(|entry| entry.rest));
        let is_quiet = || !self.gate().is_shared() && self.fence(Instant::now() + SWEEP_WAIT).is_ok();
        if may_fence && !unfenced.is_empty() && is_quiet() {
            self.free(unfenced.into_iter().map(|entry| entry.rest));
        } else {
            self.retired.lock().extend(unfenced);
        }
    }

    /// Device bytes that the device refuses to give back: each operation asks again, and their lease is kept until then.
    #[must_use]
    pub fn leaked_bytes(&self) -> ByteCount {
        let retired = self.retired.lock();
        retired
            .iter()
            .filter(|entry| matches!(entry.why, Why::Refused(_)))
            .map(|entry| entry.rest.bytes())
            .sum()
    }

    /// Frees what is kept for the last time. What the device does not give back has its lease kept for good.
    pub(crate) fn release_last(&self) {
        self.settle();
        let _ = self.destroy(self.pool().close());
        let retired = std::mem::take(&mut *self.retired.lock());
        let is_quiet = retired.iter().all(|entry| entry.why != Why::Unfenced)
            || self.fence(self.operation_deadline()).is_ok();
        let (gone, left): (Vec<_>, Vec<_>) =
            retired.into_iter().partition(|entry| is_quiet || entry.why != Why::Unfenced);
        self.free(gone.into_iter().map(|entry| entry.rest));
        for Retired { rest, why } in left.into_iter().chain(std::mem::take(&mut *self.retired.lock())) {
            if why != Why::Held {
                tracing::error!(bytes = %rest.bytes(), ?why, "device memory was leaked");
                std::mem::forget(rest);
            }
        }
    }
}
