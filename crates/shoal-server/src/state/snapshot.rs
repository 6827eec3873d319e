//! The shelf at one moment.

use serde::{Deserialize, Serialize};
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{LeaseKind, TierUsage, WeightsAtRest, WorkerCapabilities};
use shoal_core::tier::Tier;
use utoipa::ToSchema;

/// Everything the server knows, at one moment.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ShelfSnapshot {
    /// Version of this form.
    pub version: u32,
    /// When it was taken (milliseconds since the Unix epoch).
    pub at_ms: u64,
    /// When the server started (milliseconds since the Unix epoch).
    pub started_at_ms: u64,
    /// The newest event it contains the effect of.
    pub last_event_id: u64,
    /// The device that is shared.
    pub device: DeviceSnapshot,
    /// The tiers, fastest first.
    pub tiers: Vec<TierSnapshot>,
    /// The store of weights at rest, as a worker found it last; none where no worker has looked.
    #[serde(default)]
    pub weights_store: Option<WeightStoreSnapshot>,
    /// Lease requests that wait for memory, in the order in which they will be served.
    pub waiting: Vec<WaitingSnapshot>,
    /// The models, in the configuration's order.
    pub models: Vec<ModelSnapshot>,
    /// How memory is shared among them.
    #[serde(default)]
    pub sharing: SharingSnapshot,
}

impl ShelfSnapshot {
    /// The model of that name.
    #[must_use]
    pub fn model(&self, name: &str) -> Option<&ModelSnapshot> {
        self.models.iter().find(|model| model.name == name)
    }
}

/// The device that is shared.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct DeviceSnapshot {
    /// `"sim"` or `"cuda:N"`.
    pub name: String,
    /// True where device memory is simulated in RAM.
    pub simulated: bool,
    /// What all models together may hold.
    #[schema(value_type = u64)]
    pub budget: ByteCount,
    /// Beside the budget, and not leased; takes up overheads that turn out larger than declared, and is to stay free.
    #[schema(value_type = u64)]
    pub headroom: ByteCount,
    /// Of the budget, what others are seen to have: it cannot be leased.
    #[serde(default)]
    #[schema(value_type = u64)]
    pub taken: ByteCount,
    /// Sum of all leases.
    #[schema(value_type = u64)]
    pub leased: ByteCount,
    /// Of those, held by processes that died, until the driver shows that memory to be free.
    #[schema(value_type = u64)]
    pub returning: ByteCount,
    /// What can be leased at once.
    #[schema(value_type = u64)]
    pub free: ByteCount,
    /// What the device's driver shows; none before it was asked.
    #[serde(default)]
    pub driver: Option<DriverSnapshot>,
}

/// The device as its driver shows it, beside the ledger. Asked for every second.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct DriverSnapshot {
    /// Who was asked.
    pub source: String,
    /// How old the figures are (milliseconds).
    pub age_ms: u64,
    /// How long it took to read them (microseconds).
    #[serde(default)]
    pub took_us: u64,
    /// Why there are no newer ones, where they are late.
    pub lost: Option<String>,
    /// All of the device's memory.
    #[schema(value_type = u64)]
    pub total: ByteCount,
    /// What nobody has.
    #[schema(value_type = u64)]
    pub free: ByteCount,
    /// What processes of this server's models have.
    #[schema(value_type = u64)]
    pub ours: ByteCount,
    /// Of it, beyond their leases.
    #[schema(value_type = u64)]
    pub drift: ByteCount,
    /// What all others have: other processes, the driver itself.
    #[schema(value_type = u64)]
    pub others: ByteCount,
    /// The driver shows each model's process. Where not, models' figures are their own word.
    pub is_by_process: bool,
    /// Other processes that it shows, the largest first; not all where there are many.
    pub processes: Vec<ProcessSnapshot>,
}

/// Somebody else's process on the device.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ProcessSnapshot {
    /// Its number.
    pub pid: u32,
    /// Its name, where it can be seen from here.
    pub name: Option<String>,
    /// What it has; none where the driver does not say.
    #[schema(value_type = Option<u64>)]
    pub bytes: Option<ByteCount>,
}

