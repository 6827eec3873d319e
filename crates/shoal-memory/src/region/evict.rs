//! Giving device memory up: verify what is believed to be clean, drop what has another copy, copy the rest to the host.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::ids::ExtentIndex;
use shoal_core::page_table::{Backing, EvictPlan, RefusedReason};
use shoal_core::tier::Tier;
use shoal_device::{HashTicket, Span};

use super::outgoing::Outgoing;
use super::{Region, RegionUsage, Report};
use crate::error::MemoryError;
use crate::gate::Scope;
use crate::retire::Released;

/// Hashes computed at once.
const HASHES_MAX: usize = 8;

impl Region {
    /// Frees at least `bytes` of device memory, as far as there is any, from the last extent backwards. Extents whose
    /// bytes differ from their recorded checksum are copied before their memory goes.
    ///
    /// # Errors
    /// [`MemoryError::Deadline`], [`MemoryError::HostBudget`], [`MemoryError::Device`]; what was freed before stays
    /// freed, all else is as it was. Memory that the device refuses to give back is asked for again by the next operation.
    pub fn evict(&self, bytes: ByteCount, timeout: Duration) -> Result<Report, MemoryError> {
        self.evict_with(|_| bytes, false, timeout)
    }

    /// Frees all device memory but the share `keep` (0.0 to 1.0) that is used first. `trust_clean` skips the comparison
    /// with the recorded checksums: what was written since is then lost.
    ///
    /// # Errors
    /// As [`evict`](Self::evict).
    pub fn sleep(&self, keep: f64, trust_clean: bool, timeout: Duration) -> Result<Report, MemoryError> {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of a byte count, clamped"
        )]
        let kept = |total: ByteCount| ByteCount((total.0 as f64 * keep.clamp(0.0, 1.0)) as u64);
        self.evict_with(|usage| usage.device.saturating_sub(kept(usage.total)), trust_clean, timeout)
    }

    fn evict_with(
        &self,
        bytes: impl FnOnce(RegionUsage) -> ByteCount,
        trust_clean: bool,
        timeout: Duration,
    ) -> Result<Report, MemoryError> {
        let start = Instant::now();
        let deadline = start + timeout;
        let _gate = self.manager().take_gate(Scope::Region(self.id()), deadline, timeout)?;
        let _turn = self.manager().take_turn(deadline)?;
        // In turn: in the middle of a wake, what it brings is not there yet, and will be when it ends.
        let bytes = bytes(self.usage());
        let mut report = self.evict_in_turn(bytes, trust_clean, deadline);
        // Who puts something to sleep wants memory for others. What the device refuses is told, and kept.
        let _ = self.manager().empty_pool(ByteCount(u64::MAX));
        report.duration = start.elapsed();
        match report.error.take() {
            Some(error) => Err(*error),
            None => Ok(report),
        }
    }

    /// Needs the gate alone and the turn.
    pub(crate) fn evict_in_turn(&self, bytes: ByteCount, trust_clean: bool, deadline: Instant) -> Report {
        let start = Instant::now();
        let mut report = Report::new(bytes);
        if bytes.is_zero() {
            return report;
        }
        if self.is_in_use() {
            report.fail(self.refuse("evict", "somebody fills it right now (use_region)"));
            return report;
        }
        let manager = Arc::clone(self.manager());
        let plan = match self.plan_verified(bytes, trust_clean, deadline) {
            Ok(plan) => plan,
            Err(error) => {
                report.fail(error);
                return report;
            }
        };
        if plan.freed < bytes
            && let Some((_, RefusedReason::NoHostRoom { needed, .. })) = plan.refused.first()
        {
            let (free, budget) = (manager.arena.free(), manager.options.host_budget);
            report.fail(MemoryError::HostBudget { needed: *needed, free, budget });
        }
        let mut outgoing = Outgoing::new(self, plan.moves);
        let mut released = Released::default();
        let outcome = outgoing.run(deadline, |left| released.absorb(manager.release_unused(left)));
        let (leaving, copied) = outgoing.end(outcome.is_err());
        released.absorb(manager.release_unused(leaving));
        (report.freed, report.copied) = (released.freed, copied);
        if let Some(error) = outcome.err().or(released.error) {
            report.fail(error);
        }
        manager.count_evicted(report.freed);
        report.duration = start.elapsed();
        report
    }

    /// What leaves so that `bytes` come free. Each extent in it was compared with its recorded checksum, unless the region
    /// is trusted: one that turns out to be written may find no room on the host, and then another takes its place, which
    /// has to be compared as well before it is believed (I6).
    fn plan_verified(
        &self,
        bytes: ByteCount,
        trust_clean: bool,
        deadline: Instant,
    ) -> Result<EvictPlan, MemoryError> {
        let manager = self.manager();
        let mut verified = HashSet::new();
        loop {
            let plan = |free| self.inner.state.lock().table.plan_evict(bytes, free);
            let mut planned = plan(manager.arena.free());
            let refused = refused_bytes(&planned.refused);
            if !refused.is_zero() {
                manager.make_host_room(planned.copied + refused);
                planned = plan(manager.arena.free());
            }
            if trust_clean {
                return Ok(planned);
            }
            let new =
                planned.moves.iter().map(|planned| planned.extent).filter(|index| verified.insert(*index));
            let new: Vec<ExtentIndex> = new.collect();
            if new.is_empty() {
                return Ok(planned);
            }
            self.compare(new, deadline)?;
        }
    }

    /// Compares all that lies on the device with the recorded checksums. Where they differ the device copy is the only
    /// valid one from now on.
    pub(crate) fn find_written(&self, deadline: Instant) -> Result<(), MemoryError> {
        let on_device: Vec<ExtentIndex> = {
            let state = self.inner.state.lock();
            let extents = state.table.extents_by(state.table.order()).rev();
            extents
                .filter(|(_, _, residency)| residency.valid().has(Tier::Device))
                .map(|(index, ..)| index)
                .collect()
        };
        self.compare(on_device, deadline)
    }

    /// As [`find_written`](Self::find_written), for these extents. Before sealing nothing is recorded that could be
    /// compared, and what may be discarded needs no comparison.
    fn compare(&self, extents: Vec<ExtentIndex>, deadline: Instant) -> Result<(), MemoryError> {
        if self.backing() == Backing::Discard || !self.inner.state.lock().sealed {
            return Ok(());
        }
        let mut asked: VecDeque<(ExtentIndex, HashTicket)> = VecDeque::new();
        for index in extents {
            let mapping = self.inner.state.lock().mapping(index);
            if let Some(mapping) = mapping {
                let ticket = self.manager().down.hash(Span::mapping(&mapping));
                asked.push_back((index, ticket.map_err(MemoryError::device("hash device memory"))?));
            }
            if asked.len() >= HASHES_MAX {
                self.compare_first(&mut asked, deadline)?;
            }
        }
        while !asked.is_empty() {
            self.compare_first(&mut asked, deadline)?;
        }
        Ok(())
    }

    fn compare_first(
        &self,
        asked: &mut VecDeque<(ExtentIndex, HashTicket)>,
        deadline: Instant,
    ) -> Result<(), MemoryError> {
        let Some((index, ticket)) = asked.pop_front() else { return Ok(()) };
        let hash = ticket
            .wait(deadline.saturating_duration_since(Instant::now()))
            .map_err(MemoryError::device("hash device memory"))?;
        self.settle_hash(index, hash).map(drop)
    }
}

fn refused_bytes(refused: &[(ExtentIndex, RefusedReason)]) -> ByteCount {
    let bytes = refused.iter().map(|(_, reason)| match reason {
        RefusedReason::NoHostRoom { needed, .. } => *needed,
        RefusedReason::Moving => ByteCount::ZERO,
    });
    bytes.sum()
}
