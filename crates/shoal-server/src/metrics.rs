//! `/metrics`: what the gateway counted itself, and the shelf's figures at the moment of asking.
//!
//! Labels are bounded: models by the configuration, keys by their file (and only by their names), statuses by HTTP. A name
//! that no model has is counted under `""`.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::http::StatusCode;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{KvTierCounts, TierUsage};

use crate::gateway::Models;
use crate::shelf::Caller;
use crate::state::{ModelSnapshot, ShelfSnapshot, WeightStoreSnapshot};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    model: String,
    status: u32,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct KeyLabels {
    key: String,
    status: u32,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct FirstByteLabels {
    model: String,
    was_asleep: String,
}

/// Counters of the gateway, and the registry that shows them.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    known: BTreeSet<String>,
    requests: Family<RequestLabels, Counter>,
    key_requests: Family<KeyLabels, Counter>,
    first_byte: Family<FirstByteLabels, Histogram, fn() -> Histogram>,
}

fn seconds_histogram() -> Histogram {
    Histogram::new([0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0])
}

impl Metrics {
    pub(crate) fn new(models: &Arc<dyn Models>) -> Self {
        let mut registry = Registry::with_prefix("shoal");
        let requests = Family::default();
        let key_requests = Family::default();
        let first_byte = Family::new_with_constructor(seconds_histogram as fn() -> Histogram);
        registry.register("requests", "Requests under /v1, by model and status", requests.clone());
        let what = "Requests under /v1, by the name of their key and status, where keys are wanted";
        registry.register("key_requests", what, key_requests.clone());
        registry.register(
            "first_byte_seconds",
            "Time from a request to the first byte of its answer, by whether the model was asleep",
            first_byte.clone(),
        );
        registry.register_collector(Box::new(ShelfCollector { models: Arc::clone(models) }));
        let known = models.snapshot().models.into_iter().map(|model| model.name).collect();
        Self { registry, known, requests, key_requests, first_byte }
    }

    pub(crate) fn request(&self, model: &str, caller: &Caller, status: StatusCode) {
        if let Some(key) = caller.name() {
            let labels = KeyLabels { key: key.to_owned(), status: status.as_u16().into() };
            self.key_requests.get_or_create(&labels).inc();
        }
        let model = self.known.get(model).cloned().unwrap_or_default();
        self.requests.get_or_create(&RequestLabels { model, status: status.as_u16().into() }).inc();
    }

    pub(crate) fn first_byte(&self, model: &str, was_asleep: bool, after: Duration) {
        let model = self.known.get(model).cloned().unwrap_or_default();
        let labels = FirstByteLabels { model, was_asleep: was_asleep.to_string() };
        self.first_byte.get_or_create(&labels).observe(after.as_secs_f64());
    }

