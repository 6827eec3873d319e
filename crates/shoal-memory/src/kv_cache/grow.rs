//! Memory comes and goes under a cache's blocks.
//!
//! Apart because this is the slow side, which asks for leases, takes the manager's turn and calls the device. A plan is
//! made under the state's lock, carried out without it, and then said to be done: until then nobody is given its blocks.
//!
//! A reclaim may have moved what blocks hold to the host. As in [`crate::kv`], memory for more blocks is granted only
//! together with the memory for all of that: else no guard could be entered any more.

use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::extent::PageRun;
use shoal_core::kv::ids::BlockId;
use shoal_core::kv::moves::Repack;
use shoal_core::kv::room::Growth;
use shoal_core::kv::state::{GranuleId, KvState};

use super::Shared;
use crate::error::{ErrorKind, MemoryError};
use crate::region::Report;
use crate::supply::{Content, Supply};
use crate::transfer::Shared as TransferShared;
use crate::turn::Taken;

/// How often an allocation maps again because others took what it had mapped.
const ATTEMPTS_MAX: u32 = 4;
/// After how much the cache's own thread lets others have the turn.
const SPARE_STEP: ByteCount = ByteCount::mib(32);
/// How long the cache's own thread waits for what is in its way, and at the least whoever has begun what cannot be taken back.
const AHEAD_WAIT: Duration = Duration::from_millis(100);

impl Shared {
    pub(super) fn alloc<T: BlockId>(&self, group: usize, ids: &mut [T]) -> Result<bool, MemoryError> {
        match &self.debug {
            Some(debug) => self.alloc_checked(debug, group, ids),
            None => self.alloc_plainly(group, ids),
        }
    }

    pub(super) fn alloc_plainly<T: BlockId>(&self, group: usize, ids: &mut [T]) -> Result<bool, MemoryError> {
        let mut deadline = Instant::now() + self.patience;
        let mut has_grown = false;
        // Held from mapping until the blocks are taken: or they would be surplus, which the cache's own thread gives back.
        let mut growing = None;
        // Leased for what other groups have made room for, until it is mapped.
        let mut held = None;
        for round in 0..=ATTEMPTS_MAX {
            let mut was_leaving = {
                let mut state = self.state.lock();
                if has_grown {
                    // The cache's own thread may have slept for long: what is taken now is the demand of this moment.
                    state.advance(self.started.elapsed());
                }
                if state.alloc(group, ids)? {
                    // Nothing was mapped for this. What comes after it shall find something, and the thread that sees to
                    // that sleeps as long as it has not heard of any demand.
                    let wants_attention = state.wants_attention(group) || has_grown && state.keeps_ahead();
                    drop(state);
                    if wants_attention {
                        self.call();
                    }
                    return Ok(true);
                }
                state.is_leaving()
            };
            drop(growing.take());
            if round == ATTEMPTS_MAX {
                // What the last round mapped or evicted was looked at above.
                break;
            }
            let wanted = u32::try_from(ids.len()).unwrap_or(u32::MAX);
            // As long as something is only cached here, nobody else gives up memory for what this cache asks for: memory is
            // leased where some lies free, and else what is cached goes.
            let figures = self.state.lock().pool(group)?.figures();
            let patience =
                if figures.cached > 0 { Patience::turns(deadline) } else { Patience::all(deadline) };
            growing = self.grow_now(group, wanted, patience, &mut held)?;
            if growing.is_some() {
                has_grown = true;
                continue;
            }
            // What is cached makes up for a part, and there may be memory for the rest: before anything is evicted.
            let makes_up = figures.cached + figures.available;
            if figures.cached > 0 && makes_up < wanted {
                let patience = Patience::all(deadline);
                growing = self.grow_now(group, wanted - figures.cached, patience, &mut held)?;
                has_grown |= growing.is_some();
            }
            if self.state.lock().evict_for(group, wanted)? {
                continue;
            }
            drop(growing.take());
            if self.make_room(group, wanted, deadline, &mut held, &mut was_leaving)? {
                // What went for this shall not have gone in vain.
                deadline = deadline.max(Instant::now() + AHEAD_WAIT);
            } else if !self.await_leaving(was_leaving, group, wanted, deadline)? {
                return Ok(false);
            }
        }
        Ok(false)
    }

