//! What makes bytes on a disk a block's: checksums, or, with a key, encryption at rest.
//!
//! Apart because it is all that a stolen disk is up against. With a key each block is sealed by AES-256-GCM (NIST SP
//! 800-38D) with a random nonce of its own, bound to its name; the tag takes the checksum's place. Names are replaced by
//! HMAC-SHA-384 of them, so that nobody can try from a disk which prompts were asked. All keys come from the user's by
//! HMAC-SHA-256 of what each is for (as NIST SP 800-108 derives keys), those of blocks from the directory's secret as well,
//! so that no two directories share one. Lengths of blocks and when they were written are to be seen. Keeps I8.

use std::path::Path;
use std::sync::Arc;

use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, KeyInit};
use hmac::{Hmac, Mac};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::{Sha256, Sha384};
use shoal_core::store::format::{Entry, NONCE_BYTES, Secret};
use shoal_core::store::key::StoreKey;

use super::error::DiskError;
use crate::key_file::{self, KEY_BYTES};

/// The key that a tier's blocks are encrypted with. It never shows what it is.
#[derive(Clone, PartialEq, Eq)]
pub struct DiskKey([u8; KEY_BYTES]);

impl core::fmt::Debug for DiskKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("DiskKey(..)")
    }
}

impl DiskKey {
    /// A key of random bytes.
    #[must_use]
    pub const fn new(bytes: [u8; KEY_BYTES]) -> Self {
        Self(bytes)
    }

    /// The key in a file: 32 bytes, or 64 hexadecimal digits, as `openssl rand -hex 32` writes them. A file that others may
    /// read is taken, with a warning: secrets are mounted so in containers.
    ///
    /// # Errors
    /// `KeyFile`.
    pub fn from_file(path: &Path) -> Result<Self, DiskError> {
        let wrong = |reason| DiskError::KeyFile { path: path.to_owned(), reason };
        key_file::read(path, "disk tier").map(Self).map_err(wrong)
    }

    /// 32 bytes for one purpose; none of them tells anything of the key, or of those for another.
    fn derived(&self, purpose: &str, salt: &[u8]) -> Option<[u8; KEY_BYTES]> {
        // An HMAC takes keys of any length, so there is always one.
        let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(&self.0).ok()?;
        mac.update(purpose.as_bytes());
        // What ends the purpose, so that no salt goes on with it.
        mac.update(&[0]);
        mac.update(salt);
        Some(mac.finalize().into_bytes().into())
    }

    /// What a directory notes, so that another key is told from damage. It says nothing of the key.
    pub(super) fn check(&self, secret: Secret) -> Option<u128> {
        let derived = self.derived("shoal disk: check", &secret.0.to_le_bytes())?;
        derived.first_chunk().copied().map(u128::from_le_bytes)
    }
}

pub(super) fn no_cipher() -> DiskError {
    let reason = "nothing can be encrypted with its key".to_owned();
    DiskError::Options { path: Path::new("tier").to_owned(), reason }
}

/// What names of blocks are replaced by on a disk.
pub(super) struct Names(Option<Hmac<Sha384>>);

impl core::fmt::Debug for Names {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Names(..)")
    }
}

impl Names {
    /// As they are without a key.
    ///
    /// # Errors
    /// `Options`, if nothing can be derived from the key.
    pub(super) fn new(key: Option<&DiskKey>) -> Result<Self, DiskError> {
        let Some(key) = key else { return Ok(Self(None)) };
        let key = key.derived("shoal disk: names", &[]).ok_or_else(no_cipher)?;
        let mac = <Hmac<Sha384> as KeyInit>::new_from_slice(&key).map_err(|_| no_cipher())?;
        Ok(Self(Some(mac)))
    }

    /// What a block is called on the disk.
    pub(super) fn on_disk(&self, name: &StoreKey) -> StoreKey {
        let Some(mac) = &self.0 else { return *name };
        let hidden: [u8; StoreKey::BYTES] =
            mac.clone().chain_update(name.to_bytes()).finalize().into_bytes().into();
        StoreKey::from_bytes(&hidden)
    }
}

