//! A gate that many may share or one may have alone, for all regions or for one, with deadlines (I13, I10).
//!
//! Apart because a pass is held across calls of a foreign language and given back on another thread, which the usual
//! locks forbid. Nobody is starved: who wants it alone keeps newcomers out, and when one who had it alone leaves, those
//! who wait to share it come in before the next one who wants it alone.
//!
//! Why this cannot lock up: who has the gate alone waits for no pass and no lease, only for the turn, so it leaves by
//! itself. A thread that shares the gate already never waits for one who waits for it to leave. And who comes first
//! ([`Gate::share_first`]) has its leases, and so needs nothing that somebody behind the gate would have to give up.
//!
//! Its locks come from [`crate::sync`], so that `tests/gate_model.rs` can put loom's in their place and try every order in
//! which threads may meet here.

use std::sync::Arc;
use std::time::Instant;

use shoal_core::ids::RegionId;

use crate::sync::{Condvar, Mutex, MutexGuard, ThreadId, this_thread};

/// What a pass speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    All,
    Region(RegionId),
    Pair(RegionId, RegionId),
}

impl Scope {
    pub(crate) fn has(self, id: RegionId) -> bool {
        match self {
            Self::All => true,
            Self::Region(one) => one == id,
            Self::Pair(one, other) => one == id || other == id,
        }
    }

    fn covers(self, other: Self) -> bool {
        match other {
            Self::All => self == Self::All,
            Self::Region(id) => self.has(id),
            Self::Pair(one, two) => self.has(one) && self.has(two),
        }
    }

    fn meets(self, other: Self) -> bool {
        match self {
            Self::All => true,
            Self::Region(id) => other.has(id),
            Self::Pair(one, two) => other.has(one) || other.has(two),
        }
    }
}

#[derive(Debug)]
struct Sharing {
    ticket: u64,
    scope: Scope,
    thread: ThreadId,
}

#[derive(Debug)]
struct Waiting {
    ticket: u64,
    scope: Scope,
    /// Whoever had the gate alone has left since it waits: the next one who wants it alone comes after it.
    is_next: bool,
}

#[derive(Clone, Debug)]
struct Alone {
    scope: Scope,
    /// Regions that may be shared all the same, because they were when it came in.
    spared: Vec<RegionId>,
}

impl Alone {
    fn meets(&self, scope: Scope) -> bool {
        self.scope.meets(scope) && !matches!(scope, Scope::Region(id) if self.spared.contains(&id))
    }
}

#[derive(Clone, Copy, Debug)]
struct Wanted {
    ticket: u64,
    scope: Scope,
    /// Regions that are shared are not asked for.
    spares: bool,
}

impl Wanted {
    fn meets(self, scope: Scope) -> bool {
        self.scope.meets(scope) && !(self.spares && scope != Scope::All)
    }
}

#[derive(Debug, Default)]
struct State {
    tickets: u64,
    sharing: Vec<Sharing>,
    waiting: Vec<Waiting>,
    alone: Option<Alone>,
    wanted: Vec<Wanted>,
}

impl State {
    fn ticket(&mut self) -> u64 {
        self.tickets += 1;
        self.tickets
    }

    fn may_share(&self, ticket: u64, scope: Scope, thread: ThreadId) -> bool {
        let held = |sharing: &&Sharing| sharing.thread == thread;
        if self.sharing.iter().filter(held).any(|sharing| sharing.scope.covers(scope)) {
            return true;
        }
        if self.alone.as_ref().is_some_and(|alone| alone.meets(scope)) {
            return false;
        }
        self.sharing.iter().any(|sharing| held(&sharing))
            || self.waiting.iter().any(|waiting| waiting.ticket == ticket && waiting.is_next)
            || !self.wanted.iter().any(|wanted| wanted.meets(scope))
    }

    fn may_be_alone(&self, wanted: Wanted) -> bool {
        self.alone.is_none()
            && !self.sharing.iter().any(|sharing| wanted.meets(sharing.scope))
            && !self.waiting.iter().any(|waiting| waiting.is_next && wanted.scope.meets(waiting.scope))
    }
}

/// See the module's text.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

/// A pass through a [`Gate`]; dropping it leaves.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Arc<Gate>,
    /// `None`: it has the gate alone.
    sharing: Option<u64>,
}

