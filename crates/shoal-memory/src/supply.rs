//! What one operation may map: leased bytes, some of them with frames behind them already.
//!
//! Apart because growing, waking and swapping all need it, and each gets its frames elsewhere: from the pool, from the
//! region that leaves, or new from the device. A frame here is nowhere else (I2), and every byte is leased (I1); what the
//! operation does not use goes back when the supply is dropped, frames to the pool and bytes to whoever granted them.

use std::sync::Arc;
use std::time::Instant;

use shoal_core::bytes::ByteCount;
use shoal_core::extent::Extent;
use shoal_core::protocol::LeaseKind;
use shoal_device::{DeviceError, Frame, Mapping};

use crate::error::MemoryError;
use crate::lease::Grant;
use crate::manager::MemoryManager;
use crate::region::Region;
use crate::retire::{Bare, Resident};

/// What an extent's bytes have to be when it is mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    /// Zero: somebody will read them.
    Zeroed,
    /// Anything: all of them are written before anybody reads.
    Any,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Supply {
    manager: Arc<MemoryManager>,
    /// Leased, and nothing behind it.
    grant: Grant,
    frames: Vec<Bare>,
    /// Memory is being zeroed that was mapped already.
    is_zeroing: bool,
}

impl Supply {
    pub(crate) const fn new(manager: Arc<MemoryManager>, grant: Grant) -> Self {
        Self { manager, grant, frames: Vec::new(), is_zeroing: false }
    }

    /// With as many frames of the pool as fit what is wanted.
    pub(crate) fn from_pool(
        manager: Arc<MemoryManager>,
        kind: LeaseKind,
        wanted: impl IntoIterator<Item = ByteCount>,
        content: Content,
    ) -> Self {
        let take = |bytes| manager.pool().take(kind, bytes, content == Content::Zeroed);
        let frames = wanted.into_iter().filter_map(take).collect();
        let grant = Grant::none(manager.lease(), kind);
        Self { manager, grant, frames, is_zeroing: false }
    }

    /// What it suffices for.
    pub(crate) fn bytes(&self) -> ByteCount {
        self.grant.bytes() + self.frames.iter().map(|bare| bare.lease.bytes()).sum::<ByteCount>()
    }

    /// Joins another of the same kind; hands it back if it is of another.
    pub(crate) fn join(&mut self, mut other: Self) -> Result<(), Self> {
        if other.grant.kind() != self.grant.kind() {
            return Err(other);
        }
        self.frames.append(&mut other.frames);
        self.is_zeroing |= std::mem::take(&mut other.is_zeroing);
        // Of the same kind, as was asked.
        let all = other.grant.bytes();
        let _ = other.grant.split(all).map(|grant| self.grant.join(grant));
        Ok(())
    }

    /// Takes a frame over; hands it back where its lease is for something else.
    pub(crate) fn push(&mut self, bare: Bare) -> Option<Bare> {
        if bare.lease.kind() != self.grant.kind() {
            return Some(bare);
        }
        self.frames.push(bare);
        None
    }

    /// Frames that are left. Their lease goes with them.
    pub(crate) fn take_frames(&mut self) -> Vec<Bare> {
        std::mem::take(&mut self.frames)
    }

    /// Puts a frame behind an extent of `region`: one that is there, or a new one. What was used before and has to be
    /// zero is being zeroed when this returns: see [`settle`](Self::settle).
    ///
    /// # Errors
    /// [`MemoryError::Device`], [`MemoryError::State`] if the bytes do not suffice; nothing is mapped then.
    pub(crate) fn map(
        &mut self,
        region: &Region,
        extent: Extent,
        content: Content,
    ) -> Result<Resident, MemoryError> {
        let bytes = extent.bytes();
        let wants_zero = content == Content::Zeroed;
        let fits = |bare: &Bare| bare.frame.bytes() == bytes;
        let at = self.frames.iter().rposition(|bare| fits(bare) && bare.is_zero == wants_zero);
        let found = at.or_else(|| self.frames.iter().rposition(fits)).map(|at| self.frames.swap_remove(at));
        let found = found.or_else(|| self.manager.pool().take(self.grant.kind(), bytes, wants_zero));
        let found = if let Some(bare) = found { bare } else { self.create(region, bytes)? };
        let Bare { frame, lease, region: name, is_zero } = found;
        match Mapping::new(region.reservation(), extent.offset(), Arc::clone(&frame)) {
            Ok(mapping) => {
                drop(frame);
                let resident = region.resident(mapping, lease);
                if is_zero || !wants_zero {
                    return Ok(resident);
                }
                match self.manager.beside().zero(&resident.mapping) {
                    Ok(()) => {
                        self.is_zeroing = true;
                        Ok(resident)
                    }
                    Err(source) => {
                        // What the device refused is told already, and kept.
                        let _ = self.manager.release_unused([resident]);
                        Err(MemoryError::Device { doing: "zero device memory", source })
                    }
                }
            }
            Err(source) => {
                // Not mapped: it is as it was.
                self.frames.push(Bare { frame, lease, region: name, is_zero });
                Err(MemoryError::Device { doing: "map device memory", source })
            }
        }
    }

