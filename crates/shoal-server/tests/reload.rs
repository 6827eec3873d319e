//! Another configuration under a running shelf, with workers that have no model: only what changed is touched.

mod support;

use std::time::Duration;

use shoal_core::bytes::ByteCount;
use shoal_server::config::{Limits, ModelConfig, ServerConfig};
use shoal_server::shelf::{Reloaded, RouteError, ShelfError};
use shoal_server::state::{EventKind, ModelStatus};
use support::shelves::{config, model, pid, soon, start, until};

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_changed_is_touched() {
    let scratch = tempfile::tempdir().expect("scratch");
    let before = ["same", "limits", "anew", "gone"].map(|name| model(name, &["--weights", "50"]));
    let shelf = start(scratch.path(), 400, before.to_vec());
    for name in ["same", "limits", "anew", "gone"] {
        drop(shelf.route(name, soon()).await.expect("routed"));
    }
    let pids = ["same", "limits", "anew", "gone"].map(|name| pid(&shelf, name).expect("it runs"));
    // Two have a request: it is answered before its worker goes.
    let routes =
        [shelf.route("anew", soon()).await.expect("up"), shelf.route("gone", soon()).await.expect("up")];

    let limits = ModelConfig { priority: 5, max: None, keep_alive_s: Some(600), ..before[1].clone() };
    let after = vec![model("new", &[]), limits, before[0].clone(), model("anew", &["--weights", "60"])];
    let quicker = ServerConfig {
        quantum: Duration::from_secs(1),
        device_budget: ByteCount::mib(999),
        limits: Limits { wait_max: Duration::from_secs(7), ..Limits::default() },
        ..config(scratch.path(), 400, after.clone())
    };
    let said = shelf.reload_with(quicker.clone()).expect("a good one");
    let expected = Reloaded {
        added: names(&["new"]),
        removed: names(&["gone"]),
        restarted: names(&["anew"]),
        changed: names(&["limits"]),
        policies: vec![],
        needs_restart: names(&["device_budget", "wait_s_max"]),
    };
    assert_eq!(said, expected);
    let again = shelf.reload_with(quicker).expect("the same");
    assert_eq!(again.needs_restart, expected.needs_restart, "it counts from the next start on, until then");
    assert_eq!(shelf.snapshot().device.budget, ByteCount::mib(400), "as it was");
    assert_eq!(shelf.snapshot().model("limits").expect("there").priority, 5);

    let refused = shelf.route("gone", soon()).await.expect_err("it is off the shelf");
    let RouteError::UnknownModel { known, .. } = refused else { panic!("{refused}") };
    assert_eq!(known, names(&["same", "limits", "anew", "new"]));
    // Whoever asks for the changed one waits for its next worker.
    let waiting = {
        let shelf = shelf.clone();
        tokio::spawn(async move { shelf.route("anew", soon()).await.map(|route| route.was_asleep()) })
    };
    until(&shelf, "it is parked", |shelf| {
        shelf.snapshot().model("anew").is_some_and(|model| model.counts.requests_parked == 1)
    })
    .await;
    let status = |name: &str| shelf.snapshot().model(name).map(|model| model.status);
    assert_eq!(status("anew"), Some(ModelStatus::Draining));
    assert_eq!(status("gone"), Some(ModelStatus::Draining));
    assert_eq!(pid(&shelf, "anew"), Some(pids[2]), "its request is not over");
    drop(routes);
    assert!(waiting.await.expect("no panic").expect("routed"));
    until(&shelf, "it is gone", |shelf| shelf.snapshot().model("gone").is_none()).await;
    assert_eq!([pid(&shelf, "same"), pid(&shelf, "limits")], [Some(pids[0]), Some(pids[1])]);
    assert_ne!(pid(&shelf, "anew"), Some(pids[2]));
    assert_eq!(shelf.snapshot().model("anew").expect("there").bytes.weights_total, ByteCount::mib(60));
    drop(shelf.route("new", soon()).await.expect("routed"));

    // The place of the one that went is taken by the next, and nothing of it is left there.
    let mut again = after.clone();
    again.push(model("gone", &["--weights", "70"]));
    assert_eq!(
        shelf.reload_with(config(scratch.path(), 400, again)).expect("a good one").added,
        names(&["gone"])
    );
    drop(shelf.route("gone", soon()).await.expect("routed"));
    // What the two workers had that ended is returning until the next reading of the device, a quarter of a second later.
    until(&shelf, "it is back", |shelf| shelf.snapshot().device.returning.is_zero()).await;
    let snapshot = shelf.snapshot();
    let gone = snapshot.model("gone").expect("there");
    assert_eq!(
        (gone.bytes.weights_total, gone.counts.requests_total, gone.starts),
        (ByteCount::mib(70), 1, 1)
    );
    let sum: ByteCount = snapshot.models.iter().map(|model| model.lease.total).sum();
    assert_eq!(snapshot.device.leased, sum);
    assert_eq!(snapshot.models.len(), 5);
    shelf.shutdown(soon()).await;
    assert_eq!(shelf.snapshot().device.leased, ByteCount::ZERO);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_cannot_be_changes_nothing_and_one_that_mends_a_failure_does() {
    let scratch = tempfile::tempdir().expect("scratch");
    let broken = model("broken", &["--fail", "device"]);
    let shelf = start(scratch.path(), 400, vec![broken.clone()]);
    until(&shelf, "it fails", |shelf| shelf.snapshot().models[0].status == ModelStatus::Failed).await;
    until(&shelf, "its worker is gone", |shelf| shelf.snapshot().models[0].pid.is_none()).await;
    let greedy = ModelConfig { min: Some(ByteCount::gib(4)), ..broken };
    let refused = shelf.reload_with(config(scratch.path(), 400, vec![greedy])).expect_err("too much");
    assert!(matches!(refused, ShelfError::Configuration { .. }), "{refused}");
    assert!(refused.to_string().contains("device budget of 400 MiB"), "{refused}");
    assert!(shelf.reload().await.is_err(), "there is no such file");
    let told = shelf.events_since(0).expect("few");
    let count = told.iter().filter(|event| matches!(event.what, EventKind::ReloadRefused { .. })).count();
    assert_eq!(count, 2);
    let mended = config(scratch.path(), 400, vec![model("broken", &[])]);
    assert_eq!(shelf.reload_with(mended).expect("a good one").restarted, names(&["broken"]));
    drop(shelf.route("broken", soon()).await.expect("it is started again"));
    let same = config(scratch.path(), 400, vec![model("broken", &[])]);
    assert_eq!(shelf.reload_with(same).expect("a good one"), Reloaded::default());
}
