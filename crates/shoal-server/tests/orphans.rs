//! Workers that are forked, where orphans are the server's, as they are to the first process of a container.

mod support;

use std::sync::Arc;

use rustix::process::{Pid, Signal, getpid, kill_process, set_child_subreaper};
use shoal_server::config::{ModelConfig, ServerConfig};
use shoal_server::shelf::Shelf;
use shoal_server::state::{EventKind, ModelStatus};
use support::shelves::{config, events, pid, script, soon, status, story, until};

fn number(pid: u32) -> Pid {
    i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process")
}

fn parent(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}

/// A template that does not wait for its children, and answers no second order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_template_leaves_is_waited_for() {
    set_child_subreaper(Some(getpid())).expect("orphans are ours");
    let scratch = tempfile::tempdir().expect("scratch");
    std::fs::write(scratch.path().join("mode"), "deaf").expect("written");
    let models = vec![ModelConfig::new("ash", "/none")];
    let config = ServerConfig {
        python: script("fake_template.py").into(),
        fork_workers: true,
        ..config(scratch.path(), 400, models)
    };
    let shelf = Shelf::start(Arc::new(config)).expect("the shelf starts");
    until(&shelf, "asleep", |shelf| status(shelf, "ash") == ModelStatus::Asleep).await;
    let first = pid(&shelf, "ash").expect("it runs");
    let template = parent(first).expect("it runs");
    assert_ne!(template, std::process::id(), "it was forked");
    kill_process(number(first), Signal::KILL).expect("it runs");
    until(&shelf, "its end is seen", |shelf| {
        let is_exit = |what: &EventKind| matches!(what, EventKind::WorkerExited { .. });
        events(shelf).iter().any(|event| is_exit(&event.what))
    })
    .await;
    assert_eq!(parent(first), Some(template), "nobody has waited for it");
    // The next order is not answered: the template is killed, and its worker started by itself.
    until(&shelf, "another", |shelf| pid(shelf, "ash").is_some_and(|pid| pid != first)).await;
    until(&shelf, "the template is gone", |_| parent(template).is_none()).await;
    until(&shelf, "what it left is waited for", |_| parent(first).is_none()).await;
    assert_eq!(parent(pid(&shelf, "ash").expect("it runs")), Some(std::process::id()), "{}", story(&shelf));

    shelf.shutdown(soon()).await;
}
