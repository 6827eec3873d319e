//! Shelves whose workers have no model (`fake_worker.py`): real processes, real sockets, leases that are numbers.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_server::config::{
    DeviceChoice, Engine, HostTier, Limits, ModelConfig, Patience, ServerConfig, Sharing, TierUse,
};
use shoal_server::shelf::Shelf;
use shoal_server::state::{Event, EventKind, ModelStatus};

/// A program of `tests/`.
pub fn script(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name).to_string_lossy().into_owned()
}

/// A model whose worker is the fake one, told more by `args`.
pub fn model(name: &str, args: &[&str]) -> ModelConfig {
    let fixed = ["python3", &script("fake_worker.py"), "--control", "{control}", "--model", "{model}"];
    ModelConfig {
        engine: Engine::Worker,
        args: fixed.iter().chain(args).map(|arg| (*arg).to_owned()).collect(),
        ..ModelConfig::new(name, "/none")
    }
}

/// Everything in `directory`, on a simulated device; workers end with their server.
pub fn config(directory: &Path, budget_mib: u64, models: Vec<ModelConfig>) -> ServerConfig {
    ServerConfig {
        file: directory.join("shoal.toml"),
        listen: ([127, 0, 0, 1], 0).into(),
        api_key_file: None,
        allowed_hosts: vec![],
        device: DeviceChoice::Sim,
        device_budget: ByteCount::mib(budget_mib),
        device_uuid: None,
        headroom: ByteCount::ZERO,
        host_budget: ByteCount::gib(1),
        host_memory: None,
        host_tier: HostTier::Off,
        disk: vec![],
        disk_key_file: None,
        disk_wait: Duration::from_secs(1),
        tiers: TierUse::default(),
        models,
        runtime_dir: directory.join("run"),
        state_dir: directory.join("state"),
        cache_dir: directory.join("cache"),
        log_dir: directory.join("logs"),
        python: PathBuf::from("python3"),
        limits: Limits::default(),
        separate_keys: false,
        quantum: Duration::from_secs(3),
        sharing: Sharing::default(),
        orphan_wait: Duration::ZERO,
        fork_workers: false,
        patience: Patience::default(),
        notes: vec![],
        unservable: vec![],
    }
}

pub fn start(directory: &Path, budget_mib: u64, models: Vec<ModelConfig>) -> Shelf {
    Shelf::start(Arc::new(config(directory, budget_mib, models))).expect("the shelf starts")
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(30)
}

/// Waits until `what` holds, and fails with the events when it does not.
pub async fn until(shelf: &Shelf, what: &str, holds: impl Fn(&Shelf) -> bool) {
    // A worker's start alone can take half a minute of a machine that has much else to do.
    let deadline = Instant::now() + Duration::from_mins(2);
    while !holds(shelf) {
        assert!(Instant::now() < deadline, "never came: {what}\n{}", story(shelf));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub fn events(shelf: &Shelf) -> Vec<Arc<Event>> {
    shelf.events_since(0).expect("few events")
}

pub fn story(shelf: &Shelf) -> String {
    let lines: Vec<String> = events(shelf)
        .iter()
        .map(|event| format!("{} {} {:?}", event.id, event.model.as_deref().unwrap_or("-"), event.what))
        .collect();
    lines.join("\n")
}

/// How many events of a model are such.
pub fn count(shelf: &Shelf, model: &str, is: impl Fn(&EventKind) -> bool) -> usize {
    events(shelf).iter().filter(|event| event.model.as_deref() == Some(model) && is(&event.what)).count()
}

pub fn status(shelf: &Shelf, name: &str) -> ModelStatus {
    shelf.snapshot().model(name).expect("configured").status
}

pub fn pid(shelf: &Shelf, name: &str) -> Option<u32> {
    shelf.snapshot().model(name)?.pid
}

/// Whether a process runs; a zombie does not.
pub fn alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('Z')))
}
