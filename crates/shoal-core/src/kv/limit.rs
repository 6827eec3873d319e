//! How much memory a cache may have: one number with a revision.
//!
//! Apart because two who set it (an operator and a controller, say) must not undo each other's word by coming late: an
//! older revision is refused, and so is another number under the same one. Nothing is ever lost by lowering it: what is
//! in use stays, nothing new is mapped, and memory goes as blocks become free.

use crate::bytes::ByteCount;

/// Why a limit was refused. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LimitError {
    /// More than there are addresses for.
    #[error("a limit of {limit} is above the {reservation} that the cache was made for")]
    AboveReservation {
        /// The limit given.
        limit: ByteCount,
        /// The most there can be.
        reservation: ByteCount,
    },
    /// No revision could be newer: whoever comes after could change nothing.
    #[error("revision {revision} is the last there is, and would leave none for a later change")]
    Last {
        /// The revision given.
        revision: u64,
    },
    /// Somebody has set a newer one.
    #[error("revision {revision} is older than {current}, which is in force")]
    Stale {
        /// The revision given.
        revision: u64,
        /// The one in force.
        current: u64,
    },
    /// This revision has set another limit already.
    #[error("revision {revision} has set {current}, not {limit}: give a change a newer revision")]
    Conflict {
        /// The revision given.
        revision: u64,
        /// The limit given.
        limit: ByteCount,
        /// The limit in force.
        current: ByteCount,
    },
}

/// See the module's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    bytes: ByteCount,
    revision: u64,
    reservation: ByteCount,
}

impl Limit {
    /// All of the reservation, as revision 0.
    #[must_use]
    pub const fn new(reservation: ByteCount) -> Self {
        Self { bytes: reservation, revision: 0, reservation }
    }

    /// The limit in force.
    #[must_use]
    pub const fn bytes(&self) -> ByteCount {
        self.bytes
    }

    /// Its revision.
    #[must_use]
    pub const fn revision(&self) -> u64 {
        self.revision
    }

    /// The most it can be.
    #[must_use]
    pub const fn reservation(&self) -> ByteCount {
        self.reservation
    }

    /// Sets it. Without a revision it is one newer than the one in force, and always holds; the same word twice is no error.
    /// The highest number is nobody's to give, so that there is always a newer one.
    ///
    /// # Errors
    /// [`LimitError`]; nothing is changed.
    pub const fn set(&mut self, limit: ByteCount, revision: Option<u64>) -> Result<(), LimitError> {
        if limit.0 > self.reservation.0 {
            return Err(LimitError::AboveReservation { limit, reservation: self.reservation });
        }
        let revision = match revision {
            Some(u64::MAX) => return Err(LimitError::Last { revision: u64::MAX }),
            Some(revision) if revision < self.revision => {
                return Err(LimitError::Stale { revision, current: self.revision });
            }
            Some(revision) if revision == self.revision && limit.0 != self.bytes.0 => {
                return Err(LimitError::Conflict { revision, limit, current: self.bytes });
            }
            Some(revision) => revision,
            None => self.revision.saturating_add(1),
        };
        self.bytes = limit;
        self.revision = revision;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_late_word_changes_nothing() {
        let mut limit = Limit::new(ByteCount::gib(4));
        limit.set(ByteCount::gib(1), Some(7)).expect("newer");
        let was = limit;
        assert_eq!(limit.set(ByteCount::gib(2), Some(6)), Err(LimitError::Stale { revision: 6, current: 7 }));
        assert!(matches!(limit.set(ByteCount::gib(2), Some(7)), Err(LimitError::Conflict { .. })));
        assert!(matches!(limit.set(ByteCount::gib(5), Some(8)), Err(LimitError::AboveReservation { .. })));
        assert_eq!(limit, was);
        limit.set(ByteCount::gib(1), Some(7)).expect("the same word again");
        limit.set(ByteCount::gib(4), None).expect("newer than 7");
        assert_eq!((limit.bytes(), limit.revision()), (ByteCount::gib(4), 8));
    }

    #[test]
    fn no_revision_locks_the_limit_for_ever() {
        let mut limit = Limit::new(ByteCount::gib(4));
        let was = limit;
        let last = limit.set(ByteCount::gib(1), Some(u64::MAX));
        assert_eq!(last, Err(LimitError::Last { revision: u64::MAX }));
        assert_eq!(limit, was);
        limit.set(ByteCount::gib(1), Some(u64::MAX - 1)).expect("newer");
        for gib in [2, 3, 1] {
            limit.set(ByteCount::gib(gib), None).expect("always holds");
            assert_eq!(limit.bytes(), ByteCount::gib(gib));
        }
    }
}
