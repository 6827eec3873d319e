//! Residency: in which tiers the bytes of one extent are valid, and the one move that may be under way.
//!
//! Apart because every change of it must keep I6: what holds bytes holds them in at least one tier until it is
//! discarded on purpose. A move adds its target only when it is finished; until then, and for ever if it fails, the
//! copy it read from stays valid.

use core::fmt;

use crate::tier::Tier;

/// A set of tiers.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct TierSet(u8);

impl TierSet {
    /// No tier.
    pub const EMPTY: Self = Self(0);

    const fn bit(tier: Tier) -> u8 {
        match tier {
            Tier::Device => 1,
            Tier::Host => 2,
            Tier::Disk => 4,
            Tier::Source => 8,
        }
    }

    /// The set of one tier.
    #[must_use]
    pub const fn of(tier: Tier) -> Self {
        Self(Self::bit(tier))
    }

    /// With `tier` added.
    #[must_use]
    pub const fn with(self, tier: Tier) -> Self {
        Self(self.0 | Self::bit(tier))
    }

    /// With `tier` taken out.
    #[must_use]
    pub const fn without(self, tier: Tier) -> Self {
        Self(self.0 & !Self::bit(tier))
    }

    /// Whether `tier` is in it.
    #[must_use]
    pub const fn has(self, tier: Tier) -> bool {
        self.0 & Self::bit(tier) != 0
    }

    /// Whether no tier is in it.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The fastest tier in it.
    #[must_use]
    pub fn fastest(self) -> Option<Tier> {
        Tier::ALL.into_iter().find(|tier| self.has(*tier))
    }
}

impl fmt::Debug for TierSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(Tier::ALL.into_iter().filter(|tier| self.has(*tier))).finish()
    }
}

/// One step that changes where the bytes of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Move {
    /// Copy up to the device from the given tier.
    Restore(Tier),
    /// Copy from the device to the given tier, then give the device memory up.
    Offload(Tier),
    /// Give the device memory up; another valid copy exists.
    Drop,
    /// Give the device memory up and with it the bytes: the region's backing says so.
    Discard,
    /// Zeroed device memory for an extent without bytes.
    Zero,
}

/// Why a step cannot begin or finish. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResidencyError {
    /// Another move of this extent is under way.
    #[error("{under_way:?} is under way")]
    Busy {
        /// The other move.
        under_way: Move,
    },
    /// No such move was begun.
    #[error("no move is under way")]
    Idle,
    /// The bytes are not where the move needs them.
    #[error("{wanted:?} does not fit valid copies {valid:?}")]
    WrongCopies {
        /// The move.
        wanted: Move,
        /// Where valid copies are.
        valid: TierSet,
    },
    /// It would take away the last valid copy (I6).
    #[error("the {tier} copy is the last valid one")]
    LastCopy {
        /// Where that copy is.
        tier: Tier,
    },
}

/// Where the bytes of one extent are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Residency {
    valid: TierSet,
    under_way: Option<Move>,
    lost_on_purpose: bool,
}

impl Residency {
    /// The tiers with a valid copy.
    #[must_use]
    pub const fn valid(&self) -> TierSet {
        self.valid
    }

    /// The move under way, if any.
    #[must_use]
    pub const fn under_way(&self) -> Option<Move> {
        self.under_way
    }

    /// True for an extent whose bytes were discarded and whose memory is wanted back, zeroed, on restore.
    #[must_use]
    pub const fn is_discarded(&self) -> bool {
        self.lost_on_purpose
    }

    /// Begins `step`.
    ///
    /// # Errors
    /// [`ResidencyError`]; nothing is changed.
    pub fn begin(&mut self, step: Move) -> Result<(), ResidencyError> {
        if let Some(under_way) = self.under_way {
            return Err(ResidencyError::Busy { under_way });
        }
        let valid = self.valid;
        let fits = match step {
            Move::Restore(from) => from != Tier::Device && valid.has(from) && !valid.has(Tier::Device),
            Move::Offload(to) => to != Tier::Device && valid.has(Tier::Device) && !valid.has(to),
            Move::Drop => valid.has(Tier::Device) && !valid.without(Tier::Device).is_empty(),
            Move::Discard => valid.has(Tier::Device),
            Move::Zero => valid.is_empty(),
        };
        if !fits {
            return Err(ResidencyError::WrongCopies { wanted: step, valid });
        }
        self.under_way = Some(step);
        Ok(())
    }

