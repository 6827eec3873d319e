//! What the device's driver shows, beside what the ledger says.
//!
//! Apart because it is the one thing in the core that is measured and not told: a reading comes every second, from a thread
//! that may hang ([`crate::shelf`]), and what follows from it is [`shoal_core::drift`]'s part. Here are readings matched with
//! models, and what becomes of the difference: others' memory comes off the budget, a worker's own beyond its lease becomes
//! overhead of it, and what a dead worker held stays leased until it is seen to be free. Nobody is ended for any of it.
//!
//! Without readings, or before the first, the ledger alone counts, as it would on a device that shows nothing.

use std::collections::BTreeMap;

use shoal_core::bytes::ByteCount;
use shoal_core::drift::{Charge, Comparison, Holder, Reading, compare, tolerance};
use shoal_core::protocol::{LeaseKind, WorkerUsage};

use super::Core;
use super::departed::Departed;
use crate::config::DeviceChoice;
use crate::state::{DriverSnapshot, EventKind, ProcessSnapshot};

/// Other processes that are shown, and that a sentence names.
const SHOWN_MAX: usize = 16;
const NAMED_MAX: usize = 3;

/// One reading, with what is known of the processes in it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Looked {
    pub(crate) reading: Reading,
    /// The group that each process is in, where that can be seen.
    pub(crate) groups: BTreeMap<u32, u32>,
    /// Names of processes, where they can be seen.
    pub(crate) names: BTreeMap<u32, String>,
    /// When it was begun, on the core's clock.
    pub(crate) begun_ms: u64,
    /// How long it took.
    pub(crate) took_us: u64,
}

impl Looked {
    /// What the process `leader` and its group have; none where nothing of them is shown.
    pub(super) fn of(&self, leader: u32) -> Option<ByteCount> {
        let shown = self.reading.processes.iter().filter(|shown| self.is_of(shown.process, leader));
        shown.filter_map(|shown| shown.bytes).reduce(|sum, bytes| ByteCount(sum.0.saturating_add(bytes.0)))
    }

    fn is_of(&self, process: u32, leader: u32) -> bool {
        process == leader || self.groups.get(&process) == Some(&leader)
    }
}

/// What is known of the device.
#[derive(Debug, Default)]
pub(crate) struct Driver {
    /// Who is asked.
    pub(crate) source: String,
    /// There are readings, and the newest one succeeded.
    pub(super) is_read: bool,
    lost: Option<String>,
    pub(super) looked: Looked,
    pub(super) found: Comparison,
    charge: Charge,
    /// It did not show every model's process that had something when last asked.
    pub(super) hides: bool,
    pub(super) departed: BTreeMap<u32, Departed>,
}

impl Driver {
    /// There are readings, and the newest one succeeded.
    #[cfg(test)]
    pub(crate) const fn is_heard(&self) -> bool {
        self.is_read
    }
}

impl Core {
    /// The driver is being asked: what is leased now may be what it shows. Nobody asks again before it has answered.
    pub(crate) fn begin_look(&mut self, now_ms: u64) -> u64 {
        for model in self.models.all_quietly() {
            (model.leased_then, model.said_then) = (self.book.total(model.id), said_on_device(&model.usage));
        }
        self.ask_for_departed();
        now_ms
    }

