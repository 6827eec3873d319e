//! What the ledger says beside what the device's driver shows, and what follows from the difference.
//!
//! The ledger ([`crate::lease`]) counts what was promised. A device knows what is there: whoever takes memory without a
//! lease (another user's process, a library of a worker's that grew, a process that died and is not gone) is in no ledger,
//! and the next grant would promise bytes that do not exist. So the two are compared every second. Pure, so that the same
//! lines run in the server and against plain models: reading a driver is shoal-device's part (`gauge`).
//!
//! # What comes off the budget
//! With `free` bytes free on the device, leases can be met as long as their sum is at most `free` and what holders have
//! *within* their leases, less the headroom that is to stay free. What the budget exceeds that by is [`Comparison::taken`]:
//! memory of other processes, the driver's own, and of our holders what goes beyond their leases as far as the headroom
//! does not cover it.
//!
//! # Who has what
//! A holder's own bytes are what the driver shows of its processes, where it does. In containers it often shows none, or
//! names processes of another name space, or leaves the bytes out: then the holder's own figures stand in, and what others
//! have is told from the device's free memory alone.
//!
//! # What moves and what stays
//! Reading and ledger are not of one moment, so a wake in between looks like a stranger. [`Charge`] changes only by what
//! several readings in a row agree on, and by no less than a tolerance.

mod recent;

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::bytes::{ByteCount, PAGE_BYTES};

pub use recent::Recent;

/// Readings in a row that must agree before more comes off the budget.
const RISE: usize = 2;
/// Readings in a row that must agree before less does, or before drift is believed.
const FALL: usize = 3;
/// The part of a device that is too little to act on.
const TOLERANCE_PART: u64 = 512;
/// The part of a dead holder's bytes that others may have taken meanwhile, where only free memory is known.
const BACK_PART: u64 = 8;

/// What is too little to act on, on a device of `total` bytes.
#[must_use]
pub fn tolerance(total: ByteCount) -> ByteCount {
    ByteCount(total.0 / TOLERANCE_PART).max(PAGE_BYTES)
}

/// A device's memory at one moment, by its driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// All there is.
    pub total: ByteCount,
    /// What nobody has.
    pub free: ByteCount,
    /// Who has some of it, as far as the driver tells.
    pub processes: Vec<ProcessReading>,
}

/// One process on a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessReading {
    /// Its number.
    pub process: u32,
    /// What it has; none where the driver does not say.
    pub bytes: Option<ByteCount>,
}

/// One holder of leases, or what is left of one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holder {
    /// The sum of its leases.
    pub leased: ByteCount,
    /// What it says itself that it has on the device.
    pub said: ByteCount,
    /// What the driver shows of its processes; none where it shows none of them.
    pub seen: Option<ByteCount>,
}

impl Holder {
    /// What it has, by the best figure there is.
    #[must_use]
    pub fn has(&self) -> ByteCount {
        self.seen.filter(|bytes| !bytes.is_zero()).unwrap_or(self.said)
    }

    /// What it has beyond its leases.
    #[must_use]
    pub fn beyond(&self) -> ByteCount {
        self.has().saturating_sub(self.leased)
    }

    /// The driver hides it: it has something by its own word, and nothing is shown.
    #[must_use]
    pub fn is_hidden(&self) -> bool {
        !self.said.is_zero() && self.seen.is_none_or(ByteCount::is_zero)
    }
}

/// Ledger and reading, side by side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Comparison {
    /// What holders of leases have, within them or not.
    pub ours: ByteCount,
    /// Of it, beyond their leases.
    pub drift: ByteCount,
    /// What nobody with a lease has: other processes, the driver.
    pub others: ByteCount,
    /// What cannot be leased although the budget has it.
    pub taken: ByteCount,
    /// Every holder that has something is shown by the driver.
    pub is_by_process: bool,
}

