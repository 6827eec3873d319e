//! The shelf with workers that have no model: real processes, real sockets, leases that are numbers.

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_device::HostBacking;
use shoal_server::config::{ModelConfig, ServerConfig};
use shoal_server::shelf::{Route, RouteError, Shelf, ShelfError, Target};
use shoal_server::state::{Event, EventKind, ModelStatus};
use support::shelves::{alive, config, count, events, model, soon, start, status, story, until};

const MIB: u64 = 1 << 20;

/// What the worker says over its data socket.
async fn ask(route: &Route) -> String {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let Target::Unix(socket) = route.target() else { panic!("a worker listens at a socket") };
    let mut stream = tokio::net::UnixStream::connect(socket).await.expect("the worker listens");
    stream.write_all(b"GET /health HTTP/1.1\r\n\r\n").await.expect("it reads");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("it answers");
    text
}

/// Replays the ledger from the events: never above the budget, and each event's sum is right.
fn check_ledger(shelf: &Shelf) {
    let budget = shelf.snapshot().device.budget;
    let mut held: BTreeMap<String, u64> = BTreeMap::new();
    for event in events(shelf) {
        let name = event.model.clone().unwrap_or_default();
        let told = match &event.what {
            EventKind::LeaseGranted { bytes, leased, .. } => {
                *held.entry(name).or_default() += bytes.0;
                Some(*leased)
            }
            EventKind::LeaseReturned { bytes, leased, .. } => {
                *held.entry(name).or_default() -= bytes.0;
                Some(*leased)
            }
            EventKind::WorkerExited { pid, returned, returning, .. } => {
                assert_eq!(
                    held.remove(&name).unwrap_or(0),
                    returned.0,
                    "all of it comes back: {}",
                    story(shelf)
                );
                held.insert(format!("process {pid}"), returning.0);
                None
            }
            EventKind::MemoryReturned { pid, bytes, .. } => {
                assert_eq!(held.remove(&format!("process {pid}")), Some(bytes.0), "{}", story(shelf));
                None
            }
            _ => None,
        };
        let sum: u64 = held.values().sum();
        assert!(sum <= budget.0, "I1 at event {}: {sum}\n{}", event.id, story(shelf));
        if let Some(told) = told {
            assert_eq!(told.0, sum, "event {}", event.id);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_herd_of_requests_is_one_wake() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = start(scratch.path(), 120, vec![model("chat", &["--chunks", "4", "--wake-ms", "100"])]);
    let herd: Vec<_> = (0..100)
        .map(|_| {
            let shelf = shelf.clone();
            tokio::spawn(async move {
                let route = shelf.route("chat", soon()).await.expect("routed");
                assert!(route.was_asleep());
                route.first_byte();
                route.tokens(2);
            })
        })
        .collect();
    for request in herd {
        request.await.expect("answered");
    }
    let snapshot = shelf.snapshot();
    let chat = snapshot.model("chat").expect("configured");
    assert_eq!((chat.counts.wakes, chat.counts.requests_total, chat.counts.requests_active), (1, 100, 0));
    assert_eq!((chat.first_byte_asleep.count, chat.counts.tokens_out), (100, 200));
    assert_eq!(chat.status, ModelStatus::Awake);
    let route = shelf.route("chat", soon()).await.expect("routed");
    assert!(!route.was_asleep() && ask(&route).await.contains("\"whole\": true"));
    assert_eq!(
        count(&shelf, "chat", |what| matches!(what, EventKind::WakeStarted { .. })),
        1,
        "{}",
        story(&shelf)
    );
    check_ledger(&shelf);
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_model_yields_just_what_another_needs() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = start(scratch.path(), 150, vec![model("chat", &[]), model("code", &["--weights", "80"])]);
    drop(shelf.route("chat", soon()).await.expect("routed"));
    until(&shelf, "ready", |shelf| status(shelf, "code") == ModelStatus::Asleep).await;
    assert_eq!(shelf.snapshot().device.leased, ByteCount(100 * MIB), "nothing is on the device until used");
    drop(shelf.route("code", soon()).await.expect("routed"));
    let snapshot = shelf.snapshot();
    assert_eq!(
        snapshot.model("chat").expect("configured").lease.total,
        ByteCount(70 * MIB),
        "{}",
        story(&shelf)
    );
    assert_eq!(status(&shelf, "chat"), ModelStatus::PartlyResident);
    let reason = events(&shelf)
        .iter()
        .find_map(|event| {
            if let EventKind::EvictStarted { reason, .. } = &event.what { Some(reason.clone()) } else { None }
        })
        .expect("an eviction");
    assert!(
        reason.contains("code needs 80 MiB for weights, 50 MiB are free; chat has been idle for"),
        "{reason}"
    );
    drop(shelf.route("chat", soon()).await.expect("comes back"));
    assert_eq!(shelf.snapshot().model("chat").expect("configured").counts.restored, ByteCount(130 * MIB));
    check_ledger(&shelf);
    shelf.shutdown(soon()).await;
    // Decisions can be made again from what was written down (I11).
    let log = std::fs::read_to_string(scratch.path().join("logs/decisions.ndjson")).expect("a decision log");
    let mut evictions = 0;
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("a line");
        let state: shoal_core::policy::ShelfState =
            serde_json::from_value(line["state"].clone()).expect("a state");
        let plan = shoal_core::policy::plan(&state, line["now_ms"].as_u64().expect("a time"));
        assert_eq!(serde_json::to_value(&plan).expect("plain data"), line["plan"]);
        evictions += line["plan"].to_string().matches("\"evict\"").count();
    }
    assert_eq!(evictions, 2, "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_that_a_killed_worker_leaves_is_for_its_next_one_and_for_no_other_model() {
    let scratch = tempfile::tempdir().expect("scratch");
    let mark = |name: &str| scratch.path().join(name).to_string_lossy().into_owned();
    let (chat, code) = (mark("chat"), mark("code"));
    let models = vec![model("chat", &["--slab", &chat]), model("code", &["--slab", &code])];
    let lends = ServerConfig {
        host_memory: Some(HostBacking::SharedHugePages),
        ..config(scratch.path(), 300, models)
    };
    let shelf = Shelf::start(Arc::new(lends)).expect("the shelf starts");
    for name in ["chat", "code"] {
        until(&shelf, "ready", |shelf| status(shelf, name) == ModelStatus::Asleep).await;
        let said: Vec<String> = events(&shelf)
            .iter()
            .filter(|event| event.model.as_deref() == Some(name))
            .filter_map(|event| match &event.what {
                EventKind::WorkerLoading { phase, .. } if phase.starts_with("zeroed") => Some(phase.clone()),
                _ => None,
            })
            .collect();
        assert_eq!(said, ["zeroed=True found=''", "zeroed=False found='words'"], "{}", story(&shelf));
    }
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn busy_models_take_turns() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = start(scratch.path(), 120, vec![model("chat", &[]), model("code", &[])]);
    let holding = shelf.route("chat", soon()).await.expect("routed");
    drop(shelf.route("code", soon()).await.expect("routed after chat's turn"));
    // By the events, for whoever asks may be late. Its turn begins with its last lease at the earliest.
    let events = events(&shelf);
    let of_chat = || events.iter().filter(|event| event.model.as_deref() == Some("chat"));
    let ended =
        of_chat().find(|event| matches!(event.what, EventKind::EvictStarted { .. })).expect("a turn's end");
    let leased =
        |event: &&Arc<Event>| matches!(event.what, EventKind::LeaseGranted { .. }) && event.id < ended.id;
    let began = of_chat().rfind(leased).expect("a lease");
    assert!(ended.at_ms - began.at_ms >= 3_000, "chat had its turn: {}", story(&shelf));
    assert!(story(&shelf).contains("chat has had the longest turn"), "{}", story(&shelf));
    drop(holding);
    check_ledger(&shelf);
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_killed_in_the_middle_of_a_wake_gives_its_lease_back_and_its_requests_are_retried() {
    let scratch = tempfile::tempdir().expect("scratch");
    let mark = scratch.path().join("died").to_string_lossy().into_owned();
    let shelf = start(scratch.path(), 120, vec![model("chat", &["--chunks", "4", "--die-in-wake", &mark])]);
    let route = shelf.route("chat", soon()).await.expect("retried on the next worker");
    assert!(ask(&route).await.contains("\"whole\": true"));
    let snapshot = shelf.snapshot();
    let chat = snapshot.model("chat").expect("configured");
    assert_eq!((chat.starts, chat.lease.total), (2, ByteCount(100 * MIB)), "{}", story(&shelf));
    let returned = events(&shelf).iter().find_map(|event| match &event.what {
        EventKind::WorkerExited { returned, status, .. } => Some((*returned, status.clone())),
        _ => None,
    });
    let (returned, status) = returned.expect("it died");
    assert_eq!(returned, ByteCount(25 * MIB));
    assert!(status.contains("signal 9"), "{status}");
    check_ledger(&shelf);
    shelf.shutdown(soon()).await;
}

/// What its worker had when it answered was ordered away in the meantime, and the answer came last.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wake_that_is_done_with_a_part_missing_is_not_the_whole_model_and_is_ordered_again() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = start(scratch.path(), 120, vec![model("chat", &["--chunks", "2", "--short-wakes", "3"])]);
    let begun = Instant::now();
    let route = shelf.route("chat", soon()).await.expect("woken in the end");
    assert!(ask(&route).await.contains("\"whole\": true"));
    // Each time after a moment, not at once.
    assert!(begun.elapsed() >= Duration::from_millis(3 * 10), "{:?}", begun.elapsed());
    let snapshot = shelf.snapshot();
    let chat = snapshot.model("chat").expect("configured");
    assert_eq!((chat.lease.weights, chat.counts.wakes), (ByteCount(100 * MIB), 4), "{}", story(&shelf));
    check_ledger(&shelf);
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_ignores_orders_is_passed_over_and_then_the_requester_hears_why() {
    let scratch = tempfile::tempdir().expect("scratch");
    let models = vec![
        model("deaf", &["--ignore-reclaim", "--weights", "60"]),
        // Dear to bring back, so that deaf is asked first.
        ModelConfig { priority: 5, ..model("kind", &["--weights", "60", "--wake-ms", "200"]) },
        model("chat", &["--weights", "50", "--lease-wait-ms", "8000"]),
        model("large", &["--weights", "100", "--lease-wait-ms", "1500"]),
    ];
    let shelf = start(scratch.path(), 120, models);
    // All of them: only a worker that is there can ask for memory.
    until(&shelf, "ready", |shelf| {
        shelf.snapshot().models.iter().all(|model| model.status == ModelStatus::Asleep)
    })
    .await;
    drop(shelf.route("deaf", soon()).await.expect("routed"));
    drop(shelf.route("kind", soon()).await.expect("routed"));
    drop(shelf.route("chat", soon()).await.expect("served by the next victim"));
    assert_eq!(
        count(&shelf, "deaf", |what| matches!(what, EventKind::EvictTimedOut { .. })),
        1,
        "{}",
        story(&shelf)
    );
    assert!(count(&shelf, "kind", |what| matches!(what, EventKind::EvictDone { .. })) >= 1);
    // Half of the time in which deaf is passed over: after it, deaf is asked anew.
    let refused = shelf
        .route("large", Instant::now() + Duration::from_secs(5))
        .await
        .expect_err("deaf keeps 60 of 120");
    let RouteError::Deadline { reason, .. } = &refused else { panic!("{refused:?}") };
    assert!(reason.contains("deaf holds 60 MiB (did not answer when asked)"), "{reason}");
    check_ledger(&shelf);
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_can_never_fit_says_how_much_it_needs_and_others_go_on() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = start(
        scratch.path(),
        120,
        vec![
            model("large", &["--weights", "119", "--kv-min", "2"]),
            model("missing", &["--fail", "model_missing"]),
            model("chat", &[]),
        ],
    );
    until(&shelf, "failed", |shelf| status(shelf, "large") == ModelStatus::Failed).await;
    let error = shelf.route("large", soon()).await.expect_err("too large").to_string();
    assert!(error.contains("needs 122 MiB") && error.contains("the device budget is 120 MiB"), "{error}");
    until(&shelf, "failed", |shelf| status(shelf, "missing") == ModelStatus::Failed).await;
    let error = shelf.route("missing", soon()).await.expect_err("missing").to_string();
    assert!(error.contains("no such thing (model_missing)"), "{error}");
    drop(shelf.route("chat", soon()).await.expect("others go on"));
    let unknown = shelf.route("nobody", soon()).await.expect_err("unknown");
    assert_eq!(unknown.to_string(), "there is no model \"nobody\"; there are: large, missing, chat");
    shelf.shutdown(soon()).await;
    assert!(matches!(shelf.route("chat", soon()).await, Err(RouteError::ShuttingDown)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_keeps_failing_is_started_again_and_its_requests_are_told() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = start(scratch.path(), 120, vec![model("chat", &["--exit", "7"])]);
    let error = shelf.route("chat", soon()).await.expect_err("it never comes up");
    assert!(
        matches!(&error, RouteError::Failed { reason, retry_after: Some(_), .. }
        if reason.contains("exited with status 7") && reason.contains("chat.log")),
        "{error:?}"
    );
    assert!(count(&shelf, "chat", |what| matches!(what, EventKind::RestartScheduled { .. })) >= 3);
    let log = std::fs::read_to_string(scratch.path().join("logs/chat.log")).expect("its log");
    assert!(log.starts_with("leaving at once\n"), "{log}");
    // After a few starts it is left alone, and requests hear at once why, in one sentence on its last end.
    until(&shelf, "failed", |shelf| status(shelf, "chat") == ModelStatus::Failed).await;
    let starts = shelf.snapshot().models[0].starts;
    assert_eq!(starts, 5, "{}", story(&shelf));
    let refused = shelf.route("chat", soon()).await.expect_err("it failed");
    let RouteError::Failed { reason, retry_after: None, .. } = &refused else { panic!("{refused:?}") };
    assert_eq!(shelf.snapshot().models[0].error.as_ref(), Some(reason));
    for text in [reason, &story(&shelf).lines().last().expect("events").to_owned()] {
        for what in ["its worker exited with status 7", ": leaving at once (", "chat.log", "5 times in a row"]
        {
            assert_eq!(text.matches(what).count(), 1, "{what}: {text}");
        }
    }
    // A person who wakes it starts it again.
    let again = shelf.wake("chat", soon()).await.expect_err("it still exits");
    assert!(again.to_string().contains("exited with status 7"), "{again}");
    assert!(shelf.snapshot().models[0].starts > starts, "{}", story(&shelf));
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_reason_of_a_restart_is_the_worker_s_own_and_does_not_grow() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = start(scratch.path(), 120, vec![model("chat", &["--fail", "internal"])]);
    until(&shelf, "failed", |shelf| {
        count(shelf, "chat", |what| matches!(what, EventKind::RestartScheduled { .. })) >= 3
    })
    .await;
    for event in events(&shelf) {
        let EventKind::RestartScheduled { reason, .. } = &event.what else { continue };
        assert_eq!(reason.matches("its worker exited with status 3").count(), 1, "{reason}");
        assert_eq!(reason.matches("no such thing (internal)").count(), 1, "{reason}");
    }
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_breaks_the_protocol_is_ended_and_started_again() {
    let scratch = tempfile::tempdir().expect("scratch");
    let wrong = r#"{"say":"lease_return","kind":"weights","bytes":1}"#;
    let shelf = start(scratch.path(), 120, vec![model("chat", &["--wrong", wrong])]);
    until(&shelf, "a restart", |shelf| shelf.snapshot().models[0].starts >= 2).await;
    assert!(story(&shelf).contains("gave back 1 B of Weights and held 0 B"), "{}", story(&shelf));
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_shelf_leaves_no_process_and_its_directory_free() {
    let scratch = tempfile::tempdir().expect("scratch");
    let config = Arc::new(config(scratch.path(), 120, vec![model("chat", &["--ignore-shutdown"])]));
    let shelf = Shelf::start(Arc::clone(&config)).expect("the shelf starts");
    drop(shelf.route("chat", soon()).await.expect("routed"));
    let pid = shelf.snapshot().models[0].pid.expect("running");
    let second = Shelf::start(Arc::clone(&config)).expect_err("one server a directory");
    assert!(
        matches!(&second, ShelfError::InUse { pid, .. } if *pid == std::process::id().to_string()),
        "{second}"
    );
    drop(shelf);
    let deadline = soon();
    while alive(pid) {
        assert!(Instant::now() < deadline, "worker {pid} lives on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let again = loop {
        match Shelf::start(Arc::clone(&config)) {
            Ok(shelf) => break shelf,
            Err(ShelfError::InUse { .. }) => tokio::time::sleep(Duration::from_millis(10)).await,
            Err(error) => panic!("{error}"),
        }
        assert!(Instant::now() < deadline, "the directory stays taken");
    };
    // One that ignores every request to end is killed at the deadline.
    drop(again.route("chat", soon()).await.expect("routed"));
    let pid = again.snapshot().models[0].pid.expect("running");
    again.shutdown(Instant::now() + Duration::from_millis(200)).await;
    assert!(!alive(pid), "worker {pid} lives on");
    let left: Vec<String> = std::fs::read_dir(&config.runtime_dir)
        .expect("there")
        .map(|entry| entry.expect("there").file_name().to_string_lossy().into_owned())
        .filter(|name| name != "server.lock")
        .collect();
    assert!(left.is_empty(), "nothing is left to be found, and this stands there: {left:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn people_wake_pin_and_put_to_sleep() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = start(scratch.path(), 120, vec![model("chat", &[]), model("code", &[])]);
    let report = shelf.wake("chat", soon()).await.expect("woken");
    assert_eq!((report.status, report.bytes), (ModelStatus::Awake, ByteCount(100 * MIB)));
    let report = shelf.sleep("chat", 0.4, soon()).await.expect("asleep");
    assert_eq!((report.status, report.bytes), (ModelStatus::PartlyResident, ByteCount(60 * MIB)));
    let report = shelf.wake("chat", soon()).await.expect("woken");
    assert_eq!(
        (report.bytes, report.copied),
        (ByteCount(60 * MIB), ByteCount(60 * MIB)),
        "only what was missing"
    );
    let report = shelf.wake("chat", soon()).await.expect("awake");
    assert_eq!(report.bytes, ByteCount::ZERO);
    shelf.pin("chat", true).expect("pinned");
    assert!(matches!(shelf.sleep("chat", 0.0, soon()).await, Err(ShelfError::Refused { .. })));
    let denied = shelf.route("code", soon()).await.expect_err("chat is pinned");
    assert!(denied.to_string().contains("chat keeps 100 MiB (pinned)"), "{denied}");
    shelf.pin("chat", false).expect("unpinned");
    drop(shelf.route("code", soon()).await.expect("now it goes"));
    // A pin brings its model back; here it can, because code is idle.
    shelf.pin("chat", true).expect("pinned");
    until(&shelf, "the pinned model", |shelf| status(shelf, "chat") == ModelStatus::Awake).await;
    // Here it cannot: the pin stays, and the state says why it is not there.
    shelf.pin("code", true).expect("pinned");
    until(&shelf, "why not", |shelf| shelf.snapshot().model("code").is_some_and(|m| m.error.is_some())).await;
    let code = shelf.snapshot().model("code").cloned().expect("configured");
    let error = code.error.unwrap_or_default();
    assert!(
        code.pinned && error.starts_with("it is pinned, but could not be brought to the device"),
        "{error}"
    );
    assert!(error.contains("chat keeps 100 MiB (pinned)"), "{error}");
    shelf.pin("code", false).expect("unpinned");
    assert_eq!(shelf.snapshot().model("code").and_then(|m| m.error.clone()), None);
    assert!(matches!(shelf.wake("nobody", soon()).await, Err(ShelfError::UnknownModel { .. })));
    check_ledger(&shelf);
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_says_why_it_is_as_it_is() {
    let dir = tempfile::tempdir_in("/tmp").expect("a directory");
    let models = vec![model("ash", &["--weights", "100"]), model("birch", &["--weights", "100"])];
    // Long enough that no turn ends meanwhile, however busy the machine is.
    let config = ServerConfig { quantum: Duration::from_mins(5), ..config(dir.path(), 160, models) };
    let shelf = Shelf::start(Arc::new(config)).expect("the shelf starts");
    let why = |name: &str| shelf.why(name, 20).expect("known");
    let said = |name: &str| why(name).now.join(" ");
    until(&shelf, "both are ready", |shelf| {
        ["ash", "birch"].iter().all(|name| status(shelf, name) == ModelStatus::Asleep)
    })
    .await;
    assert!(
        said("ash").starts_with("ash is asleep: nothing of its 100 MiB is on the device"),
        "{}",
        said("ash")
    );

    let busy = shelf.route("ash", soon()).await.expect("it comes");
    let text = said("ash");
    for part in ["ash is awake: all 100 MiB of it are on the device", "It answers 1 request."] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let waiting = tokio::spawn({
        let shelf = shelf.clone();
        async move { shelf.route("birch", soon()).await.map(drop) }
    });
    until(&shelf, "birch waits for memory", |shelf| {
        shelf
            .why("birch", 20)
            .is_ok_and(|why| why.now.iter().any(|said| said.starts_with("It has waited for memory")))
    })
    .await;
    assert!(said("ash").contains("Its turn has lasted "), "{}", said("ash"));
    let text = said("birch");
    for part in [
        "birch is waking: 100 MiB of its 100 MiB are missing on the device.",
        "1 request waits for it, the first for ",
        "birch needs 100 MiB for weights; 60 MiB are free or on their way; ash holds 100 MiB (its turn ends in ",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    drop(busy);
    waiting.await.expect("no panic").expect("it comes");
    let text = said("ash");
    assert!(
        text.contains("ash is partly resident: 60 MiB of its 100 MiB are on the device and 40 MiB are not"),
        "{text}"
    );
    assert!(text.contains("It has been idle for "), "{text}");
    // Both hear of it, and the one that had to yield is named.
    let gave = "gives up 40 MiB: birch needs 100 MiB for weights, 60 MiB are free";
    for name in ["ash", "birch"] {
        let decisions = why(name).decisions;
        let told = decisions.iter().find(|event| event.text.starts_with(gave)).expect("the decision");
        assert_eq!((told.model.as_deref(), told.what.requester()), (Some("ash"), Some("birch")));
    }
    let last = shelf.why("ash", 1).expect("known");
    assert_eq!(last.decisions.len(), 1);
    assert_eq!(last.earlier + 1, why("ash").decisions.len() as u64);
    assert!(matches!(shelf.why("oak", 1), Err(ShelfError::UnknownModel { .. })));
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queues_are_bounded_and_those_who_leave_are_forgotten() {
    let scratch = tempfile::tempdir().expect("scratch");
    let gate = scratch.path().join("gate");
    let chat = model("chat", &["--start-gate", &gate.to_string_lossy()]);
    let mut config = config(scratch.path(), 120, vec![chat]);
    config.limits.parked_max = 2;
    let shelf = Shelf::start(Arc::new(config)).expect("the shelf starts");
    let short = shelf.route("chat", Instant::now() + Duration::from_millis(50)).await.expect_err("too soon");
    assert!(
        matches!(&short, RouteError::Deadline { reason, .. } if reason.contains("its worker")),
        "{short:?}"
    );
    {
        let (one, two) = (shelf.route("chat", soon()), shelf.route("chat", soon()));
        let full = async {
            until(&shelf, "both wait", |shelf| shelf.snapshot().models[0].counts.requests_parked == 2).await;
            shelf.route("chat", soon()).await
        };
        tokio::select! {
            full = full => assert!(matches!(full, Err(RouteError::Full { parked: 2, limit: 2, .. })), "{full:?}"),
            _ = async { tokio::join!(one, two) } => panic!("it cannot be awake yet"),
        }
    }
    assert_eq!(shelf.snapshot().models[0].counts.requests_parked, 0);
    std::fs::write(&gate, "").expect("opened");
    drop(shelf.route("chat", soon()).await.expect("there is room again"));
    assert_eq!(shelf.snapshot().models[0].counts.requests_active, 0);
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keep_alive_puts_an_idle_model_to_sleep() {
    let scratch = tempfile::tempdir().expect("scratch");
    let mut chat = model("chat", &["--overhead", "4"]);
    chat.keep_alive_s = Some(1);
    let shelf = start(scratch.path(), 120, vec![chat]);
    drop(shelf.route("chat", soon()).await.expect("routed"));
    until(&shelf, "sleep", |shelf| status(shelf, "chat") == ModelStatus::Asleep).await;
    assert!(story(&shelf).contains("its keep_alive is 1.0 s"), "{}", story(&shelf));
    assert_eq!(shelf.snapshot().models[0].lease.overhead, ByteCount(4 * MIB), "measured, so leased");
    shelf.shutdown(soon()).await;
}
