//! A shelf and workers that do what a test needs, a server around them, and a client.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses its part")]

pub mod shelves;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, Request, Response, StatusCode};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use serde_json::{Value, json};
use shoal_core::bytes::ByteCount;
use shoal_server::config::{MachineMemory, ServerConfig, Surroundings, parse};
use shoal_server::gateway::{App, Keys, Models, Settings, bind, serve};
use shoal_server::shelf::{Caller, Reloaded, Report, Route, RouteError, RouteSink, ShelfError, Target};
use shoal_server::state::{Event, EventKind, EventLog, Missed, ModelStatus, ShelfSnapshot, Why};
use tokio::sync::{Semaphore, broadcast};
use tokio_util::sync::CancellationToken;

/// A shelf whose models behave by name:
/// `chat` is awake; `slow` takes `wake_time`, or where there is a gate, until that is opened; `never` waits for its
/// deadline; `late` fails when `slow` would be there; `broken`, `full` and `closing` are refused; `flaky` leads to a socket of its own first, to the good one then;
/// `gone` always leads where nobody listens; `hung` has a worker that had to be ended.
#[derive(Debug)]
pub struct FakeModels {
    pub dir: tempfile::TempDir,
    pub wake_time: Duration,
    /// Shut until it has a permit.
    pub wake_gate: Option<Semaphore>,
    pub log: Mutex<EventLog>,
    pub orders: Mutex<Vec<String>>,
    /// Whose requests were routed, by the names of their keys.
    pub callers: Mutex<Vec<Option<String>>>,
    pub sink: Arc<Seen>,
    pub routed: AtomicU64,
    pub waiting: Arc<AtomicU64>,
}

/// What the shelf heard of routes.
#[derive(Debug, Default)]
pub struct Seen {
    pub first_bytes: AtomicU64,
    pub no_bytes: AtomicU64,
    pub more_bytes: AtomicU64,
    pub ended: AtomicU64,
}

impl RouteSink for Seen {
    fn first_byte(&self, _after: Duration, _was_asleep: bool) {
        self.first_bytes.fetch_add(1, Ordering::SeqCst);
    }
    fn tokens(&self, _count: u64) {}
    fn more_bytes(&self) {
        self.more_bytes.fetch_add(1, Ordering::SeqCst);
    }
    fn no_byte(&self, _waited: Duration) {
        self.no_bytes.fetch_add(1, Ordering::SeqCst);
    }
    fn ended(&self) {
        self.ended.fetch_add(1, Ordering::SeqCst);
    }
}

pub const NAMES: [&str; 10] =
    ["chat", "slow", "never", "late", "broken", "full", "closing", "flaky", "gone", "hung"];

impl FakeModels {
    pub fn new() -> Arc<Self> {
        Self::with_gate(None)
    }

    /// Nothing wakes before [`FakeModels::open`].
    pub fn gated() -> Arc<Self> {
        Self::with_gate(Some(Semaphore::new(0)))
    }

