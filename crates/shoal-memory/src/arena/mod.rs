//! The host tier's memory: copies in parts of slabs that the device can copy from and to, within a budget (I1).
//!
//! Apart because host memory is slow to make: a gibibyte takes a twentieth of a second to be touched and page-locked on a
//! large machine, and far longer on a small one. So it is made in slabs, a few for many copies, ahead of use where it is
//! known what will be needed ([`HostArena::expect`]), and kept for the next copies. What part of which slab is whose is
//! decided in [`shoal_core::slabs`].
//!
//! | module | subject |
//! |---|---|
//! | `copy` | [`HostCopy`]: the memory of one copy, which may be moved while nobody holds it |
//! | `keeper` | the thread that locks and makes slabs ahead, and gives idle ones back |
//! | `make` | making slabs, and making room in them |
//!
//! The sum of slabs is at most the budget, also while one is on its way back, so no copy is ever beyond it. A part is
//! free again when its copy is dropped and no job on a stream touches it any more (I5). If free parts lie scattered,
//! copies are moved together, so that what is free in all can be had in one part.
//!
//! **Page-locking.** A slab can be used before it is locked. What the host fills (staging) takes it at once, and the
//! keeper locks it meanwhile, before anything is woken from it. What the device fills waits for the lock: an unlocked
//! copy runs at a fraction of the link and holds its caller up, which costs more than the locking. Where locking is
//! refused, copies go unlocked and the reason is kept ([`HostUsage::reasons`]).

mod copy;
mod keeper;
mod make;
mod part;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::ids::SlabId;
use shoal_core::slabs::{Order, Part, SlabSpace, order_of};
use shoal_device::{Device, DeviceError, HostBacking, HostSlab};

use crate::error::MemoryError;
use crate::slab_source::SlabSource;
pub(crate) use copy::{Claim, HostCopy, Place};
pub(crate) use part::ArenaPart;

/// Sizes and times of an arena.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Steps {
    /// The first slab is at least so long; each next one as long as all before.
    pub(crate) first: Order,
    /// Whoever waits for a slab makes none longer than this, unless it needs one.
    pub(crate) waiting_max: Order,
    /// The keeper makes none longer than this: a registration takes a moment in which it cannot be stopped.
    pub(crate) ahead_max: Order,
    /// Slabs from this length on are the keeper's business; shorter ones are as well made by whoever waits for them.
    pub(crate) keeper_min: Order,
    /// After so long without use a slab is given back.
    pub(crate) idle: Duration,
}

impl Steps {
    /// The longest slab that the keeper makes while somebody may wait for it.
    fn first_ahead(self) -> Order {
        self.waiting_max.max(self.keeper_min).min(self.ahead_max)
    }
}

impl Default for Steps {
    fn default() -> Self {
        Self {
            first: order_of(ByteCount::mib(8)),
            waiting_max: order_of(ByteCount::mib(256)),
            ahead_max: order_of(ByteCount::gib(1)),
            keeper_min: order_of(ByteCount::mib(64)),
            idle: Duration::from_secs(30),
        }
    }
}

/// Who fills a copy first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Filled {
    /// The host, bit by bit: the memory is zeroed, and need not be locked yet.
    ByHost,
    /// The device: the memory is whatever it was, and locked if that is allowed.
    ByDevice,
}

/// Host memory of one manager.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostUsage {
    /// The most there may be.
    pub budget: ByteCount,
    /// Bytes of copies.
    pub used: ByteCount,
    /// Memory that has been made, for copies that are there and for those to come.
    pub made: ByteCount,
    /// Made and page-locked.
    pub locked: ByteCount,
    /// Made, and free for copies.
    pub spare: ByteCount,
    /// What the newest memory is made of.
    pub backing: Option<HostBacking>,
    /// Why it is made of that, and why something is not as fast as it could be; a sentence each.
    pub reasons: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lock {
    Wanted,
    UnderWay,
    Done,
    Refused,
}

