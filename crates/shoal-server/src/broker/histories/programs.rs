//! Programs of `engine = "command"` and their stewards, which obey as the shelf's do: a lease before a start, requests
//! answered before an end, all or nothing.

use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, WorkerCapabilities, WorkerUsage};
use tokio::sync::mpsc;

use super::DEVICE;
use super::processes::{LINGERS_MS_MAX, Lingering};
use super::shelf::{Beside, PROGRAM_BYTES, beside};
use super::world::{STEP_MS, World};
use crate::shelf::Target;
use crate::supervisor::Exit;

/// Every steward is a task of the server's.
const SERVER: u32 = 7;
const MESSAGES_MAX: usize = 64;
/// As the shelf's: starts in a row that come to nothing.
const FAILURES_MAX: u32 = 3;
/// The longest that requests are waited for.
const DRAIN_MS_MAX: u64 = 30_000;

struct Program {
    pid: u32,
    has: ByteCount,
}

enum Doing {
    Nothing,
    Asking {
        wake: u64,
        request: u64,
    },
    Starting {
        wake: u64,
        program: Program,
        ready_ms: u64,
    },
    Running {
        program: Program,
    },
    Draining {
        reclaim: u64,
        program: Program,
        until_ms: u64,
    },
    /// It ended by itself, and what it started lives until then. No message is read meanwhile.
    Ending {
        wake: Option<u64>,
        reclaim: Option<u64>,
        program: Program,
        until_ms: u64,
    },
}

/// It takes a worker's place.
pub(super) struct Steward {
    heard: mpsc::Receiver<FromServer>,
    doing: Doing,
    next_wake: Option<u64>,
    requests: u64,
    /// What it asks for: as declared, or measured.
    bytes: ByteCount,
    pub(super) held: ByteCount,
    /// What was measured of the present program last, and at most; and whether that was leased since it was.
    newest: ByteCount,
    peak: ByteCount,
    is_covered: bool,
    failures: u32,
}

impl Steward {
    const fn program(&self) -> Option<&Program> {
        match &self.doing {
            Doing::Starting { program, .. }
            | Doing::Running { program }
            | Doing::Draining { program, .. }
            | Doing::Ending { program, .. } => Some(program),
            Doing::Nothing | Doing::Asking { .. } => None,
        }
    }

    /// What its program has of the device.
    pub(super) fn has(&self) -> ByteCount {
        self.program().map_or(ByteCount::ZERO, |program| program.has)
    }

    /// What the driver shows of it.
    pub(super) fn shown(&self) -> Option<(u32, ByteCount)> {
        self.program().map(|program| (program.pid, program.has))
    }

    /// What it is charged with and its program does not have.
    pub(super) fn spare(&self) -> ByteCount {
        self.held.max(self.newest).saturating_sub(self.has())
    }

    /// Requests are answered.
    pub(super) const fn is_there(&self) -> bool {
        matches!(self.doing, Doing::Running { .. })
    }

    fn take_program(&mut self) -> Option<Program> {
        match std::mem::replace(&mut self.doing, Doing::Nothing) {
            Doing::Starting { program, .. }
            | Doing::Running { program }
            | Doing::Draining { program, .. }
            | Doing::Ending { program, .. } => Some(program),
            Doing::Nothing | Doing::Asking { .. } => None,
        }
    }
}

impl World {
    pub(super) fn start_steward(&mut self, place: usize) {
        let (sender, heard) = mpsc::channel(MESSAGES_MAX);
        self.core.handle_started(place, SERVER, self.now_ms);
        let name = self.core.models[place].name.clone();
        if self.core.handle_greeted(&name, SERVER, sender, None, self.now_ms).is_err() {
            return self.steward_exits(place);
        }
        let steward = Steward {
            heard,
            doing: Doing::Nothing,
            next_wake: None,
            requests: 0,
            bytes: PROGRAM_BYTES,
            held: ByteCount::ZERO,
            newest: ByteCount::ZERO,
            peak: ByteCount::ZERO,
            is_covered: false,
            failures: 0,
        };
        self.stewards.insert(place, steward);
        let capabilities =
            WorkerCapabilities { weights_bytes: PROGRAM_BYTES, ..WorkerCapabilities::default() };
        self.steward_says(place, FromWorker::Ready { capabilities });
    }

    fn steward_exits(&mut self, place: usize) {
        self.stewards.remove(&place);
        let exit = Exit { status: None, lived: std::time::Duration::from_millis(self.dice.roll(90_000)) };
        self.core.handle_exited(place, &exit, None, self.now_ms);
        self.end_routes_of(place);
    }

