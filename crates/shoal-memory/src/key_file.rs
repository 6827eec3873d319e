//! A key of 32 bytes in a file: of a disk that is encrypted, of a remote that several servers share.
//!
//! Apart because both are written and read alike, and neither may ever be shown.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Bytes of a key.
pub(crate) const KEY_BYTES: usize = 32;
/// A longer file is no key's.
const FILE_BYTES_MAX: u64 = 4096;

/// The key in a file: 32 bytes, or 64 hexadecimal digits, as `openssl rand -hex 32` writes them. A file that others may read
/// is taken, with a warning that names `whose` key it is: secrets are mounted so in containers.
///
/// # Errors
/// Why there is none, in words.
pub(crate) fn read(path: &Path, whose: &str) -> Result<[u8; KEY_BYTES], String> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| error.to_string())?;
    warn_if_open(&file, path, &format!("{whose}'s key")).map_err(|error| error.to_string())?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    let key = parse(&bytes)
        .ok_or_else(|| format!("it has {} bytes, not 32 and not 64 hexadecimal digits", bytes.len()))?;
    Ok(key)
}

/// Warns where others than its owner may read a file with a secret.
pub(crate) fn warn_if_open(file: &File, path: &Path, what: &str) -> io::Result<()> {
    let mode = file.metadata()?.mode();
    if mode & 0o077 != 0 {
        tracing::warn!(path = %path.display(), mode = format!("{:03o}", mode & 0o777), "others may read the {what}: chmod 600");
    }
    Ok(())
}

/// A key as it stands in a file, or none.
fn parse(bytes: &[u8]) -> Option<[u8; KEY_BYTES]> {
    if let Ok(key) = bytes.try_into() {
        return Some(key);
    }
    let digits = bytes.trim_ascii();
    let mut key = [0; KEY_BYTES];
    if digits.len() != 2 * KEY_BYTES || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in key.iter_mut().zip(digits.chunks(2)) {
        *byte = u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(key)
}