    fn with_gate(wake_gate: Option<Semaphore>) -> Arc<Self> {
        Arc::new(Self {
            dir: tempfile::tempdir().expect("a directory"),
            wake_time: Duration::from_millis(400),
            wake_gate,
            log: Mutex::new(EventLog::new(16)),
            orders: Mutex::default(),
            callers: Mutex::default(),
            sink: Arc::default(),
            routed: AtomicU64::new(0),
            waiting: Arc::default(),
        })
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn open(&self) {
        self.wake_gate.as_ref().expect("a gate").add_permits(1);
    }

    async fn wakes(&self) {
        match &self.wake_gate {
            // Given back at once: it stays open.
            Some(gate) => drop(gate.acquire().await.expect("never closed")),
            None => tokio::time::sleep(self.wake_time).await,
        }
    }

    pub fn event(&self, pinned: bool) {
        self.log.lock().push(0, Some("chat"), EventKind::Pinned { pinned });
    }

    async fn find(&self, model: &str, deadline: Instant) -> Result<Route, RouteError> {
        let number = self.routed.fetch_add(1, Ordering::SeqCst);
        let waiting = Waiting::new(&self.waiting);
        let asked = Instant::now();
        let name = model.to_owned();
        let socket = match model {
            "slow" => {
                self.wakes().await;
                "worker"
            }
            "late" => {
                self.wakes().await;
                return Err(RouteError::Failed {
                    model: name,
                    reason: "no memory".into(),
                    retry_after: None,
                });
            }
            "never" => {
                tokio::time::sleep_until(deadline.into()).await;
                let waited = asked.elapsed();
                return Err(RouteError::Deadline { model: name, waited, reason: "loading".into() });
            }
            "broken" => {
                let retry_after = Some(Duration::from_millis(1500));
                return Err(RouteError::Failed { model: name, reason: "corrupt".into(), retry_after });
            }
            "full" => {
                let retry_after = Duration::from_secs(3);
                return Err(RouteError::Full { model: name, parked: 8, limit: 8, retry_after });
            }
            "closing" => return Err(RouteError::ShuttingDown),
            "flaky" if number == 0 => "flaky",
            "chat" | "flaky" | "hung" => "worker",
            "gone" => "nobody",
            _ => {
                let known = NAMES.iter().map(|&name| name.to_owned()).collect();
                return Err(RouteError::UnknownModel { name, known });
            }
        };
        drop(waiting);
        let sink = Arc::clone(&self.sink) as Arc<dyn RouteSink>;
        Ok(Route::new(Target::Unix(self.socket(socket)), asked.elapsed(), model == "slow", Some(sink)))
    }

    fn report(&self, model: &str, order: String) -> Result<Report, ShelfError> {
        if !NAMES.contains(&model) {
            let known = NAMES.iter().map(|&name| name.to_owned()).collect();
            return Err(ShelfError::UnknownModel { name: model.to_owned(), known });
        }
        if model == "broken" {
            return Err(ShelfError::Refused { model: model.to_owned(), reason: "it is corrupt".to_owned() });
        }
        self.orders.lock().push(order.clone());
        Ok(Report {
            model: model.to_owned(),
            status: ModelStatus::Awake,
            bytes: ByteCount::mib(2),
            copied: ByteCount::ZERO,
            duration_ms: 1.5,
            summary: order,
        })
    }
}

struct Waiting(Arc<AtomicU64>);

impl Waiting {
    fn new(count: &Arc<AtomicU64>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(count))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Models for FakeModels {
    fn route<'a>(
        &'a self,
        model: &'a str,
        caller: &'a Caller,
        deadline: Instant,
    ) -> BoxFuture<'a, Result<Route, RouteError>> {
        self.callers.lock().push(caller.name().map(str::to_owned));
        self.find(model, deadline).boxed()
    }
    fn wake<'a>(&'a self, model: &'a str, _: Instant) -> BoxFuture<'a, Result<Report, ShelfError>> {
        async move { self.report(model, format!("wake {model}")) }.boxed()
    }
    fn sleep<'a>(
        &'a self,
        model: &'a str,
        keep: f64,
        _: Instant,
    ) -> BoxFuture<'a, Result<Report, ShelfError>> {
        async move { self.report(model, format!("sleep {model} {keep}")) }.boxed()
    }
    fn why(&self, model: &str, last: usize) -> Result<Why, ShelfError> {
        let report = self.report(model, format!("why {model} {last}"))?;
        let decisions = self.log.lock().since(0).unwrap_or_default();
        Ok(Why {
            model: report.model,
            at_ms: 100,
            status: report.status,
            now: vec![report.summary],
            decisions: decisions.iter().map(|event| (**event).clone()).collect(),
            earlier: 0,
            log: "/logs/decisions.ndjson".to_owned(),
        })
    }

    fn pin(&self, model: &str, pinned: bool) -> Result<Report, ShelfError> {
        self.report(model, format!("pin {model} {pinned}"))
    }
    fn is_strict(&self, model: &str) -> bool {
        NAMES.contains(&model)
    }
    fn is_awake(&self, model: &str) -> bool {
        model == "chat"
    }
    fn progress(&self, model: &str, _caller: &Caller) -> Option<String> {
        (model == "slow").then(|| "waking, 45 %\ndata: x".to_owned())
    }
    fn trouble(&self, model: &str) -> Option<String> {
        (model == "hung").then(|| "it has answered nothing for 60 s, and was ended".to_owned())
    }
    fn reload(&self) -> BoxFuture<'_, Result<Reloaded, ShelfError>> {
        async { Ok(Reloaded { added: vec!["oak".to_owned()], ..Reloaded::default() }) }.boxed()
    }
    fn snapshot(&self) -> ShelfSnapshot {
        snapshot(self.log.lock().last_id(), &self.socket("log"))
    }
    fn subscribe(&self) -> broadcast::Receiver<Arc<Event>> {
        self.log.lock().subscribe()
    }
    fn events_since(&self, id: u64) -> Result<Vec<Arc<Event>>, Missed> {
        self.log.lock().since(id)
    }
    fn shutdown(&self, _: Instant) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }
}

