//! Why a request was not routed, and why the shelf could not do what it was told.

use std::path::PathBuf;
use std::time::Duration;

use shoal_core::bytes::ByteCount;

/// Why a request was not routed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RouteError {
    /// No model has that name (404).
    #[error("there is no model {name:?}; there are: {}", known.join(", "))]
    UnknownModel {
        /// The name that was asked for.
        name: String,
        /// Those there are, in the configuration's order.
        known: Vec<String>,
    },
    /// The model cannot be served, now or at all (503).
    #[error("model {model:?} cannot be served: {reason}")]
    Failed {
        /// Which.
        model: String,
        /// Why.
        reason: String,
        /// When it may be worth asking again; none where only a person can help.
        retry_after: Option<Duration>,
    },
    /// Too many requests wait already (429).
    #[error("{parked} requests wait for model {model:?} already, and {limit} may")]
    Full {
        /// Which.
        model: String,
        /// How many wait.
        parked: usize,
        /// How many may: for this model, or in all.
        limit: usize,
        /// When it may be worth asking again.
        retry_after: Duration,
    },
    /// Too many requests of one key wait already, and others are to find room (429).
    #[error(
        "{parked} requests of key {key:?} wait for model {model:?} already, and it may have no more while {left} places are \
         left for all"
    )]
    KeyFull {
        /// Which.
        model: String,
        /// The key's name.
        key: String,
        /// How many of its requests wait.
        parked: usize,
        /// Places that are left in the model's queue.
        left: usize,
        /// When it may be worth asking again.
        retry_after: Duration,
    },
    /// The model was not there before the request's deadline (504).
    #[error("model {model:?} was not there within {:.1} s: {reason}", waited.as_secs_f64())]
    Deadline {
        /// Which.
        model: String,
        /// How long the request had waited.
        waited: Duration,
        /// What it was still waiting for.
        reason: String,
    },
    /// The server is ending (503).
    #[error("the server is shutting down")]
    ShuttingDown,
}

/// Why the shelf could not do what it was told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ShelfError {
    /// No model has that name.
    #[error("there is no model {name:?}; there are: {}", known.join(", "))]
    UnknownModel {
        /// The name that was asked for.
        name: String,
        /// Those there are, in the configuration's order.
        known: Vec<String>,
    },
    /// The model is not in a state in which that can be done.
    #[error("model {model:?}: {reason}")]
    Refused {
        /// Which.
        model: String,
        /// Why.
        reason: String,
    },
    /// It was not done in time; it may still be done later.
    #[error("model {model:?} did not get there within {:.1} s: {reason}", waited.as_secs_f64())]
    Deadline {
        /// Which.
        model: String,
        /// How long it was waited for.
        waited: Duration,
        /// What is still missing.
        reason: String,
    },
    /// Another server uses the runtime directory.
    #[error(
        "another shoal server (process {pid}) uses {}; stop it, or choose another directory with SHOAL_RUNTIME_DIR",
        path.display()
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// The other server's process.
        pid: String,
    },
    /// Another server keeps its disk tier in this directory.
    #[error(
        "{} (process {pid}) keeps its disk tier in {}; {}", if *is_own { "this very server" } else { "another shoal server" },
        path.display(),
        if *is_own { "two entries of `disk` lead there: give each a directory of its own" }
            else { "give each server a directory of its own in `disk`" }
    )]
    DiskInUse {
        /// The directory.
        path: PathBuf,
        /// The other server's process.
        pid: String,
        /// Whether that is this process: two entries that only the system knows to be one, or two servers in it.
        is_own: bool,
    },
    /// A path that becomes a Unix socket's is too long for one.
    #[error("{} is {} bytes long; a Unix socket's path may have {limit}: choose a shorter runtime directory", path.display(), path.as_os_str().len())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// The most bytes there may be.
        limit: usize,
    },
    /// The guaranteed minimums do not fit.
    #[error("the models' minimums add up to {sum}, which is more than the device budget of {budget}")]
    Minimums {
        /// Their sum.
        sum: ByteCount,
        /// What there is.
        budget: ByteCount,
    },
    /// A system call failed.
    #[error("{what} {}", path.display())]
    Io {
        /// What was being done, such as `"cannot create"`.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// A configuration is wrong; the one before holds.
    #[error("{reason}")]
    Configuration {
        /// What is wrong.
        reason: String,
    },
    /// The server is ending.
    #[error("the server is shutting down")]
    ShuttingDown,
}
