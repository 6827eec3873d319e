//! What keeps the cached prefixes of one key from another (`separate_keys`): a worker uses again only what was computed
//! for the same salt, and each key has its own.
//!
//! A salt says a key's name, and a number that this server drew: workers may outlive a server, and the names of keys may
//! change hands between two. It goes to our own workers only, in a header that no client can set.

use axum::http::{HeaderName, HeaderValue};

use crate::shelf::Caller;

/// Tells a worker what prefixes may be used again for a request.
pub(super) const CACHE_SALT: HeaderName = HeaderName::from_static("x-shoal-cache-salt");

/// The salts of this server.
#[derive(Debug)]
pub(crate) struct Salts {
    number: u64,
}

impl Salts {
    pub(crate) fn new() -> Self {
        let mut drawn = [0; 8];
        if !rustix::rand::getrandom(&mut drawn, rustix::rand::GetRandomFlags::empty()).is_ok_and(|n| n == 8) {
            // What is wanted is a number that no server before this one had.
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            drawn = (now.as_secs() << 30 | u64::from(now.subsec_nanos())).to_le_bytes();
        }
        Self { number: u64::from_le_bytes(drawn) }
    }

    /// The salt of this caller's requests.
    pub(crate) fn of(&self, caller: &Caller) -> HeaderValue {
        let salt = format!("{:016x}-{}", self.number, caller.name().unwrap_or_default());
        // Names are made of what may stand in a header; one that could not shares with nobody but its like.
        HeaderValue::try_from(salt).unwrap_or_else(|_| HeaderValue::from_static("unnamed"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_and_each_server_has_its_own() {
        let (one, other) = (Salts::new(), Salts::new());
        let (alice, bob) = (Caller::new("alice", true), Caller::new("key 2", true));
        assert_eq!(one.of(&alice), one.of(&alice));
        assert_ne!(one.of(&alice), one.of(&bob));
        assert_ne!(one.of(&alice), other.of(&alice));
        assert!(one.of(&bob).to_str().is_ok_and(|salt| salt.ends_with("-key 2")));
    }
}