#[derive(Debug)]
struct Slab {
    memory: Arc<HostSlab>,
    order: Order,
    lock: Lock,
    /// The number by which whoever lent it knows it.
    lent: Option<u64>,
    /// Pages that somebody has had, which may hold anything.
    touched: Vec<bool>,
    empty_since: Option<Instant>,
}

/// Memory on its way back.
#[derive(Debug)]
struct Going {
    memory: Arc<HostSlab>,
    order: Order,
    lent: Option<u64>,
}

#[derive(Debug, Default)]
struct State {
    space: SlabSpace,
    slabs: BTreeMap<SlabId, Slab>,
    slabs_made: u64,
    /// Pages of slabs that are being made or given back: not in the space, but there.
    outside_pages: u64,
    /// Slabs that the device refused to take back; it is asked again.
    refused: Vec<Going>,
    /// Bytes of copies that are there.
    used: ByteCount,
    copies: BTreeMap<Part, Weak<Place>>,
    /// Somebody makes slabs or room. One at a time: two would each take what the other just made.
    is_making: bool,
    /// Pages that will be asked for soon.
    expected_pages: u64,
    has_keeper: bool,
    is_stopped: bool,
    /// How many kinds of backing this machine has refused.
    backings_refused: usize,
    reasons: Vec<String>,
}

/// Reasons that are kept.
const REASONS_MAX: usize = 16;

impl State {
    fn give_reason(&mut self, reason: String) {
        if !self.reasons.contains(&reason) && self.reasons.len() < REASONS_MAX {
            tracing::info!(reason, "host memory");
            self.reasons.push(reason);
        }
    }

    fn taken_pages(&self) -> u64 {
        self.space.pages() - self.space.free_pages()
    }

    fn refused_pages(&self) -> u64 {
        self.refused.iter().map(|going| 1 << going.order).sum()
    }

    /// Pages of slabs that may still be made.
    fn left_pages(&self, budget_pages: u64) -> u64 {
        budget_pages.saturating_sub(self.space.pages() + self.outside_pages + self.refused_pages())
    }
}

/// What the arena and its keeper share.
#[derive(Debug)]
struct Core {
    device: Arc<dyn Device>,
    budget: ByteCount,
    steps: Steps,
    /// How long a copy waits for a slab that somebody else makes or locks.
    wait: Duration,
    source: Option<Arc<dyn SlabSource>>,
    process: u32,
    state: Mutex<State>,
    changed: Condvar,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct HostArena {
    core: Arc<Core>,
}

impl HostArena {
    pub(crate) fn new(
        device: Arc<dyn Device>,
        budget: ByteCount,
        wait: Duration,
        source: Option<Arc<dyn SlabSource>>,
    ) -> Arc<Self> {
        Self::with_steps(device, budget, wait, source, Steps::default())
    }

    pub(crate) fn with_steps(
        device: Arc<dyn Device>,
        budget: ByteCount,
        wait: Duration,
        source: Option<Arc<dyn SlabSource>>,
        steps: Steps,
    ) -> Arc<Self> {
        let (process, state, changed) = (std::process::id(), Mutex::default(), Condvar::new());
        let core = Core { device, budget, steps, wait, source, process, state, changed };
        Arc::new(Self { core: Arc::new(core) })
    }

    /// Bytes that new copies may take, in whole pages.
    pub(crate) fn free(&self) -> ByteCount {
        self.core.ask_again();
        self.core.free(&self.core.state.lock())
    }

    /// Bytes that hold copies.
    pub(crate) fn used(&self) -> ByteCount {
        self.core.state.lock().used
    }

    /// What there is, and why it is as it is.
    pub(crate) fn usage(&self) -> HostUsage {
        let state = self.core.state.lock();
        let bytes = |pages: u64| ByteCount(pages * PAGE_BYTES.0);
        let locked = state.slabs.values().filter(|slab| slab.lock == Lock::Done);
        HostUsage {
            budget: self.core.budget,
            used: state.used,
            made: bytes(state.space.pages() + state.outside_pages + state.refused_pages()),
            locked: locked.map(|slab| slab.memory.bytes()).sum(),
            spare: bytes(state.space.free_pages()),
            backing: state.slabs.values().next_back().map(|slab| slab.memory.backing()),
            reasons: state.reasons.clone(),
        }
    }

