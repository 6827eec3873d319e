//! Workers that are forked from a template, or cannot be: `fake_template.py` is the interpreter, and no model is served.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use shoal_server::config::{ModelConfig, ServerConfig};
use shoal_server::shelf::Shelf;
use shoal_server::state::{EventKind, ModelStatus};
use support::shelves::{alive, config, count, events, pid, script, soon, status, story, until};

/// Models whose workers would be ours, of an interpreter that does as `mode` says.
fn forking(directory: &Path, mode: &str, names: &[&str]) -> ServerConfig {
    set(directory, mode);
    let models = names.iter().map(|name| ModelConfig::new(*name, "/none")).collect();
    ServerConfig {
        python: script("fake_template.py").into(),
        fork_workers: true,
        ..config(directory, 400, models)
    }
}

fn set(directory: &Path, mode: &str) {
    std::fs::write(directory.join("mode"), mode).expect("written");
}

fn begin(config: ServerConfig) -> Shelf {
    Shelf::start(Arc::new(config)).expect("the shelf starts")
}

/// The numbers in a file of the fake interpreter.
fn noted(directory: &Path, name: &str) -> Vec<u32> {
    let text = std::fs::read_to_string(directory.join(name)).unwrap_or_default();
    text.lines().map(|line| line.parse().expect("a number")).collect()
}

fn parent(pid: u32) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let mut fields = stat.rsplit(')').next().expect("fields").split_whitespace();
    fields.nth(1).and_then(|parent| parent.parse().ok()).expect("a parent")
}

fn kill(pid: u32) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process");
    kill_process(pid, Signal::KILL).expect("it runs");
}

