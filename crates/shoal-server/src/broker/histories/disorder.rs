//! What happens that nobody asked for.

use shoal_core::bytes::ByteCount;

use super::DEVICE;
use super::shelf::answers;
use super::world::World;
use crate::broker::Wanted;

impl World {
    /// One thing happens.
    pub(super) fn disturb(&mut self) {
        let place = self.dice.index(self.core.models.len());
        let name = self.core.models[place].name.clone();
        match self.dice.roll(100) {
            0..34 => {
                let wait_ms = 100 + self.dice.roll(20_000);
                let caller = self.caller();
                self.ask(place, Wanted::Route(caller), wait_ms);
            }
            34..36 => self.ask(place, Wanted::Wake, 20_000),
            36..53 if !self.routed.is_empty() => {
                let index = self.dice.index(self.routed.len());
                self.end_route(index);
            }
            53..59 => self.exit(place),
            59..65 if !self.clients.is_empty() => {
                let index = self.dice.index(self.clients.len());
                let client = self.clients.swap_remove(index);
                self.leave(client);
            }
            65..73 => {
                let keep = self.dice.roll(11) as f64 / 10.0;
                let _ = self.core.handle_sleep(&name, keep, self.now_ms);
            }
            73..77 => {
                let pinned = self.dice.chance(30);
                let _ = self.core.handle_pin(&name, pinned, self.now_ms);
            }
            77..80 => self.usage(place),
            80..82 if !self.lives_on => self.restart(),
            82..85 => {
                // Others take what is free, or leave.
                let free = DEVICE.saturating_sub(self.used() - self.others);
                let most = ByteCount::mib(2 * self.dice.roll(30));
                self.others = if self.dice.chance(40) { ByteCount::ZERO } else { most.min(free) };
            }
            85 => {
                self.looked = None;
                self.core.handle_driver_lost("a test".to_owned(), self.now_ms);
                self.lingering.clear();
            }
            86 => {
                // Whose process stops is ended for its silence. Where nobody is asked, one hangs that goes on telling.
                let is_stopped = answers(self.seed);
                if let Some(worker) = self.workers.get_mut(&place) {
                    (worker.is_stopped, worker.is_hung) = (is_stopped, !is_stopped);
                }
            }
            87..91 => self.take_beside(place),
            91..96 => self.reload(),
            96..98 if !self.routed.is_empty() => {
                // A request has waited for a byte.
                let index = self.dice.index(self.routed.len());
                let (place, waited_ms) = (self.routed[index].place, self.dice.roll(400_000));
                self.core.handle_no_byte(place, waited_ms, self.now_ms);
            }
            98..100 => self.program_ends(place),
            _ => {}
        }
    }
}
