//! Takes a worker's place for a model whose engine is a command: a program that knows nothing of leases.
//!
//! To the core a steward is a worker: it asks for leases, takes orders and answers each once, with the same messages.
//! Waking is asking for the lease, starting the program and waiting until its health is 200; giving memory up is waiting
//! for the requests that it answers, ending it with all that it started, and returning the whole lease. It is charged what
//! the configuration declares, or what was measured of it where that is more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use shoal_core::bytes::{ByteCount, PAGE_BYTES};
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, WorkerCapabilities, WorkerUsage};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{Shared, Target};
use crate::broker::{DRAIN_MS_MAX, millis};
use crate::config::{CommandConfig, DeviceChoice};
use crate::gateway::probe;
use crate::supervisor::{Exit, Launch, Watcher, WorkerProcess, ram_of_group};

const MESSAGES_MAX: usize = 64;
/// How often a program that starts is asked whether it is ready, and one that is to end whether requests are left.
const LOOK: Duration = Duration::from_millis(50);
/// How often a running program's RAM is measured, or what the driver showed of it is taken up.
const MEASURE: Duration = Duration::from_secs(2);
/// How long one question about its health may take.
const PROBE_WAIT_MAX: Duration = Duration::from_secs(2);
/// Starts in a row that come to nothing, after which it is started again only when somebody asks for it by hand.
const FAILURES_MAX: u32 = 3;
const REMEDY: &str = "`command` must be a program in PATH, or a path to one";

/// Keeps the model at `place` until the server ends.
pub(super) async fn keep(shared: Arc<Shared>, place: usize) {
    let (start, end) = shared.with(|core, _| {
        let model = &core.models[place];
        (Arc::clone(&model.start), Arc::clone(&model.end))
    });
    loop {
        tokio::select! {
            () = shared.cancel.cancelled() => return,
            () = start.notified() => {}
        }
        // Another configuration may have come since the last one.
        let Some(command) = shared.with(|core, _| core.models[place].config.command.clone()) else { return };
        let _stale = end.notified().now_or_never();
        let began = Instant::now();
        shared.with(|core, now_ms| core.handle_started(place, std::process::id(), now_ms));
        if let Some(steward) = Steward::greet(&shared, place, &command) {
            steward.serve().await;
        }
        if shared.cancel.is_cancelled() {
            return;
        }
        let exit = Exit { status: None, lived: began.elapsed() };
        shared.with(|core, now_ms| core.handle_exited(place, &exit, None, now_ms));
    }
}

/// A program that was started. One that was not seen to its end is killed when this is dropped, with all that it started.
struct Program {
    process: WorkerProcess,
    target: Target,
    is_over: bool,
    /// Ends it when this server is gone; none where there is no shell for it.
    _watcher: Option<Watcher>,
}

impl Program {
    async fn end(mut self, patience: Duration) -> String {
        let ended = self.process.end_group(patience).await;
        self.is_over = ended.is_ok();
        ended.map_or_else(|error| format!("cannot be waited for: {error}"), |exit| exit.to_string())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if !self.is_over {
            self.process.kill_group();
        }
    }
}

/// What the steward is about.
enum Doing {
    Nothing,
    /// The lease was asked for.
    Asking {
        wake: u64,
        request: u64,
    },
    /// The program is not ready yet.
    Starting {
        wake: u64,
        program: Program,
        until: Instant,
        last: String,
    },
    Running {
        program: Program,
    },
    /// Nobody is sent to it any more; it is ended once the requests that it has are answered.
    Draining {
        reclaim: u64,
        program: Program,
        until: Instant,
    },
}

struct Steward<'a> {
    shared: &'a Arc<Shared>,
    place: usize,
    command: &'a CommandConfig,
    device: DeviceChoice,
    name: String,
    heard: mpsc::Receiver<FromServer>,
    doing: Doing,
    /// A wake that came while the program was on its way out.
    next_wake: Option<u64>,
    requests: u64,
    /// What it is charged with: as declared, or measured.
    bytes: ByteCount,
    held: ByteCount,
    /// What was measured of the present program last, and at most, in whole pages.
    newest: ByteCount,
    peak: ByteCount,
    /// A measurement under way, and of which process: it may take long, and orders must not wait for it.
    measuring: Option<(u32, JoinHandle<Option<ByteCount>>)>,
    failures: u32,
}

