//! How memory is shared, by what the configuration says of it: real processes whose leases are numbers.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use shoal_core::bytes::ByteCount;
use shoal_core::policy::{Action, Plan, Policy, ShelfState, Value, builtin};
use shoal_server::config::{ModelConfig, ServerConfig, Sharing, SleepDepth};
use shoal_server::shelf::Shelf;
use shoal_server::state::{Event, EventKind, ModelStatus};
use support::shelves::{config, events, model, soon, start, status, story, until};

const MIB: u64 = 1 << 20;

/// Brings a model to the device and lets it be idle again.
async fn use_once(shelf: &Shelf, name: &str) {
    drop(shelf.route(name, soon()).await.unwrap_or_else(|error| panic!("{name}: {error}\n{}", story(shelf))));
}

async fn ready(shelf: &Shelf, name: &str) {
    until(shelf, "ready", |shelf| {
        !matches!(status(shelf, name), ModelStatus::Waiting | ModelStatus::Starting)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_apart_are_never_on_the_device_together() {
    let scratch = tempfile::tempdir().expect("scratch");
    let mut models = vec![model("chat", &[]), model("code", &[]), model("third", &[])];
    (models[0].apart, models[1].apart) = (vec!["code".to_owned()], vec!["chat".to_owned()]);
    let shelf = start(scratch.path(), 400, models);
    for name in ["third", "chat", "code", "chat"] {
        use_once(&shelf, name).await;
    }
    assert_eq!(status(&shelf, "code"), ModelStatus::Asleep, "{}", story(&shelf));
    assert_eq!(status(&shelf, "third"), ModelStatus::Awake, "there is room for it beside either");
    let mut held = [0u64; 2];
    for event in events(&shelf) {
        let Some(place) = ["chat", "code"].iter().position(|name| event.model.as_deref() == Some(name))
        else {
            continue;
        };
        match &event.what {
            EventKind::LeaseGranted { bytes, .. } => held[place] += bytes.0,
            EventKind::LeaseReturned { bytes, .. } => held[place] -= bytes.0,
            _ => {}
        }
        assert!(held.contains(&0), "event {}: {held:?}\n{}", event.id, story(&shelf));
    }
    assert!(story(&shelf).contains("chat may not stand beside code, which holds"), "{}", story(&shelf));
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_preloaded_model_is_there_unasked_and_comes_back_when_there_is_room() {
    let scratch = tempfile::tempdir().expect("scratch");
    let preloaded = ModelConfig { preload: true, ..model("chat", &[]) };
    let passing = ModelConfig { keep_alive_s: Some(0), ..model("code", &["--weights", "80"]) };
    let shelf = start(scratch.path(), 150, vec![preloaded, passing]);
    until(&shelf, "preloaded", |shelf| status(shelf, "chat") == ModelStatus::Awake).await;
    assert_eq!(shelf.snapshot().model("chat").expect("configured").counts.requests_total, 0);
    ready(&shelf, "code").await;
    let route = shelf.route("code", soon()).await.expect("routed");
    assert_eq!(
        status(&shelf, "chat"),
        ModelStatus::PartlyResident,
        "it takes from nobody: {}",
        story(&shelf)
    );
    drop(route);
    until(&shelf, "back", |shelf| status(shelf, "chat") == ModelStatus::Awake).await;
    assert!(story(&shelf).contains("is to be there before it is asked for"), "{}", story(&shelf));
    // Put to sleep by hand it stays asleep.
    shelf.sleep("chat", 0.0, soon()).await.expect("sleeps");
    use_once(&shelf, "code").await;
    assert_eq!(status(&shelf, "chat"), ModelStatus::Asleep, "{}", story(&shelf));
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_evicted_where_that_is_left_to_people() {
    let scratch = tempfile::tempdir().expect("scratch");
    let models = vec![model("chat", &[]), model("code", &["--weights", "80"])];
    let sharing = Sharing { evicts: false, ..Sharing::default() };
    let shelf = Shelf::start(Arc::new(ServerConfig { sharing, ..config(scratch.path(), 150, models) }))
        .expect("the shelf starts");
    use_once(&shelf, "chat").await;
    ready(&shelf, "code").await;
    // Long enough to be told why there is no room, and not only that it has not woken.
    let briefly = Instant::now() + Duration::from_secs(4);
    let error = shelf.route("code", briefly).await.expect_err("nobody made room");
    assert!(error.to_string().contains("nothing is evicted by itself (evict = \"never\")"), "{error}");
    assert_eq!(status(&shelf, "chat"), ModelStatus::Awake, "{}", story(&shelf));
    let waiting = tokio::spawn({
        let shelf = shelf.clone();
        async move { use_once(&shelf, "code").await }
    });
    shelf.sleep("chat", 0.0, soon()).await.expect("somebody makes room");
    waiting.await.expect("and it comes");
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_does_not_sleep_stays_and_the_other_is_told_why() {
    let scratch = tempfile::tempdir().expect("scratch");
    let stays = ModelConfig { sleep: SleepDepth::None, ..model("chat", &[]) };
    let shelf = start(scratch.path(), 150, vec![stays, model("code", &["--weights", "80"])]);
    use_once(&shelf, "chat").await;
    let error = shelf.route("code", soon()).await.expect_err("no room");
    assert!(error.to_string().contains("chat keeps 100 MiB (it does not sleep)"), "{error}");
    let error = shelf.sleep("chat", 0.0, soon()).await.expect_err("it does not");
    assert!(error.to_string().contains("`sleep = \"none\"`"), "{error}");
    assert_eq!(status(&shelf, "chat"), ModelStatus::Awake, "{}", story(&shelf));
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_keeps_its_minimum_whoever_needs_memory_and_not_when_it_is_told_to_sleep() {
    let scratch = tempfile::tempdir().expect("scratch");
    let keeps = ModelConfig { min: Some(ByteCount::mib(80)), ..model("chat", &[]) };
    let fits = model("small", &["--weights", "60"]);
    let shelf = start(scratch.path(), 150, vec![keeps, model("code", &["--weights", "80"]), fits]);
    let held = |shelf: &Shelf| {
        let state = shelf.snapshot();
        state.models.iter().find(|model| model.name == "chat").expect("there").lease.weights
    };
    use_once(&shelf, "chat").await;
    assert_eq!(held(&shelf), ByteCount::mib(100));
    for name in ["code", "small"] {
        ready(&shelf, name).await;
    }
    let briefly = Instant::now() + Duration::from_secs(4);
    let error = shelf.route("code", briefly).await.expect_err("80 MiB beside 80 of 150");
    assert!(error.to_string().contains("chat"), "{error}");
    assert!(held(&shelf) >= ByteCount::mib(80), "{}", story(&shelf));
    use_once(&shelf, "small").await;
    assert!(held(&shelf) >= ByteCount::mib(80), "{}", story(&shelf));
    assert!(held(&shelf) < ByteCount::mib(100), "it gave up what is beyond");
    let why = shelf.why("chat", 1).expect("there").now.join(" ");
    assert!(
        why.contains(
            "Of what it holds it keeps 80 MiB whoever needs memory (`min`), unless it is told to sleep"
        ),
        "{why}"
    );
    shelf.sleep("chat", 0.0, soon()).await.expect("it is told to");
    assert_eq!(held(&shelf), ByteCount::ZERO);
    shelf.shutdown(soon()).await;
}

/// As ours, but would take a MiB of the pinned for whoever asks.
#[derive(Debug)]
struct Rash;

impl Policy for Rash {
    fn name(&self) -> &'static str {
        "rash"
    }

    fn plan(&self, state: &ShelfState, now_ms: u64) -> Plan {
        let mut plan = Value.plan(state, now_ms);
        let pinned = state.models.iter().find(|model| model.pinned && model.up);
        if let (Some(model), false) = (pinned, state.requests.is_empty()) {
            let (bytes, reason) = (ByteCount(MIB), "because it is there".to_owned());
            plan.actions.push(Action::Evict {
                model: model.id,
                requester: None,
                bytes,
                cached_last: false,
                reason,
            });
        }
        plan
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_of_the_users_decides_and_is_not_obeyed_where_it_must_not_be() {
    let scratch = tempfile::tempdir().expect("scratch");
    let pinned = ModelConfig { pin: true, ..model("chat", &[]) };
    let models = vec![pinned, model("code", &["--weights", "40"])];
    let shelf = Shelf::start_with(Arc::new(config(scratch.path(), 160, models)), Some(Box::new(Rash)))
        .expect("the shelf starts");
    use_once(&shelf, "chat").await;
    assert_eq!(shelf.snapshot().sharing.policy, "rash");
    use_once(&shelf, "code").await;
    let refused = |event: &&Arc<Event>| matches!(event.what, EventKind::PolicyRefused { .. });
    let events = events(&shelf);
    let event = events.iter().find(refused).unwrap_or_else(|| panic!("{}", story(&shelf)));
    assert_eq!(
        event.text,
        "a plan of rash was not obeyed, value decided: chat cannot be ordered to give up 1 MiB: it is pinned"
    );
    assert_eq!(status(&shelf, "chat"), ModelStatus::Awake, "{}", story(&shelf));
    shelf.shutdown(soon()).await;
    let log = std::fs::read_to_string(scratch.path().join("logs/decisions.ndjson")).expect("a decision log");
    for name in ["rash", "value"] {
        assert!(log.contains(&format!("\"policy\":\"{name}\"")), "who decided is written down: {log}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_preloaded_model_has_all_the_time_that_it_needs() {
    let scratch = tempfile::tempdir().expect("scratch");
    let slow = ModelConfig { preload: true, ..model("chat", &["--wake-ms", "1500"]) };
    let shelf = start(scratch.path(), 150, vec![slow]);
    until(&shelf, "preloaded", |shelf| status(shelf, "chat") == ModelStatus::Awake).await;
    assert!(!story(&shelf).contains("WakeFailed"), "{}", story(&shelf));
    let why = shelf.why("chat", 5).expect("configured").now.join(" ");
    assert!(why.contains("Each MiB of it saves") && why.contains("us to bring back"), "{why}");
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_policy_decides_and_a_shadow_is_counted_and_both_can_be_replayed() {
    let scratch = tempfile::tempdir().expect("scratch");
    let models = vec![model("chat", &[]), model("code", &["--weights", "80"])];
    let sharing = Sharing {
        policy: "lru".to_owned(),
        shadow: Some("value".to_owned()),
        evicts: true,
        ..Sharing::default()
    };
    let shelf = Shelf::start(Arc::new(ServerConfig { sharing, ..config(scratch.path(), 150, models) }))
        .expect("the shelf starts");
    for name in ["chat", "code", "chat"] {
        use_once(&shelf, name).await;
    }
    let snapshot = shelf.snapshot();
    assert!(story(&shelf).contains("the longest of all, and goes whole"), "{}", story(&shelf));
    assert_eq!(snapshot.model("code").expect("configured").lease.total, ByteCount(0), "whole");
    assert_eq!(snapshot.sharing.policy, "lru");
    let shadow = snapshot.sharing.shadow.clone().expect("one watches");
    assert_eq!((shadow.policy.as_str(), shadow.decisions, shadow.differing), ("value", 2, 2));
    assert_eq!((shadow.evicted_live, shadow.evicted_shadow), (ByteCount(180 * MIB), ByteCount(60 * MIB)));
    assert_eq!(
        shadow.last.as_deref(),
        Some("value would have taken 30 MiB of code instead of 80 MiB of code"),
        "{}",
        story(&shelf)
    );
    // 100 MiB of chat left and came back at once; 100 + 80 + 100 were served.
    let thrash = &snapshot.sharing.thrash;
    assert_eq!((thrash.thrashed, thrash.served), (ByteCount(100 * MIB), ByteCount(280 * MIB)));
    assert!((thrash.index - 100.0 / 280.0).abs() < 1e-9);
    let chat = snapshot.model("chat").expect("configured");
    assert!(chat.restore_us_per_mib > 0 && chat.worth_us > 0.0, "{chat:?}");
    shelf.shutdown(soon()).await;
    let log = std::fs::read_to_string(scratch.path().join("logs/decisions.ndjson")).expect("a decision log");
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).expect("a line");
        assert_eq!((&line["version"], &line["policy"]), (&2.into(), &"lru".into()));
        let state: ShelfState = serde_json::from_value(line["state"].clone()).expect("a state");
        let policy = builtin(line["policy"].as_str().expect("a name")).expect("ours");
        let plan = policy.plan(&state, line["now_ms"].as_u64().expect("a time"));
        assert_eq!(serde_json::to_value(&plan).expect("plain data"), line["plan"]);
    }
}
