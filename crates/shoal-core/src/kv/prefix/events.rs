//! What happened to sealed blocks, for routers that send a request to where its prefix lies.
//!
//! Apart because readers come late and may never come: a ring of bounded length with numbers, so that a reader sees what
//! it missed and can start over (I10).

use std::collections::VecDeque;

use super::key::BlockKey;

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A block can be found from now on.
    Stored {
        /// Its key.
        key: BlockKey,
        /// The key of the block before it; none at the start of a sequence, or where an engine did not say.
        parent: Option<BlockKey>,
    },
    /// A block cannot be found any more.
    Removed {
        /// Its key.
        key: BlockKey,
    },
    /// No block of any group can be found any more.
    Cleared,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefixEvent {
    /// Its number: one more than that of the event before it.
    pub sequence: u64,
    /// The group of layers; 0 for [`EventKind::Cleared`].
    pub group: usize,
    /// What happened.
    pub kind: EventKind,
}

/// Some events, and whether some before them were lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventBatch {
    /// How many events from the one asked for were overwritten. Not 0: what the reader knows is out of date, it should
    /// forget all and read on.
    pub lost: u64,
    /// The events, oldest first.
    pub events: Vec<PrefixEvent>,
    /// What to ask for next.
    pub next: u64,
}

/// The last events.
#[derive(Clone, Debug)]
pub(super) struct Events {
    ring: VecDeque<PrefixEvent>,
    max: usize,
    next: u64,
}

impl Events {
    pub(super) const fn new(max: usize) -> Self {
        Self { ring: VecDeque::new(), max, next: 0 }
    }

    pub(super) const fn wanted(&self) -> bool {
        self.max > 0
    }

    pub(super) fn push(&mut self, group: usize, kind: EventKind) {
        if self.max == 0 {
            return;
        }
        if self.ring.len() == self.max {
            self.ring.pop_front();
        }
        self.ring.push_back(PrefixEvent { sequence: self.next, group, kind });
        self.next += 1;
    }

    pub(super) fn since(&self, sequence: u64, max: usize) -> EventBatch {
        let first = self.next - self.ring.len() as u64;
        // A number from the future is that of another index, before a restart: everything is new to its reader.
        let from = if sequence > self.next { first } else { sequence.max(first) };
        let skip = usize::try_from(from - first).unwrap_or(usize::MAX);
        let events: Vec<PrefixEvent> = self.ring.iter().skip(skip).take(max).cloned().collect();
        let lost = if sequence > self.next { self.next.max(1) } else { from - sequence };
        EventBatch { lost, next: from + events.len() as u64, events }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(key: u128) -> EventKind {
        EventKind::Stored { key: BlockKey::Tokens(key), parent: None }
    }

    #[test]
    fn a_late_reader_hears_what_it_missed() {
        let mut events = Events::new(3);
        for key in 0..5 {
            events.push(0, stored(key));
        }
        let batch = events.since(0, 2);
        assert_eq!((batch.lost, batch.next), (2, 4));
        assert_eq!(batch.events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [2, 3]);
        let batch = events.since(batch.next, 9);
        assert_eq!((batch.lost, batch.next, batch.events.len()), (0, 5, 1));
        assert_eq!(events.since(5, 9), EventBatch { lost: 0, events: vec![], next: 5 });
    }

    #[test]
    fn a_number_of_another_life_is_a_loss() {
        let mut events = Events::new(3);
        events.push(0, stored(1));
        let batch = events.since(77, 9);
        assert_eq!((batch.lost, batch.events.len(), batch.next), (1, 1, 1));
        assert!(Events::new(3).since(77, 9).lost > 0);
    }

    #[test]
    fn no_room_is_no_event() {
        let mut events = Events::new(0);
        events.push(0, EventKind::Cleared);
        assert_eq!(events.since(0, 9), EventBatch::default());
    }
}
