//! Room for a segment: addresses that are nobody's, and memory behind them.
//!
//! Apart because it is what an allocation is made of: where memory is short it comes by ever harder means, and where that of
//! an earlier segment could not be unmapped yet, at other addresses.

use std::time::{Duration, Instant};

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::extent::PageRun;
use shoal_device::DeviceError;

use super::{FREE_WAIT, Segment, Segments};
use crate::error::{ErrorKind, MemoryError};

/// Committed ahead of need: this share of what is committed, at most so many pages. What is left of it when the region is
/// frozen stays, since an extent cannot be cut.
const AHEAD_SHARE: u64 = 8;
const AHEAD_PAGES_MAX: u64 = 32;
/// How long an allocation may take in all, its lease included.
const ALLOCATE_WAIT: Duration = Duration::from_secs(10);
/// At how many places an allocation tries in vain because what was given up there is mapped still.
const PLACES_MAX: usize = 64;

impl Segments {
    /// Carves a segment and commits what it needs. Addresses at which memory of earlier ones is mapped, because something holds
    /// it or the device did not unmap it, are passed over.
    pub(super) fn carve_backed(&self, bytes: ByteCount) -> Result<u64, MemoryError> {
        // For all places together.
        let deadline = Instant::now() + ALLOCATE_WAIT;
        let mut given_up = Vec::new();
        let outcome = loop {
            let offset = match self.carve(bytes) {
                Ok(offset) => offset,
                Err(error) => break Err(error),
            };
            match self.back(offset, bytes, deadline) {
                Ok(()) => break Ok(offset),
                Err(error) => {
                    given_up.push(offset);
                    if !is_still_mapped(&error) || given_up.len() == PLACES_MAX {
                        break Err(error);
                    }
                }
            }
        };
        let mut state = self.state.lock();
        for offset in given_up {
            state.ranges.remove(offset);
        }
        drop(state);
        outcome
    }

    fn carve(&self, bytes: ByteCount) -> Result<u64, MemoryError> {
        let limit = self.region.bytes();
        let mut state = self.state.lock();
        state.serials += 1;
        let segment = Segment { bytes, serial: state.serials, is_dropped: false, is_retired: false };
        state.ranges.insert(bytes, limit, segment).ok_or_else(|| MemoryError::OutOfRange {
            region: self.region.name().to_owned(),
            offset: limit,
            bytes,
            region_bytes: limit,
        })
    }

    /// Commits what a new segment needs, by ever harder means.
    fn back(&self, offset: u64, bytes: ByteCount, deadline: Instant) -> Result<(), MemoryError> {
        let wanted = PageRun::covering(ByteCount(offset), bytes);
        let has_margin = !self.region.manager().margin().is_zero();
        let ahead = if has_margin { wanted } else { self.ahead_of(wanted)? };
        if ahead != wanted {
            match self.commit(ahead, deadline) {
                Err(error) if is_shortage(&error) || is_still_mapped(&error) => {}
                outcome => return outcome,
            }
        }
        match self.commit(wanted, deadline) {
            Err(error) if is_shortage(&error) => {}
            outcome => return outcome,
        }
        // What torch gave back just now, then what was committed ahead elsewhere.
        self.sweep(deadline.saturating_duration_since(Instant::now()).min(FREE_WAIT));
        if let Err(error) = self.release_unused(deadline) {
            tracing::debug!(%error, "memory committed ahead stays for now");
        }
        match self.commit(wanted, deadline) {
            Err(error) if is_shortage(&error) => {}
            outcome => return outcome,
        }
        if self.is_capturing() {
            return self.commit(wanted, deadline);
        }
        let needed = self.region.uncommitted(&[wanted])?;
        match self.region.manager().evict_for(&self.region, needed, deadline) {
            Ok(freed) => tracing::info!(region = self.region.name(), %needed, %freed, "made room for torch"),
            Err(error) => tracing::info!(region = self.region.name(), %needed, %error, "no room for torch"),
        }
        self.commit(wanted, deadline)
    }

    /// Commits a run, if the device keeps its margin.
    fn commit(&self, run: PageRun, deadline: Instant) -> Result<(), MemoryError> {
        let manager = self.region.manager();
        let margin = manager.margin();
        if !margin.is_zero() {
            let requested = self.region.uncommitted(&[run])? + margin;
            let doing = "leave the margin of the device's memory free";
            let ask = || manager.device().memory().map_err(MemoryError::device(doing));
            let mut memory = ask()?;
            if memory.free < requested {
                // What is kept for a growth like this one is not free by the device's figure.
                manager.trim_pool(requested - memory.free)?;
                memory = ask()?;
            }
            if memory.free < requested {
                let (device, free, capacity) = (manager.device().info().id, memory.free, memory.total);
                let source = DeviceError::OutOfMemory { device, requested, free, capacity };
                return Err(MemoryError::Device { doing, source });
            }
        }
        self.region.commit_by(run, deadline)
    }

    /// The pages to commit for `wanted`: more than it, where it is the frontier that grows.
    fn ahead_of(&self, wanted: PageRun) -> Result<PageRun, MemoryError> {
        let free: u64 = self.region.uncommitted(&[wanted])?.pages();
        if free == 0 {
            return Ok(wanted);
        }
        let after = self.state.lock().ranges.frontier().div_ceil(PAGE_BYTES.0);
        if after != wanted.end() {
            return Ok(wanted);
        }
        let committed = self.region.usage().total.pages();
        let step = 1 << (committed / AHEAD_SHARE).clamp(1, AHEAD_PAGES_MAX).ilog2();
        let end = (wanted.end() - free + free.next_multiple_of(step)).min(self.region.bytes().pages());
        Ok(PageRun { first: wanted.first, count: end.max(wanted.end()) - wanted.first })
    }
}

/// Whether other addresses may help.
const fn is_still_mapped(error: &MemoryError) -> bool {
    matches!(error, MemoryError::StillMapped { .. })
}

/// Whether evicting something may help.
fn is_shortage(error: &MemoryError) -> bool {
    match error {
        MemoryError::Lease { .. } => true,
        MemoryError::Device { source, .. } => {
            matches!(source, DeviceError::OutOfMemory { .. } | DeviceError::HostMemory { .. })
        }
        other => other.kind() == ErrorKind::OutOfMemory,
    }
}
