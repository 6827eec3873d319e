//! What is simulated: a configuration, the sizes of its models, speeds, requests.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use shoal_core::bytes::ByteCount;
use shoal_core::shares::fair_shares;
use shoal_core::simulate::seeded::seeded;
use shoal_core::simulate::trace::{self, REQUESTS_MAX};
use shoal_core::simulate::{Asked, Kind, Service, Settings};

use super::document::{Assumes, ModelFacts, TraceFacts};
use super::{SimulateArguments, wrong};
use crate::broker::host_need;
use crate::cli::serve::told_of;
use crate::cli::{Failure, Out};
use crate::config::{
    Engine, ModelConfig, ServerConfig, SimulatedConfig, SleepDepth, Surroundings, find_file, with_parts,
};

/// The most bytes of a trace.
const TRACE_BYTES_MAX: u64 = 256 << 20;
/// The most bytes of a device, and of a model: sums over a million wakes stay numbers.
const BYTES_MAX: ByteCount = ByteCount::gib(16 << 10);
/// What a worker of ours was measured to lease on a GPU beside its weights (docs/benchmarks.md, `shelf`).
const OVERHEAD: ByteCount = ByteCount::mib(832);

/// Everything that is played.
pub(super) struct Inputs {
    pub(super) file: PathBuf,
    pub(super) policy: String,
    pub(super) python: PathBuf,
    pub(super) settings: Settings,
    pub(super) kinds: Vec<Kind>,
    pub(super) service: Service,
    pub(super) asked: Vec<Asked>,
    pub(super) trace: TraceFacts,
    pub(super) assumes: Assumes,
    sizes_from: Vec<&'static str>,
    host_parts: Vec<f64>,
}

impl Inputs {
    pub(super) fn read(arguments: &SimulateArguments, errors: Out<'_>) -> Result<Self, Failure> {
        let surroundings = Surroundings::of_this_process();
        let file =
            find_file(arguments.file.as_deref(), &surroundings).map_err(|error| told_of(&error, errors))?;
        let (device, host) = (arguments.device_budget, arguments.host_budget);
        let SimulatedConfig { config, host_budget: host, is_gpu } =
            SimulatedConfig::load(&file, surroundings, device, host)
                .map_err(|error| told_of(&error, errors))?;
        let policy = arguments.policy.clone().unwrap_or_else(|| config.sharing.policy.clone());
        known_names(arguments, &config)?;
        let (sizes, sizes_from) = sizes(arguments, &config)?;
        if let Some(large) = sizes.iter().chain([&config.device_budget]).find(|bytes| **bytes > BYTES_MAX) {
            return Err(wrong(format!(
                "{large} is more than any device has; {BYTES_MAX} is the most that is played"
            )));
        }
        let host_parts = host_parts(&config, &sizes, host);
        let overhead = arguments.overhead.unwrap_or(if is_gpu { OVERHEAD } else { ByteCount::ZERO });
        let kinds: Vec<Kind> = (0..config.models.len())
            .map(|place| kind(arguments, &config, place, sizes[place], host_parts[place], overhead))
            .collect();
        let overheads: u128 = kinds.iter().map(|kind| u128::from(kind.overhead.0)).sum();
        if overheads > u128::from(config.device_budget.0) {
            return Err(wrong(format!(
                "the processes of {} models take {overhead} each beside their weights, which is more than the device budget of \
                 {}: name fewer models or a larger --device-budget, or say what they take with --overhead",
                kinds.len(),
                config.device_budget
            )));
        }
        let millis =
            |duration: std::time::Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX >> 8);
        let settings = Settings {
            quantum_ms: millis(config.quantum),
            is_manual: !config.sharing.evicts,
            wait_max_ms: Some(millis(config.limits.wait_max)),
            parked_max: config.limits.parked_max as usize,
            ..Settings::new(config.device_budget)
        };
        let service = Service {
            prefill_tokens_s: arguments.prefill_tokens_s,
            decode_tokens_s: arguments.decode_tokens_s,
            ..Service::default()
        };
        let (asked, trace) = requests(arguments, &config)?;
        let assumes = assumes(arguments, &config, host, overhead, &service);
        let (file, python) = (config.file, config.python);
        Ok(Self {
            file,
            policy,
            python,
            settings,
            kinds,
            service,
            asked,
            trace,
            assumes,
            sizes_from,
            host_parts,
        })
    }

    /// What is known of each model.
    pub(super) fn facts(&self) -> Vec<ModelFacts> {
        let fact = |place: usize| {
            let kind = &self.kinds[place];
            ModelFacts {
                name: kind.name.clone(),
                weights_bytes: kind.weights,
                size_from: self.sizes_from[place],
                wake_s: (kind.weights.0 >> 20) as f64 * kind.restore_us_per_mib as f64 / 1e6,
                host_part: self.host_parts[place],
            }
        };
        (0..self.kinds.len()).map(fact).collect()
    }
}

