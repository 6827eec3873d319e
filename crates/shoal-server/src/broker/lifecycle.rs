//! The life of one model as a table of states and events, with one writer.
//!
//! Apart from the core because it is pure and small enough to be checked whole: [`next`] is the table, [`status`] names
//! what others see, and a [`Lifecycle`] is the only thing that ever changes either. An event that the table does not
//! know in a state is refused and changes nothing, so no path of the core can bring a model into a state that nothing
//! leads out of, or start a second process beside one that may still live: the only ways back to [`Life::Waiting`] are
//! an event that says that the process is gone, and states that have none.

use shoal_core::bytes::ByteCount;

use crate::state::ModelStatus;

/// Where a worker is in its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    /// Waits to be started, not before `at_ms`. There is no process.
    Waiting { at_ms: u64, reason: String },
    /// The worker of a server before this one, which is to say what it holds until `until_ms`.
    Awaited { until_ms: u64 },
    /// Being started: from the order to spawn on, to its `Ready`.
    Starting { heard_ms: u64, greeted: bool },
    /// Takes orders.
    Ready,
    /// Its process is to end or its connection did; it is not gone yet.
    Ending,
    /// It cannot be served. The process may still be on its way out (the record's `pid` says).
    Failed { reason: String, permanent: bool },
    /// The server is ending, or the model was taken off the shelf, and its process is gone.
    Stopped,
}

/// What can happen to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LifeEvent {
    /// Its turn to start has come.
    StartOrdered { now_ms: u64 },
    /// Its process was found, which a server before had started.
    Found { until_ms: u64 },
    /// It said hello and nothing before.
    Greeted { now_ms: u64 },
    /// It said something.
    Heard { now_ms: u64 },
    /// The worker of a server before came and serves.
    Adopted,
    /// It serves.
    Ready,
    /// Its connection is over, or it is to end.
    Lost,
    /// It cannot be served.
    Failed { reason: String, permanent: bool },
    /// Its process is gone, or there was none, and the next may start at `at_ms`.
    Gone { at_ms: u64, reason: String },
    /// Its process is gone, or there was none, and no other starts.
    GoneForGood,
    /// Somebody asks for it although it failed; there is no process.
    AskedAgain { now_ms: u64 },
    /// All its weights are on the device.
    AllThere,
    /// Some of its weights left the device.
    SomeLeft,
}

/// The table: what follows from an event in a state; none where it cannot happen there.
pub(crate) fn next(life: &Life, event: &LifeEvent) -> Option<Life> {
    use LifeEvent as On;
    Some(match (life, event) {
        // The end of all.
        (Life::Stopped, On::Failed { .. } | On::Gone { .. }) => return None,
        (_, On::GoneForGood) => Life::Stopped,
        (Life::Waiting { .. }, On::StartOrdered { now_ms }) => {
            Life::Starting { heard_ms: *now_ms, greeted: false }
        }
        (Life::Waiting { .. }, On::Found { until_ms }) => Life::Awaited { until_ms: *until_ms },
        (Life::Starting { greeted: false, .. } | Life::Awaited { .. }, On::Greeted { now_ms }) => {
            Life::Starting { heard_ms: *now_ms, greeted: true }
        }
        (Life::Starting { greeted, .. }, On::Heard { now_ms }) => {
            Life::Starting { heard_ms: *now_ms, greeted: *greeted }
        }
        (Life::Awaited { .. }, On::Adopted)
        | (Life::Starting { .. }, On::Ready)
        | (Life::Ready, On::AllThere | On::SomeLeft) => Life::Ready,
        (Life::Awaited { .. } | Life::Starting { .. } | Life::Ready | Life::Ending, On::Lost) => Life::Ending,
        (Life::Failed { permanent: true, .. }, On::Gone { .. })
        // What it failed of explains more than how its connection ended.
        | (Life::Failed { .. } | Life::Stopped, On::Lost)
        // One that starts or is on its way out may give something back as well.
        | (Life::Starting { .. } | Life::Ending | Life::Failed { .. }, On::SomeLeft)
        | (_, On::Heard { .. }) => life.clone(),
        (_, On::Failed { reason, permanent }) => {
            Life::Failed { reason: reason.clone(), permanent: *permanent }
        }
        (_, On::Gone { at_ms, reason }) => Life::Waiting { at_ms: *at_ms, reason: reason.clone() },
        (Life::Waiting { .. } | Life::Failed { .. }, On::AskedAgain { now_ms }) => {
            Life::Waiting { at_ms: *now_ms, reason: "it was asked for again".to_owned() }
        }
        _ => return None,
    })
}

