//! Moving blocks in a cache: begun, copied by somebody, ended.
//!
//! Apart from the plan ([`super::compact`]) because between beginning and end others go on: the owners of a block that moves
//! may give it back, and others may find it. While it moves it has one owner more, so its place is nobody else's.

use super::compact::{self, BlockMove};
use super::state::{KvError, KvState};

impl KvState {
    /// Moves of a group's blocks that empty granules, at most `moves_max`.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`].
    pub fn plan_compaction(&self, group: usize, moves_max: usize) -> Result<Vec<BlockMove>, KvError> {
        Ok(compact::plan(self.pool(group)?, moves_max))
    }

    /// Begins moves: the targets are taken, and the sources stay whatever their owners do meanwhile. All or none.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`], [`KvError::Blocks`]; nothing is changed.
    pub fn begin_moves(&mut self, group: usize, moves: &[BlockMove]) -> Result<(), KvError> {
        for (at, planned) in moves.iter().enumerate() {
            let pool = &mut self.group_mut(group)?.pool;
            let shared = pool.share(planned.from);
            let taken = shared.and_then(|_| pool.take(planned.to));
            let Err(error) = taken else { continue };
            if shared.is_ok() {
                self.free(group, &[planned.from])?;
            }
            self.end_moves(group, &moves[..at], false)?;
            return Err(error.into());
        }
        Ok(())
    }

    /// Ends moves that were begun: with `is_done` the targets hold what the sources held and are what they were, and the
    /// sources are free; without, all is as before. What nobody owns any more is free or cached then.
    ///
    /// # Errors
    /// [`KvError::UnknownGroup`], [`KvError::Blocks`] for moves that were not begun.
    pub fn end_moves(&mut self, group: usize, moves: &[BlockMove], is_done: bool) -> Result<(), KvError> {
        for planned in moves {
            if is_done {
                let pool = &mut self.group_mut(group)?.pool;
                let is_sealed = pool.is_sealed(planned.from);
                pool.renumber(planned.from, planned.to)?;
                if is_sealed {
                    self.renumbered(group, *planned)?;
                }
                self.free(group, &[planned.to])?;
            } else {
                self.free(group, &[planned.to])?;
                self.free(group, &[planned.from])?;
            }
        }
        Ok(())
    }
}
