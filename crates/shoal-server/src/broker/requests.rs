//! Requests for models: routed at once where the model is awake, else parked until it is.

use std::time::Duration;

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use tokio::sync::oneshot;

use super::orders::Reclaim;
use super::{Core, Life, PARKED_TOTAL_MAX, lifecycle};
use crate::config::SleepDepth;
use crate::shelf::{Caller, RouteError, ShelfError, Target};
use crate::state::{EventKind, ModelStatus};

/// When a full queue may be worth another try.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// A model is there.
#[derive(Clone, Debug)]
pub(crate) struct Reached {
    pub(crate) place: usize,
    pub(crate) target: Target,
    pub(crate) waited_ms: u64,
    pub(crate) was_asleep: bool,
    /// Bytes that came to the device while it was waited for, and how many of them were copied.
    pub(crate) brought: (ByteCount, ByteCount),
}

/// What a carried out order came to.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) bytes: ByteCount,
    pub(crate) copied: ByteCount,
    pub(crate) duration_ms: u64,
    pub(crate) error: Option<String>,
}

/// What somebody who waits for a model wants of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// To send it a request of this caller.
    Route(Caller),
    /// To have it awake.
    Wake,
}

/// Somebody who waits for a model.
#[derive(Debug)]
pub(crate) struct Parked {
    pub(crate) ticket: u64,
    pub(crate) wanted: Wanted,
    pub(crate) since_ms: u64,
    pub(crate) deadline_ms: u64,
    /// The model was not there when it began to wait.
    pub(crate) was_asleep: bool,
    /// What wakes had brought and copied when it began to wait.
    pub(crate) brought_before: (ByteCount, ByteCount),
    pub(crate) answer: oneshot::Sender<Result<Reached, RouteError>>,
}

/// How a request began.
#[derive(Debug)]
pub(crate) enum Begun {
    /// The model is awake and has a place.
    Reached(Reached),
    /// It is not, or has none; the answer comes later.
    Parked { place: usize, ticket: u64, answer: oneshot::Receiver<Result<Reached, RouteError>> },
}

impl Core {
    /// The names there are, in the order of the shelf.
    fn known(&self) -> Vec<String> {
        let on_it = self.models.iter().filter(|model| !model.is_removed);
        on_it.map(|model| model.name.clone()).collect()
    }

    pub(crate) fn place_of(&self, name: &str) -> Result<usize, RouteError> {
        self.by_name
            .get(name)
            .copied()
            .ok_or_else(|| RouteError::UnknownModel { name: name.to_owned(), known: self.known() })
    }

    /// A request begins, or somebody wants a model awake.
    ///
    /// # Errors
    /// [`RouteError`]: unknown, failed, too many waiting (in all, or of its key), shutting down.
    pub(crate) fn handle_wanted(
        &mut self,
        name: &str,
        wanted: Wanted,
        now_ms: u64,
        deadline_ms: u64,
    ) -> Result<Begun, RouteError> {
        let place = self.place_of(name)?;
        if self.stopping {
            return Err(RouteError::ShuttingDown);
        }
        let is_up = self.models[place].is_up();
        let is_taken = match &wanted {
            Wanted::Route(_) => {
                let model = &self.models[place];
                model.takes_requests() && model.queue.requests() == 0 && model.has_room()
            }
            Wanted::Wake => is_up,
        };
        if is_taken {
            let was_idle = self.models[place].is_idle_inside();
            if let Wanted::Route(caller) = &wanted {
                self.models[place].queue.begin(caller, now_ms);
            }
            let reached = self.reach(place, &wanted, was_idle, (now_ms, now_ms), !is_up);
            self.settle(now_ms);
            return Ok(Begun::Reached(reached));
        }
        if wanted == Wanted::Wake {
            self.try_again(place, now_ms);
        }
        if let Some((reason, retry_ms)) = self.unavailable(place, now_ms) {
            self.models[place].counts.refused += 1;
            self.tell(now_ms, Some(place), EventKind::RequestRefused { reason: reason.clone() });
            let retry_after = retry_ms.map(Duration::from_millis);
            return Err(RouteError::Failed { model: name.to_owned(), reason, retry_after });
        }
        if let Some(error) = self.no_room_to_wait(place, &wanted) {
            self.models[place].counts.refused += 1;
            self.tell(now_ms, Some(place), EventKind::RequestRefused { reason: error.to_string() });
            return Err(error);
        }
        let ticket = self.number();
        let (answer, receiver) = oneshot::channel();
        let model = &mut self.models[place];
        let brought_before = model.brought;
        let was_asleep = !is_up;
        let parked =
            Parked { ticket, wanted, since_ms: now_ms, deadline_ms, was_asleep, brought_before, answer };
        model.queue.push(parked, now_ms);
        let parked = model.queue.len() as u64;
        // Of a model that is there, that a line has formed; it grows and shrinks with each request.
        if was_asleep || parked == 1 {
            self.tell(now_ms, Some(place), EventKind::RequestParked { parked });
        }
        self.settle(now_ms);
        Ok(Begun::Parked { place, ticket, answer: receiver })
    }