    fn steward_says(&mut self, place: usize, message: FromWorker) {
        self.core.handle_message(place, SERVER, message, self.now_ms);
    }

    fn steward_did(&mut self, place: usize, order: u64, bytes: ByteCount, error: Option<&str>) {
        let error = error.map(str::to_owned);
        let said = FromWorker::OrderDone { order, bytes, copied: ByteCount::ZERO, duration_us: 0, error };
        self.steward_says(place, said);
    }

    fn steward_measures(&mut self, place: usize) {
        let Some(steward) = self.stewards.get(&place) else { return };
        let is_there = matches!(steward.doing, Doing::Running { .. } | Doing::Draining { .. });
        let usage = WorkerUsage {
            weights_device: if is_there { steward.held } else { ByteCount::ZERO },
            weights_total: steward.bytes,
            overhead_device: steward.newest.saturating_sub(steward.held),
            // It asks nobody before it takes that again.
            overhead_peak: steward.peak.saturating_sub(steward.held),
            ..WorkerUsage::default()
        };
        self.steward_says(place, FromWorker::Usage { usage });
    }

    /// One steward does the next thing that it has to.
    pub(super) fn tend(&mut self, place: usize) {
        let Some(steward) = self.stewards.get_mut(&place) else { return };
        if let Doing::Ending { until_ms, .. } = steward.doing {
            if until_ms <= self.now_ms {
                return self.program_is_gone(place);
            }
            self.seen.programs_ending += 1;
            return;
        }
        match steward.heard.try_recv() {
            Err(mpsc::error::TryRecvError::Disconnected) | Ok(FromServer::Shutdown { .. }) => {
                self.stop_program(place, None);
                return self.steward_exits(place);
            }
            Ok(message) => self.steward_hears(place, message),
            Err(mpsc::error::TryRecvError::Empty) => self.steward_looks(place),
        }
        if self.stewards.get(&place).is_some_and(|steward| steward.failures >= FAILURES_MAX) {
            self.steward_exits(place);
        }
    }

    fn steward_hears(&mut self, place: usize, message: FromServer) {
        let now_ms = self.now_ms;
        let Some(steward) = self.stewards.get_mut(&place) else { return };
        match message {
            FromServer::Wake { order, .. } => match &steward.doing {
                Doing::Nothing => self.steward_asks(place, order),
                Doing::Running { .. } => self.steward_did(place, order, ByteCount::ZERO, None),
                Doing::Draining { .. } => {
                    if let Some(before) = steward.next_wake.replace(order) {
                        self.steward_did(place, before, ByteCount::ZERO, Some("another wake was ordered"));
                    }
                }
                Doing::Asking { .. } | Doing::Starting { .. } | Doing::Ending { .. } => {
                    self.steward_did(place, order, ByteCount::ZERO, Some("it is starting already"));
                }
            },
            FromServer::LeaseGrant { request: granted, kind, bytes } => match steward.doing {
                Doing::Asking { wake, request } if request == granted => {
                    steward.held += bytes;
                    self.start_program(place, wake);
                }
                _ => self.steward_says(place, FromWorker::LeaseReturn { kind, bytes }),
            },
            FromServer::LeaseDeny { request: denied, reason } => {
                if let Doing::Asking { wake, request } = steward.doing
                    && request == denied
                {
                    steward.doing = Doing::Nothing;
                    self.steward_did(place, wake, ByteCount::ZERO, Some(&reason));
                }
            }
            FromServer::Reclaim { order, deadline_ms, .. } => {
                match std::mem::replace(&mut steward.doing, Doing::Nothing) {
                    Doing::Running { program } => {
                        let until_ms = now_ms + deadline_ms.saturating_sub(1_000).min(DRAIN_MS_MAX);
                        steward.doing = Doing::Draining { reclaim: order, program, until_ms };
                    }
                    starting @ Doing::Starting { wake, .. } => {
                        steward.doing = starting;
                        self.stop_program(place, None);
                        let bytes = self.give_back(place);
                        self.steward_did(place, wake, ByteCount::ZERO, Some("it had to give its memory up"));
                        self.steward_did(place, order, bytes, None);
                    }
                    draining @ Doing::Draining { .. } => {
                        steward.doing = draining;
                        self.steward_did(place, order, ByteCount::ZERO, Some("it is on its way out already"));
                    }
                    other => {
                        steward.doing = other;
                        self.steward_did(place, order, ByteCount::ZERO, None);
                    }
                }
            }
            _ => {}
        }
    }

