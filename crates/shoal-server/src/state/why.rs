//! Why a model is as it is, in sentences: what `shoal why` and the page show.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::event::{Event, EventKind};
use super::snapshot::ModelStatus;

/// Why one model is as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Why {
    /// Which.
    pub model: String,
    /// When this was said (milliseconds since the Unix epoch).
    pub at_ms: u64,
    /// What it is doing.
    pub status: ModelStatus,
    /// How it stands now, a sentence each, with the numbers: what it holds, who asks for it, what it waits for, what
    /// keeps it where it is.
    pub now: Vec<String>,
    /// What was decided about it and came of that, and what others had to give up for it; oldest first. `text` says each
    /// in a sentence.
    pub decisions: Vec<Event>,
    /// Older decisions there were, as far as events are kept.
    pub earlier: u64,
    /// Where every decision is written with the state it was made from.
    pub log: String,
}

impl EventKind {
    /// Something that was decided, or that explains a decision: not how the ledger or a figure moved because of it, nor a
    /// grant out of what was free.
    #[must_use]
    pub const fn explains(&self) -> bool {
        !matches!(
            self,
            Self::StatusChanged { .. }
                | Self::WorkerLoading { .. }
                | Self::RequestParked { .. }
                | Self::LeaseReturned { .. }
                | Self::LeaseGranted { waited_ms: 0, .. }
        )
    }

    /// The model for which another one had to give memory up.
    #[must_use]
    pub fn requester(&self) -> Option<&str> {
        match self {
            Self::EvictStarted { requester, .. } => requester.as_deref(),
            _ => None,
        }
    }
}