    /// Why one more cannot wait, where it cannot: the queue is full, or its key has as much of it as it may.
    fn no_room_to_wait(&self, place: usize, wanted: &Wanted) -> Option<RouteError> {
        let model = &self.models[place];
        let in_all: usize = self.models.iter().map(|model| model.queue.len()).sum();
        let limit = self.config.limits.parked_max as usize;
        for (parked, limit) in [(model.queue.len(), limit), (in_all, PARKED_TOTAL_MAX)] {
            if parked >= limit {
                let model = model.name.clone();
                return Some(RouteError::Full { model, parked, limit, retry_after: RETRY_AFTER });
            }
        }
        let Wanted::Route(caller) = wanted else { return None };
        let key = caller.name().filter(|_| caller.has_rivals())?;
        let (parked, left) = model.queue.share(caller, limit);
        (parked >= left).then(|| RouteError::KeyFull {
            model: model.name.clone(),
            key: key.to_owned(),
            parked,
            left,
            retry_after: RETRY_AFTER,
        })
    }

    fn reach(
        &mut self,
        place: usize,
        wanted: &Wanted,
        was_idle: bool,
        (since_ms, now_ms): (u64, u64),
        was_asleep: bool,
    ) -> Reached {
        let contended = !self.asked.is_empty();
        let is_request = matches!(wanted, Wanted::Route(_));
        if is_request {
            self.note_request(place, was_idle, was_asleep, now_ms);
        }
        let model = &mut self.models[place];
        model.note_pause(now_ms);
        model.last_used_ms = Some(now_ms);
        if is_request {
            model.counts.requests += 1;
        }
        // While somebody waits for memory, no turn begins anew. It begins once there is KV for a request.
        if was_idle && !contended {
            model.turn_since_ms = None;
        }
        let waited_ms = now_ms.saturating_sub(since_ms);
        let brought = (ByteCount::ZERO, ByteCount::ZERO);
        Reached { place, target: model.target.clone(), waited_ms, was_asleep, brought }
    }

    /// Answers those who waited for a model that is there now, as far as it has places for them.
    pub(super) fn unpark(&mut self, place: usize, now_ms: u64) {
        while self.models[place].takes_requests() {
            let model = &mut self.models[place];
            let (has_room, was_idle, is_up) = (model.has_room(), model.is_idle_inside(), model.is_up());
            let Some(parked) = model.queue.next(has_room, is_up, now_ms) else { return };
            let sent = !parked.answer.is_closed() && {
                let times = (parked.since_ms, now_ms);
                let mut reached = self.reach(place, &parked.wanted, was_idle, times, parked.was_asleep);
                let (bytes, copied) = self.models[place].brought;
                let (bytes_before, copied_before) = parked.brought_before;
                reached.brought = (bytes.saturating_sub(bytes_before), copied.saturating_sub(copied_before));
                parked.answer.send(Ok(reached)).is_ok()
            };
            if let (Wanted::Route(caller), false) = (&parked.wanted, sent) {
                self.models[place].queue.end(caller, now_ms);
            }
        }
    }

