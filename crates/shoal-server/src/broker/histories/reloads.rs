//! The file is edited and read again: models come, go and change, limits and policies change, and what only a start of the
//! server reads stays.

use std::path::PathBuf;
use std::time::Duration;

use shoal_core::bytes::ByteCount;

use super::shelf::{program, whole_config};
use super::world::World;
use super::{DEVICE, MODELS_MAX};
use crate::broker::Follow;
use crate::config::{Engine, ModelConfig, ServerConfig, SleepDepth};

/// The sum of all minimums: so much is left that any model fits beside them.
const MINS_MAX: ByteCount = ByteCount::mib(12);

impl World {
    /// Somebody edits the file and has it read.
    pub(super) fn reload(&mut self) {
        if self.lives_on {
            return self.read_again();
        }
        for _ in 0..=self.dice.roll(2) {
            self.edit();
        }
        self.read_again();
    }

    fn edit(&mut self) {
        let index = self.dice.index(self.file.models.len());
        let roll = self.dice.roll(1_000);
        let count = self.file.models.len();
        let model = &mut self.file.models[index];
        match self.dice.roll(16) {
            0 if count > 2 => {
                self.file.models.remove(index);
            }
            1 | 2 if count < MODELS_MAX => {
                // A name that was never there, or one that may have been.
                let number = if roll.is_multiple_of(2) {
                    self.names
                } else {
                    usize::try_from(roll / 2).unwrap_or(0) % self.names
                };
                let name = format!("m{number}");
                if self.file.model(&name).is_some() {
                    return;
                }
                self.names = self.names.max(number + 1);
                self.file.models.push(if roll.is_multiple_of(3) {
                    program(&name)
                } else {
                    ModelConfig::new(name, "/none")
                });
            }
            3 => model.dtype = Some(["float32", "bfloat16"][(roll % 2) as usize].to_owned()),
            4 => {
                // The same name, kept in another way.
                let name = model.name.clone();
                let is_program = model.engine == Engine::Command;
                *model = if is_program { ModelConfig::new(name, "/none") } else { program(&name) };
            }
            // One in eight is less than it needs: it cannot be served until that is mended.
            5 => {
                model.max = [Some(50), Some(60), None, None, None, None, Some(20), None][(roll % 8) as usize]
                    .map(ByteCount::mib);
            }
            6 => model.min = (!roll.is_multiple_of(3)).then(|| ByteCount::mib(2 * (roll % 5))),
            7 => model.priority = i32::try_from(roll % 5).unwrap_or(0) - 2,
            8 => model.parallel_max = 1 + u32::try_from(roll % 3).unwrap_or(0),
            9 => model.pin = roll.is_multiple_of(3),
            10 => model.keep_alive_s = roll.is_multiple_of(2).then_some(roll % 7),
            11 => model.preload = roll.is_multiple_of(2),
            12 => {
                let is_other = |other: &ModelConfig| other.sleep == SleepDepth::None;
                let depth = [SleepDepth::None, SleepDepth::Host, SleepDepth::Source][(roll % 3) as usize];
                if depth != SleepDepth::None || !self.file.models.iter().any(is_other) {
                    self.file.models[index].sleep = depth;
                }
            }
            13 => {
                let (one, other) = (index, (index + 1) % count);
                let is_apart = roll.is_multiple_of(2);
                for (one, other) in [(one, other), (other, one)] {
                    let name = self.file.models[other].name.clone();
                    let apart = &mut self.file.models[one].apart;
                    apart.retain(|known| *known != name);
                    if is_apart {
                        apart.push(name);
                    }
                }
            }
            14 => {
                let sharing = &mut self.file.sharing;
                match roll % 5 {
                    0 => sharing.evicts = !sharing.evicts,
                    1 => sharing.policy = "value".to_owned(),
                    2 => sharing.policy = "lru".to_owned(),
                    3 => sharing.policy = "python:a:decides".to_owned(),
                    _ => sharing.shadow = roll.is_multiple_of(2).then(|| "python:a:watches".to_owned()),
                }
                self.file.quantum = Duration::from_millis(100 + roll);
            }
            _ => {
                self.file.headroom = ByteCount::mib(2 * (roll % 5));
                self.file.device_budget = DEVICE - self.file.headroom;
            }
        }
        tidy(&mut self.file);
    }