impl<'a> Steward<'a> {
    fn greet(shared: &'a Arc<Shared>, place: usize, command: &'a CommandConfig) -> Option<Self> {
        let (sender, heard) = mpsc::channel(MESSAGES_MAX);
        let (name, device) = shared.with(|core, _| (core.models[place].name.clone(), core.config.device));
        let greeted =
            shared.with(|core, now_ms| core.handle_greeted(&name, std::process::id(), sender, None, now_ms));
        if let Err(reason) = greeted {
            tracing::error!(model = name, reason, "a steward was turned away");
            return None;
        }
        let bytes = command.device_bytes.round_up_to(PAGE_BYTES);
        let steward = Self {
            shared,
            place,
            command,
            device,
            name,
            heard,
            doing: Doing::Nothing,
            next_wake: None,
            requests: 0,
            bytes,
            held: ByteCount::ZERO,
            newest: ByteCount::ZERO,
            peak: ByteCount::ZERO,
            measuring: None,
            failures: 0,
        };
        let capabilities = WorkerCapabilities { weights_bytes: bytes, ..WorkerCapabilities::default() };
        steward.say(FromWorker::Ready { capabilities });
        Some(steward)
    }

    fn say(&self, message: FromWorker) {
        let pid = std::process::id();
        self.shared.with(|core, now_ms| core.handle_message(self.place, pid, message, now_ms));
    }

    fn done(&self, order: u64, bytes: ByteCount, error: Option<String>) {
        self.say(FromWorker::OrderDone { order, bytes, copied: ByteCount::ZERO, duration_us: 0, error });
    }

    fn tell_usage(&self) {
        let is_there = matches!(self.doing, Doing::Running { .. } | Doing::Draining { .. });
        let weights_device = if is_there { self.held } else { ByteCount::ZERO };
        let usage = WorkerUsage {
            weights_device,
            weights_total: self.bytes,
            overhead_device: self.newest.saturating_sub(self.held),
            // It asks nobody before it takes that again.
            overhead_peak: self.peak.saturating_sub(self.held),
            ..WorkerUsage::default()
        };
        self.say(FromWorker::Usage { usage });
    }

