//! Figures of a history.

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) evicts: u64,
    pub(crate) grants: u64,
    pub(crate) served: u64,
    /// Of the first three models, while the load lasts that never pauses.
    pub(crate) served_of: [u64; 3],
    pub(crate) denied: u64,
    /// Plans made.
    pub(crate) plans: u64,
    /// Models brought back that nobody waited for.
    pub(crate) preloads: u64,
    /// Times that somebody had to wait for one it may not stand beside.
    pub(crate) apart: u64,
    /// Wakes and orders that failed, kills, sleeps by hand, changes of the budget.
    pub(crate) accidents: u64,
    /// Weights went before prefixes that are still there.
    pub(crate) outlasted: u64,
    /// The longest wait, in thousandths of the stated bound.
    pub(crate) worst_permille: u64,
}

impl Seen {
    pub(crate) fn add(&mut self, other: &Self) {
        self.evicts += other.evicts;
        self.grants += other.grants;
        self.served += other.served;
        self.denied += other.denied;
        self.plans += other.plans;
        self.preloads += other.preloads;
        self.apart += other.apart;
        self.accidents += other.accidents;
        self.outlasted += other.outlasted;
        self.worst_permille = self.worst_permille.max(other.worst_permille);
    }
}
