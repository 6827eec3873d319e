//! What a worker and the server say to each other on the control socket.
//!
//! One JSON object a line ([`LINE_BYTES_MAX`] at most), in both directions, over a Unix stream socket in the runtime
//! directory. The worker speaks first ([`FromWorker::Hello`]); the server answers [`FromServer::Welcome`] or closes.
//!
//! **Leases.** A worker commits device memory only within its lease. It asks ([`FromWorker::LeaseRequest`]) and the
//! server grants all of it, or at least `bytes_min`, or says no before the deadline. What a worker gives back counts as
//! free from the moment the server reads [`FromWorker::LeaseReturn`], never before; what is granted counts as taken from
//! the moment it is written. Both sides therefore keep I1 without a round trip on the way down.
//!
//! **Slabs.** Where the server lends memory for host copies (`Welcome::lends_slabs`), a worker asks for it by
//! [`FromWorker::SlabRequest`]; the file comes with the line of the answer (`SCM_RIGHTS`). What one worker has is at most
//! its host budget. A worker unmaps before it writes [`FromWorker::SlabReturn`]; what it does not return stays for the next
//! worker of its model.
//!
//! **A server that is gone.** A worker whose connection ends without an order to finish waits `Welcome::server_wait_ms` for
//! a server at the same socket. It greets that one with what it holds ([`WorkerHolds`]), says each slab that it was lent,
//! with its file ([`FromWorker::SlabHeld`]), asks again for the leases that it still waits for, and goes on. What it holds
//! by its own count is what the new server charges: grants that it read count, returns that nobody read count as well.
//! Orders of the server before are not answered. A server that does not want it says [`FromServer::Refused`].
//!
//! **Signs of life.** A worker that says `answers_pings` in its hello answers each [`FromServer::Ping`] by
//! [`FromWorker::Pong`], whatever else it does: the thread that reads answers. It says that the process runs, no more.
//!
//! **Orders.** `Reclaim` and `Wake` are orders: each is answered by exactly one [`FromWorker::OrderDone`]. Before that, a
//! worker whose engine computes as the bytes arrive says [`FromWorker::WakeBacked`] once a wake has all of its memory, where
//! the server's `Welcome::forwards_when_backed` asks for it: from then on requests may be sent to it.

use serde::{Deserialize, Serialize};

use crate::bytes::ByteCount;

/// The version both sides must share.
pub const VERSION: u32 = 1;
/// The longest line either side accepts.
pub const LINE_BYTES_MAX: usize = 1 << 20;

/// What a lease is for; the ledger keeps one number for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LeaseKind {
    /// Parameters of a model.
    Weights,
    /// KV cache.
    Kv,
    /// What the process takes outside our regions: context, libraries, workspaces, activations.
    Overhead,
}

impl LeaseKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Weights, Self::Kv, Self::Overhead];
}

/// Said by the server.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum FromServer {
    /// The answer to `Hello`: everything the worker needs to begin.
    Welcome {
        /// Protocol version of the server.
        version: u32,
        /// The model's configuration, as `shoal.worker` understands it (see `WorkerSpec` in python/shoal/worker/spec.py).
        spec: serde_json::Value,
        /// `"sim"` or `"cuda:N"`.
        device: String,
        /// Capacity of the simulated device; ignored elsewhere.
        device_bytes: ByteCount,
        /// The most host memory this worker may use for copies.
        host_budget: ByteCount,
        /// Where the worker shall listen for HTTP/1.1 (a Unix socket's path).
        data_socket: String,
        /// Whether the server lends memory for host copies. One that says nothing of it does not.
        #[serde(default)]
        lends_slabs: bool,
        /// How long the worker shall wait for another server when this one is gone. Of one that says nothing: not at all.
        #[serde(default)]
        server_wait_ms: u64,
        /// Whether the server makes use of [`FromWorker::WakeBacked`]. One that says nothing of it does not know it.
        #[serde(default)]
        forwards_when_backed: bool,
    },
    /// The answer to a `Hello` of somebody who is not wanted; the connection ends after it.
    Refused {
        /// Why, in a sentence.
        reason: String,
    },
    /// Memory for host copies, whose file comes with this line.
    SlabGrant {
        /// The request's number.
        request: u64,
        /// The slab's number, by which it is returned.
        slab: u64,
        /// Its length.
        bytes: ByteCount,
        /// It is made of huge pages that were set aside, not of those that the kernel finds.
        is_set_aside: bool,
        /// It reads as zeroes; else it holds what the model's last worker left.
        is_zeroed: bool,
    },
    /// A slab cannot be had.
    SlabDeny {
        /// The request's number.
        request: u64,
        /// Why, in a sentence with numbers.
        reason: String,
    },
    /// A lease request was granted, wholly or in part. One for weights is granted with what the model gave up of them while
    /// it waited, and so with more than it asked for.
    LeaseGrant {
        /// The request's number.
        request: u64,
        /// What it is for.
        kind: LeaseKind,
        /// Bytes added to the lease by this grant.
        bytes: ByteCount,
    },
    /// A lease request cannot be met before its deadline.
    LeaseDeny {
        /// The request's number.
        request: u64,
        /// Why, in a sentence with numbers.
        reason: String,
    },
    /// Order: give up device memory.
    Reclaim {
        /// The order's number.
        order: u64,
        /// How many bytes to free; all there are, if there are fewer.
        bytes: ByteCount,
        /// Only KV memory that no request uses, cached or empty: the model itself needs the room, for its weights, so
        /// neither these nor what its requests use may go for it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        is_own: bool,
        /// What is cached goes after weights, because it would cost more to bring back, and before what requests use; an
        /// engine that keeps books of its own is asked for it last of all.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        cached_last: bool,
        /// How long the worker may take before the next victim is asked.
        deadline_ms: u64,
        /// Why, in a sentence.
        reason: String,
    },
    /// Order: bring the weights back. The worker asks for the lease it lacks as usual.
    Wake {
        /// The order's number.
        order: u64,
        /// How long the worker may take.
        deadline_ms: u64,
        /// Why, in a sentence.
        reason: String,
    },
    /// Answer, to show that the process runs.
    Ping {
        /// The answer says it again.
        ping: u64,
    },
    /// Finish and exit.
    Shutdown {
        /// How long running requests may still take.
        deadline_ms: u64,
        /// Why, in a sentence.
        reason: String,
    },
}

