//! Another configuration while a worker has no process yet, on the core alone.

use std::sync::Arc;

use futures_util::FutureExt;

use super::histories::config;
use super::{Core, Life, Timing};
use crate::config::ServerConfig;

/// The core with a first model whose start was ordered, and that alone.
fn starting() -> (Core, ServerConfig) {
    let mut file = config(0);
    file.models.truncate(1);
    let mut core = Core::new(Arc::new(file.clone()), Timing::default(), 1_000_000, None);
    core.handle_timer(0);
    assert!(Arc::clone(&core.models[0].start).notified().now_or_never().is_some(), "it is to start");
    assert!(core.wants_start(0));
    (core, file)
}

fn is_woken(core: &Core) -> bool {
    Arc::clone(&core.models[0].end).notified().now_or_never().is_some()
}

#[test]
fn a_start_that_waits_hears_of_another_configuration_and_no_time_is_asked_for() {
    let (mut core, mut file) = starting();
    assert!(!is_woken(&core));
    file.models[0].dtype = Some("float32".to_owned());
    core.handle_reload(file, &[], 1_000);
    assert!(is_woken(&core), "whoever waits for what it is made of need not wait any longer");
    assert!(!core.wants_start(0));
    // However long its task takes to leave.
    for now_ms in [1_001, 32_000, 120_000] {
        core.handle_timer(now_ms);
        assert!(core.timer_ms.is_none_or(|at| at > now_ms + 500), "again at {:?} of {now_ms}", core.timer_ms);
    }
    core.handle_unwanted(0, 120_001);
    assert!(core.wants_start(0), "as it is configured now: {:?}", core.models[0].life());
    assert!(Arc::clone(&core.models[0].start).notified().now_or_never().is_some());
    assert!(core.models[0].retiring.is_none() && core.models[0].quick_ends == 0);
}

#[test]
fn a_start_that_waits_hears_that_its_model_is_gone() {
    let (mut core, mut file) = starting();
    file.models[0].name = "another".to_owned();
    core.handle_reload(file, &[], 1_000);
    assert!(is_woken(&core) && !core.wants_start(0));
    assert!(matches!(core.models[0].life(), Life::Starting { .. }), "its task is not done with it");
    core.handle_unwanted(0, 1_001);
    assert_eq!(*core.models[0].life(), Life::Stopped);
    assert!(!core.wants_start(0) && core.processes() == 0);
}

#[test]
fn a_start_that_waits_hears_that_its_model_cannot_be_served() {
    let (mut core, _) = starting();
    core.fail(0, "engine", "there is no such engine", true, 1_000);
    assert!(is_woken(&core) && !core.wants_start(0));
    core.handle_unwanted(0, 1_001);
    assert!(matches!(core.models[0].life(), Life::Failed { permanent: true, .. }));
}

#[test]
fn a_server_that_ends_wants_no_start() {
    let (mut core, _) = starting();
    core.handle_stop(1_000, 1_000);
    assert!(!core.wants_start(0));
    core.handle_unwanted(0, 1_001);
    assert_eq!(*core.models[0].life(), Life::Stopped);
}
