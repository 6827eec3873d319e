//! The memory of one copy.
//!
//! Apart because it has two ends: the copy is dropped by whoever needs it no more, and its part is free when the last job
//! that touches it is done, which may be later and on another thread (I5). And because it can move: while nobody but the
//! copy itself holds the buffer, its bytes may be put elsewhere to make room for a longer part.

use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::slabs::{Part, PartMove};
use shoal_device::{HostBuffer, HostSlab};

use super::{Core, HostArena};
use crate::error::MemoryError;

/// A part that is somebody's. Dropping it makes the part free.
#[derive(Debug)]
pub(crate) struct Claim {
    core: Arc<Core>,
    part: Part,
}

impl Claim {
    pub(super) fn new(core: &Arc<Core>, part: Part) -> Self {
        Self { core: Arc::clone(core), part }
    }

    pub(super) const fn part(&self) -> Part {
        self.part
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.core.is_forked() {
            return;
        }
        {
            let mut state = self.core.state.lock();
            state.space.give(self.part);
            state.copies.remove(&self.part);
            if state.space.is_empty(self.part.slab)
                && let Some(slab) = state.slabs.get_mut(&self.part.slab)
            {
                slab.empty_since = Some(Instant::now());
            }
        }
        self.core.changed.notify_all();
    }
}

/// Where a copy lies now.
#[derive(Debug)]
pub(crate) struct Place {
    buffer: Mutex<Arc<HostBuffer>>,
}

impl Place {
    /// True if nobody but the copy holds its buffer, so that it may move.
    pub(super) fn is_idle(&self) -> bool {
        self.buffer.try_lock().is_some_and(|buffer| Arc::strong_count(&buffer) == 1)
    }
}

/// Host memory of one copy of one extent; dropping it gives the memory back to the arena.
#[derive(Debug)]
pub(crate) struct HostCopy {
    arena: Arc<HostArena>,
    place: Arc<Place>,
    bytes: ByteCount,
}

impl HostCopy {
    pub(super) fn new(
        arena: &Arc<HostArena>,
        memory: &Arc<HostSlab>,
        claim: Claim,
        bytes: ByteCount,
    ) -> Result<Self, MemoryError> {
        let part = claim.part();
        let buffer = memory
            .buffer(part.offset(), bytes, claim)
            .map_err(MemoryError::device("take a part of host memory"))?;
        let place = Arc::new(Place { buffer: Mutex::new(buffer) });
        let mut state = arena.core.state.lock();
        state.used += bytes;
        state.copies.insert(part, Arc::downgrade(&place));
        drop(state);
        Ok(Self { arena: Arc::clone(arena), place, bytes })
    }

    /// Whether nobody holds its bytes.
    pub(crate) fn is_idle(&self) -> bool {
        self.place.is_idle()
    }

    /// Its bytes. Whoever holds this keeps them where they are.
    pub(crate) fn buffer(&self) -> Arc<HostBuffer> {
        Arc::clone(&self.place.buffer.lock())
    }
}

impl Drop for HostCopy {
    fn drop(&mut self) {
        if !self.arena.core.is_forked() {
            self.arena.core.state.lock().used -= self.bytes;
        }
    }
}

impl Core {
    /// Moves one copy. False: somebody took hold of it, or its place, meanwhile; all is as it was.
    pub(super) fn relocate(self: &Arc<Self>, PartMove { from, to }: PartMove) -> bool {
        // Never dropped under the state's lock: it may be the last one, and then its claim takes that lock.
        let place = self.state.lock().copies.get(&from).and_then(Weak::upgrade);
        let Some(place) = place else { return false };
        if !self.state.lock().space.take_at(to) {
            return false;
        }
        let claim = Claim::new(self, to);
        let memory = {
            let mut state = self.state.lock();
            let slab = state.slabs.get_mut(&to.slab);
            slab.map(|slab| {
                slab.touch(to);
                Arc::clone(&slab.memory)
            })
        };
        let Some(memory) = memory else { return false };
        // Without this lock nobody can get hold of the buffer, so it stays idle until it is let go.
        let mut held = place.buffer.lock();
        if Arc::strong_count(&held) != 1 {
            return false;
        }
        let bytes = held.bytes();
        let Ok(new) = memory.buffer(to.offset(), bytes, claim) else { return false };
        let copy =
            |source: &[u8]| new.access_mut(ByteCount::ZERO, bytes, |target| target.copy_from_slice(source));
        if !matches!(held.access(ByteCount::ZERO, bytes, copy), Ok(Ok(()))) {
            return false;
        }
        let old = std::mem::replace(&mut *held, new);
        drop(held);
        self.state.lock().copies.insert(to, Arc::downgrade(&place));
        // Its claim goes with it, and the part is free.
        drop(old);
        true
    }
}
