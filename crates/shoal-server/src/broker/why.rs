//! Why a model is as it is: its state and what was decided about it, in sentences with their numbers.
//!
//! Apart from [`super::show`], which gives the numbers alone. Nothing is decided here, and nothing is remembered for it but
//! the events.

use std::fmt::Write as _;

use shoal_core::bytes::ByteCount;
use shoal_core::fair::Standing;
use shoal_core::policy::worth::of_weights;
use shoal_core::policy::{ShelfState, turn_ms};
use shoal_core::protocol::LeaseKind;

use super::orders::Order;
use super::{Core, Life, Record};
use crate::config::SleepDepth;
use crate::shelf::Caller;
use crate::state::{Event, ModelStatus, Why};

impl Core {
    /// Explains the model at `place`, with the newest `last` decisions.
    pub(crate) fn why(&self, place: usize, last: usize, now_ms: u64) -> Why {
        let model = &self.models[place];
        let about: Vec<_> = self
            .events
            .explaining()
            .filter(|event| {
                let is_its = event.model.as_deref() == Some(model.name.as_str());
                is_its || event.what.requester() == Some(model.name.as_str())
            })
            .collect();
        let earlier = about.len().saturating_sub(last);
        Why {
            model: model.name.clone(),
            at_ms: self.unix_ms(now_ms),
            status: self.status_of(place),
            now: self.sentences(place, now_ms),
            decisions: about[earlier..].iter().map(|event| Event::clone(event)).collect(),
            earlier: earlier as u64,
            log: self.config.log_dir.join("decisions.ndjson").display().to_string(),
        }
    }

    fn sentences(&self, place: usize, now_ms: u64) -> Vec<String> {
        let model = &self.models[place];
        let mut said = vec![self.standing(place, now_ms)];
        let since = seconds(now_ms.saturating_sub(model.cycle.since_ms()));
        let was = model.cycle.before().map_or_else(String::new, |(status, ms)| {
            format!(" Before, it was {} for {}.", crate::state::status_word(status), seconds(ms))
        });
        said.push(format!("It has been so for {since}: {}.{was}", model.cycle.reason()));
        said.extend(self.wanted(place, now_ms));
        if model.is_ready() {
            said.extend(self.kept(model, now_ms));
        }
        if let Some(choice) = model.usage.tiers.iter().find_map(|tier| tier.choice.as_ref()) {
            said.push(format!("Of the last prompt of which a tier had KV: {choice}."));
        }
        if let Some(silent_ms) = model.pulse.silent_ms(now_ms) {
            let end = self.config.patience.silent_max.map_or_else(String::new, |silent_max| {
                format!(
                    "; at {} it is ended, and what it holds comes back",
                    seconds(super::millis(silent_max))
                )
            });
            said.push(format!("Its worker has not answered for {}{end}.", seconds(silent_ms)));
        }
        said.extend(self.beside(place));
        if let Some(outside) = &self.outside {
            said.push(match &outside.instead {
                None => format!("Who yields to whom is decided by {}.", outside.name),
                Some(reason) => format!(
                    "Who yields to whom is to be decided by {}, but {reason}; {} decides in its place.",
                    outside.name,
                    self.policy.name()
                ),
            });
        }
        if let Some(error) = model.error.as_ref().filter(|_| !matches!(model.life(), Life::Failed { .. })) {
            said.push(format!("What went wrong last: {error}."));
        }
        said
    }