/// What makes a block's bytes, on one disk.
pub(super) struct Codec {
    secret: Secret,
    seal: Option<Aes256Gcm>,
}

impl core::fmt::Debug for Codec {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Codec").field("is_sealing", &self.is_sealing()).finish_non_exhaustive()
    }
}

impl Codec {
    /// Checksums of a directory, and encryption where there is a key.
    ///
    /// # Errors
    /// `Options`, if nothing can be derived from the key.
    pub(super) fn new(secret: Secret, key: Option<&DiskKey>) -> Result<Arc<Self>, DiskError> {
        let seal_of = |key: &DiskKey| {
            let key = key.derived("shoal disk: blocks", &secret.0.to_le_bytes())?;
            Some(Aes256Gcm::new(&key.into()))
        };
        let seal = key.map(|key| seal_of(key).ok_or_else(no_cipher)).transpose()?;
        Ok(Arc::new(Self { secret, seal }))
    }

    pub(super) fn secret(&self) -> Secret {
        self.secret
    }

    /// Whether blocks are encrypted.
    pub(super) fn is_sealing(&self) -> bool {
        self.seal.is_some()
    }

    /// Notes what tells these bytes from others; none of them changes. For a codec without a key.
    pub(super) fn note(&self, entry: &mut Entry, payload: &[u8]) {
        entry.checksum = self.secret.of_payload(&entry.key, payload);
    }

    /// Encrypts a block in place where there is a key, and notes what tells it from other bytes. Whether it could; if not,
    /// the bytes are not to be written.
    pub(super) fn close(&self, entry: &mut Entry, payload: &mut [u8]) -> bool {
        let Some(seal) = &self.seal else {
            self.note(entry, payload);
            return true;
        };
        let mut nonce = [0; NONCE_BYTES];
        // A nonce of zeroes stands for a block that is not encrypted.
        while nonce == [0; NONCE_BYTES] {
            if getrandom(&mut nonce, GetRandomFlags::empty()) != Ok(NONCE_BYTES) {
                return false;
            }
        }
        let bound_to = entry.key.to_bytes();
        let Ok(tag) = seal.encrypt_inout_detached(&nonce.into(), &bound_to, payload.into()) else {
            return false;
        };
        (entry.nonce, entry.checksum) = (nonce, u128::from_le_bytes(tag.into()));
        true
    }

    /// Whether these bytes are the block's as it was written; then they are decrypted in place. Else what is left of them
    /// means nothing.
    pub(super) fn open(&self, entry: &Entry, payload: &mut [u8]) -> bool {
        match (&self.seal, entry.is_sealed()) {
            (None, false) => self.secret.of_payload(&entry.key, payload) == entry.checksum,
            (Some(seal), true) => {
                let (nonce, tag) = (entry.nonce.into(), entry.checksum.to_le_bytes().into());
                seal.decrypt_inout_detached(&nonce, &entry.key.to_bytes(), payload.into(), &tag).is_ok()
            }
            // A checksum proves nothing against whoever has the disk, and without the key nothing can be read.
            (Some(_), false) | (None, true) => false,
        }
    }