    /// Tells all who wait for a model that it will not come.
    pub(super) fn refuse_parked(
        &mut self,
        place: usize,
        reason: &str,
        retry_after: Option<Duration>,
        now_ms: u64,
    ) {
        let stopping = self.stopping;
        let model = &mut self.models[place];
        let parked = model.queue.drain();
        if parked.is_empty() {
            return;
        }
        model.counts.refused += parked.len() as u64;
        let error = if stopping {
            RouteError::ShuttingDown
        } else {
            RouteError::Failed { model: model.name.clone(), reason: reason.to_owned(), retry_after }
        };
        for waiting in parked {
            // Whoever asked may have gone.
            let _ = waiting.answer.send(Err(error.clone()));
        }
        self.tell(now_ms, Some(place), EventKind::RequestRefused { reason: reason.to_owned() });
    }

    /// Somebody's time to wait is over. Gives what they were waiting for, in words.
    pub(crate) fn handle_too_late(&mut self, place: usize, ticket: u64, now_ms: u64) -> String {
        let reason = self.what_it_waits_for(place, now_ms);
        let model = &mut self.models[place];
        model.queue.remove(ticket);
        model.counts.refused += 1;
        self.tell(now_ms, Some(place), EventKind::RequestRefused { reason: reason.clone() });
        self.settle(now_ms);
        reason
    }

    /// Somebody went away while waiting, if they were still waiting.
    pub(crate) fn handle_left(&mut self, place: usize, ticket: u64, now_ms: u64) {
        if self.models[place].queue.remove(ticket) {
            self.settle(now_ms);
        }
    }

    pub(super) fn what_it_waits_for(&self, place: usize, now_ms: u64) -> String {
        let model = &self.models[place];
        let asked = self.asked.iter().find(|asked| asked.pending.model == model.id);
        match (model.life(), asked) {
            (Life::Ready, _) if model.takes_requests() => {
                let (active, most) = (model.queue.active(), model.config.parallel_max);
                format!("it is there and answers {active} other requests ({most} at the same time at most)")
            }
            (Life::Ready, Some(asked)) => asked.waits_for.clone(),
            (Life::Ready, None) if model.is_ending(self.book.held(model.id, LeaseKind::Weights)) => {
                "its command has ended, and what it started has not: that is ended first".to_owned()
            }
            (Life::Ready, None) => model
                .waits_for
                .clone()
                .unwrap_or_else(|| "its weights are still being brought back".to_owned()),
            (Life::Waiting { at_ms, reason }, _) if *at_ms > now_ms => {
                format!("it is to be started again: {reason}")
            }
            (Life::Waiting { .. }, _) => "its worker's turn to start has not come".to_owned(),
            (Life::Awaited { .. }, _) => "the worker of the server before is to say what it holds".to_owned(),
            (Life::Starting { .. }, _) => format!(
                "its worker is starting{}",
                model.progress.as_ref().map(|progress| format!(" ({progress})")).unwrap_or_default()
            ),
            (Life::Ending, _) => "its worker has ended and is to be started again".to_owned(),
            (Life::Failed { reason, .. }, _) => reason.clone(),
            (Life::Stopped, _) => "the server is shutting down".to_owned(),
        }
    }

    /// A routed request is over.
    pub(crate) fn handle_route_ended(&mut self, place: usize, caller: &Caller, now_ms: u64) {
        let model = &mut self.models[place];
        model.queue.end(caller, now_ms);
        model.waiting_inside = model.waiting_inside.saturating_sub(1);
        model.last_used_ms = Some(now_ms);
        if model.queue.active() == 0 && model.queue.is_empty() {
            model.idle_since_ms = Some(now_ms);
        }
        self.settle(now_ms);
    }

