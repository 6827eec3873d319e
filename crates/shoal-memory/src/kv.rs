//! [`KvBacking`]: memory for KV blocks on demand.
//!
//! An engine chooses block ids; before it uses some it says [`back`](KvBacking::back), when it is done with them
//! [`unback`](KvBacking::unback). Backing what already has memory is counting only. Memory that no block uses stays
//! until a reclaim or [`trim`](KvBacking::trim) takes it. Keeps I7.
//!
//! A reclaim may have moved what blocks hold to the host. Memory for more blocks is granted only together with the
//! memory for all of that: else no guard could be entered any more, whatever the engine did.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::extent::PageRun;
use shoal_core::kv::backing::BlockBacking;

use crate::error::{ErrorKind, MemoryError};
use crate::region::{Region, Report};
use crate::supply::Content;
use crate::transfer::Shared;

/// How often `back` asks again when others changed the pages meanwhile.
const ATTEMPTS_MAX: u32 = 4;

/// Backs the blocks of one KV region.
#[derive(Debug)]
pub struct KvBacking {
    region: Region,
    blocks: Mutex<BlockBacking>,
}

impl KvBacking {
    /// `blocks` blocks of `block_bytes` each, from the start of `region`.
    ///
    /// # Errors
    /// [`MemoryError::Blocks`] for no layout, [`MemoryError::OutOfRange`] if the region is too small,
    /// [`MemoryError::State`] if it is not empty.
    pub fn new(region: &Region, block_bytes: ByteCount, blocks: u32) -> Result<Arc<Self>, MemoryError> {
        let counted = BlockBacking::new(block_bytes, blocks)?;
        if counted.bytes() > region.bytes() {
            let (bytes, region_bytes) = (counted.bytes(), region.bytes());
            return Err(MemoryError::OutOfRange {
                region: region.name().to_owned(),
                offset: ByteCount::ZERO,
                bytes,
                region_bytes,
            });
        }
        if !region.usage().total.is_zero() {
            return Err(region
                .refuse("back blocks", "only a region of kind kv without memory can be backed by block"));
        }
        let backing = Arc::new(Self { region: region.clone(), blocks: Mutex::new(counted) });
        region.manager().register_backing(&backing);
        Ok(backing)
    }

    /// The region.
    #[must_use]
    pub const fn region(&self) -> &Region {
        &self.region
    }

    /// Makes sure that all of these blocks have memory (new pages are zeroed), and brings back what of this region lies
    /// on the host. False: there is no memory for all of it now, and nothing was changed. Call it outside of guards.
    ///
    /// # Errors
    /// [`MemoryError::Blocks`] for wrong ids, [`MemoryError::Device`] if the device fails; nothing is changed.
    pub fn back(&self, ids: &[u32]) -> Result<bool, MemoryError> {
        self.back_within(ids, self.region.manager().options.lease_wait)
    }

