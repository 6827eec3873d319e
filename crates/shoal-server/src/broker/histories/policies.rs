//! Processes of policies: they start, answer in time, late, wrongly or not at all, and end.

use shoal_core::bytes::ByteCount;
use shoal_core::ids::ModelId;
use shoal_core::policy::{Action, Plan, Policy, Value};
use tokio::sync::mpsc;

use super::shelf::thinks_for_ever;
use super::world::World;
use crate::broker::Core;
use crate::broker::outside::{Question, Standing};

/// A process that says nothing for so long is ended.
const SILENCE_MS_MAX: u64 = 2_000;

/// What comes of a question.
#[derive(Clone, Copy)]
enum Manner {
    Good,
    Nothing,
    Wrong,
    Raises,
    Never,
}

enum Stage {
    /// It can be asked from then on.
    Comes {
        at_ms: u64,
    },
    Ready,
    Thinks {
        question: Box<Question>,
        manner: Manner,
        until_ms: u64,
    },
}

pub(super) struct PolicyProcess {
    id: u64,
    questions: mpsc::Receiver<Question>,
    stage: Stage,
}

impl World {
    pub(super) fn next_policy_ms(&self) -> Option<u64> {
        let next = |process: &PolicyProcess| match &process.stage {
            Stage::Comes { at_ms } => Some(*at_ms),
            Stage::Ready => None,
            Stage::Thinks { until_ms, .. } => Some(*until_ms),
        };
        self.policies.iter().filter_map(next).min()
    }

    pub(super) fn keep_policies(&mut self) {
        let now_ms = self.now_ms;
        let Core { outside, outside_shadow, .. } = &mut self.core;
        for policy in [outside, outside_shadow].into_iter().flatten() {
            if let Some(questions) = policy.take_questions() {
                let stage = Stage::Comes { at_ms: now_ms + 1 + self.dice.roll(300) };
                self.policies.push(PolicyProcess { id: policy.id, questions, stage });
            }
        }
        self.policies.retain(|process| !process.questions.is_closed());
        for index in 0..self.policies.len() {
            self.keep_policy(index);
        }
    }

    fn keep_policy(&mut self, index: usize) {
        let now_ms = self.now_ms;
        let process = &mut self.policies[index];
        let id = process.id;
        match std::mem::replace(&mut process.stage, Stage::Ready) {
            Stage::Comes { at_ms } if at_ms <= now_ms => {
                // What the one before was asked and did not hear: nobody waits for that any more.
                while process.questions.try_recv().is_ok() {}
                self.core.handle_policy_stands(id, Standing::Ready, now_ms);
            }
            Stage::Ready => {}
            Stage::Thinks { question, manner, until_ms } if until_ms <= now_ms => {
                let answer = match manner {
                    Manner::Good => Ok(Value.plan(&question.state, question.now_ms)),
                    Manner::Nothing => Ok(Plan::default()),
                    Manner::Wrong => Ok(wrong()),
                    Manner::Raises => Err("it raised".to_owned()),
                    Manner::Never => {
                        process.stage = Stage::Comes { at_ms: now_ms + 200 + self.dice.roll(2_000) };
                        self.seen.unanswered += 1;
                        let reason = "it said nothing".to_owned();
                        return self.core.handle_policy_stands(id, Standing::Down(reason), now_ms);
                    }
                };
                self.core.handle_planned(id, question.number, answer, now_ms);
            }
            later => process.stage = later,
        }
        self.hear_question(index);
    }

    fn hear_question(&mut self, index: usize) {
        let is_calm = self.is_steady();
        let process = &mut self.policies[index];
        if !matches!(process.stage, Stage::Ready) {
            return;
        }
        let Ok(question) = process.questions.try_recv() else { return };
        self.seen.questions += 1;
        let manner = match self.dice.roll(100) {
            _ if is_calm && thinks_for_ever(self.seed) => Manner::Never,
            0..80 => Manner::Good,
            _ if is_calm => Manner::Good,
            80..86 => Manner::Nothing,
            86..91 => Manner::Wrong,
            91..95 => Manner::Raises,
            _ => Manner::Never,
        };
        // In time, or not: it has 100 ms.
        let takes_ms = match manner {
            Manner::Never => SILENCE_MS_MAX,
            _ if is_calm => 1 + self.dice.roll(20),
            _ => 1 + self.dice.roll(150),
        };
        let until_ms = self.now_ms + takes_ms;
        process.stage = Stage::Thinks { question: Box::new(question), manner, until_ms };
    }
}

/// A plan that must not be obeyed.
fn wrong() -> Plan {
    let reason = "a model that there is not gives memory that it does not have".to_owned();
    let action = Action::Evict {
        model: ModelId(77),
        bytes: ByteCount::mib(2),
        cached_last: false,
        reason,
        requester: None,
    };
    Plan { actions: vec![action], again_at_ms: None }
}
