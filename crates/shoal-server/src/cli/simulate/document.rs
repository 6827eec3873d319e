//! What `shoal simulate` found, as a document: `--json` prints it, and the words for people are made from it.

use serde::Serialize;
use shoal_core::bytes::ByteCount;
use shoal_core::ids::ModelId;
use shoal_core::policy::Action;
use shoal_core::simulate::{Figures, Kind, Report};

use crate::bounded::bounded;

/// A policy of somebody's own may say anything.
const REASON_CHARS_MAX: usize = 2_000;

/// All of it.
#[derive(Debug, Serialize)]
pub(super) struct Document {
    /// The file.
    pub(super) configuration: String,
    pub(super) assumes: Assumes,
    pub(super) trace: TraceFacts,
    pub(super) models: Vec<ModelFacts>,
    /// Under the policy asked for.
    pub(super) result: Report,
    /// Under whole-model LRU.
    pub(super) whole_model_lru: Report,
    /// The latter's figures over the former's.
    pub(super) ratio: Ratio,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) decisions: Option<Vec<Decision>>,
    /// Later ones, of which there are too many for a document.
    #[serde(skip_serializing_if = "is_none")]
    pub(super) decisions_left_out: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
const fn is_none(count: &u64) -> bool {
    *count == 0
}

/// What no measurement of this machine says.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Assumes {
    pub(super) device_budget: ByteCount,
    /// None: room for a copy of every model.
    pub(super) host_budget: Option<ByteCount>,
    pub(super) link_gib_s: f64,
    pub(super) source_gib_s: f64,
    pub(super) overhead: ByteCount,
    pub(super) prefill_tokens_s: f64,
    pub(super) decode_tokens_s: f64,
    pub(super) quantum_s: f64,
    pub(super) wait_s_max: f64,
    /// All of it in words, a sentence each.
    pub(super) sentences: Vec<String>,
}

/// The requests.
#[derive(Clone, Debug, Serialize)]
pub(super) struct TraceFacts {
    /// In words.
    pub(super) from: String,
    pub(super) requests: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seed: Option<u64>,
}

/// What is known of a model.
#[derive(Debug, Serialize)]
pub(super) struct ModelFacts {
    pub(super) name: String,
    pub(super) weights_bytes: ByteCount,
    /// Who says so: `files`, `configuration` or `command line`.
    pub(super) size_from: &'static str,
    /// What bringing all of it back takes, alone on the link.
    pub(super) wake_s: f64,
    /// The part that host memory has a copy of.
    pub(super) host_part: f64,
}

/// Whole-model LRU's figure over that of the policy; none where that is zero.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Ratio {
    pub(super) first_token_p50: Option<f64>,
    pub(super) first_token_p99: Option<f64>,
    pub(super) first_token_mean: Option<f64>,
    pub(super) wakes: Option<f64>,
    pub(super) moved: Option<f64>,
    pub(super) thrash: Option<f64>,
}

impl Ratio {
    pub(super) fn of(lru: &Figures, ours: &Figures) -> Self {
        let over = |lru: f64, ours: f64| (ours > 0.0).then_some(lru / ours);
        let spread = |of: fn(&shoal_core::simulate::Spread) -> f64| {
            over(of(lru.first_token_s.as_ref()?), of(ours.first_token_s.as_ref()?))
        };
        Self {
            first_token_p50: spread(|spread| spread.p50),
            first_token_p99: spread(|spread| spread.p99),
            first_token_mean: spread(|spread| spread.mean),
            wakes: over(lru.wakes as f64, ours.wakes as f64),
            moved: over(lru.moved_bytes.0 as f64, ours.moved_bytes.0 as f64),
            thrash: over(lru.thrash_index, ours.thrash_index),
        }
    }
}

/// One thing that was decided.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Decision {
    pub(super) at_s: f64,
    /// As in the decision log.
    #[serde(rename = "do")]
    pub(super) act: &'static str,
    pub(super) model: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bytes: Option<ByteCount>,
    pub(super) reason: String,
}

impl Decision {
    pub(super) fn of(at_ms: u64, action: &Action, kinds: &[Kind]) -> Self {
        let (act, model, bytes, reason) = match action {
            Action::Evict { model, bytes, reason, .. } => ("evict", model, Some(*bytes), reason),
            Action::Restore { model, bytes, reason } => ("restore", model, Some(*bytes), reason),
            Action::Grant { model, bytes, reason, .. } => ("grant", model, Some(*bytes), reason),
            Action::Deny { model, reason, .. } => ("deny", model, None, reason),
            Action::Wait { model, reason, .. } => ("wait", model, None, reason),
        };
        let name = |ModelId(id): &ModelId| {
            kinds.get(*id as usize).map_or_else(|| format!("model {id}"), |kind| kind.name.clone())
        };
        Self {
            at_s: at_ms as f64 / 1e3,
            act,
            model: name(model),
            bytes,
            reason: bounded(reason, REASON_CHARS_MAX),
        }
    }
}
