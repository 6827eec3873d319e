//! Who grants device bytes (I1).
//!
//! Apart because an embedded manager and a worker of a server differ only here. Whoever needs device memory asks
//! first and maps afterwards; what was unmapped is given back afterwards.

use core::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use shoal_core::bytes::ByteCount;
use shoal_core::protocol::LeaseKind;

use crate::error::LeaseError;

/// Grants device bytes.
pub trait LeaseSource: Debug + Send + Sync {
    /// Asks for `bytes`, at least `bytes_min`; returns what was granted.
    ///
    /// # Errors
    /// [`LeaseError`]; nothing was granted.
    fn acquire(
        &self,
        kind: LeaseKind,
        bytes: ByteCount,
        bytes_min: ByteCount,
        deadline: Duration,
        reason: &str,
    ) -> Result<ByteCount, LeaseError>;

    /// Gives bytes back. They were unmapped and their frames destroyed before.
    fn give_back(&self, kind: LeaseKind, bytes: ByteCount);

    /// What is held for `kind`.
    fn held(&self, kind: LeaseKind) -> ByteCount;
}

/// Bytes per kind.
#[derive(Debug, Default)]
pub(crate) struct Held([ByteCount; LeaseKind::ALL.len()]);

impl Held {
    const fn index(kind: LeaseKind) -> usize {
        match kind {
            LeaseKind::Weights => 0,
            LeaseKind::Kv => 1,
            LeaseKind::Overhead => 2,
        }
    }

    pub(crate) const fn get(&self, kind: LeaseKind) -> ByteCount {
        self.0[Self::index(kind)]
    }

    pub(crate) fn add(&mut self, kind: LeaseKind, bytes: ByteCount) {
        self.0[Self::index(kind)] += bytes;
    }

    /// Takes away; returns what there was to take.
    pub(crate) fn take(&mut self, kind: LeaseKind, bytes: ByteCount) -> ByteCount {
        let held = &mut self.0[Self::index(kind)];
        debug_assert!(*held >= bytes, "{bytes} of {kind:?} given back, {held} held");
        let taken = bytes.min(*held);
        *held -= taken;
        taken
    }

    pub(crate) fn total(&self) -> ByteCount {
        self.0.iter().copied().sum()
    }
}

/// A budget of this process alone: grants at once or says no.
#[derive(Debug)]
pub struct LocalBudget {
    budget: ByteCount,
    held: Mutex<Held>,
}

impl LocalBudget {
    /// A budget of `budget` bytes.
    #[must_use]
    pub fn new(budget: ByteCount) -> Arc<Self> {
        Arc::new(Self { budget, held: Mutex::new(Held::default()) })
    }

    /// The budget.
    #[must_use]
    pub const fn budget(&self) -> ByteCount {
        self.budget
    }
}

impl LeaseSource for LocalBudget {
    fn acquire(
        &self,
        kind: LeaseKind,
        bytes: ByteCount,
        bytes_min: ByteCount,
        _deadline: Duration,
        _reason: &str,
    ) -> Result<ByteCount, LeaseError> {
        let mut held = self.held.lock();
        let free = self.budget.saturating_sub(held.total());
        if free < bytes_min.min(bytes) {
            let reason = format!("{free} left of a budget of {}", self.budget);
            return Err(LeaseError::Denied { kind, requested: bytes, reason });
        }
        let granted = bytes.min(free);
        held.add(kind, granted);
        Ok(granted)
    }

    fn give_back(&self, kind: LeaseKind, bytes: ByteCount) {
        self.held.lock().take(kind, bytes);
    }

    fn held(&self, kind: LeaseKind) -> ByteCount {
        self.held.lock().get(kind)
    }
}

/// A source beside which bytes can be kept that were leased ahead: whoever asks gets those first.
///
/// For what has to be sure of its memory before it begins, and takes it piece by piece while others would take what is
/// free: a process that loads. What is kept counts as held by it, as it does for the source.
#[derive(Debug)]
pub struct LeaseAhead {
    source: Arc<dyn LeaseSource>,
    kept: Mutex<Held>,
}