/// What of its memory decides the name of a state.
#[expect(clippy::struct_excessive_bools, reason = "facts that do not exclude one another")]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Weights on the device, by its lease.
    pub(crate) weights: ByteCount,
    /// It was ordered to give some of them up.
    pub(crate) weights_ordered: bool,
    pub(crate) wake_ordered: bool,
    /// It has to give up anything at all.
    pub(crate) reclaiming: bool,
    /// It answers its last requests.
    pub(crate) retiring: bool,
    /// It gives up all that it holds or nothing.
    pub(crate) is_rigid: bool,
    /// A process was started for it.
    pub(crate) was_started: bool,
    pub(crate) stopping: bool,
}

/// The name of a state.
pub(crate) fn status(life: &Life, loaded: bool, facts: &Facts) -> ModelStatus {
    match life {
        Life::Waiting { .. } if !facts.was_started && !facts.stopping => ModelStatus::Waiting,
        // Nothing is started again by a server that is ending.
        Life::Waiting { .. } | Life::Ending if facts.stopping => ModelStatus::Stopped,
        Life::Waiting { .. } | Life::Ending => ModelStatus::Restarting,
        Life::Starting { .. } | Life::Awaited { .. } => ModelStatus::Starting,
        Life::Failed { .. } => ModelStatus::Failed,
        Life::Stopped => ModelStatus::Stopped,
        Life::Ready if facts.retiring => ModelStatus::Draining,
        Life::Ready if loaded && !facts.weights_ordered => ModelStatus::Awake,
        // A wake that comes while it drains begins when it is gone.
        Life::Ready if facts.is_rigid && facts.reclaiming => ModelStatus::Draining,
        Life::Ready if facts.wake_ordered => ModelStatus::Waking,
        Life::Ready if facts.weights.is_zero() => ModelStatus::Asleep,
        Life::Ready if facts.is_rigid => ModelStatus::Draining,
        Life::Ready => ModelStatus::PartlyResident,
    }
}

/// A change that others see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Transition {
    pub(crate) from: ModelStatus,
    pub(crate) to: ModelStatus,
    /// How long it was what it was before.
    pub(crate) after_ms: u64,
    pub(crate) reason: String,
}

/// An event that cannot happen in a state; nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{event:?} cannot happen to a model that is {life:?}")]
pub(crate) struct Unexpected {
    pub(crate) life: Life,
    pub(crate) event: LifeEvent,
}

/// The life of one model, and what is shown of it. Changes by [`Lifecycle::apply`] alone.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    life: Life,
    loaded: bool,
    shown: ModelStatus,
    since_ms: u64,
    reason: String,
    before: Option<(ModelStatus, u64)>,
    /// Why the next change that others see will have come about.
    cause: Option<String>,
}

impl Lifecycle {
    pub(crate) fn new(life: Life, reason: &str) -> Self {
        Self {
            life,
            loaded: false,
            shown: ModelStatus::Waiting,
            since_ms: 0,
            reason: reason.to_owned(),
            before: None,
            cause: None,
        }
    }

    pub(crate) const fn life(&self) -> &Life {
        &self.life
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.life == Life::Ready
    }

    /// All its weights were brought to the device, and none were given back since.
    pub(crate) const fn loaded(&self) -> bool {
        self.loaded
    }

    /// What others were told last.
    pub(crate) const fn shown(&self) -> ModelStatus {
        self.shown
    }

    /// Since when, on the core's clock.
    pub(crate) const fn since_ms(&self) -> u64 {
        self.since_ms
    }

    /// Why it is what is shown.
    pub(crate) fn reason(&self) -> &str {
        &self.reason
    }

