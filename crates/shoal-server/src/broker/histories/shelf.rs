//! The shelf of a history, by its seed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use shoal_core::bytes::ByteCount;

use super::{DEVICE, MODELS};
use crate::config::{
    CommandConfig, DeviceChoice, Engine, HostTier, Limits, ModelConfig, Patience, ServerConfig, Sharing,
    TierUse,
};

const SILENT_MAX: Duration = Duration::from_secs(10);
/// What a program is charged with while it runs.
pub(super) const PROGRAM_BYTES: ByteCount = ByteCount::mib(30);

/// Every seventh history has workers of an earlier version, which are not asked whether they live.
pub(super) fn answers(seed: u64) -> bool {
    seed % 7 != 3
}

pub(super) fn hides(seed: u64) -> bool {
    seed % 5 == 2
}

/// In four of ten histories engines have KV.
pub(super) fn has_kv(seed: u64) -> bool {
    matches!(seed % 10, 4 | 7..=9)
}

/// What workers say and ask of what they take beside weights and KV.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Beside {
    /// They say the most that it was, and ask for it once, before they are ready.
    Most,
    /// They say what it is now.
    Now,
    /// They say that too, and what their steps may take without a question.
    Peak,
    /// They say that too, and steps ask before they take more than is leased.
    Asks,
}

/// In half of all histories that falls by itself, and in each sixth of all it is taken in one of these ways.
pub(super) fn beside(seed: u64) -> Beside {
    match seed / 3 % 6 {
        3 => Beside::Now,
        4 => Beside::Peak,
        5 => Beside::Asks,
        _ => Beside::Most,
    }
}

/// Every sixth history has a policy in a process of its own that will not answer, not even when all else is calm.
pub(super) fn thinks_for_ever(seed: u64) -> bool {
    seed % 12 == 6
}

/// A model that is any program.
pub(in crate::broker) fn program(name: &str) -> ModelConfig {
    ModelConfig {
        engine: Engine::Command,
        command: Some(CommandConfig {
            program: PathBuf::from("/none"),
            port: None,
            socket: true,
            health: "/health".to_owned(),
            ready_max: Duration::from_secs(5),
            stop_max: Duration::from_secs(1),
            device_bytes: PROGRAM_BYTES,
        }),
        ..ModelConfig::new(name, "/none")
    }
}

/// [`config`] with what else a history may have: every third a program, every sixth a policy in a process of its own that
/// decides and every twelfth one that watches, every other a headroom, every fifth a model that sleeps by itself.
pub(super) fn whole_config(seed: u64) -> ServerConfig {
    let mut config = config(seed);
    if seed.is_multiple_of(3) {
        let parallel_max = config.models[2].parallel_max;
        config.models[2] = ModelConfig { parallel_max, ..program("m2") };
    }
    if seed.is_multiple_of(6) {
        config.sharing.policy = "python:a:decides".to_owned();
    } else if seed % 12 == 5 {
        config.sharing.shadow = Some("python:a:watches".to_owned());
    }
    if seed % 2 == 1 {
        config.headroom = ByteCount::mib(4);
        config.device_budget = DEVICE - config.headroom;
    }
    if seed % 5 == 1 {
        config.models[1].keep_alive_s = Some(seed % 4);
    }
    config
}

/// Every fourth history has two models that stand apart, every fourth preloads, every fourth has another policy and one
/// that watches.
pub(in crate::broker) fn config(seed: u64) -> ServerConfig {
    let mut models: Vec<ModelConfig> =
        (0..MODELS).map(|n| ModelConfig::new(format!("m{n}"), "/none")).collect();
    let mut sharing = Sharing::default();
    // Few places, so that requests wait for awake models too.
    for model in &mut models {
        model.parallel_max = 1 + u32::try_from(seed % 3).unwrap_or(0);
    }
    match seed % 4 {
        1 => (models[0].apart, models[1].apart) = (vec!["m1".to_owned()], vec!["m0".to_owned()]),
        2 => models.iter_mut().for_each(|model| model.preload = true),
        3 => (sharing.policy, sharing.shadow) = ("lru".to_owned(), Some("value".to_owned())),
        _ => {}
    }
    ServerConfig {
        file: PathBuf::from("/none/shoal.toml"),
        listen: ([127, 0, 0, 1], 0).into(),
        api_key_file: None,
        allowed_hosts: vec![],
        separate_keys: false,
        // Every fifth has a driver that hides who has what.
        device: if hides(seed) { DeviceChoice::Cuda(0) } else { DeviceChoice::Sim },
        device_uuid: None,
        device_budget: DEVICE,
        headroom: ByteCount::ZERO,
        host_budget: ByteCount::gib(1),
        host_memory: None,
        // Every third has a tier of a given size, which is asked for beside what copies need.
        host_tier: if seed % 3 == 1 { HostTier::Of(ByteCount::mib(300)) } else { HostTier::Auto },
        disk: vec![],
        disk_key_file: None,
        disk_wait: Duration::ZERO,
        tiers: TierUse::default(),
        models,
        runtime_dir: PathBuf::from("/none"),
        state_dir: PathBuf::from("/none"),
        cache_dir: PathBuf::from("/none"),
        log_dir: Path::new("/none/logs").to_owned(),
        python: PathBuf::from("python3"),
        limits: Limits { parked_max: 4, ..Limits::default() },
        quantum: Duration::from_millis(300),
        sharing,
        orphan_wait: Duration::ZERO,
        fork_workers: false,
        patience: Patience { silent_max: Some(SILENT_MAX), ..Patience::default() },
        notes: vec![],
        unservable: vec![],
    }
}
