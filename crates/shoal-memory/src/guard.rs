//! [`Guard`]: permission to use regions' memory while nothing of it is evicted (I13).
//!
//! Apart from the manager because entering one is the only place where restores, leases and the gate meet, and their
//! order is what keeps it from locking up or being starved:
//!
//! 1. Everything is there: share the gate, in fair order with those who evict. This is the usual case.
//! 2. Something is missing: restore it region by region, as a wake does, and look again. Whoever evicts may come in
//!    between, which is right while somebody else's need is greater.
//! 3. It was taken away again: get the lease of all that is missing *first*, then share the gate ahead of those who
//!    wait to evict, and restore inside. What was evicted before that adds to the lease; leases held here are not
//!    evicted, so each round needs less, and the last one finds everything leased.
//!
//! A step may also run beside a wake ([`Region::guard_in_order`]), once that wake has its lease, its turn and its memory: from
//! then on it waits for nobody, so the step may wait for it, and whoever evicts waits for both. KV that was evicted too is
//! brought back beside the wake before the guard is entered, on the turn that the wake lends.
//!
//! A lease is asked for without sharing the gate (I9's spirit: the answer may need this process to evict), which is why
//! a guard inside another one restores nothing: it is refused at once where something is missing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;

use crate::error::MemoryError;
use crate::gate::{Pass, Scope};
use crate::manager::MemoryManager;
use crate::region::Region;
use crate::supply::Supply;
use crate::transfer::{Shared, Transfer};

const REASON: &str = "a step needs it";
/// How often a step tries to run beside a wake before it waits for the whole region.
const ROUNDS_BESIDE_WAKES: u32 = 3;

/// Permission to use the memory of all regions, or of one: while it lives nothing of it is evicted (I13). Many may be
/// held at a time; it may be dropped on another thread.
#[derive(Debug)]
pub struct Guard {
    _pass: Pass,
}

impl Region {
    /// Lets a step use this region's memory: as [`MemoryManager::guard`], but other regions are neither brought back nor
    /// kept. Capture graphs under [`MemoryManager::guard`]: beside this one others are evicted, and the fence of that
    /// ends a capture.
    ///
    /// # Errors
    /// As [`MemoryManager::guard`].
    pub fn guard(&self, timeout: Duration) -> Result<Guard, MemoryError> {
        self.manager().enter(std::slice::from_ref(self), Scope::Region(self.id()), timeout)
    }
}

impl MemoryManager {
    /// [`guard`](Self::guard) of all regions, while the bytes of `region` still come: as [`Region::guard_in_order`]. KV that
    /// is missing is brought back beside them first; where something else of another region is missing, everything is
    /// waited for.
    ///
    /// # Errors
    /// As [`guard`](Self::guard).
    pub fn guard_in_order(
        self: &Arc<Self>,
        region: &Region,
        timeout: Duration,
    ) -> Result<(Guard, Option<Transfer>), MemoryError> {
        region.enter_in_order(Scope::All, timeout)
    }
}

impl Region {
    /// Lets a step run while its bytes still come: as [`guard`](Self::guard), but once a wake has all of its memory, this
    /// returns, with that wake. Before the step uses a range it waits for it by [`Transfer::wait_stream`] or
    /// [`Transfer::wait_host`]; the wake brings in order of use ([`Region::set_order`]) and is started here if none runs.
    /// Without a wake in the answer everything is there.
    ///
    /// # Errors
    /// As [`guard`](Self::guard).
    pub fn guard_in_order(&self, timeout: Duration) -> Result<(Guard, Option<Transfer>), MemoryError> {
        self.enter_in_order(Scope::Region(self.id()), timeout)
    }

    /// Those of which something is missing, of what `scope` speaks for, but for this region.
    fn others_missing(&self, scope: Scope) -> Vec<Self> {
        let is_meant = |region: &Self| region.id() != self.id() && scope.has(region.id());
        let mut others = self.manager().regions();
        others.retain(|region| is_meant(region) && !region.missing_bytes().is_zero());
        others
    }

    fn enter_in_order(
        &self,
        scope: Scope,
        timeout: Duration,
    ) -> Result<(Guard, Option<Transfer>), MemoryError> {
        let deadline = Instant::now() + timeout;
        let late = || MemoryError::Deadline { doing: "entering a guard", waited: timeout };
        let left = || deadline.saturating_duration_since(Instant::now());
        let gate = self.manager().gate();
        let is_nested = gate.is_held_here();
        for _ in 0..ROUNDS_BESIDE_WAKES {
            let pass = gate.share(scope, deadline).ok_or_else(late)?;
            let (others, is_whole) = (self.others_missing(scope), self.missing_bytes().is_zero());
            if is_whole && others.is_empty() {
                return Ok((Guard { _pass: pass }, None));
            }
            // Inside another guard nothing is brought back, and beside a wake only KV.
            let can_come = !is_nested && !is_whole && others.iter().all(Self::comes_beside_wakes);
            if !others.is_empty() && !can_come {
                break;
            }
            drop(pass);
            let waking = self.waking().filter(Transfer::is_whole);
            if is_nested && !waking.as_ref().is_some_and(|wake| wake.shared().is_open()) {
                break;
            }
            let begin = || self.begin_restore(ByteCount(u64::MAX), deadline, REASON);
            let wake = waking.map_or_else(begin, Ok)?;
            if !others.is_empty() && wake.shared().is_backed_by(deadline) {
                for region in others {
                    region.restore_now(ByteCount(u64::MAX), deadline, &Shared::default(), REASON)?;
                }
            }
            if !wake.shared().step_in(deadline).ok_or_else(late)? {
                wake.wait(left())?;
                continue;
            }
            // Whoever waits to evict waits for the turn too, which the wake has.
            let pass = gate.share_first(scope, deadline).ok_or_else(late)?;
            if wake.shared().is_open() && self.others_missing(scope).is_empty() {
                return Ok((Guard { _pass: pass }, Some(wake)));
            }
        }
        let whole = match scope {
            Scope::All => self.manager().enter(&self.manager().regions(), scope, left()),
            Scope::Region(_) | Scope::Pair(..) => self.guard(left()),
        };
        whole.map(|guard| (guard, None))
    }

