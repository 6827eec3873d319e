//! What happened, one value each, with the reason where somebody decided it.

use serde::{Deserialize, Serialize};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;
use utoipa::ToSchema;

use super::snapshot::ModelStatus;

/// Version of the forms of snapshot and events.
pub const SCHEMA_VERSION: u32 = 1;

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Grows by one from event to event; starts at 1 with the server.
    pub id: u64,
    /// Version of this form.
    pub version: u32,
    /// When (milliseconds since the Unix epoch).
    pub at_ms: u64,
    /// The model it is about; none where it is about the server.
    pub model: Option<String>,
    /// What happened, in a sentence with its numbers and its reason.
    pub text: String,
    /// What.
    #[serde(flatten)]
    pub what: EventKind,
}

/// What happened; `kind` names the variant.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum EventKind {
    /// The server began.
    ServerStarted {
        /// `"sim"` or `"cuda:N"`.
        device: String,
        /// Device bytes to share.
        #[schema(value_type = u64)]
        budget: ByteCount,
    },
    /// The server is ending.
    ServerStopping {
        /// Why.
        reason: String,
    },
    /// Another configuration holds from now on.
    Reloaded {
        /// Models that are new.
        added: Vec<String>,
        /// Models that are not there any more.
        removed: Vec<String>,
        /// Models that are served by another worker from now on.
        restarted: Vec<String>,
        /// Models of which only limits changed.
        changed: Vec<String>,
        /// Policies in Python whose code changed, and is read anew.
        #[serde(default)]
        policies: Vec<String>,
        /// Keys of `[server]` that changed and count from the next start of the server.
        needs_restart: Vec<String>,
    },
    /// A configuration was not taken; the one before holds.
    ReloadRefused {
        /// What is wrong with it.
        reason: String,
    },
    /// A model's status changed.
    StatusChanged {
        /// Before.
        from: ModelStatus,
        /// Now.
        to: ModelStatus,
        /// How long it was what it was before (milliseconds).
        #[serde(default)]
        after_ms: u64,
        /// Its lease for weights on the device now.
        #[serde(default)]
        #[schema(value_type = u64)]
        bytes: ByteCount,
        /// Why.
        #[serde(default)]
        reason: String,
    },
    /// A worker process was started.
    WorkerStarted {
        /// Its process id.
        pid: u32,
        /// How many were started for this model, this one included.
        starts: u32,
        /// Why now.
        reason: String,
    },
    /// The worker of a server before this one goes on under this one.
    WorkerAdopted {
        /// Its process id.
        pid: u32,
        /// Device bytes that it holds.
        #[schema(value_type = u64)]
        leased: ByteCount,
        /// Sum of all leases with them.
        #[schema(value_type = u64)]
        leased_in_all: ByteCount,
        /// Host bytes that it may use.
        #[schema(value_type = u64)]
        host: ByteCount,
        /// How long it was waited for (milliseconds).
        after_ms: u64,
    },
    /// The worker of a server before this one is ended.
    WorkerLeft {
        /// Its process id.
        pid: u32,
        /// Why it cannot go on.
        reason: String,
    },
    /// A worker said how far loading is.
    WorkerLoading {
        /// `"reading"`, `"placing"`, ...
        phase: String,
        /// Bytes done.
        #[schema(value_type = u64)]
        done: ByteCount,
        /// Bytes in all.
        #[schema(value_type = u64)]
        total: ByteCount,
    },
    /// A worker is ready; its model sleeps.
    WorkerReady {
        /// Its process id.
        pid: u32,
        /// Bytes of the weights.
        #[schema(value_type = u64)]
        weights: ByteCount,
    },
    /// A worker process ended.
    WorkerExited {
        /// Its process id.
        pid: u32,
        /// `"exit code 1"`, `"signal 9 (SIGKILL)"`, ...
        status: String,
        /// Device bytes that it had leased, which come back with it. A program's lease is told as returned by itself
        /// (`lease_returned`) right after.
        #[schema(value_type = u64)]
        returned: ByteCount,
        /// Of those, leased until they are seen to be free (`memory_returned`).
        #[serde(default)]
        #[schema(value_type = u64)]
        returning: ByteCount,
        /// It was told to end, by a server that ends too or because others needed its memory.
        #[serde(default)]
        asked: bool,
    },
    /// A worker will be started again.
    RestartScheduled {
        /// In how many milliseconds.
        delay_ms: u64,
        /// Why.
        reason: String,
    },
    /// A model cannot be served.
    ModelFailed {
        /// `"model_missing"`, `"budget"`, `"crash_loop"`, ...
        code: String,
        /// Why, and what would be right.
        reason: String,
    },
    /// A request waits for its model.
    RequestParked {
        /// How many wait for this model now.
        parked: u64,
    },
    /// A request was not routed.
    RequestRefused {
        /// Why.
        reason: String,
    },
    /// A model's weights are being brought back.
    WakeStarted {
        /// Bytes that are missing.
        #[schema(value_type = u64)]
        bytes: ByteCount,
        /// Why.
        reason: String,
    },
    /// A wake has all of its device memory: requests go to the worker, which computes as the bytes arrive.
    WakeBacked {
        /// Bytes that were missing when it was ordered.
        #[schema(value_type = u64)]
        bytes: ByteCount,
        /// How long after the order (milliseconds).
        after_ms: u64,
        /// Requests that waited for it.
        parked: u64,
    },
    /// A model's weights are back.
    WakeDone {
        /// Bytes brought back.
        #[schema(value_type = u64)]
        bytes: ByteCount,
        /// How long it took from the order on (milliseconds).
        duration_ms: u64,
        /// Requests that waited for it.
        parked: u64,
    },
    /// A wake did not succeed.
    WakeFailed {
        /// Why.
        reason: String,
    },
    /// A model was ordered to give device memory up.
    EvictStarted {
        /// How much.
        #[schema(value_type = u64)]
        bytes: ByteCount,
        /// For whom and why it was chosen.
        reason: String,
        /// The model that needs it; none where a person ordered it, or it was idle too long.
        #[serde(default)]
        requester: Option<String>,
        /// Number of the decision in the decision log; none where a person ordered it.
        decision: Option<u64>,
    },
    /// A model gave device memory up.
    EvictDone {
        /// How much.
        #[schema(value_type = u64)]
        bytes: ByteCount,
        /// Of it, copied first; the rest was clean.
        #[schema(value_type = u64)]
        copied: ByteCount,
        /// How long it took from the order on (milliseconds).
        duration_ms: u64,
        /// What stood in the way.
        error: Option<String>,
    },
    /// A model did not give device memory up in time; others are asked.
    EvictTimedOut {
        /// What was ordered.
        #[schema(value_type = u64)]
        bytes: ByteCount,
        /// What is missing.
        #[schema(value_type = u64)]
        missing: ByteCount,
        /// After how long (milliseconds).
        after_ms: u64,
    },
    /// A lease grew.
    LeaseGranted {
        /// What for.
        #[schema(value_type = String)]
        lease: LeaseKind,
        /// By how much.
        #[schema(value_type = u64)]
        bytes: ByteCount,
        /// Sum of all leases after it.
        #[schema(value_type = u64)]
        leased: ByteCount,
        /// Why, and out of what.
        reason: String,
        /// How long it had waited (milliseconds).
        waited_ms: u64,
        /// Number of the decision in the decision log.
        decision: Option<u64>,
    },
    /// A lease request was turned down.
    LeaseDenied {
        /// What for.
        #[schema(value_type = String)]
        lease: LeaseKind,
        /// How much.
        #[schema(value_type = u64)]
        bytes: ByteCount,
        /// Why.
        reason: String,
        /// Number of the decision in the decision log.
        decision: Option<u64>,
    },
    /// A lease shrank.
    LeaseReturned {
        /// What for.
        #[schema(value_type = String)]
        lease: LeaseKind,
        /// By how much.
        #[schema(value_type = u64)]
        bytes: ByteCount,
        /// Sum of all leases after it.
        #[schema(value_type = u64)]
        leased: ByteCount,
    },
    /// A worker was seen to have more of the device than it leased.
    Drifted {
        /// What the driver shows of it.
        #[schema(value_type = u64)]
        seen: ByteCount,
        /// Its lease.
        #[schema(value_type = u64)]
        leased: ByteCount,
    },
    /// What others have of the device changed, and with it what models share.
    DeviceTaken {
        /// What others have: other processes, the driver.
        #[schema(value_type = u64)]
        others: ByteCount,
        /// What models have beyond their leases.
        #[schema(value_type = u64)]
        drift: ByteCount,
        /// What comes off the budget because of both.
        #[schema(value_type = u64)]
        taken: ByteCount,
        /// What is left to share.
        #[schema(value_type = u64)]
        left: ByteCount,
        /// What is leased beyond that, and to come back.
        #[schema(value_type = u64)]
        owed: ByteCount,
        /// The largest of the other processes that the driver shows, in words.
        who: Vec<String>,
    },
    /// The memory of a process that ended was seen to be free.
    MemoryReturned {
        /// Its process id.
        pid: u32,
        /// How much it was.
        #[schema(value_type = u64)]
        bytes: ByteCount,
        /// How long after its end (milliseconds).
        after_ms: u64,
        /// False where nobody saw it: what is missing counts as others' then.
        seen: bool,
    },
    /// The device's memory cannot be read.
    DriverLost {
        /// Why.
        reason: String,
    },
    /// The device's memory can be read again.
    DriverFound {
        /// Who is asked.
        source: String,
    },
    /// A worker's overhead was measured to be larger than declared.
    OverheadCorrected {
        /// Its lease for overhead now.
        #[schema(value_type = u64)]
        overhead: ByteCount,
        /// What could not be covered yet.
        #[schema(value_type = u64)]
        uncovered: ByteCount,
    },
    /// A worker does not answer.
    WorkerSilent {
        /// Its process id.
        pid: u32,
        /// For how long (milliseconds).
        silent_ms: u64,
        /// After how long it is ended (milliseconds).
        silent_ms_max: u64,
        /// Device bytes that it has leased.
        #[schema(value_type = u64)]
        leased: ByteCount,
    },
    /// A worker that did not answer does again.
    WorkerHeard {
        /// Its process id.
        pid: u32,
        /// After how long (milliseconds).
        after_ms: u64,
    },
    /// A worker did not answer, or did nothing of its work, for too long; it is ended.
    WorkerHung {
        /// Its process id.
        pid: u32,
        /// Device bytes that it has leased, which come back with its end.
        #[schema(value_type = u64)]
        leased: ByteCount,
        /// What it did not do, and for how long.
        reason: String,
    },
    /// A worker broke the protocol; it is ended.
    ProtocolError {
        /// How.
        reason: String,
    },
    /// Much of the moving is for nothing: models come back soon after they left.
    Thrashing {
        /// Bytes of weights that came back within a minute of leaving, in the last minute.
        #[schema(value_type = u64)]
        thrashed: ByteCount,
        /// Weights that requests of that minute were answered with.
        #[schema(value_type = u64)]
        served: ByteCount,
    },
    /// A policy that is not ours planned what must not be done; ours decided.
    PolicyRefused {
        /// Its name.
        policy: String,
        /// Who decided.
        instead: String,
        /// What was wrong.
        reason: String,
    },
    /// A model was pinned or unpinned.
    Pinned {
        /// Pinned now.
        pinned: bool,
    },
}