    /// Whether these bytes are the block's; none of them changes.
    pub(super) fn is_right(&self, entry: &Entry, payload: &[u8]) -> bool {
        match (&self.seal, entry.is_sealed()) {
            (None, false) => self.secret.of_payload(&entry.key, payload) == entry.checksum,
            _ => self.open(entry, &mut payload.to_vec()),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;
    use shoal_core::store::key::Fingerprint;

    use super::*;

    const KEY: DiskKey = DiskKey::new([7; KEY_BYTES]);

    fn entry(block: u128, bytes: u32) -> Entry {
        Entry { key: named(block), offset: 8192, bytes, checksum: 0, nonce: [0; NONCE_BYTES] }
    }

    fn named(block: u128) -> StoreKey {
        StoreKey { fingerprint: Fingerprint(1), tenant: 2, block }
    }

    #[test]
    fn a_key_is_32_bytes_or_64_digits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let said = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            DiskKey::from_file(&path)
        };
        let digits = "07".repeat(KEY_BYTES);
        assert_eq!(said(&[7; KEY_BYTES]).unwrap(), KEY);
        assert_eq!(said(format!("{digits}\n").as_bytes()).unwrap(), KEY);
        assert_eq!(format!("{:?}", said(digits.as_bytes()).unwrap()), "DiskKey(..)");
        for wrong in ["", "07", &digits[2..], &"0x".repeat(KEY_BYTES), &"x".repeat(9000)] {
            let error = said(wrong.as_bytes()).unwrap_err();
            assert!(matches!(error, DiskError::KeyFile { .. }) && !error.is_passing(), "{error}");
            assert!(error.to_string().contains("openssl rand -hex 32"), "{error}");
        }
        let error = DiskKey::from_file(&folder.path().join("none")).unwrap_err();
        assert!(error.to_string().contains("No such file"), "{error}");
    }

    #[test]
    fn names_on_the_disk_say_nothing_and_are_always_the_same() {
        let (plain, sealing) = (Names::new(None).unwrap(), Names::new(Some(&KEY)).unwrap());
        let other = Names::new(Some(&DiskKey::new([8; KEY_BYTES]))).unwrap();
        let (one, two) = (named(1), named(2));
        assert_eq!(plain.on_disk(&one), one);
        let hidden = sealing.on_disk(&one);
        assert_eq!(hidden, Names::new(Some(&KEY)).unwrap().on_disk(&one));
        assert!(hidden != one && hidden != sealing.on_disk(&two) && hidden != other.on_disk(&one));
        // Not even that two blocks are of one model, or of one tenant.
        assert!(hidden.fingerprint != sealing.on_disk(&two).fingerprint);
        assert!(hidden.tenant != sealing.on_disk(&two).tenant);
    }

    proptest! {
        #[test]
        fn what_was_closed_opens_and_nothing_else_does(
            payload in proptest::collection::vec(any::<u8>(), 1..20_000),
            flip in any::<prop::sample::Index>(),
            is_sealing in any::<bool>(),
        ) {
            let key = is_sealing.then_some(&KEY);
            let codec = Codec::new(Secret(5), key).unwrap();
            let mut entry = entry(1, u32::try_from(payload.len()).unwrap());
            let mut bytes = payload.clone();
            prop_assert!(codec.close(&mut entry, &mut bytes));
            prop_assert_eq!(entry.is_sealed(), is_sealing);
            if is_sealing && payload.len() >= 32 {
                prop_assert!(bytes != payload, "it lies there as it is");
            }
            prop_assert!(codec.is_right(&entry, &bytes));
            let opens = |codec: &Codec, entry: &Entry, bytes: &[u8]| codec.open(entry, &mut bytes.to_vec());

            // Another bit, another name, another directory, another key, or taken for the other kind.
            let mut damaged = bytes.clone();
            damaged[flip.index(payload.len())] ^= 1;
            prop_assert!(!opens(&codec, &entry, &damaged) && !codec.is_right(&entry, &damaged));
            let renamed = Entry { key: named(2), ..entry };
            prop_assert!(!opens(&codec, &renamed, &bytes));
            prop_assert!(!opens(&Codec::new(Secret(6), key).unwrap(), &entry, &bytes));
            let other = if is_sealing { DiskKey::new([9; KEY_BYTES]) } else { KEY };
            prop_assert!(!opens(&Codec::new(Secret(5), Some(&other)).unwrap(), &entry, &bytes));
            prop_assert!(!is_sealing || !opens(&Codec::new(Secret(5), None).unwrap(), &entry, &bytes));

            // Closed again it has another nonce, and other bytes.
            let (mut again, mut twice) = (entry, payload.clone());
            prop_assert!(codec.close(&mut again, &mut twice));
            prop_assert_eq!(again.nonce == entry.nonce, !is_sealing);

            prop_assert!(codec.open(&entry, &mut bytes));
            prop_assert_eq!(bytes, payload);
        }
    }
}