/// One tier.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct TierSnapshot {
    /// Which.
    #[schema(value_type = String, example = "device")]
    pub tier: Tier,
    /// The most it may hold; none where nothing bounds it.
    #[schema(value_type = Option<u64>)]
    pub budget: Option<ByteCount>,
    /// What models hold there. On the source tier: bytes whose only copy off the device is the file they came from.
    #[schema(value_type = u64)]
    pub used: ByteCount,
}

/// Weights at rest, of all models together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct WeightStoreSnapshot {
    /// The directory.
    pub path: String,
    /// Models in it.
    pub models: u64,
    /// Their bytes.
    #[schema(value_type = u64)]
    pub bytes: ByteCount,
    /// What these would be if the models had nothing in common.
    #[schema(value_type = u64)]
    pub unshared: ByteCount,
    /// The most that they may be.
    #[schema(value_type = u64)]
    pub bytes_max: ByteCount,
    /// When a worker looked (milliseconds since the Unix epoch).
    pub looked_at_ms: u64,
}

impl From<&WeightsAtRest> for WeightStoreSnapshot {
    fn from(told: &WeightsAtRest) -> Self {
        let WeightsAtRest { models, bytes, unshared, bytes_max, looked_at_ms, .. } = *told;
        Self { path: told.path.clone(), models, bytes, unshared, bytes_max, looked_at_ms }
    }
}

/// A lease request that waits for memory.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct WaitingSnapshot {
    /// Who asks.
    pub model: String,
    /// What for.
    #[schema(value_type = String, example = "weights")]
    pub kind: LeaseKind,
    /// How many bytes.
    #[schema(value_type = u64)]
    pub bytes: ByteCount,
    /// For how long (milliseconds).
    pub waited_ms: u64,
    /// Until when (milliseconds since the Unix epoch).
    pub deadline_at_ms: u64,
    /// The worker's own words.
    pub reason: String,
}

/// Who decides how memory is shared, and what comes of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct SharingSnapshot {
    /// The policy: `"value"`, `"lru"`, `"python:MODULE:FUNCTION"`.
    pub policy: String,
    /// Why `value` decided in its place last, where it did.
    #[serde(default)]
    pub instead: Option<String>,
    /// Models are put to sleep for each other's sake (`evict`).
    pub evicts: bool,
    /// A busy model's turn (milliseconds).
    pub quantum_ms: u64,
    /// How much of the moving is for nothing, over all models.
    pub thrash: ThrashSnapshot,
    /// The policy that watches, where one does.
    pub shadow: Option<ShadowSnapshot>,
}

/// How much of the moving was for nothing: bytes of weights that came back to the device within a minute of leaving it.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ThrashSnapshot {
    /// `thrashed` over `served`: at 1 every request of the last minute has paid for bringing a whole model back that had
    /// just left; at 0.01 one in a hundred has.
    pub index: f64,
    /// Such bytes in the last minute.
    #[schema(value_type = u64)]
    pub thrashed: ByteCount,
    /// Weights that requests of the last minute were answered with: all of its model's for each.
    #[schema(value_type = u64)]
    pub served: ByteCount,
    /// Such bytes since the server started.
    #[schema(value_type = u64)]
    pub total: ByteCount,
}

/// What the policy that watches would have done.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ShadowSnapshot {
    /// Its name.
    pub policy: String,
    /// Decisions in which it or the live policy took memory from somebody.
    pub decisions: u64,
    /// Of those, in how many it would have taken it from others, or another amount.
    pub differing: u64,
    /// Bytes that the live policy took.
    #[schema(value_type = u64)]
    pub evicted_live: ByteCount,
    /// Bytes that it would have taken.
    #[schema(value_type = u64)]
    pub evicted_shadow: ByteCount,
    /// The newest difference, in words.
    pub last: Option<String>,
    /// Decisions that it could not see, or of which it said nothing that may be.
    #[serde(default)]
    pub missed: u64,
    /// Why it missed the last one, where it did.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// What a model is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ModelStatus {
    /// Its worker's turn to start has not come yet.
    Waiting,
    /// Its worker is starting or loading.
    Starting,
    /// Ready, with no weights on the device.
    Asleep,
    /// Its weights are on their way to the device.
    Waking,
    /// All its weights are on the device.
    Awake,
    /// A part of its weights is on the device.
    PartlyResident,
    /// It answers its last requests before it gives all its memory up, as what is not elastic does and what a reload replaces;
    /// or a command has ended, and what it started is ended after it.
    Draining,
    /// Its worker died; another will be started.
    Restarting,
    /// It cannot be served; `error` says why.
    Failed,
    /// The server is shutting down.
    Stopped,
}

