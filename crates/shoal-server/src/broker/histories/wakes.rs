//! How a worker of these histories wakes: at once, or while requests are at it already.

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromWorker, LeaseKind};

use super::DEVICE;
use super::shelf::hides;
use super::world::World;

impl World {
    /// The memory for what a worker lacked is there.
    pub(super) fn granted(&mut self, place: usize, request: u64, bytes: ByteCount) {
        let is_steady = self.is_steady();
        let Some(worker) = self.workers.get_mut(&place) else { return };
        worker.held += bytes;
        worker.waits.take_if(|waits| *waits == request);
        let wake = worker.wake.take_if(|(_, waits)| *waits == request);
        // Others may come at any time, and processes take more than they leased; what was promised is there.
        let is_full = self.used() > DEVICE;
        self.check_promised();
        let fails = is_full || wake.is_some() && !is_steady && self.dice.chance(10);
        let error = fails.then(|| "the device has no memory".to_owned());
        let is_in_order = wake.is_some() && !is_full && self.dice.chance(50);
        let Some(worker) = self.workers.get_mut(&place) else { return };
        if is_in_order && let Some((order, _)) = wake {
            // Its bytes come, or fail to, while requests are at it already.
            worker.coming = Some((order, bytes, error));
            return self.say(place, FromWorker::WakeBacked { order });
        }
        if error.is_some() {
            worker.held -= bytes;
            self.say(place, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes });
        }
        self.usage(place);
        if let Some((order, _)) = wake {
            self.done(place, order, bytes, error);
        }
    }

    /// What was promised is there.
    pub(super) fn check_promised(&self) {
        let promised = self.promised();
        // What the dead hold is nobody's while the driver shows it.
        assert!(hides(self.seed) || promised <= DEVICE, "I1: granted before it was back: {promised} in all");
    }

    /// The bytes of a wake have come, or will not.
    pub(super) fn end_coming(
        &mut self,
        place: usize,
        (order, bytes, error): (u64, ByteCount, Option<String>),
    ) {
        let Some(worker) = self.workers.get_mut(&place) else { return };
        if error.is_some() && worker.held >= bytes {
            worker.held -= bytes;
            self.say(place, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes });
        }
        self.usage(place);
        self.done(place, order, bytes, error);
    }
}