/// Bytes that one worker holds, by place.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerUsage {
    /// Device bytes committed for weights.
    pub weights_device: ByteCount,
    /// All bytes of the weights, wherever they are.
    pub weights_total: ByteCount,
    /// Device bytes committed for KV.
    pub kv_device: ByteCount,
    /// KV bytes that cannot be freed without taking them from a request: whole pages on which some used block lies.
    pub kv_live: ByteCount,
    /// KV bytes that no request uses and that hold a prefix, which the next request may save computing; not in `kv_live`.
    #[serde(default)]
    pub kv_cached: ByteCount,
    /// What bringing a MiB of such a prefix back takes, or computing it again (microseconds); 0 where that is not known.
    #[serde(default)]
    pub kv_back_us_per_mib: u64,
    /// What part of such prefixes one use of the model finds again, in thousandths; 0 where that is not known.
    #[serde(default)]
    pub kv_found_milli: u64,
    /// Measured bytes outside our regions: the most since this was last said, where the engine counts that; else what there is.
    pub overhead_device: ByteCount,
    /// What of them a step may take again without asking for it first, as long as there are weights on the device.
    #[serde(default)]
    pub overhead_peak: ByteCount,
    /// Leased device bytes that wait in the frame pool for the next growth: the first that a reclaim takes.
    #[serde(default)]
    pub pooled: ByteCount,
    /// Host bytes that hold copies.
    pub host: ByteCount,
    /// Bytes whose only copy off the device is the file they came from.
    pub source_only: ByteCount,
    /// Requests being worked on.
    pub requests_running: u32,
    /// Requests waiting inside the engine.
    pub requests_waiting: u32,
    /// Tokens generated since start.
    pub tokens_out: u64,
    /// Tokens of texts that became vectors since start.
    #[serde(default)]
    pub tokens_embedded: u64,
    /// Tiers that keep what its KV cache forgets, with what they did since the worker's start.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tiers: Vec<TierUsage>,
    /// Its weights at rest, where they are kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_at_rest: Option<WeightsAtRest>,
    /// Bytes copied to the device since start.
    pub onboarded: ByteCount,
    /// Bytes copied or dropped from the device since start.
    pub evicted: ByteCount,
}

/// What a worker holds that had another server before.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerHolds {
    /// Its lease for weights.
    pub weights: ByteCount,
    /// Its lease for KV.
    pub kv: ByteCount,
    /// Its lease for overhead.
    pub overhead: ByteCount,
    /// The most host memory that it was allowed to use for copies.
    pub host_budget: ByteCount,
    /// What it can do, where it was ready.
    pub capabilities: Option<WorkerCapabilities>,
    /// Its newest figures.
    pub usage: WorkerUsage,
}