    /// The move under way succeeded: its effect becomes true.
    ///
    /// # Errors
    /// [`ResidencyError::Idle`].
    pub fn finish(&mut self) -> Result<Move, ResidencyError> {
        let step = self.under_way.take().ok_or(ResidencyError::Idle)?;
        match step {
            Move::Restore(_) => self.valid = self.valid.with(Tier::Device),
            Move::Zero => {
                self.valid = TierSet::of(Tier::Device);
                self.lost_on_purpose = false;
            }
            Move::Offload(to) => self.valid = self.valid.with(to).without(Tier::Device),
            Move::Drop => self.valid = self.valid.without(Tier::Device),
            Move::Discard => {
                self.valid = TierSet::EMPTY;
                self.lost_on_purpose = true;
            }
        }
        Ok(step)
    }

    /// The move under way failed or was cancelled: all is as before it began (I6).
    ///
    /// # Errors
    /// [`ResidencyError::Idle`].
    pub fn abort(&mut self) -> Result<Move, ResidencyError> {
        self.under_way.take().ok_or(ResidencyError::Idle)
    }

    /// The bytes are now (also) valid in `tier`.
    pub const fn add(&mut self, tier: Tier) {
        self.valid = self.valid.with(tier);
        self.lost_on_purpose = false;
    }

    /// The copy in `tier` is no longer there, or no longer right.
    ///
    /// # Errors
    /// [`ResidencyError::LastCopy`], or [`ResidencyError::Busy`] while a move is under way.
    pub fn remove(&mut self, tier: Tier) -> Result<(), ResidencyError> {
        if let Some(under_way) = self.under_way {
            return Err(ResidencyError::Busy { under_way });
        }
        if self.valid == TierSet::of(tier) {
            return Err(ResidencyError::LastCopy { tier });
        }
        self.valid = self.valid.without(tier);
        Ok(())
    }

    /// The device's bytes were written: every other copy is stale.
    ///
    /// # Errors
    /// [`ResidencyError::Busy`], or [`ResidencyError::WrongCopies`] without a device copy.
    pub const fn written(&mut self) -> Result<(), ResidencyError> {
        if let Some(under_way) = self.under_way {
            return Err(ResidencyError::Busy { under_way });
        }
        if !self.valid.has(Tier::Device) {
            return Err(ResidencyError::WrongCopies { wanted: Move::Offload(Tier::Host), valid: self.valid });
        }
        self.valid = TierSet::of(Tier::Device);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_move_changes_nothing_and_the_last_copy_stays() {
        let mut residency = Residency::default();
        residency.add(Tier::Host);
        residency.begin(Move::Restore(Tier::Host)).expect("host copy is there");
        assert_eq!(residency.abort(), Ok(Move::Restore(Tier::Host)));
        assert_eq!(residency.valid(), TierSet::of(Tier::Host));
        assert_eq!(residency.remove(Tier::Host), Err(ResidencyError::LastCopy { tier: Tier::Host }));
        assert!(residency.begin(Move::Drop).is_err());

        residency.begin(Move::Restore(Tier::Host)).expect("again");
        assert_eq!(
            residency.remove(Tier::Host).map_err(|error| matches!(error, ResidencyError::Busy { .. })),
            Err(true)
        );
        residency.finish().expect("begun");
        assert_eq!(residency.finish(), Err(ResidencyError::Idle));
        residency.written().expect("on the device");
        assert_eq!(residency.valid(), TierSet::of(Tier::Device));
        assert!(residency.begin(Move::Drop).is_err(), "dropping the only copy");
        residency.begin(Move::Offload(Tier::Host)).expect("fits");
        residency.finish().expect("begun");
        assert_eq!(format!("{:?}", residency.valid()), "{Host}");
    }

    #[test]
    fn discarding_is_on_purpose_and_leaves_a_wish_for_memory() {
        let mut residency = Residency::default();
        residency.begin(Move::Zero).expect("empty");
        residency.finish().expect("begun");
        residency.begin(Move::Discard).expect("on the device");
        residency.finish().expect("begun");
        assert!(residency.is_discarded() && residency.valid().is_empty());
        residency.begin(Move::Zero).expect("empty again");
        residency.finish().expect("begun");
        assert!(!residency.is_discarded());
    }
}