    /// In the text form of `OpenMetrics`.
    pub(crate) fn text(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[derive(Debug)]
struct ShelfCollector {
    models: Arc<dyn Models>,
}

type Labels = Vec<(&'static str, String)>;

fn family<M: EncodeMetric>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: impl IntoIterator<Item = (Labels, M)>,
) -> fmt::Result {
    let mut rows = rows.into_iter().peekable();
    let Some((_, first)) = rows.peek() else { return Ok(()) };
    let mut encoder = encoder.encode_descriptor(name, help, None, first.metric_type())?;
    for (labels, metric) in rows {
        metric.encode(encoder.encode_family(&labels)?)?;
    }
    Ok(())
}

#[expect(clippy::cast_possible_wrap, reason = "no machine has 2^63 bytes")]
fn gauge(bytes: ByteCount) -> ConstGauge<i64> {
    ConstGauge::new(bytes.0 as i64)
}

impl Collector for ShelfCollector {
    fn encode(&self, mut target: DescriptorEncoder<'_>) -> fmt::Result {
        let state = self.models.snapshot();
        let encoder = &mut target;
        let of = |model: &ModelSnapshot, name: &'static str, value: &str| -> Labels {
            vec![("model", model.name.clone()), (name, value.to_owned())]
        };
        let tiers = state.tiers.iter().map(|tier| vec![("tier", tier.tier.to_string())]);
        family(
            encoder,
            "tier_used_bytes",
            "Bytes that models hold on a tier",
            tiers.clone().zip(state.tiers.iter().map(|tier| gauge(tier.used))),
        )?;
        let budgets = state.tiers.iter().zip(tiers);
        family(
            encoder,
            "tier_budget_bytes",
            "The most that models may hold on a tier",
            budgets.filter_map(|(tier, labels)| Some((labels, gauge(tier.budget?)))),
        )?;
        family(
            encoder,
            "model_bytes",
            "Where a model's bytes are",
            state.models.iter().flat_map(|model| {
                [
                    ("weights_device", model.bytes.weights_device),
                    ("kv_device", model.bytes.kv_device),
                    ("overhead_device", model.bytes.overhead_device),
                    ("host", model.bytes.host),
                    ("source", model.bytes.source_only),
                ]
                .map(|(place, bytes)| (of(model, "place", place), gauge(bytes)))
            }),
        )?;
        family(
            encoder,
            "lease_bytes",
            "Device bytes a model may hold",
            state.models.iter().flat_map(|model| {
                let lease = &model.lease;
                [("weights", lease.weights), ("kv", lease.kv), ("overhead", lease.overhead)]
                    .map(|(kind, bytes)| (of(model, "kind", kind), gauge(bytes)))
            }),
        )?;
        family(
            encoder,
            "requests_now",
            "Requests answered or waiting now",
            state.models.iter().flat_map(|model| {
                [("active", model.counts.requests_active), ("parked", model.counts.requests_parked)]
                    .map(|(state, count)| (of(model, "state", state), gauge(ByteCount(count))))
            }),
        )?;
        let silent = state.models.iter().filter(|model| model.is_elastic);
        family(
            encoder,
            "worker_silent_seconds",
            "For how long a model's worker has not answered, where it does not",
            silent.map(|model| {
                let seconds = model.silent_ms.unwrap_or(0) as f64 / 1e3;
                (vec![("model", model.name.clone())], ConstGauge::new(seconds))
            }),
        )?;
        keys(encoder, &state)?;
        kv_tiers(encoder, &state)?;
        weights_at_rest(encoder, &state)?;
        driver(encoder, &state)?;
        sharing(encoder, &state)?;
        counters(encoder, &state)
    }
}

fn keys(encoder: &mut DescriptorEncoder<'_>, shelf: &ShelfSnapshot) -> fmt::Result {
    let rows = shelf.models.iter().flat_map(|model| {
        model.keys.iter().flat_map(|key| {
            [("active", key.active), ("parked", key.parked)].map(|(state, count)| {
                let name = key.key.clone().unwrap_or_default();
                let labels: Labels =
                    vec![("model", model.name.clone()), ("key", name), ("state", state.to_owned())];
                (labels, gauge(ByteCount(count)))
            })
        })
    });
    family(encoder, "key_requests_now", "Requests answered or waiting now, by the name of their key", rows)
}

/// What tiers keep of what KV caches forget.
fn kv_tiers(encoder: &mut DescriptorEncoder<'_>, shelf: &ShelfSnapshot) -> fmt::Result {
    let tiers = || shelf.models.iter().flat_map(|model| model.tiers.iter().map(move |tier| (model, tier)));
    let labels = |model: &ModelSnapshot, tier: &TierUsage| -> Labels {
        vec![("model", model.name.clone()), ("tier", tier.tier.clone())]
    };
    let blocks = tiers().flat_map(|(model, tier)| {
        let KvTierCounts { saved, unsaved, looked_up, loaded, late, corrupt, .. } = tier.counts;
        [
            ("saved", saved),
            ("unsaved", unsaved),
            ("looked_up", looked_up),
            ("loaded", loaded),
            ("late", late),
            ("corrupt", corrupt),
            ("prefetched", tier.counts.prefetched),
            ("recomputed", tier.counts.recomputed),
            ("demoted", tier.counts.demoted),
            ("promoted", tier.promoted),
            ("evicted", tier.evicted),
        ]
        .map(|(what, count)| {
            let mut labels = labels(model, tier);
            labels.push(("what", what.to_owned()));
            (labels, ConstCounter::new(count))
        })
    });
    family(
        encoder,
        "kv_tier_blocks",
        "KV blocks that a tier kept or not, that made room in it, that came up to it, that left the device unused; of those \
         looked for there, brought back, too late, damaged, computed again as that is faster",
        blocks,
    )?;
    let bytes = tiers().flat_map(|(model, tier)| {
        [("saved", tier.counts.saved_bytes), ("loaded", tier.counts.loaded_bytes)].map(|(what, bytes)| {
            let mut labels = labels(model, tier);
            labels.push(("what", what.to_owned()));
            (labels, ConstCounter::new(bytes.0))
        })
    });
    family(encoder, "kv_tier_moved_bytes", "Bytes of KV that went to a tier and came back from it", bytes)?;
    for (name, help, bytes) in [
        ("kv_tier_bytes", "Bytes of KV in a tier", (|tier| tier.bytes) as fn(&TierUsage) -> ByteCount),
        ("kv_tier_budget_bytes", "The most bytes of KV that may be in a tier", |tier| tier.bytes_max),
    ] {
        family(encoder, name, help, tiers().map(|(model, tier)| (labels(model, tier), gauge(bytes(tier)))))?;
    }
    let places = || {
        tiers().flat_map(|(model, tier)| {
            tier.places.iter().map(move |place| {
                let labels: Labels = vec![("model", model.name.clone()), ("path", place.path.clone())];
                (labels, place)
            })
        })
    };
    family(
        encoder,
        "kv_disk_bytes",
        "Bytes of KV in a directory of the disk tier",
        places().map(|(labels, place)| (labels, gauge(place.bytes))),
    )?;
    family(
        encoder,
        "kv_disk_aside",
        "1 while a directory of the disk tier is set aside because it failed",
        places().map(|(labels, place)| (labels, ConstGauge::new(i64::from(place.state == "aside")))),
    )?;
    family(
        encoder,
        "kv_disk_corrupt_blocks",
        "Damaged blocks that were found in a directory of the disk tier",
        places().map(|(labels, place)| (labels, ConstCounter::new(place.corrupt))),
    )?;
    family(
        encoder,
        "kv_disk_asides",
        "How often a directory of the disk tier was set aside",
        places().map(|(labels, place)| (labels, ConstCounter::new(place.asides))),
    )
}

/// The store of weights, and which models' weights come from it.
fn weights_at_rest(encoder: &mut DescriptorEncoder<'_>, shelf: &ShelfSnapshot) -> fmt::Result {
    let rows = shelf.models.iter().filter_map(|model| {
        let state = model.weights_at_rest.as_ref()?.state.clone();
        Some((vec![("model", model.name.clone()), ("state", state)], ConstGauge::new(1_i64)))
    });
    family(
        encoder,
        "weights_at_rest",
        "1 for what a model's weights at rest are: read by its worker's start, stored since, waiting to be, or unused",
        rows,
    )?;
    let store = shelf.weights_store.as_ref();
    let of = |bytes: fn(&WeightStoreSnapshot) -> ByteCount| {
        store.map(|store| (vec![("path", store.path.clone())], gauge(bytes(store))))
    };
    family(
        encoder,
        "weights_store_bytes",
        "Bytes of weights at rest, of all models",
        of(|store| store.bytes),
    )?;
    let budget = of(|store| store.bytes_max);
    family(encoder, "weights_store_budget_bytes", "The most bytes of weights that may be at rest", budget)?;
    let models = of(|store| ByteCount(store.models));
    family(encoder, "weights_store_models", "Models whose weights are at rest", models)
}

/// The device as its driver shows it, beside the ledger.
fn driver(encoder: &mut DescriptorEncoder<'_>, shelf: &ShelfSnapshot) -> fmt::Result {
    let device = &shelf.device;
    let of = |kind: &str, bytes: ByteCount| -> (Labels, ConstGauge<i64>) {
        (vec![("kind", kind.to_owned())], gauge(bytes))
    };
    let ledger = [
        of("leased", device.leased),
        of("returning", device.returning),
        of("headroom", device.headroom),
        of("taken", device.taken),
        of("free", device.free),
    ];
    family(
        encoder,
        "device_ledger_bytes",
        "The device by the ledger: \"taken\" is what others have of the budget",
        ledger,
    )?;
    let Some(seen) = &device.driver else { return Ok(()) };
    family(
        encoder,
        "device_driver_bytes",
        "The device by its driver: \"drift\" is what models have beyond their leases, and a part of \"ours\"",
        [
            of("total", seen.total),
            of("free", seen.free),
            of("ours", seen.ours),
            of("drift", seen.drift),
            of("others", seen.others),
        ],
    )?;
    family(
        encoder,
        "device_driver_up",
        "1 while the driver answers",
        [(Labels::new(), ConstGauge::new(i64::from(seen.lost.is_none())))],
    )?;
    let seen = shelf.models.iter().filter(|model| model.lease.seen.is_some());
    family(
        encoder,
        "model_drift_bytes",
        "What the driver shows of a model's process less its lease",
        seen.map(|model| (vec![("model", model.name.clone())], ConstGauge::new(model.lease.drift))),
    )
}

fn sharing(encoder: &mut DescriptorEncoder<'_>, shelf: &ShelfSnapshot) -> fmt::Result {
    let labels = |model: &ModelSnapshot| -> Labels { vec![("model", model.name.clone())] };
    family(
        encoder,
        "thrash_index",
        "Bytes that came back within a minute of leaving, over bytes that requests were answered with, in the last minute",
        [(Labels::new(), ConstGauge::new(shelf.sharing.thrash.index))],
    )?;
    family(
        encoder,
        "byte_worth_microseconds",
        "Waiting that a MiB of a model's weights saves for each second that it is kept",
        shelf.models.iter().map(|model| (labels(model), ConstGauge::new(model.worth_us))),
    )?;
    let Some(shadow) = &shelf.sharing.shadow else { return Ok(()) };
    let of = |differs: &str, count: u64| -> (Labels, ConstCounter<u64>) {
        let labels = vec![("policy", shadow.policy.clone()), ("differs", differs.to_owned())];
        (labels, ConstCounter::new(count))
    };
    family(
        encoder,
        "shadow_decisions",
        "Decisions that took memory from a model, by whether the policy that watches would have decided otherwise",
        [of("true", shadow.differing), of("false", shadow.decisions - shadow.differing)],
    )?;
    let taken = |by: &str, bytes: ByteCount| -> (Labels, ConstCounter<u64>) {
        (vec![("policy", by.to_owned())], ConstCounter::new(bytes.0))
    };
    family(
        encoder,
        "shadow_taken_bytes",
        "Bytes that these decisions took from models, by the policy that decides and by the one that watches",
        [taken(&shelf.sharing.policy, shadow.evicted_live), taken(&shadow.policy, shadow.evicted_shadow)],
    )
}

fn counters(encoder: &mut DescriptorEncoder<'_>, shelf: &ShelfSnapshot) -> fmt::Result {
    type Read = fn(&ModelSnapshot) -> u64;
    let table: [(&str, &str, Read); 6] = [
        ("wakes", "Times a model was woken", |model| model.counts.wakes),
        ("evictions", "Times a model gave device memory up", |model| model.counts.evictions),
        ("evicted_bytes", "Bytes that models gave up", |model| model.counts.evicted.0),
        ("restored_bytes", "Bytes that wakes brought back", |model| model.counts.restored.0),
        (
            "thrashed_bytes",
            "Bytes of weights that came back within a minute of leaving the device",
            |model| model.thrash.total.0,
        ),
        ("tokens", "Tokens generated", |model| model.counts.tokens_out),
    ];
    for (name, help, read) in table {
        let rows = shelf.models.iter().map(|model| {
            let labels: Labels = vec![("model", model.name.clone())];
            (labels, ConstCounter::new(read(model)))
        });
        family(encoder, name, help, rows)?;
    }
    Ok(())
}
