//! A policy beside the one that decides: what it would have done, counted.
//!
//! The shadow sees the same states and its plans are never carried out, so what it says of a moment is exact and what it
//! would have led to is not known: its own choices would have made other states. What is compared is who would be asked to
//! give up how much.

use std::collections::BTreeMap;

use super::policies::Policy;
use super::state::{Action, Plan, ShelfState};
use crate::bytes::ByteCount;
use crate::ids::ModelId;

/// How the shadow's plans differed, since the beginning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowCounts {
    /// Plans of the live policy that evicted something, or for whose state the shadow would have.
    pub decisions: u64,
    /// Of those, in how many the shadow would have asked others, or for more or less.
    pub differing: u64,
    /// Bytes that the live policy ordered.
    pub evicted_live: ByteCount,
    /// Bytes that the shadow would have ordered.
    pub evicted_shadow: ByteCount,
}

/// A policy that only watches.
#[derive(Debug)]
pub struct Shadow {
    name: String,
    /// None where others ask it and say what it planned.
    policy: Option<Box<dyn Policy>>,
    counts: ShadowCounts,
    /// What it last wanted where the live policy wanted nothing; it wants it again at each look then.
    alone: BTreeMap<ModelId, ByteCount>,
}

impl Shadow {
    /// Lets `policy` watch.
    #[must_use]
    pub fn new(policy: Box<dyn Policy>) -> Self {
        let name = policy.name().to_owned();
        Self { name, policy: Some(policy), counts: ShadowCounts::default(), alone: BTreeMap::new() }
    }

    /// Lets a policy of that name watch that cannot be asked from here: what it says is brought to [`Shadow::compare`].
    #[must_use]
    pub fn told(name: &str) -> Self {
        Self { name: name.to_owned(), policy: None, counts: ShadowCounts::default(), alone: BTreeMap::new() }
    }

    /// The name of the policy that watches.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What was counted.
    #[must_use]
    pub const fn counts(&self) -> ShadowCounts {
        self.counts
    }

    /// The live policy made `live` of `state`. Gives in words what the shadow would have done, where it differs.
    pub fn watch(&mut self, state: &ShelfState, live: &Plan, now_ms: u64) -> Option<String> {
        let said = self.policy.as_ref()?.plan(state, now_ms);
        self.compare(state, live, &said)
    }

    /// The live policy made `live` of `state`, and the shadow `said`. Gives in words what it would have done, where it
    /// differs.
    pub fn compare(&mut self, state: &ShelfState, live: &Plan, said: &Plan) -> Option<String> {
        let (live, shadow) = (evicted(live), evicted(said));
        if live.is_empty() && shadow.is_empty() {
            return None;
        }
        if !live.is_empty() {
            self.alone.clear();
        } else if self.alone == shadow {
            return None;
        } else {
            self.alone.clone_from(&shadow);
        }
        let sum = |evicted: &BTreeMap<ModelId, ByteCount>| evicted.values().copied().sum::<ByteCount>();
        self.counts.decisions += 1;
        self.counts.evicted_live += sum(&live);
        self.counts.evicted_shadow += sum(&shadow);
        if live == shadow {
            return None;
        }
        self.counts.differing += 1;
        Some(format!(
            "{} would have taken {} instead of {}",
            self.name(),
            in_words(state, &shadow),
            in_words(state, &live)
        ))
    }
}

fn evicted(plan: &Plan) -> BTreeMap<ModelId, ByteCount> {
    let mut evicted = BTreeMap::new();
    for action in &plan.actions {
        if let Action::Evict { model, bytes, .. } = action {
            *evicted.entry(*model).or_default() += *bytes;
        }
    }
    evicted
}

fn in_words(state: &ShelfState, evicted: &BTreeMap<ModelId, ByteCount>) -> String {
    if evicted.is_empty() {
        return "nothing".to_owned();
    }
    let name = |id: &ModelId| {
        let model = state.models.iter().find(|model| model.id == *id);
        model.map_or_else(|| id.to_string(), |model| model.name.clone())
    };
    let parts: Vec<String> = evicted.iter().map(|(id, bytes)| format!("{bytes} of {}", name(id))).collect();
    parts.join(" and ")
}