/// Every model that the command line names is one of the configuration.
fn known_names(arguments: &SimulateArguments, config: &ServerConfig) -> Result<(), Failure> {
    let sized = arguments.size.iter().map(|(name, _)| ("--size", name));
    let started = arguments.start.iter().map(|(name, _)| ("--start", name));
    for (option, name) in sized.chain(started) {
        let Some(model) = config.model(name) else {
            return Err(wrong(format!(
                "{option}: there is no model {name:?}; there are {}",
                names(config).join(", ")
            )));
        };
        if option == "--start" && model.engine != Engine::Command {
            return Err(wrong(format!(
                "{option}: {name:?} is no engine = \"command\"; its weights are woken"
            )));
        }
    }
    Ok(())
}

fn names(config: &ServerConfig) -> Vec<&str> {
    config.models.iter().map(|model| model.name.as_str()).collect()
}

/// What the weights of each take, and who says so.
fn sizes(
    arguments: &SimulateArguments,
    config: &ServerConfig,
) -> Result<(Vec<ByteCount>, Vec<&'static str>), Failure> {
    let size = |model: &ModelConfig| {
        let said = arguments.size.iter().rev().find(|(name, _)| *name == model.name);
        let command = model.command.as_ref().map(|command| (command.device_bytes, "configuration"));
        said.map(|(_, bytes)| (*bytes, "command line"))
            .or(command)
            .or_else(|| model.weights.map(|bytes| (bytes, "files")))
            .filter(|(bytes, _)| !bytes.is_zero())
    };
    let unknown: Vec<&ModelConfig> = config.models.iter().filter(|model| size(model).is_none()).collect();
    if let Some(first) = unknown.first() {
        let each = unknown.iter().map(|model| format!("{} ({})", model.name, model.source));
        return Err(wrong(format!(
            "what the weights of these models take is not known, because their files are not here: {}; say it, as in \
             --size {}=15GiB, or fetch the models first",
            each.collect::<Vec<_>>().join(", "),
            first.name
        )));
    }
    Ok(config.models.iter().filter_map(size).unzip())
}

/// The part of each model that host memory has a copy of, shared as the server does.
fn host_parts(config: &ServerConfig, sizes: &[ByteCount], host: Option<ByteCount>) -> Vec<f64> {
    let Some(host) = host else { return vec![1.0; sizes.len()] };
    let need = |(model, bytes): (&ModelConfig, &ByteCount)| match model.engine {
        Engine::Command => ByteCount::ZERO,
        _ => host_need(*bytes),
    };
    let needs: Vec<ByteCount> = config.models.iter().zip(sizes).map(need).collect();
    let with_tier =
        config.models.iter().zip(&needs).map(|(model, need)| (Some(*need), config.host_tier_part(model)));
    // As the broker does: a part for one that may be added.
    let with_tier: Vec<_> = with_tier.chain([(Some(ByteCount::ZERO), ByteCount::ZERO)]).collect();
    let shares = fair_shares(host, &with_parts(host, &with_tier));
    let part = |(need, share): (&ByteCount, ByteCount)| {
        if share >= *need { 1.0 } else { share.0 as f64 / need.0 as f64 }
    };
    needs.iter().zip(shares).map(part).collect()
}

fn kind(
    arguments: &SimulateArguments,
    config: &ServerConfig,
    place: usize,
    weights: ByteCount,
    host_part: f64,
    overhead: ByteCount,
) -> Kind {
    let model = &config.models[place];
    let is_program = model.engine == Engine::Command;
    let us_per_mib = |gib_s: f64| 1e6 / (gib_s * 1_024.0);
    let (host_us, source_us) = (us_per_mib(arguments.link_gib_s), us_per_mib(arguments.source_gib_s));
    let started =
        arguments.start.iter().rev().find(|(name, _)| *name == model.name).map(|(_, seconds)| *seconds);
    let cost_us = match started {
        Some(seconds) => seconds * 1e6 / ((weights.0 >> 20).max(1) as f64),
        None if is_program => source_us.max(host_us),
        None => host_part * host_us + (1.0 - host_part) * source_us.max(host_us),
    };
    let apart =
        model.apart.iter().filter_map(|name| config.models.iter().position(|other| other.name == *name));
    Kind {
        uses_link: !is_program,
        overhead: if is_program { ByteCount::ZERO } else { overhead },
        pinned: model.pin,
        is_rigid: is_program,
        keeps_weights: model.sleep == SleepDepth::None,
        preload: model.preload,
        min: model.min.unwrap_or(ByteCount::ZERO),
        max: model.max,
        priority: model.priority,
        keep_alive_ms: model.keep_alive_s.map(|seconds| seconds.saturating_mul(1_000)),
        parallel_max: model.parallel_max as usize,
        apart: apart.collect(),
        ..Kind::new(&model.name, weights, whole(cost_us))
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "not negative; a cast saturates")]
fn whole(us: f64) -> u64 {
    (us.round() as u64).max(1)
}

