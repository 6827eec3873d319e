//! The thread that does what nobody should wait for: it page-locks slabs, makes slabs ahead of use, and gives back those
//! that have been empty for long.
//!
//! Apart because nothing depends on it. It begins when there is work for it, sleeps without polling, and ends with the
//! arena, or when there is no slab left. Small arenas never start it. Each of its steps is one call of the device; it looks
//! whether it is still wanted between two of them.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use parking_lot::MutexGuard;
use shoal_core::ids::SlabId;
use shoal_core::slabs::Order;

use super::make::has_ram_for;
use super::{Core, Lock, State};

/// What the keeper does next.
#[derive(Debug, PartialEq, Eq)]
enum Task {
    Lock(SlabId),
    /// Makes a slab, and locks another one meanwhile: touching memory and pinning it wait for different things.
    Make(Order, Option<SlabId>),
    GiveBack(Vec<SlabId>),
    /// Nothing before this time, if ever, unless something changes.
    Wait(Option<Instant>),
    End,
}

impl Core {
    /// Starts the keeper if there is work for it and it is not there; else lets it look.
    pub(super) fn call_keeper(self: &Arc<Self>, mut state: MutexGuard<'_, State>) {
        if state.has_keeper {
            drop(state);
            self.changed.notify_all();
            return;
        }
        let is_large = (state.space.pages() + state.expected_pages) >> self.steps.keeper_min > 0;
        if !is_large || state.is_stopped {
            return;
        }
        state.has_keeper = true;
        drop(state);
        let core = Arc::clone(self);
        let spawned = thread::Builder::new().name("shoal-arena".to_owned()).spawn(move || core.keep());
        if let Err(error) = spawned {
            let mut state = self.state.lock();
            state.has_keeper = false;
            state.give_reason(format!("memory is not made ahead of use: no thread can be started: {error}"));
        }
    }

    fn keep(self: Arc<Self>) {
        let mut state = self.state.lock();
        loop {
            let task = self.next_task(&mut state, Instant::now());
            match task {
                Task::Lock(slab) => MutexGuard::unlocked(&mut state, || self.lock_slab(slab)),
                Task::Make(order, lock) => {
                    let made = MutexGuard::unlocked(&mut state, || self.make_and_lock(order, lock));
                    state.is_making = false;
                    if !made {
                        state.expected_pages = 0;
                    }
                    self.changed.notify_all();
                }
                Task::GiveBack(slabs) => {
                    MutexGuard::unlocked(&mut state, || self.give_slabs_back(&slabs));
                    self.changed.notify_all();
                }
                Task::Wait(Some(until)) => {
                    self.changed.wait_until(&mut state, until);
                }
                Task::Wait(None) => self.changed.wait(&mut state),
                Task::End => {
                    state.has_keeper = false;
                    return;
                }
            }
        }
    }

    fn next_task(&self, state: &mut State, now: Instant) -> Task {
        if state.is_stopped || (state.slabs.is_empty() && state.expected_pages == 0) {
            return Task::End;
        }
        let wanted = state.slabs.iter_mut().find(|(_, slab)| slab.lock == Lock::Wanted);
        let wanted = wanted.map(|(id, slab)| {
            slab.lock = Lock::UnderWay;
            *id
        });
        let missing = state.expected_pages.saturating_sub(state.space.free_pages());
        let possible = missing.min(state.left_pages(self.budget_pages()));
        // Too little is not worth a slab ahead.
        if possible >> self.steps.keeper_min > 0 && !state.is_making {
            state.is_making = true;
            // While there is nothing to take, somebody may wait for the first.
            let is_first = state.space.free_pages() == 0;
            let longest = if is_first { self.steps.first_ahead() } else { self.steps.ahead_max };
            return Task::Make(possible.ilog2().min(longest), wanted);
        }
        if let Some(id) = wanted {
            return Task::Lock(id);
        }
        if possible >> self.steps.keeper_min > 0 {
            return Task::Wait(None);
        }
        let at_rest = state.slabs.iter().filter(|(_, slab)| slab.lock != Lock::UnderWay);
        let times = at_rest.filter_map(|(id, slab)| Some((*id, slab.empty_since? + self.steps.idle)));
        let times: Vec<(SlabId, Instant)> = times.collect();
        let idle: Vec<SlabId> = times.iter().filter(|(_, at)| *at <= now).map(|(id, _)| *id).collect();
        if !idle.is_empty() {
            // What was expected did not come.
            state.expected_pages = 0;
            for id in &idle {
                if let Some(slab) = state.slabs.get_mut(id) {
                    slab.empty_since = None;
                }
            }
            return Task::GiveBack(idle);
        }
        Task::Wait(times.into_iter().map(|(_, at)| at).min())
    }

    fn make_and_lock(self: &Arc<Self>, order: Order, lock: Option<SlabId>) -> bool {
        let Some(slab) = lock else { return self.make_ahead(order) };
        thread::scope(|scope| {
            let name = "shoal-lock".to_owned();
            if thread::Builder::new().name(name).spawn_scoped(scope, || self.lock_slab(slab)).is_err() {
                self.lock_slab(slab);
            }
            self.make_ahead(order)
        })
    }

    /// Makes a slab that nobody waits for. False: no more of them.
    fn make_ahead(self: &Arc<Self>, order: Order) -> bool {
        if !has_ram_for(order) {
            let reason = "memory is not made ahead of use: too little is left on this machine";
            self.state.lock().give_reason(reason.to_owned());
            return false;
        }
        self.make_slab(order, true).is_ok()
    }
}
