//! Who holds how many device bytes, and that the sum stays within the budget (I1).
//!
//! A [`LeaseBook`] only counts. Who gets bytes, and who gives them up, is decided by [`crate::policy`]; carrying it out is
//! the broker's part. Apart from both, because every byte that anybody maps passes through these few lines, and because
//! they are checked against a plain model.
//!
//! **Overhead** is what a process takes outside our regions. It is declared by asking for a lease of that kind, and then
//! measured: [`LeaseBook::measure_overhead`] makes the lease what was measured, and no less than was granted. The correction
//! may use the *headroom*, the part of the budget that is never leased otherwise, because those bytes are taken already.
//!
//! What the driver shows to be taken by others ([`crate::drift`]) is *charged*: it cannot be leased. It may come when more
//! is leased already; then nothing is granted, and what is leased beyond is [owed](LeaseBook::owed) until holders have
//! given it back. What is left by a holder that died is *returning* until it is seen to be free.
//!
//! Keeps I1, checked after every change.

use std::collections::{BTreeMap, BTreeSet};

use crate::bytes::ByteCount;
use crate::ids::ModelId;
use crate::protocol::LeaseKind;

/// Why a change was refused. The book is as it was before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseBookError {
    /// There are not so many bytes.
    #[error("{requested} asked for, {free} of {budget} are free")]
    Short {
        /// What was asked for.
        requested: ByteCount,
        /// What could be granted.
        free: ByteCount,
        /// What there is in all.
        budget: ByteCount,
    },
    /// More was given back than was held.
    #[error("{model} gave back {returned} of {kind:?} and held {held}")]
    NotHeld {
        /// Who.
        model: ModelId,
        /// What for.
        kind: LeaseKind,
        /// What was given back.
        returned: ByteCount,
        /// What was held.
        held: ByteCount,
    },
    /// The model has no account.
    #[error("{model} has no account")]
    NoAccount {
        /// Who.
        model: ModelId,
    },
    /// The model's process has ended; nothing is granted to it any more.
    #[error("the account of {model} is closing")]
    Closing {
        /// Who.
        model: ModelId,
    },
    /// The model has an account already.
    #[error("{model} has an account already")]
    AlreadyOpen {
        /// Who.
        model: ModelId,
    },
}

/// What one model holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Account {
    granted: [ByteCount; 3],
    /// Measured overhead beyond what was granted.
    correction: ByteCount,
    closing: bool,
}

impl Account {
    fn total(&self) -> ByteCount {
        self.granted.iter().copied().sum::<ByteCount>() + self.correction
    }
}

const fn place(kind: LeaseKind) -> usize {
    match kind {
        LeaseKind::Weights => 0,
        LeaseKind::Kv => 1,
        LeaseKind::Overhead => 2,
    }
}

/// The ledger of one device.
#[derive(Clone, Debug)]
pub struct LeaseBook {
    budget: ByteCount,
    headroom: ByteCount,
    /// What others are seen to have of the budget.
    charged: ByteCount,
    accounts: BTreeMap<ModelId, Account>,
    /// What processes held that are gone, and that was not seen to be free yet.
    departed: BTreeMap<u32, ByteCount>,
    leased: ByteCount,
    /// Whose account has changed since that was last asked.
    changed: BTreeSet<ModelId>,
}

impl LeaseBook {
    /// A book for `budget` bytes, of which `headroom` (at most all) are leased only to cover measured overhead.
    #[must_use]
    pub fn new(budget: ByteCount, headroom: ByteCount) -> Self {
        Self {
            budget,
            headroom: headroom.min(budget),
            charged: ByteCount::ZERO,
            accounts: BTreeMap::new(),
            departed: BTreeMap::new(),
            leased: ByteCount::ZERO,
            changed: BTreeSet::new(),
        }
    }

    /// What there is in all, headroom included.
    #[must_use]
    pub const fn budget(&self) -> ByteCount {
        self.budget
    }

    /// What is kept back for overhead that turns out larger than declared.
    #[must_use]
    pub const fn headroom(&self) -> ByteCount {
        self.headroom
    }

    /// Sum of all leases, closing accounts and what is returning included.
    #[must_use]
    pub const fn leased(&self) -> ByteCount {
        self.leased
    }

    /// What may be leased in all: the budget less its headroom and what is charged.
    #[must_use]
    pub const fn leasable(&self) -> ByteCount {
        self.budget.saturating_sub(self.headroom).saturating_sub(self.charged)
    }

    /// What can be granted now.
    #[must_use]
    pub const fn free(&self) -> ByteCount {
        self.leasable().saturating_sub(self.leased)
    }

