//! How blocks come from a tier to the device.
//!
//! Apart because there are two ways. What a tier has in page-locked memory is copied from where it lies, a run of blocks as
//! one job, and verified meanwhile ([`Checks`]); none is given out that was not (I8). What it has to read is asked for ahead
//! and read to page-locked memory: the fastest tier's own where that wants to keep the block, or else memory of this
//! connection's ([`Landing`]). No way has a copy in between. The first miss, or the deadline, ends it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_device::HostBuffer;

use super::check::Checks;
use super::choice::Watch;
use super::landing::Landing;
use super::lift::Lift;
use super::load::Call;
use super::{Inner, STAGE_BYTES, blocks_ahead, count_miss};
use crate::error::MemoryError;
use crate::store::{Buffer, Fetched, Lent, Miss, StoreKey, Ticket};

/// How often whoever waits for a block looks whether anybody wants it still.
const LOOK: Duration = Duration::from_millis(5);

/// Blocks of one sequence on their way.
pub(super) struct Wanted<'a> {
    pub(super) call: &'a Call<'a>,
    /// The number of the first in the sequence.
    pub(super) first: usize,
    pub(super) keys: &'a [StoreKey],
    pub(super) ids: &'a [u32],
    pub(super) deadline: Instant,
}

/// What a load's time went to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shares {
    pub(super) lookup: Duration,
    pub(super) read: Duration,
    pub(super) copy: Duration,
    pub(super) verify: Duration,
}

impl Wanted<'_> {
    /// Whether nobody wants them any more.
    pub(super) fn is_over(&self) -> bool {
        (self.call.is_over)()
    }
}

/// Why no more blocks of a run come.
enum End {
    /// All have come.
    Whole,
    /// The next one is not what was put, where it was lent.
    Damaged(Miss),
    /// Nothing more comes; counted.
    Over { is_late: bool },
}

/// Memory that a block is read to.
struct Asked {
    ticket: Ticket<Fetched>,
    /// To be given back to the connection's own memory.
    landing: Option<Arc<HostBuffer>>,
}

/// A block that has been read.
struct Arrived {
    memory: Buffer,
    landing: Option<Arc<HostBuffer>>,
}

/// From a block on: whether it is copied from where it lies, and where the run of such blocks ends. A row of lent blocks is
/// worth an end of the reads that are under way only from `row_min` on: shorter ones are read like the others.
fn run_from(is_lent: impl Fn(usize) -> bool, blocks: usize, from: usize, row_min: usize) -> (bool, usize) {
    if is_lent(from) {
        let end = (from..blocks).find(|at| !is_lent(*at)).unwrap_or(blocks);
        return (true, end);
    }
    let mut row = 0;
    for at in from..blocks {
        row = if is_lent(at) { row + 1 } else { 0 };
        if row == row_min {
            return (false, at + 1 - row);
        }
    }
    (false, blocks)
}

impl Inner {
    /// Brings blocks to the device; how many in a row are there.
    pub(super) fn bring(&self, wanted: &Wanted<'_>, mut watch: Watch, shares: &mut Shares) -> usize {
        let begun = Instant::now();
        let mut lent = self.lent(wanted.keys);
        shares.lookup += begun.elapsed();
        let (mut loaded, mut damage, mut is_late) = (0, None, false);
        while loaded < wanted.keys.len() && !wanted.is_over() {
            let row_min = blocks_ahead(self.payload_bytes);
            let (is_lent, end) = run_from(|at| lent[at].is_some(), lent.len(), loaded, row_min);
            let (blocks, why) = if is_lent {
                let run: Vec<&Lent<'_>> = lent[loaded..end].iter().flatten().collect();
                let came = self.copy_lent(wanted, loaded, &run, shares);
                self.have_arrived(&mut watch, came.0);
                // What is copied may make room for what comes.
                lent[loaded..loaded + came.0].fill_with(|| None);
                came
            } else {
                self.read(wanted, loaded..end, &mut watch, shares, &mut damage)
            };
            loaded += blocks;
            match why {
                End::Whole => {}
                End::Damaged(miss) => {
                    // Where it lay it is dropped; a slower tier may have it.
                    lent[loaded] = None;
                    damage = Some((loaded, miss));
                }
                End::Over { is_late: late } => {
                    is_late = late;
                    break;
                }
            }
        }
        self.have_ended(watch, is_late);
        loaded
    }