impl LeaseAhead {
    /// Nothing is kept yet.
    #[must_use]
    pub fn new(source: Arc<dyn LeaseSource>) -> Arc<Self> {
        Arc::new(Self { source, kept: Mutex::default() })
    }

    /// Leases `bytes` for whoever asks for this kind next.
    ///
    /// # Errors
    /// [`LeaseError`]; nothing was granted.
    pub fn keep(
        &self,
        kind: LeaseKind,
        bytes: ByteCount,
        deadline: Duration,
        reason: &str,
    ) -> Result<(), LeaseError> {
        let granted = self.source.acquire(kind, bytes, bytes, deadline, reason)?;
        self.kept.lock().add(kind, granted);
        Ok(())
    }

    /// What is kept for `kind` and nobody has asked for yet.
    #[must_use]
    pub fn kept(&self, kind: LeaseKind) -> ByteCount {
        self.kept.lock().get(kind)
    }

    /// Gives back what is kept; returns how much that was.
    pub fn give_up(&self) -> ByteCount {
        let mut all = ByteCount::ZERO;
        for kind in LeaseKind::ALL {
            let bytes = {
                let mut kept = self.kept.lock();
                let bytes = kept.get(kind);
                kept.take(kind, bytes)
            };
            if !bytes.is_zero() {
                self.source.give_back(kind, bytes);
                all += bytes;
            }
        }
        all
    }
}

impl LeaseSource for LeaseAhead {
    fn acquire(
        &self,
        kind: LeaseKind,
        bytes: ByteCount,
        bytes_min: ByteCount,
        deadline: Duration,
        reason: &str,
    ) -> Result<ByteCount, LeaseError> {
        let own = {
            let mut kept = self.kept.lock();
            let own = kept.get(kind).min(bytes);
            kept.take(kind, own)
        };
        if own == bytes {
            return Ok(own);
        }
        let (rest, rest_min) = (bytes - own, bytes_min.saturating_sub(own));
        match self.source.acquire(kind, rest, rest_min, deadline, reason) {
            Ok(granted) => Ok(own + granted),
            Err(_) if !own.is_zero() && own >= bytes_min => Ok(own),
            Err(error) => {
                self.kept.lock().add(kind, own);
                Err(error)
            }
        }
    }

    fn give_back(&self, kind: LeaseKind, bytes: ByteCount) {
        self.source.give_back(kind, bytes);
    }

    fn held(&self, kind: LeaseKind) -> ByteCount {
        self.source.held(kind)
    }
}

/// Leased bytes with an owner: dropping it gives them back.
#[derive(Debug)]
pub(crate) struct Grant {
    source: Arc<dyn LeaseSource>,
    kind: LeaseKind,
    bytes: ByteCount,
}

impl Grant {
    /// All of `bytes` or an error.
    pub(crate) fn acquire(
        source: &Arc<dyn LeaseSource>,
        kind: LeaseKind,
        bytes: ByteCount,
        deadline: Duration,
        reason: &str,
    ) -> Result<Self, LeaseError> {
        let granted =
            if bytes.is_zero() { bytes } else { source.acquire(kind, bytes, bytes, deadline, reason)? };
        Ok(Self { source: Arc::clone(source), kind, bytes: granted })
    }

    /// Nothing of that kind.
    pub(crate) fn none(source: &Arc<dyn LeaseSource>, kind: LeaseKind) -> Self {
        Self { source: Arc::clone(source), kind, bytes: ByteCount::ZERO }
    }

    pub(crate) const fn kind(&self) -> LeaseKind {
        self.kind
    }

    pub(crate) const fn bytes(&self) -> ByteCount {
        self.bytes
    }