    /// What it is doing and what it holds.
    fn standing(&self, place: usize, now_ms: u64) -> String {
        let model = &self.models[place];
        let name = &model.name;
        let held = |kind| self.book.held(model.id, kind);
        let (weights, kv, overhead) =
            (held(LeaseKind::Weights), held(LeaseKind::Kv), held(LeaseKind::Overhead));
        let total = model.weights_total;
        match (self.status_of(place), model.life()) {
            (ModelStatus::Failed, Life::Failed { reason, .. }) => {
                format!("{name} cannot be served: {reason}.")
            }
            (ModelStatus::Waiting, _) => {
                format!("{name} waits for its worker's turn to start: only so many start at the same time.")
            }
            (ModelStatus::Starting, Life::Awaited { until_ms }) => {
                let left = seconds(until_ms.saturating_sub(now_ms));
                format!(
                    "{name} has the worker of a server before this one, which is to say within {left} what it holds."
                )
            }
            (ModelStatus::Starting, _) => {
                let progress = model.progress.as_ref().map_or_else(String::new, |done| format!(" ({done})"));
                format!("{name} is starting: its worker reads and places the weights{progress}.")
            }
            (ModelStatus::Restarting, Life::Waiting { at_ms, reason }) => {
                let in_ms = at_ms.saturating_sub(now_ms);
                format!("{name} is started again in {}: {reason}.", seconds(in_ms))
            }
            (ModelStatus::Restarting, _) => {
                format!("{name} is started again once its last process is gone; {weights} come back with it.")
            }
            (ModelStatus::Stopped, _) => format!("{name} is stopped: the server is ending."),
            (ModelStatus::Awake, _) => {
                let beside = [("KV", kv), ("what its process takes besides", overhead)];
                let beside = beside.iter().filter(|(_, bytes)| !bytes.is_zero());
                let mut said = format!("{name} is awake: all {weights} of it are on the device");
                for (what, bytes) in beside {
                    let _ = write!(said, ", with {bytes} for {what}");
                }
                let _ = write!(said, "; all models share {}.", self.book.leasable());
                said
            }
            (ModelStatus::Asleep, _) if model.is_rigid() => {
                format!(
                    "{name} is asleep: its command does not run; it takes {total} of device memory when it does."
                )
            }
            (ModelStatus::Asleep, _) => {
                format!("{name} is asleep: nothing of its {total} is on the device{}.", elsewhere(model))
            }
            (ModelStatus::Draining, _) if model.is_ending(weights) => {
                format!(
                    "{name} has a command that ended: what that started is ended as well, and {weights} come back with it."
                )
            }
            (ModelStatus::Draining, _) => {
                let orders = model.ordered();
                format!(
                    "{name} gives up {orders}, all that it has, once the requests that it has are answered."
                )
            }
            (ModelStatus::PartlyResident, _) => {
                let missing = total.saturating_sub(weights);
                format!(
                    "{name} is partly resident: {weights} of its {total} are on the device and {missing} are not{}.",
                    elsewhere(model)
                )
            }
            (ModelStatus::Waking, _) => {
                let missing = total.saturating_sub(weights);
                if missing.is_zero() {
                    let doing = if model.is_rigid() {
                        "its command is starting"
                    } else {
                        "its bytes are being copied"
                    };
                    let goes = if model.orders.values().any(Order::is_backed_wake) {
                        " in the order in which they are used; requests go to its worker already"
                    } else {
                        ""
                    };
                    format!("{name} is waking: it has its {total} of device memory, and {doing}{goes}.")
                } else {
                    format!("{name} is waking: {missing} of its {total} are missing on the device.")
                }
            }
            (status, _) => format!("{name} is {status:?}.").to_lowercase(),
        }
    }

    /// Who wants it, and what it waits for.
    fn wanted(&self, place: usize, now_ms: u64) -> Vec<String> {
        let model = &self.models[place];
        let mut said = Vec::new();
        let (active, waiting) = (model.queue.active(), model.queue.len() as u64);
        if active > 0 {
            said.push(format!("It answers {}.", requests(active)));
        }
        if let Some(first) = model.queue.oldest() {
            let waits = if waiting == 1 { "waits" } else { "wait" };
            let since = seconds(now_ms.saturating_sub(first.since_ms));
            let left = seconds(first.deadline_ms.saturating_sub(now_ms));
            let count = requests(waiting);
            said.push(format!("{count} {waits} for it, the first for {since}; it is told no in {left}."));
        }
        if model.takes_requests() && model.queue.requests() > 0 {
            let most = model.config.parallel_max;
            let why = if active >= u64::from(most) {
                format!("it answers as many at the same time as it may ({most}, `parallel_max`)")
            } else {
                format!("{} wait inside its worker already", requests(model.waiting_inside))
            };
            said.push(format!("They wait for a place: {why}."));
        }
        said.extend(by_key(model, now_ms));
        for asked in self.asked.iter().filter(|asked| asked.pending.model == model.id) {
            let since = seconds(now_ms.saturating_sub(asked.pending.asked_ms));
            let why = if asked.waits_for.is_empty() { &asked.reason } else { &asked.waits_for };
            said.push(format!("It has waited for memory for {since}: {why}."));
        }
        if model.wake_not_before_ms > now_ms && !model.queue.is_empty() {
            let again = seconds(model.wake_not_before_ms - now_ms);
            said.push(format!("Its last wake failed; the next is in {again}."));
        }
        said
    }