    /// Blocks where they lie, if the device can copy them from there.
    fn lent(&self, keys: &[StoreKey]) -> Vec<Option<Lent<'_>>> {
        let device = self.cache.region().manager().device();
        let is_usable = |lent: &Lent<'_>| {
            let buffer = lent.buffer();
            let bytes = lent.as_slice().len();
            bytes == self.payload_bytes && buffer.is_locked() && Arc::ptr_eq(buffer.device(), device)
        };
        let mut lent = self.store.lend_each(keys);
        for one in &mut lent {
            *one = one.take().filter(is_usable);
        }
        lent
    }

    /// Copies blocks from where they lie, and has them verified meanwhile.
    fn copy_lent(
        &self,
        wanted: &Wanted<'_>,
        from: usize,
        run: &[&Lent<'_>],
        shares: &mut Shares,
    ) -> (usize, End) {
        let begun = Instant::now();
        let right = |at: usize| {
            run[at].verify()?;
            if self.is_right(wanted, from + at, run[at].as_slice()) { Ok(()) } else { Err(Miss::Corrupt) }
        };
        let checks = Checks::new(run.len(), self.payload_bytes, right);
        let memory: Vec<_> = run.iter().map(|lent| (lent.buffer(), ByteCount::ZERO)).collect();
        let mut row = Lift::new(&wanted.ids[from..from + run.len()], &memory);
        let mut end = End::Whole;
        let mut copy = |is_alone| {
            // What verifies may be ahead of what copies: all before a bad one comes, and the bad one is told.
            while row.copied < checks.right_of(run.len()) {
                if wanted.is_over() {
                    end = End::Over { is_late: false };
                    break;
                }
                if Instant::now() >= wanted.deadline {
                    self.count(|counts| counts.late += 1);
                    end = End::Over { is_late: true };
                    break;
                }
                if !self.lift(
                    wanted,
                    &mut row,
                    || checks.right_of(run.len()),
                    || checks.step_between(is_alone),
                ) {
                    end = End::Over { is_late: false };
                    break;
                }
            }
            checks.end_at(row.copied);
            begun.elapsed()
        };
        let took = checks.beside(run.len() * self.payload_bytes, &mut copy);
        shares.copy += took;
        shares.verify += begun.elapsed().saturating_sub(took);
        let copied = row.copied;
        match (checks.bad(), end) {
            // Where the copies ended for another reason the next one is nobody's business.
            (Some((bad, _)), end @ End::Over { .. }) if bad == copied => (copied, end),
            (Some((bad, miss)), _) => (bad, End::Damaged(miss)),
            (None, end) => (copied, end),
        }
    }

    /// Has blocks read, and copies them to the device as they come.
    fn read(
        &self,
        wanted: &Wanted<'_>,
        run: std::ops::Range<usize>,
        watch: &mut Watch,
        shares: &mut Shares,
        damage: &mut Option<(usize, Miss)>,
    ) -> (usize, End) {
        let begun = Instant::now();
        let Some(mut landing) = self.up.try_lock_until(wanted.deadline) else {
            self.count(|counts| counts.late += 1);
            return (0, End::Over { is_late: false });
        };
        let at_once = (usize::try_from(STAGE_BYTES).unwrap_or(usize::MAX) / self.payload_bytes).max(1);
        let ahead = blocks_ahead(self.payload_bytes);
        let (mut asked, mut asked_end) = (run.start, run.end);
        let (mut loaded, mut copying) = (run.start, Duration::ZERO);
        let mut tickets: VecDeque<Asked> = VecDeque::new();
        let mut arrived: Vec<Arrived> = Vec::new();
        let mut end = End::Whole;
        loop {
            while asked < asked_end && tickets.len() + arrived.len() < ahead {
                match self.ask(&wanted.keys[asked], wanted.deadline, &mut landing) {
                    Ok(one) => {
                        tickets.push_back(one);
                        asked += 1;
                    }
                    Err(error) => {
                        tracing::warn!(%error, "no host memory for what a tier has");
                        self.count(|counts| counts.failed += 1);
                        end = End::Over { is_late: false };
                        asked_end = asked;
                    }
                }
            }
            let Some(Asked { ticket, landing: slot }) = tickets.pop_front() else { break };
            let block = loaded + arrived.len();
            match self.take(wanted, block, ticket) {
                Ok(memory) => arrived.push(Arrived { memory, landing: slot }),
                Err(miss) => {
                    landing.give_all(slot);
                    let miss = match damage.take() {
                        // Nobody else has it: what was found where it was lent is why.
                        Some((at, damage)) if at == block && miss == Miss::Absent => damage,
                        _ => miss,
                    };
                    tracing::debug!(%miss, "a block of a tier does not come");
                    end = End::Over { is_late: miss == Miss::Deadline };
                    if miss != Miss::Cancelled {
                        self.count(|counts| count_miss(counts, &miss));
                    }
                    break;
                }
            }
            if arrived.len() >= at_once {
                let since = Instant::now();
                let blocks = self.copy_arrived(wanted, loaded, &mut arrived, &mut landing);
                copying += since.elapsed();
                if blocks == 0 {
                    end = End::Over { is_late: false };
                    break;
                }
                self.have_arrived(watch, blocks);
                loaded += blocks;
            }
        }
        for Asked { ticket, landing: slot } in tickets {
            ticket.cancel();
            drop(ticket);
            landing.give_all(slot);
        }
        if !arrived.is_empty() {
            let since = Instant::now();
            let blocks = self.copy_arrived(wanted, loaded, &mut arrived, &mut landing);
            copying += since.elapsed();
            if blocks == 0 {
                end = End::Over { is_late: false };
            } else {
                self.have_arrived(watch, blocks);
                loaded += blocks;
            }
        }
        shares.copy += copying;
        shares.read += begun.elapsed().saturating_sub(copying);
        (loaded - run.start, end)
    }

    /// Asks for a block. It is read to where the fastest tier would keep it, if that lacks it.
    fn ask(&self, key: &StoreKey, deadline: Instant, landing: &mut Landing) -> Result<Asked, MemoryError> {
        let (target, slot) = if let Some(target) = self.kept_room(key) {
            (target, None)
        } else {
            let (slot, target) = landing.take()?;
            (target, Some(slot))
        };
        let left = deadline.saturating_duration_since(Instant::now());
        Ok(Asked { ticket: self.store.get(*key, target, left), landing: slot })
    }

    /// Memory of the fastest tier for a block that only slower ones have.
    pub(super) fn kept_room(&self, key: &StoreKey) -> Option<Buffer> {
        if !self.store.would_rise(key) {
            return None;
        }
        self.room().and_then(|room| room.view_mut(ByteCount::ZERO, room.bytes()).ok()).map(Buffer::HostMut)
    }

    /// Memory of a tier for a block, if the device's copies reach it.
    pub(super) fn room(&self) -> Option<Arc<HostBuffer>> {
        let device = self.cache.region().manager().device();
        let room = self.store.room(self.payload_bytes)?;
        (room.is_locked() && Arc::ptr_eq(room.device(), device)).then_some(room)
    }

    /// Waits for a block. It may be copied from where it is then.
    fn take(&self, wanted: &Wanted<'_>, block: usize, ticket: Ticket<Fetched>) -> Result<Buffer, Miss> {
        while !ticket.is_done_by(wanted.deadline.min(Instant::now() + LOOK)) {
            if wanted.is_over() {
                ticket.cancel();
                return Err(Miss::Cancelled);
            }
            if Instant::now() >= wanted.deadline {
                break;
            }
        }
        let fetched = ticket.wait()?;
        if self.is_right(wanted, block, fetched.as_slice()) {
            return Ok(fetched.buffer.shared());
        }
        // Another content of the same hash, or a program that puts other things.
        Err(Miss::Corrupt)
    }

    /// Whether what was read is that block of the sequence.
    fn is_right(&self, wanted: &Wanted<'_>, block: usize, read: &[u8]) -> bool {
        let trailer = self.trailer(wanted.call.tokens, wanted.first + block);
        read.len() == self.payload_bytes && read[self.block_bytes..].starts_with(&trailer)
    }

    /// Copies all that has arrived to the device, and waits for it: how many blocks, none where that fails.
    fn copy_arrived(
        &self,
        wanted: &Wanted<'_>,
        from: usize,
        arrived: &mut Vec<Arrived>,
        landing: &mut Landing,
    ) -> usize {
        let blocks = arrived.len();
        let views: Vec<_> = arrived
            .iter()
            .filter_map(|one| match &one.memory {
                Buffer::Host(view) => Some((view.buffer(), view.offset())),
                // No tier gives back other memory than it was given.
                _ => None,
            })
            .collect();
        let mut row = Lift::at_once(&wanted.ids[from..from + views.len()], &views);
        let mut is_going = views.len() == blocks;
        while is_going && row.copied < blocks {
            is_going = self.lift(wanted, &mut row, || blocks, || false);
        }
        drop(views);
        for Arrived { memory, landing: slot } in arrived.drain(..) {
            drop(memory);
            landing.give_all(slot);
        }
        if is_going { blocks } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_lent_blocks_are_runs_of_their_own_where_they_are_long() {
        let of = |lent: &str, from| run_from(|at| lent.as_bytes()[at] == b'x', lent.len(), from, 3);
        assert_eq!(of("xxxx", 0), (true, 4));
        assert_eq!(of("x...", 0), (true, 1));
        assert_eq!(of("x...", 1), (false, 4));
        assert_eq!(of("..xx..", 0), (false, 6), "two are read with the others");
        assert_eq!(of("..xxx.", 0), (false, 2));
        assert_eq!(of("..xxxxx.", 2), (true, 7));
        assert_eq!(of(".xx", 0), (false, 3));
        assert_eq!(of("....", 3), (false, 4));
    }
}
