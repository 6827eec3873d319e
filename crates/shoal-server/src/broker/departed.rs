//! Processes that ended with leases: what they had stays leased until it is seen to be free.
//!
//! Apart from the [readings](super::driver) because it is about those whom nobody can ask any more, and because a program's
//! lease comes back through its steward and a worker's with its process.

use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::drift::{Comparison, Holder, is_back, tolerance};

use super::Core;
use crate::config::DeviceChoice;
use crate::state::EventKind;

/// How long what a dead process held is waited for where the driver does not show processes.
const RETURN_MS_MAX: u64 = 10_000;
/// How long what the driver still shows of a dead process counts as coming back. A killed worker's memory was free 1 ms after
/// its end, and releasing all 80 GiB of an H100 takes about 0.1 s (35 ms for 32 GiB, MEASURED.md); while the dead have some,
/// the driver is asked four times a second. What it shows in ten answers in a row, and for 25 times as long as the whole device
/// takes, something is holding: a child that lives, a kernel that cannot end. Nobody is to wait for that while an idle model
/// could yield; requests have as little as a second.
pub(super) const STUCK_MS: u64 = 2_500;

/// How what a process has was known, before it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sight {
    /// The driver showed it: once it does not any more, that is free.
    Shown,
    /// By its own word: it is free once others have hardly more than before, by the device's free memory.
    Said,
    /// A program's, that nobody measured: what was declared tells nothing of what comes free. It is as free as it will be
    /// once all of the program is gone; what is missing then is others'.
    Declared,
}

/// A process that ended with leases.
#[derive(Clone, Copy, Debug)]
pub(super) struct Departed {
    since_ms: u64,
    /// The driver has been asked since: what it answers is of after the end, also within the same millisecond.
    is_asked: bool,
    /// What others had before it did.
    others: ByteCount,
    sight: Sight,
    /// The driver showed what it still has for longer than [`STUCK_MS`]: nobody is to wait for that any more.
    is_stuck: bool,
}

impl Core {
    /// What a dead process had can be seen to be free, and matters.
    pub(super) const fn sees_returns(&self) -> bool {
        self.driver.is_read && !self.stopping
    }

    /// The process of the model at `place` is gone. What it held is free at once where nobody can see otherwise. Gives
    /// what it held, and what of it is still to be seen free.
    pub(super) fn depart(&mut self, place: usize, process: u32, now_ms: u64) -> (ByteCount, ByteCount) {
        let id = self.models[place].id;
        if !self.sees_returns() {
            return (self.book.close(id), ByteCount::ZERO);
        }
        let departed = self.departed_now(place, now_ms);
        self.driver.departed.insert(process, departed);
        let held = self.book.depart(id, process);
        self.look_soon.notify_one();
        (held, held)
    }

    /// A program that is gone had `bytes`, which its steward has just given back: they stay leased until they are seen to be free,
    /// where anybody can see that.
    pub(super) fn hold_returning(&mut self, place: usize, process: u32, bytes: ByteCount, now_ms: u64) {
        if bytes.is_zero() || !self.sees_returns() {
            return;
        }
        let departed = self.departed_now(place, now_ms);
        self.driver.departed.entry(process).or_insert(departed);
        self.book.hold(process, bytes);
        self.look_soon.notify_one();
    }

    /// The driver is being asked: who is gone by now is so in its answer.
    pub(super) fn ask_for_departed(&mut self) {
        for departed in self.driver.departed.values_mut() {
            departed.is_asked = true;
        }
    }

    /// What processes that are gone had and is not seen to be free: what comes back before long, and what seems not to.
    pub(super) fn departed_bytes(&self) -> (ByteCount, ByteCount) {
        let (mut returning, mut stuck) = (ByteCount::ZERO, ByteCount::ZERO);
        for (process, bytes) in self.book.departed() {
            let is_stuck = self.driver.departed.get(&process).is_some_and(|departed| departed.is_stuck);
            *(if is_stuck { &mut stuck } else { &mut returning }) += bytes;
        }
        (returning, stuck)
    }

    /// What a process had that is gone is free, all but `kept`.
    pub(super) fn arrive(&mut self, process: u32, kept: ByteCount, seen: bool, now_ms: u64) {
        let bytes = self.book.arrive(process, kept);
        let departed = &mut self.driver.departed;
        let known = if kept.is_zero() { departed.remove(&process) } else { departed.get(&process).copied() };
        let since_ms = known.map_or(now_ms, |departed| departed.since_ms);
        let after_ms = now_ms.saturating_sub(since_ms);
        self.tell(now_ms, None, EventKind::MemoryReturned { pid: process, bytes, after_ms, seen });
    }

