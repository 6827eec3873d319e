//! How long a worker waits for a lease that is free: asked over the control socket, decided by the policy, written back.
//!
//! The worker is this program, started by a real shelf with a real policy; the time is taken in the worker, from before its
//! line is written to after the answer is read. Beside it stand other models that do not run, because every decision looks
//! at all of them. The ceiling is an echo of the same two lines over a Unix socket by a thread of the same server process.
//!
//! `cargo bench -p shoal-server --bench lease [-- --out FILE]`; without `--bench` (as in `cargo test --benches`) only a few
//! rounds, to see that it works.
#![expect(clippy::print_stdout, reason = "a bench prints")]

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromWorker, LeaseKind, VERSION, WorkerCapabilities};
use shoal_server::config::{
    CommandConfig, DeviceChoice, Engine, HostTier, Limits, ModelConfig, Patience, ServerConfig, Sharing,
    TierUse,
};
use shoal_server::shelf::Shelf;
use shoal_server::state::ModelStatus;

const BESIDE: [usize; 3] = [0, 99, 999];
const TARGET_US: f64 = 50.0;
const LEASE: ByteCount = ByteCount::mib(2);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    if let Some(control) = value("--control") {
        let out = value("--times").expect("where to write");
        let echo = value("--echo").expect("who echoes");
        let rounds = value("--rounds").and_then(|rounds| rounds.parse().ok()).expect("how many");
        return worker(&control, Path::new(&echo), Path::new(&out), rounds);
    }
    let rounds = if arguments.iter().any(|argument| argument == "--bench") { 5_000 } else { 50 };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let mut rows = Vec::new();
    for beside in BESIDE {
        let (echo, lease) = runtime.block_on(measure(beside, rounds));
        let case = if beside == 0 { "1 model".to_owned() } else { format!("{} models", beside + 1) };
        // A thousand on one device are to show how it grows.
        let target = Some(TARGET_US).filter(|_| beside < 999);
        for (metric, part, target) in [("p50", 0.5, target), ("p99", 0.99, None)] {
            let (took, bare) = (at(&lease, part), at(&echo, part));
            println!("{case:<12} lease {metric} {took:>8.1} us  echo {bare:>8.1} us  ({rounds} samples)");
            rows.push(serde_json::json!({
                "case": case, "metric": format!("lease round trip, {metric}"), "value": took / 1e6, "unit": "s",
                "better": "lower", "ceiling": bare / 1e6, "peer": null, "peer_value": null,
                "target": target.map(|target: f64| target / 1e6), "met": target.map(|target| took <= target),
                "samples": rounds, "spread": [at(&lease, 0.0) / 1e6, at(&lease, 1.0) / 1e6],
            }));
        }
    }
    if let Some(out) = value("--out") {
        let text = serde_json::to_string_pretty(&serde_json::json!({ "rows": rows })).expect("plain data");
        std::fs::write(out, text + "\n").expect("written");
    }
}

fn at(sorted: &[f64], part: f64) -> f64 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index within the list")]
    let index = ((sorted.len() - 1) as f64 * part).round() as usize;
    sorted[index]
}