    /// A wake that has all of its memory needs nothing that somebody who holds a guard would have to give up, so it may
    /// be waited for inside one.
    fn wait_for_open_wake(&self, deadline: Instant) {
        if let Some(wake) = self.waking().filter(|wake| wake.shared().is_open()) {
            // How it ended shows in what is missing.
            let _ = wake.wait(deadline.saturating_duration_since(Instant::now()));
        }
    }
}

impl MemoryManager {
    /// Lets a step use the regions' memory: brings back what is missing, then keeps everything in place until the
    /// guard is dropped. Do not ask for memory (commit, back) inside: whoever gives it up may have to wait for you.
    ///
    /// A thread that holds a guard may enter another one, and does not wait for those who wait for the first; but inside
    /// a guard nothing is brought back.
    ///
    /// # Errors
    /// What restoring failed with; [`MemoryError::Deadline`]; [`MemoryError::NestedGuard`] at once if this thread holds
    /// a guard already and something that it does not cover is missing.
    pub fn guard(self: &Arc<Self>, timeout: Duration) -> Result<Guard, MemoryError> {
        self.enter(&self.regions(), Scope::All, timeout)
    }

    fn enter(&self, regions: &[Region], scope: Scope, timeout: Duration) -> Result<Guard, MemoryError> {
        let deadline = Instant::now() + timeout;
        let late = || MemoryError::Deadline { doing: "entering a guard", waited: timeout };
        let is_nested = self.gate().is_held_here();
        for is_first in [true, false] {
            let pass = self.gate().share(scope, deadline).ok_or_else(late)?;
            let missing: Vec<&Region> =
                regions.iter().filter(|region| !region.missing_bytes().is_zero()).collect();
            if missing.is_empty() {
                return Ok(Guard { _pass: pass });
            }
            if is_nested {
                for region in &missing {
                    region.wait_for_open_wake(deadline);
                }
                if missing.iter().all(|region| region.missing_bytes().is_zero()) {
                    return Ok(Guard { _pass: pass });
                }
                let region = missing[0].name().to_owned();
                let missing = missing.iter().map(|region| region.missing_bytes()).sum();
                return Err(MemoryError::NestedGuard { region, missing });
            }
            drop(pass);
            if is_first {
                for region in missing {
                    region.restore_now(ByteCount(u64::MAX), deadline, &Shared::default(), REASON)?;
                }
                // What another operation is bringing is there when its turn ends.
                drop(self.take_turn(deadline)?);
            }
        }
        self.enter_with_leases(regions, scope, deadline, late)
    }

    /// Step 3 of the module's text.
    fn enter_with_leases(
        &self,
        regions: &[Region],
        scope: Scope,
        deadline: Instant,
        late: impl Fn() -> MemoryError,
    ) -> Result<Guard, MemoryError> {
        let _restoring = self.take_restore(deadline)?;
        let mut leases: Vec<(LeaseKind, Supply)> = Vec::new();
        loop {
            let asked = {
                // In turn: in the middle of an eviction bytes are missing whose lease is not given back yet.
                let _turn = self.take_turn(deadline)?;
                self.drop_idle_copies();
                lacking(regions, &leases)
            };
            for (region, bytes) in asked {
                let wait = deadline.saturating_duration_since(Instant::now());
                let more = region.ask(bytes, wait, REASON)?;
                match leases.iter_mut().find(|(kind, _)| *kind == region.kind()) {
                    // Of the same kind, so it joins.
                    Some((_, grant)) => drop(grant.join(more)),
                    None => leases.push((region.kind(), more)),
                }
            }
            let pass = self.gate().share_first(scope, deadline).ok_or_else(&late)?;
            let _turn = self.take_turn(deadline)?;
            if lacking(regions, &leases).is_empty() {
                for region in regions.iter().filter(|region| !region.missing_bytes().is_zero()) {
                    if let Some((_, grant)) = leases.iter_mut().find(|(kind, _)| *kind == region.kind()) {
                        region.restore_in_turn(grant, deadline, &Shared::default())?;
                    }
                }
                return Ok(Guard { _pass: pass });
            }
            if Instant::now() >= deadline {
                return Err(late());
            }
        }
    }
}

/// What is missing of each kind beyond these leases, each with a region of that kind to ask for.
fn lacking<'a>(regions: &'a [Region], leases: &[(LeaseKind, Supply)]) -> Vec<(&'a Region, ByteCount)> {
    let mut lacking: Vec<(&Region, ByteCount)> = Vec::new();
    for region in regions {
        let missing = region.missing_bytes();
        match lacking.iter_mut().find(|(other, _)| other.kind() == region.kind()) {
            Some((_, bytes)) => *bytes += missing,
            None => lacking.push((region, missing)),
        }
    }
    for (region, bytes) in &mut lacking {
        let held = leases.iter().find(|(kind, _)| *kind == region.kind()).map(|(_, grant)| grant.bytes());
        *bytes = bytes.saturating_sub(held.unwrap_or_default());
    }
    lacking.retain(|(_, bytes)| !bytes.is_zero());
    lacking
}
