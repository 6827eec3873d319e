//! A request's way to its worker.

use std::fmt::{self, Debug};
use std::net::SocketAddr;
use std::path::PathBuf;
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
    /// More bytes of the answer came; told now and then.
    fn more_bytes(&self);
    /// No byte of its worker came for so long, and one is waited for.
    fn no_byte(&self, waited: Duration);
    /// The request ended, one way or another.
    fn ended(&self);
}

/// Where a worker, or a program that takes its place, answers HTTP/1.1.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// At a Unix socket.
    Unix(PathBuf),
    /// At an address of this machine.
    Tcp(SocketAddr),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(address) => write!(f, "http://{address}"),
        }
    }
}

/// A request's way to its worker. The model counts as busy until this is dropped.
#[derive(Debug)]
pub struct Route {
    target: Target,
    waited: Duration,
    was_asleep: bool,
    asked: Instant,
    told_first_byte: AtomicBool,
    sink: Option<Arc<dyn RouteSink>>,
}

impl Route {
    /// A route to `target` for a request that waited so long for its model. `sink` hears how it goes.
    #[must_use]
    pub fn new(target: Target, waited: Duration, was_asleep: bool, sink: Option<Arc<dyn RouteSink>>) -> Self {
        let now = Instant::now();
        let asked = now.checked_sub(waited).unwrap_or(now);
        Self { target, waited, was_asleep, asked, told_first_byte: AtomicBool::new(false), sink }
    }

    /// Where the worker answers HTTP/1.1.
    #[must_use]
    pub const fn target(&self) -> &Target {
        &self.target
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

    /// Say that more bytes of the answer came.
    pub fn more_bytes(&self) {
        if let Some(sink) = &self.sink {
            sink.more_bytes();
        }
    }

    /// Say that a byte of its worker has been waited for so long. The worker may be ended for it.
    pub fn no_byte(&self, waited: Duration) {
        if let Some(sink) = &self.sink {
            sink.no_byte(waited);
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