    /// The driver answered. True where another reading should follow soon.
    pub(crate) fn handle_looked(&mut self, looked: Looked, now_ms: u64) -> bool {
        if self.driver.lost.take().is_some() {
            let source = self.driver.source.clone();
            self.tell(now_ms, None, EventKind::DriverFound { source });
        }
        self.driver.is_read = true;
        self.driver.looked = looked;
        if self.is_settling() || self.stopping {
            // What is leased is not known to the full.
            return false;
        }
        let total = self.driver.looked.reading.total;
        let (mut holders, said) = self.live_holders();
        // Only one that has something tells whether it would be shown; the last that did counts until another does.
        let mut telling = holders.iter().filter(|holder| !holder.said.is_zero()).peekable();
        if telling.peek().is_some() {
            self.driver.hides = telling.any(Holder::is_hidden);
        }
        let live = holders.len();
        // What was given up while the driver was asked may be what the dead seem to have given back: here only what is said now.
        let said_now = |(holder, now): (&Holder, &ByteCount)| Holder { said: *now, ..*holder };
        let mut gone: Vec<Holder> = holders.iter().zip(&said).map(said_now).collect();
        let departed = self.departed_holders();
        for (_, holder) in &departed {
            holders.push(*holder);
            gone.push(Holder { leased: holder.leased, ..Holder::default() });
        }
        let (budget, headroom) = (self.config.device_budget, self.config.headroom);
        let found = compare(&self.driver.looked.reading, budget, headroom, holders.iter().copied());
        let without = compare(&self.driver.looked.reading, budget, headroom, gone);
        let is_masked = self.is_masked();
        self.driver.found = Comparison { is_by_process: !self.driver.hides, ..found };
        let (returned, unseen) = self.see_returned(&without, now_ms);
        if returned {
            // What came back is nobody's any more, whoever dies next.
            let waits = |process: u32| self.book.departed().any(|(other, _)| other == process);
            let left = departed.iter().filter(|(process, _)| waits(*process)).map(|(_, holder)| holder);
            let left = holders[..live].iter().chain(left).copied();
            let found = compare(&self.driver.looked.reading, budget, headroom, left);
            self.driver.found = Comparison { is_by_process: !self.driver.hides, ..found };
        }
        let drifted = self.see_drift(tolerance(total), now_ms);
        let taken = self.driver.found.taken;
        let changed = if !unseen.is_zero() {
            // What others took meanwhile looked like the dead's: it counts before anybody is granted that.
            self.driver.charge.reveal(taken, unseen, tolerance(total))
        } else if is_masked {
            self.driver.charge.note_at_least(taken, tolerance(total))
        } else {
            self.driver.charge.note(taken, tolerance(total))
        };
        if let Some(taken) = changed {
            self.book.charge(taken);
            self.tell_taken(now_ms);
        }
        if returned || drifted || changed.is_some() || !self.book.owed().is_zero() {
            self.settle(now_ms);
        }
        self.driver.charge.is_unsure(tolerance(total)) || self.book.departed().next().is_some()
    }

    /// The driver does not answer, or not with a reading.
    pub(crate) fn handle_driver_lost(&mut self, reason: String, now_ms: u64) {
        self.driver.is_read = false;
        let is_news = self.driver.lost.is_none();
        self.driver.lost = Some(reason.clone());
        if is_news && !self.stopping {
            self.tell(now_ms, None, EventKind::DriverLost { reason });
        }
        // Nobody would ever see them back.
        let departed: Vec<u32> = self.book.departed().map(|(process, _)| process).collect();
        for process in &departed {
            self.arrive(*process, ByteCount::ZERO, false, now_ms);
        }
        if !departed.is_empty() {
            self.settle(now_ms);
        }
    }

    /// Every model's process, with what was read of it and what it said at most since the driver was asked; and what each
    /// says now.
    fn live_holders(&mut self) -> (Vec<Holder>, Vec<ByteCount>) {
        let is_simulated = self.config.device == DeviceChoice::Sim;
        let (mut holders, mut now) = (Vec::with_capacity(self.models.len()), Vec::new());
        for model in self.models.all_quietly() {
            let is_rigid = model.is_rigid();
            let process = if is_rigid { model.child } else { model.pid };
            model.seen = process.and_then(|process| self.driver.looked.of(process));
            model.was_shown |= model.seen.is_some_and(|bytes| !bytes.is_zero());
            model.seen_most = model.seen_most.max(model.seen.unwrap_or_default());
            let leased = self.book.total(model.id);
            if process.is_none() && leased.is_zero() {
                continue;
            }
            // What was given back while the driver was asked may be in its answer.
            let said = said_on_device(&model.usage);
            // A simulated device hides nobody.
            let of_hidden = |said| if is_simulated { ByteCount::ZERO } else { said };
            let said_at_most = of_hidden(said.max(model.said_then));
            let leased = leased.max(model.leased_then);
            holders.push(Holder { leased, said: said_at_most, seen: model.seen });
            now.push(of_hidden(said));
        }
        (holders, now)
    }

    /// What a worker has beyond its lease time and again is overhead of it, and what it has less by now is not. True where
    /// anything came of that.
    fn see_drift(&mut self, tolerance: ByteCount, now_ms: u64) -> bool {
        let mut any = false;
        for place in 0..self.models.len() {
            let model = &mut self.models[place];
            let Some(seen) = model.seen.filter(|_| !model.is_rigid() && model.connection.is_some()) else {
                model.drift.clear();
                model.beside.clear();
                continue;
            };
            let leased = self.book.total(model.id).max(model.leased_then);
            let beyond = model.drift.note(seen.saturating_sub(leased));
            let peak = self.book.held(model.id, LeaseKind::Overhead) + beyond;
            if beyond < tolerance || peak.saturating_sub(model.overhead_seen.now()) < tolerance {
                let before = model.overhead_seen.now();
                model.see_less_overhead(seen, now_ms);
                if model.overhead_seen.now() != before {
                    // It may fall at once, or by time alone: somebody may wait for it, and the timer is to ring.
                    self.follow_overhead(place, now_ms);
                    any = true;
                }
                continue;
            }
            model.overhead_seen.note(peak, now_ms);
            model.drift.clear();
            model.beside.clear();
            self.tell(now_ms, Some(place), EventKind::Drifted { seen, leased });
            self.follow_overhead(place, now_ms);
            any = true;
        }
        any
    }