impl EventKind {
    /// The value of `kind` in JSON.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::ServerStarted { .. } => "server_started",
            Self::ServerStopping { .. } => "server_stopping",
            Self::Reloaded { .. } => "reloaded",
            Self::ReloadRefused { .. } => "reload_refused",
            Self::StatusChanged { .. } => "status_changed",
            Self::WorkerStarted { .. } => "worker_started",
            Self::WorkerAdopted { .. } => "worker_adopted",
            Self::WorkerLeft { .. } => "worker_left",
            Self::WorkerLoading { .. } => "worker_loading",
            Self::WorkerReady { .. } => "worker_ready",
            Self::WorkerExited { .. } => "worker_exited",
            Self::RestartScheduled { .. } => "restart_scheduled",
            Self::ModelFailed { .. } => "model_failed",
            Self::RequestParked { .. } => "request_parked",
            Self::RequestRefused { .. } => "request_refused",
            Self::WakeStarted { .. } => "wake_started",
            Self::WakeBacked { .. } => "wake_backed",
            Self::WakeDone { .. } => "wake_done",
            Self::WakeFailed { .. } => "wake_failed",
            Self::EvictStarted { .. } => "evict_started",
            Self::EvictDone { .. } => "evict_done",
            Self::EvictTimedOut { .. } => "evict_timed_out",
            Self::LeaseGranted { .. } => "lease_granted",
            Self::LeaseDenied { .. } => "lease_denied",
            Self::LeaseReturned { .. } => "lease_returned",
            Self::Drifted { .. } => "drifted",
            Self::DeviceTaken { .. } => "device_taken",
            Self::MemoryReturned { .. } => "memory_returned",
            Self::DriverLost { .. } => "driver_lost",
            Self::DriverFound { .. } => "driver_found",
            Self::OverheadCorrected { .. } => "overhead_corrected",
            Self::WorkerSilent { .. } => "worker_silent",
            Self::WorkerHeard { .. } => "worker_heard",
            Self::WorkerHung { .. } => "worker_hung",
            Self::ProtocolError { .. } => "protocol_error",
            Self::Thrashing { .. } => "thrashing",
            Self::PolicyRefused { .. } => "policy_refused",
            Self::Pinned { .. } => "pinned",
        }
    }
}