pub fn snapshot(last_event_id: u64, log: &Path) -> ShelfSnapshot {
    let mib = |count: u64| count << 20;
    let time = json!({"count": 3, "last_ms": 12.5, "p50_ms": 11.0, "p99_ms": 40.0});
    let models: Vec<Value> = NAMES
        .iter()
        .map(|name| {
            json!({
                "name": name, "source": "/models/x", "engine": "transformers", "status": "awake", "progress": null,
                "error": null, "pinned": false, "priority": 0, "min": 0, "max": null, "keep_alive_ms": null,
                "bytes": {"weights_device": mib(100), "weights_total": mib(120), "kv_device": mib(8), "kv_live": mib(4),
                          "overhead_device": mib(2), "host": mib(120), "source_only": 0},
                "lease": {"weights": mib(120), "kv": mib(8), "overhead": mib(2), "total": mib(130), "reclaiming": 0, "host": mib(256)},
                "counts": {"requests_active": 1, "requests_parked": 0, "requests_total": 7, "requests_refused": 0,
                           "tokens_out": 99, "wakes": 2, "evictions": 1, "evicted": mib(50), "restored": mib(50),
                           "leases_granted": 3, "leases_denied": 0},
                "first_byte_awake": time, "first_byte_asleep": time, "wake_time": time,
                "last_used_at_ms": 1, "is_elastic": true, "pid": 42, "starts": 1, "log": log, "capabilities": null,
            })
        })
        .collect();
    let budget = mib(640);
    serde_json::from_value(json!({
        "version": 1, "at_ms": 1000, "started_at_ms": 500, "last_event_id": last_event_id,
        "device": {"name": "sim", "simulated": true, "budget": budget, "headroom": 0, "leased": mib(130),
                   "returning": 0, "free": mib(510)},
        "tiers": [{"tier": "device", "budget": budget, "used": mib(110)}, {"tier": "host", "budget": mib(1024), "used": mib(120)},
                  {"tier": "source", "budget": null, "used": 0}],
        "waiting": [], "models": models,
    }))
    .expect("a snapshot")
}

pub const KEY: &str = "0123456789abcdef0123456789abcdef";
/// Another one, with a name.
pub const KEY_OF_ALICE: &str = "fedcba9876543210fedcba9876543210";

