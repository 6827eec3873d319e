//! [`BrokerClient`]: the worker's end of the control socket (see [`shoal_core::protocol`]).
//!
//! Apart because it must go on whatever the engine does: threads of this crate read the socket and carry out orders,
//! and never need an interpreter's lock. Reading never waits for an order: a wake under way needs the grants that come
//! in behind it. Every queue is bounded, every wait has a deadline (I10), and every order is answered exactly once.
//!
//! A connection has a number, its *epoch*. What is said is said to the server that it was meant for: a line of an epoch
//! that is over is not said to the next server, which has heard in its hello what it needs to know (`resume`).
//!
//! | thread | does |
//! |---|---|
//! | `shoal-broker` | reads lines; grants and denials reach whoever waits for them; answers pings |
//! | `shoal-reclaim`, `shoal-restore` | carry out orders, one of each at a time |
//! | `shoal-usage` | says the figures when they changed, at most five times a second, and sooner when the last request has ended |

mod files;
mod line;
mod orders;
mod resume;
mod slabs;

use std::collections::{BTreeMap, HashMap};
use std::io::{BufReader, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde_json::Value;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::{
    FromServer, FromWorker, LeaseKind, TierUsage, VERSION, WeightsAtRest, WorkerCapabilities, WorkerUsage,
};
use shoal_device::host::HostFile;

use crate::error::{LeaseError, MemoryError};
use crate::lease::{Held, LeaseSource};
use crate::manager::MemoryManager;
use crate::slab_source::LentSlab;
use files::FileStream;
use orders::{Order, Work};

/// Lease requests waiting at once.
const REQUESTS_MAX: usize = 64;
/// Orders of one kind waiting at once.
const ORDERS_MAX: usize = 16;
/// How long one line may take to be written before the socket counts as dead.
const WRITE_WAIT: Duration = Duration::from_secs(5);
/// How long an answer is waited for at least.
const ANSWER_MIN: Duration = Duration::from_millis(100);

/// What the server said first.
#[derive(Clone, Debug, PartialEq)]
pub struct Welcome {
    /// The model's configuration, as the worker understands it.
    pub spec: Value,
    /// `"sim"` or `"cuda:N"`.
    pub device: String,
    /// Capacity of the simulated device.
    pub device_bytes: ByteCount,
    /// The most host memory for copies.
    pub host_budget: ByteCount,
    /// Where the worker shall listen.
    pub data_socket: String,
    /// Whether the server lends memory for host copies ([`BrokerClient::slab_source`]).
    pub lends_slabs: bool,
    /// How long another server is waited for when this one is gone; zero: not at all.
    pub server_wait: Duration,
}

/// The order to finish and exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShutdownOrder {
    /// When running requests must be done.
    pub deadline: Instant,
    /// Why, in a sentence.
    pub reason: String,
}

#[derive(Debug)]
enum Answer {
    Waiting,
    Granted(ByteCount),
    Denied(String),
}

/// What the engine adds to the figures.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct EngineFigures {
    requests_running: u32,
    requests_waiting: u32,
    tokens_out: u64,
    tokens_embedded: u64,
    kv_back_us_per_mib: u64,
    kv_found_milli: u64,
    overhead: Option<ByteCount>,
    overhead_peak: ByteCount,
    tiers: Vec<TierUsage>,
    weights_at_rest: Option<WeightsAtRest>,
}

/// A lease request that was not answered yet.
#[derive(Debug)]
struct Request {
    answer: Answer,
    kind: LeaseKind,
    bytes: ByteCount,
    bytes_min: ByteCount,
    until: Instant,
    reason: String,
}

impl Request {
    fn said(&self, request: u64, now: Instant) -> FromWorker {
        let deadline = self.until.saturating_duration_since(now);
        FromWorker::LeaseRequest {
            request,
            kind: self.kind,
            bytes: self.bytes,
            bytes_min: self.bytes_min,
            deadline_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
            reason: self.reason.clone(),
        }
    }
}

type Hook = Box<dyn FnOnce(&str) + Send>;