    /// What the shelf does with a file that was edited.
    pub(super) fn read_again(&mut self) {
        let (budget, headroom) = (self.core.config.device_budget, self.core.config.headroom);
        let names: Vec<(String, bool)> =
            self.core.models.iter().map(|model| (model.name.clone(), model.is_removed)).collect();
        let rewritten: Vec<u64> = if self.dice.chance(30) {
            self.core.policies_read().into_iter().map(|(id, _)| id).collect()
        } else {
            Vec::new()
        };
        let (said, follow) = self.core.handle_reload(self.file.clone(), &rewritten, self.now_ms);
        let Follow { places, reused, pins } = follow;
        self.seen.reloads += 1;
        self.seen.added += said.added.len() as u64;
        self.seen.removed += said.removed.len() as u64;
        self.seen.restarted += said.restarted.len() as u64;
        // What a running server cannot change it does not, and it says so.
        assert_eq!((self.core.config.device_budget, self.core.config.headroom), (budget, headroom));
        let is_kept = said.needs_restart.iter().any(|key| key == "device_budget");
        assert_eq!(is_kept, self.file.device_budget != budget, "{:?}", said.needs_restart);
        self.seen.kept_keys += u64::from(is_kept);
        // A place where another stands now is told of: what the one before left is nobody's (I12).
        for (place, model) in self.core.models.iter().enumerate() {
            let before = names.get(place);
            let is_another = before
                .is_some_and(|(name, was_removed)| *name != model.name || *was_removed && !model.is_removed);
            assert!(!is_another || reused.contains(&place), "I12: {} took a place over unseen", model.name);
            assert_eq!(before.is_none(), places.contains(&place), "{} has no task", model.name);
        }
        for model in &self.file.models {
            let place = self.core.by_name.get(&model.name).copied().expect("it is on the shelf");
            assert_eq!(self.core.models[place].config, *model, "{} is not as configured", model.name);
            if self.core.models[place].queue.active() > u64::from(model.parallel_max) {
                self.narrowed.insert(place);
            }
        }
        self.together = self.standing_together();
        for (model, pinned) in pins {
            let _ = self.core.handle_pin(&model, pinned, self.now_ms);
        }
        self.core.handle_timer(self.now_ms);
    }

    /// The file becomes one with which every model can be served, with as many models as there are.
    pub(super) fn configure_for_all(&mut self) {
        let first = whole_config(self.seed);
        (self.file.sharing, self.file.quantum) = (first.sharing, first.quantum);
        for model in &mut self.file.models {
            (model.max, model.pin, model.sleep) = (None, false, SleepDepth::Source);
            if model.engine == Engine::Command {
                // A part of it cannot be kept, so all of it would be.
                model.min = None;
            }
        }
        self.read_again();
    }
}

/// As much as the reader of a file would insist on.
fn tidy(file: &mut ServerConfig) {
    let names: Vec<String> = file.models.iter().map(|model| model.name.clone()).collect();
    let apart: Vec<(String, Vec<String>)> =
        file.models.iter().map(|model| (model.name.clone(), model.apart.clone())).collect();
    let mut left = MINS_MAX;
    for model in &mut file.models {
        // It holds both ways.
        let said_of =
            |name: &String| apart.iter().any(|(other, said)| other == name && said.contains(&model.name));
        model.apart.retain(|name| names.contains(name) && said_of(name));
        if !model.apart.is_empty() {
            // What keeps it on the device would keep the other off it for good.
            (model.min, model.pin) = (None, false);
            model.sleep = if model.sleep == SleepDepth::None { SleepDepth::Source } else { model.sleep };
        }
        let most = left.min(model.max.unwrap_or(left));
        model.min = model.min.map(|min| min.min(most));
        left -= model.min.unwrap_or_default();
        if model.sleep == SleepDepth::None {
            model.keep_alive_s = None;
        }
        if model.engine == Engine::Command {
            model.sleep = SleepDepth::Source;
        }
        model.python = None::<PathBuf>;
    }
}
