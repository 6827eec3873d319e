//! The device's driver, played by a test: readings that come, fail, hang, or hide who has what. Workers without a model, as
//! in `shelf.rs`.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::drift::{ProcessReading, Reading};
use shoal_device::gauge::{Gauge, GaugeError};
use shoal_server::config::{CommandConfig, DeviceChoice, Engine, ModelConfig, ServerConfig};
use shoal_server::shelf::Shelf;
use shoal_server::state::{DriverSnapshot, EventKind, ModelSnapshot, ModelStatus};
use support::shelves::{config, events, script, soon};

const MIB: fn(u64) -> ByteCount = ByteCount::mib;
const BUDGET: ByteCount = ByteCount::mib(120);
const HEADROOM: ByteCount = ByteCount::mib(32);

/// What the driver says next.
#[derive(Clone, Debug)]
enum Says {
    /// Free bytes, and who has what.
    Has(u64, Vec<(u32, Option<u64>)>),
    Fails,
}

/// A driver that a test has in hand.
#[derive(Clone, Debug)]
struct Script {
    says: Arc<Mutex<Says>>,
    opened: Arc<Mutex<u32>>,
    /// While there is one, a reading waits for its other end to be dropped.
    hangs: Arc<Mutex<Option<Receiver<()>>>>,
}

impl Script {
    fn new() -> Self {
        let says = Says::Has(152, vec![]);
        Self { says: Arc::new(Mutex::new(says)), opened: Arc::default(), hangs: Arc::default() }
    }

    fn say(&self, says: Says) {
        *self.says.lock() = says;
    }
}

impl Gauge for Script {
    fn source(&self) -> String {
        "a test".to_owned()
    }

    fn read(&mut self) -> Result<Reading, GaugeError> {
        let hangs = self.hangs.lock().take();
        if let Some(hangs) = hangs {
            let _ = hangs.recv();
        }
        match self.says.lock().clone() {
            Says::Fails => {
                Err(GaugeError::Driver { function: "read", code: 15, why: "GPU is lost".to_owned() })
            }
            Says::Has(free, processes) => Ok(Reading {
                total: BUDGET + HEADROOM,
                free: MIB(free),
                processes: processes
                    .into_iter()
                    .map(|(process, mib)| ProcessReading { process, bytes: mib.map(ByteCount::mib) })
                    .collect(),
            }),
        }
    }
}

fn model(name: &str, args: &[&str]) -> ModelConfig {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fake_worker.py");
    let fixed = ["python3", &script.to_string_lossy(), "--control", "{control}", "--model", "{model}"];
    ModelConfig {
        engine: Engine::Worker,
        args: fixed.iter().chain(args).map(|arg| (*arg).to_owned()).collect(),
        ..ModelConfig::new(name, "/none")
    }
}

fn start(directory: &Path, device: DeviceChoice, models: Vec<ModelConfig>, script: &Script) -> Shelf {
    let config = ServerConfig {
        device,
        headroom: HEADROOM,
        quantum: Duration::from_millis(300),
        ..config(directory, BUDGET.0 >> 20, models)
    };
    let script = script.clone();
    let open = move || {
        *script.opened.lock() += 1;
        Ok(Box::new(script.clone()) as Box<dyn Gauge>)
    };
    Shelf::start_measured(Arc::new(config), None, open).expect("the shelf starts")
}