#[derive(Default)]
struct State {
    /// The number of the present connection.
    epoch: u64,
    held: Held,
    requests: HashMap<u64, Request>,
    requests_made: u64,
    slab_requests: HashMap<u64, Option<Result<LentSlab, String>>>,
    /// Slabs of the server, so that another server can be given them.
    lent: BTreeMap<u64, HostFile>,
    capabilities: Option<WorkerCapabilities>,
    /// As they were said last.
    usage: WorkerUsage,
    figures: EngineFigures,
    server_wait: Duration,
    /// The server wants to hear that a wake has its memory.
    forwards_when_backed: bool,
    /// The engine's steps run beside wakes.
    steps_in_order: bool,
    shutdown: Option<ShutdownOrder>,
    closed: Option<String>,
    hook: Option<Hook>,
}

/// The writing end of one connection.
struct Writer {
    epoch: u64,
    socket: UnixStream,
}

/// See the module's text.
pub struct BrokerClient {
    path: PathBuf,
    model: String,
    pid: u32,
    host_budget: ByteCount,
    /// Taken before `state` where both are held.
    writer: Mutex<Writer>,
    /// For shutting down while a write is stuck.
    socket: Mutex<UnixStream>,
    state: Mutex<State>,
    changed: Condvar,
    lends_slabs: bool,
    reclaims: SyncSender<Order>,
    wakes: SyncSender<Order>,
    /// The last request has ended: the figures are to be said now.
    ended: SyncSender<()>,
    queued: Mutex<Option<Queued>>,
}

/// What the threads of a client that does not serve yet will take from.
struct Queued {
    reclaims: Receiver<Order>,
    wakes: Receiver<Order>,
    ended: Receiver<()>,
}

impl core::fmt::Debug for BrokerClient {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let state = self.state.lock();
        f.debug_struct("BrokerClient")
            .field("path", &self.path)
            .field("held", &state.held)
            .field("closed", &state.closed)
            .finish_non_exhaustive()
    }
}

impl BrokerClient {
    /// Connects and says hello; returns once the server said welcome. Starts the reading thread; orders wait until
    /// [`serve`](Self::serve).
    ///
    /// # Errors
    /// [`MemoryError::Broker`]: no server there, none that answers within `timeout`, or one of another version.
    pub fn connect(
        path: &Path,
        model: &str,
        pid: u32,
        timeout: Duration,
    ) -> Result<(Arc<Self>, Welcome), MemoryError> {
        let wrong = |what: String| MemoryError::Broker { path: path.to_owned(), what };
        let failed = |doing: &'static str| move |error: std::io::Error| wrong(format!("{doing}: {error}"));
        let mut socket = UnixStream::connect(path).map_err(failed("connect"))?;
        socket.set_write_timeout(Some(WRITE_WAIT)).map_err(failed("set a deadline"))?;
        let hello = FromWorker::Hello {
            version: VERSION,
            model: model.to_owned(),
            pid,
            holds: None,
            answers_pings: true,
        };
        socket.write_all(&line::encode(&hello).map_err(wrong)?).map_err(failed("say hello"))?;
        let clone = || socket.try_clone().map_err(failed("share the socket"));
        let mut reader = BufReader::new(FileStream::new(clone()?));
        let first = line::read_before(&mut reader, Instant::now() + timeout).map_err(wrong)?;
        let FromServer::Welcome {
            version,
            spec,
            device,
            device_bytes,
            host_budget,
            data_socket,
            lends_slabs,
            server_wait_ms,
            forwards_when_backed,
        } = first
        else {
            return Err(wrong(match first {
                FromServer::Refused { reason } => reason,
                _ => "the server's first line is not a welcome".to_owned(),
            }));
        };
        let server_wait = resume::wait_of(server_wait_ms);
        if version != VERSION {
            let what =
                format!("the server speaks version {version}, this worker {VERSION}: install both alike");
            return Err(wrong(what));
        }
        let (reclaims, reclaims_queued) = sync_channel(ORDERS_MAX);
        let (wakes, wakes_queued) = sync_channel(ORDERS_MAX);
        let (ended, ended_queued) = sync_channel(1);
        let client = Arc::new(Self {
            path: path.to_owned(),
            model: model.to_owned(),
            pid,
            host_budget,
            writer: Mutex::new(Writer { epoch: 0, socket: clone()? }),
            socket: Mutex::new(socket),
            state: Mutex::new(State { server_wait, forwards_when_backed, ..State::default() }),
            changed: Condvar::new(),
            lends_slabs,
            reclaims,
            wakes,
            ended,
            queued: Mutex::new(Some(Queued {
                reclaims: reclaims_queued,
                wakes: wakes_queued,
                ended: ended_queued,
            })),
        });
        let weak = Arc::downgrade(&client);
        std::thread::Builder::new()
            .name("shoal-broker".to_owned())
            .spawn(move || resume::listen(&weak, reader))
            .map_err(failed("start a thread"))?;
        let welcome =
            Welcome { spec, device, device_bytes, host_budget, data_socket, lends_slabs, server_wait };
        Ok((client, welcome))
    }

