//! Giving memory up on somebody's order, in the order in which it is missed.

use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::ids::RegionId;
use shoal_core::page_table::Backing;
use shoal_core::protocol::LeaseKind;

use super::MemoryManager;
use crate::error::MemoryError;
use crate::gate::Scope;
use crate::kv_cache;
use crate::region::{Region, Report};

/// What may go for a reclaim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    Anything,
    /// Anything, what is only cached after weights.
    CachedLast,
    /// What nobody in this process misses.
    Spare,
}

/// How much a region that holds something is missed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missed {
    /// It may be discarded.
    Least,
    /// Weights.
    More,
    /// What requests use.
    Most,
}

impl Missed {
    const ALL: [Self; 3] = [Self::Least, Self::More, Self::Most];

    fn of(region: &Region) -> Self {
        match (region.backing(), region.kind()) {
            (Backing::Discard, _) => Self::Least,
            (_, LeaseKind::Weights) => Self::More,
            _ => Self::Most,
        }
    }
}

impl MemoryManager {
    /// Frees device memory on somebody's order: first what lies in the pool, which waits for nobody; then what an engine that
    /// keeps books of its own can do without, if it says so in time ([`crate::KvCache::next_wanted`]); then, without any
    /// engine's help, KV memory that no block uses, memory in which blocks are only cached, what may be discarded, weights
    /// from the last extent backwards, KV contents (copied to the host).
    /// Regions that a step holds for itself ([`Region::guard`]) come after all others.
    ///
    /// # Errors
    /// [`MemoryError::Deadline`] if running steps or another operation did not end in time. What stood in the way
    /// later is in the report, with what was freed.
    pub fn reclaim(&self, bytes: ByteCount, timeout: Duration, reason: &str) -> Result<Report, MemoryError> {
        self.reclaim_of(Reach::Anything, bytes, timeout, reason)
    }

    /// [`reclaim`](Self::reclaim) where what is only cached would cost more to bring back than weights: it goes after them, and
    /// before what requests use. Engines that keep books of their own are asked last.
    ///
    /// # Errors
    /// The same.
    pub fn reclaim_cached_last(
        &self,
        bytes: ByteCount,
        timeout: Duration,
        reason: &str,
    ) -> Result<Report, MemoryError> {
        self.reclaim_of(Reach::CachedLast, bytes, timeout, reason)
    }

    /// [`reclaim`](Self::reclaim) as far as nobody misses it: the pool, KV memory that no block uses, and what is only
    /// cached. For room that this process's own weights need: to take it from them, or from what the requests that wait
    /// for them use, would be for nothing.
    ///
    /// # Errors
    /// The same.
    pub fn reclaim_spare(
        &self,
        bytes: ByteCount,
        timeout: Duration,
        reason: &str,
    ) -> Result<Report, MemoryError> {
        self.reclaim_of(Reach::Spare, bytes, timeout, reason)
    }

    fn reclaim_of(
        &self,
        reach: Reach,
        bytes: ByteCount,
        timeout: Duration,
        reason: &str,
    ) -> Result<Report, MemoryError> {
        let start = Instant::now();
        let deadline = start + timeout;
        tracing::debug!(%bytes, reason, "reclaim");
        let mut report = Report::new(bytes);
        report.absorb_released(self.empty_pool(bytes));
        if reach != Reach::CachedLast {
            self.ask_keepers(&mut report, deadline);
        }
        if report.freed >= bytes {
            report.duration = start.elapsed();
            return Ok(report);
        }
        let spared = {
            let late = MemoryError::Deadline { doing: "waiting for running steps", waited: timeout };
            let (_gate, spared) = self.gate.alone_sparing(deadline).ok_or(late)?;
            self.fence(deadline)?;
            let _turn = self.take_turn(deadline)?;
            self.reclaim_from(reach, &mut report, deadline, |id| !spared.contains(&id));
            spared
        };
        // Regions that a step had for itself come last, each when its guard ends.
        for id in spared {
            if report.freed >= bytes {
                break;
            }
            let freed = self.take_gate(Scope::Region(id), deadline, timeout).and_then(|_gate| {
                let _turn = self.take_turn(deadline)?;
                self.reclaim_from(reach, &mut report, deadline, |region| region == id);
                Ok(())
            });
            if let Err(error) = freed {
                report.fail(error);
            }
        }
        if reach == Reach::CachedLast {
            self.ask_keepers(&mut report, deadline);
        }
        report.duration = start.elapsed();
        Ok(report)
    }

    /// Engines that keep books of their own give up what they can do without.
    fn ask_keepers(&self, report: &mut Report, deadline: Instant) {
        for cache in self.caches() {
            if report.freed < report.requested {
                report.freed += cache.ask_keeper(report.requested - report.freed, deadline);
            }
        }
    }

    /// [`reclaim`](Self::reclaim) for a region that is about to grow, from the others, and only if no step runs at this
    /// moment: the caller may hold what a step waits for. Returns the bytes freed.
    pub(crate) fn evict_for(
        &self,
        region: &Region,
        bytes: ByteCount,
        deadline: Instant,
    ) -> Result<ByteCount, MemoryError> {
        let mut report = Report::new(bytes);
        report.absorb_released(self.empty_pool(bytes));
        if report.freed >= bytes {
            return Ok(report.freed);
        }
        let late = MemoryError::Deadline { doing: "finding no step running", waited: Duration::ZERO };
        let _gate = self.gate.alone(Scope::All, Instant::now()).ok_or(late)?;
        self.fence(deadline)?;
        let _turn = self.take_turn(deadline)?;
        self.reclaim_from(Reach::Anything, &mut report, deadline, |id| id != region.id());
        Ok(report.freed)
    }

    /// Frees what `report` still lacks, in order, from the regions that `is_had` takes. Needs the gate alone for them,
    /// and the turn.
    fn reclaim_from(
        &self,
        reach: Reach,
        report: &mut Report,
        deadline: Instant,
        is_had: impl Fn(RegionId) -> bool,
    ) {
        for backing in self.backings() {
            if report.freed < report.requested && Instant::now() < deadline && is_had(backing.region().id()) {
                report.absorb(backing.release_idle(report.requested - report.freed));
            }
        }
        let caches = self.caches();
        let release = |report: &mut Report, what: fn(&kv_cache::Shared, ByteCount) -> Report| {
            for cache in &caches {
                if report.freed < report.requested && Instant::now() < deadline && is_had(cache.region().id())
                {
                    report.absorb(what(cache, report.requested - report.freed));
                }
            }
        };
        release(report, kv_cache::Shared::release_idle);
        if reach != Reach::CachedLast {
            release(report, kv_cache::Shared::release_cached);
        }
        if reach == Reach::Spare {
            return;
        }
        let mut regions = self.regions();
        regions.retain(|region| is_had(region.id()) && region.may_yield());
        for kind in Missed::ALL {
            if kind == Missed::Most && reach == Reach::CachedLast {
                release(report, kv_cache::Shared::release_cached);
            }
            for region in regions.iter().filter(|region| Missed::of(region) == kind) {
                if report.freed < report.requested && Instant::now() < deadline {
                    report.absorb(region.evict_in_turn(report.requested - report.freed, false, deadline));
                }
            }
        }
    }
}
