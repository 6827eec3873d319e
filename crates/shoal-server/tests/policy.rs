//! Policies in processes of their own: where their output goes and when their code is read, with a stand-in for Python (`fake_policy.py`).

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use shoal_server::config::{ServerConfig, Sharing};
use shoal_server::shelf::Shelf;
use support::shelves::{config, model, script, until};

/// One model, and policies of the user's own.
fn configured(directory: &Path, sharing: Sharing) -> ServerConfig {
    std::fs::create_dir_all(directory.join("logs")).expect("made");
    let models = vec![model("chat", &["--weights", "50"])];
    ServerConfig { sharing, python: script("fake_policy.py").into(), ..config(directory, 100, models) }
}

/// What was printed to a log of `logs/`, line by line.
fn printed(directory: &Path, log: &str) -> Vec<String> {
    let text = std::fs::read_to_string(directory.join("logs").join(log)).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_one_that_decides_and_the_one_that_watches_have_logs_of_their_own() {
    let scratch = tempfile::tempdir().expect("scratch");
    let sharing = Sharing {
        policy: "python:mine:plan".to_owned(),
        shadow: Some("python:other:plan".to_owned()),
        policy_wait: Duration::from_secs(5),
        ..Sharing::default()
    };
    let shelf = Shelf::start(Arc::new(configured(scratch.path(), sharing))).expect("the shelf starts");
    until(&shelf, "both run", |_| {
        ["policy.out", "policy-shadow.out"].iter().all(|log| !printed(scratch.path(), log).is_empty())
    })
    .await;
    assert_eq!(printed(scratch.path(), "policy.out"), ["policy mine:plan starts"]);
    assert_eq!(printed(scratch.path(), "policy-shadow.out"), ["policy other:plan starts"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_reads_code_anew_that_has_changed_and_no_other() {
    let scratch = tempfile::tempdir().expect("scratch");
    let code = scratch.path().join("code");
    let write = |text: &str| std::fs::write(&code, text).expect("written");
    let sharing = || Sharing {
        policy: "python:mine:plan".to_owned(),
        policy_wait: Duration::from_secs(5),
        ..Sharing::default()
    };
    let configured = || configured(scratch.path(), sharing());
    let starts = || printed(scratch.path(), "policy.out").len();
    // A while ago: what is written while its process starts counts as not read.
    write("one");
    let ago = std::time::SystemTime::now() - Duration::from_mins(1);
    std::fs::File::options().write(true).open(&code).and_then(|file| file.set_modified(ago)).expect("set");
    let shelf = Shelf::start(Arc::new(configured())).expect("the shelf starts");
    let wants = "python:mine:plan";
    // Until it was ready it is begun anew each time, so it is given more and more time.
    let mut wait = Duration::from_millis(200);
    while !shelf.reload_with(configured()).expect("a good one").policies.is_empty() {
        assert!(wait < Duration::from_mins(2), "its code is never known");
        tokio::time::sleep(wait).await;
        wait *= 2;
    }
    let before = starts();
    assert!(shelf.reload_with(configured()).expect("a good one").policies.is_empty());
    write("longer");
    assert_eq!(shelf.reload_with(configured()).expect("a good one").policies, [wants]);
    until(&shelf, "the next one runs", |_| starts() > before).await;
    write("broken");
    assert_eq!(shelf.reload_with(configured()).expect("a good one").policies, [wants]);
    write("mended");
    assert_eq!(shelf.reload_with(configured()).expect("a good one").policies, [wants], "it was not ready");
    until(&shelf, "it runs again", |_| starts() > before + 1).await;
}
