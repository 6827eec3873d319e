//! A policy that decides in another process: asked, waited for, and done without.
//!
//! Apart from [`super::settle`], which carries plans out, because a plan of this kind comes later than its question. Here is
//! who is asked what and until when; the process itself is kept by the shelf's task. Nothing in the core waits: while an
//! answer is due, nothing is decided, for `policy_wait` at most; then, and whenever there is no good answer (the process is
//! starting, has ended, is still at an earlier question, raised, planned what must not be done), `value` decides.
//!
//! An answer is for the state that was asked about, and others may have acted since. So it is checked against the state of
//! now; what was good and is not any more is asked anew, a few times. Nobody is asked twice about the same state before the
//! plan's own `again_at_ms`. A request that a plan leaves waiting beyond its deadline is denied in its place.

use std::sync::Arc;

use serde::{Serialize, Serializer};
use shoal_core::policy::{Action, Plan, ShelfState, check};
use tokio::sync::mpsc;

use super::Core;
use crate::bounded::bounded;
use crate::shelf::Code;
use crate::state::EventKind;

/// How often in a row a plan may come too late for what it was made from.
const STALE_MAX: u32 = 3;
/// The soonest that a plan may ask for another one.
const AGAIN_MS_MIN: u64 = 10;
/// Actions of one plan.
const ACTIONS_MAX: usize = 4_096;
/// Characters of a reason that are kept.
pub(crate) const REASON_CHARS_MAX: usize = 400;

/// A question on its way to the process.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Question {
    /// The answer says it again.
    #[serde(rename = "question")]
    pub(crate) number: u64,
    /// A time of the same clock as those in `state`.
    pub(crate) now_ms: u64,
    #[serde(serialize_with = "inside")]
    pub(crate) state: Arc<ShelfState>,
}

fn inside<S: Serializer>(state: &Arc<ShelfState>, serializer: S) -> Result<S::Ok, S::Error> {
    state.as_ref().serialize(serializer)
}

/// Whether the process can be asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Starting,
    Ready,
    /// Not, and why.
    Down(String),
}

#[derive(Debug)]
struct Open {
    question: Question,
    until_ms: u64,
    /// Others decided meanwhile; it has not answered yet.
    is_late: bool,
    /// What was decided of that state, where it only watches.
    live: Option<Plan>,
}

/// What came of asking.
#[derive(Debug)]
enum Said {
    Plan(Plan),
    /// Nothing yet.
    Pending(u64),
    /// Another has to decide, because of this.
    Instead(String),
}

/// One policy outside.
#[derive(Debug)]
pub(crate) struct Outside {
    /// Names its process among those of other configurations.
    pub(crate) id: u64,
    pub(crate) name: String,
    wait_ms: u64,
    standing: Standing,
    /// What its newest process has read; none before the first one was ready.
    code: Option<Code>,
    questions: mpsc::Sender<Question>,
    /// Until a task takes it.
    receiver: Option<mpsc::Receiver<Question>>,
    open: Option<Open>,
    /// What it was asked about, and what it said.
    answer: Option<Result<(Arc<ShelfState>, Plan), String>>,
    /// What was last decided about, and when to ask again though nothing has changed.
    settled: Option<(Arc<ShelfState>, u64)>,
    stale: u32,
    /// Why another decided last, where one did.
    pub(crate) instead: Option<String>,
    /// Questions that it could not be asked, or that it did not answer well, where it only watches.
    pub(crate) missed: u64,
}

impl Outside {
    pub(crate) fn new(id: u64, name: &str, wait_ms: u64) -> Self {
        let (questions, receiver) = mpsc::channel(1);
        Self {
            id,
            name: name.to_owned(),
            wait_ms,
            standing: Standing::Starting,
            code: None,
            questions,
            receiver: Some(receiver),
            open: None,
            answer: None,
            settled: None,
            stale: 0,
            instead: None,
            missed: 0,
        }
    }

    pub(crate) const fn take_questions(&mut self) -> Option<mpsc::Receiver<Question>> {
        self.receiver.take()
    }