/// What a tier below the device did for a cache of KV, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KvTierCounts {
    /// Kept by the tier.
    pub saved: u64,
    /// Their bytes.
    pub saved_bytes: ByteCount,
    /// Not kept: the tier refused them or failed, or they were evicted before their turn came.
    pub unsaved: u64,
    /// Looked for, because the cache itself had forgotten them or never knew them.
    pub looked_up: u64,
    /// Of those, brought back.
    pub loaded: u64,
    /// Their bytes.
    pub loaded_bytes: ByteCount,
    /// Of those looked for, there but too late, and computed again.
    pub late: u64,
    /// Of those looked for, damaged where they lay, and computed again.
    pub corrupt: u64,
    /// Times that bringing blocks back ended early for another reason: the tier failed, or memory was short.
    pub failed: u64,
    /// Time that bringing back took, in microseconds.
    pub load_us: u64,
    /// Of that: until it was known what is where, and blocks were had for it.
    pub lookup_us: u64,
    /// Of that: waiting for what tiers read.
    pub read_us: u64,
    /// Of that: copies to the device, from their turn on. What lies in page-locked memory is verified meanwhile.
    pub copy_us: u64,
    /// Of that: what verifying took beyond the copies.
    pub verify_us: u64,
    /// Brought to the fastest tier while their request waited for its turn.
    pub prefetched: u64,
    /// Of those looked for, there and yet computed again, as that is faster by what was measured.
    pub recomputed: u64,
    /// Given up on the device, where nobody had used them for a while, as a tier has them.
    pub demoted: u64,
}

/// A tier below the device that keeps KV blocks of one model: what it did, and where it keeps them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TierUsage {
    /// `"host"` or `"disk"`.
    pub tier: String,
    /// Why it is not used at all, where that is so.
    pub reason: Option<String>,
    /// What it did.
    #[serde(flatten)]
    pub counts: KvTierCounts,
    /// What was decided last of a prompt that tiers have something of, and why; of the fastest tier only.
    pub choice: Option<String>,
    /// Blocks that came to it from a slower tier, as somebody asked for them.
    pub promoted: u64,
    /// Blocks that made room in it.
    pub evicted: u64,
    /// Bytes in it.
    pub bytes: ByteCount,
    /// The most that these may be.
    pub bytes_max: ByteCount,
    /// Where its bytes lie, where that is in directories.
    pub places: Vec<TierPlace>,
}

/// One directory of a tier.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TierPlace {
    /// The directory.
    pub path: String,
    /// `"opening"`, `"ready"`, `"aside"` (it failed, and is tried again later), `"closed"`.
    pub state: String,
    /// Why it is set aside.
    pub reason: Option<String>,
    /// How it is read and written: `"io_uring"` or `"threads"`.
    pub means: String,
    /// Blocks in it.
    pub blocks: u64,
    /// Bytes of its log.
    pub bytes: ByteCount,
    /// The most that these may be.
    pub bytes_max: ByteCount,
    /// Damaged blocks that were found in it.
    pub corrupt: u64,
    /// Requests to the disk that failed.
    pub failed: u64,
    /// How often it was set aside.
    pub asides: u64,
}

/// What a worker says of its model's weights at rest, and of the store that they are in with those of all models.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WeightsAtRest {
    /// The directory.
    pub path: String,
    /// `"read"` (its start read them there), `"stored"` (it has stored them since), `"waiting"` to be stored, `"unused"`.
    pub state: String,
    /// Why they are neither read nor stored, where that is known.
    pub reason: Option<String>,
    /// Models in the store.
    pub models: u64,
    /// Their bytes.
    pub bytes: ByteCount,
    /// What these would be if the models had nothing in common.
    pub unshared: ByteCount,
    /// The most that they may be.
    pub bytes_max: ByteCount,
    /// When the worker looked (milliseconds since the Unix epoch); 0: not yet.
    pub looked_at_ms: u64,
}

/// What a model can do, from its files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WorkerCapabilities {
    /// Paths under `/v1/` it answers, such as `"chat/completions"`.
    pub routes: Vec<String>,
    /// Longest prompt plus answer, in tokens.
    pub context_tokens: u32,
    /// Bytes of the weights on the device.
    pub weights_bytes: ByteCount,
    /// Bytes of one KV block (0 for models without KV).
    pub kv_block_bytes: ByteCount,
    /// Least KV bytes with which one request of the shortest kind can run.
    pub kv_bytes_min: ByteCount,
    /// Tokens of one KV block.
    pub kv_block_tokens: u32,
    /// Data type of weights and KV, such as `"float32"`.
    pub dtype: String,
}

