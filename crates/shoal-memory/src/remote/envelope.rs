//! What stands before a block's bytes in an object, and whether both are believed.
//!
//! Apart because it is a format that outlives processes, and because a parser of what a remote gives must take any bytes.
//! A remote is somebody else's: it may err, be shared with others, or be taken over. So the head carries a code that only
//! the holder of the tier's key can make (HMAC-SHA-256, RFC 2104), of the name, the length and the bytes. What a remote can
//! still do is to give nothing, or what was put under this name at another time, which are the same bytes.
//!
//! ```text
//! head = magic (8) | version (4) | zero (4) | name (48) | length (8) | zero | code (32)    128 bytes, little endian
//! ```

use std::fmt;
use std::path::Path;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::key_file;
use crate::store::StoreKey;

/// Bytes of a head.
pub const HEAD_BYTES: usize = 128;
/// The format's version; it is part of objects' names too.
pub(super) const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"SHOALREM";
const CODE: usize = 32;
const SAID: usize = HEAD_BYTES - CODE;

/// What the codes of a remote tier are made with: all servers that share its objects have the same one. 32 random bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteKey(pub [u8; 32]);

impl fmt::Debug for RemoteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RemoteKey(..)")
    }
}

impl RemoteKey {
    /// The key in a file: 32 bytes, or 64 hexadecimal digits, as `openssl rand -hex 32` writes them. A file that others may
    /// read is taken, with a warning: secrets are mounted so in containers.
    ///
    /// # Errors
    /// Why there is none, in words.
    pub fn from_file(path: &Path) -> Result<Self, String> {
        let wrong = |why| format!("no key in {}: {why}", path.display());
        key_file::read(path, "remote tier").map(Self).map_err(wrong)
    }

    fn code(&self, said: &[u8], body: &[u8]) -> Option<Hmac<Sha256>> {
        let mut code = Hmac::<Sha256>::new_from_slice(&self.0).ok()?;
        code.update(said);
        code.update(body);
        Some(code)
    }

    /// The head of a block.
    #[must_use]
    pub fn seal(&self, key: &StoreKey, body: &[u8]) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        head[..8].copy_from_slice(&MAGIC);
        head[8..12].copy_from_slice(&VERSION.to_le_bytes());
        head[16..64].copy_from_slice(&key.to_bytes());
        head[64..72].copy_from_slice(&(body.len() as u64).to_le_bytes());
        if let Some(code) = self.code(&head[..SAID], body) {
            head[SAID..].copy_from_slice(&code.finalize().into_bytes());
        }
        head
    }

    /// Whether this is the block of that name, as it was put by somebody with the same key.
    #[must_use]
    pub fn believes(&self, key: &StoreKey, head: &[u8; HEAD_BYTES], body: &[u8]) -> bool {
        let is_meant = head[..8] == MAGIC
            && head[8..12] == VERSION.to_le_bytes()
            && head[16..64] == key.to_bytes()
            && head[64..72] == (body.len() as u64).to_le_bytes();
        // The comparison takes as long for every code.
        is_meant
            && self.code(&head[..SAID], body).is_some_and(|code| code.verify_slice(&head[SAID..]).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::Fingerprint;

    fn key(block: u128) -> StoreKey {
        StoreKey { fingerprint: Fingerprint(1), tenant: 2, block }
    }

    #[test]
    fn nothing_else_is_believed() {
        let (ours, others) = (RemoteKey([7; 32]), RemoteKey([8; 32]));
        let body = b"some bytes of a block";
        let head = ours.seal(&key(1), body);
        assert!(ours.believes(&key(1), &head, body));
        assert!(!ours.believes(&key(2), &head, body), "another name's");
        assert!(!others.believes(&key(1), &head, body), "another key");
        assert!(!ours.believes(&key(1), &head, &body[1..]) && !ours.believes(&key(1), &head, &[]));
        assert!(!ours.believes(&key(1), &[0; HEAD_BYTES], body));
        for bit in 0..8 * HEAD_BYTES {
            let mut wrong = head;
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert!(!ours.believes(&key(1), &wrong, body), "bit {bit} of the head");
        }
        for bit in 0..8 * body.len() {
            let mut wrong = *body;
            wrong[bit / 8] ^= 1 << (bit % 8);
            assert!(!ours.believes(&key(1), &head, &wrong), "bit {bit} of the body");
        }
        assert_eq!(format!("{ours:?}"), "RemoteKey(..)");
    }

    proptest! {
        #[test]
        fn no_bytes_at_all_are_believed(
            head in proptest::collection::vec(any::<u8>(), HEAD_BYTES),
            body in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let (ours, mut noise) = (RemoteKey([7; 32]), [0; HEAD_BYTES]);
            noise.copy_from_slice(&head);
            prop_assert!(!ours.believes(&key(1), &noise, &body));
            // With all that is no secret in its place too.
            let mut like = ours.seal(&key(1), &body);
            like[SAID..].copy_from_slice(&head[SAID..]);
            prop_assert!(!ours.believes(&key(1), &like, &body));
        }
    }
}