    /// What it was before, and for how long.
    pub(crate) const fn before(&self) -> Option<(ModelStatus, u64)> {
        self.before
    }

    /// Says why the next change comes; the newest word counts.
    pub(crate) fn note(&mut self, cause: impl Into<String>) {
        self.cause = Some(cause.into());
    }

    /// # Errors
    /// [`Unexpected`]: nothing was changed.
    pub(crate) fn apply(&mut self, event: LifeEvent) -> Result<(), Unexpected> {
        let Some(life) = next(&self.life, &event) else {
            return Err(Unexpected { life: self.life.clone(), event });
        };
        self.life = life;
        self.loaded = match event {
            LifeEvent::AllThere => true,
            LifeEvent::Heard { .. } => self.loaded,
            _ => self.loaded && self.life == Life::Ready && event != LifeEvent::SomeLeft,
        };
        Ok(())
    }

    /// Names the state anew. Gives the change where there is one.
    pub(crate) fn observe(&mut self, facts: &Facts, now_ms: u64) -> Option<Transition> {
        let (from, to) = (self.shown, status(&self.life, self.loaded, facts));
        if from == to {
            return None;
        }
        let after_ms = now_ms.saturating_sub(self.since_ms);
        let reason = self.cause.take().unwrap_or_else(|| by_itself(to).to_owned());
        self.before = Some((from, after_ms));
        (self.shown, self.since_ms) = (to, now_ms);
        reason.clone_into(&mut self.reason);
        Some(Transition { from, to, after_ms, reason })
    }
}