    async fn serve(mut self) {
        let mut measured = tokio::time::interval(MEASURE);
        measured.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let look = matches!(self.doing, Doing::Starting { .. } | Doing::Draining { .. });
            let shared = Arc::clone(self.shared);
            tokio::select! {
                // Dropping the program kills it.
                () = shared.cancel.cancelled() => return,
                message = self.heard.recv() => match message {
                    Some(FromServer::Shutdown { deadline_ms, .. }) => {
                        self.shut_down(Duration::from_millis(deadline_ms)).await;
                        return;
                    }
                    Some(message) => self.hear(message).await,
                    // The core gave us up.
                    None => {
                        self.shut_down(self.command.stop_max).await;
                        return;
                    }
                },
                exit = ended(&mut self.doing) => self.ended_by_itself(exit).await,
                () = tokio::time::sleep(LOOK), if look => self.look().await,
                _ = measured.tick() => self.measure(),
                found = finished(&mut self.measuring) => self.measured(found),
            }
            if self.failures >= FAILURES_MAX {
                return;
            }
        }
    }

    async fn hear(&mut self, message: FromServer) {
        match message {
            FromServer::Wake { order, deadline_ms, .. } => match &self.doing {
                Doing::Nothing => self.ask(order, deadline_ms),
                Doing::Running { .. } => self.done(order, ByteCount::ZERO, None),
                Doing::Draining { .. } => {
                    if let Some(before) = self.next_wake.replace(order) {
                        self.done(before, ByteCount::ZERO, Some("another wake was ordered".to_owned()));
                    }
                }
                Doing::Asking { .. } | Doing::Starting { .. } => {
                    self.done(order, ByteCount::ZERO, Some("it is starting already".to_owned()));
                }
            },
            FromServer::LeaseGrant { request: granted, kind, bytes } => match self.doing {
                Doing::Asking { wake, request } if request == granted => {
                    self.held += bytes;
                    self.start(wake);
                }
                _ => self.say(FromWorker::LeaseReturn { kind, bytes }),
            },
            FromServer::LeaseDeny { request: denied, reason } => {
                if let Doing::Asking { wake, request } = self.doing
                    && request == denied
                {
                    self.doing = Doing::Nothing;
                    self.done(wake, ByteCount::ZERO, Some(reason));
                }
            }
            FromServer::Reclaim { order, deadline_ms, .. } => self.reclaim(order, deadline_ms).await,
            // It asks for no memory, and its ending is seen to elsewhere.
            FromServer::SlabGrant { .. }
            | FromServer::SlabDeny { .. }
            | FromServer::Welcome { .. }
            | FromServer::Refused { .. }
            | FromServer::Ping { .. }
            | FromServer::Shutdown { .. } => {}
        }
    }

    fn ask(&mut self, wake: u64, deadline_ms: u64) {
        self.requests += 1;
        let request = self.requests;
        self.doing = Doing::Asking { wake, request };
        self.say(FromWorker::LeaseRequest {
            request,
            kind: LeaseKind::Weights,
            bytes: self.bytes,
            bytes_min: self.bytes,
            deadline_ms,
            reason: "its command is to be started".to_owned(),
        });
    }

    fn start(&mut self, wake: u64) {
        match self.spawn() {
            Ok(program) => {
                let (pid, target) = (program.process.pid(), program.target.clone());
                (self.newest, self.peak) = (ByteCount::ZERO, ByteCount::ZERO);
                self.doing = Doing::Starting {
                    wake,
                    program,
                    until: Instant::now() + self.command.ready_max,
                    last: "nothing listens yet".to_owned(),
                };
                let place = self.place;
                self.shared.with(|core, now_ms| core.handle_command_started(place, pid, target, now_ms));
            }
            Err(reason) => {
                self.doing = Doing::Nothing;
                self.give_back();
                self.failed(wake, reason);
            }
        }
    }

    fn spawn(&self) -> Result<Program, String> {
        let (place, name) = (self.place, &self.name);
        let (model, log, runtime_dir) = self.shared.with(|core, _| {
            let model = &core.models[place];
            (model.config.clone(), model.log.clone(), core.config.runtime_dir.clone())
        });
        let socket = runtime_dir.join(format!("command-{place}.sock"));
        let target = if self.command.socket {
            // What the one before left would look like a program that listens.
            match std::fs::remove_file(&socket) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(format!("{} cannot be removed: {error}", socket.display()));
                }
                _ => Target::Unix(socket.clone()),
            }
        } else {
            let port = self
                .command
                .port
                .map_or_else(free_port, Ok)
                .map_err(|error| format!("no free port: {error}"))?;
            Target::Tcp(([127, 0, 0, 1], port).into())
        };
        let port =
            if let Target::Tcp(address) = &target { address.port().to_string() } else { String::new() };
        let fill = |text: &String| {
            text.replace("{port}", &port)
                .replace("{socket}", &socket.to_string_lossy())
                .replace("{model}", name)
        };
        let program = self.command.program.to_string_lossy().into_owned();
        let mut env: BTreeMap<_, _> =
            model.env.iter().map(|(key, value)| (key.clone(), fill(value))).collect();
        // `nvidia-smi` counts GPUs in the order of the bus; so do our workers.
        env.entry("CUDA_DEVICE_ORDER".to_owned()).or_insert_with(|| "PCI_BUS_ID".to_owned());
        let launch = Launch {
            model: name.clone(),
            command: std::iter::once(program).chain(model.args.iter().map(fill)).collect(),
            env,
            log,
            remedy: REMEDY,
        };
        let process = WorkerProcess::start(&launch).map_err(|error| error.to_string())?;
        let watcher = Watcher::over(process.pid());
        let watcher = watcher.inspect_err(|error| {
            tracing::warn!(%error, model = name, "nothing would end its command if this server were killed");
        });
        Ok(Program { process, target, is_over: false, _watcher: watcher.ok() })
    }

    /// A program that starts may be ready by now, one that is to end may have answered its last request.
    async fn look(&mut self) {
        match &mut self.doing {
            Doing::Starting { program, until, last, .. } => {
                let target = program.target.clone();
                let found = probe(&target, &self.command.health, PROBE_WAIT_MAX).await;
                let is_late = Instant::now() >= *until;
                match found {
                    Ok(()) => self.is_ready(),
                    Err(why) => {
                        *last = why;
                        if is_late {
                            self.too_late().await;
                        }
                    }
                }
            }
            Doing::Draining { reclaim, until, .. } => {
                let (reclaim, is_late) = (*reclaim, Instant::now() >= *until);
                let active = self.shared.with(|core, _| core.requests_of(self.place));
                if active == 0 {
                    self.stop().await;
                    let bytes = self.give_back();
                    self.done(reclaim, bytes, None);
                    self.wake_next();
                } else if is_late {
                    if let Doing::Draining { program, .. } =
                        std::mem::replace(&mut self.doing, Doing::Nothing)
                    {
                        self.doing = Doing::Running { program };
                    }
                    let requests = if active == 1 { "request is" } else { "requests are" };
                    let why = format!(
                        "{active} {requests} still being answered, and it cannot yield in the middle"
                    );
                    self.done(reclaim, ByteCount::ZERO, Some(why));
                    self.wake_next();
                }
            }
            _ => {}
        }
    }

    fn is_ready(&mut self) {
        if let Doing::Starting { wake, program, .. } = std::mem::replace(&mut self.doing, Doing::Nothing) {
            self.doing = Doing::Running { program };
            self.failures = 0;
            self.done(wake, self.held, None);
            self.tell_usage();
        }
    }

    async fn too_late(&mut self) {
        let Doing::Starting { wake, last, .. } = &self.doing else { return };
        let (wake, health) = (*wake, &self.command.health);
        let within = self.command.ready_max.as_secs_f64();
        let reason = format!("its command was not ready within {within:.0} s (GET {health}: {last})");
        self.stop().await;
        self.give_back();
        self.failed(wake, reason);
    }

    /// A start came to nothing.
    fn failed(&mut self, wake: u64, reason: String) {
        self.failures += 1;
        if self.failures >= FAILURES_MAX {
            let message = format!("{reason}; so it was {FAILURES_MAX} times in a row");
            self.done(wake, ByteCount::ZERO, Some(reason));
            self.say(FromWorker::Failed { code: "command".to_owned(), message });
        } else {
            self.done(wake, ByteCount::ZERO, Some(reason));
        }
    }

    async fn reclaim(&mut self, order: u64, deadline_ms: u64) {
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Running { program } => {
                let patience = Duration::from_millis(deadline_ms).saturating_sub(self.command.stop_max);
                let until = Instant::now() + patience.min(Duration::from_millis(DRAIN_MS_MAX));
                self.doing = Doing::Draining { reclaim: order, program, until };
                self.look().await;
            }
            Doing::Starting { wake, program, until, last } => {
                self.doing = Doing::Starting { wake, program, until, last };
                self.stop().await;
                let bytes = self.give_back();
                self.done(
                    wake,
                    ByteCount::ZERO,
                    Some("it had to give its memory up while it started".to_owned()),
                );
                self.done(order, bytes, None);
            }
            draining @ Doing::Draining { .. } => {
                self.doing = draining;
                self.done(order, ByteCount::ZERO, Some("it is on its way out already".to_owned()));
            }
            other => {
                self.doing = other;
                self.done(order, ByteCount::ZERO, None);
            }
        }
    }

    fn wake_next(&mut self) {
        if let Some(wake) = self.next_wake.take() {
            if matches!(self.doing, Doing::Running { .. }) {
                self.done(wake, ByteCount::ZERO, None);
            } else {
                let wait_max = self.shared.with(|core, _| core.config.limits.wait_max);
                self.ask(wake, millis(wait_max));
            }
        }
    }

    /// Ends the program, if there is one.
    async fn stop(&mut self) {
        let Some(program) = self.take_program() else { return };
        let status = program.end(self.command.stop_max).await;
        self.gone(status, None);
    }

    fn take_program(&mut self) -> Option<Program> {
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Starting { program, .. }
            | Doing::Running { program }
            | Doing::Draining { program, .. } => Some(program),
            Doing::Nothing | Doing::Asking { .. } => None,
        }
    }

    /// The program ended, and nobody had told it to.
    async fn ended_by_itself(&mut self, exit: std::io::Result<Exit>) {
        let doing = std::mem::replace(&mut self.doing, Doing::Nothing);
        let (wake, reclaim, program) = match doing {
            Doing::Starting { wake, program, .. } => (Some(wake), None, program),
            Doing::Running { program } => (None, None, program),
            Doing::Draining { reclaim, program, .. } => (None, Some(reclaim), program),
            Doing::Nothing | Doing::Asking { .. } => return,
        };
        let status =
            exit.map_or_else(|error| format!("cannot be waited for: {error}"), |exit| exit.to_string());
        let words = program.process.last_line().map(|line| format!(": {line}")).unwrap_or_default();
        let log = self.shared.with(|core, _| core.models[self.place].log.display().to_string());
        let reason = format!("its command {status}{words} (its output is in {log})");
        // What it started may still live, and goes with it: its memory is not given back before.
        self.shared.with(|core, now_ms| core.handle_command_broke(self.place, &status, now_ms));
        program.process.clear_group().await;
        drop(program);
        self.gone(status, reclaim.is_none().then(|| reason.clone()));
        let bytes = self.give_back();
        if let Some(order) = reclaim {
            self.done(order, bytes, None);
            self.wake_next();
        } else if let Some(wake) = wake {
            self.failed(wake, reason);
        }
    }

    fn gone(&mut self, status: String, trouble: Option<String>) {
        let place = self.place;
        let had = self.shared.with(|core, now_ms| {
            let had = core.program_had(place);
            core.handle_command_ended(place, status, trouble, now_ms);
            had
        });
        // It may have taken more since that was last taken up.
        self.bytes = self.bytes.max(self.peak).max(had.round_up_to(PAGE_BYTES));
        (self.newest, self.peak) = (ByteCount::ZERO, ByteCount::ZERO);
    }

    fn give_back(&mut self) -> ByteCount {
        let bytes = std::mem::take(&mut self.held);
        if !bytes.is_zero() {
            self.say(FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes });
        }
        self.tell_usage();
        bytes
    }

    fn measure(&mut self) {
        let (Doing::Starting { program, .. } | Doing::Running { program } | Doing::Draining { program, .. }) =
            &self.doing
        else {
            return;
        };
        let pid = program.process.pid();
        if let DeviceChoice::Cuda(_) = self.device {
            // The driver is read anyway. Where it hides processes it shows none of ours, and what was declared stands.
            if let Some((now, most)) = self.shared.with(|core, _| core.program_seen(self.place)) {
                self.takes(now, most);
            }
        } else if self.measuring.is_none() {
            self.measuring = Some((pid, tokio::task::spawn_blocking(move || ram_of_group(pid))));
        }
    }

    /// The program takes `now`, and has taken `most`.
    fn takes(&mut self, now: ByteCount, most: ByteCount) {
        let before = (self.newest, self.peak);
        self.newest = now.round_up_to(PAGE_BYTES);
        self.peak = self.peak.max(most.round_up_to(PAGE_BYTES));
        if (self.newest, self.peak) != before {
            self.tell_usage();
        }
    }

    fn measured(&mut self, found: (u32, Option<ByteCount>)) {
        self.measuring = None;
        let (Doing::Starting { program, .. } | Doing::Running { program } | Doing::Draining { program, .. }) =
            &self.doing
        else {
            return;
        };
        if let (pid, Some(bytes)) = found
            && pid == program.process.pid()
        {
            self.takes(bytes, bytes);
        }
    }

    async fn shut_down(&mut self, patience: Duration) {
        if let Some(program) = self.take_program() {
            let status = program.end(patience.min(self.command.stop_max)).await;
            self.gone(status, None);
        }
    }
}

/// Waits for the end of the program, if there is one; for ever else.
async fn ended(doing: &mut Doing) -> std::io::Result<Exit> {
    match doing {
        Doing::Starting { program, .. } | Doing::Running { program } | Doing::Draining { program, .. } => {
            program.process.wait().await
        }
        Doing::Nothing | Doing::Asking { .. } => std::future::pending().await,
    }
}

/// Waits for a measurement, if one is under way; for ever else.
async fn finished(measuring: &mut Option<(u32, JoinHandle<Option<ByteCount>>)>) -> (u32, Option<ByteCount>) {
    match measuring {
        Some((pid, task)) => (*pid, task.await.unwrap_or_default()),
        None => std::future::pending().await,
    }
}

/// A port of the loopback address that nobody listens at now.
fn free_port() -> std::io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