/// One model.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ModelSnapshot {
    /// What clients call it.
    pub name: String,
    /// Where it comes from.
    pub source: String,
    /// `"transformers"`, `"vllm"`, `"command"`.
    pub engine: String,
    /// What it is doing.
    pub status: ModelStatus,
    /// Since when and why, and what it was before.
    #[serde(default)]
    pub state: StateSnapshot,
    /// Progress of loading, in words; while starting.
    pub progress: Option<String>,
    /// What is wrong, in a sentence.
    pub error: Option<String>,
    /// Where its bytes are.
    pub bytes: ModelBytes,
    /// Its lease on device memory.
    pub lease: LeaseSnapshot,
    /// Never evicted.
    pub pinned: bool,
    /// Higher yields later.
    pub priority: i32,
    /// Never evicted below.
    #[schema(value_type = u64)]
    pub min: ByteCount,
    /// Never leased more.
    #[schema(value_type = Option<u64>)]
    pub max: Option<ByteCount>,
    /// Put to sleep after so many idle milliseconds.
    pub keep_alive_ms: Option<u64>,
    /// Brought to the device before anybody asks for it.
    #[serde(default)]
    pub preload: bool,
    /// How deep it may sleep: `"none"`, `"host"`, `"source"`.
    #[serde(default)]
    pub sleep: String,
    /// Models that are never on the device beside it.
    #[serde(default)]
    pub apart: Vec<String>,
    /// What a MiB of its weights is worth on the device: microseconds of waiting that it saves for each second that it is
    /// kept. Who is worth least yields first.
    #[serde(default)]
    pub worth_us: f64,
    /// What bringing a MiB of it back takes, as measured (microseconds).
    #[serde(default)]
    pub restore_us_per_mib: u64,
    /// How much of its moving was for nothing.
    #[serde(default)]
    pub thrash: ThrashSnapshot,
    /// Counters since the server started, and requests now.
    pub counts: ModelCounts,
    /// The tiers that keep what its KV cache forgets, and what they did since its worker started.
    #[serde(default)]
    #[schema(value_type = Vec<Object>)]
    pub tiers: Vec<TierUsage>,
    /// Whether its weights come from the store of weights, by its worker; and what that holds, of all models.
    #[serde(default)]
    #[schema(value_type = Option<Object>)]
    pub weights_at_rest: Option<WeightsAtRest>,
    /// The most requests that it answers at the same time; others wait for their turn.
    #[serde(default)]
    pub parallel_max: u32,
    /// Whose these requests are, by the names of their keys.
    #[serde(default)]
    pub keys: Vec<KeySnapshot>,
    /// Time to the first byte of requests that found it awake.
    pub first_byte_awake: LatencySnapshot,
    /// Time to the first byte of requests that had to wait for it.
    pub first_byte_asleep: LatencySnapshot,
    /// How long wakes took.
    pub wake_time: LatencySnapshot,
    /// When a request last began or ended (milliseconds since the Unix epoch).
    pub last_used_at_ms: Option<u64>,
    /// It gives memory up in part. Where not (`engine = "command"`), it holds all that it needs or nothing.
    pub is_elastic: bool,
    /// Process id of its worker, or of its command while that runs.
    pub pid: Option<u32>,
    /// For how long its worker has not answered (milliseconds), where it was asked and does not. At `silent_s_max` it is ended.
    #[serde(default)]
    pub silent_ms: Option<u64>,
    /// How often its worker was started.
    pub starts: u32,
    /// File with its worker's output.
    pub log: String,
    /// What it can do; once its worker is ready.
    #[schema(value_type = Option<Object>)]
    pub capabilities: Option<WorkerCapabilities>,
}