    /// Starts carrying out orders on `manager`, and saying its figures.
    ///
    /// # Errors
    /// [`MemoryError::Broker`] if it serves already, or no thread can be had.
    pub fn serve(self: &Arc<Self>, manager: &Arc<MemoryManager>) -> Result<(), MemoryError> {
        let wrong = |what: String| MemoryError::Broker { path: self.path.clone(), what };
        let Some(queued) = self.queued.lock().take() else {
            return Err(wrong("it serves a manager already".to_owned()));
        };
        orders::start(self, manager, queued).map_err(|error| wrong(format!("start a thread: {error}")))
    }

    /// Says how far loading is.
    pub fn loading(&self, phase: &str, done: ByteCount, total: ByteCount) {
        self.say(self.epoch(), &FromWorker::Loading { phase: phase.to_owned(), done, total });
    }

    /// Says that the data socket answers and the weights are staged.
    pub fn ready(&self, capabilities: WorkerCapabilities) {
        let epoch = {
            let mut state = self.state.lock();
            state.capabilities = Some(capabilities.clone());
            state.epoch
        };
        self.say(epoch, &FromWorker::Ready { capabilities });
    }

    /// Says that the model cannot be served.
    pub fn failed(&self, code: &str, message: &str) {
        self.say(self.epoch(), &FromWorker::Failed { code: code.to_owned(), message: message.to_owned() });
    }

    /// Sets the engine's figures; they are said with the next usage line, which comes at once where no request is left.
    /// `tokens_out` were generated since its start, `tokens_embedded` became vectors.
    pub fn set_requests(&self, running: u32, waiting: u32, tokens_out: u64, tokens_embedded: u64) {
        let now = (running, waiting, tokens_out, tokens_embedded);
        let before = {
            let figures = &mut self.state.lock().figures;
            let before = (
                figures.requests_running,
                figures.requests_waiting,
                figures.tokens_out,
                figures.tokens_embedded,
            );
            (figures.requests_running, figures.requests_waiting) = (running, waiting);
            (figures.tokens_out, figures.tokens_embedded) = (tokens_out, tokens_embedded);
            before
        };
        if running == 0 && waiting == 0 && before != now {
            // One that is there already is as good.
            let _ = self.ended.try_send(());
        }
    }

    /// Sets what bringing a MiB of a cached prefix back takes, or computing it again (microseconds), and what part of all that
    /// is cached a use finds again (thousandths); 0 for what is not known.
    pub fn set_kv_back(&self, us_per_mib: u64, found_milli: u64) {
        let figures = &mut self.state.lock().figures;
        (figures.kv_back_us_per_mib, figures.kv_found_milli) = (us_per_mib, found_milli);
    }

    /// Sets what the tiers below the device did for the engine's KV.
    pub fn set_tiers(&self, tiers: Vec<TierUsage>) {
        self.state.lock().figures.tiers = tiers;
    }

    /// Sets how the engine's weights at rest are.
    pub fn set_weights_at_rest(&self, at_rest: WeightsAtRest) {
        self.state.lock().figures.weights_at_rest = Some(at_rest);
    }

    /// Sets what was measured of device bytes outside our regions: the most since this was last set, and what of it steps
    /// may take again without a lease for it (`peak`; zero where they ask first).
    pub fn set_overhead(&self, measured: ByteCount, peak: ByteCount) {
        let figures = &mut self.state.lock().figures;
        (figures.overhead, figures.overhead_peak) = (Some(measured), peak);
    }

    /// Says that the engine's steps run beside a wake ([`MemoryManager::guard_in_order`]): from now on the server is told
    /// when a wake that it ordered has its memory, and sends requests from then on.
    pub fn set_steps_in_order(&self) {
        self.state.lock().steps_in_order = true;
    }