    fn tell_taken(&mut self, now_ms: u64) {
        let Comparison { others, drift, .. } = self.driver.found;
        let mut who: Vec<String> = self.others().into_iter().map(|process| in_words(&process)).collect();
        if who.len() > NAMED_MAX {
            who.truncate(NAMED_MAX);
            who.push("and others".to_owned());
        }
        let (taken, left, owed) = (self.book.charged(), self.book.leasable(), self.book.owed());
        self.tell(now_ms, None, EventKind::DeviceTaken { others, drift, taken, left, owed, who });
    }

    /// Other processes on the device, the largest first.
    fn others(&self) -> Vec<ProcessSnapshot> {
        let looked = &self.driver.looked;
        let ours = |process: u32| {
            self.models.iter().any(|model| {
                let leader = if model.is_rigid() { model.child } else { model.pid };
                leader.is_some_and(|leader| looked.is_of(process, leader))
            }) || self.book.departed().any(|(leader, _)| looked.is_of(process, leader))
        };
        let shown = looked.reading.processes.iter();
        let mut others: Vec<ProcessSnapshot> = shown
            .filter(|shown| shown.bytes != Some(ByteCount::ZERO) && !ours(shown.process))
            .map(|shown| ProcessSnapshot {
                pid: shown.process,
                name: looked.names.get(&shown.process).cloned(),
                bytes: shown.bytes,
            })
            .collect();
        others.sort_by_key(|process| (std::cmp::Reverse(process.bytes), process.pid));
        others
    }

    pub(super) fn driver_snapshot(&self, now_ms: u64) -> Option<DriverSnapshot> {
        let driver = &self.driver;
        if driver.looked.reading.total.is_zero() && driver.lost.is_none() {
            return None;
        }
        let mut processes = self.others();
        processes.truncate(SHOWN_MAX);
        Some(DriverSnapshot {
            source: driver.source.clone(),
            age_ms: now_ms.saturating_sub(driver.looked.begun_ms),
            took_us: driver.looked.took_us,
            lost: driver.lost.clone(),
            total: driver.looked.reading.total,
            free: driver.looked.reading.free,
            ours: driver.found.ours,
            drift: driver.found.drift,
            others: driver.found.others,
            is_by_process: driver.found.is_by_process,
            processes,
        })
    }

    /// What the driver shows of a model beyond its lease; negative where it is less.
    pub(super) fn drift_of(&self, place: usize) -> i64 {
        let model = &self.models[place];
        let number = |bytes: ByteCount| i64::try_from(bytes.0).unwrap_or(i64::MAX);
        model.seen.map_or(0, |seen| number(seen).saturating_sub(number(self.book.total(model.id))))
    }

    /// What of the device is not this shelf's, as far as it concerns the model at `place`.
    pub(super) fn beside(&self, place: usize) -> Vec<String> {
        let mut said = Vec::new();
        if !self.book.charged().is_zero() {
            let who =
                self.others().first().map_or_else(String::new, |first| format!(", {} most", in_words(first)));
            said.push(format!(
                "Others have {} of the device{who}: {} come off the budget, and {} are left to share.",
                self.driver.found.others,
                self.book.charged(),
                self.book.leasable()
            ));
        }
        if !self.book.owed().is_zero() {
            said.push(format!("{} of what is leased are to come back because of that.", self.book.owed()));
        }
        let (returning, stuck) = self.departed_bytes();
        if !returning.is_zero() {
            said.push(format!("{returning} of processes that ended were not seen to be free yet."));
        }
        if !stuck.is_zero() {
            said.push(format!(
                "{stuck} of processes that ended are still there by the driver's word, for so long that they count as others'."
            ));
        }
        let drift = self.drift_of(place);
        if let (Some(seen), true) = (self.models[place].seen, drift > 0) {
            said.push(format!(
                "Its process has {seen} of the device by the driver's word, more than it leased."
            ));
        }
        if let Some(lost) = &self.driver.lost {
            said.push(format!(
                "What is taken of the device cannot be read ({lost}): the ledger alone counts."
            ));
        }
        said
    }
}

/// What a process has of the device by its own word.
fn said_on_device(usage: &WorkerUsage) -> ByteCount {
    [usage.weights_device, usage.kv_device, usage.pooled, usage.overhead_device].into_iter().sum()
}

fn in_words(process: &ProcessSnapshot) -> String {
    let name = process.name.as_ref().map_or_else(String::new, |name| format!("{name} "));
    let bytes = process.bytes.map_or_else(String::new, |bytes| format!(": {bytes}"));
    format!("{name}{}{bytes}", process.pid)
}