    /// Says that copies of so many bytes will be asked for soon: memory for them is made and locked in the background, as
    /// far as the budget and the machine allow. Nothing depends on it.
    pub(crate) fn expect(&self, bytes: ByteCount) {
        if bytes < ByteCount(PAGE_BYTES.0 << self.core.steps.keeper_min) || self.core.is_forked() {
            return;
        }
        let mut state = self.core.state.lock();
        state.expected_pages = state.expected_pages.max(bytes.pages());
        self.core.call_keeper(state);
    }

    /// Gives slabs back of which nobody has anything, without waiting until they are idle for long; returns their bytes.
    pub(crate) fn trim(&self) -> ByteCount {
        if self.core.is_forked() {
            return ByteCount::ZERO;
        }
        let made = self.usage().made;
        let slabs: Vec<SlabId> = {
            let mut state = self.core.state.lock();
            // What was expected is not wanted any more.
            state.expected_pages = 0;
            state.slabs.keys().copied().collect()
        };
        self.core.wait_at_rest(&slabs);
        self.core.give_slabs_back(&slabs);
        made.saturating_sub(self.usage().made)
    }

    /// Memory for one copy. It waits for whoever makes or locks the slab it lies in, at most for the arena's wait.
    ///
    /// # Errors
    /// `HostBudget`; `Device` if there is no memory, or in a fork; `Deadline`.
    pub(crate) fn allocate(
        self: &Arc<Self>,
        bytes: ByteCount,
        filled: Filled,
    ) -> Result<HostCopy, MemoryError> {
        let deadline = Instant::now() + self.core.wait;
        let (claim, memory, is_fresh) = self.obtain_memory(bytes, filled, deadline)?;
        let copy = HostCopy::new(self, &memory, claim, bytes)?;
        if filled == Filled::ByHost && !is_fresh {
            let zero = |slice: &mut [u8]| slice.fill(0);
            copy.buffer()
                .access_mut(ByteCount::ZERO, bytes, zero)
                .map_err(MemoryError::device("zero host memory"))?;
        }
        Ok(copy)
    }

    /// A part, what it lies in, and whether nobody had it before.
    fn obtain_memory(
        &self,
        bytes: ByteCount,
        filled: Filled,
        deadline: Instant,
    ) -> Result<(Claim, Arc<HostSlab>, bool), MemoryError> {
        let core = &self.core;
        core.check_process()?;
        let claim = Claim::new(core, core.obtain(order_of(bytes), bytes, deadline)?);
        if filled == Filled::ByDevice {
            core.wait_locked(claim.part().slab, deadline);
        }
        let touched = {
            let mut state = core.state.lock();
            let slab = state.slabs.get_mut(&claim.part().slab);
            slab.map(|slab| (Arc::clone(&slab.memory), slab.touch(claim.part())))
        };
        // A slab of which somebody has a part is not given back.
        let Some((memory, is_fresh)) = touched else {
            return Err(core.no_room(&core.state.lock(), bytes));
        };
        Ok((claim, memory, is_fresh))
    }
}

impl Drop for HostArena {
    fn drop(&mut self) {
        // After a fork another thread may hold the lock for ever, and the memory is the parent's.
        if self.core.is_forked() {
            return;
        }
        let (slabs, refused) = {
            let mut state = self.core.state.lock();
            state.is_stopped = true;
            (std::mem::take(&mut state.slabs), std::mem::take(&mut state.refused))
        };
        self.core.changed.notify_all();
        let going = slabs.into_values().map(|slab| (slab.memory, slab.lent));
        for (memory, lent) in going.chain(refused.into_iter().map(|going| (going.memory, going.lent))) {
            drop(memory);
            self.core.return_lent(lent);
        }
    }
}

impl Slab {
    /// Marks a part as somebody's. True: nobody had it before.
    fn touch(&mut self, part: Part) -> bool {
        self.empty_since = None;
        let mut is_fresh = true;
        for touched in self.touched.iter_mut().skip(index_of(part.first_page)).take(index_of(part.pages())) {
            is_fresh &= !std::mem::replace(touched, true);
        }
        is_fresh
    }
}

fn index_of(pages: u64) -> usize {
    usize::try_from(pages).unwrap_or(usize::MAX)
}

impl Core {
    fn is_forked(&self) -> bool {
        std::process::id() != self.process
    }