    /// The order to finish, if it came.
    #[must_use]
    pub fn shutdown_order(&self) -> Option<ShutdownOrder> {
        self.state.lock().shutdown.clone()
    }

    /// Waits for the order to finish, at most `timeout`; also returns (with `None`) when the socket is closed.
    #[must_use]
    pub fn wait_shutdown(&self, timeout: Duration) -> Option<ShutdownOrder> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock();
        while state.shutdown.is_none() && state.closed.is_none() {
            if self.changed.wait_until(&mut state, deadline).timed_out() {
                break;
            }
        }
        state.shutdown.clone()
    }

    /// Why the socket is closed, if it is.
    #[must_use]
    pub fn closed(&self) -> Option<String> {
        self.state.lock().closed.clone()
    }

    /// Registers what happens when the socket closes, from whatever side: it is called once, on a thread of this
    /// crate, or now if the socket is closed. It replaces an earlier hook.
    pub fn on_disconnect(&self, hook: impl FnOnce(&str) + Send + 'static) {
        let mut state = self.state.lock();
        match state.closed.clone() {
            None => state.hook = Some(Box::new(hook)),
            Some(reason) => {
                drop(state);
                hook(&reason);
            }
        }
    }

    /// Closes the socket; everybody who waits hears `reason`.
    pub fn close(&self, reason: &str) {
        let hook = {
            let mut state = self.state.lock();
            if state.closed.is_some() {
                return;
            }
            tracing::warn!(socket = %self.path.display(), reason, "control socket closed");
            state.closed = Some(reason.to_owned());
            state.hook.take()
        };
        self.shut();
        self.changed.notify_all();
        if let Some(hook) = hook {
            hook(reason);
        }
    }

    /// Ends the present connection, whoever reads or writes there.
    fn shut(&self) {
        // An error means that the other side closed it first.
        let _ = self.socket.lock().shutdown(Shutdown::Both);
    }

    fn epoch(&self) -> u64 {
        self.state.lock().epoch
    }

    /// Says something to the server of this epoch; if there is another one by now, to nobody.
    fn say(&self, epoch: u64, said: &FromWorker) {
        if self.state.lock().closed.is_some() {
            return;
        }
        let written = line::encode(said).and_then(|line| {
            let mut writer = self.writer.lock();
            if writer.epoch != epoch {
                return Ok(());
            }
            writer.socket.write_all(&line).map_err(|error| format!("write: {error}"))
        });
        if let Err(reason) = written {
            // The reading thread sees the end too, and looks for another server.
            if self.state.lock().server_wait.is_zero() { self.close(&reason) } else { self.shut() }
        }
    }

    fn hear(self: &Arc<Self>, said: FromServer, file: Option<OwnedFd>) {
        match said {
            FromServer::Welcome { .. } => self.close("the server said welcome twice"),
            FromServer::Refused { reason } => self.close(&reason),
            FromServer::LeaseGrant { request, kind, bytes } => self.hear_grant(request, kind, bytes),
            FromServer::LeaseDeny { request, reason } => {
                if let Some(asked) = self.state.lock().requests.get_mut(&request) {
                    asked.answer = Answer::Denied(reason);
                }
                self.changed.notify_all();
            }
            FromServer::SlabGrant { request, slab, bytes, is_set_aside, is_zeroed } => {
                self.hear_slab(request, slabs::Granted { slab, bytes, is_set_aside, is_zeroed, file });
            }
            FromServer::SlabDeny { request, reason } => {
                if let Some(answer) = self.state.lock().slab_requests.get_mut(&request) {
                    *answer = Some(Err(reason));
                }
                self.changed.notify_all();
            }
            FromServer::Reclaim { order, bytes, is_own, cached_last, deadline_ms, reason } => {
                let work = match () {
                    () if is_own => Work::ReclaimSpare(bytes),
                    () if cached_last => Work::ReclaimCachedLast(bytes),
                    () => Work::Reclaim(bytes),
                };
                let order = Order::new(self, order, work, deadline_ms, reason);
                orders::queue(&self.reclaims, order);
            }
            FromServer::Wake { order, deadline_ms, reason } => {
                let order = Order::new(self, order, Work::Wake, deadline_ms, reason);
                orders::queue(&self.wakes, order);
            }
            FromServer::Ping { ping } => self.say(self.epoch(), &FromWorker::Pong { ping }),
            FromServer::Shutdown { deadline_ms, reason } => {
                let deadline = Instant::now() + Duration::from_millis(deadline_ms);
                self.state.lock().shutdown = Some(ShutdownOrder { deadline, reason });
                self.changed.notify_all();
            }
        }
    }

    fn hear_grant(&self, request: u64, kind: LeaseKind, bytes: ByteCount) {
        let (is_wanted, epoch) = {
            let mut state = self.state.lock();
            let is_wanted = match state.requests.get_mut(&request) {
                Some(Request { answer: answer @ Answer::Waiting, .. }) => {
                    *answer = Answer::Granted(bytes);
                    state.held.add(kind, bytes);
                    true
                }
                _ => false,
            };
            (is_wanted, state.epoch)
        };
        if is_wanted {
            self.changed.notify_all();
        } else {
            // It crossed our cancellation.
            self.say(epoch, &FromWorker::LeaseReturn { kind, bytes });
        }
    }

    /// Notes a request; gives its number, the server that is to be asked, and in which words.
    fn open_request(&self, asked: Request) -> Result<(u64, u64, FromWorker), LeaseError> {
        let mut state = self.state.lock();
        if let Some(reason) = state.closed.clone() {
            return Err(LeaseError::Disconnected { reason });
        }
        if state.requests.len() >= REQUESTS_MAX {
            return Err(LeaseError::TooMany { limit: REQUESTS_MAX });
        }
        state.requests_made += 1;
        let request = state.requests_made;
        let said = asked.said(request, Instant::now());
        state.requests.insert(request, asked);
        Ok((request, state.epoch, said))
    }
}