    /// [`map`](Self::map), and waits until what has to be zero is.
    ///
    /// # Errors
    /// As [`map`](Self::map) and [`settle`](Self::settle); nothing is mapped then.
    pub(crate) fn map_settled(
        &mut self,
        region: &Region,
        extent: Extent,
        content: Content,
        deadline: Instant,
    ) -> Result<Resident, MemoryError> {
        let resident = self.map(region, extent, content)?;
        match self.settle(deadline) {
            Ok(()) => Ok(resident),
            Err(error) => {
                let _ = self.manager.release_unused([resident]);
                Err(error)
            }
        }
    }

    /// A new frame, paid for by what is granted, and else by frames that do not fit.
    fn create(&mut self, region: &Region, bytes: ByteCount) -> Result<Bare, MemoryError> {
        while self.grant.bytes() < bytes {
            let Some(bare) = self.frames.pop() else {
                return Err(region.refuse("map an extent", "the lease is too small for it"));
            };
            self.give_up(bare)?;
        }
        let device = &self.manager.device;
        let is_full = |error: &DeviceError| error.kind() == shoal_device::ErrorKind::OutOfMemory;
        let seen = self.manager.pool().departed();
        let gives_way =
            || self.manager.pool_gives_way(ByteCount(u64::MAX), seen, self.manager.operation_deadline());
        let created = match Frame::create(device, bytes) {
            Err(error) if is_full(&error) && gives_way() => Frame::create(device, bytes),
            created => created,
        };
        let frame = created.map_err(MemoryError::device("take device memory"))?;
        let lease =
            self.grant.split(bytes).ok_or_else(|| region.refuse("map an extent", "its lease is gone"))?;
        Ok(Bare { frame, lease, region: region.name().into(), is_zero: true })
    }

    /// Gives a frame back to the device; its lease stays here.
    pub(crate) fn give_up(&mut self, bare: Bare) -> Result<(), MemoryError> {
        match bare.destroy() {
            // Of the same kind, so it joins.
            Ok(lease) => drop(self.grant.join(lease)),
            Err(retired) => {
                let error = retired.error();
                self.manager.retire(retired);
                return error.map_or(Ok(()), Err);
            }
        }
        Ok(())
    }

    /// Waits until what was mapped as zero is zero.
    ///
    /// # Errors
    /// [`MemoryError::Device`], [`MemoryError::Deadline`]: what was mapped through this is not to be used.
    pub(crate) fn settle(&mut self, deadline: Instant) -> Result<(), MemoryError> {
        if !std::mem::take(&mut self.is_zeroing) {
            return Ok(());
        }
        let start = Instant::now();
        let wait = deadline.saturating_duration_since(start);
        let error = match self.manager.beside().synchronize(wait) {
            Ok(true) => return Ok(()),
            Ok(false) => {
                let doing = "zeroing memory that was used before";
                MemoryError::Deadline { doing, waited: start.elapsed() }
            }
            Err(source) => MemoryError::Device { doing: "zero device memory", source },
        };
        // Whoever frees what was mapped finds that nothing holds it.
        self.manager.settle();
        Err(error)
    }
}

impl Drop for Supply {
    fn drop(&mut self) {
        for bare in self.take_frames() {
            self.manager.keep(bare);
        }
    }
}

impl Region {
    /// Asks for memory for extents of these sizes: from the pool, and a lease for the rest. Hold neither turn nor data
    /// lock.
    pub(crate) fn supply(
        &self,
        wanted: impl IntoIterator<Item = ByteCount>,
        content: Content,
        deadline: Instant,
        reason: &str,
    ) -> Result<Supply, MemoryError> {
        self.supply_beside(&mut None, wanted, content, deadline, reason)
    }

    /// The same, with what is `held` already: that goes with it, or stays there if the rest cannot be had.
    pub(crate) fn supply_beside(
        &self,
        held: &mut Option<Supply>,
        wanted: impl IntoIterator<Item = ByteCount>,
        content: Content,
        deadline: Instant,
        reason: &str,
    ) -> Result<Supply, MemoryError> {
        let wanted: Vec<_> = wanted.into_iter().collect();
        let total: ByteCount = wanted.iter().copied().sum();
        let mut supply = Supply::from_pool(Arc::clone(self.manager()), self.kind(), wanted, content);
        let there = supply.bytes() + held.as_ref().map_or(ByteCount::ZERO, Supply::bytes);
        let needed = total.saturating_sub(there);
        if !needed.is_zero() {
            let more = self.ask(needed, deadline.saturating_duration_since(Instant::now()), reason)?;
            // Of the same kind, so it joins.
            let _ = supply.join(more);
        }
        // The same.
        let _ = held.take().map(|held| supply.join(held));
        Ok(supply)
    }
}