    fn stands(&mut self, mut standing: Standing) {
        if let Standing::Down(reason) = &mut standing {
            *reason = bounded(reason, REASON_CHARS_MAX);
            if self.open.take().is_some() {
                self.answer = Some(Err(reason.clone()));
            }
        }
        self.standing = standing;
    }

    /// Asks, where that can be done.
    fn ask(
        &mut self,
        number: u64,
        state: Arc<ShelfState>,
        live: Option<Plan>,
        now_ms: u64,
    ) -> Result<u64, String> {
        match &self.standing {
            Standing::Ready => {}
            Standing::Starting => return Err("its process is starting".to_owned()),
            Standing::Down(reason) => return Err(reason.clone()),
        }
        if self.open.is_some() {
            return Err(format!("it is still at a question that it had {} ms for", self.wait_ms));
        }
        let question = Question { number, now_ms, state };
        if self.questions.try_send(question.clone()).is_err() {
            return Err("its process takes no questions".to_owned());
        }
        let until_ms = now_ms + self.wait_ms;
        self.open = Some(Open { question, until_ms, is_late: false, live });
        Ok(until_ms)
    }

    /// What it says of `state`.
    fn consult(&mut self, number: u64, state: &ShelfState, now_ms: u64) -> Said {
        match self.answer.take() {
            Some(Ok((about, plan))) => match check(state, &plan) {
                Ok(()) => {
                    self.stale = 0;
                    let is_of_now = *about == *state;
                    let again_at = plan.again_at_ms.unwrap_or(u64::MAX);
                    self.settled = Some((about, again_at));
                    // One that does nothing says nothing of what has happened since: that is asked below.
                    if is_of_now || plan.actions.iter().any(|action| !matches!(action, Action::Wait { .. })) {
                        return Said::Plan(plan);
                    }
                }
                Err(_) if self.stale < STALE_MAX => self.stale += 1,
                Err(wrong) => {
                    self.stale = 0;
                    return Said::Instead(format!("its plans came too late each time: {wrong}"));
                }
            },
            Some(Err(reason)) => return Said::Instead(reason),
            None => {}
        }
        if let Some(open) = &mut self.open {
            if now_ms < open.until_ms && !open.is_late {
                return Said::Pending(open.until_ms);
            }
            open.is_late = true;
            return Said::Instead(format!("it did not answer within {} ms", self.wait_ms));
        }
        if let Some((_, again_at)) = self.settled.as_ref().filter(|(about, _)| **about == *state)
            && now_ms < *again_at
        {
            let again_at_ms = Some(*again_at).filter(|at| *at < u64::MAX);
            return Said::Plan(Plan { actions: Vec::new(), again_at_ms });
        }
        match self.ask(number, Arc::new(state.clone()), None, now_ms) {
            Ok(until_ms) => Said::Pending(until_ms),
            Err(reason) => Said::Instead(reason),
        }
    }

    /// An answer came. Gives its question where it was waited for.
    fn answered(&mut self, number: u64) -> Option<Open> {
        self.open.take_if(|open| open.question.number == number)
    }
}

/// A plan as it may be used: bounded, and with reasons that can be shown anywhere.
fn tidied(mut plan: Plan, state: &ShelfState, now_ms: u64) -> Result<Plan, String> {
    if plan.actions.len() > ACTIONS_MAX {
        return Err(format!(
            "it planned {} actions at once, and {ACTIONS_MAX} are the most",
            plan.actions.len()
        ));
    }
    for action in &mut plan.actions {
        if let Action::Restore { model, bytes, .. } = action
            && let Some(found) = state.models.iter().find(|known| known.id == *model)
        {
            *bytes = found.weights_total.saturating_sub(found.weights_held);
        }
        let (Action::Evict { reason, .. }
        | Action::Restore { reason, .. }
        | Action::Grant { reason, .. }
        | Action::Deny { reason, .. }
        | Action::Wait { reason, .. }) = action;
        *reason = bounded(reason, REASON_CHARS_MAX);
        if reason.is_empty() {
            return Err("it gave an action without a reason".to_owned());
        }
    }
    plan.again_at_ms = plan.again_at_ms.map(|at| at.max(now_ms + AGAIN_MS_MIN));
    Ok(plan)
}

