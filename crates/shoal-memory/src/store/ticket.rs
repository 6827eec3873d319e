//! An answer that comes later.
//!
//! Apart because it is the one place where a caller waits for a tier: always with a deadline (I10). A promise that is
//! dropped answers too, so nobody waits for what nobody will do.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Miss;

/// What happens with an answer that nobody waits for.
type Then<T> = Box<dyn FnOnce(Result<T, Miss>) + Send>;

struct Slot<T> {
    answer: Option<Result<T, Miss>>,
    then: Option<Then<T>>,
}

impl<T: fmt::Debug> fmt::Debug for Slot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.answer.fmt(f)
    }
}

#[derive(Debug)]
struct Shared<T> {
    slot: Mutex<Slot<T>>,
    arrived: Condvar,
    is_done: AtomicBool,
    is_cancelled: AtomicBool,
    deadline: Instant,
}

/// The caller's end: what was asked for, or why not.
#[derive(Debug)]
pub struct Ticket<T>(Arc<Shared<T>>);

/// The tier's end. Dropping it answers [`Miss::Closed`].
#[derive(Debug)]
pub struct Promise<T>(Option<Arc<Shared<T>>>);

impl<T> Ticket<T> {
    /// A ticket with a deadline from now, and the promise that answers it.
    #[must_use]
    pub fn new(deadline: Duration) -> (Self, Promise<T>) {
        let now = Instant::now();
        let shared = Arc::new(Shared {
            slot: Mutex::new(Slot { answer: None, then: None }),
            arrived: Condvar::new(),
            is_done: AtomicBool::new(false),
            is_cancelled: AtomicBool::new(false),
            deadline: now.checked_add(deadline).unwrap_or(now + Duration::from_hours(24)),
        });
        (Self(Arc::clone(&shared)), Promise(Some(shared)))
    }

    /// A ticket that is answered already.
    #[must_use]
    pub fn ready(answer: Result<T, Miss>) -> Self {
        let (ticket, promise) = Self::new(Duration::ZERO);
        promise.answer(answer);
        ticket
    }

    /// Waits for the answer, until the deadline at most.
    ///
    /// # Errors
    /// Why there is none. After [`Miss::Deadline`] a transfer may still be under way; it has its memory to itself.
    pub fn wait(self) -> Result<T, Miss> {
        let mut slot = self.0.slot.lock();
        while slot.answer.is_none() {
            if self.0.arrived.wait_until(&mut slot, self.0.deadline).timed_out() && slot.answer.is_none() {
                self.0.is_cancelled.store(true, Ordering::Relaxed);
                return Err(Miss::Deadline);
            }
        }
        slot.answer.take().unwrap_or(Err(Miss::Closed))
    }

    /// Waits until [`Ticket::wait`] would come back with an answer, until then at most. Whether it would.
    pub(crate) fn is_done_by(&self, until: Instant) -> bool {
        let mut slot = self.0.slot.lock();
        while slot.answer.is_none() {
            if self.0.arrived.wait_until(&mut slot, until).timed_out() {
                break;
            }
        }
        slot.answer.is_some()
    }

    /// Instead of waiting: `then` is called with the answer, by whoever gives it, or now if it is there. It must be quick,
    /// because it may hold up a disk. The deadline is the tier's to keep.
    pub(crate) fn then(self, then: impl FnOnce(Result<T, Miss>) + Send + 'static) {
        let mut slot = self.0.slot.lock();
        match slot.answer.take() {
            Some(answer) => {
                drop(slot);
                then(answer);
            }
            None => slot.then = Some(Box::new(then)),
        }
    }

    /// Whether [`Ticket::wait`] would come back at once.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.0.is_done.load(Ordering::Acquire)
    }

    /// Asks no more: what has not begun does not begin, and what is read arrives nowhere.
    pub fn cancel(&self) {
        self.0.is_cancelled.store(true, Ordering::Relaxed);
    }
}