fn is_there(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

async fn asleep(shelf: &Shelf, name: &str) -> u32 {
    until(shelf, "asleep", |shelf| status(shelf, name) == ModelStatus::Asleep).await;
    pid(shelf, name).expect("it runs")
}

async fn gone(what: &str, pids: &[u32]) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while pids.iter().any(|pid| is_there(*pid)) {
        assert!(Instant::now() < deadline, "{what}: one of {pids:?} is still there");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Its template may have to wait for it, and not be able to yet.
async fn gone_or_zombie(what: &str, pids: &[u32]) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while pids.iter().any(|pid| alive(*pid)) {
        assert!(Instant::now() < deadline, "{what}: one of {pids:?} is still there");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn exits(shelf: &Shelf) -> Vec<String> {
    let exits = events(shelf);
    let status = |what: &EventKind| match what {
        EventKind::WorkerExited { status, .. } => Some(status.clone()),
        _ => None,
    };
    exits.iter().filter_map(|event| status(&event.what)).collect()
}

/// Kills a model's worker and gives the next one.
async fn killed(shelf: &Shelf, name: &str) -> u32 {
    let before = pid(shelf, name).expect("it runs");
    kill(before);
    until(shelf, "another", |shelf| pid(shelf, name).is_some_and(|pid| pid != before)).await;
    asleep(shelf, name).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_are_forked_from_one_template_and_nothing_is_left() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = begin(forking(scratch.path(), "", &["ash", "elm"]));
    let first = [asleep(&shelf, "ash").await, asleep(&shelf, "elm").await];
    let [template] = noted(scratch.path(), "templates")[..] else {
        panic!("one template: {}", story(&shelf))
    };
    assert_eq!(first.map(parent), [template, template]);
    let next = killed(&shelf, "ash").await;
    assert_eq!(parent(next), template);
    assert!(exits(&shelf)[0].starts_with("was ended by signal 9"), "{:?}", exits(&shelf));
    assert!(!is_there(first[0]), "it was waited for");
    drop(shelf.route("elm", soon()).await.expect("routed"));
    shelf.shutdown(soon()).await;
    let mut all = noted(scratch.path(), "children");
    assert_eq!(all.len(), 3);
    all.push(template);
    assert!(!all.iter().any(|pid| is_there(*pid)), "a process is left when the shelf has ended");
    assert!(scratch.path().join("logs/template.out").exists());
}

/// Whatever is wrong with a template before it forks, its workers are started by themselves in bounded time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_cannot_be_forked_is_started_by_itself() {
    for mode in ["refuse", "unfit", "die", "lie", "chat", "broken", "hang", "late"] {
        let scratch = tempfile::tempdir().expect("scratch");
        let shelf = begin(forking(scratch.path(), mode, &["ash", "elm"]));
        for name in ["ash", "elm"] {
            let worker = asleep(&shelf, name).await;
            assert_eq!(parent(worker), std::process::id(), "{mode}: {name} was forked");
            assert_eq!(shelf.snapshot().model(name).expect("there").starts, 1, "{mode}");
        }
        let templates = noted(scratch.path(), "templates");
        assert_eq!(templates.len(), 1, "{mode}: the next one has to wait");
        // It only said what is not so, or that this once it cannot: the next order may do.
        if !["lie", "refuse"].contains(&mode) {
            gone(mode, &templates).await;
        }
        assert!(noted(scratch.path(), "children").is_empty(), "{mode}: it forks in no such mode");
        shelf.shutdown(soon()).await;
    }
}

/// A child is there, and its template says nothing of it, or what is not so: it never begins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_the_server_does_not_know_of_does_not_begin() {
    for mode in ["fork-die", "fork-hang", "fork-half", "fork-other", "fork-number"] {
        let scratch = tempfile::tempdir().expect("scratch");
        let shelf = begin(forking(scratch.path(), mode, &["ash", "elm"]));
        until(&shelf, "one is forked", |_| !noted(scratch.path(), "children").is_empty()).await;
        for name in ["ash", "elm"] {
            assert_eq!(parent(asleep(&shelf, name).await), std::process::id(), "{mode}: {name} was forked");
            assert_eq!(shelf.snapshot().model(name).expect("there").starts, 1, "{mode}");
        }
        gone(mode, &noted(scratch.path(), "templates")).await;
        gone_or_zombie(mode, &noted(scratch.path(), "children")).await;
        assert!(noted(scratch.path(), "begun").is_empty(), "{mode}: {}", story(&shelf));
        shelf.shutdown(soon()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_forked_one_that_was_never_ready_the_next_is_started_by_itself() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = begin(forking(scratch.path(), "unready", &["ash"]));
    let second = asleep(&shelf, "ash").await;
    let [template] = noted(scratch.path(), "templates")[..] else {
        panic!("one template: {}", story(&shelf))
    };
    assert_eq!(parent(second), std::process::id());
    assert!(exits(&shelf)[0].starts_with("exited with status 7"), "{:?}", exits(&shelf));
    assert!(exits(&shelf).len() == 1 && noted(scratch.path(), "children").len() == 1, "{}", story(&shelf));
    // It was ready: whatever ends it has to do with no fork.
    set(scratch.path(), "");
    let third = killed(&shelf, "ash").await;
    assert_eq!(parent(third), template);
    shelf.shutdown(soon()).await;
}

/// What was imported for it may be all that is wrong.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_forked_one_says_that_was_never_ready_counts_once_one_by_itself_says_it() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = begin(forking(scratch.path(), "unservable", &["ash"]));
    let second = asleep(&shelf, "ash").await;
    assert_eq!(parent(second), std::process::id(), "{}", story(&shelf));
    assert_eq!(noted(scratch.path(), "begun").len(), 1, "the one before was forked");
    assert!(exits(&shelf)[0].starts_with("exited with status 3"), "{:?}", exits(&shelf));
    let never = count(&shelf, "ash", |what| matches!(what, EventKind::ModelFailed { .. }));
    assert_eq!(never, 0, "{}", story(&shelf));
    shelf.shutdown(soon()).await;

    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = begin(forking(scratch.path(), "never", &["ash"]));
    until(&shelf, "failed", |shelf| status(shelf, "ash") == ModelStatus::Failed).await;
    until(&shelf, "its end is heard", |shelf| exits(shelf).len() == 2).await;
    let ash = shelf.snapshot().model("ash").expect("there").clone();
    assert_eq!(
        (ash.starts, ash.error.as_deref()),
        (2, Some("no such thing (model_missing)")),
        "{}",
        story(&shelf)
    );
    assert_eq!(noted(scratch.path(), "begun").len(), 1, "the second was not forked");
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_go_on_without_their_template() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = begin(forking(scratch.path(), "", &["ash", "elm"]));
    let workers = [asleep(&shelf, "ash").await, asleep(&shelf, "elm").await];
    let [template] = noted(scratch.path(), "templates")[..] else {
        panic!("one template: {}", story(&shelf))
    };
    kill(template);
    gone("the server waits for it", &[template]).await;
    drop(shelf.route("elm", soon()).await.expect("routed"));
    let next = killed(&shelf, "ash").await;
    assert!(parent(next) != template);
    assert_eq!(pid(&shelf, "elm"), Some(workers[1]), "{}", story(&shelf));
    assert!(alive(workers[1]));
    // Nobody can tell how it ended: whoever waited for it is no more.
    assert!(exits(&shelf)[0].starts_with("ended after"), "{:?}", exits(&shelf));
    shelf.shutdown(soon()).await;
    assert!(!alive(next) && !alive(workers[1]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shelf_that_ends_while_a_template_imports_or_answers_leaves_nothing() {
    for (mode, waits_for) in [("gate", "templates"), ("late", "orders")] {
        let scratch = tempfile::tempdir().expect("scratch");
        let shelf = begin(forking(scratch.path(), mode, &["ash"]));
        until(&shelf, "it is asked", |_| scratch.path().join(waits_for).exists()).await;
        let began = Instant::now();
        shelf.shutdown(soon()).await;
        assert!(began.elapsed() < Duration::from_secs(4), "{mode}: it was waited for");
        let templates = noted(scratch.path(), "templates");
        assert!(templates.len() == 1 && !is_there(templates[0]), "{mode}");
        assert!(pid(&shelf, "ash").is_none() && exits(&shelf).is_empty(), "{mode}: {}", story(&shelf));
        assert!(!scratch.path().join("children").exists(), "{mode}");
    }
}

/// The model goes while there is nothing yet to fork its worker from, and another comes in its place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_waits_for_a_template_ends_with_its_model() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = begin(forking(scratch.path(), "gate", &["ash", "elm"]));
    until(&shelf, "it is asked", |_| scratch.path().join("templates").exists()).await;
    shelf.reload_with(forking(scratch.path(), "gate", &["elm", "oak"])).expect("a good one");
    // It makes room for the next start at once, and not when the template is ready.
    until(&shelf, "its turn comes", |shelf| status(shelf, "oak") == ModelStatus::Starting).await;
    assert!(shelf.snapshot().model("ash").is_none(), "{}", story(&shelf));
    std::fs::write(scratch.path().join("gate"), "").expect("written");
    let mut kept = [asleep(&shelf, "elm").await, asleep(&shelf, "oak").await];
    let mut begun = noted(scratch.path(), "begun");
    begun.sort_unstable();
    kept.sort_unstable();
    assert_eq!(begun, kept, "{}", story(&shelf));
    assert_eq!(noted(scratch.path(), "children").len(), 2, "nobody asked for one of ash");
    shelf.shutdown(soon()).await;
}

/// It was forked already, and its template has not said so yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_child_that_nobody_wants_any_more_does_not_begin() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = begin(forking(scratch.path(), "forked-gate", &["ash"]));
    until(&shelf, "it is forked", |_| !noted(scratch.path(), "children").is_empty()).await;
    shelf.reload_with(forking(scratch.path(), "forked-gate", &["oak"])).expect("a good one");
    let unwanted = noted(scratch.path(), "children");
    gone_or_zombie("its pipe is closed", &unwanted).await;
    std::fs::write(scratch.path().join("gate"), "").expect("written");
    asleep(&shelf, "oak").await;
    let begun = noted(scratch.path(), "begun");
    assert!(!begun.iter().any(|pid| unwanted.contains(pid)), "{}", story(&shelf));
    shelf.shutdown(soon()).await;
}

/// It is replaced later; until then it tells how those end that it has forked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_that_can_fork_no_more_is_there_as_long_as_its_workers() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = begin(forking(scratch.path(), "", &["ash", "elm"]));
    let workers = [asleep(&shelf, "ash").await, asleep(&shelf, "elm").await];
    let [template] = noted(scratch.path(), "templates")[..] else {
        panic!("one template: {}", story(&shelf))
    };
    set(scratch.path(), "unfit");
    let by_itself = killed(&shelf, "ash").await;
    assert_eq!(parent(by_itself), std::process::id());
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(alive(template) && parent(workers[1]) == template);
    killed(&shelf, "elm").await;
    assert!(exits(&shelf)[1].starts_with("was ended by signal 9"), "{:?}", exits(&shelf));
    gone("none of its workers lives", &[template]).await;
    shelf.shutdown(soon()).await;
}

/// No process could be made for it, which says nothing of the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_order_that_is_refused_does_not_end_a_template() {
    let scratch = tempfile::tempdir().expect("scratch");
    let shelf = begin(forking(scratch.path(), "refuse", &["ash"]));
    assert_eq!(parent(asleep(&shelf, "ash").await), std::process::id());
    let [template] = noted(scratch.path(), "templates")[..] else {
        panic!("one template: {}", story(&shelf))
    };
    set(scratch.path(), "");
    let next = killed(&shelf, "ash").await;
    assert_eq!(parent(next), template, "{}", story(&shelf));
    shelf.shutdown(soon()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_template_that_no_model_needs_any_more_ends_at_a_reload() {
    let scratch = tempfile::tempdir().expect("scratch");
    let with = forking(scratch.path(), "", &["ash"]);
    let shelf = begin(with.clone());
    let worker = asleep(&shelf, "ash").await;
    let [template] = noted(scratch.path(), "templates")[..] else {
        panic!("one template: {}", story(&shelf))
    };
    shelf.reload_with(with.clone()).expect("the same");
    assert!(alive(template) && parent(worker) == template);
    shelf.reload_with(ServerConfig { fork_workers: false, ..with.clone() }).expect("a good one");
    // It alone can tell how its worker ends, which goes on.
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert!(alive(template) && alive(worker) && pid(&shelf, "ash") == Some(worker));
    let next = killed(&shelf, "ash").await;
    assert!(exits(&shelf)[0].starts_with("was ended by signal 9"), "{:?}", exits(&shelf));
    gone("nobody needs it", &[template]).await;
    assert_eq!(parent(next), std::process::id());
    // Wanted again, without a pause: the one before did nothing wrong.
    shelf.reload_with(with).expect("a good one");
    let again = killed(&shelf, "ash").await;
    assert_eq!(noted(scratch.path(), "templates").get(1), Some(&parent(again)), "{}", story(&shelf));
    shelf.shutdown(soon()).await;
}
