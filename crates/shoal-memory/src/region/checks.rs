//! What is believed to be clean, compared with its recorded checksum just before it leaves.
//!
//! Apart from [`super::evict`], which compares everything before anything moves: where each extent that turns out to be
//! written has room on the host, the room of its stale copy, nothing depends on knowing all of them first. So the first copy
//! begins after the hash of one extent, and the others are hashed while it runs, a few ahead of the one that leaves next.

use std::collections::VecDeque;
use std::time::Duration;

use shoal_core::ids::ExtentIndex;
use shoal_core::page_table::{Backing, PlannedMove};
use shoal_core::residency::Move;
use shoal_core::tier::Tier;
use shoal_device::{HashTicket, Span};

use super::Region;
use crate::error::MemoryError;

/// Hashes that are asked for before their extents' turn.
const AHEAD_MAX: usize = 8;

/// What is known of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checked {
    /// Its hash is not there yet.
    Pending,
    /// It is what was recorded, or there is nothing to compare.
    Clean,
    /// It was written since: the device holds its only valid copy.
    Written,
}

/// See the module's text. Needs the gate alone and the turn from beginning to end, and what steps queued to be done.
#[derive(Debug)]
pub(crate) struct Checks<'a> {
    region: &'a Region,
    left: VecDeque<ExtentIndex>,
    asked: VecDeque<(ExtentIndex, HashTicket)>,
}

impl<'a> Checks<'a> {
    /// For extents in the order in which they leave.
    pub(crate) fn new(region: &'a Region, extents: Vec<ExtentIndex>) -> Self {
        Self { region, left: extents.into(), asked: VecDeque::new() }
    }

    /// What is known of the extent that leaves next. Waits at most `patience` for its hash.
    pub(crate) fn next(&mut self, index: ExtentIndex, patience: Duration) -> Result<Checked, MemoryError> {
        self.ask_ahead()?;
        let Some((_, ticket)) = self.asked.front().filter(|(asked, _)| *asked == index) else {
            return Ok(Checked::Clean);
        };
        let failed = MemoryError::device("hash device memory");
        let hash = if patience.is_zero() {
            match ticket.try_get().map_err(failed)? {
                None => return Ok(Checked::Pending),
                Some(hash) => hash,
            }
        } else {
            ticket.wait(patience).map_err(failed)?
        };
        self.asked.pop_front();
        let is_written = self.region.settle_hash(index, hash)?;
        Ok(if is_written { Checked::Written } else { Checked::Clean })
    }

    fn ask_ahead(&mut self) -> Result<(), MemoryError> {
        let manager = self.region.manager();
        while self.asked.len() < AHEAD_MAX {
            let Some(index) = self.left.front().copied() else { return Ok(()) };
            let mapping = self.region.inner.state.lock().mapping(index);
            if let Some(mapping) = mapping {
                // Not behind the copies, which have the other streams.
                let ticket = manager.beside().hash(Span::mapping(&mapping));
                self.asked.push_back((index, ticket.map_err(MemoryError::device("hash device memory"))?));
            }
            self.left.pop_front();
        }
        Ok(())
    }
}

impl Region {
    /// Which of these moves drop something whose recorded checksum can be compared as it leaves; `None` where one of them
    /// has no copy on the host whose room it could have.
    pub(crate) fn checked_as_they_leave(&self, moves: &[PlannedMove]) -> Option<Vec<ExtentIndex>> {
        let state = self.inner.state.lock();
        if self.backing() == Backing::Discard || !state.sealed {
            return Some(Vec::new());
        }
        let dropped = moves.iter().filter(|planned| planned.step == Move::Drop);
        let on_host = |planned: &PlannedMove| {
            let (_, residency) = state.table.extent(planned.extent).ok()?;
            residency.valid().has(Tier::Host).then_some(planned.extent)
        };
        dropped.map(on_host).collect()
    }

    /// Says what an extent's hash is now. Where it is not the recorded one, the device copy is the only valid one from now
    /// on; whether that is so.
    pub(super) fn settle_hash(&self, index: ExtentIndex, hash: u64) -> Result<bool, MemoryError> {
        let stale = {
            let mut state = self.inner.state.lock();
            if state.slot(index).hash == Some(hash) {
                return Ok(false);
            }
            tracing::info!(region = self.name(), %index, "written since it was sealed");
            state.table.written(index).map_err(self.table_error())?;
            let slot = state.slot(index);
            slot.hash = Some(hash);
            match slot.host.take() {
                // Its next copy is made in the same place, so that whoever asked where the copy lies finds it there.
                Some(old) if self.stays() => slot.unfinished.replace(old),
                old => old,
            }
        };
        drop(stale);
        Ok(true)
    }
}