impl Gate {
    /// Whether a pass that this thread took is held.
    pub(crate) fn is_held_here(&self) -> bool {
        let thread = this_thread();
        self.state.lock().sharing.iter().any(|sharing| sharing.thread == thread)
    }

    /// Shares the gate; `None` if the deadline passes first. A thread that shares it already does not wait for those
    /// who wait for it.
    pub(crate) fn share(self: &Arc<Self>, scope: Scope, deadline: Instant) -> Option<Pass> {
        self.share_as(scope, false, deadline)
    }

    /// Shares the gate ahead of all who wait to have it alone.
    pub(crate) fn share_first(self: &Arc<Self>, scope: Scope, deadline: Instant) -> Option<Pass> {
        self.share_as(scope, true, deadline)
    }

    fn share_as(self: &Arc<Self>, scope: Scope, is_next: bool, deadline: Instant) -> Option<Pass> {
        let thread = this_thread();
        let mut state = self.state.lock();
        let ticket = state.ticket();
        state.waiting.push(Waiting { ticket, scope, is_next });
        let came_in = self.wait(&mut state, deadline, |state| state.may_share(ticket, scope, thread));
        state.waiting.retain(|waiting| waiting.ticket != ticket);
        if came_in {
            state.sharing.push(Sharing { ticket, scope, thread });
        }
        drop(state);
        // Those who want it alone wait for those who are next.
        self.changed.notify_all();
        came_in.then(|| Pass { gate: Arc::clone(self), sharing: Some(ticket) })
    }

    /// Whether somebody shares it at this moment.
    pub(crate) fn is_shared(&self) -> bool {
        !self.state.lock().sharing.is_empty()
    }

    /// How many share it, wait to share it, and want it alone.
    #[cfg(test)]
    pub(crate) fn counts(&self) -> (usize, usize, usize) {
        let state = self.state.lock();
        (state.sharing.len(), state.waiting.len(), state.wanted.len())
    }

    /// Takes the gate alone; `None` if the deadline passes first.
    pub(crate) fn alone(self: &Arc<Self>, scope: Scope, deadline: Instant) -> Option<Pass> {
        self.alone_as(scope, false, deadline).map(|(pass, _)| pass)
    }

    /// Takes the gate alone but for the regions that others share one by one: waits only for those who share it for all
    /// regions. Says which regions are not had.
    pub(crate) fn alone_sparing(self: &Arc<Self>, deadline: Instant) -> Option<(Pass, Vec<RegionId>)> {
        self.alone_as(Scope::All, true, deadline)
    }

    fn alone_as(
        self: &Arc<Self>,
        scope: Scope,
        spares: bool,
        deadline: Instant,
    ) -> Option<(Pass, Vec<RegionId>)> {
        let mut state = self.state.lock();
        let ticket = state.ticket();
        let wanted = Wanted { ticket, scope, spares };
        state.wanted.push(wanted);
        let came_in = self.wait(&mut state, deadline, |state| state.may_be_alone(wanted));
        state.wanted.retain(|wanted| wanted.ticket != ticket);
        if !came_in {
            drop(state);
            self.changed.notify_all();
            return None;
        }
        let mut not_had: Vec<RegionId> = Vec::new();
        for sharing in state.sharing.iter().filter(|_| spares) {
            if let Scope::Region(id) = sharing.scope
                && !not_had.contains(&id)
            {
                not_had.push(id);
            }
        }
        state.alone = Some(Alone { scope, spared: not_had.clone() });
        Some((Pass { gate: Arc::clone(self), sharing: None }, not_had))
    }

    fn wait(
        &self,
        state: &mut MutexGuard<'_, State>,
        deadline: Instant,
        is_free: impl Fn(&State) -> bool,
    ) -> bool {
        while !is_free(state) {
            if self.changed.wait_until(state, deadline).timed_out() {
                return is_free(state);
            }
        }
        true
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        let mut state = self.gate.state.lock();
        if let Some(ticket) = self.sharing {
            state.sharing.retain(|sharing| sharing.ticket != ticket);
        } else {
            state.alone = None;
            for waiting in &mut state.waiting {
                waiting.is_next = true;
            }
        }
        drop(state);
        self.gate.changed.notify_all();
    }
}