fn requests(
    arguments: &SimulateArguments,
    config: &ServerConfig,
) -> Result<(Vec<Asked>, TraceFacts), Failure> {
    if let Some(path) = &arguments.trace {
        let text = read(path)?;
        let shown = path.display();
        let mut asked =
            trace::parse(&text, &names(config)).map_err(|error| wrong(format!("{shown}: {error}")))?;
        // Logs count from a beginning of their own. What was before the first request is no part of what is played.
        let first_ms = asked.iter().map(|one| one.at_ms).min().unwrap_or(0);
        for one in &mut asked {
            one.at_ms -= first_ms;
        }
        let facts = TraceFacts { from: format!("from {shown}"), requests: asked.len(), seed: None };
        return Ok((asked, facts));
    }
    let (minutes, rate, pattern) = (arguments.minutes, arguments.rate, arguments.pattern.0);
    if minutes * rate > REQUESTS_MAX as f64 {
        return Err(wrong(format!(
            "{rate} requests a minute for {minutes} minutes are more than {REQUESTS_MAX}"
        )));
    }
    let asked =
        seeded(arguments.seed, pattern, config.models.len(), whole(minutes * 60_000.0), rate, REQUESTS_MAX);
    if asked.is_empty() {
        return Err(wrong(format!(
            "{rate} requests a minute for {minutes} minutes came to none: a longer time, or another --seed"
        )));
    }
    let from = format!(
        "made from seed {}: {}, about {rate} a minute for {minutes} minutes",
        arguments.seed,
        pattern.name()
    );
    let facts = TraceFacts { from, requests: asked.len(), seed: Some(arguments.seed) };
    Ok((asked, facts))
}

/// The text of a trace.
fn read(path: &Path) -> Result<String, Failure> {
    let unreadable = |error: std::io::Error| wrong(format!("{}: {error}", path.display()));
    let mut bytes = Vec::new();
    let from: Box<dyn Read> = if path == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(File::open(path).map_err(unreadable)?)
    };
    from.take(TRACE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > TRACE_BYTES_MAX {
        return Err(wrong(format!("{}: more than {}", path.display(), ByteCount(TRACE_BYTES_MAX))));
    }
    String::from_utf8(bytes).map_err(|error| {
        let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = good.split(|byte| *byte == b'\n').count();
        wrong(format!("{}: line {line} is not UTF-8", path.display()))
    })
}

fn assumes(
    arguments: &SimulateArguments,
    config: &ServerConfig,
    host: Option<ByteCount>,
    overhead: ByteCount,
    service: &Service,
) -> Assumes {
    let (link, source) = (arguments.link_gib_s, arguments.source_gib_s);
    let host_words = host.map_or_else(
        || "host memory has a copy of every model (--host-budget)".to_owned(),
        |bytes| format!("host memory has {bytes} for copies of weights"),
    );
    let quantum_s = config.quantum.as_secs_f64();
    let wait_s_max = config.limits.wait_max.as_secs_f64();
    let sentences = vec![
        format!(
            "device: {} for all models, of it {overhead} for each worker's process (--overhead)",
            config.device_budget
        ),
        format!("{host_words}; weights come from there at {link} GiB/s, from their files at {source} GiB/s"),
        format!(
            "a model that is there computes {} tokens of prompts a second, and {} of each answer; a request that says nothing \
             has {} and {}",
            service.prefill_tokens_s, service.decode_tokens_s, service.prompt_tokens, service.max_tokens
        ),
        format!(
            "a turn is {quantum_s} s (quantum), and nobody waits longer than {wait_s_max} s (wait_s_max)"
        ),
        "no memory for KV, and no request slows another down".to_owned(),
    ];
    Assumes {
        device_budget: config.device_budget,
        host_budget: host,
        link_gib_s: link,
        source_gib_s: source,
        overhead,
        prefill_tokens_s: service.prefill_tokens_s,
        decode_tokens_s: service.decode_tokens_s,
        quantum_s,
        wait_s_max,
        sentences,
    }
}
