//! [`BrokerClient`]: the worker's end of the control socket (see [`shoal_core::protocol`]).
//!
//! Apart because it must go on whatever the engine does: threads of this crate read the socket and carry out orders,
//! and never need an interpreter's lock. Reading never waits for an order: a wake under way needs the grants that come
//! in behind it. Every queue is bounded, every wait has a deadline (I10), and every order is answered exactly once.
//!
//! | thread | does |
//! |---|---|
//! | `shoal-broker` | reads lines; grants and denials reach whoever waits for them |
//! | `shoal-reclaim`, `shoal-restore` | carry out orders, one of each at a time |
//! | `shoal-usage` | says the figures when they changed, at most five times a second |

mod files;
mod line;
mod orders;
mod slabs;

use std::collections::HashMap;
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
use shoal_core::protocol::{FromServer, FromWorker, LeaseKind, VERSION, WorkerCapabilities};

use crate::error::{LeaseError, MemoryError};
use crate::lease::{Held, LeaseSource};
use crate::manager::MemoryManager;
use crate::slab_source::LentSlab;
use files::FileStream;
use orders::Order;

/// Lease requests waiting at once.
const REQUESTS_MAX: usize = 64;
/// Orders of one kind waiting at once.
const ORDERS_MAX: usize = 16;
/// How long one line may take to be written before the socket counts as dead.
const WRITE_WAIT: Duration = Duration::from_secs(5);

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct EngineFigures {
    requests_running: u32,
    requests_waiting: u32,
    tokens_out: u64,
    overhead_peak: Option<ByteCount>,
}

type Hook = Box<dyn FnOnce(&str) + Send>;

#[derive(Default)]
struct State {
    held: Held,
    requests: HashMap<u64, Answer>,
    requests_made: u64,
    slab_requests: HashMap<u64, Option<Result<LentSlab, String>>>,
    figures: EngineFigures,
    shutdown: Option<ShutdownOrder>,
    closed: Option<String>,
    hook: Option<Hook>,
}

