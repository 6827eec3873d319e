//! Turns at one model: fair to API keys, bounded, given up by those who leave. Workers without a model, as in `shelf.rs`.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_server::config::{Limits, ModelConfig, ServerConfig};
use shoal_server::shelf::{Caller, Route, RouteError, Shelf};
use shoal_server::state::{Event, EventKind, KeySnapshot, ModelSnapshot, ModelStatus};
use support::shelves::{self, soon};
use tokio::sync::mpsc;

fn model(parallel_max: u32, args: &[&str]) -> ModelConfig {
    ModelConfig { parallel_max, ..shelves::model("chat", args) }
}

fn start(directory: &Path, parked_max: u32, chat: ModelConfig) -> Shelf {
    start_all(directory, parked_max, Duration::from_millis(300), vec![chat])
}

fn start_all(directory: &Path, parked_max: u32, quantum: Duration, models: Vec<ModelConfig>) -> Shelf {
    let config = ServerConfig {
        limits: Limits { parked_max, ..Limits::default() },
        quantum,
        ..shelves::config(directory, 120, models)
    };
    Shelf::start(Arc::new(config)).expect("the shelf starts")
}

fn key(name: &str) -> Caller {
    Caller::new(name, true)
}

fn chat(shelf: &Shelf) -> ModelSnapshot {
    shelf.snapshot().model("chat").expect("configured").clone()
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    // A worker's start alone can take half a minute of a machine that has much else to do.
    let deadline = Instant::now() + Duration::from_mins(2);
    while !holds() {
        assert!(Instant::now() < deadline, "never came: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// What happened, for messages of failed tests.
fn story(shelf: &Shelf) -> String {
    let events = shelf.events_since(0).unwrap_or_default();
    let told = |event: &Arc<Event>| {
        format!("{} {} {}", event.at_ms % 100_000, event.model.as_deref().unwrap_or("-"), event.text)
    };
    events.iter().map(told).collect::<Vec<_>>().join("\n")
}

/// Clients that report when they have a place, and keep it until the report's route is dropped.
struct Clients {
    shelf: Shelf,
    sender: mpsc::UnboundedSender<(String, Route)>,
    placed: mpsc::UnboundedReceiver<(String, Route)>,
    waiting: u64,
}

impl Clients {
    fn new(shelf: &Shelf) -> Self {
        let (sender, placed) = mpsc::unbounded_channel();
        Self { shelf: shelf.clone(), sender, placed, waiting: 0 }
    }

    /// So many more ask, and wait.
    async fn ask(&mut self, who: &str, count: u64) {
        for _ in 0..count {
            let (to, sender, name) = (self.shelf.clone(), self.sender.clone(), who.to_owned());
            tokio::spawn(async move {
                let route = to.route_for("chat", &key(&name), soon()).await.expect("its turn comes");
                sender.send((name, route)).expect("somebody counts");
            });
        }
        self.waiting += count;
        until("they wait", || chat(&self.shelf).counts.requests_parked == self.waiting).await;
    }

    /// The next one that has a place.
    async fn next(&mut self) -> (String, Route) {
        let next = tokio::time::timeout(Duration::from_secs(30), self.placed.recv()).await;
        self.waiting -= 1;
        next.expect("a place in time").expect("clients")
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_request_waits_for_its_turn_and_not_for_another_keys_two_hundred() {
    let scratch = tempfile::tempdir().expect("scratch");
    let gate = scratch.path().join("gate");
    let shelf = start(scratch.path(), 1_000, model(2, &["--start-gate", &gate.to_string_lossy()]));
    let mut clients = Clients::new(&shelf);
    clients.ask("alice", 200).await;
    clients.ask("bob", 1).await;
    std::fs::write(&gate, "").expect("opened");
    // One wake; then the first two places, of which bob has one.
    let mut at_work = vec![clients.next().await, clients.next().await];
    at_work.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!([&*at_work[0].0, &*at_work[1].0], ["alice", "bob"]);
    assert_eq!(chat(&shelf).counts.wakes, 1);
    // All places are taken, and one who comes now is still the next.
    clients.ask("carol", 1).await;
    let shown = chat(&shelf);
    assert_eq!((shown.status, shown.parallel_max, shown.counts.requests_active), (ModelStatus::Awake, 2, 2));
    let counts = |key: &KeySnapshot| (key.key.clone().unwrap_or_default(), key.active, key.parked);
    let told: Vec<_> = shown.keys.iter().map(counts).collect();
    let expected = [("alice", 1, 199), ("bob", 1, 0), ("carol", 0, 1)];
    assert_eq!(told, expected.map(|(name, active, parked)| (name.to_owned(), active, parked)));
    let why = shelf.why("chat", 5).expect("known").now.join("\n");
    assert!(why.contains("key \"alice\" has 1 there and 199 waiting, key \"bob\" has 1 there"), "{why}");
    assert!(why.contains("as many at the same time as it may (2, `parallel_max`)"), "{why}");
    assert_eq!(
        shelf.progress("chat", &key("carol")).as_deref(),
        Some("awake, 200 requests wait for their turn, 1 of them with this key")
    );
    drop(at_work.remove(0));
    assert_eq!(clients.next().await.0, "carol");
    // alice alone has all the places.
    drop(at_work);
    for _ in 0..199 {
        assert_eq!(clients.next().await.0, "alice");
    }
    until("it rests", || chat(&shelf).counts.requests_active == 0).await;
    assert!(chat(&shelf).keys.is_empty(), "nothing is kept of those who are gone");
    assert_eq!(chat(&shelf).counts.requests_total, 202);
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_key_does_not_fill_the_queue_for_others() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = start(scratch.path(), 6, model(1, &[]));
    let place = shelf.route_for("chat", &key("alice"), soon()).await.expect("routed");
    let mut clients = Clients::new(&shelf);
    clients.ask("alice", 3).await;
    let error = shelf.route_for("chat", &key("alice"), soon()).await.expect_err("half of it is hers");
    assert!(
        matches!(&error, RouteError::KeyFull { parked: 3, left: 3, key, .. } if key == "alice"),
        "{error:?}"
    );
    assert_eq!(
        error.to_string(),
        "3 requests of key \"alice\" wait for model \"chat\" already, and it may have no more while 3 places are left \
         for all"
    );
    clients.ask("bob", 2).await;
    let error = shelf.route_for("chat", &key("bob"), soon()).await.expect_err("one place is for others");
    assert!(matches!(error, RouteError::KeyFull { parked: 2, left: 1, .. }), "{error:?}");
    clients.ask("carol", 1).await;
    let error = shelf.route_for("chat", &key("dora"), soon()).await.expect_err("it is full");
    assert!(matches!(error, RouteError::Full { parked: 6, limit: 6, .. }), "{error:?}");
    assert_eq!(chat(&shelf).counts.requests_refused, 3);
    // Her time at the model must be longer than what the others have there below, however long they are not let run.
    tokio::time::sleep(Duration::from_secs(4)).await;
    drop(place);
    let mut order = String::new();
    for _ in 0..6 {
        let (name, route) = clients.next().await;
        order.push_str(&name[..1]);
        drop(route);
    }
    assert!(order.ends_with("aaa"), "{order}: alice had all the time before");
    // Where there is only one key, all of the queue is for it.
    let alone = Caller::new("alone", false);
    let place = shelf.route_for("chat", &alone, soon()).await.expect("routed");
    let waiting: Vec<_> = (0..6)
        .map(|_| {
            let (shelf, alone) = (shelf.clone(), alone.clone());
            tokio::spawn(async move { shelf.route_for("chat", &alone, soon()).await.map(drop) })
        })
        .collect();
    until("all wait", || chat(&shelf).counts.requests_parked == 6).await;
    drop(place);
    for client in waiting {
        client.await.expect("it ran").expect("its turn came");
    }
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leaves_the_line_or_waits_too_long_keeps_nobody() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = start(scratch.path(), 10, model(1, &[]));
    let place = shelf.route_for("chat", &key("alice"), soon()).await.expect("routed");
    let late = shelf.route_for("chat", &key("bob"), Instant::now() + Duration::from_millis(50)).await;
    let RouteError::Deadline { reason, .. } = late.expect_err("there is one place") else {
        panic!("a deadline")
    };
    assert_eq!(reason, "it is there and answers 1 other requests (1 at the same time at most)");
    let gone = tokio::spawn({
        let shelf = shelf.clone();
        async move { shelf.route_for("chat", &key("bob"), soon()).await.map(drop) }
    });
    until("it waits", || chat(&shelf).counts.requests_parked == 1).await;
    // People's orders take no place, and wait for none.
    let report = shelf.wake("chat", soon()).await.expect("it is awake");
    assert_eq!(report.summary, "it was awake");
    gone.abort();
    until("it left", || chat(&shelf).counts.requests_parked == 0).await;
    let mut clients = Clients::new(&shelf);
    clients.ask("carol", 1).await;
    drop(place);
    let (_, route) = clients.next().await;
    assert!(!route.was_asleep(), "it waited for a turn, not for the model");
    drop(route);
    assert_eq!(chat(&shelf).counts.requests_active, 0);
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_worker_cannot_begin_yet_waits_where_turns_are_taken() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = start(scratch.path(), 10, model(64, &["--inside", "9"]));
    let place =
        shelf.route_for("chat", &key("alice"), soon()).await.expect("an idle worker gets one in any case");
    let mut clients = Clients::new(&shelf);
    clients.ask("alice", 2).await;
    clients.ask("bob", 1).await;
    let why = shelf.why("chat", 5).expect("known").now.join("\n");
    assert!(why.contains("They wait for a place: 9 requests wait inside its worker already."), "{why}");
    drop(place);
    let (first, route) = clients.next().await;
    assert_eq!(first, "bob");
    drop(route);
    for _ in 0..2 {
        drop(clients.next().await);
    }
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_line_at_a_model_that_runs_does_not_make_it_older_than_those_that_cannot_run() {
    let scratch = tempfile::tempdir().expect("scratch");
    let models = ["chat", "code", "docs"].map(|name| ModelConfig { name: name.to_owned(), ..model(1, &[]) });
    // So long that no turn ends while the requests below come.
    let shelf = start_all(scratch.path(), 10, Duration::from_secs(4), models.to_vec());
    let ask = |name: &'static str| {
        let shelf = shelf.clone();
        tokio::spawn(async move {
            let route = shelf.route(name, soon()).await;
            route.unwrap_or_else(|error| panic!("{error}\n{}", story(&shelf)))
        })
    };
    let parked = |name: &str| shelf.snapshot().model(name).expect("configured").counts.requests_parked;
    // One whose worker is still starting would not be waiting when it is its turn.
    until("all are ready", || {
        shelf.snapshot().models.iter().all(|model| model.status == ModelStatus::Asleep)
    })
    .await;
    let place = shelf.route("chat", soon()).await.expect("routed");
    let line = [ask("chat"), ask("chat")].map(|asked| tokio::spawn(async move { asked.await.map(drop) }));
    until("a line", || parked("chat") == 2).await;
    let code = ask("code");
    until("code waits", || parked("code") == 1).await;
    let docs = ask("docs");
    // There is room for one of them. chat gives way to code; then docs has waited for longer than chat has been away.
    let code = code.await.expect("it ran");
    let docs = docs.await.expect("it ran");
    // By the events: docs runs for a turn only, which may be over by the time that this is looked at.
    let brought =
        |event: &&Arc<Event>| matches!(event.what, EventKind::WakeDone { bytes, .. } if !bytes.is_zero());
    let events = shelf.events_since(0).unwrap_or_default();
    let woken: Vec<_> = events.iter().filter(brought).filter_map(|event| event.model.as_deref()).collect();
    let expected = ["chat", "code", "docs"];
    assert_eq!(woken[..3], expected, "chat came back before docs came at all\n{}", story(&shelf));
    drop((place, code, docs));
    for request in line {
        request.await.expect("it ran").expect("its turn came");
    }
    shelf.shutdown(soon()).await;
}