    /// [`back`](Self::back) with another patience for the lease.
    ///
    /// # Errors
    /// As [`back`](Self::back).
    pub fn back_within(&self, ids: &[u32], timeout: Duration) -> Result<bool, MemoryError> {
        let deadline = Instant::now() + timeout;
        for _ in 0..ATTEMPTS_MAX {
            {
                let is_whole = self.region.missing_bytes().is_zero();
                let mut blocks = self.blocks.lock();
                if blocks.plan_back(ids)?.is_empty() && is_whole {
                    blocks.back(ids)?;
                    return Ok(true);
                }
            }
            match self.grow(ids, deadline) {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::Lease | ErrorKind::OutOfMemory)
                        || error.is_late() =>
                {
                    tracing::debug!(%error, blocks = ids.len(), "no memory for blocks now");
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(false)
    }

    /// Takes the blocks away. Their device memory stays with the process until it is reclaimed or trimmed; copies on the
    /// host are dropped, so that nobody brings them back.
    ///
    /// # Errors
    /// [`MemoryError::Blocks`]; nothing is changed.
    pub fn unback(&self, ids: &[u32]) -> Result<(), MemoryError> {
        self.blocks.lock().unback(ids)?;
        // Inside a guard nothing is missing, so a step never waits for the turn here.
        if !self.region.missing_bytes().is_zero() {
            let manager = self.region.manager();
            match manager.take_turn(manager.operation_deadline()) {
                Ok(_turn) => self.drop_idle_copies(),
                // The next restore drops them first.
                Err(error) => tracing::debug!(%error, "copies of blocks that are gone stay for now"),
            }
        }
        Ok(())
    }

    /// Frees memory that no block uses, at least `bytes` as far as there is any. No step may run on freed blocks.
    ///
    /// # Errors
    /// [`MemoryError::Deadline`] while another operation or a kernel runs.
    pub fn trim(&self, bytes: ByteCount) -> Result<Report, MemoryError> {
        let manager = self.region.manager();
        let _turn = manager.take_turn(manager.operation_deadline())?;
        manager.fence(manager.operation_deadline())?;
        Ok(self.release_idle(bytes))
    }

    /// Bytes of committed pages (their contents may lie on the host after a reclaim).
    #[must_use]
    pub fn backed_bytes(&self) -> ByteCount {
        self.blocks.lock().backed_bytes()
    }

    /// Bytes of blocks that are backed.
    #[must_use]
    pub fn live_bytes(&self) -> ByteCount {
        self.blocks.lock().live_bytes()
    }

    /// Bytes of committed memory that cannot be freed without taking it from a block: pages come and go whole, so this
    /// is more than [`live_bytes`](Self::live_bytes) where blocks lie scattered.
    #[must_use]
    pub fn held_bytes(&self) -> ByteCount {
        let (backed, runs) = {
            let blocks = self.blocks.lock();
            (blocks.backed_bytes(), blocks.idle_runs())
        };
        let freeable =
            runs.into_iter().flat_map(|run| self.region.extents_within(run)).map(PageRun::bytes).sum();
        backed.saturating_sub(freeable)
    }

    /// Bytes of committed pages that no block uses.
    #[must_use]
    pub fn idle_bytes(&self) -> ByteCount {
        self.blocks.lock().idle_bytes()
    }

    /// Restores what is missing, commits what the blocks need and backs them, on one lease for all of it; false if the
    /// pages changed meanwhile.
    fn grow(&self, ids: &[u32], deadline: Instant) -> Result<bool, MemoryError> {
        let manager = self.region.manager();
        // One at a time, or two would ask for the same missing bytes. Neither turn nor data lock is held while asking.
        let restoring = match self.region.missing_bytes() {
            ByteCount::ZERO => None,
            _ => Some(manager.take_restore(deadline)?),
        };
        let wanted = {
            // In turn: in the middle of a reclaim pages are gone whose lease is not given back yet.
            let runs = self.blocks.lock().plan_back(ids)?;
            let _turn = self.region.take_turn_to_map(&runs, deadline)?;
            self.drop_idle_copies();
            let runs = self.blocks.lock().plan_back(ids)?;
            let missing = self.region.missing_bytes();
            if !missing.is_zero() && restoring.is_none() {
                return Ok(false);
            }
            [self.region.wanted_extents(&runs)?, self.region.missing_extents(ByteCount(u64::MAX))].concat()
        };
        let mut supply = self.region.supply(wanted, Content::Zeroed, deadline, "KV blocks")?;
        let _turn = manager.take_turn(manager.operation_deadline())?;
        let runs = self.blocks.lock().plan_back(ids)?;
        let missing = self.region.missing_bytes();
        if self.region.uncommitted(&runs)? + missing > supply.bytes()
            || (restoring.is_none() && !missing.is_zero())
        {
            return Ok(false);
        }
        if !missing.is_zero() {
            self.region.restore_in_turn(&mut supply, manager.operation_deadline(), &Shared::default())?;
        }
        self.region.commit_in_turn(&runs, &mut supply)?;
        let mut blocks = self.blocks.lock();
        for run in runs {
            blocks.committed(run)?;
        }
        blocks.back(ids)?;
        Ok(true)
    }

    /// Forgets what lies off the device although no block uses it. Needs the turn.
    pub(crate) fn drop_idle_copies(&self) {
        if self.region.missing_bytes().is_zero() {
            return;
        }
        let runs = self.blocks.lock().idle_runs();
        for extent in runs.into_iter().flat_map(|run| self.region.missing_within(run)) {
            // Refused where a block was backed by it meanwhile.
            if self.blocks.lock().decommitted(extent).is_ok()
                && let Err(error) = self.region.decommit_in_turn(extent)
            {
                tracing::error!(%error, "cannot drop a copy that no block uses");
            }
        }
    }

    /// Frees whole extents whose pages no block uses, from the last backwards. Needs the turn, and that what
    /// steps have queued is done.
    pub(crate) fn release_idle(&self, bytes: ByteCount) -> Report {
        let start = Instant::now();
        let mut report = Report::new(bytes);
        let runs = self.blocks.lock().idle_runs();
        for run in runs.into_iter().rev() {
            let extents = self.region.extents_within(run);
            for extent in extents.into_iter().rev() {
                if report.freed >= bytes {
                    break;
                }
                // From here on no block can be backed by these pages without committing them again.
                if self.blocks.lock().decommitted(extent).is_err() {
                    continue;
                }
                match self.region.decommit_in_turn(extent) {
                    Ok(freed) => report.freed += freed,
                    Err(error) => report.fail(error),
                }
            }
        }
        self.region.manager().count_evicted(report.freed);
        report.duration = start.elapsed();
        report
    }
}
