//! Tiers that watch another one: what they pass on to it as it is.
#![allow(unused_macros, unused_imports, reason = "each test binary uses some of it")]

/// Methods of `shoal_memory::store::Store`, by name, that are those of the tier in the field `store`.
macro_rules! passes_on {
    ($($method:ident),+ $(,)?) => {
        $(crate::common::passing::passes_on!(@ $method);)+
    };
    (@ contains) => {
        fn contains(&self, key: &StoreKey) -> bool {
            self.store.contains(key)
        }
    };
    (@ is_kept) => {
        fn is_kept(&self, key: &StoreKey) -> bool {
            self.store.is_kept(key)
        }
    };
    (@ would_rise) => {
        fn would_rise(&self, key: &StoreKey) -> bool {
            self.store.would_rise(key)
        }
    };
    (@ offer) => {
        fn offer(&self, key: &StoreKey, offer: &Offer) -> Verdict {
            self.store.offer(key, offer)
        }
    };
    (@ get) => {
        fn get(&self, key: StoreKey, target: Buffer, deadline: Duration) -> Ticket<Fetched> {
            self.store.get(key, target, deadline)
        }
    };
    (@ hold) => {
        fn hold(&self, key: &StoreKey) -> Option<Held> {
            self.store.hold(key)
        }
    };
    (@ lend) => {
        fn lend(&self, key: &StoreKey) -> Option<Lent<'_>> {
            self.store.lend(key)
        }
    };
    (@ room) => {
        fn room(&self, bytes: usize) -> Option<Arc<HostBuffer>> {
            self.store.room(bytes)
        }
    };
    (@ is_own) => {
        fn is_own(&self, memory: &HostBuffer) -> bool {
            self.store.is_own(memory)
        }
    };
    (@ remove) => {
        fn remove(&self, key: StoreKey, deadline: Duration) -> Ticket<bool> {
            self.store.remove(key, deadline)
        }
    };
    (@ flush) => {
        fn flush(&self, deadline: Duration) -> Ticket<()> {
            self.store.flush(deadline)
        }
    };
}

pub(crate) use passes_on;
