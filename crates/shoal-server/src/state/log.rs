//! The newest events, for those who look, and a live feed for those who watch.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::broadcast;

use super::event::{Event, EventKind, SCHEMA_VERSION};

/// A bounded ring of events and a broadcast of them. Ids are given here, so they grow by one from event to event.
///
/// Those that explain something ([`EventKind::explains`]) have a ring of their own too: a worker that gives back 2 GiB by
/// pieces of 8 MiB tells of hundreds, and a dozen such orders would leave nothing of what was decided.
#[derive(Debug)]
pub struct EventLog {
    ring: VecDeque<Arc<Event>>,
    explaining: VecDeque<Arc<Event>>,
    capacity: usize,
    last_id: u64,
    feed: broadcast::Sender<Arc<Event>>,
}

/// The events asked for are not all there any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("events up to {oldest_kept} are gone; read the state and go on from there")]
pub struct Missed {
    /// The oldest id still kept.
    pub oldest_kept: u64,
}

impl EventLog {
    /// Keeps the newest `capacity` events (at least one), and half as many of those that explain something.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.max(1);
        Self {
            ring: VecDeque::new(),
            explaining: VecDeque::new(),
            capacity,
            last_id: 0,
            feed: broadcast::Sender::new(capacity),
        }
    }

    /// Appends one event and tells those who watch.
    pub fn push(&mut self, at_ms: u64, model: Option<&str>, what: EventKind) -> Arc<Event> {
        self.last_id += 1;
        let event = Arc::new(Event {
            id: self.last_id,
            version: SCHEMA_VERSION,
            at_ms,
            model: model.map(str::to_owned),
            text: what.to_string(),
            what,
        });
        if self.ring.len() == self.capacity {
            self.ring.pop_front();
        }
        self.ring.push_back(Arc::clone(&event));
        if event.what.explains() {
            if self.explaining.len() >= self.capacity.div_ceil(2) {
                self.explaining.pop_front();
            }
            self.explaining.push_back(Arc::clone(&event));
        }
        // Nobody watching is no error.
        let _ = self.feed.send(Arc::clone(&event));
        event
    }

    /// The newest id; 0 before the first event.
    #[must_use]
    pub const fn last_id(&self) -> u64 {
        self.last_id
    }

    /// Events from now on. A watcher that falls behind is told how many it lost.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<Event>> {
        self.feed.subscribe()
    }

    /// All that are kept, oldest first.
    pub fn kept(&self) -> impl Iterator<Item = &Arc<Event>> {
        self.ring.iter()
    }

    /// Those that explain something, oldest first; also such as are too old to be among [`kept`](Self::kept).
    pub fn explaining(&self) -> impl Iterator<Item = &Arc<Event>> {
        self.explaining.iter()
    }

    /// Events after `id`, oldest first.
    ///
    /// # Errors
    /// [`Missed`] where some of them are no longer kept, or where `id` lies ahead of the newest (another server's).
    pub fn since(&self, id: u64) -> Result<Vec<Arc<Event>>, Missed> {
        let oldest_kept = self.last_id + 1 - self.ring.len() as u64;
        if id + 1 < oldest_kept || id > self.last_id {
            return Err(Missed { oldest_kept });
        }
        let skip = usize::try_from(id + 1 - oldest_kept).unwrap_or(usize::MAX);
        Ok(self.ring.iter().skip(skip).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use shoal_core::bytes::ByteCount;
    use shoal_core::protocol::LeaseKind;

    use super::*;

    #[test]
    fn ids_grow_by_one_and_the_ring_is_bounded() {
        let mut log = EventLog::new(3);
        assert_eq!(log.since(0).expect("empty").len(), 0);
        for n in 0..5 {
            log.push(n, None, EventKind::Pinned { pinned: true });
        }
        let ids = |id| log.since(id).map(|events| events.iter().map(|event| event.id).collect::<Vec<_>>());
        assert_eq!(ids(2), Ok(vec![3, 4, 5]));
        assert_eq!(ids(5), Ok(vec![]));
        assert_eq!(ids(1), Err(Missed { oldest_kept: 3 }));
        assert_eq!(ids(6), Err(Missed { oldest_kept: 3 }));
    }

    #[test]
    fn what_explains_outlasts_how_the_ledger_moved() {
        let mut log = EventLog::new(8);
        let (lease, bytes, leased) = (LeaseKind::Kv, ByteCount::mib(8), ByteCount::ZERO);
        let told = |log: &EventLog| log.explaining().map(|event| event.id).collect::<Vec<_>>();
        log.push(1, Some("chat"), EventKind::Pinned { pinned: true });
        for n in 0..1_000 {
            log.push(n, Some("chat"), EventKind::LeaseReturned { lease, bytes, leased });
        }
        assert_eq!(told(&log), [1]);
        assert_eq!(log.kept().count(), 8);
        for n in 0..5 {
            log.push(n, None, EventKind::Pinned { pinned: false });
        }
        assert_eq!(told(&log), [1_003, 1_004, 1_005, 1_006], "they are bounded too");
    }

    #[test]
    fn an_event_reads_as_one_flat_object() {
        let mut log = EventLog::new(1);
        let event = log.push(12, Some("chat"), EventKind::Pinned { pinned: true });
        let text = serde_json::to_string(&*event).expect("plain data");
        assert_eq!(
            text,
            r#"{"id":1,"version":1,"at_ms":12,"model":"chat","text":"pinned","kind":"pinned","pinned":true}"#
        );
        assert_eq!(serde_json::from_str::<Event>(&text).expect("own text"), *event);
        assert!(text.contains(&format!(r#""kind":"{}""#, event.what.name())));
    }
}