/// Starts a shelf with one worker and so many models beside it; gives both lists of times (us), sorted.
async fn measure(beside: usize, rounds: usize) -> (Vec<f64>, Vec<f64>) {
    let scratch = tempfile::tempdir().expect("scratch");
    let place = |name: &str| scratch.path().join(name);
    echo(&place("echo.sock"));
    let times = place("times.json");
    let told = |path: PathBuf| path.to_string_lossy().into_owned();
    let asking = ModelConfig {
        engine: Engine::Worker,
        args: vec![
            told(std::env::current_exe().expect("this program")),
            "--control".to_owned(),
            "{control}".to_owned(),
            "--echo".to_owned(),
            told(place("echo.sock")),
            "--times".to_owned(),
            told(times.clone()),
            "--rounds".to_owned(),
            rounds.to_string(),
        ],
        ..ModelConfig::new("asking", "/none")
    };
    let asleep = |number| ModelConfig {
        engine: Engine::Command,
        command: Some(CommandConfig {
            program: "true".into(),
            port: Some(1),
            socket: false,
            health: "/health".to_owned(),
            ready_max: Duration::from_secs(1),
            stop_max: Duration::from_secs(1),
            device_bytes: ByteCount::mib(64),
        }),
        ..ModelConfig::new(format!("asleep-{number}"), "true")
    };
    let config = ServerConfig {
        file: place("shoal.toml"),
        listen: ([127, 0, 0, 1], 0).into(),
        api_key_file: None,
        allowed_hosts: vec![],
        separate_keys: false,
        device: DeviceChoice::Sim,
        device_uuid: None,
        device_budget: ByteCount::gib(8),
        headroom: ByteCount::ZERO,
        host_budget: ByteCount::gib(1),
        host_memory: None,
        host_tier: HostTier::Off,
        disk: vec![],
        disk_key_file: None,
        disk_wait: Duration::from_secs(1),
        tiers: TierUse::default(),
        models: std::iter::once(asking).chain((0..beside).map(asleep)).collect(),
        runtime_dir: place("run"),
        state_dir: place("state"),
        cache_dir: place("cache"),
        log_dir: place("logs"),
        python: PathBuf::from("python3"),
        limits: Limits::default(),
        quantum: Duration::from_secs(3),
        sharing: Sharing::default(),
        orphan_wait: Duration::ZERO,
        fork_workers: false,
        patience: Patience::default(),
        notes: vec![],
        unservable: vec![],
    };
    let shelf = Shelf::start(Arc::new(config)).expect("the shelf starts");
    let deadline = Instant::now() + Duration::from_mins(5);
    let written = async || {
        while !times.exists() {
            let status = shelf.snapshot().model("asking").map(|model| model.status);
            assert!(Instant::now() < deadline && status != Some(ModelStatus::Failed), "{status:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    written().await;
    shelf.shutdown(Instant::now() + Duration::from_secs(10)).await;
    let text = std::fs::read_to_string(&times).expect("written by the worker");
    let mut both: (Vec<f64>, Vec<f64>) = serde_json::from_str(&text).expect("two lists");
    both.0.sort_by(f64::total_cmp);
    both.1.sort_by(f64::total_cmp);
    both
}

/// Answers each line with one as long as a grant.
fn echo(path: &Path) {
    let listener = UnixListener::bind(path).expect("a socket");
    std::thread::spawn(move || {
        let Ok((stream, _)) = listener.accept() else { return };
        let mut lines = BufReader::new(stream.try_clone().expect("a descriptor"));
        let (mut stream, mut line) = (stream, String::new());
        let answer = [b'x'; 70].into_iter().chain([b'\n']).collect::<Vec<_>>();
        while lines.read_line(&mut line).is_ok_and(|count| count > 0) {
            if stream.write_all(&answer).is_err() {
                return;
            }
            line.clear();
        }
    });
}

/// The side that is timed, in a process of its own.
fn worker(control: &str, echo: &Path, out: &Path, rounds: usize) {
    let echoed = times(&mut Line::connect(echo), rounds);
    let mut line = Line::connect(Path::new(control));
    line.say(&FromWorker::Hello {
        answers_pings: false,
        version: VERSION,
        model: "asking".to_owned(),
        pid: std::process::id(),
        holds: None,
    });
    line.hear();
    let capabilities =
        WorkerCapabilities { weights_bytes: ByteCount::mib(64), ..WorkerCapabilities::default() };
    line.say(&FromWorker::Ready { capabilities });
    let leased = times(&mut line, rounds);
    let text = serde_json::to_string(&(echoed, leased)).expect("plain data");
    let partial = out.with_extension("partial");
    std::fs::write(&partial, text).and_then(|()| std::fs::rename(&partial, out)).expect("written");
    // Until it is told to end.
    while !line.hear().contains("shutdown") {}
}

fn times(line: &mut Line, rounds: usize) -> Vec<f64> {
    let mut times = Vec::with_capacity(rounds);
    for request in 1..=rounds as u64 {
        let began = Instant::now();
        line.say(&FromWorker::LeaseRequest {
            request,
            kind: LeaseKind::Kv,
            bytes: LEASE,
            bytes_min: LEASE,
            deadline_ms: 1_000,
            reason: "a prompt of 900 tokens".to_owned(),
        });
        let heard = line.hear();
        times.push(began.elapsed().as_secs_f64() * 1e6);
        if heard.contains("lease_grant") {
            line.say(&FromWorker::LeaseReturn { kind: LeaseKind::Kv, bytes: LEASE });
        } else {
            assert!(heard.starts_with('x'), "{heard}");
        }
    }
    times
}

/// A connection that speaks in lines.
struct Line {
    write: UnixStream,
    read: BufReader<UnixStream>,
}

impl Line {
    fn connect(path: &Path) -> Self {
        let write = UnixStream::connect(path).expect("somebody listens");
        let read = BufReader::new(write.try_clone().expect("a descriptor"));
        Self { write, read }
    }

    fn say(&mut self, message: &FromWorker) {
        let mut text = serde_json::to_string(message).expect("plain data");
        text.push('\n');
        self.write.write_all(text.as_bytes()).expect("somebody reads");
    }

    /// The next line; empty where there is none any more.
    fn hear(&mut self) -> String {
        let mut text = String::new();
        self.read.read_line(&mut text).expect("text");
        if text.is_empty() { "shutdown".to_owned() } else { text }
    }
}