    fn steward_asks(&mut self, place: usize, wake: u64) {
        let Some(steward) = self.stewards.get_mut(&place) else { return };
        steward.requests += 1;
        let (request, bytes) = (steward.requests, steward.bytes);
        steward.doing = Doing::Asking { wake, request };
        let said = FromWorker::LeaseRequest {
            request,
            kind: LeaseKind::Weights,
            bytes,
            bytes_min: bytes,
            deadline_ms: 20_000,
            reason: "its command is to be started".to_owned(),
        };
        self.steward_says(place, said);
    }

    fn start_program(&mut self, place: usize, wake: u64) {
        self.pids += 1;
        let (pid, now_ms) = (self.pids, self.now_ms);
        // Some take more than was declared for them.
        let more = if self.dice.chance(20) { ByteCount::mib(2) } else { ByteCount::ZERO };
        let room = DEVICE.saturating_sub(self.used());
        let ready_ms = now_ms + 1 + self.dice.roll(if self.is_steady() { 60 } else { 3_000 });
        let Some(steward) = self.stewards.get_mut(&place) else { return };
        let has = (PROGRAM_BYTES + more).min(room);
        (steward.newest, steward.peak, steward.is_covered) = (ByteCount::ZERO, ByteCount::ZERO, false);
        steward.doing = Doing::Starting { wake, program: Program { pid, has }, ready_ms };
        let target = Target::Unix("/none/command.sock".into());
        self.core.handle_command_started(place, pid, target, now_ms);
    }

    /// A program that runs takes more, or less, and asks nobody.
    fn breathe(&mut self, place: usize) {
        if beside(self.seed) == Beside::Most || !self.dice.chance(10) {
            return;
        }
        let more = ByteCount::mib(2 * self.dice.roll(4));
        let room = DEVICE.saturating_sub(self.used());
        let Some(steward) = self.stewards.get_mut(&place) else { return };
        let Doing::Running { program } = &mut steward.doing else { return };
        let before = program.has;
        program.has = (PROGRAM_BYTES + more).min(before + room);
        self.seen.programs_grew += u64::from(program.has > before && program.has <= steward.peak);
    }

    /// What a program took it may take again, so it stays leased while it runs.
    pub(super) fn check_programs(&mut self) {
        let core = &self.core;
        for (place, steward) in &mut self.stewards {
            let runs = steward.program().is_some() && !steward.held.is_zero();
            let leased = core.book.total(core.models[*place].id);
            let is_whole = runs && leased >= steward.peak;
            assert!(
                !runs || !steward.is_covered || is_whole,
                "a program has taken {}, and {leased} are leased",
                steward.peak
            );
            steward.is_covered = runs && (steward.is_covered || is_whole);
        }
    }

    fn steward_looks(&mut self, place: usize) {
        self.breathe(place);
        let now_ms = self.now_ms;
        let is_steady = self.is_steady();
        let Some(steward) = self.stewards.get_mut(&place) else { return };
        if let Some(program) = steward.program() {
            let has = program.has;
            if has != steward.newest {
                steward.is_covered &= has <= steward.peak;
                steward.peak = steward.peak.max(has);
                steward.newest = has;
                self.steward_measures(place);
            }
        }
        let Some(steward) = self.stewards.get_mut(&place) else { return };
        match &steward.doing {
            Doing::Starting { ready_ms, program, .. } if *ready_ms <= now_ms => {
                // The device had no room for it, or something else is wrong.
                if program.has < PROGRAM_BYTES || !is_steady && self.dice.chance(10) {
                    return self.program_ends(place);
                }
                if let Doing::Starting { wake, program, .. } =
                    std::mem::replace(&mut steward.doing, Doing::Nothing)
                {
                    steward.doing = Doing::Running { program };
                    steward.failures = 0;
                    let held = steward.held;
                    self.seen.programs += 1;
                    self.steward_did(place, wake, held, None);
                    self.steward_measures(place);
                }
            }
            Doing::Draining { reclaim, until_ms, .. } => {
                let (reclaim, is_late) = (*reclaim, *until_ms <= now_ms);
                if self.core.requests_of(place) == 0 {
                    self.stop_program(place, None);
                    let bytes = self.give_back(place);
                    self.steward_did(place, reclaim, bytes, None);
                    self.wake_next(place);
                } else if is_late {
                    if let Some(program) = steward.take_program() {
                        steward.doing = Doing::Running { program };
                    }
                    self.steward_did(
                        place,
                        reclaim,
                        ByteCount::ZERO,
                        Some("requests are still being answered"),
                    );
                    self.wake_next(place);
                }
            }
            _ => {}
        }
    }