    /// What keeps it where it is, or takes it from there.
    fn kept(&self, model: &Record, now_ms: u64) -> Vec<String> {
        let mut said = Vec::new();
        if !model.ordered().is_zero() && !model.is_rigid() {
            said.push(format!("It was ordered to give up {}, and has not yet.", model.ordered()));
        }
        if self.book.total(model.id).is_zero() {
            return said;
        }
        if model.pinned {
            said.push("It is pinned: it yields to nobody.".to_owned());
            return said;
        }
        if let Some(min) = model.config.min {
            said.push(format!(
                "Of what it holds it keeps {min} whoever needs memory (`min`), unless it is told to sleep."
            ));
        }
        if model.config.sleep == SleepDepth::None {
            said.push("Its weights stay on the device (`sleep = \"none\"`).".to_owned());
        }
        if !model.config.apart.is_empty() {
            said.push(format!(
                "It is never there together with {} (`apart`).",
                model.config.apart.join(", ")
            ));
        }
        let state = self.policy_model(model.id.0 as usize, now_ms);
        said.push(format!(
            "Each MiB of it saves {} of waiting for each second that it is kept: it takes {} us to bring back.",
            of_weights(&state, now_ms),
            state.restore_us_per_mib
        ));
        let turns = ShelfState { quantum_ms: self.timing.quantum_ms, ..ShelfState::default() };
        let quantum_ms = turn_ms(&turns, &state);
        match (model.turn_since_ms, model.is_busy()) {
            (Some(since_ms), true) => {
                let (ran, turn) = (seconds(now_ms.saturating_sub(since_ms)), seconds(quantum_ms));
                said.push(if now_ms.saturating_sub(since_ms) < quantum_ms {
                    format!("Its turn has lasted {ran} of {turn}: until it is over it yields to nobody.")
                } else {
                    format!("Its turn is over ({ran} of {turn}): it yields to whoever waits longest.")
                });
            }
            (_, false) => {
                let idle = model.last_used_ms.map_or_else(
                    || "has not been used yet".to_owned(),
                    |at| format!("has been idle for {}", seconds(now_ms.saturating_sub(at))),
                );
                let kept = model.config.keep_alive_s.map_or_else(
                    || ", and stays until somebody needs the memory".to_owned(),
                    |keep| {
                        format!("; it is put to sleep after {} of that (`keep_alive`)", seconds(keep * 1_000))
                    },
                );
                said.push(format!("It {idle}{kept}."));
            }
            (None, true) => {}
        }
        said
    }
}

/// Where its bytes are beside the device.
fn elsewhere(model: &Record) -> String {
    let places = [(model.usage.host, "in host memory"), (model.usage.source_only, "only in its files")];
    let places: Vec<String> = places
        .iter()
        .filter(|(bytes, _)| *bytes > ByteCount::ZERO)
        .map(|(bytes, place)| format!("{bytes} are {place}"))
        .collect();
    if places.is_empty() { String::new() } else { format!("; {}", places.join(", ")) }
}

/// Whose requests they are, where more than one key has some.
fn by_key(model: &Record, now_ms: u64) -> Option<String> {
    let told = |stands: Standing<'_, Caller, _>| {
        let Standing { key, active, waiting, .. } = stands;
        format!("{key} has {active} there and {waiting} waiting")
    };
    let told: Vec<String> = model.queue.standings(now_ms).map(told).collect();
    let next = "the next place is for who has had least time at it";
    (told.len() > 1).then(|| format!("Of these, {}; {next}.", told.join(", ")))
}

fn requests(count: u64) -> String {
    if count == 1 { "1 request".to_owned() } else { format!("{count} requests") }
}

fn seconds(ms: u64) -> String {
    format!("{}.{} s", ms / 1_000, ms % 1_000 / 100)
}