/// A server on a free port of loopback; stops when dropped.
#[derive(Debug)]
pub struct Server {
    pub address: SocketAddr,
    pub app: Arc<App>,
    pub stop: CancellationToken,
    pub task: Option<tokio::task::JoinHandle<std::io::Result<()>>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

pub fn settings() -> Settings {
    Settings {
        grace: Duration::from_millis(60),
        comment_every: Duration::from_millis(50),
        silence_max: Duration::from_secs(20),
        silence_told_every: Duration::from_millis(50),
        heartbeat_every: Duration::from_millis(100),
    }
}

/// Starts a server; `server` is added to `[server]`.
pub async fn start(models: Arc<FakeModels>, server: &str, with_keys: bool, settings: Settings) -> Server {
    let surroundings = Surroundings {
        working_dir: "/".into(),
        home: None,
        config_home: None,
        state_home: "/nowhere".into(),
        cache_home: "/nowhere".into(),
        runtime_dir: "/nowhere".into(),
        python: "python3".into(),
        memory: MachineMemory::default(),
        shared_memory: None,
        nvidia: None,
        gpus: None,
        budgets_before: None,
    };
    let text = format!("[server]\nlisten = '127.0.0.1:0'\n{server}\n[[model]]\nname='a'\nsource='a'\n");
    let config: ServerConfig =
        parse(&text).and_then(|file| file.resolve(Path::new("/x.toml"), &surroundings)).expect("a good file");
    let keys = with_keys.then(|| {
        let file = models.dir.path().join("keys");
        std::fs::write(&file, format!("{KEY}\nalice {KEY_OF_ALICE}\n")).expect("written");
        Keys::read(&file).expect("a key")
    });
    let listener = bind(config.listen).await.expect("a free port");
    let address = listener.local_addr().expect("bound");
    let app = App::new(models, &config, keys, settings);
    let stop = CancellationToken::new();
    let task = {
        let (app, stop) = (Arc::clone(&app), stop.clone());
        // Longer than any test waits for the end, so that none takes this for an end that it brought about.
        tokio::spawn(async move { serve(listener, &app, stop, Duration::from_mins(1)).await })
    };
    Server { address, app, stop, task: Some(task) }
}

/// A worker at `models.socket(name)`.
pub fn worker(models: &FakeModels, name: &str, router: axum::Router) {
    let listener = tokio::net::UnixListener::bind(models.socket(name)).expect("a socket");
    tokio::spawn(async move { axum::serve(listener, router).await });
}

/// A worker that reads a request, writes `answer` as it is, and hangs up. Counts its connections.
pub fn raw_worker(models: &FakeModels, name: &str, answer: &'static str) -> Arc<AtomicU64> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::UnixListener::bind(models.socket(name)).expect("a socket");
    let asked = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&asked);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 4096];
            if stream.read(&mut request).await.is_ok_and(|length| length > 0) {
                count.fetch_add(1, Ordering::SeqCst);
                let _ = stream.write_all(answer.as_bytes()).await;
                let _ = stream.flush().await;
            }
        }
    });
    asked
}

/// Sends one request; the answer's body is still on its way.
pub async fn ask(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Response<Incoming> {
    let stream = tokio::net::TcpStream::connect(address).await.expect("listening");
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake::<_, Full<Bytes>>(TokioIo::new(stream)).await.expect("HTTP");
    tokio::spawn(connection);
    let mut request = Request::builder().method(method).uri(path);
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
        request = request.header("host", address.to_string());
    }
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    sender.send_request(request.body(Full::new(body.into())).expect("a request")).await.expect("an answer")
}

pub const JSON: (&str, &str) = ("content-type", "application/json");

pub async fn post(address: SocketAddr, path: &str, body: impl Into<Bytes>) -> Response<Incoming> {
    ask(address, "POST", path, &[JSON], body).await
}

pub async fn get(address: SocketAddr, path: &str) -> Response<Incoming> {
    ask(address, "GET", path, &[], "").await
}

pub async fn whole(response: Response<Incoming>) -> (StatusCode, HeaderMap, Bytes) {
    let (head, body) = response.into_parts();
    (head.status, head.headers, body.collect().await.expect("a whole body").to_bytes())
}

pub async fn text(response: Response<Incoming>) -> (StatusCode, String) {
    let (status, _, body) = whole(response).await;
    (status, String::from_utf8_lossy(&body).into_owned())
}

/// Status and error of an answer that must have OpenAI's form.
pub async fn refusal(response: Response<Incoming>) -> (u16, String, Value) {
    let (status, _, body) = whole(response).await;
    let body: Value = serde_json::from_slice(&body).expect("JSON");
    let error = body["error"].clone();
    for field in ["message", "type", "code", "param"] {
        assert!(error.get(field).is_some(), "{field} is missing in {body}");
    }
    (status.as_u16(), error["code"].as_str().unwrap_or_default().to_owned(), error)
}

/// Waits until `met`, or fails after a minute.
pub async fn until(what: &str, met: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_mins(1);
    while !met() {
        assert!(Instant::now() < deadline, "never came: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