/// Why, where nobody said so.
const fn by_itself(to: ModelStatus) -> &'static str {
    match to {
        ModelStatus::Waiting => "its worker's turn to start has not come",
        ModelStatus::Starting => "its worker's turn to start has come",
        ModelStatus::Asleep => "its worker holds no weights on the device",
        ModelStatus::Waking => "it is needed",
        ModelStatus::Awake => "all its weights are on the device",
        ModelStatus::PartlyResident => "its worker holds a part of the weights on the device",
        ModelStatus::Draining => "others need its memory",
        ModelStatus::Restarting => "its worker's connection ended",
        ModelStatus::Failed => "its worker cannot serve it",
        ModelStatus::Stopped => "the server is ending",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lives() -> Vec<Life> {
        let reason = || "because".to_owned();
        vec![
            Life::Waiting { at_ms: 5, reason: reason() },
            Life::Awaited { until_ms: 9 },
            Life::Starting { heard_ms: 1, greeted: false },
            Life::Starting { heard_ms: 1, greeted: true },
            Life::Ready,
            Life::Ending,
            Life::Failed { reason: reason(), permanent: false },
            Life::Failed { reason: reason(), permanent: true },
            Life::Stopped,
        ]
    }

    fn events() -> Vec<LifeEvent> {
        let reason = || "because".to_owned();
        vec![
            LifeEvent::StartOrdered { now_ms: 1 },
            LifeEvent::Found { until_ms: 9 },
            LifeEvent::Greeted { now_ms: 1 },
            LifeEvent::Heard { now_ms: 1 },
            LifeEvent::Adopted,
            LifeEvent::Ready,
            LifeEvent::Lost,
            LifeEvent::Failed { reason: reason(), permanent: false },
            LifeEvent::Failed { reason: reason(), permanent: true },
            LifeEvent::Gone { at_ms: 5, reason: reason() },
            LifeEvent::GoneForGood,
            LifeEvent::AskedAgain { now_ms: 5 },
            LifeEvent::AllThere,
            LifeEvent::SomeLeft,
        ]
    }

    /// States that can have a process, and those that cannot.
    fn has_process(life: &Life) -> Option<bool> {
        match life {
            Life::Waiting { .. } | Life::Stopped => Some(false),
            Life::Failed { .. } => None,
            _ => Some(true),
        }
    }

    #[test]
    fn every_state_but_the_last_leads_to_ready_and_to_the_end() {
        for from in lives() {
            let mut reached = vec![from.clone()];
            let mut looked = 0;
            while looked < reached.len() {
                let life = reached[looked].clone();
                looked += 1;
                for event in events() {
                    if let Some(to) = next(&life, &event)
                        && !reached.iter().any(|known| same(known, &to))
                    {
                        reached.push(to);
                    }
                }
            }
            assert!(reached.iter().any(|life| same(life, &Life::Stopped)), "{from:?} never ends");
            let serves = reached.iter().any(|life| same(life, &Life::Ready));
            assert_eq!(serves, from != Life::Stopped, "{from:?} leads to {reached:?}");
        }
    }

    fn same(one: &Life, other: &Life) -> bool {
        let key = |life: &Life| match life {
            Life::Starting { greeted, .. } => (3, *greeted),
            Life::Failed { permanent, .. } => (6, *permanent),
            Life::Waiting { .. } => (1, false),
            Life::Awaited { .. } => (2, false),
            Life::Ready => (4, false),
            Life::Ending => (5, false),
            Life::Stopped => (7, false),
        };
        key(one) == key(other)
    }

    /// I1 and I2 rest on it: a second process beside one that may live would be a second owner of the model's lease.
    #[test]
    fn only_the_end_of_a_process_leads_to_a_state_without_one() {
        for life in lives() {
            for event in events() {
                let Some(to) = next(&life, &event) else { continue };
                let is_gone = matches!(
                    event,
                    LifeEvent::Gone { .. } | LifeEvent::GoneForGood | LifeEvent::AskedAgain { .. }
                );
                if has_process(&life) == Some(true) && has_process(&to) == Some(false) {
                    assert!(is_gone, "{life:?} and {event:?} gave {to:?}");
                    assert!(!matches!(event, LifeEvent::AskedAgain { .. }), "{life:?} has a process");
                }
                if has_process(&life) == Some(false) && has_process(&to) == Some(true) {
                    assert!(
                        matches!(event, LifeEvent::StartOrdered { .. } | LifeEvent::Found { .. }),
                        "{life:?} and {event:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_cannot_happen_changes_nothing_and_weights_are_there_only_while_it_serves() {
        for life in lives() {
            for first in events() {
                for second in events() {
                    let mut cycle = Lifecycle::new(life.clone(), "a test");
                    for event in [LifeEvent::AllThere, first.clone(), second.clone()] {
                        let before = (cycle.life.clone(), cycle.loaded);
                        let expected = next(&cycle.life, &event);
                        match cycle.apply(event) {
                            Ok(()) => assert_eq!(Some(&cycle.life), expected.as_ref()),
                            Err(unexpected) => {
                                assert_eq!((&cycle.life, cycle.loaded), (&before.0, before.1));
                                assert!(expected.is_none(), "{unexpected}");
                            }
                        }
                        assert!(!cycle.loaded || cycle.is_ready(), "{life:?} {first:?} {second:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_change_is_told_once_with_how_long_and_why() {
        let mut cycle =
            Lifecycle::new(Life::Waiting { at_ms: 0, reason: String::new() }, "the server starts");
        let facts = Facts { was_started: true, ..Facts::default() };
        cycle.apply(LifeEvent::StartOrdered { now_ms: 5 }).expect("its turn");
        let started = cycle.observe(&facts, 5).expect("a change");
        assert_eq!((started.to, started.after_ms), (ModelStatus::Starting, 5));
        assert_eq!(cycle.observe(&facts, 6), None);
        cycle.apply(LifeEvent::Ready).expect("it starts");
        cycle.note("it was loaded");
        let asleep = cycle.observe(&facts, 105).expect("a change");
        assert_eq!(
            (asleep.to, asleep.after_ms, asleep.reason.as_str()),
            (ModelStatus::Asleep, 100, "it was loaded")
        );
        assert_eq!((cycle.since_ms(), cycle.reason()), (105, "it was loaded"));
        assert_eq!(cycle.before(), Some((ModelStatus::Starting, 100)));
        let half = Facts { weights: ByteCount::mib(2), ..facts };
        assert_eq!(cycle.observe(&half, 200).map(|change| change.to), Some(ModelStatus::PartlyResident));
    }
}
