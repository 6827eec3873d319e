//! What there is on the device, and what its driver shows of it.

use shoal_core::bytes::ByteCount;
use shoal_core::drift::{ProcessReading, Reading};
use shoal_core::protocol::LeaseKind;

use super::DEVICE;
use super::shelf::hides;
use super::worker::Worker;
use super::world::World;
use crate::broker::Looked;

/// Another process on the device.
const OTHER: u32 = 1;
/// What a reading may be off by: less is too little to act on.
const OFF_MAX: ByteCount = ByteCount::mib(4);

impl World {
    /// What everybody has of the device.
    pub(super) fn used(&self) -> ByteCount {
        let workers = self.workers.values().map(Worker::has);
        let programs = self.stewards.values().map(super::programs::Steward::has);
        let lingering = self.lingering.iter().map(|gone| gone.has);
        let strangers = self.strangers.iter().map(|stranger| stranger.has);
        self.others + workers.chain(programs).chain(lingering).chain(strangers).sum()
    }

    /// What a worker has within its leases.
    pub(super) fn within(&self, place: usize, worker: &Worker) -> ByteCount {
        let overhead = self.core.book.held(self.core.models[place].id, LeaseKind::Overhead);
        worker.held + worker.kv + worker.beside.min(overhead)
    }

    /// What processes have of what was promised to them, the dead among them.
    pub(super) fn promised(&self) -> ByteCount {
        let workers = self.workers.iter().map(|(place, worker)| self.within(*place, worker));
        let leased = |place: usize| self.core.book.total(self.core.models[place].id);
        let programs = self.stewards.iter().map(|(place, steward)| steward.has().min(leased(*place)));
        let lingering = self.lingering.iter().map(|gone| gone.has);
        workers.chain(programs).chain(lingering).sum()
    }

    /// What processes have beyond their leases.
    fn beyond(&self) -> ByteCount {
        let leased = |place: usize| self.core.book.total(self.core.models[place].id);
        let workers = self.workers.iter().map(|(place, worker)| worker.has().saturating_sub(leased(*place)));
        let programs =
            self.stewards.iter().map(|(place, steward)| steward.has().saturating_sub(leased(*place)));
        workers.chain(programs).sum()
    }

    /// What workers say that they have beside weights and do not have any more, where they tell the most that it was; and what
    /// programs do not have of their charge, or did not when one of the newest readings was made: those are what counts. Where
    /// the driver hides them, so much too little comes off the budget.
    fn overstated(&self) -> ByteCount {
        if !hides(self.seed) {
            return ByteCount::ZERO;
        }
        let workers = self.workers.values().map(|worker| worker.said.saturating_sub(worker.beside));
        let said: ByteCount = workers.sum();
        said + self.spare_then.into_iter().fold(self.spare(), ByteCount::max)
    }

    /// What programs do not have of their charge.
    fn spare(&self) -> ByteCount {
        self.stewards.values().map(super::programs::Steward::spare).sum()
    }

    /// What comes off the budget is what others have, and what goes beyond leases and the headroom.
    pub(super) fn check_charge(&self) {
        let beyond = self.beyond().saturating_sub(self.core.config.headroom);
        let (charged, expected) = (self.core.book.charged(), self.others + beyond);
        let least = expected.saturating_sub(self.overstated());
        let off = charged.saturating_sub(expected).max(least.saturating_sub(charged));
        let most = if expected.is_zero() { ByteCount::ZERO } else { OFF_MAX };
        assert!(
            off <= most,
            "{charged} are charged, others have {}, and {beyond} are beyond leases",
            self.others
        );
    }

    /// The driver is asked; its answer counts when it comes.
    pub(super) fn look(&mut self) {
        self.lingering.retain(|gone| gone.until_ms > self.now_ms);
        let begun_ms = self.core.begin_look(self.now_ms);
        let of = |process, bytes| ProcessReading { process, bytes: Some(bytes) };
        let workers = self.workers.values().map(|worker| of(worker.pid, worker.has()));
        let programs = self.stewards.values().filter_map(super::programs::Steward::shown);
        let programs = programs.map(|(pid, bytes)| of(pid, bytes));
        let lingering = self.lingering.iter().map(|gone| of(gone.pid, gone.has));
        let others = [of(OTHER, self.others)].into_iter();
        let hides = hides(self.seed);
        let processes = workers.chain(programs).chain(lingering).chain(others).filter(|_| !hides).collect();
        let reading = Reading { total: DEVICE, free: DEVICE.saturating_sub(self.used()), processes };
        self.looked = Some(Looked { reading, begun_ms, ..Looked::default() });
        self.spare_then.rotate_right(1);
        self.spare_then[0] = self.spare();
    }

    pub(super) fn see(&mut self) {
        if let Some(looked) = self.looked.take() {
            self.seen.looks += 1;
            self.core.handle_looked(looked, self.now_ms);
            self.seen.stuck += u64::from(!self.core.departed_bytes().1.is_zero());
        }
    }
}