/// See the module's text.
pub struct BrokerClient {
    path: PathBuf,
    writer: Mutex<UnixStream>,
    /// For shutting down while a write is stuck.
    socket: UnixStream,
    state: Mutex<State>,
    changed: Condvar,
    lends_slabs: bool,
    reclaims: SyncSender<Order>,
    wakes: SyncSender<Order>,
    queued: Mutex<Option<(Receiver<Order>, Receiver<Order>)>>,
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
        let hello = FromWorker::Hello { version: VERSION, model: model.to_owned(), pid };
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
        } = first
        else {
            return Err(wrong("the server's first line is not a welcome".to_owned()));
        };
        if version != VERSION {
            let what =
                format!("the server speaks version {version}, this worker {VERSION}: install both alike");
            return Err(wrong(what));
        }
        let (reclaims, reclaims_queued) = sync_channel(ORDERS_MAX);
        let (wakes, wakes_queued) = sync_channel(ORDERS_MAX);
        let client = Arc::new(Self {
            path: path.to_owned(),
            writer: Mutex::new(clone()?),
            socket,
            state: Mutex::default(),
            changed: Condvar::new(),
            lends_slabs,
            reclaims,
            wakes,
            queued: Mutex::new(Some((reclaims_queued, wakes_queued))),
        });
        let weak = Arc::downgrade(&client);
        std::thread::Builder::new()
            .name("shoal-broker".to_owned())
            .spawn(move || line::read_all(&weak, reader))
            .map_err(failed("start a thread"))?;
        Ok((client, Welcome { spec, device, device_bytes, host_budget, data_socket, lends_slabs }))
    }

    /// Starts carrying out orders on `manager`, and saying its figures.
    ///
    /// # Errors
    /// [`MemoryError::Broker`] if it serves already, or no thread can be had.
    pub fn serve(self: &Arc<Self>, manager: &Arc<MemoryManager>) -> Result<(), MemoryError> {
        let wrong = |what: String| MemoryError::Broker { path: self.path.clone(), what };
        let Some((reclaims, wakes)) = self.queued.lock().take() else {
            return Err(wrong("it serves a manager already".to_owned()));
        };
        orders::start(self, manager, reclaims, wakes)
            .map_err(|error| wrong(format!("start a thread: {error}")))
    }

    /// Says how far loading is.
    pub fn loading(&self, phase: &str, done: ByteCount, total: ByteCount) {
        self.say(&FromWorker::Loading { phase: phase.to_owned(), done, total });
    }

    /// Says that the data socket answers and the weights are staged.
    pub fn ready(&self, capabilities: WorkerCapabilities) {
        self.say(&FromWorker::Ready { capabilities });
    }

    /// Says that the model cannot be served.
    pub fn failed(&self, code: &str, message: &str) {
        self.say(&FromWorker::Failed { code: code.to_owned(), message: message.to_owned() });
    }

    /// Sets the engine's figures; they are said with the next usage line.
    pub fn set_requests(&self, running: u32, waiting: u32, tokens_out: u64) {
        let figures = &mut self.state.lock().figures;
        (figures.requests_running, figures.requests_waiting, figures.tokens_out) =
            (running, waiting, tokens_out);
    }

    /// Sets the measured peak of device bytes outside our regions.
    pub fn set_overhead(&self, peak: ByteCount) {
        self.state.lock().figures.overhead_peak = Some(peak);
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
        // An error means that the other side closed it first.
        let _ = self.socket.shutdown(Shutdown::Both);
        self.changed.notify_all();
        if let Some(hook) = hook {
            hook(reason);
        }
    }

    fn say(&self, said: &FromWorker) {
        if self.state.lock().closed.is_some() {
            return;
        }
        let written = line::encode(said)
            .and_then(|line| self.writer.lock().write_all(&line).map_err(|error| format!("write: {error}")));
        if let Err(reason) = written {
            self.close(&reason);
        }
    }

    fn hear(self: &Arc<Self>, said: FromServer, file: Option<OwnedFd>) {
        match said {
            FromServer::Welcome { .. } => self.close("the server said welcome twice"),
            FromServer::LeaseGrant { request, kind, bytes } => self.hear_grant(request, kind, bytes),
            FromServer::LeaseDeny { request, reason } => {
                if let Some(answer) = self.state.lock().requests.get_mut(&request) {
                    *answer = Answer::Denied(reason);
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
            FromServer::Reclaim { order, bytes, deadline_ms, reason } => {
                let order = Order::new(self, order, Some(bytes), deadline_ms, reason);
                orders::queue(&self.reclaims, order);
            }
            FromServer::Wake { order, deadline_ms, reason } => {
                let order = Order::new(self, order, None, deadline_ms, reason);
                orders::queue(&self.wakes, order);
            }
            FromServer::Shutdown { deadline_ms, reason } => {
                let deadline = Instant::now() + Duration::from_millis(deadline_ms);
                self.state.lock().shutdown = Some(ShutdownOrder { deadline, reason });
                self.changed.notify_all();
            }
        }
    }

    fn hear_grant(&self, request: u64, kind: LeaseKind, bytes: ByteCount) {
        let is_wanted = {
            let mut state = self.state.lock();
            match state.requests.get_mut(&request) {
                Some(answer @ Answer::Waiting) => {
                    *answer = Answer::Granted(bytes);
                    state.held.add(kind, bytes);
                    true
                }
                _ => false,
            }
        };
        if is_wanted {
            self.changed.notify_all();
        } else {
            // It crossed our cancellation.
            self.say(&FromWorker::LeaseReturn { kind, bytes });
        }
    }

    fn open_request(&self) -> Result<u64, LeaseError> {
        let mut state = self.state.lock();
        if let Some(reason) = state.closed.clone() {
            return Err(LeaseError::Disconnected { reason });
        }
        if state.requests.len() >= REQUESTS_MAX {
            return Err(LeaseError::TooMany { limit: REQUESTS_MAX });
        }
        state.requests_made += 1;
        let request = state.requests_made;
        state.requests.insert(request, Answer::Waiting);
        Ok(request)
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
        let request = self.open_request()?;
        let deadline_ms = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
        let reason = reason.to_owned();
        self.say(&FromWorker::LeaseRequest { request, kind, bytes, bytes_min, deadline_ms, reason });
        let mut state = self.state.lock();
        let until = start + deadline;
        loop {
            let is_late = Instant::now() >= until;
            let closed = state.closed.clone();
            match state.requests.get(&request) {
                Some(Answer::Waiting) if closed.is_none() && !is_late => {
                    self.changed.wait_until(&mut state, until);
                    continue;
                }
                _ => {}
            }
            let answer = state.requests.remove(&request);
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
                    self.say(&FromWorker::LeaseCancel { request });
                    Err(LeaseError::Deadline { kind, requested: bytes, waited: start.elapsed() })
                }
            };
        }
    }

    fn give_back(&self, kind: LeaseKind, bytes: ByteCount) {
        let returned = self.state.lock().held.take(kind, bytes);
        if !returned.is_zero() {
            self.say(&FromWorker::LeaseReturn { kind, bytes: returned });
        }
    }

    fn held(&self, kind: LeaseKind) -> ByteCount {
        self.state.lock().held.get(kind)
    }
}

impl Drop for BrokerClient {
    fn drop(&mut self) {
        // The reading thread ends with the socket; it cannot be in `hear`, which holds the client.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}