/// Compares a ledger of `budget` bytes that may be leased, beside which `headroom` is to stay free, with a reading.
#[must_use]
pub fn compare(
    reading: &Reading,
    budget: ByteCount,
    headroom: ByteCount,
    holders: impl IntoIterator<Item = Holder>,
) -> Comparison {
    let mut found = Comparison { is_by_process: true, ..Comparison::default() };
    let mut within: u64 = 0;
    for holder in holders {
        let has = holder.has();
        found.is_by_process &= !holder.is_hidden();
        found.ours = ByteCount(found.ours.0.saturating_add(has.0));
        found.drift = ByteCount(found.drift.0.saturating_add(holder.beyond().0));
        within = within.saturating_add(has.min(holder.leased).0);
    }
    let used = reading.total.saturating_sub(reading.free);
    found.others = used.saturating_sub(found.ours);
    let keep = headroom.saturating_sub(found.drift);
    let leasable = ByteCount(reading.free.0.saturating_add(within)).saturating_sub(keep);
    // Less than a page cannot be leased anyway.
    let missing = budget.saturating_sub(leasable);
    found.taken =
        ByteCount(missing.0.checked_next_multiple_of(PAGE_BYTES.0).unwrap_or(missing.0)).min(budget);
    found
}

/// Whether the `bytes` of a dead holder are free again, where the driver shows no processes: what others have, with the
/// dead among them, is by now hardly more than `others` was before.
#[must_use]
pub fn is_back(now: &Comparison, others: ByteCount, bytes: ByteCount) -> bool {
    now.others.saturating_sub(others) <= ByteCount(bytes.0 / BACK_PART)
}

/// What several readings in a row agree on.
#[derive(Clone, Debug, Default)]
pub struct Agreed {
    newest: VecDeque<ByteCount>,
}

impl Agreed {
    /// One more reading. Gives what all of the newest few had at least; zero before there are so many.
    pub fn note(&mut self, found: ByteCount) -> ByteCount {
        if self.newest.len() == FALL {
            self.newest.pop_front();
        }
        self.newest.push_back(found);
        if self.newest.len() < FALL { ByteCount::ZERO } else { self.least(FALL) }
    }

    /// What none of the newest few exceeded; none before there are so many.
    #[must_use]
    pub fn at_most(&self) -> Option<ByteCount> {
        (self.newest.len() == FALL).then(|| self.most())
    }

    fn least(&self, count: usize) -> ByteCount {
        self.newest.iter().rev().take(count).min().copied().unwrap_or_default()
    }

    fn most(&self) -> ByteCount {
        self.newest.iter().max().copied().unwrap_or_default()
    }

    /// Forgets all of it.
    pub fn clear(&mut self) {
        self.newest.clear();
    }
}

/// What comes off the budget now.
#[derive(Clone, Debug, Default)]
pub struct Charge {
    agreed: Agreed,
    taken: ByteCount,
}

impl Charge {
    /// What comes off.
    #[must_use]
    pub const fn taken(&self) -> ByteCount {
        self.taken
    }

    /// One more reading found `found` to be taken. Gives what comes off from now on, where that changed.
    pub fn note(&mut self, found: ByteCount, tolerance: ByteCount) -> Option<ByteCount> {
        self.agreed.note(found);
        let seen = self.agreed.newest.len();
        let (up, down) = (self.agreed.least(RISE), self.agreed.most());
        if seen >= RISE && up.saturating_sub(self.taken) >= tolerance {
            self.taken = up;
        } else if seen >= FALL && (self.taken.saturating_sub(down) >= tolerance || down.is_zero()) {
            if down == self.taken {
                return None;
            }
            self.taken = down;
        } else {
            return None;
        }
        Some(self.taken)
    }

    /// One more reading, that cannot show all that is taken: less than now is no news. Gives what comes off from now on, where
    /// that changed.
    pub fn note_at_least(&mut self, found: ByteCount, tolerance: ByteCount) -> Option<ByteCount> {
        self.note(found.max(self.taken), tolerance)
    }

    /// What is taken shows again, after readings in which `hidden` bytes could not: what `found` has beyond what comes off now
    /// counts at once, as far as they may have hidden it. Gives what comes off from now on, where that changed.
    pub fn reveal(&mut self, found: ByteCount, hidden: ByteCount, tolerance: ByteCount) -> Option<ByteCount> {
        self.agreed.clear();
        self.agreed.note(found);
        let more = found.saturating_sub(self.taken).min(hidden);
        (more >= tolerance).then(|| {
            self.taken += more;
            self.taken
        })
    }

    /// Whether the newest reading calls for another one soon: it is far from what comes off now.
    #[must_use]
    pub fn is_unsure(&self, tolerance: ByteCount) -> bool {
        let newest = self.agreed.least(1);
        newest.saturating_sub(self.taken).max(self.taken.saturating_sub(newest)) >= tolerance
    }
}

#[cfg(test)]
mod tests;
