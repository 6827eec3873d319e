//! Moving blocks so that memory can go back.
//!
//! Apart because it is the one thing a cache does to blocks that somebody owns. It is asked for, never done by itself: who
//! owns blocks keeps their numbers in tables, and has to change them. The moves say how. While blocks are copied no step
//! runs (the gate is had alone, I13) and nothing is evicted (the turn is held); their owners may give them back meanwhile.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::kv::compact::BlockMove;
use shoal_core::kv::state::{KvError, KvState};

use super::KvCache;
use crate::error::MemoryError;
use crate::gate::Scope;

/// Granules that one compaction gives up for shorter ones, at most.
const REPACKS_MAX: usize = 64;

impl KvCache {
    /// Moves of a group's blocks that would empty granules, at most `moves_max`: for an engine that copies by itself and
    /// then says [`moved`](Self::moved). Nothing is changed. None while a [`Loading`](super::Loading) has blocks.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] if there is no such group.
    pub fn plan_compaction(&self, group: usize, moves_max: usize) -> Result<Vec<BlockMove>, MemoryError> {
        let moves = self.shared.state.lock().plan_compaction(group, moves_max)?;
        Ok(if self.is_loading() { Vec::new() } else { moves })
    }

    /// Moves blocks so that memory can go back: out of the emptiest granules into the fullest, and out of what is still
    /// mostly empty then into shorter granules, which are mapped for it. Waits until no step runs, copies on the device, and
    /// renumbers. From then on what was in `from` is in `to`, with its owners and its place in the index; look each number of
    /// each table up once among the answer, before anything else is asked of the cache or launched. The memory goes back as
    /// always. Nothing moves while a [`Loading`](super::Loading) is under way, or was not taken: its blocks are in no table yet.
    ///
    /// # Errors
    /// [`MemoryError::Deadline`], [`MemoryError::Device`], [`MemoryError::State`] while something of the cache is on the host,
    /// if that came before the first move; no block has moved then. What comes later ends it, and the answer says what has
    /// moved.
    pub fn compact(
        &self,
        group: usize,
        moves_max: usize,
        timeout: Duration,
    ) -> Result<Vec<BlockMove>, MemoryError> {
        if self.is_loading() {
            return Ok(Vec::new());
        }
        let deadline = Instant::now() + timeout;
        let mut all = self.carry_out(group, deadline, |state| state.plan_compaction(group, moves_max))?;
        for _ in 0..REPACKS_MAX {
            let left = moves_max.saturating_sub(all.len());
            match self.repack(group, left, deadline) {
                Ok(moves) if moves.is_empty() => break,
                Ok(moves) => join(&mut all, moves),
                Err(error) if all.is_empty() => return Err(error),
                Err(error) => {
                    tracing::debug!(%error, "compaction ends early");
                    break;
                }
            }
        }
        self.shared.call();
        Ok(all)
    }

    fn repack(
        &self,
        group: usize,
        moves_max: usize,
        deadline: Instant,
    ) -> Result<Vec<BlockMove>, MemoryError> {
        if self.is_loading() {
            return Ok(Vec::new());
        }
        let Some(repack) = self.shared.map_repack(group, moves_max, deadline)? else { return Ok(Vec::new()) };
        self.carry_out(group, deadline, |state| state.repack_moves(&repack))
    }

    /// Copies and renumbers what `plan` says, while no step runs.
    fn carry_out(
        &self,
        group: usize,
        deadline: Instant,
        plan: impl FnOnce(&mut KvState) -> Result<Vec<BlockMove>, KvError>,
    ) -> Result<Vec<BlockMove>, MemoryError> {
        let region = &self.shared.region;
        let manager = region.manager();
        let waited = deadline.saturating_duration_since(Instant::now());
        let _gate = manager.take_gate(Scope::Region(region.id()), deadline, waited)?;
        let _turn = manager.take_turn(deadline)?;
        if !region.missing_bytes().is_zero() {
            return Err(region.refuse("compact", "something of it is on the host; enter a guard first"));
        }
        let (moves, copies, carried) = {
            let mut state = self.shared.state.lock();
            // Looked at under this lock: what is loaded from here on lies in none of these blocks.
            if self.is_loading() {
                return Ok(Vec::new());
            }
            let moves = plan(&mut state)?;
            state.begin_moves(group, &moves)?;
            let carried = self.shared.unfill_moved(group, &moves);
            let Some(layout) = state.layout().groups().get(group) else { return Ok(Vec::new()) };
            let pieces = moves.iter().flat_map(|planned| {
                let targets = layout.pieces(planned.to);
                layout.pieces(planned.from).zip(targets).map(|((from, bytes), (to, _))| (from, to, bytes))
            });
            let copies: Vec<(ByteCount, ByteCount, ByteCount)> = pieces.collect();
            (moves, copies, carried)
        };
        let done = region.copy_within(&copies, deadline.saturating_duration_since(Instant::now()));
        if done.is_err() {
            // The targets are not given to others while something may still be written to them.
            manager.settle();
        }
        self.shared.state.lock().end_moves(group, &moves, done.is_ok())?;
        done?;
        self.shared.moved_with(group, carried);
        Ok(moves)
    }

    /// Says that an engine has copied blocks as these moves say: from now on what was in `from` is in `to`.
    ///
    /// # Errors
    /// [`MemoryError::Kv`] where a `from` holds nothing or a `to` is not free, [`MemoryError::State`] while a
    /// [`Loading`](super::Loading) has blocks; nothing is changed.
    pub fn moved(&self, group: usize, moves: &[BlockMove]) -> Result<(), MemoryError> {
        let mut state = self.shared.state.lock();
        if self.is_loading() {
            return Err(self
                .shared
                .region
                .refuse("move blocks", "a load from a tier has some; take it first"));
        }
        state.begin_moves(group, moves)?;
        let carried = self.shared.unfill_moved(group, moves);
        state.end_moves(group, moves, true)?;
        self.shared.moved_with(group, carried);
        drop(state);
        self.shared.call();
        Ok(())
    }

    fn is_loading(&self) -> bool {
        self.shared.loads.load(Ordering::SeqCst) > 0
    }
}

/// Adds moves that came after others: a block that moved twice has moved once, further.
fn join(all: &mut Vec<BlockMove>, later: Vec<BlockMove>) {
    let mut places: HashMap<u32, usize> =
        all.iter().enumerate().map(|(at, earlier)| (earlier.to, at)).collect();
    for moved in later {
        match places.remove(&moved.from) {
            Some(at) => all[at].to = moved.to,
            None => all.push(moved),
        }
    }
}