impl<T> Promise<T> {
    /// Answers. After the first time nothing happens.
    pub fn answer(mut self, answer: Result<T, Miss>) {
        self.give(answer);
    }

    fn give(&mut self, answer: Result<T, Miss>) {
        if let Some(shared) = self.0.take() {
            let mut slot = shared.slot.lock();
            if let Some(then) = slot.then.take() {
                drop(slot);
                return then(answer);
            }
            // Whoever wakes takes the answer; one that nobody waits for is dropped with the ticket.
            slot.answer = Some(answer);
            drop(slot);
            shared.is_done.store(true, Ordering::Release);
            shared.arrived.notify_all();
        }
    }

    /// Whether nobody wants the answer any more.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.as_ref().is_none_or(|shared| shared.is_cancelled.load(Ordering::Relaxed))
    }

    /// Until when the caller waits.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.0.as_ref().map_or_else(Instant::now, |shared| shared.deadline)
    }
}

impl<T> Drop for Promise<T> {
    fn drop(&mut self) {
        self.give(Err(Miss::Closed));
    }
}

/// Answers when all tickets have: with what they say together, or with the last error.
pub(crate) fn gather<T: Send + 'static, R: Send + 'static>(
    tickets: Vec<Ticket<T>>,
    promise: Promise<R>,
    together: impl FnOnce(Vec<T>) -> R + Send + 'static,
) {
    struct Gathered<T, R, F> {
        found: Vec<T>,
        failed: Option<Miss>,
        left: usize,
        end: Option<(Promise<R>, F)>,
    }
    let left = tickets.len();
    if left == 0 {
        return promise.answer(Ok(together(Vec::new())));
    }
    let end = Some((promise, together));
    let gathered = Arc::new(Mutex::new(Gathered { found: Vec::new(), failed: None, left, end }));
    for ticket in tickets {
        let gathered = Arc::clone(&gathered);
        ticket.then(move |answer| {
            let mut gathered = gathered.lock();
            match answer {
                Ok(found) => gathered.found.push(found),
                Err(miss) => gathered.failed = Some(miss),
            }
            gathered.left -= 1;
            if gathered.left > 0 {
                return;
            }
            let found = std::mem::take(&mut gathered.found);
            let failed = gathered.failed.take();
            if let Some((promise, together)) = gathered.end.take() {
                drop(gathered);
                promise.answer(failed.map_or_else(|| Ok(together(found)), Err));
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ticket_is_answered() {
        let (ticket, promise) = Ticket::new(Duration::from_mins(1));
        assert!(!ticket.is_done());
        promise.answer(Ok(7));
        assert!(ticket.is_done());
        assert_eq!(ticket.wait(), Ok(7));

        let (ticket, promise) = Ticket::<u32>::new(Duration::from_mins(1));
        drop(promise);
        assert_eq!(ticket.wait(), Err(Miss::Closed));

        let (ticket, promise) = Ticket::<u32>::new(Duration::ZERO);
        assert_eq!(ticket.wait(), Err(Miss::Deadline));
        assert!(promise.is_cancelled(), "nobody waits any more");

        let (ticket, promise) = Ticket::<u32>::new(Duration::from_mins(1));
        ticket.cancel();
        assert!(promise.is_cancelled());
        for is_early in [true, false] {
            let (ticket, promise) = Ticket::new(Duration::from_mins(1));
            let (sender, answers) = std::sync::mpsc::channel();
            let then = move |answer| sender.send(answer).expect("somebody listens");
            let promise = if is_early {
                promise.answer(Ok(7));
                None
            } else {
                Some(promise)
            };
            ticket.then(then);
            // A promise that is dropped answers as well.
            let wanted = promise.map_or(Ok(7), |_| Err(Miss::Closed));
            assert_eq!(answers.recv(), Ok(wanted));
        }
        assert_eq!(Ticket::<u32>::ready(Err(Miss::Absent)).wait(), Err(Miss::Absent));
    }
}
