//! Policies in processes of their own: where their output goes, with a stand-in for Python (`fake_policy.py`).

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