    /// What others are seen to have of the budget.
    #[must_use]
    pub const fn charged(&self) -> ByteCount {
        self.charged
    }

    /// Others are seen to have so much of the budget. No lease changes by it.
    pub fn charge(&mut self, bytes: ByteCount) {
        self.charged = bytes.min(self.budget.saturating_sub(self.headroom));
        self.check_invariants();
    }

    /// What is leased beyond what may be, because others came: to be given back.
    #[must_use]
    pub fn owed(&self) -> ByteCount {
        self.leased.saturating_sub(self.leasable()).min(self.charged)
    }

    /// What accounts that are closing, and processes that are gone, still hold.
    #[must_use]
    pub fn returning(&self) -> ByteCount {
        let closing = self.accounts.values().filter(|account| account.closing).map(Account::total);
        closing.chain(self.departed.values().copied()).sum()
    }

    /// Processes that are gone and whose memory was not seen to be free, with what they held.
    pub fn departed(&self) -> impl Iterator<Item = (u32, ByteCount)> + '_ {
        self.departed.iter().map(|(process, bytes)| (*process, *bytes))
    }

    /// What `model` holds for `kind`; corrections count as overhead. Zero without an account.
    #[must_use]
    pub fn held(&self, model: ModelId, kind: LeaseKind) -> ByteCount {
        self.accounts.get(&model).map_or(ByteCount::ZERO, |account| {
            let granted = account.granted[place(kind)];
            if kind == LeaseKind::Overhead { granted + account.correction } else { granted }
        })
    }

    /// What of its overhead was measured beyond what was granted.
    #[must_use]
    pub fn corrected(&self, model: ModelId) -> ByteCount {
        self.accounts.get(&model).map_or(ByteCount::ZERO, |account| account.correction)
    }

    /// Whose account was opened, closed or changed since this was last called.
    pub fn take_changed(&mut self) -> BTreeSet<ModelId> {
        std::mem::take(&mut self.changed)
    }

    /// What `model` holds in all. Zero without an account.
    #[must_use]
    pub fn total(&self, model: ModelId) -> ByteCount {
        self.accounts.get(&model).map_or(ByteCount::ZERO, Account::total)
    }

    /// Opens an account for a process that begins.
    ///
    /// # Errors
    /// [`LeaseBookError::AlreadyOpen`].
    pub fn open(&mut self, model: ModelId) -> Result<(), LeaseBookError> {
        if self.accounts.contains_key(&model) {
            return Err(LeaseBookError::AlreadyOpen { model });
        }
        self.accounts.insert(model, Account::default());
        self.changed.insert(model);
        self.check_invariants();
        Ok(())
    }

    /// Opens an account for a process that holds leases already, of a server before this one: in full or not at all.
    ///
    /// # Errors
    /// [`LeaseBookError::AlreadyOpen`], [`LeaseBookError::Short`].
    pub fn adopt(
        &mut self,
        model: ModelId,
        held: impl IntoIterator<Item = (LeaseKind, ByteCount)>,
    ) -> Result<(), LeaseBookError> {
        if self.accounts.contains_key(&model) {
            return Err(LeaseBookError::AlreadyOpen { model });
        }
        let mut account = Account::default();
        for (kind, bytes) in held {
            // Numbers of another process: their sum may be anything.
            let granted = &mut account.granted[place(kind)];
            *granted = ByteCount(granted.0.saturating_add(bytes.0));
        }
        let requested =
            ByteCount(account.granted.iter().fold(0, |sum: u64, bytes| sum.saturating_add(bytes.0)));
        // What is held is held, so the headroom counts as well.
        let free = self.budget - self.leased;
        if requested > free {
            return Err(LeaseBookError::Short { requested, free, budget: self.budget });
        }
        self.accounts.insert(model, account);
        self.changed.insert(model);
        self.leased += requested;
        self.check_invariants();
        Ok(())
    }

    /// Grants `bytes` more.
    ///
    /// A grant of overhead first takes over what a correction covers already.
    ///
    /// # Errors
    /// [`LeaseBookError::Short`], [`LeaseBookError::NoAccount`], [`LeaseBookError::Closing`].
    pub fn grant(&mut self, model: ModelId, kind: LeaseKind, bytes: ByteCount) -> Result<(), LeaseBookError> {
        let (free, budget) = (self.free(), self.budget);
        let account = self.accounts.get_mut(&model).ok_or(LeaseBookError::NoAccount { model })?;
        if account.closing {
            return Err(LeaseBookError::Closing { model });
        }
        let covered =
            if kind == LeaseKind::Overhead { account.correction.min(bytes) } else { ByteCount::ZERO };
        if bytes - covered > free {
            return Err(LeaseBookError::Short { requested: bytes, free, budget });
        }
        account.correction -= covered;
        account.granted[place(kind)] += bytes;
        self.leased += bytes - covered;
        self.changed.insert(model);
        self.check_invariants();
        Ok(())
    }

    /// Takes `bytes` back that their holder has unmapped. An account that is closing may still give back.
    ///
    /// # Errors
    /// [`LeaseBookError::NotHeld`], [`LeaseBookError::NoAccount`].
    pub fn give_back(
        &mut self,
        model: ModelId,
        kind: LeaseKind,
        bytes: ByteCount,
    ) -> Result<(), LeaseBookError> {
        let account = self.accounts.get_mut(&model).ok_or(LeaseBookError::NoAccount { model })?;
        let held = account.granted[place(kind)];
        if bytes > held {
            return Err(LeaseBookError::NotHeld { model, kind, returned: bytes, held });
        }
        account.granted[place(kind)] = held - bytes;
        self.leased -= bytes;
        self.changed.insert(model);
        self.check_invariants();
        Ok(())
    }

    /// Makes the lease for overhead the `measured` bytes, or what was granted where that is more: what is missing comes out of
    /// free bytes and headroom, as far as they go. Gives what could not be covered: bytes that are taken and that nobody
    /// has leased, for which somebody must yield.
    ///
    /// # Errors
    /// [`LeaseBookError::NoAccount`].
    pub fn measure_overhead(
        &mut self,
        model: ModelId,
        measured: ByteCount,
    ) -> Result<ByteCount, LeaseBookError> {
        let left = self.budget - self.leased;
        let account = self.accounts.get_mut(&model).ok_or(LeaseBookError::NoAccount { model })?;
        let wanted = measured.saturating_sub(account.granted[place(LeaseKind::Overhead)]);
        let correction = wanted.min(account.correction + left);
        self.leased = self.leased - account.correction + correction;
        account.correction = correction;
        self.changed.insert(model);
        self.check_invariants();
        Ok(wanted - correction)
    }

    /// The holder has died: nothing more is granted, and what it held counts as held until [`close`](Self::close).
    ///
    /// # Errors
    /// [`LeaseBookError::NoAccount`].
    pub fn begin_closing(&mut self, model: ModelId) -> Result<(), LeaseBookError> {
        let account = self.accounts.get_mut(&model).ok_or(LeaseBookError::NoAccount { model })?;
        account.closing = true;
        self.changed.insert(model);
        self.check_invariants();
        Ok(())
    }

    /// The holder's process is gone and its memory with it. Gives what came back.
    pub fn close(&mut self, model: ModelId) -> ByteCount {
        let returned = self.accounts.remove(&model).map_or(ByteCount::ZERO, |account| account.total());
        self.leased -= returned;
        self.changed.insert(model);
        self.check_invariants();
        returned
    }

    /// The holder's process is gone, and its memory is still to be seen free: the account ends, what it held stays leased
    /// until [`arrive`](Self::arrive). Gives how much that is.
    pub fn depart(&mut self, model: ModelId, process: u32) -> ByteCount {
        let held = self.accounts.remove(&model).map_or(ByteCount::ZERO, |account| account.total());
        if !held.is_zero() {
            *self.departed.entry(process).or_default() += held;
        }
        self.changed.insert(model);
        self.check_invariants();
        held
    }

    /// What a process held that is gone was given back just now by whoever held it in its name, and is still to be seen free:
    /// it is leased again until [`arrive`](Self::arrive), as far as nobody else has it. Gives how much that is.
    pub fn hold(&mut self, process: u32, bytes: ByteCount) -> ByteCount {
        let bytes = bytes.min(self.budget.saturating_sub(self.leased));
        if !bytes.is_zero() {
            *self.departed.entry(process).or_default() += bytes;
            self.leased += bytes;
        }
        self.check_invariants();
        bytes
    }

    /// What a process held that is gone is free, all but `kept`. Gives how much that was.
    pub fn arrive(&mut self, process: u32, kept: ByteCount) -> ByteCount {
        let held = self.departed.remove(&process).unwrap_or_default();
        let kept = kept.min(held);
        if !kept.is_zero() {
            self.departed.insert(process, kept);
        }
        let returned = held - kept;
        self.leased -= returned;
        self.check_invariants();
        returned
    }

    /// Checks I1.
    ///
    /// # Panics
    /// Where leases exceed the budget or do not add up: a mistake in this module.
    pub fn check_invariants(&self) {
        assert!(self.leased <= self.budget, "I1: {} leased of {}", self.leased, self.budget);
        debug_assert_eq!(
            self.leased,
            self.accounts.values().map(Account::total).chain(self.departed.values().copied()).sum(),
            "I1: sums differ"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ModelId = ModelId(0);
    const B: ModelId = ModelId(1);
    const MIB: fn(u64) -> ByteCount = ByteCount::mib;

    fn book() -> LeaseBook {
        let mut book = LeaseBook::new(MIB(100), MIB(10));
        book.open(A).expect("new");
        book.open(B).expect("new");
        book
    }

    #[test]
    fn headroom_is_not_granted() {
        let mut book = book();
        book.grant(A, LeaseKind::Weights, MIB(80)).expect("fits");
        let short = LeaseBookError::Short { requested: MIB(11), free: MIB(10), budget: MIB(100) };
        assert_eq!(book.grant(B, LeaseKind::Kv, MIB(11)), Err(short));
        assert_eq!(book.grant(B, LeaseKind::Kv, MIB(10)), Ok(()));
        assert_eq!((book.free(), book.leased()), (MIB(0), MIB(90)));
    }

    #[test]
    fn measured_overhead_takes_headroom_then_says_what_is_uncovered() {
        let mut book = book();
        book.grant(A, LeaseKind::Overhead, MIB(4)).expect("fits");
        book.grant(B, LeaseKind::Weights, MIB(86)).expect("fits");
        assert_eq!(book.measure_overhead(A, MIB(3)), Ok(MIB(0)));
        assert_eq!(book.held(A, LeaseKind::Overhead), MIB(4));
        assert_eq!(book.measure_overhead(A, MIB(20)), Ok(MIB(6)));
        assert_eq!((book.held(A, LeaseKind::Overhead), book.leased()), (MIB(14), MIB(100)));
        // What was measured is declared afterwards: nothing new is taken.
        book.grant(A, LeaseKind::Overhead, MIB(10)).expect("covered by the correction");
        assert_eq!(book.leased(), MIB(100));
        book.give_back(B, LeaseKind::Weights, MIB(6)).expect("held");
        assert_eq!(book.measure_overhead(A, MIB(20)), Ok(MIB(0)));
        assert_eq!(book.held(A, LeaseKind::Overhead), MIB(20));
        // Less was measured lately: what is beyond the grant is free again, and no more.
        assert_eq!((book.corrected(A), book.measure_overhead(A, MIB(16))), (MIB(6), Ok(MIB(0))));
        assert_eq!((book.held(A, LeaseKind::Overhead), book.corrected(A)), (MIB(16), MIB(2)));
        assert_eq!(book.measure_overhead(A, MIB(1)), Ok(MIB(0)));
        assert_eq!((book.held(A, LeaseKind::Overhead), book.corrected(A)), (MIB(14), MIB(0)));
    }

    #[test]
    fn a_holder_of_a_server_before_is_taken_on_in_full_or_not_at_all() {
        const C: ModelId = ModelId(2);
        let mut book = book();
        book.grant(B, LeaseKind::Weights, MIB(40)).expect("fits");
        let all = [(LeaseKind::Weights, MIB(50)), (LeaseKind::Kv, MIB(6)), (LeaseKind::Overhead, MIB(4))];
        let short = LeaseBookError::Short { requested: MIB(61), free: MIB(60), budget: MIB(100) };
        assert_eq!(book.adopt(C, all.into_iter().chain([(LeaseKind::Kv, MIB(1))])), Err(short));
        let endless = [(LeaseKind::Kv, ByteCount(u64::MAX)), (LeaseKind::Kv, MIB(1))];
        assert!(matches!(book.adopt(C, endless), Err(LeaseBookError::Short { .. })));
        assert_eq!((book.leased(), book.total(C)), (MIB(40), MIB(0)));
        assert_eq!(book.adopt(C, all), Ok(()));
        assert_eq!((book.leased(), book.held(C, LeaseKind::Kv), book.free()), (MIB(100), MIB(6), MIB(0)));
        assert_eq!(book.adopt(C, []), Err(LeaseBookError::AlreadyOpen { model: C }));
        assert_eq!(book.give_back(C, LeaseKind::Weights, MIB(50)), Ok(()));
        assert_eq!((book.close(C), book.leased()), (MIB(10), MIB(40)));
    }

    #[test]
    fn a_dead_holders_bytes_come_back_when_it_is_gone() {
        let mut book = book();
        book.grant(A, LeaseKind::Weights, MIB(90)).expect("fits");
        book.begin_closing(A).expect("open");
        assert_eq!(book.grant(A, LeaseKind::Kv, MIB(0)), Err(LeaseBookError::Closing { model: A }));
        assert_eq!((book.free(), book.returning()), (MIB(0), MIB(90)));
        assert_eq!(book.close(A), MIB(90));
        assert_eq!((book.free(), book.returning()), (MIB(90), MIB(0)));
        assert_eq!(book.close(A), MIB(0));
        assert_eq!(book.grant(A, LeaseKind::Kv, MIB(1)), Err(LeaseBookError::NoAccount { model: A }));
    }

    #[test]
    fn what_others_have_cannot_be_leased_and_what_is_leased_beyond_is_owed() {
        let mut book = book();
        book.grant(A, LeaseKind::Weights, MIB(60)).expect("fits");
        book.charge(MIB(20));
        assert_eq!((book.leasable(), book.free(), book.owed()), (MIB(70), MIB(10), MIB(0)));
        assert!(book.grant(B, LeaseKind::Kv, MIB(12)).is_err());
        book.charge(MIB(45));
        assert_eq!((book.leased(), book.free(), book.owed()), (MIB(60), MIB(0), MIB(15)));
        book.give_back(A, LeaseKind::Weights, MIB(20)).expect("held");
        assert_eq!((book.free(), book.owed()), (MIB(5), MIB(0)));
        book.charge(MIB(1_000));
        assert_eq!((book.charged(), book.leasable(), book.owed()), (MIB(90), MIB(0), MIB(40)));
        book.charge(MIB(0));
        assert_eq!(book.grant(B, LeaseKind::Kv, MIB(50)), Ok(()));
        // Overhead that was measured is there already, in the headroom: nobody owes that.
        assert_eq!(book.measure_overhead(A, MIB(10)), Ok(MIB(0)));
        assert_eq!((book.leased(), book.owed()), (MIB(100), MIB(0)));
    }

    #[test]
    fn what_a_dead_process_held_stays_leased_beside_the_next_ones_account() {
        let mut book = book();
        book.grant(A, LeaseKind::Weights, MIB(50)).expect("fits");
        assert_eq!((book.depart(A, 7), book.depart(B, 8)), (MIB(50), MIB(0)));
        assert_eq!(book.departed().collect::<Vec<_>>(), [(7, MIB(50))]);
        book.open(A).expect("its next process");
        assert!(book.grant(A, LeaseKind::Weights, MIB(50)).is_err());
        assert_eq!((book.returning(), book.leased(), book.total(A)), (MIB(50), MIB(50), MIB(0)));
        // A child of its has some of it still.
        assert_eq!((book.arrive(7, MIB(8)), book.arrive(7, MIB(8))), (MIB(42), MIB(0)));
        assert_eq!((book.returning(), book.leased()), (MIB(8), MIB(8)));
        assert_eq!((book.arrive(7, MIB(0)), book.arrive(7, MIB(0))), (MIB(8), MIB(0)));
        assert_eq!(book.grant(A, LeaseKind::Weights, MIB(50)), Ok(()));
        assert_eq!(book.returning(), MIB(0));
    }

    #[test]
    fn what_was_held_in_the_name_of_a_dead_process_is_leased_until_it_is_seen_free() {
        let mut book = book();
        book.grant(A, LeaseKind::Weights, MIB(50)).expect("fits");
        book.give_back(A, LeaseKind::Weights, MIB(50)).expect("held");
        assert_eq!(book.hold(7, MIB(50)), MIB(50));
        assert_eq!((book.leased(), book.total(A), book.returning()), (MIB(50), MIB(0), MIB(50)));
        assert!(book.grant(A, LeaseKind::Weights, MIB(50)).is_err(), "nobody has it before it is there");
        assert_eq!(book.hold(8, MIB(80)), book.budget() - MIB(50), "no more than there is");
        assert_eq!((book.hold(8, MIB(1)), book.hold(9, MIB(0))), (MIB(0), MIB(0)));
        assert_eq!(book.departed().count(), 2, "of nothing nothing is kept");
        assert_eq!(book.arrive(7, MIB(0)), MIB(50));
        assert_eq!(book.leased(), book.budget() - MIB(50));
    }

    #[test]
    fn giving_back_too_much_changes_nothing() {
        let mut book = book();
        book.grant(A, LeaseKind::Kv, MIB(5)).expect("fits");
        let wrong = book.give_back(A, LeaseKind::Kv, MIB(6));
        assert!(matches!(wrong, Err(LeaseBookError::NotHeld { held, .. }) if held == MIB(5)), "{wrong:?}");
        assert_eq!(book.leased(), MIB(5));
        assert_eq!(book.open(A), Err(LeaseBookError::AlreadyOpen { model: A }));
    }
}