impl Core {
    /// What the policy outside decides, if one does; the name of who decided. None while it is waited for, until when.
    pub(super) fn decide_outside(
        &mut self,
        state: &ShelfState,
        now_ms: u64,
    ) -> Option<Result<(Plan, String), u64>> {
        let number = self.number();
        let outside = self.outside.as_mut()?;
        match outside.consult(number, state, now_ms) {
            Said::Pending(until_ms) => {
                let mut plan = Plan { actions: Vec::new(), again_at_ms: Some(until_ms) };
                deny_overdue(
                    &mut plan,
                    state,
                    &format!("{} had not decided by its deadline", outside.name),
                    now_ms,
                );
                // When the next deadline is there, or it is done without.
                let again_at_ms = plan.again_at_ms.unwrap_or(until_ms);
                let name = outside.name.clone();
                Some(if plan.actions.is_empty() { Err(again_at_ms) } else { Ok((plan, name)) })
            }
            Said::Plan(mut plan) => {
                outside.instead = None;
                let name = outside.name.clone();
                deny_overdue(&mut plan, state, &format!("{name} left it waiting until its deadline"), now_ms);
                Some(Ok((plan, name)))
            }
            Said::Instead(reason) => {
                let instead = self.policy.name().to_owned();
                let outside = self.outside.as_mut()?;
                let is_news = outside.instead.as_ref() != Some(&reason);
                outside.instead = Some(reason.clone());
                // A start is no trouble.
                if is_news && outside.standing != Standing::Starting {
                    let policy = outside.name.clone();
                    self.tell(
                        now_ms,
                        None,
                        EventKind::PolicyRefused { policy, instead: instead.clone(), reason },
                    );
                }
                Some(Ok((self.policy.plan(state, now_ms), instead)))
            }
        }
    }

    /// Lets the policy outside that only watches see what was decided.
    pub(super) fn watch_outside(&mut self, state: &ShelfState, live: &Plan, now_ms: u64) {
        if self.outside_shadow.is_none() {
            return;
        }
        let number = self.number();
        let Some(watcher) = &mut self.outside_shadow else { return };
        if watcher.settled.as_ref().is_some_and(|(about, _)| **about == *state) {
            return;
        }
        let state = Arc::new(state.clone());
        watcher.settled = Some((Arc::clone(&state), u64::MAX));
        if let Err(reason) = watcher.ask(number, state, Some(live.clone()), now_ms) {
            watcher.missed += 1;
            watcher.instead = Some(reason);
        }
    }

    fn outside_of(&mut self, id: u64) -> Option<&mut Outside> {
        [&mut self.outside, &mut self.outside_shadow].into_iter().flatten().find(|outside| outside.id == id)
    }

    /// The process of a policy has read its code.
    pub(crate) fn handle_policy_read(&mut self, id: u64, code: Code) {
        if let Some(outside) = self.outside_of(id) {
            outside.code = Some(code);
        }
    }

    /// Policies outside, and the code that each was read from; none where no process of it was ready yet.
    pub(crate) fn policies_read(&self) -> Vec<(u64, Option<Code>)> {
        let policies = [&self.outside, &self.outside_shadow].into_iter().flatten();
        policies.map(|outside| (outside.id, outside.code.clone())).collect()
    }

    /// The process of a policy is there, or not any more.
    pub(crate) fn handle_policy_stands(&mut self, id: u64, standing: Standing, now_ms: u64) {
        if let Some(outside) = self.outside_of(id) {
            outside.stands(standing);
            self.settle_answer(id, now_ms);
        }
    }

    /// What was said is for this moment or for none.
    fn settle_answer(&mut self, id: u64, now_ms: u64) {
        self.settle(now_ms);
        if let Some(outside) = self.outside_of(id) {
            outside.answer = None;
        }
    }

