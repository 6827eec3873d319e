//! However long a server lives, what it keeps does not grow.

use shoal_core::protocol::FromWorker;

use super::{MODELS_MAX, World};
use crate::broker::orders::OVERDUE_MAX;
use crate::broker::{Core, EVENTS_KEPT, REQUESTS_PER_MODEL_MAX};

/// Places that there are at most: of each model that there may be, and of as many that were taken off and answer their last
/// requests, of either kind.
const PLACES_MAX: usize = 4 * MODELS_MAX;

/// Everything in the core that could grow with what happens, by name, with the most that there may be of it.
fn kept(core: &Core) -> Vec<(&'static str, usize, usize)> {
    let models = || core.models.iter();
    let words = core.events.kept().map(|event| event.text.len()).max().unwrap_or_default();
    vec![
        ("events", core.events.kept().count(), EVENTS_KEPT),
        ("events that explain something", core.events.explaining().count(), EVENTS_KEPT / 2),
        ("bytes of an event's words", words, 5_000),
        ("lease requests", core.asked.len(), PLACES_MAX * (REQUESTS_PER_MODEL_MAX + 1)),
        ("workers of servers before", core.strangers.len(), PLACES_MAX),
        ("processes that ended and have memory", core.book.departed().count(), 64),
        ("models", models().count(), PLACES_MAX),
        // One that never answers is asked again at times. What was ordered and is not overdue is no more than it holds.
        ("orders", models().map(|model| model.orders.len()).max().unwrap_or_default(), 2 * OVERDUE_MAX),
        ("requests that wait", models().map(|model| model.queue.len()).max().unwrap_or_default(), 4),
        (
            "keys at a model",
            models().map(|model| model.queue.standings(0).count()).max().unwrap_or_default(),
            3,
        ),
    ]
}

#[test]
fn what_a_server_keeps_does_not_grow_with_its_life() {
    let mut world = World::new(5);
    world.lives_on = true;
    for _ in 0..100 {
        world.play();
        for (what, count, most) in kept(&world.core) {
            assert!(count <= most, "{count} {what} after {} events", world.core.events.last_id());
        }
    }
    assert!(world.core.events.last_id() > 2 * EVENTS_KEPT as u64, "{}", world.core.events.last_id());
}

#[test]
fn of_a_workers_words_only_the_beginning_is_kept() {
    let mut world = World::new(5);
    world.lives_on = true;
    let hears = |worker: &super::worker::Worker| worker.heard.is_some() && !worker.is_stopped;
    while !world.workers.values().any(hears) {
        world.play();
    }
    let (place, _) = world.workers.iter().find(|(_, worker)| hears(worker)).expect("just seen");
    let message = "\u{e9}".repeat(500_000);
    world.say(*place, FromWorker::Failed { code: "internal".to_owned(), message });
    let words = world.core.events.kept().map(|event| event.text.len()).max().expect("some");
    assert!((2_000..5_000).contains(&words), "{words}");
}