    /// Splits `bytes` off; `None` if there are fewer.
    pub(crate) fn split(&mut self, bytes: ByteCount) -> Option<Self> {
        if bytes > self.bytes {
            return None;
        }
        self.bytes -= bytes;
        Some(Self { source: Arc::clone(&self.source), kind: self.kind, bytes })
    }

    /// Joins another of the same kind; hands it back if it is of another.
    pub(crate) fn join(&mut self, mut other: Self) -> Result<(), Self> {
        if other.kind != self.kind {
            return Err(other);
        }
        self.bytes += other.bytes;
        other.bytes = ByteCount::ZERO;
        Ok(())
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if !self.bytes.is_zero() {
            self.source.give_back(self.kind, self.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_leased_ahead_goes_first_and_the_rest_comes_back() {
        let budget = LocalBudget::new(ByteCount::mib(10));
        let ahead = LeaseAhead::new(Arc::clone(&budget) as _);
        let source: Arc<dyn LeaseSource> = Arc::clone(&ahead) as _;
        let ask = |bytes| Grant::acquire(&source, LeaseKind::Weights, bytes, Duration::ZERO, "a test");
        let keep = |bytes| ahead.keep(LeaseKind::Weights, bytes, Duration::ZERO, "a start");
        keep(ByteCount::mib(6)).expect("fits");
        assert!(keep(ByteCount::mib(5)).is_err());
        // Another takes what is free: what is kept is still there.
        let free = budget.acquire(LeaseKind::Kv, ByteCount::mib(4), ByteCount::mib(4), Duration::ZERO, "");
        assert_eq!(free.expect("free"), ByteCount::mib(4));
        let five = ask(ByteCount::mib(5)).expect("kept");
        assert_eq!((ahead.kept(LeaseKind::Weights), five.bytes()), (ByteCount::mib(1), ByteCount::mib(5)));
        assert!(ask(ByteCount::mib(2)).is_err());
        assert_eq!(ahead.kept(LeaseKind::Weights), ByteCount::mib(1), "a refusal changes nothing");
        let some = ahead
            .acquire(LeaseKind::Weights, ByteCount::mib(2), ByteCount::mib(1), Duration::ZERO, "")
            .expect("the least of use is there");
        assert_eq!(some, ByteCount::mib(1));
        budget.give_back(LeaseKind::Kv, ByteCount::mib(4));
        let three = ask(ByteCount::mib(3)).expect("free again");
        keep(ByteCount::mib(1)).expect("fits");
        assert_eq!((ahead.give_up(), ahead.give_up()), (ByteCount::mib(1), ByteCount::ZERO));
        drop((five, three));
        source.give_back(LeaseKind::Weights, some);
        assert_eq!(budget.held(LeaseKind::Weights), ByteCount::ZERO);
    }

    #[test]
    fn grants_never_exceed_the_budget_and_come_back_on_drop() {
        let budget = LocalBudget::new(ByteCount::mib(10));
        let source: Arc<dyn LeaseSource> = Arc::clone(&budget) as _;
        let ask = |bytes| Grant::acquire(&source, LeaseKind::Kv, bytes, Duration::ZERO, "a test");
        let mut six = ask(ByteCount::mib(6)).expect("fits");
        assert!(matches!(ask(ByteCount::mib(6)), Err(LeaseError::Denied { .. })));
        let part = budget
            .acquire(LeaseKind::Weights, ByteCount::mib(6), ByteCount::mib(2), Duration::ZERO, "")
            .expect("a part");
        assert_eq!(part, ByteCount::mib(4));
        let two = six.split(ByteCount::mib(2)).expect("fewer than six");
        drop(six);
        assert_eq!(budget.held(LeaseKind::Kv), ByteCount::mib(2));
        drop(two);
        budget.give_back(LeaseKind::Weights, part);
        assert_eq!(ask(ByteCount::mib(10)).expect("all").bytes(), ByteCount::mib(10));
    }
}