    /// How a process of the model at `place` that is gone now was known.
    fn departed_now(&self, place: usize, now_ms: u64) -> Departed {
        let model = &self.models[place];
        let is_shown = model.was_shown
            || self.config.device == DeviceChoice::Sim
            || !self.driver.hides && !model.is_rigid();
        let sight = match () {
            () if is_shown => Sight::Shown,
            () if model.is_rigid() => Sight::Declared,
            () => Sight::Said,
        };
        Departed {
            since_ms: now_ms,
            is_asked: false,
            others: self.driver.found.others,
            sight,
            is_stuck: false,
        }
    }

    /// The dead, as holders of what they had.
    pub(super) fn departed_holders(&self) -> Vec<(u32, Holder)> {
        let holder = |(process, leased): (u32, ByteCount)| {
            let is_shown = self.sight(process) == Sight::Shown;
            // Where nothing is shown, it counts as there until it is seen to be back.
            let said = if is_shown { ByteCount::ZERO } else { leased };
            (process, Holder { leased, said, seen: self.driver.looked.of(process) })
        };
        self.book.departed().map(holder).collect()
    }

    fn sight(&self, process: u32) -> Sight {
        self.driver.departed.get(&process).map_or(Sight::Shown, |departed| departed.sight)
    }

    /// Somebody dead may have what others seem not to have.
    pub(super) fn is_masked(&self) -> bool {
        self.book.departed().any(|(process, _)| self.sight(process) != Sight::Shown)
    }

    /// The driver shows `left` of the `bytes` that a process had which is long gone: that is others', and the rest is free, where
    /// all of it was shown. True where that is news.
    fn stick(&mut self, process: u32, (bytes, left): (ByteCount, ByteCount), now_ms: u64) -> bool {
        let Some(departed) = self.driver.departed.get_mut(&process) else { return false };
        let is_news = !std::mem::replace(&mut departed.is_stuck, true);
        let kept = left.round_up_to(PAGE_BYTES);
        let is_less = bytes.saturating_sub(kept) >= tolerance(self.driver.looked.reading.total);
        if departed.sight != Sight::Shown || !is_less {
            return is_news;
        }
        self.arrive(process, kept, true, now_ms);
        true
    }

    /// Those of the dead whose memory is free by now. `without` is the comparison as if all of it were. Gives whether there
    /// was any, and how much nobody could see to be free.
    pub(super) fn see_returned(&mut self, without: &Comparison, now_ms: u64) -> (bool, ByteCount) {
        let departed: Vec<(u32, ByteCount)> = self.book.departed().collect();
        // Where only free memory tells, all that is back is back at once.
        let in_all = departed.iter().filter(|(process, _)| self.sight(*process) != Sight::Shown);
        let in_all: ByteCount = in_all.map(|(_, bytes)| *bytes).sum();
        let (mut any, mut unseen) = (false, ByteCount::ZERO);
        for (process, bytes) in departed {
            let Some(&Departed { since_ms, is_asked, others, sight, .. }) =
                self.driver.departed.get(&process)
            else {
                continue;
            };
            // It may have lived when the driver was asked what it has just answered. Where that shows processes it tells by itself
            // who is gone; free memory alone may still lack what has gone a moment ago.
            if !is_asked || sight != Sight::Shown && self.driver.looked.begun_ms <= since_ms {
                continue;
            }
            // What an answer shows that was long on its way was so when it was asked for.
            let after_ms = self.driver.looked.begun_ms.saturating_sub(since_ms);
            let left = self.driver.looked.of(process).unwrap_or_default();
            let is_there = !left.is_zero();
            let is_seen = match sight {
                Sight::Shown => true,
                Sight::Said => is_back(without, others, in_all),
                Sight::Declared => false,
            };
            if !is_there && (is_seen || after_ms >= RETURN_MS_MAX || sight == Sight::Declared) {
                self.arrive(process, ByteCount::ZERO, is_seen, now_ms);
                any = true;
                if !is_seen {
                    unseen += bytes;
                }
            } else if is_there && after_ms >= STUCK_MS {
                any |= self.stick(process, (bytes, left), now_ms);
            }
        }
        // Those that held nothing.
        let held: Vec<u32> = self.book.departed().map(|(process, _)| process).collect();
        self.driver.departed.retain(|process, _| held.contains(process));
        (any, unseen)
    }
}