    /// Waits until what is leaving has left, which counts under the limit and holds its addresses until then. False: nothing
    /// is, or was when it was asked last, or it takes too long, or the limit would not do all the same.
    fn await_leaving(
        &self,
        was_leaving: bool,
        group: usize,
        blocks: u32,
        deadline: Instant,
    ) -> Result<bool, MemoryError> {
        {
            let state = self.state.lock();
            if !state.fits_limit(group, blocks)? || !(was_leaving || state.is_leaving()) {
                return Ok(false);
            }
        }
        // Whoever unmaps has the turn until all of it is gone.
        let Some(_turn) = self.turn_now(deadline)? else { return Ok(false) };
        self.settle_leaving()?;
        Ok(true)
    }

    /// The turn. `None`: another operation has it until `deadline`.
    fn turn_now(&self, deadline: Instant) -> Result<Option<Taken>, MemoryError> {
        match self.manager().take_turn_only(deadline) {
            Ok(turn) => Ok(Some(turn)),
            Err(error) if error.is_late() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Takes memory from what is empty or only cached in other groups, so that this one can grow under the limit; what has to
    /// be leased beside that is in `held` then. False: it cannot be had now. Nothing is evicted before all is known that
    /// can be: that it would be enough, that no step uses it, and that no other operation is under way. Says in `is_over_soon`
    /// whether something was in the way that need not be when the turn is there the next time.
    fn make_room(
        &self,
        group: usize,
        blocks: u32,
        deadline: Instant,
        held: &mut Option<Supply>,
        is_over_soon: &mut bool,
    ) -> Result<bool, MemoryError> {
        let growth = Growth { group, blocks, also: self.region.missing_bytes() };
        let beside = {
            let state = self.state.lock();
            // It may have left before anybody asks for it again, and with that it would be enough.
            *is_over_soon |= state.is_leaving();
            state.lease_beside(growth)?
        };
        let Some(beside) = beside else { return Ok(false) };
        *held = None;
        if !beside.is_zero() {
            match self.region.supply([beside], Content::Zeroed, deadline, "KV blocks") {
                Ok(supply) => *held = Some(supply),
                Err(error) if is_not_now(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        if !self.fence(deadline)? {
            return Ok(false);
        }
        let Some(turn) = self.turn_now(deadline)? else { return Ok(false) };
        let clocks = {
            let mut state = self.state.lock();
            // Others have taken some of it meanwhile, or the cache's own thread has given it back: another look may say more.
            if state.lease_beside(growth)?.is_none_or(|needed| needed > beside) {
                *is_over_soon = true;
                return Ok(false);
            }
            state.evict_beside(growth, beside)?;
            state.clocks()
        };
        // Once more: what became cached since the first time may be of a step that was recorded since.
        let Some(_turn) = self.fence_in_turn(turn, deadline)? else { return Ok(false) };
        let planned = self.state.lock().plan_beside(growth, beside, &clocks)?;
        let mut report = Report::new(ByteCount::ZERO);
        self.unmap(&planned, Fate::Pooled, &mut report);
        Ok(planned.is_empty() || !report.freed.is_zero())
    }

    /// [`fence`](Self::fence) for one that has the `turn` and has begun what cannot be taken back. Others have their turn
    /// while a step takes long. `None`: not now.
    fn fence_in_turn(&self, turn: Taken, deadline: Instant) -> Result<Option<Taken>, MemoryError> {
        let soon = Instant::now() + AHEAD_WAIT;
        if self.fence(soon)? {
            return Ok(Some(turn));
        }
        drop(turn);
        if Instant::now() < soon || !self.fence(deadline)? {
            return Ok(None);
        }
        self.turn_now(deadline.max(Instant::now() + AHEAD_WAIT))
    }

    /// [`grow`](Self::grow), and `None` too where there is no memory for it now.
    fn grow_now(
        &self,
        group: usize,
        blocks: u32,
        patience: Patience,
        held: &mut Option<Supply>,
    ) -> Result<Option<Taken>, MemoryError> {
        match self.grow(group, blocks, patience, held) {
            Err(error) if is_not_now(&error) => {
                tracing::debug!(%error, blocks, "no memory for blocks now");
                Ok(None)
            }
            grown => grown,
        }
    }

    /// Maps what `blocks` blocks lack. As long as what this gives is held, nothing of it is given back as surplus. `None`: there
    /// is no room for it under the limit.
    fn grow(
        &self,
        group: usize,
        blocks: u32,
        patience: Patience,
        held: &mut Option<Supply>,
    ) -> Result<Option<Taken>, MemoryError> {
        let late =
            || MemoryError::Deadline { doing: "waiting for another thread that maps", waited: self.patience };
        let growing = self.growing.take(patience.turns).ok_or_else(late)?;
        let Some(planned) = self.state.lock().plan_growth(group, blocks)? else { return Ok(None) };
        self.map(&planned, patience, Purpose::Need, held)?;
        Ok(Some(growing))
    }

    /// Maps what is expected, a few granules at a time, so that whoever needs memory now has its turn in between. Where the
    /// lease or the device has not all of them, half of that is asked for, down to the shortest granule: what there is
    /// comes. True if that was anything; an error where something could not be had.
    pub(super) fn map_spare(&self) -> Result<bool, MemoryError> {
        let mut most = ByteCount(u64::MAX);
        let (mut has_mapped, mut refused) = (false, None);
        // For all that is refused together; what comes takes its own time.
        let mut deadline = Instant::now() + AHEAD_WAIT;
        while !self.is_stopped() {
            // Whoever maps right now maps for somebody who waits.
            let Some(_growing) = self.growing.take(Instant::now() + AHEAD_WAIT) else { break };
            // What is on the host comes first, and when it is needed.
            if !self.region.missing_bytes().is_zero() {
                break;
            }
            let (planned, bytes, least) = {
                let mut state = self.state.lock();
                let least = state.spare_unit().unwrap_or(ByteCount::ZERO);
                let planned = state.plan_spare(SPARE_STEP, most)?;
                let bytes: ByteCount = planned.iter().map(|granule| state.bytes_of(*granule)).sum();
                (planned, bytes, least)
            };
            if planned.is_empty() {
                break;
            }
            match self.map(&planned, Patience::turns(deadline), Purpose::Ahead, &mut None) {
                Ok(()) => {
                    has_mapped = true;
                    if refused.is_none() {
                        deadline = Instant::now() + AHEAD_WAIT;
                    }
                }
                Err(error) if is_shortage(&error) && bytes > least => {
                    most = ByteCount(bytes.0 / 2);
                    refused = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        refused.map_or(Ok(has_mapped), Err)
    }

    /// Maps what a part-filled granule can be given up for. `None`: that would gain nothing.
    pub(super) fn map_repack(
        &self,
        group: usize,
        moves_max: usize,
        deadline: Instant,
    ) -> Result<Option<Repack>, MemoryError> {
        let late =
            || MemoryError::Deadline { doing: "waiting for another thread that maps", waited: self.patience };
        let _growing = self.growing.take(deadline).ok_or_else(late)?;
        let Some(repack) = self.state.lock().plan_repack(group, moves_max)? else { return Ok(None) };
        // Nobody is to give memory up so that this cache may need less.
        match self.map(&repack.planned, Patience::turns(deadline), Purpose::Repack, &mut None) {
            Ok(()) => Ok(Some(repack)),
            Err(error) if is_not_now(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Gives planned granules memory, all or none, and says so.
    fn map(
        &self,
        planned: &[GranuleId],
        patience: Patience,
        purpose: Purpose,
        held: &mut Option<Supply>,
    ) -> Result<(), MemoryError> {
        let runs = {
            let state = self.state.lock();
            let runs = planned.iter().map(|granule| state.runs(*granule));
            runs.collect::<Result<Vec<_>, _>>()
        };
        let mut turn = None;
        let done = runs
            .map_err(MemoryError::from)
            .and_then(|runs| self.map_runs(&runs.concat(), patience, purpose, held, &mut turn));
        let (mut state, mut is_gone) = (self.state.lock(), true);
        for granule in planned {
            match (&done, &turn) {
                (Ok(()), _) => state.mapped(*granule)?,
                // It was begun, and what was mapped by then may not have gone.
                (Err(_), Some(_)) => is_gone &= self.leave(&mut state, *granule)?,
                (Err(_), None) => state.gone(*granule)?,
            }
        }
        drop(state);
        // In turn until here: a reclaim that found memory which is no granule yet would copy it to the host.
        drop(turn);
        if !is_gone {
            self.call();
        }
        done
    }

    /// Leaves the turn in `turn` from where memory is mapped on.
    fn map_runs(
        &self,
        runs: &[PageRun],
        patience: Patience,
        purpose: Purpose,
        held: &mut Option<Supply>,
        turn: &mut Option<Taken>,
    ) -> Result<(), MemoryError> {
        let (manager, deadline) = (self.manager(), patience.turns);
        // One at a time, or two would ask for the same missing bytes. Neither turn nor data lock is held while asking.
        let restoring = match self.region.missing_bytes() {
            ByteCount::ZERO => None,
            _ if purpose == Purpose::Need => Some(manager.take_restore(deadline)?),
            _ => return Err(self.region.refuse("map ahead", "something of it is on the host")),
        };
        // A wake lends its turn while it waits for copies: a step that runs beside it needs blocks, and what was evicted of
        // the cache.
        let take = |deadline| manager.take_or_borrow_turn(deadline);
        let extents = {
            // In turn: in the middle of a reclaim pages are gone whose lease is not given back yet.
            let _turn = take(deadline)?;
            self.drop_idle_copies();
            [self.region.wanted_extents(runs)?, self.region.missing_extents(ByteCount(u64::MAX))].concat()
        };
        let mut supply =
            self.region.supply_beside(held, extents, Content::Zeroed, patience.lease, "KV blocks")?;
        *turn = Some(take(deadline.max(Instant::now() + AHEAD_WAIT))?);
        let missing = self.region.missing_bytes();
        // Or the cache's own thread would take again what a reclaim took while it waited for the turn.
        let is_too_late = purpose == Purpose::Ahead && self.is_stopped();
        if is_too_late
            || self.region.uncommitted(runs)? + missing > supply.bytes()
            || (restoring.is_none() && !missing.is_zero())
        {
            let waited = self.patience;
            return Err(MemoryError::Deadline { doing: "growing while a reclaim took memory", waited });
        }
        if !missing.is_zero() {
            let shared = TransferShared::default();
            self.region.restore_in_turn(&mut supply, manager.operation_deadline(), &shared)?;
        }
        self.region.commit_in_turn(runs, &mut supply).map(drop)
    }

    /// A granule did not come, or has left. Where something still holds its memory, or the device does not give it up, its
    /// addresses are not to be had yet: it goes when that is over ([`settle_leaving`](Self::settle_leaving)). True: it is gone.
    /// Needs the turn.
    fn leave(&self, state: &mut KvState, granule: GranuleId) -> Result<bool, MemoryError> {
        let lingers = self.region.lingering(&state.runs(granule)?).is_some();
        if lingers {
            self.lingering.lock().push(granule);
        } else {
            state.gone(granule)?;
        }
        Ok(!lingers)
    }

    /// Looks again at what could not leave when it was to. True: nothing is left of it. Needs the turn, which asks the device
    /// again when it is taken.
    pub(super) fn settle_leaving(&self) -> Result<bool, MemoryError> {
        let lingering = std::mem::take(&mut *self.lingering.lock());
        if lingering.is_empty() {
            return Ok(true);
        }
        let mut state = self.state.lock();
        for granule in lingering {
            self.leave(&mut state, granule)?;
        }
        Ok(self.lingering.lock().is_empty())
    }

    /// The same on the cache's own thread, which has no turn yet.
    pub(super) fn settle_leaving_soon(&self) -> bool {
        if self.lingering.lock().is_empty() {
            return true;
        }
        let turn = self.manager().take_turn_only(Instant::now() + AHEAD_WAIT);
        match turn.and_then(|_turn| self.settle_leaving()) {
            Ok(is_over) => is_over,
            Err(error) => {
                tracing::debug!(%error, "memory that could not leave stays for now");
                false
            }
        }
    }

    /// Gives back what was empty at `clocks` and nothing is expected for. False: a step runs, and which ones have ended is
    /// not known; or somebody maps.
    pub(super) fn release_surplus(&self, clocks: &[u64]) -> Result<bool, MemoryError> {
        let deadline = Instant::now() + AHEAD_WAIT;
        if !self.fence(deadline)? {
            return Ok(false);
        }
        let _turn = self.manager().take_turn_only(deadline)?;
        // What was just mapped is empty until it is taken. Not waited for: whoever maps may want the turn, and, where somebody
        // lends it, must not wait behind this for what it could borrow.
        let Some(_growing) = self.growing.take(Instant::now()) else { return Ok(false) };
        let planned = self.state.lock().plan_release(clocks)?;
        let mut report = Report::new(ByteCount::ZERO);
        self.unmap(&planned, Fate::Pooled, &mut report);
        report.error.map_or(Ok(true), |error| Err(*error))
    }

    /// Waits until the steps recorded last have ended, or, where none was, everything queued on the device: not while a
    /// step holds a guard then, as it may capture a graph, which marking all work would end. False: not now.
    fn fence(&self, deadline: Instant) -> Result<bool, MemoryError> {
        let mut events: Vec<_> = self.steps.lock().values().cloned().collect();
        events.extend(self.step.lock().clone());
        if events.is_empty() {
            if self.manager().gate().is_shared() {
                return Ok(false);
            }
            return match self.manager().fence(deadline) {
                Ok(()) => Ok(true),
                Err(MemoryError::Deadline { .. }) => Ok(false),
                Err(error) => Err(error),
            };
        }
        for event in events {
            let left = deadline.saturating_duration_since(Instant::now());
            if !event.wait(left).map_err(MemoryError::device("wait for a step"))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives back memory in which nothing lies, or, with `may_evict`, nothing that is owned.
    pub(crate) fn trim(
        &self,
        bytes: ByteCount,
        may_evict: bool,
        deadline: Instant,
    ) -> Result<Report, MemoryError> {
        let (start, manager) = (Instant::now(), self.manager());
        // What is given back here is for others: the cache's own thread does not take it again.
        self.pause();
        // What becomes empty from here on is not fenced by what is waited for below.
        let clocks = {
            let mut state = self.state.lock();
            if may_evict {
                let empty = state.usage().empty;
                state.evict_granules(bytes.saturating_sub(empty))?;
            }
            state.clocks()
        };
        if !self.fence(deadline)? {
            return Err(MemoryError::Deadline {
                doing: "waiting for running steps",
                waited: start.elapsed(),
            });
        }
        let _turn = manager.take_turn(deadline)?;
        let planned = self.state.lock().plan_reclaim(bytes, &clocks)?;
        let mut report = Report::new(bytes);
        self.unmap(&planned, Fate::GivenBack, &mut report);
        manager.count_evicted(report.freed);
        report.duration = start.elapsed();
        Ok(report)
    }

    /// Frees memory in which nothing lies. Needs the turn, and that what steps have queued is done.
    pub(crate) fn release_idle(&self, bytes: ByteCount) -> Report {
        self.release(bytes, false)
    }

    /// Frees memory in which nothing is owned: what is cached there is evicted. Needs the same.
    pub(crate) fn release_cached(&self, bytes: ByteCount) -> Report {
        self.release(bytes, true)
    }

    fn release(&self, bytes: ByteCount, may_evict: bool) -> Report {
        let start = Instant::now();
        let mut report = Report::new(bytes);
        let planned = {
            let mut state = self.state.lock();
            let evicted = if may_evict { state.evict_granules(bytes).map(drop) } else { Ok(()) };
            let clocks = state.clocks();
            evicted.and_then(|()| state.plan_reclaim(bytes, &clocks))
        };
        match planned {
            Ok(planned) => self.unmap(&planned, Fate::GivenBack, &mut report),
            Err(error) => report.fail(error.into()),
        }
        self.manager().count_evicted(report.freed);
        self.pause();
        report.duration = start.elapsed();
        report
    }

    /// Forgets what lies off the device although nobody owns it: no step waits for what is only cached. Needs the turn.
    pub(crate) fn drop_idle_copies(&self) {
        if self.region.missing_bytes().is_zero() {
            return;
        }
        let is_off = |runs: &[PageRun]| runs.iter().any(|run| !self.region.missing_within(*run).is_empty());
        let planned = {
            let mut state = self.state.lock();
            state.evict_where(is_off).and_then(|()| state.plan_drop(is_off))
        };
        let mut report = Report::new(ByteCount::ZERO);
        match planned {
            Ok(planned) => self.unmap(&planned, Fate::GivenBack, &mut report),
            Err(error) => report.fail(error.into()),
        }
        if let Some(error) = report.error {
            tracing::error!(%error, "cannot drop a copy that no block uses");
        }
    }

    /// Unmaps granules that are leaving. What the device refuses, or something still holds (as memory that is being zeroed
    /// beside a long kernel), is kept by the manager, with its lease, and asked for again: until that is over the granule is
    /// leaving.
    fn unmap(&self, planned: &[GranuleId], fate: Fate, report: &mut Report) {
        for granule in planned {
            self.unfill(*granule);
            let runs = self.state.lock().runs(*granule);
            for run in runs.unwrap_or_default() {
                let freed = match fate {
                    Fate::Pooled => self.region.decommit_to_pool(run, true),
                    Fate::GivenBack => self.region.decommit_in_turn(run),
                };
                match freed {
                    Ok(freed) => report.freed += freed,
                    Err(error) => report.fail(error),
                }
            }
            let gone = self.leave(&mut self.state.lock(), *granule);
            match gone {
                Ok(true) => {}
                Ok(false) => self.call(),
                Err(error) => report.fail(error),
            }
        }
    }
}

/// Until when what is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Patience {
    /// Turns of this process.
    turns: Instant,
    /// A lease: others may have to give memory up for it. If that is over, only what lies free is granted.
    lease: Instant,
}

impl Patience {
    const fn all(until: Instant) -> Self {
        Self { turns: until, lease: until }
    }

    fn turns(until: Instant) -> Self {
        Self { turns: until, lease: Instant::now() }
    }
}

/// What memory is mapped for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// Somebody waits for blocks: what lies on the host comes with it.
    Need,
    /// What is expected: not after memory was reclaimed.
    Ahead,
    /// Other memory of this cache goes for it.
    Repack,
}

/// What becomes of memory that is unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// It is kept for a moment for whatever grows next.
    Pooled,
    /// It goes to the device, and its lease to whoever grants.
    GivenBack,
}

/// Whether it means that there is no memory now, and nothing worse.
fn is_not_now(error: &MemoryError) -> bool {
    is_shortage(error) || error.is_late()
}

/// Whether less might be had.
fn is_shortage(error: &MemoryError) -> bool {
    matches!(error.kind(), ErrorKind::Lease | ErrorKind::OutOfMemory)
}