/// Said by a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "snake_case")]
pub enum FromWorker {
    /// The first line.
    Hello {
        /// Protocol version of the worker.
        version: u32,
        /// The model it was started for.
        model: String,
        /// Its process id.
        pid: u32,
        /// What it holds, where it had another server before.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        holds: Option<Box<WorkerHolds>>,
        /// Whether it answers [`FromServer::Ping`]. One that says nothing of it is not asked.
        #[serde(default, skip_serializing_if = "core::ops::Not::not")]
        answers_pings: bool,
    },
    /// Progress of loading, for people.
    Loading {
        /// `"reading"`, `"placing"`, ...
        phase: String,
        /// Bytes done.
        done: ByteCount,
        /// Bytes in all.
        total: ByteCount,
    },
    /// The data socket answers; the weights are staged (asleep) and can be woken.
    Ready {
        /// What it can do.
        capabilities: WorkerCapabilities,
    },
    /// The model cannot be served; the worker exits after this.
    Failed {
        /// `"model_missing"`, `"model_corrupt"`, `"model_unsupported"`, `"host_budget"`, `"device"`, `"engine"`, or
        /// `"internal"`: the only one after which the worker is started again.
        code: String,
        /// What is wrong and what would be right.
        message: String,
    },
    /// Ask for device bytes beyond the present lease.
    LeaseRequest {
        /// A number unique to this connection.
        request: u64,
        /// What for.
        kind: LeaseKind,
        /// How many more bytes.
        bytes: ByteCount,
        /// The least that is of use.
        bytes_min: ByteCount,
        /// When an answer is no longer of use, in milliseconds from now.
        deadline_ms: u64,
        /// Why, in a sentence.
        reason: String,
    },
    /// The request is withdrawn; a grant that crossed it is returned by the worker.
    LeaseCancel {
        /// The request's number.
        request: u64,
    },
    /// Device bytes given back; they were unmapped and their frames destroyed before this was written.
    LeaseReturn {
        /// What they were for.
        kind: LeaseKind,
        /// How many.
        bytes: ByteCount,
    },
    /// Ask for memory for host copies.
    SlabRequest {
        /// A number unique to this connection.
        request: u64,
        /// Its length, a multiple of 2 MiB.
        bytes: ByteCount,
    },
    /// A slab of a server before, whose file comes with this line.
    SlabHeld {
        /// The slab's number.
        slab: u64,
        /// Its length.
        bytes: ByteCount,
        /// It is made of huge pages that were set aside.
        is_set_aside: bool,
    },
    /// Memory for host copies is unmapped and not needed any more.
    SlabReturn {
        /// The slab's number.
        slab: u64,
    },
    /// An order was carried out, as far as it could be.
    OrderDone {
        /// The order's number.
        order: u64,
        /// Device bytes freed (reclaim) or brought back (wake).
        bytes: ByteCount,
        /// Bytes copied for it.
        copied: ByteCount,
        /// How long it took, in microseconds.
        duration_us: u64,
        /// What stood in the way, if it was not done in full.
        error: Option<String>,
    },
    /// A wake has its lease and all of its device memory, and its bytes are coming in order of use: a request that comes
    /// now is computed as they arrive. Its `OrderDone` follows.
    WakeBacked {
        /// The order's number.
        order: u64,
    },
    /// The answer to a ping.
    Pong {
        /// The ping's number.
        ping: u64,
    },
    /// Figures, a few times a second while they change, and at once when the last request has ended.
    Usage {
        /// The figures.
        usage: WorkerUsage,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_reads_as_it_was_written() {
        let said = FromWorker::LeaseRequest {
            request: 7,
            kind: LeaseKind::Kv,
            bytes: ByteCount::mib(4),
            bytes_min: ByteCount::mib(2),
            deadline_ms: 200,
            reason: "a prompt of 900 tokens".to_owned(),
        };
        let line = serde_json::to_string(&said).expect("plain data");
        assert!(line.starts_with(r#"{"say":"lease_request","request":7,"kind":"kv""#), "{line}");
        assert_eq!(serde_json::from_str::<FromWorker>(&line).expect("own line"), said);
    }

    /// Workers outlive their server, so a line may be of one that did not know the word.
    #[test]
    fn an_order_says_that_what_is_cached_goes_last_only_where_it_does() {
        let line = r#"{"say":"reclaim","order":3,"bytes":4096,"deadline_ms":50,"reason":"room"}"#;
        let order = |cached_last| FromServer::Reclaim {
            order: 3,
            bytes: ByteCount(4_096),
            is_own: false,
            cached_last,
            deadline_ms: 50,
            reason: "room".to_owned(),
        };
        assert_eq!(
            serde_json::from_str::<FromServer>(line).expect("as before there was the word"),
            order(false)
        );
        assert_eq!(serde_json::to_string(&order(false)).expect("plain data"), line);
        let last = serde_json::to_string(&order(true)).expect("plain data");
        assert!(last.contains(r#""cached_last":true"#), "{last}");
        assert_eq!(serde_json::from_str::<FromServer>(&last).expect("own line"), order(true));
    }
}