    fn wake_next(&mut self, place: usize) {
        let Some(steward) = self.stewards.get_mut(&place) else { return };
        let Some(wake) = steward.next_wake.take() else { return };
        if steward.is_there() {
            self.steward_did(place, wake, ByteCount::ZERO, None);
        } else {
            self.steward_asks(place, wake);
        }
    }

    /// The program ends, and nobody had told it to. What it started may live for a while.
    pub(super) fn program_ends(&mut self, place: usize) {
        let lasts_ms_max = if self.is_steady() { STEP_MS } else { LINGERS_MS_MAX };
        let lasts_ms = if self.dice.chance(30) { self.dice.roll(lasts_ms_max) } else { 0 };
        let until_ms = self.now_ms + lasts_ms;
        let Some(steward) = self.stewards.get_mut(&place) else { return };
        steward.doing = match std::mem::replace(&mut steward.doing, Doing::Nothing) {
            Doing::Starting { wake, program, .. } => {
                Doing::Ending { wake: Some(wake), reclaim: None, program, until_ms }
            }
            Doing::Running { program } => Doing::Ending { wake: None, reclaim: None, program, until_ms },
            Doing::Draining { reclaim, program, .. } => {
                Doing::Ending { wake: None, reclaim: Some(reclaim), program, until_ms }
            }
            other => {
                steward.doing = other;
                return;
            }
        };
        self.seen.program_ends += 1;
        self.core.handle_command_broke(place, "crashed", self.now_ms);
        self.end_routes_of(place);
        if lasts_ms == 0 {
            self.program_is_gone(place);
        }
    }

    /// What a program had started is gone too.
    fn program_is_gone(&mut self, place: usize) {
        let Some(steward) = self.stewards.get(&place) else { return };
        let Doing::Ending { wake, reclaim, .. } = steward.doing else { return };
        self.stop_program(place, reclaim.is_none().then(|| "its command crashed".to_owned()));
        let bytes = self.give_back(place);
        if let Some(order) = reclaim {
            self.steward_did(place, order, bytes, None);
            self.wake_next(place);
        } else if let Some(wake) = wake {
            self.start_failed(place, wake);
        }
    }

    fn start_failed(&mut self, place: usize, wake: u64) {
        let Some(steward) = self.stewards.get_mut(&place) else { return };
        steward.failures += 1;
        let is_over = steward.failures >= FAILURES_MAX;
        self.steward_did(place, wake, ByteCount::ZERO, Some("its command crashed"));
        if is_over {
            let (code, message) = ("command".to_owned(), "so it was three times in a row".to_owned());
            self.steward_says(place, FromWorker::Failed { code, message });
        }
    }

    fn stop_program(&mut self, place: usize, trouble: Option<String>) {
        let Some(steward) = self.stewards.get_mut(&place) else { return };
        let (has, pid) = (steward.has(), steward.program().map(|program| program.pid));
        if steward.take_program().is_none() {
            return;
        }
        self.seen.overhead_down += u64::from(steward.peak > steward.bytes);
        steward.bytes = steward.bytes.max(steward.peak);
        (steward.newest, steward.peak) = (ByteCount::ZERO, ByteCount::ZERO);
        // The device may have it for a while after that.
        let has = has.min(self.core.book.total(self.core.models[place].id));
        if let Some(pid) = pid.filter(|_| self.core.driver.is_heard() && !self.is_calm && !has.is_zero())
            && self.dice.chance(60)
        {
            let until_ms = self.now_ms + self.dice.roll(LINGERS_MS_MAX);
            self.lingering.push(Lingering { pid, has, until_ms });
        }
        self.core.handle_command_ended(place, "ended".to_owned(), trouble, self.now_ms);
    }

    fn give_back(&mut self, place: usize) -> ByteCount {
        let Some(steward) = self.stewards.get_mut(&place) else { return ByteCount::ZERO };
        let bytes = std::mem::take(&mut steward.held);
        if !bytes.is_zero() {
            self.steward_says(place, FromWorker::LeaseReturn { kind: LeaseKind::Weights, bytes });
        }
        self.steward_measures(place);
        bytes
    }
}