    /// Puts a model to sleep but for the part `keep` of its weights.
    ///
    /// # Errors
    /// [`ShelfError`]: unknown, pinned, not ready.
    pub(crate) fn handle_sleep(
        &mut self,
        name: &str,
        keep: f64,
        now_ms: u64,
    ) -> Result<(usize, Option<oneshot::Receiver<Told>>), ShelfError> {
        let place = self.shelf_place(name)?;
        let model = &self.models[place];
        let refuse = |reason: String| Err(ShelfError::Refused { model: name.to_owned(), reason });
        if !keep.is_finite() || !(0.0..=1.0).contains(&keep) {
            return refuse(format!("keep is {keep}; it is a part between 0 and 1"));
        }
        if model.is_rigid() && keep > 0.0 && keep < 1.0 {
            return refuse("its engine is a command, which gives up all that it holds or nothing".to_owned());
        }
        if model.retiring.is_some() {
            return refuse("its worker is on its way out: it was configured otherwise".to_owned());
        }
        if !model.is_ready() {
            return refuse(
                format!("it is {:?} and has nothing on the device", model.cycle.shown()).to_lowercase(),
            );
        }
        if model.pinned {
            return refuse("it is pinned; unpin it first".to_owned());
        }
        if model.config.sleep == SleepDepth::None {
            let reason = "it does not sleep (`sleep = \"none\"` in its table); with \"source\" or \"host\" there, and a reload, it does";
            return refuse(reason.to_owned());
        }
        let held = self.book.held(model.id, LeaseKind::Weights) + self.book.held(model.id, LeaseKind::Kv);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a part between 0 and 1 of a byte count"
        )]
        let kept = ByteCount((model.weights_total.0 as f64 * keep) as u64);
        let bytes = held.saturating_sub(kept).saturating_sub(model.ordered());
        if bytes.is_zero() {
            return Ok((place, None));
        }
        let (sender, receiver) = oneshot::channel();
        self.order_reclaim(
            place,
            Reclaim { bytes, ..Reclaim::default() },
            "it was told to sleep".to_owned(),
            Some(sender),
            now_ms,
        );
        self.settle(now_ms);
        Ok((place, Some(receiver)))
    }

    /// Pins or unpins a model. Where it is to be brought back for that, gives what ends when that is no longer wanted.
    ///
    /// # Errors
    /// [`ShelfError::UnknownModel`].
    pub(crate) fn handle_pin(
        &mut self,
        name: &str,
        pinned: bool,
        now_ms: u64,
    ) -> Result<(usize, Option<oneshot::Receiver<()>>), ShelfError> {
        let place = self.shelf_place(name)?;
        if self.models[place].pinned != pinned {
            self.models[place].pinned = pinned;
            self.tell(now_ms, Some(place), EventKind::Pinned { pinned });
        }
        let model = &mut self.models[place];
        let mut wake = None;
        if !pinned {
            model.pin_wake = None;
            if model.is_ready() {
                model.error = None;
            }
        } else if !model.is_up() && model.pin_wake.is_none() {
            let (wanted, unwanted) = oneshot::channel();
            model.pin_wake = Some(wanted);
            wake = Some(unwanted);
        }
        self.settle(now_ms);
        Ok((place, wake))
    }

    /// A pinned model came back, or `failed` to.
    pub(crate) fn handle_pin_woke(&mut self, place: usize, failed: Option<String>, now_ms: u64) {
        let model = &mut self.models[place];
        model.pin_wake = None;
        let Some(reason) = failed else { return };
        let reason = format!("it is pinned, but could not be brought to the device: {reason}");
        if model.is_ready() {
            model.error = Some(reason.clone());
        }
        self.tell(now_ms, Some(place), EventKind::WakeFailed { reason });
    }

    pub(crate) fn shelf_place(&self, name: &str) -> Result<usize, ShelfError> {
        if self.stopping {
            return Err(ShelfError::ShuttingDown);
        }
        self.by_name
            .get(name)
            .copied()
            .ok_or_else(|| ShelfError::UnknownModel { name: name.to_owned(), known: self.known() })
    }

    pub(crate) fn status_of(&self, place: usize) -> ModelStatus {
        let model = &self.models[place];
        let weights = self.book.held(model.id, LeaseKind::Weights);
        lifecycle::status(model.life(), model.cycle.loaded(), &model.facts(weights, self.stopping))
    }
}
