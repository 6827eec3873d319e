//! A request's way to its worker.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use utoipa::ToSchema;

use crate::state::ModelStatus;

/// Hears what becomes of a routed request. The shelf implements it; tests may bring their own.
pub trait RouteSink: Debug + Send + Sync {
    /// The first byte of the answer came, so long after the request did.
    fn first_byte(&self, after: Duration, was_asleep: bool);
    /// So many tokens were generated.
    fn tokens(&self, count: u64);
    /// The request ended, one way or another.
    fn ended(&self);
}

/// A request's way to its worker. The model counts as busy until this is dropped.
#[derive(Debug)]
pub struct Route {
    socket: PathBuf,
    waited: Duration,
    was_asleep: bool,
    asked: Instant,
    told_first_byte: AtomicBool,
    sink: Option<Arc<dyn RouteSink>>,
}

impl Route {
    /// A route to `socket` for a request that waited so long for its model. `sink` hears how it goes.
    #[must_use]
    pub fn new(
        socket: PathBuf,
        waited: Duration,
        was_asleep: bool,
        sink: Option<Arc<dyn RouteSink>>,
    ) -> Self {
        let now = Instant::now();
        let asked = now.checked_sub(waited).unwrap_or(now);
        Self { socket, waited, was_asleep, asked, told_first_byte: AtomicBool::new(false), sink }
    }

    /// The Unix socket on which the worker answers HTTP/1.1.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// How long the request waited for its model.
    #[must_use]
    pub const fn waited(&self) -> Duration {
        self.waited
    }

    /// The model was not wholly on the device when the request came.
    #[must_use]
    pub const fn was_asleep(&self) -> bool {
        self.was_asleep
    }

    /// Say that the first byte of the answer came. Only the first call counts.
    pub fn first_byte(&self) {
        if !self.told_first_byte.swap(true, Ordering::Relaxed)
            && let Some(sink) = &self.sink
        {
            sink.first_byte(self.asked.elapsed(), self.was_asleep);
        }
    }

    /// Say that so many more tokens were generated.
    pub fn tokens(&self, count: u64) {
        if let Some(sink) = &self.sink {
            sink.tokens(count);
        }
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        if let Some(sink) = &self.sink {
            sink.ended();
        }
    }
}

/// What came of an order to the shelf.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, ToSchema)]
pub struct Report {
    /// Which model.
    pub model: String,
    /// What it is doing now.
    pub status: ModelStatus,
    /// Bytes brought to the device or given up there.
    #[schema(value_type = u64)]
    pub bytes: ByteCount,
    /// Of them, copied; the rest was dropped, because a valid copy lies elsewhere.
    #[schema(value_type = u64)]
    pub copied: ByteCount,
    /// How long it took (milliseconds).
    pub duration_ms: f64,
    /// What was done, in a sentence.
    pub summary: String,
}