    fn check_process(&self) -> Result<(), MemoryError> {
        if !self.is_forked() {
            return Ok(());
        }
        let (device, opened_by) = (self.device.info().id, self.process);
        let source = DeviceError::Forked { device, opened_by, process: std::process::id() };
        Err(MemoryError::Device { doing: "allocate host memory", source })
    }

    const fn budget_pages(&self) -> u64 {
        self.budget.0 / PAGE_BYTES.0
    }

    fn free(&self, state: &State) -> ByteCount {
        let gone = state.taken_pages() + state.refused_pages();
        ByteCount(self.budget_pages().saturating_sub(gone) * PAGE_BYTES.0)
    }

    fn no_room(&self, state: &State, needed: ByteCount) -> MemoryError {
        MemoryError::HostBudget { needed, free: self.free(state), budget: self.budget }
    }

    /// A part of this length; makes a slab, or room, where there is none.
    fn obtain(
        self: &Arc<Self>,
        order: Order,
        bytes: ByteCount,
        deadline: Instant,
    ) -> Result<Part, MemoryError> {
        let start = Instant::now();
        self.ask_again();
        let mut state = self.state.lock();
        loop {
            if ByteCount(PAGE_BYTES.0 << order) > self.free(&state) {
                return Err(self.no_room(&state, bytes));
            }
            if let Some(part) = state.space.take(order) {
                state.expected_pages = state.expected_pages.saturating_sub(part.pages());
                self.call_keeper(state);
                return Ok(part);
            }
            if Instant::now() >= deadline {
                let doing = "making host memory";
                return Err(MemoryError::Deadline { doing, waited: start.elapsed() });
            }
            if state.is_making {
                self.changed.wait_until(&mut state, deadline);
                continue;
            }
            state.is_making = true;
            let made = MutexGuard::unlocked(&mut state, || self.make_room(order, bytes));
            state.is_making = false;
            self.changed.notify_all();
            made?;
        }
    }

    /// Waits until a slab is page-locked or will not be; does it itself if nobody is at it.
    fn wait_locked(&self, slab: SlabId, deadline: Instant) {
        let mut state = self.state.lock();
        loop {
            let Some(entry) = state.slabs.get_mut(&slab) else { return };
            match entry.lock {
                Lock::Done | Lock::Refused => return,
                Lock::Wanted => {
                    entry.lock = Lock::UnderWay;
                    drop(state);
                    return self.lock_slab(slab);
                }
                Lock::UnderWay => {}
            }
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                // It is used as it is: copies are slower, and right.
                return;
            }
        }
    }

    /// Page-locks a slab whose lock is marked as under way.
    fn lock_slab(&self, slab: SlabId) {
        let memory = self.state.lock().slabs.get(&slab).map(|entry| Arc::clone(&entry.memory));
        let Some(memory) = memory else { return };
        let lock = self.lock_memory(&memory);
        if let Some(entry) = self.state.lock().slabs.get_mut(&slab) {
            entry.lock = lock;
        }
        self.changed.notify_all();
    }

    fn lock_memory(&self, memory: &HostSlab) -> Lock {
        let Err(error) = memory.lock() else { return Lock::Done };
        let reason = format!("copies are slower, because memory is not page-locked: {error}");
        self.state.lock().give_reason(reason);
        Lock::Refused
    }
}