    /// The process of a policy answered.
    pub(crate) fn handle_planned(&mut self, id: u64, number: u64, answer: Result<Plan, String>, now_ms: u64) {
        let Some(outside) = self.outside_of(id) else { return };
        let Some(open) = outside.answered(number) else { return };
        let state = &open.question.state;
        let answer = answer.and_then(|plan| tidied(plan, state, now_ms)).and_then(|plan| {
            check(state, &plan)
                .map(|()| plan)
                .map_err(|wrong| format!("it planned what must not be done: {wrong}"))
        });
        let answer = answer.map_err(|reason| bounded(&reason, REASON_CHARS_MAX));
        let Some(live) = open.live else {
            // Of one that came late others have taken its place: it is asked again.
            if !open.is_late {
                outside.answer = Some(answer.map(|plan| (Arc::clone(state), plan)));
            }
            return self.settle_answer(id, now_ms);
        };
        match answer {
            Ok(said) => {
                outside.instead = None;
                if let Some(text) =
                    self.shadow.as_mut().and_then(|shadow| shadow.compare(state, &live, &said))
                {
                    self.shadow_said(text);
                }
            }
            Err(reason) => {
                outside.missed += 1;
                outside.instead = Some(reason);
            }
        }
    }
}

/// Nobody waits beyond its deadline, whatever a policy says.
fn deny_overdue(plan: &mut Plan, state: &ShelfState, why: &str, now_ms: u64) {
    let answers = |action: &Action, asked: &shoal_core::policy::PendingRequest| {
        matches!(action, Action::Grant { model, request, .. } | Action::Deny { model, request, .. }
            if *model == asked.model && *request == asked.request)
    };
    for asked in &state.requests {
        if plan.actions.iter().any(|action| answers(action, asked)) {
            continue;
        }
        if asked.deadline_ms > now_ms {
            plan.again_at_ms =
                Some(plan.again_at_ms.map_or(asked.deadline_ms, |at| at.min(asked.deadline_ms)));
            continue;
        }
        plan.actions.retain(|action| {
            !matches!(action, Action::Wait { model, request, .. }
                if *model == asked.model && *request == asked.request)
        });
        plan.actions.push(Action::Deny {
            model: asked.model,
            request: asked.request,
            never: false,
            reason: why.to_owned(),
        });
    }
}

#[cfg(test)]
mod tests {
    use shoal_core::bytes::ByteCount;
    use shoal_core::ids::ModelId;
    use shoal_core::policy::{ModelState, PendingRequest};
    use shoal_core::protocol::{FromServer, LeaseKind};

    use super::super::turn_tests::Bench;
    use super::*;

    const MIB: ByteCount = ByteCount::mib(1);

    fn state(asked_ms: u64) -> ShelfState {
        let chat =
            ModelState { name: "chat".to_owned(), ready: true, weights_total: MIB, ..ModelState::default() };
        let request = PendingRequest {
            model: ModelId(0),
            request: 1,
            kind: LeaseKind::Weights,
            bytes: MIB,
            bytes_min: MIB,
            asked_ms,
            deadline_ms: asked_ms + 1_000,
        };
        ShelfState {
            budget: MIB,
            extent: MIB,
            models: vec![chat],
            requests: vec![request],
            ..ShelfState::default()
        }
    }

    fn grant(reason: &str) -> Plan {
        let action = Action::Grant { model: ModelId(0), request: 1, bytes: MIB, reason: reason.to_owned() };
        Plan { actions: vec![action], again_at_ms: None }
    }

    fn asked() -> (Outside, mpsc::Receiver<Question>) {
        let mut outside = Outside::new(1, "python:a:b", 100);
        let receiver = outside.take_questions().expect("not taken yet");
        (outside, receiver)
    }

