//! Moving blocks so that memory can go back.
//!
//! Apart because it is the one thing a cache does to blocks that somebody owns. It is asked for, never done by itself: who
//! owns blocks keeps their numbers in tables, and has to change them. The moves say how. While blocks are copied no step
//! runs (the gate is had alone, I13) and nothing is evicted (the turn is held); their owners may give them back meanwhile.

use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::kv::compact::BlockMove;

use super::KvCache;
use crate::error::MemoryError;
use crate::gate::Scope;

impl KvCache {
    /// Moves of a group's blocks that would empty granules, at most `moves_max`: for an engine that copies by itself and
    /// then says [`moved`](Self::moved). Nothing is changed.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] if there is no such group.
    pub fn plan_compaction(&self, group: usize, moves_max: usize) -> Result<Vec<BlockMove>, MemoryError> {
        Ok(self.shared.state.lock().plan_compaction(group, moves_max)?)
    }

    /// Carries such a plan out: waits until no step runs, copies the blocks on the device, and renumbers them. From then on
    /// what was in `from` is in `to`, with its owners and its place in the index; write the new numbers into every table
    /// before anything else is asked of the cache or launched. The memory goes back as always.
    ///
    /// # Errors
    /// [`MemoryError::Deadline`], [`MemoryError::Device`], [`MemoryError::State`] while something of the cache is on the host;
    /// no block has moved.
    pub fn compact(
        &self,
        group: usize,
        moves_max: usize,
        timeout: Duration,
    ) -> Result<Vec<BlockMove>, MemoryError> {
        let (region, deadline) = (&self.shared.region, Instant::now() + timeout);
        let manager = region.manager();
        let _gate = manager.take_gate(Scope::Region(region.id()), deadline, timeout)?;
        let _turn = manager.take_turn(deadline)?;
        if !region.missing_bytes().is_zero() {
            return Err(region.refuse("compact", "something of it is on the host; enter a guard first"));
        }
        let (moves, copies) = {
            let mut state = self.shared.state.lock();
            let moves = state.plan_compaction(group, moves_max)?;
            state.begin_moves(group, &moves)?;
            let Some(layout) = state.layout().groups().get(group) else { return Ok(Vec::new()) };
            let pieces = moves.iter().flat_map(|planned| {
                let targets = layout.pieces(planned.to);
                layout.pieces(planned.from).zip(targets).map(|((from, bytes), (to, _))| (from, to, bytes))
            });
            let copies: Vec<(ByteCount, ByteCount, ByteCount)> = pieces.collect();
            (moves, copies)
        };
        let done = region.copy_within(&copies, deadline.saturating_duration_since(Instant::now()));
        if done.is_err() {
            // The targets are not given to others while something may still be written to them.
            manager.settle();
        }
        self.shared.state.lock().end_moves(group, &moves, done.is_ok())?;
        done?;
        self.shared.call();
        Ok(moves)
    }

    /// Says that an engine has copied blocks as these moves say: from now on what was in `from` is in `to`.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] where a `from` holds nothing or a `to` is not free; nothing is changed.
    pub fn moved(&self, group: usize, moves: &[BlockMove]) -> Result<(), MemoryError> {
        let mut state = self.shared.state.lock();
        state.begin_moves(group, moves)?;
        state.end_moves(group, moves, true)?;
        drop(state);
        self.shared.call();
        Ok(())
    }
}