async fn until(shelf: &Shelf, what: &str, holds: impl Fn() -> bool) {
    let deadline = soon();
    while !holds() {
        let story = || events(shelf).iter().map(|event| event.text.clone()).collect::<Vec<_>>().join("\n");
        assert!(Instant::now() < deadline, "never came: {what}\n{}", story());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn told(shelf: &Shelf, is: impl Fn(&EventKind) -> bool) -> Vec<String> {
    events(shelf).iter().filter(|event| is(&event.what)).map(|event| event.text.clone()).collect()
}

fn of(shelf: &Shelf, name: &str) -> ModelSnapshot {
    shelf.snapshot().model(name).expect("configured").clone()
}

fn driver(shelf: &Shelf) -> DriverSnapshot {
    shelf.snapshot().device.driver.unwrap_or_default()
}

async fn awake(shelf: &Shelf, name: &str) -> u32 {
    until(shelf, "it is ready", || of(shelf, name).status == ModelStatus::Asleep).await;
    shelf.wake(name, soon()).await.expect("room");
    of(shelf, name).pid.expect("it runs")
}

#[tokio::test]
async fn a_driver_that_hangs_or_fails_hangs_nobody_and_counts_again_when_it_answers() {
    let scratch = tempfile::tempdir().expect("a directory");
    let script = Script::new();
    let (release, hangs) = channel();
    *script.hangs.lock() = Some(hangs);
    let models = vec![model("chat", &["--weights", "40"])];
    let shelf = start(scratch.path(), DeviceChoice::Sim, models, &script);
    awake(&shelf, "chat").await;
    let lost = |event: &EventKind| matches!(event, EventKind::DriverLost { .. });
    until(&shelf, "it is silent", || !told(&shelf, lost).is_empty()).await;
    assert!(told(&shelf, lost)[0].contains("has not answered for 3 s"), "{:?}", told(&shelf, lost));
    assert!(driver(&shelf).lost.is_some_and(|lost| lost.contains("3 s")));
    shelf.sleep("chat", 0.0, soon()).await.expect("it sleeps");
    shelf.wake("chat", soon()).await.expect("and wakes, by the ledger alone");
    drop(release);
    let found = |event: &EventKind| matches!(event, EventKind::DriverFound { .. });
    until(&shelf, "it answers", || !told(&shelf, found).is_empty()).await;
    assert!(driver(&shelf).lost.is_none() && driver(&shelf).source == "a test");
    // One that fails is opened anew each time.
    script.say(Says::Fails);
    until(&shelf, "it fails", || told(&shelf, lost).len() == 2).await;
    assert!(told(&shelf, lost)[1].contains("GPU is lost"), "{:?}", told(&shelf, lost));
    until(&shelf, "it is opened anew", || *script.opened.lock() > 2).await;
    assert_eq!(told(&shelf, lost).len(), 2, "told once");
    script.say(Says::Has(112, vec![]));
    until(&shelf, "it answers", || told(&shelf, found).len() == 2).await;
    shelf.shutdown(soon()).await;
}

#[tokio::test]
async fn what_a_worker_has_beyond_its_lease_becomes_overhead_of_it_out_of_the_headroom() {
    let scratch = tempfile::tempdir().expect("a directory");
    let script = Script::new();
    let models = vec![model("chat", &["--weights", "40"]), model("code", &["--weights", "40"])];
    let shelf = start(scratch.path(), DeviceChoice::Sim, models, &script);
    let (chat, code) = (awake(&shelf, "chat").await, awake(&shelf, "code").await);
    let has = |chat_mib, code_mib| {
        script
            .say(Says::Has(152 - chat_mib - code_mib, vec![(chat, Some(chat_mib)), (code, Some(code_mib))]));
    };
    has(40, 40);
    until(&shelf, "they are seen", || of(&shelf, "chat").lease.seen == Some(MIB(40))).await;
    assert_eq!((of(&shelf, "chat").lease.drift, driver(&shelf).drift), (0, MIB(0)));
    // Too little to be charged: it stays, and is shown.
    has(41, 36);
    until(&shelf, "it is seen", || driver(&shelf).drift == MIB(1)).await;
    assert_eq!(of(&shelf, "chat").lease.drift, 1 << 20);
    assert_eq!(of(&shelf, "code").lease.drift, -(4 << 20), "leased and not there");
    has(64, 36);
    until(&shelf, "it is charged", || of(&shelf, "chat").lease.overhead == MIB(24)).await;
    let device = shelf.snapshot().device;
    assert_eq!((device.taken, device.leased), (MIB(0), MIB(104)), "the headroom covers it");
    until(&shelf, "no drift is left", || driver(&shelf).drift.is_zero()).await;
    let drifted = told(&shelf, |event| matches!(event, EventKind::Drifted { .. }));
    assert_eq!(drifted, ["has 64 MiB of the device by the driver's word, 40 MiB of it leased"]);
    // It goes back below: what was measured at the peak stays charged, and nobody was ended for it.
    has(40, 40);
    until(&shelf, "it is seen", || of(&shelf, "chat").lease.drift == -(24 << 20)).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(of(&shelf, "chat").lease.overhead, MIB(24));
    assert_eq!((of(&shelf, "chat").pid, of(&shelf, "chat").starts), (Some(chat), 1));
    shelf.shutdown(soon()).await;
}

#[tokio::test]
async fn where_the_driver_hides_processes_free_memory_tells_what_others_have_and_when_the_dead_are_gone() {
    let scratch = tempfile::tempdir().expect("a directory");
    let script = Script::new();
    let models = vec![model("chat", &["--weights", "40"]), model("code", &["--weights", "80"])];
    let shelf = start(scratch.path(), DeviceChoice::Cuda(0), models, &script);
    let chat = awake(&shelf, "chat").await;
    // A number of another name space, without bytes; others have 20.
    script.say(Says::Has(152 - 40 - 20, vec![(4_000_000, None)]));
    until(&shelf, "others are seen", || shelf.snapshot().device.taken == MIB(20)).await;
    let seen = driver(&shelf);
    assert_eq!((seen.ours, seen.others, seen.is_by_process), (MIB(40), MIB(20), false));
    assert_eq!(of(&shelf, "chat").lease.seen, None);
    // It dies, and its memory is not free yet.
    let pid = rustix::process::Pid::from_raw(i32::try_from(chat).expect("a process")).expect("a process");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("ours");
    until(&shelf, "it is gone", || of(&shelf, "chat").pid != Some(chat)).await;
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let device = shelf.snapshot().device;
    assert_eq!((device.returning, device.leased, device.taken), (MIB(40), MIB(40), MIB(20)));
    script.say(Says::Has(152 - 20, vec![(4_000_000, None)]));
    until(&shelf, "it is back", || shelf.snapshot().device.returning.is_zero()).await;
    let returned = |event: &EventKind| matches!(event, EventKind::MemoryReturned { seen: true, .. });
    assert_eq!(told(&shelf, returned).len(), 1);
    awake(&shelf, "code").await;
    assert_eq!(shelf.snapshot().device.taken, MIB(20));
    shelf.shutdown(soon()).await;
}

/// A program has no words for what it takes, and what it started may be what takes it: the driver shows both, and by that it
/// is charged.
#[tokio::test]
async fn a_program_is_charged_what_the_driver_shows_of_it_and_of_what_it_started() {
    let scratch = tempfile::tempdir().expect("a directory");
    let child = scratch.path().join("child");
    let args = ["--port", "{port}", "--child", &child.to_string_lossy()].map(str::to_owned);
    let program = ModelConfig {
        engine: Engine::Command,
        args: std::iter::once(script("fake_engine.py")).chain(args).collect(),
        command: Some(CommandConfig {
            program: "python3".into(),
            port: None,
            socket: false,
            health: "/health".to_owned(),
            ready_max: Duration::from_mins(1),
            stop_max: Duration::from_secs(5),
            device_bytes: MIB(30),
        }),
        ..ModelConfig::new("llama", "/none")
    };
    let says = Script::new();
    let shelf = start(scratch.path(), DeviceChoice::Cuda(0), vec![program], &says);
    awake(&shelf, "llama").await;
    let program = of(&shelf, "llama").pid.expect("it runs");
    let child: u32 = std::fs::read_to_string(&child).expect("written").parse().expect("a number");
    let has =
        |one, other| says.say(Says::Has(152 - one - other, vec![(program, Some(one)), (child, Some(other))]));
    has(8, 34);
    until(&shelf, "it is charged", || of(&shelf, "llama").lease.total == MIB(42)).await;
    assert_eq!(of(&shelf, "llama").lease.overhead, MIB(12));
    assert_eq!(shelf.snapshot().device.taken, MIB(0), "all of it is its own");
    // It asks nobody before it takes that again.
    has(8, 20);
    until(&shelf, "it is less", || of(&shelf, "llama").bytes.overhead_device.is_zero()).await;
    assert_eq!(of(&shelf, "llama").lease.total, MIB(42));
    // What it took just before its end, and nobody had taken up, its next one is charged with from the beginning.
    has(30, 40);
    until(&shelf, "it is seen", || of(&shelf, "llama").lease.seen == Some(MIB(70))).await;
    let pid = rustix::process::Pid::from_raw(i32::try_from(program).expect("a number")).expect("not 0");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("ours");
    until(&shelf, "it is gone", || of(&shelf, "llama").pid.is_none()).await;
    says.say(Says::Has(152, vec![]));
    awake(&shelf, "llama").await;
    assert_eq!(of(&shelf, "llama").lease.weights, MIB(70));
    shelf.shutdown(soon()).await;
}