    #[test]
    fn it_is_waited_for_and_then_done_without() {
        let (mut outside, mut questions) = asked();
        let instead = |said: Said| match said {
            Said::Instead(reason) => reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(instead(outside.consult(1, &state(0), 0)), "its process is starting");
        outside.stands(Standing::Ready);
        assert!(matches!(outside.consult(2, &state(0), 0), Said::Pending(100)));
        assert!(matches!(outside.consult(3, &state(0), 99), Said::Pending(100)), "asked once");
        assert_eq!(questions.try_recv().map(|asked| asked.number), Ok(2));
        assert!(questions.try_recv().is_err());
        assert_eq!(instead(outside.consult(4, &state(0), 100)), "it did not answer within 100 ms");
        assert_eq!(
            instead(outside.consult(5, &state(0), 101)),
            "it did not answer within 100 ms",
            "and not anew"
        );
        assert!(outside.answered(9).is_none() && outside.answered(2).is_some_and(|open| open.is_late));
        // It has come round, and is asked again.
        assert!(matches!(outside.consult(6, &state(0), 150), Said::Pending(250)));
        outside.stands(Standing::Down("it was ended".to_owned()));
        assert_eq!(instead(outside.consult(7, &state(0), 151)), "it was ended");
        assert_eq!(instead(outside.consult(8, &state(0), 152)), "it was ended", "as long as it is not there");
    }

    #[test]
    fn what_others_changed_meanwhile_is_asked_anew_and_the_same_is_not() {
        let (mut outside, mut questions) = asked();
        outside.stands(Standing::Ready);
        let mut gone = state(0);
        gone.requests.clear();
        for number in 1..=u64::from(STALE_MAX) {
            assert!(matches!(outside.consult(number, &state(0), 0), Said::Pending(_)));
            assert!(outside.answered(number).is_some() && questions.try_recv().is_ok());
            outside.answer = Some(Ok((Arc::new(state(0)), grant("because"))));
            assert!(matches!(outside.consult(100, &gone, 0), Said::Pending(_)), "the request is gone");
            assert!(outside.answered(100).is_some() && questions.try_recv().is_ok());
        }
        outside.answer = Some(Ok((Arc::new(state(0)), grant("because"))));
        assert!(matches!(outside.consult(200, &gone, 0), Said::Instead(_)), "not for ever");
        // Nothing to do when nobody asked: says nothing of the request that came meanwhile.
        outside.answer = Some(Ok((Arc::new(gone), Plan::default())));
        assert!(matches!(outside.consult(210, &state(0), 0), Said::Pending(_)));
        assert!(outside.answered(210).is_some() && questions.try_recv().is_ok());
        let wait = Plan { actions: Vec::new(), again_at_ms: Some(500) };
        outside.answer = Some(Ok((Arc::new(state(0)), wait)));
        assert!(matches!(outside.consult(201, &state(0), 10), Said::Plan(_)));
        let Said::Plan(nothing) = outside.consult(202, &state(0), 499) else { panic!("nothing has changed") };
        assert_eq!((nothing.actions.len(), nothing.again_at_ms), (0, Some(500)));
        assert!(
            matches!(outside.consult(203, &state(0), 500), Said::Pending(_)),
            "it wanted to be asked again"
        );
    }

    /// A core that is to be decided for by a policy outside, which can be asked; and its questions.
    fn thinking(bench: &mut Bench, wait_ms: u64) -> mpsc::Receiver<Question> {
        let mut outside = Outside::new(7, "python:a:b", wait_ms);
        let questions = outside.take_questions().expect("not taken yet");
        bench.core.outside = Some(outside);
        bench.core.handle_policy_stands(7, Standing::Ready, 5);
        questions
    }

    #[test]
    fn who_waits_beyond_its_deadline_is_told_so_while_a_policy_thinks() {
        let mut bench = Bench::new();
        let mut questions = thinking(&mut bench, 10_000);
        bench.request(0, LeaseKind::Weights, MIB, 10);
        bench.request(1, LeaseKind::Weights, MIB, 1_000);
        let number = questions.try_recv().expect("it is asked").number;
        assert_eq!(bench.core.timer_ms, Some(5_010), "the next deadline is before its time is up");
        bench.core.handle_timer(5_010);
        let denied: Vec<_> = bench.told(0).into_iter().filter_map(denial).collect();
        assert_eq!(denied, ["python:a:b had not decided by its deadline"]);
        assert_eq!(bench.told(1).into_iter().filter_map(denial).count(), 0, "it has its time");
        assert_eq!(bench.core.timer_ms, Some(6_000));
        // What comes of the question then is for nobody; the other is asked about.
        bench.core.handle_planned(7, number, Ok(Plan::default()), 5_500);
        let again = questions.try_recv().expect("it is asked anew");
        assert_eq!(again.state.requests.iter().map(|asked| asked.model).collect::<Vec<_>>(), [ModelId(1)]);
    }

    fn denial(said: FromServer) -> Option<String> {
        if let FromServer::LeaseDeny { reason, .. } = said { Some(reason) } else { None }
    }

    #[test]
    fn what_it_raises_is_bounded_and_can_be_shown_anywhere() {
        let mut bench = Bench::new();
        let mut questions = thinking(&mut bench, 100);
        let long = format!("it raised \u{1b}[2J{}", "x".repeat(1 << 20));
        let is_fit = |text: &str| text.starts_with("it raised  [2Jxx") && text.len() == REASON_CHARS_MAX + 3;
        bench.request(0, LeaseKind::Weights, MIB, 10);
        let number = questions.try_recv().expect("it is asked").number;
        bench.core.handle_planned(7, number, Err(long.clone()), 20);
        bench.request(1, LeaseKind::Weights, MIB, 30);
        bench.core.handle_policy_stands(7, Standing::Down(long.clone()), 40);
        let refused: Vec<String> = bench
            .core
            .events
            .kept()
            .filter_map(|event| match &event.what {
                EventKind::PolicyRefused { reason, .. } => Some(reason.clone()),
                _ => None,
            })
            .collect();
        assert!(!refused.is_empty() && refused.iter().all(|reason| is_fit(reason)), "{refused:?}");
        assert!(bench.core.sharing_snapshot(50).instead.is_some_and(|reason| is_fit(&reason)));

        // One that watches too.
        let mut bench = Bench::new();
        let mut watcher = Outside::new(8, "python:a:c", 100);
        let mut questions = watcher.take_questions().expect("not taken yet");
        bench.core.outside_shadow = Some(watcher);
        bench.core.handle_policy_stands(8, Standing::Ready, 5);
        bench.request(0, LeaseKind::Weights, MIB, 10);
        let number = questions.try_recv().expect("it is asked").number;
        bench.core.handle_planned(8, number, Err(long), 20);
        let watcher = bench.core.outside_shadow.as_ref().expect("there");
        assert!(watcher.instead.as_ref().is_some_and(|reason| is_fit(reason)), "{:?}", watcher.instead);
    }

    #[test]
    fn plans_are_bounded_and_nobody_waits_beyond_a_deadline() {
        let text = format!("a\u{1b}[31m\n{}", "b".repeat(1_000));
        let plan = tidied(grant(&text), &state(0), 0).expect("good");
        let Action::Grant { reason, .. } = &plan.actions[0] else { panic!("{plan:?}") };
        assert!(reason.starts_with("a [31m b") && reason.chars().count() == REASON_CHARS_MAX + 3, "{reason}");
        assert!(tidied(grant(" \n"), &state(0), 0).is_err(), "a reason is part of an action");
        let again = Plan { actions: Vec::new(), again_at_ms: Some(0) };
        assert_eq!(
            tidied(again.clone(), &state(0), 70).map(|plan| plan.again_at_ms),
            Ok(Some(70 + AGAIN_MS_MIN))
        );
        let many = Plan { actions: vec![grant("x").actions[0].clone(); ACTIONS_MAX + 1], again_at_ms: None };
        assert!(tidied(many, &state(0), 0).is_err());
        let mut early = again;
        early.again_at_ms = Some(5_000);
        deny_overdue(&mut early, &state(0), "it waited", 10);
        assert_eq!((early.actions.len(), early.again_at_ms), (0, Some(1_000)));
        deny_overdue(&mut early, &state(0), "it waited", 1_000);
        assert!(matches!(&early.actions[..], [Action::Deny { never: false, .. }]), "{early:?}");
    }
}