impl LeaseSource for BrokerClient {
    fn acquire(
        &self,
        kind: LeaseKind,
        bytes: ByteCount,
        bytes_min: ByteCount,
        deadline: Duration,
        reason: &str,
    ) -> Result<ByteCount, LeaseError> {
        let start = Instant::now();
        let until = start + deadline;
        let reason = reason.to_owned();
        let asked = Request { answer: Answer::Waiting, kind, bytes, bytes_min, until, reason };
        let (request, epoch, said) = self.open_request(asked)?;
        self.say(epoch, &said);
        // Without patience the server answers at once, by what is free.
        let until = until.max(start + ANSWER_MIN);
        let mut state = self.state.lock();
        loop {
            let is_late = Instant::now() >= until;
            let closed = state.closed.clone();
            match state.requests.get(&request) {
                Some(Request { answer: Answer::Waiting, .. }) if closed.is_none() && !is_late => {
                    self.changed.wait_until(&mut state, until);
                    continue;
                }
                _ => {}
            }
            let answer = state.requests.remove(&request).map(|asked| asked.answer);
            let epoch = state.epoch;
            drop(state);
            return match (answer, closed) {
                (Some(Answer::Granted(granted)), _) if granted >= bytes_min.min(bytes) => Ok(granted),
                (Some(Answer::Granted(granted)), _) => {
                    self.give_back(kind, granted);
                    let reason = format!("{granted} granted, less than the least of use");
                    Err(LeaseError::Denied { kind, requested: bytes, reason })
                }
                (Some(Answer::Denied(reason)), _) => {
                    Err(LeaseError::Denied { kind, requested: bytes, reason })
                }
                (_, Some(reason)) => Err(LeaseError::Disconnected { reason }),
                (_, None) => {
                    self.say(epoch, &FromWorker::LeaseCancel { request });
                    Err(LeaseError::Deadline { kind, requested: bytes, waited: start.elapsed() })
                }
            };
        }
    }

    fn give_back(&self, kind: LeaseKind, bytes: ByteCount) {
        let (returned, epoch) = {
            let mut state = self.state.lock();
            (state.held.take(kind, bytes), state.epoch)
        };
        if !returned.is_zero() {
            self.say(epoch, &FromWorker::LeaseReturn { kind, bytes: returned });
        }
    }

    fn held(&self, kind: LeaseKind) -> ByteCount {
        self.state.lock().held.get(kind)
    }
}

impl Drop for BrokerClient {
    fn drop(&mut self) {
        // The reading thread ends with the socket, or where it next looks for us; it cannot be in `hear`, which holds us.
        self.shut();
    }
}