/// How a model came to be what it is.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct StateSnapshot {
    /// Since when it is what it is (milliseconds since the Unix epoch).
    pub since_at_ms: u64,
    /// Why, in a sentence.
    pub reason: String,
    /// What it was before.
    pub before: Option<ModelStatus>,
    /// For how long (milliseconds).
    pub before_ms: u64,
    /// Of a model that is asleep: the lowest tier that has to be read for a whole wake. `"host"`, or `"source"` where some of
    /// its bytes are nowhere but in its files.
    #[schema(value_type = Option<String>, example = "host")]
    pub asleep_in: Option<Tier>,
}

/// Where a model's bytes are, by its worker's own figures.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ModelBytes {
    /// Weights on the device.
    #[schema(value_type = u64)]
    pub weights_device: ByteCount,
    /// All weights, wherever they are.
    #[schema(value_type = u64)]
    pub weights_total: ByteCount,
    /// KV on the device.
    #[schema(value_type = u64)]
    pub kv_device: ByteCount,
    /// KV that some request uses now.
    #[schema(value_type = u64)]
    pub kv_live: ByteCount,
    /// Device bytes outside regions, at their peak.
    #[schema(value_type = u64)]
    pub overhead_device: ByteCount,
    /// What of that it may take again without asking: leased while it has weights on the device.
    #[schema(value_type = u64)]
    #[serde(default)]
    pub overhead_peak: ByteCount,
    /// Copies in host memory.
    #[schema(value_type = u64)]
    pub host: ByteCount,
    /// Bytes whose only copy off the device is the file they came from.
    #[schema(value_type = u64)]
    pub source_only: ByteCount,
}

/// A model's lease, by kind.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct LeaseSnapshot {
    /// For weights.
    #[schema(value_type = u64)]
    pub weights: ByteCount,
    /// For KV.
    #[schema(value_type = u64)]
    pub kv: ByteCount,
    /// For what its process takes besides.
    #[schema(value_type = u64)]
    pub overhead: ByteCount,
    /// All of it.
    #[schema(value_type = u64)]
    pub total: ByteCount,
    /// Of it, ordered back and not returned yet.
    #[schema(value_type = u64)]
    pub reclaiming: ByteCount,
    /// What the driver shows of its process; none where it shows nothing of it.
    #[serde(default)]
    #[schema(value_type = Option<u64>)]
    pub seen: Option<ByteCount>,
    /// What that is more than the lease (bytes; negative: leased and not there).
    #[serde(default)]
    pub drift: i64,
    /// Host bytes that its copies may take, beside all this.
    #[schema(value_type = u64)]
    pub host: ByteCount,
}

/// Requests now and counters since the server started.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct ModelCounts {
    /// Requests being answered now.
    pub requests_active: u64,
    /// Requests that wait for the model now.
    pub requests_parked: u64,
    /// Requests routed to it.
    pub requests_total: u64,
    /// Requests that were refused or whose wait ended without the model.
    pub requests_refused: u64,
    /// Tokens generated.
    pub tokens_out: u64,
    /// Times it was woken.
    pub wakes: u64,
    /// Orders to give memory up that it carried out.
    pub evictions: u64,
    /// Bytes it gave up for them.
    #[schema(value_type = u64)]
    pub evicted: ByteCount,
    /// Bytes its wakes brought back.
    #[schema(value_type = u64)]
    pub restored: ByteCount,
    /// Lease requests granted.
    pub leases_granted: u64,
    /// Lease requests denied.
    pub leases_denied: u64,
}

/// What one key has at a model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeySnapshot {
    /// The key's name, never the key; none where no key is wanted.
    pub key: Option<String>,
    /// Its requests being answered now.
    pub active: u64,
    /// Its requests that wait now.
    pub parked: u64,
    /// How long the first of those has waited (milliseconds).
    pub waited_ms: u64,
    /// Time at the model that it is charged with (milliseconds), to be compared with that of the others here: the next
    /// place is for who has had least.
    pub used_ms: u64,
}

/// A distribution of times, over the newest few hundred.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
pub struct LatencySnapshot {
    /// How many there were since the server started.
    pub count: u64,
    /// The newest (milliseconds).
    pub last_ms: Option<f64>,
    /// Half took at most this (milliseconds).
    pub p50_ms: Option<f64>,
    /// 99 of 100 took at most this (milliseconds).
    pub p99_ms: Option<f64>,
}
